#!/usr/bin/env python3
"""Does reading stay fast with 100,000 counters?

    python benchmarks/many_counters.py                   # three nodes
    python benchmarks/many_counters.py --nodes 1

In turn for one counter and for many: increments at a fixed rate, spread over all counters of a node,
and GET /count/NAME of random ones at the same node, and at a peer that merges what it is sent.
Prints p50 and p99 of the reads, medians of the rounds, and for the many a read while a node joins.
"""

import argparse
import contextlib
import itertools
import random
import statistics
import sys
import time

from load import ask, connect, exit_status, percentile, process
from measurements import create_counters
from nodes import start_node, wait_until


def count_at(port, counters, per_s):
    """Increment random counters, so many per second; over one connection."""
    rng, due = random.Random(1), time.monotonic()
    with connect(port) as sock:
        while True:
            ask(sock, f"POST /increment/counter-{rng.randrange(counters)}")
            due = max(due + 1 / per_s, time.monotonic() - 0.1)
            time.sleep(max(0.0, due - time.monotonic()))  # keeps the rate


def read_s(port, counters, seconds):
    """Return how long reads of random counters took, in order."""
    rng, took_s, end = random.Random(2), [], time.monotonic() + seconds
    with connect(port) as sock:
        while time.monotonic() < end:
            started = time.monotonic()
            ask(sock, f"GET /count/counter-{rng.randrange(counters)}")
            took_s.append(time.monotonic() - started)
            time.sleep(0.001)  # a reader, not a flood
    return sorted(took_s)


def run(options):
    figures = {}
    with contextlib.ExitStack() as stack:
        clusters = {}
        for counters in (1, options.counters):
            nodes = [stack.enter_context(start_node())]
            nodes[0].wait_listening()
            nodes += [stack.enter_context(start_node(nodes[:1])) for _ in range(options.nodes - 1)]
            for node in nodes[1:]:
                node.wait_listening()
            last = create_counters(nodes[0], counters)
            for node in nodes:
                with connect(node.port) as sock:
                    ask(sock, f"GET /count?after={last}&timeout=60")
            clusters[counters] = nodes
        for _, (counters, nodes) in itertools.product(range(options.rounds), clusters.items()):
            with process(count_at, nodes[0].port, counters, options.per_s):
                for where, node in {"same node": nodes[0], "a peer": nodes[-1]}.items():
                    took_s = read_s(node.port, counters, options.seconds)
                    figures.setdefault((where, counters), []).append(
                        [percentile(took_s, at) * 1e3 for at in (0.5, 0.99)]
                    )
        nodes = clusters[options.counters]
        with start_node(nodes[:1]) as joiner:
            joiner.wait_listening()
            joining = read_s(nodes[0].port, options.counters, 2)
            with connect(joiner.port) as sock:
                wait_until(lambda: ask(sock, "GET /count/counter-0")["count"], "the joiner has the counters")
    for (where, counters), rounds in sorted(figures.items()):
        p50_ms, p99_ms = map(statistics.median, zip(*rounds, strict=True))
        print(
            f"{options.nodes} nodes, {counters:>7,} counters, GET at {where:9}: "
            f"p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms"
        )
    print(
        f"a node joins, {options.counters:,} counters: p99 {percentile(joining, 0.99) * 1e3:.1f} ms, "
        f"max {joining[-1] * 1e3:.0f} ms"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--counters", type=int, default=100_000)
    parser.add_argument("--per-s", type=int, default=300, help="increments per second")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each of the reads")
    parser.add_argument("--rounds", type=int, default=5)
    return exit_status(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

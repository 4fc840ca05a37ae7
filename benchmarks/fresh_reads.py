"""Is a fresh read ever stale, and how long does it take?  Five nodes under load, read right after an increment.

python benchmarks/fresh_reads.py

Clients increment at a random node and read at a random other one, with ?fresh=true, each a counter of its own,
while increments load all nodes.  In turn with that they read without it, to show how often that is stale.
Needs Linux, and loads only loopback.
"""

import argparse
import contextlib
import json
import math
import random
import sys
import threading
import time

from load import Failed, as_bytes, ask, connect, drive, fork, percentile, process
from nodes import cluster


class Client:
    """Counts and reads over a connection to each node."""

    def __init__(self, number, ports):
        self.name, self.rng = f"client-{number}", random.Random(number)
        self.socks, self.counted = [connect(port) for port in ports], 0
        self.stale, self.latencies_s = {"true": 0, "false": 0}, {"true": [], "false": []}

    def use(self, reads):
        for _ in range(reads):
            for fresh in self.stale:
                writer, reader = self.rng.sample(self.socks, 2)
                ask(writer, f"POST /increment/{self.name}")
                self.counted += 1
                began = time.perf_counter()
                count = ask(reader, f"GET /count/{self.name}?fresh={fresh}")["count"]
                self.latencies_s[fresh].append(time.perf_counter() - began)
                self.stale[fresh] += count != self.counted

    def close(self):
        for sock in self.socks:
            sock.close()


def measure(size, clients, reads, loading):
    """Return {"true" or "false": (reads, stale ones, latencies in seconds, sorted)}, by whether they were fresh."""
    with contextlib.ExitStack() as stack:
        ports = [node.port for node in stack.enter_context(cluster(size))]
        if loading:
            _, sender = fork.Pipe(duplex=False)
            load = as_bytes("POST /increment/load")
            stack.enter_context(process(drive, ports * loading, load, math.inf, math.inf, fork.Barrier(1), sender))
        users = [stack.enter_context(contextlib.closing(Client(number, ports))) for number in range(clients)]
        errors = []

        def use(user):
            try:
                user.use(reads // clients)
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=use, args=(user,)) for user in users]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise Failed(str(errors[0]))
        return {
            fresh: (
                sum(len(user.latencies_s[fresh]) for user in users),
                sum(user.stale[fresh] for user in users),
                sorted(latency for user in users for latency in user.latencies_s[fresh]),
            )
            for fresh in ("true", "false")
        }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4, help="that read at a time")
    parser.add_argument("--reads", type=int, default=10_000, help="fresh ones, of all clients together")
    parser.add_argument("--load", type=int, default=1, help="connections that load each node with increments")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        found = measure(options.nodes, options.clients, options.reads, options.load)
    except Failed as failed:
        sys.exit(f"FAILED: {failed}")
    for fresh, (reads, stale, latencies_s) in found.items():
        p50_ms, p99_ms = (percentile(latencies_s, share) * 1e3 for share in (0.5, 0.99))
        figures = {"fresh": fresh, "reads": reads, "stale": stale, "p50_ms": p50_ms, "p99_ms": p99_ms}
        text = f"fresh={fresh}: {reads:,} reads, {stale:,} stale, p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms"
        print(json.dumps(figures) if options.json else text)
    return 1 if found["true"][1] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Batches whose answers get lost, retried under their keys at nodes that cannot talk, at a real cluster.

python tests/batch_retries.py --batches 200 --names 1000
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import time
from pathlib import Path

from conftest import wait_until
from faults import BadNetwork

SIZE = 3
PATIENCE_S = 120  # that a busy machine answers late is no failure


def send_and_lose_the_answer(node, headers, body, marker):
    """Send a batch and hang up before the answer can arrive; return once it was counted.

    `marker` is a counter that is in this batch alone.  Another would not tell: while a node takes in what was
    counted twice, a reader may see it for a moment before it is cancelled.
    """
    headers = {"Host": "localhost", "Content-Length": len(body), **headers}
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(["POST /increments HTTP/1.1", *lines, "", ""])
    with contextlib.closing(socket.create_connection(("127.0.0.1", node.port), timeout=10)) as sock:
        sock.sendall(head.encode() + body)
    wait_until(lambda: node.count(marker) > 0, PATIENCE_S)


def counts(node):
    found, start = {}, ""
    while start is not None:
        answer = node.ask("GET", f"/counts?limit=1000{start and '&start='}{start}", timeout_s=PATIENCE_S)
        assert answer.status == 200, f"refused with {answer.status}: {answer.body}"
        page = answer.json()
        found |= page["counts"]
        start = page["next"]
    return found


def costs_of(pid):
    """Return how much memory a process has, in MiB, and how much CPU it has used, in seconds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run(batches, names, seed=1):
    """Lose the answer to so many batches of so many names, each in a partition; return a summary.

    AssertionError if an item counts other than once in the end.
    """
    rng, network, started = random.Random(seed), BadNetwork(SIZE, seed), time.monotonic()
    expected, took = {}, []
    try:
        for position in range(SIZE):
            # As the network ends before they do, they could hand nothing over.
            network.start(position, "--retry-backoff-max", "0.2", "--drain-timeout", "1")
        wait_until(lambda: all(len(node.peers()) == SIZE - 1 for node in network.nodes))
        for number in range(batches):
            amounts = {f"c{name}": rng.choice((-2, 1, 3)) for name in rng.sample(range(2 * names), names - 1)}
            marker = f"batch-{number}"
            amounts[marker] = 1
            headers, body = {"Idempotency-Key": marker}, json.dumps(amounts).encode()
            first, second, third = rng.sample(range(SIZE), SIZE)
            network.split([first], [second, third])
            send_and_lose_the_answer(network.nodes[first], headers, body, marker)
            answer = network.nodes[second].ask("POST", "/increments", body, headers, PATIENCE_S)
            assert (answer.status, "Idempotent-Replayed" in answer.headers) == (200, False), answer.body
            for name, amount in amounts.items():
                expected[name] = expected.get(name, 0) + amount
            network.heal()
            healed = time.monotonic()
            wait_until(lambda: all(counts(node) == expected for node in network.nodes), PATIENCE_S)
            took.append(time.monotonic() - healed)
            answer = network.nodes[third].ask("POST", "/increments", body, headers, PATIENCE_S)
            assert answer.headers["Idempotent-Replayed"] == "true", answer.body
        assert all(counts(node) == expected for node in network.nodes)
        costs = [costs_of(node.process.pid) for node in network.nodes]
        return (
            f"{batches} batches of {names} names: exact {statistics.median(took):.1f} s after healing, at most"
            f" {max(took):.1f} s; {time.monotonic() - started:.0f} s in all; each node"
            f" {max(mib for mib, _ in costs):.0f} MiB and {max(s for _, s in costs):.0f} s of CPU at most"
        )
    finally:
        network.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--names", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(run(options.batches, options.names, options.seed))

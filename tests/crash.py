"""Kills all nodes of a cluster at once, again and again, under increments that have to survive it.

    PYTHONPATH=. python tests/crash.py --nodes 3 --rounds 50
    PYTHONPATH=. python tests/crash.py --nodes 1 --rounds 200

Every increment has an idempotency key, and is sent again, to any node, until one answers that it
is durable.  So none is in doubt: after every round each node has to show exactly as many as there were.
"""

import argparse
import http.client
import random
import tempfile
import threading
import time
import uuid
from pathlib import Path

from conftest import NodeProcess, wait_until

CLIENTS = 8


class Load:
    """Clients that increment, each one time after the other, while they are not paused."""

    def __init__(self, seed):
        self.nodes, self.durable, self.retries = [], 0, 0
        self._state = threading.Condition()
        self._paused, self._over, self._resting = True, False, 0
        self._threads = [threading.Thread(target=self._run, args=(seed + number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def resume(self):
        with self._state:
            self._paused = False
            self._state.notify_all()

    def pause(self):
        """Let all finish what they are at; AssertionError if that takes too long."""
        with self._state:
            self._paused = True
            assert self._state.wait_for(lambda: self._resting == CLIENTS, 60), "increments are not durable in 60 s"

    def end(self):
        with self._state:
            self._over = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, seed):
        rng = random.Random(seed)
        while True:
            with self._state:
                self._resting += 1
                self._state.notify_all()
                self._state.wait_for(lambda: self._over or not self._paused)
                self._resting -= 1
            key, tries = str(uuid.UUID(int=rng.getrandbits(128), version=4)), 0
            while not self._over and not self._increment(rng.choice(self.nodes), key):
                tries += 1
                time.sleep(0.01)  # a client that has nothing to wait for
            if self._over:
                return
            with self._state:
                self.durable += 1
                self.retries += tries > 0

    def _increment(self, node, key):
        """Return whether a node answers that this increment is durable."""
        path = "/increment?durable=true&timeout=2"
        try:
            answer = node.ask("POST", path, headers={"Idempotency-Key": key}, timeout_s=3)
        except (OSError, http.client.HTTPException):  # it was killed: counted or not, who knows
            return False
        assert answer.status in (200, 202, 503), answer.body
        return answer.status == 200 and answer.json()["durable"]


def start(paths):
    """Start a node for each data file, all of which join through the first."""
    nodes = []
    for path in paths:
        nodes.append(NodeProcess("--data", path, peers=nodes[:1]))
    return nodes


def run(seed, size, rounds, folder, report=None):
    """Kill `size` nodes at once so many times; AssertionError if a count is wrong.  Returns a summary."""
    rng, paths = random.Random(seed), [Path(folder, f"{number}.db") for number in range(size)]
    load = Load(seed)
    load.nodes = start(paths)
    try:
        for number in range(rounds):
            load.resume()
            time.sleep(rng.uniform(0.02, 0.4))  # a random moment
            for node in load.nodes:
                node.process.kill()
            for node in load.nodes:
                node.end()
            load.nodes = start(paths)
            load.pause()
            wait_until(lambda: [node.count() for node in load.nodes] == [load.durable] * size, 30)
            if report:
                report(
                    f"round {number + 1}: {load.durable} increments, of which {load.retries} were sent more than once"
                )
        return f"size={size} rounds={rounds} increments={load.durable} retried={load.retries}: all exact"
    finally:
        load.end()
        for node in load.nodes:
            node.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(run(options.seed, options.nodes, options.rounds, folder, lambda line: print(line, flush=True)))

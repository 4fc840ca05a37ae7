#!/usr/bin/env python3
"""What do restarts leave behind?  Three nodes under load, restarted one after the other, again and again.

    python benchmarks/rolling.py                      # 30 rolling restarts, 1,000 counters
    python benchmarks/rolling.py --rolls 20 --counters 100000  # as many as the nodes take (--max-counters)
    python benchmarks/rolling.py --kills 0.2          # one stop in five is a kill -9, once the others hold everything

Prints after each roll the resident memory of the nodes, the most that any process took so far, and how many
replicas they hold, and at the end whether every count is exact.  Status 1 if one is not.
"""

import argparse
import contextlib
import json
import random
import re
import sys
import threading
import time

from load import HOST, Failed, ask, connect, receive
from nodes import start_node, wait_until

SIZE = 3
BATCH = 20  # counters that a request increments
FILLED = 1000  # counters that a request increments to begin with
PAUSE_S = 0.01  # between two requests of a client, so that restarts get a share of few cores
FLAGS = ("--heartbeat-interval", "0.2", "--peer-timeout", "2", "--join-timeout", "5")


class Client(threading.Thread):
    """Increments counters at one node; `expected` is how often all clients counted, and is told of answers only."""

    def __init__(self, port, names, expected, lock):
        super().__init__(name=f"client-{port}")
        self._port, self._names, self._expected, self._lock = port, names, expected, lock
        self._stopping, self.answered = threading.Event(), 0

    def run(self):
        rng = random.Random(self._port)
        with contextlib.closing(connect(self._port)) as sock:
            while not self._stopping.wait(PAUSE_S):
                amounts = dict.fromkeys(rng.sample(self._names, BATCH), 1)
                body = json.dumps(amounts).encode()
                head = f"POST /increments HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                sock.sendall(head.encode() + body)
                receive(sock)
                self.answered += 1
                with self._lock:
                    for name in amounts:
                        self._expected[name] += 1

    def stop(self):
        self._stopping.set()
        self.join()


class Cluster:
    """The nodes, with a client each, and what was counted."""

    def __init__(self, counters):
        self.names = [f"counter-{number}" for number in range(counters)]
        self.expected, self._lock = dict.fromkeys(self.names, 0), threading.Lock()
        self.nodes, self._stacks, self._clients, self.answered = [None] * SIZE, [None] * SIZE, [None] * SIZE, 0
        self._flags = (*FLAGS, "--max-counters", str(counters))
        self.peak_bytes = 0  # the most that a process has taken so far

    def start(self, place):
        self._stacks[place] = contextlib.ExitStack()
        peers = [node for node in self.nodes if node]
        node = self._stacks[place].enter_context(start_node(peers, self._flags))
        node.wait_listening()
        self.nodes[place] = node
        wait_until(self._all_know_each_other, "the nodes know each other")
        wait_until(lambda: self._ask(node, "GET /readyz").get("status") == "ready", "the node is ready")
        self._clients[place] = Client(node.port, self.names, self.expected, self._lock)
        self._clients[place].start()

    def fill(self):
        """Count every counter once, so that each node holds them all from the start."""
        for start in range(0, len(self.names), FILLED):
            amounts = dict.fromkeys(self.names[start : start + FILLED], 1)
            self._ask(self.nodes[0], f"POST /increments {json.dumps(amounts)}")
            with self._lock:
                for name in amounts:
                    self.expected[name] += 1

    def look(self):
        """Note the most memory that the nodes that run now have taken."""
        self.peak_bytes = max(self.peak_bytes, *(node.peak_bytes() for node in self.nodes if node))

    def stop(self, place, killed):
        """Stop a node and its client; one that is killed dies when the others hold what it counted."""
        node = self.nodes[place]
        self.look()
        self._clients[place].stop()
        self.answered += self._clients[place].answered
        if killed:
            wait_until(lambda: not self._unconfirmed(node), "the others hold everything")
        else:
            node.stop()
        self._stacks[place].close()
        self.nodes[place] = None

    @staticmethod
    def _ask(node, request):
        with contextlib.closing(connect(node.port)) as sock:
            try:
                return ask(sock, request)
            except OSError:
                return {}

    def _unconfirmed(self, node):
        return any(peer["unconfirmed"] for peer in self._ask(node, "GET /peers")["peers"] if peer["state"] == "active")

    def _all_know_each_other(self):
        nodes = [node for node in self.nodes if node]
        active = [
            sum(peer["state"] == "active" for peer in self._ask(node, "GET /peers").get("peers", [])) for node in nodes
        ]
        return active == [len(nodes) - 1] * len(nodes)

    def replicas(self, node):
        with contextlib.closing(connect(node.port)) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        return sum(map(int, re.findall(r'^counter_replicas{kind="(?:in)?active"} (\d+)$', text, re.M)))

    def wrong(self):
        """Return how many counters are wrong at each node."""
        found = []
        for node in self.nodes:
            values, page = {}, {"next": ""}
            while page["next"] is not None:
                start = f"&start={page['next']}" if page["next"] else ""
                page = self._ask(node, f"GET /counts?limit=1000{start}")
                values.update(page["counts"])
            found.append(sum(values.get(name, 0) != count for name, count in self.expected.items()))
        return found

    def stop_clients(self):
        for client in self._clients:
            client.stop()
            self.answered += client.answered

    def close(self):
        for stack in filter(None, self._stacks):
            stack.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rolls", type=int, default=30)
    parser.add_argument("--counters", type=int, default=1000)
    parser.add_argument("--kills", type=float, default=0.0, help="the share of stops that are kill -9")
    options = parser.parse_args()
    cluster, rng, kills, began = Cluster(options.counters), random.Random(1), 0, time.monotonic()
    with contextlib.closing(cluster):
        for place in range(SIZE):
            cluster.start(place)
        cluster.fill()
        for roll in range(options.rolls + 1):
            for place in range(SIZE) if roll else ():
                killed = rng.random() < options.kills
                kills += killed
                cluster.stop(place, killed)
                cluster.start(place)
            time.sleep(1)  # some sweeps
            cluster.look()
            rss = [node.rss_bytes() / 2**20 for node in cluster.nodes]
            replicas = [cluster.replicas(node) for node in cluster.nodes]
            print(
                f"roll {roll:2}: {time.monotonic() - began:5.0f} s, RSS MB {', '.join(f'{mb:.1f}' for mb in rss)},"
                f" peak so far {cluster.peak_bytes / 2**20:.1f}, replicas {replicas}, kills so far {kills}",
                flush=True,
            )
        cluster.stop_clients()
        with contextlib.suppress(Failed):
            wait_until(lambda: not any(cluster.wrong()), "all counts are exact")
        wrong = cluster.wrong()
        total = sum(cluster.expected.values())
        print(f"{total:,} increments in {cluster.answered:,} requests to {HOST}; wrong counters at each node: {wrong}")
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())

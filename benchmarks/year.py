#!/usr/bin/env python3
"""What does a year of deploys leave behind?  Ten simulated nodes, each restarted once a day, one after the other.

    python benchmarks/year.py                            # 365 days, 10,000 counters: some minutes
    python benchmarks/year.py --days 100 --kills 0.1     # one stop in ten is a crash

Each process increments some of the counters before it stops.  Printed is what a node holds at the start, after
100 days and at the end: its replicas and entries, the memory that Python allocates for them, and the bytes of a
heartbeat, while nothing is counted and while all nodes count.  Status 1 if a count is wrong in the end.
"""

import argparse
import gc
import logging
import sys
import time
import tracemalloc
from collections import Counter as Tally
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from simulation import Network

from counter import Counter, new_replica
from counter.vectors import SETTLING_S
from counter.wire import Message, View, decode, encode

REPORTED = (0, 100)  # days, beside the last one
HEARTBEATS_S = 10  # for how long their bytes are measured


class Cluster(Network):
    """Nodes over a network that loses nothing; `sizes` has the bytes of messages that compare vectors, while a list."""

    def __init__(self, nodes, counters):
        super().__init__(1, loss=0, repeat=0, delay_s=0.005, as_json=False)
        self.sizes, self.expected = None, Tally()
        self.addresses = [f"10.0.0.{number}:8080" for number in range(nodes)]
        self.counted = [f"service.requests.{number:06}" for number in range(counters)]
        for address in self.addresses:
            self.start(address, self.addresses[:2])
        self.run(20)

    def _send(self, message):
        if self.sizes is not None and message.compares:
            self.sizes.append(sum(map(len, encode(message))))
        return super()._send(message)

    def count(self, node, names):
        node.counter.increment_many(dict.fromkeys(names, 1))
        self.expected.update(names)
        self.at(self.now, node, lambda: None)  # it sends after whatever it does

    def count_all(self):
        """Have each counter counted once, by one of the nodes."""
        share = -(-len(self.counted) // len(self.addresses))
        for place, node in enumerate(self.alive()):
            if names := self.counted[place * share : (place + 1) * share]:
                self.count(node, names)
        self.run(5)

    def deploy(self, touched, kills):
        """Have every process count, and replace it by another."""
        for address in self.addresses:
            self.count(self.nodes[address], self.rng.sample(self.counted, touched))
            self.run(1)
            if self.rng.random() < kills:
                self.crash(address)
            else:
                self.stop(address)
            self.run(3)
            self.start(address, self.rng.sample([other for other in self.addresses if other != address], 2))
            self.run(2)

    def heartbeat_bytes(self, counting):
        """Return the mean size of a heartbeat or its answer."""
        self.sizes = []
        for _ in range(HEARTBEATS_S):
            for node in self.alive() if counting else ():
                self.count(node, [self.rng.choice(self.counted)])
            self.run(1)
        sizes, self.sizes = self.sizes, None
        return sum(sizes) / len(sizes)

    def wrong(self):
        """Return how many counters are wrong, at all nodes together."""
        counters = [node.counter for node in self.alive()]
        return sum(counter.value(name) != self.expected[name] for counter in counters for name in self.counted)


def memory_bytes(node, now):
    """Return what Python allocates for all that a node holds."""
    lines = list(
        encode(Message(node.table.sender(), View([], []), None, None, None, node.counter.deltas({}, 2**40, now)))
    )
    gc.collect()
    tracemalloc.start()
    counter = Counter(new_replica())
    for delta in decode(lines).deltas:
        counter.merge(delta, now)
    counter.was_loaded(now)
    del delta
    gc.collect()
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counter.vector()
    return allocated


def report(cluster, day, began):
    cluster.run(2 * SETTLING_S + 5)  # what was deployed is the past by then
    node = cluster.alive()[0]
    weight, vector = node.gossip.past.weight(), node.counter.vector()
    entries = weight.active_entries + weight.inactive_entries
    idle, counting = cluster.heartbeat_bytes(counting=False), cluster.heartbeat_bytes(counting=True)
    print(
        f"day {day:3}: {len(vector):,} replicas in the vector, {weight.absorbed:,} absorbed, {entries:,} entries,"
        f" {memory_bytes(node, cluster.now) / 2**20:.1f} MB, heartbeat {idle:,.0f} bytes, while counting"
        f" {counting:,.0f} bytes ({time.monotonic() - began:.0f} s)",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--counters", type=int, default=10_000)
    parser.add_argument("--touched", type=int, default=1000, help="counters that each process increments")
    parser.add_argument("--kills", type=float, default=0.0, help="the share of stops that are crashes")
    options = parser.parse_args()
    logging.getLogger("counter").setLevel(logging.ERROR)  # a restart is no news here
    began, cluster = time.monotonic(), Cluster(options.nodes, options.counters)
    cluster.count_all()
    report(cluster, 0, began)
    for day in range(1, options.days + 1):
        cluster.deploy(options.touched, options.kills)
        if day in REPORTED or day == options.days:
            report(cluster, day, began)
    cluster.run(5)
    wrong = cluster.wrong()
    print(f"{cluster.expected.total():,} increments, {options.nodes * options.days:,} processes ended, wrong: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

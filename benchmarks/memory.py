#!/usr/bin/env python3
"""How much memory does what a node holds take, an item?

    python benchmarks/memory.py                 # a million keys, 100,000 counters, 10,000 cancellations
    python benchmarks/memory.py --scale 0.1     # a tenth of them

Each kind is measured in a process of its own: what Python allocated, and by how much the resident
set grew.
"""

import argparse
import gc
import multiprocessing
import sys
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from counter import Counter, Delta, key_digest, new_replica

DEAD = 5  # replicas that are gone, and touched every counter


def keys(number):
    counter = Counter(new_replica(), keys_max=number)
    yield counter
    for key in range(number):
        counter.increment_once(f"key-{key}", "x", 1, key / 1000)


def keys_of_peers(number):
    counter = Counter(new_replica())
    yield counter
    for replica in [new_replica() for _ in range(DEAD)]:
        records = tuple((n + 1, key_digest(f"{replica}{n}"), "x", 1, 0.5) for n in range(number // DEAD))
        counter.merge(Delta(replica, 0, len(records), {"x": (len(records), len(records))}, records), 0)
        del records


def own_entries(number):
    counter = Counter(new_replica(), number)
    names = [f"counter-{n}" for n in range(number)]
    yield counter
    for name in names:
        counter.increment(name)


def entries_of_others(number):
    """Those of replicas that are gone, at a node that has the counters already."""
    counter, names = Counter(new_replica(), number), [f"counter-{n}" for n in range(number // DEAD)]
    for name in names:
        counter.increment(name)
    yield counter
    for _ in range(DEAD):
        totals = {name: (n + 1, n + 1) for n, name in enumerate(names)}
        counter.merge(Delta(new_replica(), 0, len(names), totals), 0)
        counter.merge(Delta(new_replica(), 0, 1, {"counter-0": (1, 1)}), 0)
        del totals


def cancellations(number):
    """Of dots of two replicas that took every key, which have been forgotten since."""
    counter, pair = Counter(new_replica(), number), sorted(new_replica() for _ in range(2))
    deltas = [
        Delta(
            replica, 0, number, {"x": (number, number)},
            tuple((n + 1, key_digest(f"key-{n}"), "x", 1, 0.0) for n in range(number)),
        )
        for replica in pair
    ]  # fmt: skip
    yield counter
    while deltas:
        counter.merge(deltas.pop(), 0)
    counter.expire(10**6)


def absorbed(number):
    """What is left of replicas that stopped in order."""
    counter = Counter(new_replica())
    counter.increment("x")
    facts = {new_replica(): (1000, new_replica(), 7, 9) for _ in range(number)}
    deltas = [Delta(new_replica(), 0, 9, {"x": (9, 1)}, absorbed=facts)]
    yield counter
    counter.merge(deltas.pop(), 0)


KINDS = {
    keys: 1_000_000,
    keys_of_peers: 1_000_000,
    own_entries: 100_000,
    entries_of_others: 500_000,
    cancellations: 10_000,
    absorbed: 10_000,
}


def resident():
    """Return the resident set of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS in /proc/self/status")


def measure(kind, number, traced, found):
    """Send by how many bytes memory grew while the items came to be."""
    steps = kind(number)
    counter = next(steps)  # held as long as it is measured
    gc.collect()
    if traced:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] if traced else resident()
    for _ in steps:
        pass
    gc.collect()
    found.put((tracemalloc.get_traced_memory()[0] if traced else resident()) - before)
    del counter


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of items")
    scale = parser.parse_args().scale
    processes = multiprocessing.get_context("spawn")
    for kind, number in KINDS.items():
        number, figures = int(number * scale), []
        for traced in (True, False):
            found = processes.Queue()
            process = processes.Process(target=measure, args=(kind, number, traced, found))
            process.start()
            figures.append(found.get() / number)
            process.join()
        name = kind.__name__.replace("_", " ")
        print(f"{number:>9,} {name:18}: {figures[0]:6.0f} bytes each, resident {figures[1]:6.0f}", flush=True)


if __name__ == "__main__":
    main()

"""What windowed counters cost: a day of them, and what many that end at once do to reads.

    python benchmarks/windows.py                  24 h of api.calls@1m for 1,000 series at two nodes, one with a file
    python benchmarks/windows.py --stall          100,000 windows that end at once, while clients read

The day passes on a virtual clock, minute by minute.  Every minute each node counts each series once, by random
amounts, and merges what the other counted; one node writes its file.  After each hour every window of every
series is compared with what was counted, at both nodes.
"""

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from counter import Counter
from counter.datawriter import Writer
from counter.state import ENDED_MIN
from counter.windows import GRACE_S, parse_series

EPOCH_S = 1_765_843_200.0  # 2025-12-16T00:00:00Z
A, B = "aaaaaaaa-aaaa-8aaa", "bbbbbbbb-bbbb-8bbb"
MIB = 2**20
SWEEP_S = 20  # between two times that a node looks what has ended


class Day:
    """Two nodes and a file on a virtual clock."""

    def __init__(self, series, keep, seed, path):
        self.now, self._rng = 0.0, random.Random(seed)
        self._names = [f"api.calls.{number}@1m" + (f":{keep}" if keep != 60 else "") for number in range(series)]
        self._keep = keep
        self.counters = [Counter(replica, wall=lambda: EPOCH_S + self.now) for replica in (A, B)]
        self._writer = Writer(path, "counter", fsync=False)
        self._counted = {name: deque([0] * keep, maxlen=keep) for name in self._names}  # the amounts of past minutes

    def close(self):
        self._writer.close()

    def minute(self):
        """Count for a minute, at both nodes; then let them exchange what they counted, save it, and drop what ended."""
        for start in range(0, len(self._names), 1000):
            names = self._names[start : start + 1000]
            here, there = ({name: self._rng.randint(1, 9) for name in names} for _ in self.counters)
            for counter, amounts in zip(self.counters, (here, there), strict=True):
                counter.increment_many(amounts)
            for name in names:
                self._counted[name].append(here[name] + there[name])
        one, other = self.counters
        for sender, receiver in ((one, other), (other, one)):
            for delta in sender.deltas(receiver.vector(), float("inf"), self.now):
                receiver.merge(delta, self.now)
        self._writer.save(one.deltas(self._writer.vector, float("inf"), self.now), EPOCH_S + self.now)
        self._pass(60)

    def end(self):
        """Let the time pass until all windows have ended, and nodes have dropped them; they do so in portions."""
        self.now += (self._keep + 2) * 60
        sweeps = GRACE_S // SWEEP_S + len(self._names) * self._keep // ENDED_MIN + 2
        self._pass(int(sweeps) * SWEEP_S)

    def _pass(self, seconds):
        for _ in range(0, seconds, SWEEP_S):
            self.now += SWEEP_S
            for counter in self.counters:
                counter.expire(self.now)
        while self._writer.end_windows(self.counters[0].horizon):
            pass

    def check(self):
        """Return how many windows were compared with what was counted; AssertionError if one is wrong."""
        compared = 0
        for name, minutes in self._counted.items():
            expected = [*minutes, 0]  # the present window is new, and nothing is counted in it yet
            for counter in self.counters:
                found = [count for _, count in counter.windows(name, self._keep + 1)]
                assert found == expected, f"{name} at {self.now}: {found} instead of {expected}"
                compared += len(found)
        return compared

    def figures(self):
        """Return (windows held, numbers of counters, most entries of one replica in memory, pages of the file)."""
        one = self.counters[0]
        rows = max(map(len, one._histories.streams.values()))
        (pages,) = self._writer._db.execute("PRAGMA page_count").fetchone()
        return one.held_windows, len(one._counters.names), rows, pages


def run_day(hours, series, keep, seed=1):
    """Let some hours pass; print and return the figures after each."""
    figures = []
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Day(series, keep, seed, f"{folder}/data")) as day:
        began = time.perf_counter()
        for hour in range(1, hours + 1):
            for _ in range(60):
                day.minute()
            compared = day.check()
            figures.append(day.figures())
            windows, numbers, rows, pages = figures[-1]
            print(
                f"{hour:3} h: {windows:7,} windows, {numbers:7,} numbers, {rows:7,} rows,"
                f" file {pages * 4096 / MIB:5.1f} MiB, {resident() / MIB:4.0f} MiB resident,"
                f" {compared:,} counts right, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
        day.end()
        left = [counter.held_windows for counter in day.counters]
        (entries,) = day._writer._db.execute("SELECT count(*) FROM entry").fetchone()
        print(f"after the end of all: {left} windows, {entries} entries in the file", flush=True)
        assert left == [0, 0] and entries == 0
    return figures


def resident():
    """Return the resident memory of this process in bytes, where the system tells."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def run_stall(windows):
    """Let many windows end at once at a node of this process while another process reads; print how long reads took."""
    from counter.config import parse_arguments
    from counter_server import Node

    node = Node(parse_arguments(["--port", "0", "--max-counters", str(windows + 1)]))
    shown = EPOCH_S
    node.counter._wall = lambda: shown
    node.start()
    names = [f"user.{number}@1m:1" for number in range(windows)]
    other = Counter(A, counters_max=windows, wall=lambda: shown)
    for start in range(0, windows, 1000):
        batch = dict.fromkeys(names[start : start + 1000], 1)
        node.counter.increment_many(batch)
        other.increment_many(batch)
    for delta in other.deltas({}, float("inf"), 0.0):
        node.counter.merge(delta, 0.0)
    node.counter.increment("plain")
    shown += 10_000
    try:
        for what in ("nothing ends", f"{windows:,} windows end"):
            reader = Reader(node.port)
            end_s = time.perf_counter()
            if what != "nothing ends":
                horizon = parse_series(names[0]).end_of(parse_series(names[0]).index_at(EPOCH_S)) + 60
                ending = threading.Thread(target=node.counter.end_windows, args=(horizon,))
                ending.start()
                ending.join()
                assert node.counter.held_windows == 0
            else:
                time.sleep(1)  # reads with nothing else going on
            took_s = time.perf_counter() - end_s
            times = sorted(reader.stop())
            p99 = times[len(times) * 99 // 100]
            print(
                f"{what} ({took_s:.2f} s): {len(times):,} reads, p50 {statistics.median(times) * 1e3:.2f} ms,"
                f" p99 {p99 * 1e3:.2f} ms, longest {times[-1] * 1e3:.1f} ms",
                flush=True,
            )
    finally:
        node.stop()


class Reader:
    """A process that reads a counter over one connection, one time after the other, and takes the times."""

    CODE = """
import http.client, sys, time
connection, times = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])), []
print("ready", flush=True)
import select
while not select.select([sys.stdin], [], [], 0)[0]:
    began = time.perf_counter()
    connection.request("GET", "/count/plain")
    connection.getresponse().read()
    times.append(time.perf_counter() - began)
    time.sleep(0.001)
print(*times)
"""

    def __init__(self, port):
        import subprocess

        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._process.stdout.readline()

    def stop(self):
        """Return the seconds that each read took."""
        out, _ = self._process.communicate("stop\n")
        return list(map(float, out.split()))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--keep", type=int, default=60, help="past windows kept of each series")
    parser.add_argument("--stall", action="store_true", help="measure reads while windows end instead")
    parser.add_argument("--windows", type=int, default=100_000, help="how many end with --stall")
    options = parser.parse_args(arguments)
    if options.stall:
        run_stall(options.windows)
    else:
        run_day(options.hours, options.series, options.keep)


if __name__ == "__main__":
    main()

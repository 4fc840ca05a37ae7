#!/usr/bin/env python3
"""The GIL convoy: how much faster is a node that may use one core only?

    python benchmarks/convoy.py                          # this checkout
    python benchmarks/convoy.py --checkout ../other

Each recv and send of a thread lets the GIL go.  If threads on another core take it at once, the thread has
to wait for it again: a request then costs several context switches, and several calls of futex() to hand the
GIL over, and a second core makes the node slower.  Prints, for all cores and for one, POST /increment per
second, and for each request the context switches (from /proc) and the calls of futex() (by strace, which
slows the node down meanwhile).  Needs Linux and wrk; without strace the last column is empty.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from load import ask, connect, exit_status, load_by_wrk
from measurements import GET, POST
from nodes import PROJECT, start_node

SETTLE_S = 0.5  # from the start of a load until it is in full swing


def tasks_of(node):
    return Path(f"/proc/{node.pid}/task").iterdir()


def context_switches(node):
    """Return how often the threads of a node, those that still run, were switched away from."""
    switches = 0
    for task in tasks_of(node):
        switches += sum(map(int, re.findall(r"ctxt_switches:\s*(\d+)", (task / "status").read_text())))
    return switches


def futex_calls(node, seconds):
    """Return how often a node calls futex() in that time; None if strace cannot tell."""
    command = ["strace", "-f", "-c", "-e", "trace=futex", "-p", str(node.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as strace:
        time.sleep(seconds)  # the calls in it are what is counted
        strace.send_signal(signal.SIGINT)
        report = strace.stderr.read()
    calls = re.search(r"^(?:\s*\S+){3}\s+(\d+)(?:\s+\d+)?\s+futex$", report, re.MULTILINE)
    return int(calls[1]) if calls else None


def measure(checkout, connections, cores, seconds):
    """Return (requests per second, context switches and calls of futex() per request)."""
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(start_node(checkout=checkout))
        node.wait_listening()
        for task in tasks_of(node):  # threads to come are bound as the one that starts them
            os.sched_setaffinity(int(task.name), cores)
        sock = stack.enter_context(connect(node.port))
        load = threading.Thread(target=load_by_wrk, args=([node.port], connections, POST, 2 * (SETTLE_S + seconds) + 1))
        load.start()
        stack.callback(load.join)
        time.sleep(SETTLE_S)

        def during(observe):
            """Return what is observed, the requests meanwhile, and the seconds."""
            count, started = ask(sock, GET)["count"], time.monotonic()
            observed = observe()
            return observed, ask(sock, GET)["count"] - count, time.monotonic() - started

        before = context_switches(node)
        _, requests, elapsed_s = during(lambda: time.sleep(seconds))
        figures = [requests / elapsed_s, (context_switches(node) - before) / requests]
        calls, requests, _ = during(lambda: futex_calls(node, seconds)) if shutil.which("strace") else (None, 1, 0)
        return [*figures, None if calls is None else calls / requests]


def compare(options):
    """Measure a node on all cores and on one in turn, and print the medians."""
    every = os.sched_getaffinity(0)
    found = {"all cores": [], "one core": []}
    for _ in range(options.rounds):
        for name, cores in zip(found, (every, {min(every)}), strict=True):
            found[name].append(measure(options.checkout, options.connections, cores, options.seconds))
    print(f"{POST}, {options.connections} connections  {'per s':>8} {'switches':>9} {'futex':>7}")
    for name, rounds in found.items():
        columns = [[value for value in column if value is not None] for column in zip(*rounds, strict=True)]
        per_s, switches, futex = (statistics.median(column) if column else None for column in columns)
        print(f"{name:31} {per_s:>8,.0f} {switches:>9.1f} {'-' if futex is None else f'{futex:.1f}':>7}")
    ratios = [one[0] / every[0] for every, one in zip(*found.values(), strict=True)]
    print(f"on one core {statistics.median(ratios):.2f} times as fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, default=PROJECT, metavar="DIR", help="the code to run")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each observation")
    parser.add_argument("--rounds", type=int, default=3, help="printed are the medians of so many")
    return exit_status(compare, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

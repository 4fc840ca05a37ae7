#!/usr/bin/env python3
"""What do connections cost?  One node with many idle ones, and many that are busy.

    python benchmarks/connections.py                          # 5,000 idle, 500 busy for 10 s

Every idle connection asks once before and once after the load.  Printed are the most memory that the node took and
the most threads that it had.  The exit status is 1 if any request failed.
"""

import argparse
import contextlib
import re
import resource
import sys
from pathlib import Path

from load import Failed, ask, connect, exit_status, fork, load_by_sockets
from nodes import PROJECT, start_node

LOOK_S = 0.05  # between two looks at the threads of the node
SPARE_FILES = 100


def threads(pid):
    return int(re.search(r"Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def watch_threads(pid, stopping, pipe):
    """Send the most threads that a process had, once `stopping` is set."""
    most = threads(pid)
    while not stopping.wait(LOOK_S):
        most = max(most, threads(pid))
    pipe.send(most)


def measure(idle, busy, seconds, checkout):
    """Print what the connections cost; Failed or OSError if a request fails."""
    flags = ("--max-connections", str(idle + busy + SPARE_FILES))
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(start_node((), flags, checkout))
        node.wait_listening()
        at_rest = node.rss_bytes()
        resting = []
        for _ in range(idle):
            resting.append(stack.enter_context(contextlib.closing(connect(node.port))))
            ask(resting[-1], "GET /count")
        with_idle, before = node.rss_bytes(), threads(node.pid)
        stopping, (receiver, sender) = fork.Event(), fork.Pipe(duplex=False)
        watcher = fork.Process(target=watch_threads, args=(node.pid, stopping, sender), daemon=True)
        watcher.start()
        load = load_by_sockets([node.port], busy, "POST /increment", seconds)
        stopping.set()
        most = receiver.recv()
        watcher.join()
        for sock in resting:
            ask(sock, "GET /count")
        counted = ask(resting[0], "GET /count")["count"] if resting else load.answered
        print(
            f"{idle:,} idle: {with_idle / 2**20:.1f} MiB ({(with_idle - at_rest) / 2**10 / max(1, idle):.1f} KiB each),"
            f" {before} threads"
        )
        print(
            f"{busy:,} busy beside them: {load.answered / load.elapsed_s:,.0f} increments/s, p50 {load.p50_ms:.1f} ms,"
            f" p99 {load.p99_ms:.1f} ms, at most {node.peak_bytes() / 2**20:.1f} MiB and {most} threads;"
            f" {load.answered:,} answered, {counted:,} counted, 0 failed"
        )
        if counted != load.answered + load.in_flight:
            raise Failed("other than answered were counted")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--idle", type=int, default=5000)
    parser.add_argument("--busy", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--checkout", type=Path, default=PROJECT, metavar="DIR", help="where counter_server.py is")
    options = parser.parse_args()
    needed = options.idle + options.busy + SPARE_FILES
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard) if hard > 0 else needed, hard))
    return exit_status(measure, options.idle, options.busy, options.seconds, options.checkout)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures the counter server: requests/s, latency, batches, convergence, CPU, lag, memory, joining.

    python benchmarks/bench.py                              # everything: about 12 minutes
    python benchmarks/bench.py --only cluster,lag --rounds 1
    python benchmarks/bench.py --paired ../other --rounds 5 # two checkouts, and the ratios
    python benchmarks/bench.py --redis --only batches,cluster-batches

It starts what it needs on free ports of loopback, and ends it.  What was counted must be right, or
its figures are FAILED.  Rounds go over all tasks in turn, and within a round what is compared is
measured in direct succession, so that a slow minute of the machine spoils no figure.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from load import Failed, Unknown, load_by_sockets, load_by_wrk
from measurements import REDIS, RIVALS, TASKS, Checkout, Redis, Skipped, single_tasks
from nodes import PROJECT
from report import print_failures, print_figures, print_pair, print_single
from rivals import redis_is_installed

NAMES = ["single", *(task.name for task in TASKS)]
WARM_UP_S = 1.0  # at most; a third of --seconds if that is less


def describe(directory):
    """Return a short name of a checkout: its commit if git knows it."""
    command = ["git", "-C", directory, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return directory.name


def checkout(given):
    directory = Path(given).resolve()
    if not (directory / "counter_server.py").is_file():
        raise argparse.ArgumentTypeError(f"{directory} has no counter_server.py")
    return directory


def names(given):
    if not set(given.split(",")) <= set(NAMES):
        raise argparse.ArgumentTypeError(f"choose of {','.join(NAMES)}")
    return given.split(",")


def numbers(given):
    return [positive(part) for part in given.split(",")]


def positive(given):
    if int(given) < 1:
        raise ValueError
    return int(given)


def parse_arguments():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--only", type=names, default=",".join(NAMES), metavar="NAME,...", help="what to measure")
    add("--rounds", type=positive, default=3, metavar="N", help="printed are the medians of so many")
    add("--paired", type=checkout, metavar="DIR", help="measure the checkout there as well, and print ratios to it")
    add("--redis", action="store_true", help="measure INCR of Redis as well, where it is installed")
    add("--seconds", type=float, default=3.0, metavar="S", help="of each load")
    add("--load", choices=("auto", "wrk", "sockets"), default="auto", help="who makes it; auto: wrk if installed")
    add("--connections", type=numbers, default="1,8,32,128,500", metavar="N,...", help="of `single`")
    add("--increments", type=positive, default=300_000, metavar="N", help="of `memory` and `join`")
    add("--counters", type=positive, default=100_000, metavar="N", help="of `join`")
    add("--probes", type=positive, default=200, metavar="N", help="increments of `message` and `lag`")
    add("--json", metavar="FILE", help="also write every figure of every round there")
    options = parser.parse_args()
    if options.load == "wrk" and not shutil.which("wrk"):
        parser.error("wrk is not installed")
    if options.redis and not redis_is_installed():
        parser.error("redis-server or redis-benchmark is not installed")
    if options.load == "auto":
        options.load = "wrk" if shutil.which("wrk") else "sockets"
    return options


def plan(options, ours, theirs):
    """Return what a round consists of: pairs (task, the systems to measure one after the other)."""
    rivals = [] if theirs else RIVALS
    nodes = [ours, theirs] if theirs else [ours]
    tasks = [task for task in (*single_tasks(options.connections), *TASKS) if task.name in options.only]
    planned = [(task, nodes + rivals if task.name == "single" else nodes) for task in tasks]
    return [*planned, (REDIS, [Redis])] if options.redis else planned


def measure(task, system, options):
    """Return {figure: value}, all of the task's; the value of one that failed is a Failed."""
    values, failure = {}, Failed("not measured")
    try:
        values.update(task.measure(system, options))
    except Unknown as error:
        failure = Skipped(f"{task.name} of {system.name}, which does not know the request: {error}")
    except (Failed, OSError, subprocess.SubprocessError) as error:
        failure = Failed(f"{task.name} of {system.name}: {error}")
    return {figure: values.get(figure, failure) for figure in task.figures}


def interrupt(*_):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # so that all processes are ended
    raise KeyboardInterrupt


def print_report(results, tasks, ours, theirs):
    compared = [task for task in tasks if (task is not REDIS if theirs else task.name == "single")]
    if theirs:
        print_pair(results, compared, theirs.name, ours.name)
    elif compared:
        print_single(results, compared, ours.name)
    print_figures(results, [task for task in tasks if task not in compared])


def main():
    """Measure and report; return the exit status: 1 if a figure failed, 130 if interrupted."""
    options = parse_arguments()
    by, options.load = options.load, load_by_wrk if options.load == "wrk" else load_by_sockets
    options.warm_up_s = min(WARM_UP_S, options.seconds / 3)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    ours, theirs = Checkout(PROJECT, "this node"), None
    if options.paired:
        ours.name, theirs = f"here {describe(PROJECT)}", Checkout(options.paired, f"there {describe(options.paired)}")
    planned, results, status = plan(options, ours, theirs), {}, 0
    try:
        for number, (task, systems) in itertools.product(range(options.rounds), planned):
            for system in systems if number % 2 else reversed(systems):  # what comes first may be at an advantage
                print(
                    f"round {number + 1} of {options.rounds}: {task.name} of {system.name}", file=sys.stderr, flush=True
                )
                for figure, value in measure(task, system, options).items():
                    results.setdefault(system.name, {}).setdefault(figure, []).append(value)
                    status = 1 if type(value) is Failed else status
    except KeyboardInterrupt:
        status = 130
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; load by {by}; rounds: {options.rounds}, medians{', INTERRUPTED' if status == 130 else ''}")
    print_report(results, [task for task, _ in planned], ours, theirs)
    print_failures(results)
    if options.json:
        report = json.dumps({"machine": machine, "figures": results}, indent=1, default="not measured: {}".format)
        Path(options.json).write_text(report + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

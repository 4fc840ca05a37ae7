#!/usr/bin/env python3
"""Measures what a data file costs and how fast it is; each round pairs nodes with a file and without.

python benchmarks/data.py                              # everything: about 2 minutes
python benchmarks/data.py --only durable,restart --rounds 1
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from load import Failed, ask, connect, load_by_sockets, percentile
from measurements import CLUSTER_CONNECTIONS, POST, converge, create_counters
from nodes import cluster, start_node, wait_until
from report import text

DURABLE_CONNECTIONS = 32


def nodes(size, folder=None):
    """Start nodes that all know each other, each with a file in the folder if there is one; end them."""
    return cluster(size, flags=lambda number: ["--data", Path(folder, f"{number}.db")] if folder else [])


def data_of(sock):
    return ask(sock, "GET /peers")["self"]["data"]


def is_saved(sock):
    data = data_of(sock)
    return data["ok"] and not data["lag_increments"]


def measure_cost(options):
    """Three nodes under increments, without files and with: increments/s until all have them all, and memory."""
    figures = {}
    for kind in ("without", "with"):
        with (
            tempfile.TemporaryDirectory(dir=options.folder) as folder,
            nodes(3, folder if kind == "with" else None) as three,
        ):
            ports = [node.port for node in three]
            _, before = converge(three, 0, load_by_sockets(ports, CLUSTER_CONNECTIONS, POST, 1))
            load = load_by_sockets(ports, CLUSTER_CONNECTIONS, POST, options.seconds)
            when, _ = converge(three, before, load)
            figures[kind] = load.answered / (when - load.started), max(node.rss_bytes() for node in three)
            yield f"3 nodes {kind} files: converged increments/s", figures[kind][0]
            yield f"3 nodes {kind} files: seconds from the last answer until then", when - load.started - load.elapsed_s
        yield f"3 nodes {kind} files: latency p99, ms", load.p99_ms
    yield "… with, as a share of without", figures["with"][0] / figures["without"][0]
    yield "… memory of a node, with less without, MB", (figures["with"][1] - figures["without"][1]) / 1e6


def measure_durable(options):
    """One node, increments that wait for the disk: one after the other, and many at once."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, nodes(1, folder) as (node,):
        for connections in (1, DURABLE_CONNECTIONS):
            load = load_by_sockets([node.port], connections, f"{POST}?durable=true", options.seconds)
            yield f"durable, {connections} connections: increments/s", load.answered / load.elapsed_s
            yield f"durable, {connections} connections: latency p50, ms", load.p50_ms
            yield f"durable, {connections} connections: latency p99, ms", load.p99_ms
        path = Path(folder, "fsync")
        with open(path, "wb") as file:
            began, times = time.monotonic(), 0
            while time.monotonic() - began < 1:
                os.write(file.fileno(), bytes(4096))
                os.fdatasync(file.fileno())
                times += 1
        yield "this disk: 4 KiB written and synced, times/s", times


def measure_restart(options):
    """One node with many counters: its file, its next start, and reads while it saves all of them at once."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = Path(folder, "volume")
        data.mkdir()
        with nodes(1, data) as (node,):
            create_counters(node, options.counters)
            with connect(node.port) as sock:
                wait_until(lambda: is_saved(sock), "all is saved")
            yield from measure_reads(options, node, data)
        yield "file, bytes per counter", sum(file.stat().st_size for file in data.glob("*.db")) / options.counters
        with start_node(flags=["--data", data / "0.db"]) as node:
            node.wait_listening()
            with connect(node.port) as sock:
                ask(sock, "GET /readyz")
                yield f"restart with {options.counters} counters: seconds until ready", time.monotonic() - node.started
                if ask(sock, f"GET /count/counter-{options.counters - 1}")["count"] != 2:
                    raise Failed("a count is wrong after a restart")


def measure_reads(options, node, data):
    """Change all counters while the file cannot be reached, so that one transaction has them all."""
    away, reads, over = data.with_name("away"), [], threading.Event()

    def read():
        with connect(node.port) as sock:
            while not over.is_set():
                began = time.monotonic()
                ask(sock, "GET /count/counter-7")
                reads.append((began, time.monotonic() - began))

    data.rename(away)
    create_counters(node, options.counters)
    with connect(node.port) as sock:
        wait_until(lambda: not data_of(sock)["ok"], "the file fails")
        before = commit_seconds(sock)
        reader = threading.Thread(target=read)
        reader.start()
        away.rename(data)
        wait_until(lambda: is_saved(sock), "all is saved")
        ended = time.monotonic()
        over.set()
        reader.join()
        seconds = commit_seconds(sock) - before
    during = sorted(elapsed for began, elapsed in reads if ended - seconds - 0.05 < began < ended)
    yield f"a transaction of {options.counters} counters, seconds", seconds
    yield "… reads meanwhile, p50, ms", percentile(during, 0.5) * 1e3
    yield "… reads meanwhile, p99, ms", percentile(during, 0.99) * 1e3
    yield "… reads meanwhile, longest, ms", percentile(during, 1.0) * 1e3


def commit_seconds(sock):
    sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\n") or b"process_cpu_seconds_total" not in answer:
        answer += sock.recv(2**20)
    (line,) = [line for line in answer.decode().splitlines() if line.startswith("counter_data_commit_seconds_total ")]
    return float(line.split()[1])


MEASUREMENTS = {"cost": measure_cost, "durable": measure_durable, "restart": measure_restart}


def main():
    """Measure, and print the medians of all rounds with the least and the most."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", default=",".join(MEASUREMENTS), metavar="NAME,...", help=f"of {','.join(MEASUREMENTS)}")
    add("--rounds", type=int, default=5, metavar="N", help="printed are the medians of so many; default 5")
    add("--seconds", type=float, default=3.0, metavar="S", help="of each load; default 3")
    add("--counters", type=int, default=100_000, metavar="N", help="of `restart`; default 100,000")
    add("--folder", metavar="PATH", help="where the files are, on the disk to measure; default: for temporary files")
    options = parser.parse_args()
    figures = {}
    for number in range(options.rounds):
        for name in options.only.split(","):
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            for figure, value in MEASUREMENTS[name](options):
                figures.setdefault(figure, []).append(value)
    for figure, values in figures.items():
        spread = f"  ({text(min(values))} to {text(max(values))})" if len(values) > 1 else ""
        print(f"{figure:60} {text(statistics.median(values)):>8}{spread}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Measures the counter server: requests/s, latency, convergence, lag, memory, joining.

    python benchmarks/bench.py                              # everything: about 6 minutes
    python benchmarks/bench.py --only cluster,lag --rounds 1

A measurement is a generator of (figure, value).  It starts the nodes it needs as processes on
free ports of loopback, and ends them.  What it counted must be right, or its figures are FAILED.
Rounds go over all measurements in turn, so that a slow minute of the machine spoils no figure.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from load import (
    HOST,
    PATIENCE_S,
    Failed,
    Load,
    as_bytes,
    ask,
    connect,
    load_by_sockets,
    load_by_wrk,
    percentile,
    process,
    receive,
)

PROJECT = Path(__file__).resolve().parent.parent
GET, POST = "GET /count", "POST /increment"
SINGLE = [(request, connections) for request in (GET, POST) for connections in (1, 8, 32)]
SERVERS = ("counter", "http.server", "bare thread")
CLUSTER_CONNECTIONS = 8  # to each of the three nodes
POLL_S = 0.002  # between two looks at another process
SETTLE_S = 0.2  # in which a count that is right must not change any more

FIGURES = {  # measurement -> {figure: what it is}; those of `single` are printed as a table of their own
    "single": {
        f"{server}, {request}, {connections} connections, {unit}": None
        for (request, connections), server, unit in itertools.product(SINGLE, SERVERS, ("per_s", "p50_ms", "p99_ms"))
    },
    "cluster": {
        "cluster_answered_per_s": "3 nodes, all loaded: increments/s answered",
        "cluster_converged_per_s": "… increments/s, until all nodes show all of them",
        "cluster_convergence_s": "… seconds from the last answer until then",
        "cluster_p50_ms": "… latency p50, ms",
        "cluster_p99_ms": "… latency p99, ms",
        "cluster_cpu_us": "… CPU of all nodes per increment, µs",
    },
    "lag": {
        "idle_cpu_percent": "3 nodes, idle: CPU per node, % of a core",
        "lag_p50_ms": "… propagation lag p50, ms",
        "lag_p99_ms": "… propagation lag p99, ms",
    },
    "memory": {
        "memory_bytes_per_increment": "one node: memory per increment, bytes",
    },
    "join": {
        "join_first_answer_s": "a fourth node: seconds from its start to its first answer",
        "join_increments_s": "… from then to the count of all --increments",
        "join_counters_s": "… from then to all --counters, where there are that many",
    },
}

# What is measured: nodes, and two small servers to compare with.


class Node:
    """A node of the counter server, running as a process; `port` is known once it listens."""

    def __init__(self, process, log, started):
        self._process, self._log, self.started, self.port = process, log, started, None

    def wait_listening(self):
        def listening():
            log = os.pread(self._log.fileno(), 2**16, 0).decode()
            if self._process.poll() is not None:
                raise Failed(f"a node ended at once: {log}")
            return re.search(r"listening: addr=\S+:(\d+)", log)

        self.port = int(wait_until(listening, "a node listens")[1])

    def kill(self):
        self._process.kill()
        self._process.wait()

    def cpu_s(self):
        """Return the CPU seconds used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, see proc(5)

    def rss_bytes(self):
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def start_node(peers=(), flags=()):
    """Start a node, with more flags of the command line, and end it at the end of `with`."""
    seeds = ["--peers", ",".join(f"{HOST}:{peer.port}" for peer in peers)] if peers else []
    command = [sys.executable, PROJECT / "counter_server.py", "--port", "0", "--max-counters", "1000000", *seeds]
    command += map(str, flags)
    started = time.monotonic()
    with (
        tempfile.TemporaryFile() as log,
        # In a session of its own it gets no Ctrl-C; it is ended by this program.
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True) as node,
    ):
        try:
            yield Node(node, log, started)
        finally:
            node.kill()  # nothing is worth handing over


@contextlib.contextmanager
def cluster(size):
    """Start nodes that all know each other; end them."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(start_node())]
        nodes[0].wait_listening()
        nodes += [stack.enter_context(start_node(nodes[:1])) for _ in range(size - 1)]
        for node in nodes[1:]:
            node.wait_listening()
        socks = [stack.enter_context(connect(node.port)) for node in nodes]

        def all_active():
            found = [[peer["state"] for peer in ask(sock, "GET /peers")["peers"]] for sock in socks]
            return all(states == ["active"] * (size - 1) for states in found)

        wait_until(all_active, "the nodes know each other")
        yield nodes


class PlainHandler(BaseHTTPRequestHandler):
    """A counter as the standard library suggests; without the buffer it would be slower still."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    lock, count = threading.Lock(), 0

    def do_GET(self):
        self._answer(PlainHandler.count)

    def do_POST(self):
        with self.lock:
            PlainHandler.count += 1
            count = PlainHandler.count
        self._answer(count)

    def _answer(self, count):
        body = json.dumps({"name": "default", "count": count}).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve_plainly(listener):
    server = ThreadingHTTPServer(listener.getsockname(), PlainHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()


def serve_fixed_bytes(listener):
    """Do the least that a thread per connection can do: no Python server with threads is faster here."""
    body = b'{"name": "default", "count": 1}\n'
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def serve(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, contextlib.suppress(OSError):
            while sock.recv(65536):
                sock.sendall(answer)

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


# Waiting and checking.


def wait_until(condition, what):
    """Return the first true value of condition(); Failed if there is none in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(POLL_S)  # polling another process: there is no event to wait for
    return value


def check(count, before, load):
    """Raise Failed unless everything answered was counted, and nothing that was not sent."""
    least, most = before + load.answered, before + load.answered + load.in_flight
    if not least <= count <= most:
        raise Failed(f"the count is {count}, right is {least} to {most}")


def converge(nodes, before, load):
    """Return when all nodes came to show the same count, and that count; Failed if it is not right."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(node.port)) for node in nodes]

        def counts():
            return [ask(sock, GET)["count"] for sock in socks]

        def same():
            found = counts()
            return min(found) == max(found) >= before + load.answered

        wait_until(same, "all nodes show all increments")
        when = time.monotonic()
        time.sleep(SETTLE_S)  # a time in which nothing may change
        count, *others = counts()
        if any(other != count for other in others):
            raise Failed(f"the nodes differ again: {count}, {others}")
        check(count, before, load)
        return when, count


# The measurements.


def measure_single(options):
    """One node, and the servers to compare with, each request at several numbers of connections."""
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(start_node())
        node.wait_listening()
        ports = {"counter": node.port}
        for server, serve in (("http.server", serve_plainly), ("bare thread", serve_fixed_bytes)):
            with socket.create_server((HOST, 0), backlog=128) as listener:
                ports[server] = listener.getsockname()[1]
                stack.enter_context(process(serve, listener))
        for port in ports.values():
            options.load([port], 8, POST, min(1, options.seconds / 3))  # to warm up
        for (request, connections), server in itertools.product(SINGLE, ports):
            key = f"{server}, {request}, {connections} connections"
            try:
                with connect(ports[server]) as sock:
                    before = ask(sock, GET)["count"]
                    load = options.load([ports[server]], connections, request, options.seconds)
                    if server != "bare thread":
                        counted = load if request == POST else load._replace(answered=0, in_flight=0)
                        check(ask(sock, GET)["count"], before, counted)
            except Failed as failure:
                yield from ((f"{key}, {unit}", failure) for unit in ("per_s", "p50_ms", "p99_ms"))
                continue
            yield f"{key}, per_s", load.answered / load.elapsed_s
            yield f"{key}, p50_ms", load.p50_ms
            yield f"{key}, p99_ms", load.p99_ms


def measure_cluster(options):
    """Three nodes, all loaded at once, until all of them show all increments."""
    with cluster(3) as nodes:
        ports = [node.port for node in nodes]
        _, before = converge(nodes, 0, options.load(ports, CLUSTER_CONNECTIONS, POST, min(1, options.seconds / 3)))
        cpu_s = sum(node.cpu_s() for node in nodes)
        load = options.load(ports, CLUSTER_CONNECTIONS, POST, options.seconds)
        when, _ = converge(nodes, before, load)
        cpu_s = sum(node.cpu_s() for node in nodes) - cpu_s
    yield "cluster_answered_per_s", load.answered / load.elapsed_s
    yield "cluster_converged_per_s", load.answered / (when - load.started)
    yield "cluster_convergence_s", max(0.0, when - load.started - load.elapsed_s)
    yield "cluster_p50_ms", load.p50_ms
    yield "cluster_p99_ms", load.p99_ms
    yield "cluster_cpu_us", cpu_s / load.answered * 1e6


def measure_lag(options):
    """Three idle nodes: an increment at one, and a read at another that waits for it."""
    rng, lags_s = random.Random(1), []
    with cluster(3) as nodes:
        cpu_s, started = sum(node.cpu_s() for node in nodes), time.monotonic()
        time.sleep(options.seconds)  # the CPU used in it is what is measured
        cpu_s = sum(node.cpu_s() for node in nodes) - cpu_s
        yield "idle_cpu_percent", cpu_s / len(nodes) / (time.monotonic() - started) * 100
        with connect(nodes[0].port) as writer, connect(nodes[2].port) as reader:
            for number in range(options.probes):
                time.sleep(rng.uniform(0.02, 0.06))  # not in step with the heartbeats
                sent = time.monotonic()
                id = ask(writer, POST)["id"]
                count = ask(reader, f"GET /count?after={id}&timeout={PATIENCE_S:.0f}")["count"]
                lags_s.append(time.monotonic() - sent)
                check(count, 0, Load(number + 1, 0, None, None, None, None))
    lags_s.sort()
    yield "lag_p50_ms", percentile(lags_s, 0.5) * 1e3
    yield "lag_p99_ms", percentile(lags_s, 0.99) * 1e3


def measure_memory(options):
    """One node, before and after --increments."""
    with cluster(1) as nodes:
        load_by_sockets([nodes[0].port], 32, GET, requests=2_000)  # so that threads and their buffers exist already
        before = nodes[0].rss_bytes()
        load = load_by_sockets([nodes[0].port], 32, POST, requests=options.increments)
        converge(nodes, 0, load)
        yield "memory_bytes_per_increment", max(0, nodes[0].rss_bytes() - before) / load.answered


def measure_join(options):
    """Three nodes after --increments, then with --counters as well, and a fourth that joins them."""
    with cluster(3) as nodes:
        load = load_by_sockets([node.port for node in nodes], CLUSTER_CONNECTIONS, POST, requests=options.increments)
        _, count = converge(nodes, 0, load)
        with start_node(nodes) as fourth:
            fourth.wait_listening()
            with connect(fourth.port) as sock:
                ask(sock, GET)
                answered = time.monotonic()
                yield "join_first_answer_s", answered - fourth.started
                wait_until(lambda: ask(sock, GET)["count"] >= count, "a fourth node has the count")
                yield "join_increments_s", time.monotonic() - answered
                check(ask(sock, GET)["count"], count, Load(0, 0, None, None, None, None))
        # The last of the increments of one node is held only where all before it are held.
        last = f"GET /count?after={create_counters(nodes[0], options.counters)}&timeout={PATIENCE_S:.0f}"
        for node in nodes[1:]:
            with connect(node.port) as sock:
                ask(sock, last)
        with start_node(nodes) as fourth:
            fourth.wait_listening()
            with connect(fourth.port) as sock:
                ask(sock, GET)
                answered = time.monotonic()
                ask(sock, last)
                elapsed_s = time.monotonic() - answered
                for number in random.Random(1).choices(range(options.counters), k=100):
                    if ask(sock, f"GET /count/counter-{number}")["count"] != 1:
                        raise Failed(f"counter-{number} is wrong in a node that joined")
                yield "join_counters_s", elapsed_s


def create_counters(node, number):
    """Increment so many counters once, many requests in one packet; return the id of the last increment."""
    with connect(node.port) as sock:
        for first in range(0, number, 100):
            names = range(first, min(first + 100, number))
            sock.sendall(b"".join(as_bytes(f"POST /increment/counter-{name}") for name in names))
            received = receive(sock, len(names))
    return json.loads(received.rpartition(b"\r\n\r\n")[2])["id"]


MEASUREMENTS = {
    "single": measure_single,
    "cluster": measure_cluster,
    "lag": measure_lag,
    "memory": measure_memory,
    "join": measure_join,
}


def measure(name, options):
    """Return {figure: value}, all of the measurement's; the value of one that failed is a Failed."""
    values, failure = {}, Failed("not measured")
    try:
        values.update(MEASUREMENTS[name](options))
    except (Failed, OSError, subprocess.SubprocessError) as error:
        failure = Failed(str(error))
    return {figure: values.get(figure, failure) for figure in FIGURES[name]}


# The report.


def median(values):
    """Return the median over the rounds; None if one of them failed."""
    return None if any(isinstance(value, Failed) for value in values) else statistics.median(values)


def text(value):
    if value is None:
        return "FAILED"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def print_report(figures):
    """Print {figure: its value in every round}: two tables, and why figures failed."""
    medians = {figure: median(values) for figure, values in figures.items()}
    if any(figure in FIGURES["single"] for figure in figures):
        print(f"\n{'one node':31}", *(f"{server:^26}" for server in SERVERS))
        print(f"{'request, connections':31}", *[f"{'per s':>8} {'p50 ms':>8} {'p99 ms':>8}"] * len(SERVERS))
        for request, connections in SINGLE:
            keys = (
                f"{server}, {request}, {connections} connections, {unit}"
                for server in SERVERS
                for unit in ("per_s", "p50_ms", "p99_ms")
            )
            print(f"{f'{request}, {connections}':31}", *(f"{text(medians[key]):>8}" for key in keys))
    print()
    for figure, what in itertools.chain(*(FIGURES[name].items() for name in MEASUREMENTS if name != "single")):
        if figure in figures:
            print(f"{what:70} {text(medians[figure]):>8}")
    failures = [value for value in itertools.chain(*figures.values()) if isinstance(value, Failed)]
    for reason in dict.fromkeys(map(str, failures)):
        print(f"\nFAILED: {reason}")


def parse_arguments():
    def names(given):
        chosen = given.split(",")
        if not set(chosen) <= set(MEASUREMENTS):
            raise argparse.ArgumentTypeError(f"choose of {','.join(MEASUREMENTS)}")
        return chosen

    def positive(given):
        if int(given) < 1:
            raise ValueError
        return int(given)

    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--only", type=names, default=",".join(MEASUREMENTS), metavar="NAME,...", help="what to measure")
    add("--rounds", type=positive, default=3, metavar="N", help="printed are the medians of so many")
    add("--seconds", type=float, default=3.0, metavar="S", help="of each load")
    add("--load", choices=("auto", "wrk", "sockets"), default="auto", help="who makes it; auto: wrk if installed")
    add("--increments", type=positive, default=300_000, metavar="N", help="of `memory` and `join`")
    add("--counters", type=positive, default=100_000, metavar="N", help="of `join`")
    add("--probes", type=positive, default=200, metavar="N", help="increments of `lag`")
    add("--json", metavar="FILE", help="also write every figure of every round there")
    options = parser.parse_args()
    if options.load == "wrk" and not shutil.which("wrk"):
        parser.error("wrk is not installed")
    return options


def interrupt(*_):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # so that all processes are ended
    raise KeyboardInterrupt


def main():
    """Measure and report; return the exit status: 1 if a figure failed, 130 if interrupted."""
    options = parse_arguments()
    by_wrk = options.load == "wrk" or (options.load == "auto" and shutil.which("wrk"))
    options.load = load_by_wrk if by_wrk else load_by_sockets
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    figures, status = {}, 0
    try:
        for number, name in itertools.product(range(options.rounds), options.only):
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            for figure, value in measure(name, options).items():
                figures.setdefault(figure, []).append(value)
                status = 1 if isinstance(value, Failed) else status
    except KeyboardInterrupt:
        status = 130
    print(
        f"{machine}; load by {'wrk' if by_wrk else 'sockets'}; rounds: {options.rounds}, medians"
        f"{', INTERRUPTED' if status == 130 else ''}"
    )
    print_report(figures)
    if options.json:
        report = json.dumps({"machine": machine, "figures": figures}, indent=1, default="FAILED: {}".format)
        Path(options.json).write_text(report + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

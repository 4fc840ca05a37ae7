"""Making load: over plain sockets by several processes, or by wrk; and asking single requests.

Both kinds of load take the ports of loopback to load at once and return a Load.  A request is text
such as "GET /count", or "POST /increments" and a body after it.  This file knows no counters: a good
answer has the status 200 and is one line of JSON, an object.
"""

import array
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import namedtuple

HOST = "127.0.0.1"
END = b"}\n"  # every answer of every server here ends with this, and has it nowhere else
LOAD_PROCESSES = max(2, (os.cpu_count() or 1) // 2)  # the servers need the other cores
LOAD_MAX_S = 300.0  # for a load that is given as a number of requests
PATIENCE_S = 60.0  # for anything else

# `in_flight` requests were sent and not seen answered: they may have been counted or not.
Load = namedtuple("Load", "answered in_flight started elapsed_s p50_ms p99_ms")

# Programs that use this have no other threads, so forking is safe, and nothing is imported again.
fork = multiprocessing.get_context("fork")


class Failed(Exception):
    """A figure that could not be measured; the argument says why."""


def exit_status(measure, *arguments):
    """Measure, and return the exit status: 1 if that failed, after a line that says why."""
    try:
        measure(*arguments)
    except (Failed, OSError) as error:
        print(f"FAILED: {error}")
        return 1
    return 0


class Unknown(OSError):
    """A request was answered with 404 or 405: the server is older than the request."""


def connect(port):
    sock = socket.create_connection((HOST, port), timeout=PATIENCE_S + 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def as_bytes(request):
    method, path, *body = request.split(" ", 2)
    body = "".join(body)
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def receive(sock, answers=1):
    """Return the bytes of that many answers; OSError if one of them is not a good one."""
    received = b""
    while received.count(END) < answers:
        chunk = sock.recv(2**20)
        if not chunk:
            raise OSError(f"the connection was closed after {received!r:.200}")
        received += chunk
    if missing := re.match(rb"HTTP/1.1 (40[45]) ", received):
        raise Unknown(f"answered {missing[1].decode()}")
    if received.count(b"HTTP/1.1 200 ") < answers:
        raise OSError(f"answered: {received!r:.200}")
    return received


def ask(sock, request):
    """Return the JSON that answers a request such as "GET /count"."""
    sock.sendall(as_bytes(request))
    return json.loads(receive(sock).partition(b"\r\n\r\n")[2])


def run_uninterrupted(function, *arguments):
    """Run a function in a child process that ignores signals: the program ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    function(*arguments)


@contextlib.contextmanager
def process(function, *arguments):
    """Run a function as a process until the end of `with`."""
    started = fork.Process(target=run_uninterrupted, args=(function, *arguments), daemon=True)
    started.start()
    try:
        yield started
    finally:
        started.kill()
        started.join()


def load_by_sockets(ports, connections, request, seconds=LOAD_MAX_S, requests=None):
    """Load these ports with so many connections each, and return the Load.

    Every connection has one request in flight, until the time or the number of requests is over;
    the last answers are waited for.  Latencies are exact: of each request, none is estimated.
    """
    targets = ports * connections
    number = min(len(targets), LOAD_PROCESSES)
    barrier, results = fork.Barrier(number), []
    with contextlib.ExitStack() as stack:
        pipes = []
        for i in range(number):
            receiver, sender = fork.Pipe(duplex=False)
            share = math.inf if requests is None else requests * (i + 1) // number - requests * i // number
            stack.enter_context(process(drive, targets[i::number], as_bytes(request), seconds, share, barrier, sender))
            sender.close()  # the child has the other end: when the child ends, the pipe does
            pipes.append(stack.enter_context(receiver))
        for pipe in pipes:
            if not pipe.poll(seconds + PATIENCE_S):
                raise Failed("the load did not end")
            with contextlib.suppress(EOFError):
                results.append(pipe.recv())
    if len(results) < number:
        raise Failed("a process of the load died")
    started, ended, in_flight, latencies, errors = zip(*results, strict=False)
    if any(errors):
        raise Failed(next(filter(None, errors)))
    latencies_s = sorted(itertools.chain(*latencies))
    p50_ms, p99_ms = percentile(latencies_s, 0.5) * 1e3, percentile(latencies_s, 0.99) * 1e3
    return Load(len(latencies_s), sum(in_flight), min(started), max(ended) - min(started), p50_ms, p99_ms)


def drive(ports, request, seconds, requests, barrier, results):
    """Run as one process of the load, and report its part through the pipe `results`."""
    sockets, sent, incomplete, latencies = {}, {}, {}, array.array("d")
    started, error = time.monotonic(), None
    try:
        poller = select.poll()
        for port in ports:
            sock = connect(port)
            sock.settimeout(None)  # with a timeout every recv() would cost a poll() of its own
            sockets[sock.fileno()] = sock
            poller.register(sock, select.POLLIN)
        barrier.wait(PATIENCE_S)
        started = now = time.monotonic()
        for descriptor in list(sockets)[: min(len(sockets), requests)]:
            sent[descriptor] = time.monotonic()
            sockets[descriptor].sendall(request)
        unsent = requests - len(sent)
        while sent and (ready := poller.poll(PATIENCE_S * 1000)):
            for descriptor, _ in ready:
                received = sockets[descriptor].recv(65536)
                answer = incomplete.pop(descriptor, b"") + received
                if not answer.endswith(END) and received:
                    incomplete[descriptor] = answer
                    continue
                if not received or not answer.startswith(b"HTTP/1.1 200 "):
                    raise OSError(f"answered: {answer!r:.200}")
                now = time.monotonic()
                latencies.append(now - sent.pop(descriptor))
                if unsent > 0 and now - started < seconds:
                    unsent -= 1
                    sent[descriptor] = now
                    sockets[descriptor].sendall(request)
    except (OSError, threading.BrokenBarrierError) as cause:
        error = f"load: {cause!r}"
    results.send((started, time.monotonic(), len(sent), latencies, error))


def load_by_wrk(ports, connections, request, seconds):
    """Do the same with one wrk per port, for whole seconds; latencies are those of the slowest."""
    method, path, *body = request.split(" ", 2)
    script = f"""
        wrk.method = "{method}"
        wrk.body = {f"[[{body[0]}]]" if body else "nil"}
        function done(all, latency)
            local e = all.errors
            io.write(string.format("LOAD %d %d %d %d %d %d\\n", all.requests, all.duration, e.status,
                e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99)))
        end"""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".lua"))
        file.write(script)
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", "-s", file.name]
        started, wrks = time.monotonic(), []
        for port in ports:
            wrk = subprocess.Popen(
                [*command, f"http://{HOST}:{port}{path}"],
                text=True,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            stack.enter_context(wrk)
            stack.callback(wrk.kill)
            wrks.append(wrk)
        outputs = [wrk.communicate(timeout=seconds + PATIENCE_S)[0] for wrk in wrks]
    found = [re.search(r"^LOAD (.+)$", output, re.MULTILINE) for output in outputs]
    if not all(found):
        raise Failed(f"wrk: {outputs}")
    answers, us, refused, broken, p50_us, p99_us = zip(*(map(int, match[1].split()) for match in found), strict=False)
    if any(refused):
        raise Failed(f"wrk: {sum(refused)} answers were not good ones")
    in_flight = connections * len(ports) + sum(broken)
    return Load(sum(answers), in_flight, started, max(us) / 1e6, max(p50_us) / 1e3, max(p99_us) / 1e3)


def percentile(ordered, share):
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan

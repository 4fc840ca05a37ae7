#!/usr/bin/env python3
"""Floods of connections: are probes, clients and peers served meanwhile?

    python benchmarks/flood.py                              # each flood for 10 s; a minute and a half
    python benchmarks/flood.py --only silent --rate 300 --checkout ../other

Three nodes, one of which is flooded with new connections, so many a second, from other addresses of
loopback.  Meanwhile are asked, again and again: /healthz and a count, each on a new connection; increments
on connections there were before; increments at another node, one of which has to arrive at the flooded one.
For each flood it prints how many of them failed, how many took longer than a second, and the slowest.
Needs Linux, and ends by itself; the exit status is 1 if anything failed or was late.

    silent     connections that say nothing
    bytes      … that send a few bytes, which never become a request
    slow       … that ask for as much as there is, time and again, and read nothing
    waiting    … that wait for an increment that never comes
"""

import argparse
import collections
import contextlib
import itertools
import resource
import socket
import sys
import threading
import time
from pathlib import Path

from load import HOST, Failed, as_bytes, ask, connect, fork, process
from nodes import PROJECT, cluster

FLOODS = {  # name -> (what each connection sends, connections a second)
    "silent": (b"", 1500),
    "bytes": (b"GET /cou", 3000),
    "slow": (as_bytes("GET /metrics") * 100, 300),
    "waiting": (as_bytes("GET /count?timeout=60&after=00000000-0000-8000-8000-000000000001"), 300),
}
HELD_MAX = 12_000  # connections of a flood that are open at once; the oldest end
INTERVAL_S = 0.2  # between two probes
CLIENTS, CLIENT_INTERVAL_S = 5, 0.01
PATIENCE_S = 10.0  # for an answer
SETTLE_S = 2.0  # from the beginning of a flood until something is measured
LIMIT_S = 1.0  # within which all else has to be answered


def flood(port, sends, rate, made):
    """Make so many connections a second until the process is ended; count them in `made`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    held, fresh = collections.deque(), []
    addresses = itertools.cycle(f"127.0.1.{number}" for number in range(1, 200))  # each has its own free ports
    started = time.monotonic()
    while True:
        for sock in fresh:  # they have had the time to connect
            with contextlib.suppress(OSError):
                sock.send(sends)
        fresh.clear()
        missing = int((time.monotonic() - started) * rate) - made.value
        for _ in range(min(missing, 200)):
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((next(addresses), 0))
            sock.connect_ex((HOST, port))
            held.append(sock)
            if sends:
                fresh.append(sock)
            made.value += 1
        while len(held) > HELD_MAX:
            held.popleft().close()
        time.sleep(0.005)  # sets the pace: what is due by then is opened next


class Watch(threading.Thread):
    """Asks something again and again until it is over, and notes how long that took and what failed."""

    def __init__(self, what, ask_once, interval_s, over):
        super().__init__(daemon=True)
        self.what, self._ask_once, self._interval_s, self._over = what, ask_once, interval_s, over
        self.seconds, self.errors = [], []

    def run(self):
        while not self._over.wait(self._interval_s):
            began = time.monotonic()
            try:
                self._ask_once()
            except (OSError, Failed) as error:
                self.errors.append(error)
            self.seconds.append(time.monotonic() - began)


def on_new_connection(port, request):
    """Return a function that sends a request on a connection of its own."""

    def ask_once():
        with connect(port) as sock:
            sock.settimeout(PATIENCE_S)
            ask(sock, request)

    return ask_once


def on_connection(port, request):
    """Return a function that sends a request on a connection that there is."""
    sock = connect(port)
    sock.settimeout(PATIENCE_S)
    ask(sock, request)
    return lambda: ask(sock, request)


def exchanging(port, other):
    """Return a function that increments at one node, and waits until the other has that; both must see all peers."""
    here, there = connect(port), connect(other)
    for sock in (here, there):
        sock.settimeout(PATIENCE_S)

    def ask_once():
        if any(peer["state"] != "active" for peer in ask(there, "GET /peers")["peers"]):
            raise Failed("a peer is lost")
        id = ask(there, "POST /increment/there")["id"]
        ask(here, f"GET /count?after={id}&timeout={PATIENCE_S:g}")  # raises OSError if it does not arrive

    return ask_once


def watches(port, other, over):
    """Return the Watches of what has to go on at one node that is flooded, and at another."""
    yield Watch("a probe of /healthz", on_new_connection(port, "GET /healthz"), INTERVAL_S, over)
    yield Watch("a new client", on_new_connection(port, "GET /count"), INTERVAL_S, over)
    for _ in range(CLIENTS):
        yield Watch("a connected client", on_connection(port, "POST /increment"), CLIENT_INTERVAL_S, over)
    yield Watch("a client of the other node", on_connection(other, "POST /increment"), CLIENT_INTERVAL_S, over)
    yield Watch("an increment from there", exchanging(port, other), INTERVAL_S, over)


def measure(sends, rate, seconds, checkout):
    """Flood one of three nodes; return (connections made per second, the Watches)."""
    with cluster(3, checkout) as nodes:
        over, made = threading.Event(), fork.Value("q", 0)
        watching = list(watches(nodes[0].port, nodes[1].port, over))
        with process(flood, nodes[0].port, sends, rate, made):
            time.sleep(SETTLE_S)
            before = made.value
            for watch in watching:
                watch.start()
            time.sleep(seconds)
            after = made.value
            over.set()
            for watch in watching:
                watch.join()
    return (after - before) / seconds, watching


def show(name, per_second, watching):
    """Print what was seen in a flood; return whether everything was answered in time."""
    print(f"{name}, {per_second:,.0f} connections per second")
    by_what = {}
    for watch in watching:
        seconds, errors = by_what.setdefault(watch.what, ([], []))
        seconds += watch.seconds
        errors += watch.errors
    for what, (seconds, errors) in by_what.items():
        late = sum(each > LIMIT_S for each in seconds)
        print(f"    {what:28} {len(seconds):6} asked {len(errors):5} failed {late:5} late"
              f"   slowest {max(seconds) * 1e3:8.1f} ms{f'   {errors[0]}' if errors else ''}")  # fmt: skip
    return not any(errors or max(seconds) > LIMIT_S for seconds, errors in by_what.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", choices=FLOODS, help="one of the floods")
    parser.add_argument("--rate", type=int, metavar="N", help="connections a second, instead of what is usual")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="for each flood")
    parser.add_argument("--checkout", type=Path, default=PROJECT, metavar="DIR", help="where counter_server.py is")
    options = parser.parse_args()
    good = True
    for name, (sends, rate) in FLOODS.items():
        if options.only in (None, name):
            seen = measure(sends, options.rate or rate, options.seconds, options.checkout.resolve())
            good = show(name, *seen) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Four of five seeds are tarpits: how long does an increment take to the one live peer?

    python benchmarks/tarpits.py                            # half a minute
    python benchmarks/tarpits.py --tarpits 16 --checkout ../other

A tarpit accepts whatever connects, and trickles the head of an answer for ever.  Printed is how long the node took
to find its live peer, and how long increments took to arrive there, one after another.  The exit status is 1 if one
took longer than a second.
"""

import argparse
import contextlib
import socket
import sys
import threading
import time
from pathlib import Path

from load import HOST, ask, connect, percentile
from nodes import PROJECT, start_node, wait_until

LIMIT_S = 1.0  # within which an increment has to arrive
TRICKLE_S = 0.2  # between two bytes
INTERVAL_S = 0.1  # between two increments


class Tarpit:
    """Accepts connections on a free port, and never finishes an answer; it ends with the program."""

    def __init__(self):
        self._listener = socket.create_server((HOST, 0), backlog=100)
        self.port, self._held = self._listener.getsockname()[1], []
        for work in (self._accept, self._trickle):
            threading.Thread(target=work, daemon=True).start()

    def _accept(self):
        while True:
            self._held.append(self._listener.accept()[0])

    def _trickle(self):
        while True:
            time.sleep(TRICKLE_S)
            for sock in list(self._held):
                try:
                    sock.send(b"H")
                except OSError:  # it gave up
                    self._held.remove(sock)
                    sock.close()


def arrival_s(here, there):
    """Increment at one node; return the seconds until the other has it."""
    began = time.monotonic()
    id = ask(here, "POST /increment")["id"]
    ask(there, f"GET /count?after={id}&timeout=30")
    return time.monotonic() - began


def measure(tarpits, seconds, checkout):
    """Print what was seen; return whether all increments arrived in time."""
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(start_node(checkout=checkout))
        live.wait_listening()
        node = stack.enter_context(start_node([*(Tarpit() for _ in range(tarpits)), live], checkout=checkout))
        node.wait_listening()
        here, there = (stack.enter_context(connect(one.port)) for one in (node, live))
        wait_until(lambda: any(peer["state"] == "active" for peer in ask(here, "GET /peers")["peers"]), "a peer")
        print(f"{tarpits} tarpits and a live seed: found after {time.monotonic() - node.started:.2f} s from the start")
        found, deadline = [], time.monotonic() + seconds
        while time.monotonic() < deadline:
            found.append(arrival_s(here, there))
            time.sleep(INTERVAL_S)
    found.sort()
    late = sum(each > LIMIT_S for each in found)
    print(f"{len(found)} increments arrived: p50 {percentile(found, 0.5) * 1e3:.1f} ms,"
          f" slowest {found[-1] * 1e3:.1f} ms, {late} late")  # fmt: skip
    return not late


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tarpits", type=int, default=4, metavar="N", help="beside one live seed")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of increments")
    parser.add_argument("--checkout", type=Path, default=PROJECT, metavar="DIR", help="where counter_server.py is")
    options = parser.parse_args()
    return 0 if measure(options.tarpits, options.seconds, options.checkout.resolve()) else 1


if __name__ == "__main__":
    sys.exit(main())

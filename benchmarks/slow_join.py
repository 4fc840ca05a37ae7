#!/usr/bin/env python3
"""A node joins over a narrow link: when is it ready, and how much crosses the link?

    python benchmarks/slow_join.py                          # 4 MB over 50 kB/s; a minute and a half
    python benchmarks/slow_join.py --megabytes 1 --kilobytes-per-s 200 --checkout ../other

One node holds the counts, another joins it; all between them passes a proxy that carries so much each way, and
no more.  Meanwhile both are asked for their counters and peers, and the holder goes on counting.  Printed is what
crossed, beside the size of the state.  The exit status is 1 if the joiner was ready before it held all, or never,
if one of the two lost the other, or if the state crossed more than once.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

from load import ask, connect
from narrow import Direction, NarrowEnd
from nodes import PROJECT, start_node

NAME_BYTES, BATCH = 32, 1000
INTERVAL_S = 0.1  # between two looks
SETTLE_S = 2.0  # after the joiner is ready: what crosses then is not the state


def entry_bytes(name, sequence):
    """Return how many bytes of a message a counter that was incremented once takes."""
    return len(f'"{name}":[{sequence},1],')


def fill(sock, size):
    """Have a node hold counters of so many bytes; return (how many, the bytes they take in messages)."""
    number = filled = 0
    while filled < size:
        names = [f"{number + n:0{NAME_BYTES}}" for n in range(BATCH)]
        body = ",".join(f'"{name}":1' for name in names)
        ask(sock, f"POST /increments {{{body}}}")
        filled += sum(entry_bytes(name, number + n + 1) for n, name in enumerate(names))
        number += BATCH
    return number, filled


def is_ready(sock):
    with contextlib.suppress(OSError):
        ask(sock, "GET /readyz")
        return True
    return False


def states(sock):
    return [peer["state"] for peer in ask(sock, "GET /peers")["peers"]]


def lacks(sock, number):
    """Return whether a node lacks any of so many counters."""
    last = f"{number - 1:0{NAME_BYTES}}"
    return ask(sock, f"GET /count/{last}")["count"] != 1


def watch(holder, joiner, number, limit_s):
    """Return (seconds until the joiner was ready, what went wrong), while the holder counts on."""
    began, wrong, have_met = time.monotonic(), [], False
    while (elapsed_s := time.monotonic() - began) < limit_s:
        ask(holder, "POST /increment/meanwhile")
        ready = is_ready(joiner)
        for who, sock in (("holder", holder), ("joiner", joiner)):
            now = states(sock)
            have_met = have_met or now == ["active"]
            if have_met and now != ["active"]:
                wrong.append(f"after {elapsed_s:.1f} s the {who} sees {now}")
        if ready:
            if lacks(joiner, number):
                wrong.append(f"after {elapsed_s:.1f} s the joiner was ready without all counters")
            return elapsed_s, wrong
        time.sleep(INTERVAL_S)
    return limit_s, [*wrong, "the joiner was not ready by then"]


def measure(megabytes, kilobytes_per_s, checkout):
    """Let a node join; print what was seen, and return whether all was well."""
    with contextlib.ExitStack() as stack:
        to_joiner, to_holder = (Direction(kilobytes_per_s * 1000) for _ in range(2))
        at_holder = stack.enter_context(NarrowEnd(to_holder, to_joiner))
        at_joiner = stack.enter_context(NarrowEnd(to_joiner, to_holder))
        holding = stack.enter_context(start_node(flags=["--advertise", at_holder.address], checkout=checkout))
        holding.wait_listening()
        at_holder.port = holding.port
        holder = stack.enter_context(connect(holding.port))
        number, size = fill(holder, megabytes * 1_000_000)
        flags = ["--advertise", at_joiner.address, "--peers", at_holder.address]
        joining = stack.enter_context(start_node(flags=flags, checkout=checkout))
        joining.wait_listening()
        at_joiner.port = joining.port
        joiner = stack.enter_context(connect(joining.port))
        least_s = size / kilobytes_per_s / 1000
        print(
            f"state {size / 1e6:.2f} MB in {number:,} counters, over {kilobytes_per_s} kB/s: {least_s:.0f} s at least"
        )
        ready_s, wrong = watch(holder, joiner, number, 4 * least_s + 30)
        passed = to_joiner.passed
        print(f"waited {ready_s:.1f} s until it was ready; to the joiner crossed {passed / 1e6:.2f} MB,"
              f" {passed / size:.2f} times the state; the other way {to_holder.passed / 1e3:.0f} kB")  # fmt: skip
        if passed > 1.5 * size:
            wrong.append("the state crossed more than once")
        time.sleep(SETTLE_S)
        later = to_joiner.passed - passed
        print(f"in the {SETTLE_S:.0f} s after that, {later / 1e3:.0f} kB more")
        counted = [ask(sock, "GET /count/meanwhile")["count"] for sock in (holder, joiner)]
        if counted[0] != counted[1]:
            wrong.append(f"what was counted meanwhile differs: {counted}")
        for what in wrong[:5]:
            print("    WRONG:", what)
        return not wrong


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=4.0, metavar="N", help="of state")
    parser.add_argument("--kilobytes-per-s", type=float, default=50.0, metavar="N", help="that cross the link each way")
    parser.add_argument("--checkout", type=Path, default=PROJECT, metavar="DIR", help="where counter_server.py is")
    options = parser.parse_args()
    return 0 if measure(options.megabytes, options.kilobytes_per_s, options.checkout.resolve()) else 1


if __name__ == "__main__":
    sys.exit(main())

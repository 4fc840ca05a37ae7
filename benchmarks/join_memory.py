#!/usr/bin/env python3
"""How much memory does a join take beyond the state, at the nodes that hold it and at the one that joins?

    python benchmarks/join_memory.py                                    # a million keys; a minute
    python benchmarks/join_memory.py --holders 3 --two-addresses --checkout ../other

Some nodes hold many idempotency keys, taken by batches of 1,000 counters; another joins that names all of them as
seeds, with --two-addresses each of them twice.  Printed is the resident memory at rest, its peak while the node joined,
and what the joiner received.  The exit status is 1 if the peak of a node was more than 64 MiB above its rest.  Linux
only.
"""

import argparse
import contextlib
import http.client
import json
import sys
import time
from pathlib import Path

from load import HOST, Failed, ask, connect
from nodes import PROJECT, start_node, wait_until

BATCH = 1000
MIB = 2**20
MOST = 64 * MIB  # beyond the state
SETTLE_S = 3.0  # after the node is ready
OTHER_HOST = "127.0.0.2"


def status_bytes(node, field):
    """Return a field of /proc/PID/status in bytes."""
    lines = Path(f"/proc/{node.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak(node):
    """Let the peak of its resident memory begin anew."""
    Path(f"/proc/{node.pid}/clear_refs").write_text("5")


def metric(node, name):
    connection = http.client.HTTPConnection(HOST, node.port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next((float(line.split()[1]) for line in lines if line.startswith(name + " ")), 0.0)


def fill(node, keys):
    """Have a node take so many keys; return the id of its last increment."""
    connection, last = http.client.HTTPConnection(HOST, node.port, timeout=30), None
    body = json.dumps({f"shop.orders.by-customer-{number}": 1 for number in range(BATCH)})
    for number in range(-(-keys // BATCH)):
        connection.request("POST", "/increments", body, {"Idempotency-Key": f"order-{number}"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise Failed(f"a batch was answered {response.status}: {answer!r:.200}")
        last = json.loads(answer)["id"]
    connection.close()
    return last


def is_ready(sock):
    with contextlib.suppress(OSError):
        ask(sock, "GET /readyz")
        return True
    return False


def join(stack, holders, flags, options, keys):
    """Start the node that joins; return (the node, seconds until it was ready)."""
    seeds = [f"{HOST}:{node.port}" for node in holders]
    if options.two_addresses:
        seeds += [f"{OTHER_HOST}:{node.port}" for node in holders]
    joiner = stack.enter_context(start_node(flags=[*flags, "--peers", ",".join(seeds)], checkout=options.checkout))
    joiner.wait_listening()
    sock = stack.enter_context(connect(joiner.port))
    wait_until(lambda: is_ready(sock), "the node is ready")
    took_s = time.monotonic() - joiner.started
    if (held := metric(joiner, "counter_idempotency_keys")) < keys:
        raise Failed(f"it was ready with {held:,.0f} keys")
    return joiner, took_s


def measure(options):
    """Print the memory of each node while one joins; return whether all stayed within the limit."""
    keys, flags = options.keys, ["--max-idempotency-keys", "2000000"]
    if options.two_addresses:
        flags += ["--host", "0.0.0.0", "--insecure"]
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(start_node(flags=flags, checkout=options.checkout))]
        holders[0].wait_listening()
        for number in range(1, options.holders):
            holders.append(stack.enter_context(start_node(holders[:number], flags, checkout=options.checkout)))
            holders[-1].wait_listening()
        last = fill(holders[0], keys)
        for node in holders:
            with connect(node.port) as sock:
                ask(sock, f"GET /count?after={last}&timeout=60")
        time.sleep(SETTLE_S)
        resting = [status_bytes(node, "VmRSS") for node in holders]
        for node in holders:
            forget_peak(node)
        joiner, took_s = join(stack, holders, flags, options, keys)
        time.sleep(SETTLE_S)
        received = metric(joiner, "counter_gossip_received_bytes_total")
        peaks = [status_bytes(node, "VmHWM") for node in [*holders, joiner]]
        resting.append(status_bytes(joiner, "VmRSS"))
    print(f"{options.holders} holders of {keys:,} keys; ready after {took_s:.1f} s; received {received / 1e6:.0f} MB")
    for number, (rest, peak) in enumerate(zip(resting, peaks, strict=True)):
        who = f"holder {number + 1}" if number < len(holders) else "joiner  "
        print(f"{who}: at rest {rest / MIB:6.0f} MiB, peak {peak / MIB:6.0f} MiB, {(peak - rest) / MIB:+6.0f} MiB")
    print(f"joiner's peak above holder 1 at rest: {(peaks[-1] - resting[0]) / MIB:+.0f} MiB")
    return all(peak - rest <= MOST for rest, peak in zip(resting, peaks, strict=True))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--holders", type=int, default=1, metavar="N")
    parser.add_argument("--two-addresses", action="store_true", help="name each holder by two addresses")
    parser.add_argument("--checkout", type=Path, default=PROJECT, metavar="DIR", help="where counter_server.py is")
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    return 0 if measure(options) else 1


if __name__ == "__main__":
    sys.exit(main())

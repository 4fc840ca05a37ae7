#!/usr/bin/env python3
"""As many real nodes as one machine carries: do all see all, count all exactly, and miss a dead one?

    python benchmarks/many_nodes.py                      # 24 nodes, 2,400 increments
    python benchmarks/many_nodes.py --nodes 48 --heartbeat-interval 4

All join through the first.  Prints what each step took; the exit status is 1 if one failed.
"""

import argparse
import contextlib
import sys
import time

from load import HOST, Failed, ask, connect, exit_status
from nodes import start_node, wait_until


def states(sock):
    """Return {address: state} of the peers of a node."""
    return {peer["address"]: peer["state"] for peer in ask(sock, "GET /peers")["peers"]}


def took_s(condition, what, limit_s):
    """Return after how many seconds the condition held; Failed if it did not in time."""
    started = time.monotonic()
    wait_until(condition, what)
    seconds = time.monotonic() - started
    if seconds > limit_s:
        raise Failed(f"{what}: only after {seconds:.1f} s")
    return seconds


def run(options):
    flags = ["--heartbeat-interval", options.heartbeat_interval, "--peer-timeout", 5 * options.heartbeat_interval]
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        nodes = [stack.enter_context(start_node(flags=flags))]
        nodes[0].wait_listening()
        nodes += [stack.enter_context(start_node(nodes[:1], flags)) for _ in range(options.nodes - 1)]
        for node in nodes[1:]:
            node.wait_listening()
        socks = [stack.enter_context(connect(node.port)) for node in nodes]
        print(f"{options.nodes} nodes listen after {time.monotonic() - started:.1f} s", flush=True)

        def all_active(socks):
            return all(list(states(sock).values()) == ["active"] * (len(nodes) - 1) for sock in socks)

        seconds = took_s(lambda: all_active(socks), "all see all", 60)
        print(f"all see all {seconds:.1f} s later", flush=True)
        cpu_s, idle_from = [node.cpu_s() for node in nodes], time.monotonic()
        time.sleep(5)  # the CPU used in it is what is measured
        idle_s = time.monotonic() - idle_from
        used = sorted((node.cpu_s() - before) / idle_s * 100 for node, before in zip(nodes, cpu_s, strict=True))
        print(
            f"CPU of an idle node: median {used[len(used) // 2]:.1f} %, at most {used[-1]:.1f} % of a core", flush=True
        )
        started = time.monotonic()
        for number in range(options.increments):
            ask(socks[number % len(socks)], "POST /increment")
        print(f"{options.increments} increments took {time.monotonic() - started:.1f} s", flush=True)
        right = [options.increments] * len(nodes)
        seconds = took_s(lambda: [ask(sock, "GET /count")["count"] for sock in socks] == right, "all count all", 30)
        print(f"counted exactly at every node {seconds:.2f} s later", flush=True)
        dead = f"{HOST}:{nodes[-1].port}"
        nodes[-1].kill()
        seconds = took_s(
            lambda: all(states(sock).get(dead) != "active" for sock in socks[:-1]), "the dead node is gone", 60
        )
        print(f"a node that was killed is gone everywhere {seconds:.1f} s later", flush=True)
        lost = [state for sock in socks[:-1] for address, state in states(sock).items() if address != dead]
        if lost != ["active"] * (len(nodes) - 1) * (len(nodes) - 2):
            raise Failed("live nodes were removed along with it")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=24)
    parser.add_argument("--increments", type=int, default=2400)
    parser.add_argument("--heartbeat-interval", type=float, default=2.0, metavar="S")
    return exit_status(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

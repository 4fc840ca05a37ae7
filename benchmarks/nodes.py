"""Nodes of the counter server as processes on free ports of loopback, and what can be seen of them."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import HOST, PATIENCE_S, Failed, ask, connect

PROJECT = Path(__file__).resolve().parent.parent
POLL_S = 0.002  # between two looks at another process


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

    @property
    def pid(self):
        return self._process.pid

    def kill(self):
        self._process.kill()
        self._process.wait()

    def stop(self):
        """Stop it in order."""
        self._process.terminate()
        self._process.wait()

    def cpu_s(self):
        """Return the CPU seconds that all its threads used so far."""
        return time.clock_gettime(~self.pid << 3 | 2)  # the clock of clock_getcpuclockid(3), to the ns

    def rss_bytes(self):
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self):
        """Return the most resident memory that it ever had."""
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())[1]) * 1024


@contextlib.contextmanager
def start_node(peers=(), flags=(), checkout=PROJECT):
    """Start a node of the code in a directory, with more flags, and end it at the end of `with`."""
    seeds = ["--peers", ",".join(f"{HOST}:{peer.port}" for peer in peers)] if peers else []
    command = [sys.executable, checkout / "counter_server.py", "--port", "0", "--max-counters", "1000000", *seeds]
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
def cluster(size, checkout=PROJECT, flags=lambda number: ()):
    """Start nodes that all know each other, the first with flags(0); end them."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(start_node((), flags(0), checkout))]
        nodes[0].wait_listening()
        nodes += [stack.enter_context(start_node(nodes[:1], flags(number), checkout)) for number in range(1, size)]
        for node in nodes[1:]:
            node.wait_listening()
        socks = [stack.enter_context(connect(node.port)) for node in nodes]

        def all_active():
            found = [[peer["state"] for peer in ask(sock, "GET /peers")["peers"]] for sock in socks]
            return all(states == ["active"] * (size - 1) for states in found)

        wait_until(all_active, "the nodes know each other")
        yield nodes


def wait_until(condition, what):
    """Return the first true value of condition(); Failed if there is none in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(POLL_S)  # polling another process: there is no event to wait for
    return value

"""What several test files share: nodes as real processes, and waiting for conditions."""

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from authority import Authority
from clients import Client

from counter.config import parse_arguments
from counter_server import Node

PROJECT = Path(__file__).parent.parent
FAST = ("--heartbeat-interval", "0.2", "--peer-timeout", "1.5")  # seconds; a cluster that tests can wait for
PATIENT = ("--peer-timeout", "30")  # seconds; for a cluster under load, in which a peer that is slow is not lost


def wait_until(condition, timeout_s=15.0):
    """Return the first true value of condition(); AssertionError if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition.__doc__ or condition}"
        time.sleep(0.01)  # polling another process: there is no event to wait for
    return value


def wait_until_waiting(node):
    """Wait until some request waits for an increment."""
    wait_until(lambda: len(node.counter._waiters))


def free_port():
    """Return a port that stays free: the system gives it to no outgoing connection, unlike those it picks itself."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def pytest_addoption(parser):
    parser.addoption("--tls", action="store_true", help="let nodes that are processes speak TLS")


def pytest_configure(config):
    if config.getoption("--tls"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        NodeProcess.speak_tls(Authority(Path(folder.name)))


class Answer:
    def __init__(self, response):
        self.status, self.headers = response.status, response.headers
        self.body = response.read()

    def json(self):
        return json.loads(self.body)


class NodeProcess:
    """A node as a user starts it, on a free port unless one is given.

    `limit` is for the shell's ulimit; `tls` is the ssl.SSLContext with which it is asked, if it speaks TLS.
    """

    secured = (), None  # the flags that all nodes have, and how they are then asked

    @classmethod
    def speak_tls(cls, authority):
        """Give all nodes from now on, and those who ask them, a certificate."""
        cls.secured = (*authority.issue("node"), "--tls-ca", authority.ca), authority.client("node")

    def __init__(self, *arguments, port=0, peers=(), limit=None, tls=None):
        secured, self.tls = self.secured if tls is None else ((), tls)
        seeds = ["--peers", ",".join(peer.address for peer in peers)] if peers else []
        flags = map(str, ("--port", port, *FAST, *seeds, *secured, *arguments))
        command = [sys.executable, "counter_server.py", *flags]
        if limit:
            command = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *command]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL, stderr=self.log)
        try:
            self.port = int(wait_until(self._listening)[1])
        except BaseException:
            self.end()
            raise
        self.address = f"127.0.0.1:{self.port}"

    def _listening(self):
        assert self.process.poll() is None, self.stderr()
        return re.search(r"listening: addr=\S+:(\d+)", self.stderr())

    def stderr(self):
        return os.pread(self.log.fileno(), 2**20, 0).decode()

    def connection(self, timeout_s):
        """Return an http.client connection to it, not yet connected."""
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout_s, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def ask(self, method, path, body=None, headers=None, timeout_s=10):
        """Return the Answer to one request; OSError or HTTPException if there is none."""
        connection = self.connection(timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())

    def get(self, path):
        answer = self.ask("GET", path)
        assert answer.status == 200, answer.body
        return answer.json()

    def increment(self, path="/increment", **options):
        answer = self.ask("POST", path, **options)
        assert answer.status == 200, answer.body
        return answer.json()

    def count(self, name="default"):
        return self.get(f"/count/{name}")["count"]

    def peers(self, state="active"):
        """Return the addresses of the peers in that state."""
        return {peer["address"] for peer in self.get("/peers")["peers"] if peer["state"] == state}

    def send_signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s=15):
        """Stop it as an operator does; return the exit status."""
        self.process.terminate()
        return self.process.wait(timeout_s)

    def end(self):
        """Make sure that it has ended, and has printed no traceback."""
        if self.process.poll() is None:
            self.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            self.kill()
            with self.log:
                assert "Traceback" not in self.stderr()


@pytest.fixture
def start_node():
    """Start nodes by calling it as NodeProcess; afterwards they end, and none has printed a traceback."""
    nodes = []

    def start(*arguments, **options):
        nodes.append(NodeProcess(*arguments, **options))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.send_signal(signal.SIGCONT)
            node.process.terminate()  # all at once
    for node in nodes:
        node.end()


@pytest.fixture
def start_cluster(start_node):
    """Start a number of nodes, each joining through the one before, that all are ready and know each other.

    With a folder as `data` each has a file there.
    """

    def start(size, *arguments, data=None):
        nodes = []
        for number in range(size):
            file = ("--data", data / f"{number}.db") if data else ()
            nodes.append(start_node(*file, *arguments, peers=nodes[-1:]))
        wait_until(lambda: all(len(node.peers()) == size - 1 for node in nodes))
        wait_until(lambda: all(node.ask("GET", "/readyz").status == 200 for node in nodes))
        return nodes

    return start


@pytest.fixture
def start_local():
    """Start nodes in this process by calling it with arguments; afterwards they stop."""
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            node = Node(parse_arguments(["--port", "0", *arguments]))
            node.start()
            stack.callback(node.stop)
            return node

        yield start


@pytest.fixture(scope="module")
def node():
    """A node for the tests that leave it as it is, but for counters of their own."""
    node = Node(parse_arguments(["--port", "0"]))
    node.start()
    yield node
    node.stop()


@pytest.fixture
def connect():
    """Return a function that opens a Client of a node; afterwards all are closed."""
    with contextlib.ExitStack() as stack:
        yield lambda node: stack.enter_context(contextlib.closing(Client(node)))


@pytest.fixture
def client(node, connect):
    return connect(node)


@pytest.fixture
def no_traceback(caplog):
    """No test may make a node log a traceback; one that means to clears the log."""
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.exc_info]


@pytest.fixture
def tiny_switch_interval():
    """Let threads be interrupted nearly everywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def require_tools(*names):
    """Skip the test where one of these programs is missing; where CI is set, which installs them, fail."""
    missing = [name for name in names if not shutil.which(name)]
    if missing and os.environ.get("CI"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")

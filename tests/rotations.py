"""Replaces certificates, their CA, secrets and tokens of three nodes again and again, under load.

python tests/rotations.py --rotations 100
"""

import argparse
import http.client
import secrets
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from authority import Authority
from conftest import NodeProcess, wait_until

SIZE, CLIENTS_PER_NODE = 3, 2
REQUESTS_PER_CONNECTION = 50  # then a client makes a new one
FLAGS = ("--secret-file", "--token-file", "--tls-cert")  # as nodes name what they have read again


class Client(threading.Thread):
    """Increments at one node, with whatever token and certificates are good at that moment."""

    def __init__(self, node, keeper, over):
        super().__init__(name=f"client-{node.port}")
        self.node, self.keeper, self.over = node, keeper, over
        self.counted, self.failed, self.connections = 0, [], 0

    def run(self):
        while not self.over.is_set():
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.node.port, timeout=10, context=self.keeper.context
            )
            self.connections += 1
            try:
                for _ in range(REQUESTS_PER_CONNECTION):
                    self._increment(connection)
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
            finally:
                connection.close()

    def _increment(self, connection):
        connection.request("POST", "/increment", headers=self.keeper.headers())
        response = connection.getresponse()
        body = response.read()
        if response.status == 200:
            self.counted += 1
        else:
            self.failed.append(body)


class Keeper:
    """The files of all nodes, and what goes with them."""

    def __init__(self, folder):
        self.authority = Authority(folder)
        self.secret_file, self.token_file = folder / "secret", folder / "tokens"
        self.secret, self.token = secrets.token_hex(32), secrets.token_hex(24)
        self._write(self.secret_file, self.secret)
        self._write(self.token_file, f"write {self.token} client=load")
        self.flags = (*self.authority.issue("node"), "--tls-ca", self.authority.ca)
        self.flags += ("--secret-file", self.secret_file, "--token-file", self.token_file)
        self.context = self.authority.client()

    def headers(self):
        return {"Authorization": f"Bearer {self.token}"}

    def rotate(self):
        """Replace everything in three steps; yield after each, for all nodes to take it."""
        secret, token = secrets.token_hex(32), secrets.token_hex(24)
        self.authority.renew()
        self.context = self.authority.client()  # it trusts both CAs before any certificate is of the new one
        self._write(self.secret_file, self.secret, secret)
        self._write(self.token_file, f"write {self.token} client=load", f"write {token} client=load")
        yield
        self.authority.issue("node")
        self._write(self.secret_file, secret, self.secret)
        self.token = token
        yield
        self.authority.drop_old()
        self._write(self.secret_file, secret)
        self._write(self.token_file, f"write {token} client=load")
        self.context, self.secret = self.authority.client(), secret
        yield

    @staticmethod
    def _write(path, *lines):
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text("\n".join(lines) + "\n")
        new.replace(path)


def take(nodes, keeper):
    """Have all nodes read their files again, and wait until messages signed before are through."""
    before = {node: counts(node) for node in nodes}
    for node in nodes:
        node.send_signal(signal.SIGHUP)
    for node in nodes:
        wait_until(lambda node=node: all(now > then for now, then in zip(counts(node), before[node], strict=True)), 30)
    for node in nodes:
        answer = node.ask("POST", f"/increment/rotated?acks={SIZE}&timeout=20", headers=keeper.headers())
        assert answer.status == 200, answer.body


def counts(node):
    """Return how often a node has read each of its files again."""
    log = node.stderr()
    assert "not read again" not in log, log
    return [log.count(f"read again: flag={flag}") for flag in FLAGS]


def run(folder, rotations):
    """Rotate so often; AssertionError if a request fails, a node is lost or a count is wrong.  Returns a summary."""
    keeper, over, began = Keeper(folder), threading.Event(), time.monotonic()
    nodes, clients = [], []
    try:
        for _ in range(SIZE):
            nodes.append(NodeProcess(*keeper.flags, peers=nodes[-1:], tls=keeper.context))
        for node in nodes:
            wait_until(lambda node=node: len(peers(node, keeper)) == SIZE - 1)
        clients = [Client(node, keeper, over) for node in nodes for _ in range(CLIENTS_PER_NODE)]
        for client in clients:
            client.start()
        for _ in range(rotations):
            for _step in keeper.rotate():
                for node in nodes:
                    node.tls = keeper.context
                take(nodes, keeper)
        over.set()
        for client in clients:
            client.join()
        return check(nodes, clients, keeper, rotations) + f" seconds={time.monotonic() - began:.0f}"
    finally:
        over.set()
        for thread in clients:
            thread.join()
        for node in nodes:
            node.end()


def check(nodes, clients, keeper, rotations):
    failed = [error for client in clients for error in client.failed]
    assert not failed, failed[:3]
    counted, connections = sum(client.counted for client in clients), sum(client.connections for client in clients)
    for name, right in (("default", counted), ("rotated", 3 * SIZE * rotations)):
        wait_until(lambda name=name, right=right: all(count(node, name, keeper) == right for node in nodes))
    logs = "".join(node.stderr() for node in nodes)
    assert "peer lost" not in logs, logs
    refused = logs.count("messages refused")
    return f"rotations={rotations} increments={counted} connections={connections} failed=0 lost=0 refused={refused}"


def peers(node, keeper):
    answer = node.ask("GET", "/peers", headers=keeper.headers()).json()
    return [peer for peer in answer["peers"] if peer["state"] == "active"]


def count(node, name, keeper):
    return node.ask("GET", f"/count/{name}", headers=keeper.headers()).json()["count"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rotations", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), options.rotations))

"""A client that says every byte, and what it reads: for the tests of the API and of serving."""

import json
import socket
import struct
from collections import namedtuple
from http import HTTPStatus

from counter import increment_id, new_replica, wire
from counter.signing import HEADER, PATH, seal
from counter.wire import Message, Sender

NOBODYS_ID = "00000000-0000-8000-8000-000000000001"  # an increment that never arrives


class Reply(namedtuple("Reply", "status headers body")):
    """A response; the names of its headers are in lower case."""

    def json(self):
        assert self.body.endswith(b"\n")
        return json.loads(self.body)


def read_reply(stream, method="GET"):
    """Read exactly one response to a request with this method; EOFError if there is none."""
    start = stream.readline().decode()
    if not start:
        raise EOFError("the connection ended without an answer")
    version, status, _phrase = start.split(" ", 2)
    assert version == "HTTP/1.1"
    headers = {}
    while line := stream.readline().decode().removesuffix("\r\n"):
        name, _, value = line.partition(": ")
        assert name.lower() not in headers
        headers[name.lower()] = value
    size = 0 if method == "HEAD" else int(headers.get("content-length", 0))
    return Reply(int(status), headers, stream.read(size))


def request(method, target, *headers, body=b"", version="1.1"):
    """Return the bytes of a request."""
    lines = [f"{method} {target} HTTP/{version}", "Host: localhost", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Client:
    """One connection to a node, on which a test says every byte."""

    def __init__(self, node):
        self.socket = socket.create_connection(("127.0.0.1", node.port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb")

    def send(self, data):
        self.socket.sendall(data)

    def read(self, method="GET"):
        return read_reply(self.stream, method)

    def ask(self, method, target, *headers, **options):
        self.send(request(method, target, *headers, **options))
        return self.read(method)

    def count(self, name):
        reply = self.ask("GET", f"/count/{name}")
        assert reply.status == 200
        return reply.json()["count"]

    def is_over(self):
        """Wait until the node ends the connection; return whether it says nothing more before."""
        return self.stream.read() == b""

    def reset(self):
        """Hang up as a process that is killed with data unread: TCP resets the connection."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.stream.close()
        self.socket.close()


class Watcher:
    """A client that watches."""

    def __init__(self, client, target, *headers):
        self.client = client
        client.send(request("GET", target, *headers))
        self.head = b"".join(iter(client.stream.readline, b"\r\n"))

    def next(self):
        """Return the count in the next event."""
        return self.event()["count"]

    def event(self):
        """Return what the next event says."""
        line, empty = self.client.stream.readline(), self.client.stream.readline()
        assert (line[:6], empty) == (b"data: ", b"\n"), line
        return json.loads(line[6:])

    def last(self, count):
        """Read until this count comes; return how many events that took."""
        for number in range(1, 10_000):
            if self.next() == count:
                return number


def gossip_request(node, *deltas):
    """Return the bytes with which a peer that nobody can dial pushes those deltas."""
    sender = Sender(new_replica(), None, 1, False)
    message = Message(sender, None, None, None, None, list(deltas), to=node.counter.replica, number=1)
    signature, pieces = seal(node.signer.request(), wire.encode(message))
    return request("POST", PATH, f"{HEADER}: {signature}", body=b"".join(pieces))


def next_id(node):
    """Return the id that the next increment at this node will get."""
    replica = node.counter.replica
    return increment_id(replica, node.counter.vector().get(replica, 0) + 1)


def problem(reply, status):
    """Check that this is an error as every error is; return what it advises."""
    assert reply.status == status, reply
    assert reply.headers["content-type"] == "application/problem+json"
    fields = reply.json()
    assert fields.keys() == {"type", "title", "status", "detail"}
    assert (fields["type"], fields["title"], fields["status"]) == ("about:blank", HTTPStatus(status).phrase, status)
    assert fields["detail"]
    return fields["detail"]


def closes_with(client, status):
    """Check that the node answers this error, says that it closes the connection, and does."""
    reply = client.read()
    problem(reply, status)
    assert reply.headers["connection"] == "close"
    assert client.is_over()
    return reply

"""One node by itself: its API over real sockets, byte by byte where that matters, and its command line."""

import contextlib
import errno
import io
import itertools
import json
import logging
import random
import select
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import pytest
import urllib3
from conftest import PROJECT, wait_until

import counter_server
from counter import AMOUNT_MAX, Delta, http1, increment_id, new_replica, serving, wire
from counter.config import parse_arguments
from counter.serving import CLIENT, RESERVE_MAX, Connection
from counter.wire import Message, Sender
from counter_server import BODY_MAX, Node

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


class Pieces:
    """A socket whose other side sends just these pieces and then hangs up."""

    def __init__(self, pieces):
        self._pieces, self.sent = iter(pieces), b""

    def recv(self, size):
        piece = next(self._pieces, b"")
        assert len(piece) <= size
        return piece

    def sendall(self, data):
        self.sent += data

    def setsockopt(self, *_option):
        pass

    shutdown = setsockopt


def replies_to_pieces(node, *pieces):
    """Serve a connection on which these pieces arrive one by one; return all responses."""
    sock = Pieces(pieces)
    Connection(sock, ("127.0.0.1", 0), node.server, CLIENT)
    stream, replies = io.BytesIO(sock.sent), []
    while stream.tell() < len(sock.sent):
        replies.append(read_reply(stream))
    return replies


def gossip_request(node, *deltas):
    """Return the bytes with which a peer that nobody can dial pushes those deltas."""
    body = wire.encode(Message(Sender(new_replica(), None, 1, False), None, None, None, None, list(deltas)))
    signature = node.signer.request(body)
    signatures = {
        wire.SIGNATURE: signature,
        wire.LENGTH_SIGNATURE: node.signer.length(signature, len(body)),
    }
    return request("POST", wire.PATH, *map(": ".join, signatures.items()), body=body)


def next_id(node):
    """Return the id that the next increment at this node will get."""
    replica = node.counter.replica
    return increment_id(replica, node.counter.vector().get(replica, 0) + 1)


def wait_until_waiting(node):
    """Wait until some request waits for an increment."""
    wait_until(lambda: node.counter._waiting)


def serving_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("connection-")}


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


@pytest.fixture(scope="module")
def node():
    """A node for the tests that leave it as it is, but for counters of their own."""
    node = Node(parse_arguments(["--port", "0"]))
    node.start()
    yield node
    node.stop()


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


@pytest.fixture
def connect():
    """Return a function that opens a Client of a node; afterwards all are closed."""
    with contextlib.ExitStack() as stack:
        yield lambda node: stack.enter_context(contextlib.closing(Client(node)))


@pytest.fixture
def client(node, connect):
    return connect(node)


@pytest.fixture(autouse=True)
def no_traceback(caplog):
    """No test may make a node log a traceback; one that means to clears the log."""
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.exc_info]


# Incrementing and counting.


def test_an_increment_answers_its_id_and_the_count(client, node):
    """The id is the next of this node's."""
    for count in (1, 2):
        expected = {"id": next_id(node), "name": "answered", "count": count}
        reply = client.ask("POST", "/increment/answered")
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        assert reply.json() == expected


def test_the_counter_without_a_name_is_default(client):
    """/increment and /count mean the counter that is named default."""
    before = client.ask("GET", "/count").json()
    after = client.ask("POST", "/increment").json()["count"]
    assert before == {"name": "default", "count": after - 1}
    assert client.ask("GET", "/count").json() == client.ask("GET", "/count/default").json()
    assert client.count("default") == after


def test_a_counter_nobody_incremented_is_0(client):
    """Counters exist without being made."""
    assert client.ask("GET", "/count/untouched").json() == {"name": "untouched", "count": 0}


@pytest.mark.parametrize(
    ("name", "query", "body", "amount"),
    [
        ("good-1", "?amount=5", b"", 5),
        ("good-2", "?amount=-5", b"", -5),
        ("good-3", f"?amount={AMOUNT_MAX}", b"", AMOUNT_MAX),
        ("good-4", f"?amount={-AMOUNT_MAX}", b"", -AMOUNT_MAX),
        ("good-5", "?%61mount=%37", b"", 7),
        ("good-6", "?", b"", 1),
        ("good-7", "", b"{}", 1),
        ("good-8", "", b'{"amount": 5}', 5),
        ("good-9", "", b' {\r\n"\\u0061mount" :\t-5} \n', -5),
        ("good-10", "", b'{"amount": %d}' % -AMOUNT_MAX, -AMOUNT_MAX),
        ("good-11", "?amount=5", b"{}", 5),
        ("good-12", "", b'{"amount": 3}'.ljust(BODY_MAX), 3),
    ],
)
def test_an_amount_is_counted(client, name, query, body, amount):
    """It comes in the query or in the body, and without any it is 1."""
    for times in (1, 2):
        assert client.ask("POST", f"/increment/{name}{query}", body=body).json()["count"] == times * amount
    assert client.count(name) == 2 * amount


@pytest.mark.parametrize(
    "amount",
    ["0", "-0", "1.0", "1e3", "true", "null", '"1"', "1_000", "01", "%2B1", "+1", "%201", "1%20", "1%0A", "0x1", "",
     "abc", "NaN", "%D9%A1", "%FF", "%3", str(AMOUNT_MAX + 1), str(-AMOUNT_MAX - 1), "9" * 5000],
)  # fmt: skip
def test_a_bad_amount_in_the_query_is_refused(client, amount):
    """Nothing is counted, and the connection goes on."""
    problem(client.ask("POST", f"/increment/bad-query?amount={amount}"), 400)
    assert client.count("bad-query") == 0


@pytest.mark.parametrize(
    "query",
    ["amount=1&amount=1", "amount=1&amount=2", "amount", "Amount=1", "by=1", "amount=1&x=1", "amount=1&", "timeout=1"],
)
def test_a_bad_query_of_an_increment_is_refused(client, query):
    """Parameters that are unknown, repeated or without the one they go with are 400."""
    problem(client.ask("POST", f"/increment/bad-query?{query}"), 400)
    assert client.count("bad-query") == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"amount": 0}',
        b'{"amount": -0}',
        b'{"amount": 1.0}',
        b'{"amount": 1e0}',
        b'{"amount": true}',
        b'{"amount": null}',
        b'{"amount": "1"}',
        b'{"amount": 1_000}',
        b'{"amount": 01}',
        b'{"amount": +1}',
        b'{"amount": [1]}',
        b'{"amount": {}}',
        b'{"amount": NaN}',
        b'{"amount": Infinity}',
        b'{"amount": %d}' % (AMOUNT_MAX + 1),
        b'{"amount": %d}' % (-AMOUNT_MAX - 1),
        b'{"amount": %s}' % (b"9" * 5000),
        b'{"amount": %s}' % (b"9" * 60_000),
        b'{"amount": 1, "amount": 1}',
        b'{"amount": 1, "\\u0061mount": 2}',
        b'{"amount": 1, "by": 1}',
        b'{"by": 1}',
        b'{"Amount": 1}',
        b'{"amount": {"a": 1, "a": 1}}',
        b'{"amount": 1}{}',
        b'{"amount": 1,}',
        b"{'amount': 1}",
        b'{"amount": 1',
        b"1",
        b"null",
        b"[]",
        b'["amount"]',
        b'"amount"',
        b" ",
        b"amount=1",
        b'\xef\xbb\xbf{"amount": 1}',
        b'{"amount": 1, "\xff": 1}',
        b"\xff",
        b"\0",
        '{"amount": 1}'.encode("utf-16"),
        b"[" * 60_000,
        b'{"amount": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"amount":' * 6_000,
    ],
    ids=lambda body: body[:40].decode("latin-1").encode("unicode_escape").decode() + f"-{len(body)}",
)
def test_a_bad_body_is_refused(client, body):
    """Nothing is counted, and the connection goes on."""
    problem(client.ask("POST", "/increment/bad-body", body=body), 400)
    assert client.count("bad-body") == 0


def test_an_amount_in_two_places_is_refused(client):
    """Even where both say the same."""
    problem(client.ask("POST", "/increment/both?amount=5", body=b'{"amount": 5}'), 400)
    assert client.count("both") == 0


@pytest.mark.parametrize(
    ("encoded", "name"),
    [
        ("a", "a"),
        ("%61%2D%3A%2e", "a-:."),
        ("A.b_c:d-9", "A.b_c:d-9"),
        ("...", "..."),
        ("-", "-"),
        ("increment", "increment"),
        ("n" * 128, "n" * 128),
    ],
)
def test_a_good_name_is_counted(client, encoded, name):
    """However it is encoded, it is the same counter."""
    before = client.count(name)
    assert client.ask("POST", f"/increment/{encoded}").json()["name"] == name
    assert client.ask("GET", f"/count/{encoded}").json() == {"name": name, "count": before + 1}


@pytest.mark.parametrize(
    "encoded",
    ["", ".", "..", "%2e", "%2E%2e", "n" * 129, "a%2Fb", "a%20b", "a+b", "a%00", "a%0A", "%C3%A9", "%FF", "%", "%4",
     "%zz", "a%2561", "a,b", "a;b", "a~", "a#b", '"', "a\\b"],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("POST", "/increment/"), ("GET", "/count/")])
def test_a_bad_name_is_refused(client, method, path, encoded):
    """Everywhere a name goes; the connection goes on."""
    problem(client.ask(method, path + encoded), 400)
    assert client.ask("GET", "/healthz").status == 200


# Increments by id.


def test_an_increment_can_be_looked_up(client, node):
    """Its id is unknown before, and applied after; letters count in either case."""
    id = next_id(node)
    problem(client.ask("GET", f"/increments/{id}"), 404)
    assert client.ask("POST", "/increment/looked-up").json()["id"] == id
    for spelling in (id, id.upper(), id.replace("-", "%2D")):
        reply = client.ask("GET", f"/increments/{spelling}")
        assert (reply.status, reply.json()) == (200, {"id": id, "applied": True})
    problem(client.ask("GET", f"/increments/{NOBODYS_ID}"), 404)


BAD_IDS = [
    "",
    "1",
    "00000000-0000-8000-8000-000000000000",  # no increment is number 0
    "00000000-0000-4000-8000-000000000001",  # another version
    "00000000-0000-8000-0000-000000000001",  # another variant
    "00000000-0000-8000-c000-000000000001",
    "00000000-0000-8000-8000-00000000001",
    "00000000-0000-8000-8000-0000000000001",
    "00000000000080008000000000000001",
    "{00000000-0000-8000-8000-000000000001}",
    "0000000g-0000-8000-8000-000000000001",
    "00000000-0000-8000-8000-000000000001%0A",
    "00000000-0000-8000-8000-00000000000%FF",
]


@pytest.mark.parametrize("path", ["/increments/", "/count?after=", "/count/x?timeout=0&after="])
@pytest.mark.parametrize("id", BAD_IDS)
def test_what_is_no_increment_id_is_refused(client, path, id):
    """Only a UUIDv8 with the RFC's variant and a sequence of at least 1 is one."""
    problem(client.ask("GET", path + id), 400)


def test_after_an_increment_that_is_held_the_count_comes_at_once(client):
    """Even where no time to wait is given."""
    id = client.ask("POST", "/increment/held").json()["id"]
    assert client.ask("GET", f"/count/held?timeout=0&after={id}").json() == {"name": "held", "count": 1}
    assert client.ask("GET", f"/count/held?after={id}").json()["count"] == 1


def test_after_waits_for_an_increment_of_this_node(client, connect, node):
    """The count that is answered has that increment in it."""
    client.send(request("GET", f"/count/own?timeout=60&after={next_id(node)}"))
    wait_until_waiting(node)
    assert connect(node).ask("POST", "/increment/own?amount=4").status == 200
    assert client.read().json() == {"name": "own", "count": 4}


def test_after_waits_for_an_increment_of_a_peer(client, connect, node):
    """What a peer hands over later wakes only those who waited for as much as it brings."""
    replica, peer, further = new_replica(), connect(node), connect(node)
    client.send(request("GET", f"/count/peers?timeout=60&after={increment_id(replica, 2)}"))
    further.send(request("GET", f"/count/peers?timeout=60&after={increment_id(replica, 3)}"))
    wait_until(lambda: len(node.counter._waiting.get(replica, ())) == 2)
    peer.send(gossip_request(node, Delta(replica, 0, 2, {"peers": (2, 7)})))
    assert peer.read().status == 200
    assert client.read().json() == {"name": "peers", "count": 7}
    peer.send(gossip_request(node, Delta(replica, 2, 3, {"peers": (3, 9)})))
    assert peer.read().status == 200
    assert further.read().json() == {"name": "peers", "count": 9}


@pytest.mark.parametrize("timeout", ["0", "0.0", "0.05"])
def test_an_increment_that_does_not_arrive_in_time_is_504(client, node, timeout):
    """The connection goes on, and the same question is answered once the increment is there."""
    question = ("GET", f"/count/late?after={next_id(node)}&timeout={timeout}")
    problem(client.ask(*question), 504)
    problem(client.ask(*question), 504)
    assert client.ask("POST", "/increment/late").status == 200
    assert client.ask(*question).status == 200


@pytest.mark.parametrize("timeout", ["0", "1", "5.5", "60", "60.0", "0.000000001"])
def test_a_good_timeout_is_taken(client, timeout):
    """From 0 to 60 seconds, with fractions."""
    id = client.ask("POST", "/increment/timeouts").json()["id"]
    assert client.ask("GET", f"/count?after={id}&timeout={timeout}").status == 200


@pytest.mark.parametrize(
    "timeout",
    ["", "-1", "-0", "60.000000001", "61", "1e1", "1.", "1,5", "1s", "nan", "inf", "%D9%A1", "%201", "9" * 500],
)
def test_a_bad_timeout_is_refused(client, timeout):
    """Before anything is waited for."""
    problem(client.ask("GET", f"/count?after={NOBODYS_ID}&timeout={timeout}"), 400)


# Idempotency keys, acks and limits.


def test_a_key_counts_once_and_a_replay_says_so(client):
    """The same key, in quotes or not, answers the same id with the present count."""
    first = client.ask("POST", "/increment/keyed?amount=5", "Idempotency-Key: once")
    client.ask("POST", "/increment/keyed")
    replay = client.ask("POST", "/increment/keyed", 'Idempotency-Key: "once"', body=b'{"amount": 5}')
    assert (first.status, first.json()["count"], "idempotent-replayed" in first.headers) == (200, 5, False)
    assert (replay.status, replay.json()) == (200, {**first.json(), "count": 6})
    assert replay.headers["idempotent-replayed"] == "true"


def test_the_very_same_bytes_with_a_key_count_once(client):
    """Where a connection repeats a request, its key is looked at again each time."""
    replies = [client.ask("POST", "/increment/keyed-again", "Idempotency-Key: same") for _ in range(4)]
    assert [reply.json()["count"] for reply in replies] == [1] * 4
    assert ["idempotent-replayed" in reply.headers for reply in replies] == [False, True, True, True]


@pytest.mark.parametrize("target", ["/increment/reused?amount=2", "/increment/reused2"])
def test_a_key_with_another_payload_is_422(client, target):
    """What was counted under it stays as it is."""
    client.ask("POST", "/increment/reused", "Idempotency-Key: reused")
    problem(client.ask("POST", target, "Idempotency-Key: reused"), 422)
    assert (client.count("reused"), client.count("reused2")) == (1, 0)


@pytest.mark.parametrize("key", ["", '""', "a b", "\xe4", "x" * 256, "a\tb"])
def test_what_is_no_key_is_refused(client, key):
    """A key is 1 to 255 visible ASCII characters."""
    problem(client.ask("POST", "/increment/no-key", f"Idempotency-Key: {key}"), 400)
    assert client.count("no-key") == 0


def test_two_keys_in_one_request_are_refused(client):
    """The next program might take the other one."""
    client.send(request("POST", "/increment", "Idempotency-Key: a", "Idempotency-Key: a"))
    closes_with(client, 400)


def uuid7(seconds_ago):
    milliseconds = f"{int((time.time() - seconds_ago) * 1000):012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}-7abc-8abc-0123456789ab"


def test_a_uuid7_that_may_have_been_forgotten_is_refused(client):
    """So that not even a very late retry counts twice."""
    assert client.ask("POST", "/increment/stale-key", f"Idempotency-Key: {uuid7(3000)}").status == 200
    problem(client.ask("POST", "/increment/stale-key", f"Idempotency-Key: {uuid7(4000)}"), 400)
    assert client.count("stale-key") == 1


def test_without_room_for_a_key_the_client_is_told_when_to_come_back(start_local, connect):
    """Keys that are known, and increments without one, are served all the same."""
    client = connect(start_local("--max-idempotency-keys", "1", "--idempotency-window", "100"))
    assert client.ask("POST", "/increment", "Idempotency-Key: first").status == 200
    refused = client.ask("POST", "/increment", "Idempotency-Key: second")
    problem(refused, 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 100
    assert client.ask("POST", "/increment", "Idempotency-Key: first").status == 200
    assert client.ask("POST", "/increment").json()["count"] == 2


def test_without_room_for_a_counter_existing_ones_go_on(start_local, connect):
    """The limit is on new names; nothing is changed by what is refused."""
    client = connect(start_local("--max-counters", "1"))
    assert client.ask("POST", "/increment/first").status == 200
    problem(client.ask("POST", "/increment/second"), 507)
    problem(client.ask("POST", "/increment/second", "Idempotency-Key: k"), 507)
    assert client.ask("POST", "/increment/first", "Idempotency-Key: k").json()["count"] == 2
    assert client.count("second") == 0


def test_acks_says_how_many_nodes_hold_it(client):
    """Alone that is one, and for more it waits as long as it may; the increment stays."""
    assert client.ask("POST", "/increment/acked?acks=1").json()["acks"] == 1
    short = client.ask("POST", "/increment/acked?acks=2&timeout=0.01")
    assert (short.status, short.json()["acks"], short.json()["count"]) == (202, 1, 2)


def test_a_replay_waits_for_acks_as_well(client):
    """It answers as the first try would have, had it been heard."""
    client.ask("POST", "/increment/acked-again", "Idempotency-Key: acked")
    replay = client.ask("POST", "/increment/acked-again?acks=2&timeout=0", "Idempotency-Key: acked")
    assert (replay.status, replay.json()["acks"], replay.json()["count"]) == (202, 1, 1)


@pytest.mark.parametrize(
    "query", ["acks=0", "acks=-1", "acks=x", "acks=", "acks=1.0", "acks=1&timeout=61", "timeout=1"]
)
def test_acks_that_make_no_sense_are_refused(client, query):
    """Nothing is counted then."""
    problem(client.ask("POST", f"/increment/no-acks?{query}"), 400)
    assert client.count("no-acks") == 0


def test_who_waits_for_acks_is_let_go_when_the_node_stops(start_local, connect):
    """It is told how many nodes hold the increment by then."""
    node = start_local()
    client = connect(node)
    client.send(request("POST", "/increment?acks=2&timeout=60"))
    wait_until(lambda: node.counter.value("default") == 1)
    node.stop()
    reply = client.read()
    assert (reply.status, reply.json()["acks"]) == (202, 1)


# Listing.


def test_counters_are_listed_by_name(client, start_local, connect):
    """With their values, whoever counted them, also those that are back at 0."""
    node = start_local()
    own, peer = connect(node), connect(node)
    for path in ("/increment/b?amount=-5", "/increment/a", "/increment/a?amount=-1", "/increment/c"):
        own.ask("POST", path)
    peer.send(gossip_request(node, Delta(new_replica(), 0, 2, {"aa": (1, 7), "c": (2, 1)})))
    assert peer.read().status == 200
    reply = own.ask("GET", "/counts")
    assert reply.json() == {"counts": {"a": 0, "aa": 7, "b": -5, "c": 2}, "next": None}
    assert list(reply.json()["counts"]) == ["a", "aa", "b", "c"]
    assert own.ask("GET", "/counts?start=aa&limit=2").json() == {"counts": {"aa": 7, "b": -5}, "next": "c"}
    assert own.ask("GET", "/counts?prefix=a&limit=1&start=a").json() == {"counts": {"a": 0}, "next": "aa"}
    assert own.ask("GET", "/counts?prefix=%61a").json() == {"counts": {"aa": 7}, "next": None}
    assert own.ask("GET", "/counts?prefix=z").json() == {"counts": {}, "next": None}


@pytest.mark.parametrize(("query", "size"), [("", 100), ("?limit=1000", 1000), ("?limit=1", 1)])
def test_a_page_has_as_many_counters_as_were_asked_for(start_local, connect, query, size):
    """100 by default, and at most 1,000."""
    node = start_local()
    for number in range(1001):
        node.counter.increment(f"n{number:04}")
    page = connect(node).ask("GET", f"/counts{query}").json()
    assert list(page["counts"]) == [f"n{number:04}" for number in range(size)]
    assert page["next"] == f"n{size:04}"


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=-1", "limit=1.0", "limit=01", "limit=", "limit=10&limit=10", "prefix=a/b",
     "prefix=%C3%A4", f"prefix={'a' * 129}", "prefix=a%0A", "start=", "start=..", "start=a%20b", "start=%2561",
     "after=a"],
)  # fmt: skip
def test_a_bad_query_of_a_listing_is_refused(client, query):
    """What is malformed, unknown or there twice is 400."""
    problem(client.ask("GET", f"/counts?{query}"), 400)


# Other paths and methods.


def test_a_node_alone_lists_itself_and_no_peer(start_local, connect):
    """The address is the one that it listens on."""
    node = start_local()
    about = connect(node).ask("GET", "/peers").json()
    assert about["peers"] == []
    assert about["self"]["id"] == node.counter.replica
    assert about["self"]["address"] == f"127.0.0.1:{node.port}"
    assert about["self"]["uptime_s"] >= 0


def test_a_peer_is_listed(start_local, connect):
    """With its id, address, state, silence, and how much it has yet to confirm: nothing, in the end."""
    first = start_local()
    second = start_local("--peers", f"127.0.0.1:{first.port}")
    client = connect(first)
    client.ask("POST", "/increment")

    def settled():
        return [peer for peer in client.ask("GET", "/peers").json()["peers"] if peer["unconfirmed"] == 0]

    (peer,) = wait_until(settled)
    assert peer["silent_s"] >= 0
    assert (peer["id"], peer["address"]) == (second.counter.replica, f"127.0.0.1:{second.port}")
    assert (peer["state"], peer["unconfirmed"]) == ("active", 0)


def test_an_advertised_address_is_what_a_node_says_of_itself(start_local, connect):
    """Instead of the one that it listens on."""
    node = start_local("--advertise", "Counter.Example:80")
    assert connect(node).ask("GET", "/peers").json()["self"]["address"] == "counter.example:80"


def test_a_node_alone_is_alive_and_ready(client):
    """It says that it is alone."""
    assert client.ask("GET", "/healthz").status == 200
    reply = client.ask("GET", "/readyz")
    assert (reply.status, reply.json()["alone"]) == (200, True)


def test_a_node_whose_seeds_are_silent_is_alive_but_not_ready(start_local, connect):
    """The answer says when to ask again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(start_local("--peers", f"127.0.0.1:{silent.getsockname()[1]}", "--join-timeout", "60"))
        assert client.ask("GET", "/healthz").status == 200
        reply = client.ask("GET", "/readyz")
    problem(reply, 503)
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "path",
    ["/nowhere", "//", "/count/a/b", "//count", "/Count", "/counter", "/increments", "/peers/", "/internal", "count"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_an_unknown_path_is_404(client, path, method):
    """Whatever the method; the connection goes on."""
    problem(client.ask(method, path), 404)
    assert client.ask("GET", "/healthz").status == 200


PATHS = [
    ("/increment", {"POST", "OPTIONS"}),
    ("/increment/x", {"POST", "OPTIONS"}),
    (wire.PATH, {"POST", "OPTIONS"}),
    ("/count", {"GET", "HEAD", "OPTIONS"}),
    ("/count/x", {"GET", "HEAD", "OPTIONS"}),
    ("/increments/x", {"GET", "HEAD", "OPTIONS"}),
    ("/peers", {"GET", "HEAD", "OPTIONS"}),
    ("/healthz", {"GET", "HEAD", "OPTIONS"}),
    ("/readyz", {"GET", "HEAD", "OPTIONS"}),
]


@pytest.mark.parametrize(("path", "allowed"), PATHS)
def test_a_wrong_method_is_405(client, path, allowed):
    """The answer lists in Allow what the path takes, and methods are told apart by case."""
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW", "get", "post", "options"} - allowed:
        reply = client.ask(method, path)
        problem(reply, 405)
        assert set(reply.headers["allow"].split(", ")) == allowed
    if "HEAD" not in allowed:
        assert client.ask("HEAD", path).status == 405


@pytest.mark.parametrize(("path", "allowed"), [*PATHS, ("*", {"GET", "HEAD", "POST", "OPTIONS"})])
def test_options_are_told(client, path, allowed):
    """204 without content and with Allow."""
    reply = client.ask("OPTIONS", path)
    assert (reply.status, set(reply.headers["allow"].split(", "))) == (204, allowed)
    assert not reply.headers.keys() & {"content-length", "content-type"}


@pytest.mark.parametrize(
    "path", ["/increments/1?x", "/peers?x=1", "/healthz?x", "/readyz?x", "/count?x", "/count?timeout=1"]
)
def test_a_query_that_means_nothing_is_refused(client, path):
    """A parameter that is unknown, or lacks the one it goes with, is 400."""
    problem(client.ask("GET", path), 400)


@pytest.mark.parametrize(
    ("path", "status"),
    [("/count", 200), ("/count/x?after=1", 400), ("/peers", 200), ("/healthz", 200), ("/readyz", 200),
     ("/nowhere", 404), (f"/increments/{NOBODYS_ID}", 404), (f"/count?timeout=0&after={NOBODYS_ID}", 504)],
)  # fmt: skip
def test_head_is_get_without_a_body(client, path, status):
    """The headers are the same, the length of the body included; asking in turn changes nothing."""

    def described(reply):
        assert reply.status == status
        return reply.headers.keys(), reply.headers["content-type"], reply.headers.get("allow")

    got = client.ask("GET", path)
    for _ in range(2):
        head = client.ask("HEAD", path)
        assert described(head) == described(got)
        assert int(head.headers["content-length"]) > 0
    assert described(client.ask("GET", path)) == described(got)


def test_head_says_how_long_the_body_would_be(client):
    """For a counter at rest that is the length of the body that GET gets."""
    body = client.ask("GET", "/count/at-rest").body
    assert int(client.ask("HEAD", "/count/at-rest").headers["content-length"]) == len(body)


def test_what_is_no_gossip_is_refused(client, node):
    """A message that is signed, but damaged, changes nothing."""
    for body in (b"x", b"{}", b"[" * 60_000):
        signature = f"{wire.SIGNATURE}: {node.signer.request(body)}"
        problem(client.ask("POST", wire.PATH, signature, body=body), 400)


def test_a_bug_costs_one_connection(client, connect, node, monkeypatch, caplog):
    """The client gets 500 and the log a traceback, and other connections go on."""

    def broken(_name):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(node.counter, "value", broken)
        client.send(request("GET", "/count/x"))
        closes_with(client, 500)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
    caplog.clear()
    assert connect(node).ask("GET", "/count/x").status == 200


# Connections.


def test_a_connection_is_used_again(client):
    """HTTP/1.1 keeps it open, after errors too, without saying so."""
    for target, status in [("/count", 200), ("/count?x", 400), ("/nowhere", 404), ("/healthz", 200)] * 2:
        reply = client.ask("GET", target)
        assert reply.status == status
        assert "connection" not in reply.headers


def test_connection_close_closes(client):
    """The answer says the same, and what comes after is not served."""
    client.send(request("POST", "/increment/closed", "Connection: close") + request("POST", "/increment/closed"))
    reply = client.read()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert client.is_over()


def test_http_1_0_is_served(client):
    """Without Host, and the connection closes."""
    client.send(b"GET /count/old HTTP/1.0\r\n\r\n")
    reply = client.read()
    assert reply.json() == {"name": "old", "count": 0}
    assert reply.headers["connection"] == "close"
    assert client.is_over()


def test_http_1_0_can_keep_alive(client):
    """Every answer says that the connection stays, until one does not."""
    for count in (1, 2, 3):
        reply = client.ask("POST", "/increment/old-alive", "Connection: keep-alive", version="1.0")
        assert (reply.json()["count"], reply.headers["connection"]) == (count, "keep-alive")
    assert client.ask("GET", "/count/old-alive", version="1.0").headers["connection"] == "close"
    assert client.is_over()


def test_http_1_0_is_told_one_thing_about_its_connection(client):
    """Also where it asks to keep alive what cannot be."""
    client.send(
        request("POST", "/increment", "Connection: keep-alive", f"Content-Length: {BODY_MAX + 1}", version="1.0")
    )
    assert closes_with(client, 413).headers["connection"] == "close"


def test_pipelined_requests_are_answered_in_order(client):
    """Many sent at once, some with a body, each get their answer."""
    names = [f"pipelined-{number % 3}" for number in range(60)]
    bodies = [b"", b'{"amount": 2}'] * 30
    client.send(
        b"".join(request("POST", f"/increment/{name}", body=body) for name, body in zip(names, bodies, strict=False))
    )
    assert [client.read().json()["name"] for _ in names] == names


def test_the_same_request_pipelined_counts_each_time(client):
    """Repeats that arrive together are as good as repeats that arrive one by one."""
    once = request("POST", "/increment/repeated")
    for times in (1, 1, 3, 1, 2, 2):
        client.send(once * times)
        counts = [client.read().json()["count"] for _ in range(times)]
    assert counts == [9, 10]


def test_a_request_may_come_byte_by_byte(client):
    """However slowly it trickles in, it is served once it is there."""
    for byte in request("POST", "/increment/bytes", body=b'{"amount": 5}'):
        client.send(bytes([byte]))
    assert client.read().json()["count"] == 5


@pytest.mark.parametrize("body", [b"", b'{"amount": 1}'])
@pytest.mark.parametrize("between", [b"", request("GET", "/nowhere"), b"\r\n"])
def test_requests_may_be_cut_anywhere(node, body, between):
    """Three in a row are served alike wherever TCP divides them."""
    once, count = request("POST", "/increment/cut", body=body), node.counter.value("cut")
    raw = once + between + once * 2
    for cut in range(1, len(raw)):
        replies = [reply for reply in replies_to_pieces(node, raw[:cut], raw[cut:]) if reply.status != 404]
        assert [reply.json()["count"] for reply in replies] == [count + 1, count + 2, count + 3], raw[:cut]
        count += 3


def test_a_body_may_come_after_its_head(node):
    """Time and again, though the heads are the same."""
    head = request("POST", "/increment/headed", "Content-Length: 13")
    replies = replies_to_pieces(node, *[head, b'{"amount": 5}'] * 3)
    assert [reply.json()["count"] for reply in replies] == [5, 10, 15]


def test_a_request_may_come_after_an_empty_line(client):
    """Some clients end a body with one that is not part of it."""
    client.send(b"\r\n" + request("POST", "/increment/empty-line", body=b"{}") + b"\r\n")
    assert client.ask("POST", "/increment/empty-line").json()["count"] == 1
    assert client.read().json()["count"] == 2


def test_empty_lines_are_no_request(node):
    """However they are cut off from the request that follows, they never stand for it."""
    empty, once = b"\r\n\r\n", request("POST", "/increment/empty-lines")
    assert [reply.json()["count"] for reply in replies_to_pieces(node, empty, once, empty)] == [1]
    assert [reply.json()["count"] for reply in replies_to_pieces(node, empty, once, once)] == [2, 3]


def test_requests_in_turn_get_their_own_answers(client):
    """A connection that repeats requests, in any order, confuses none with another."""
    rng, counts = random.Random(1), {"turn-a": 0, "turn-b": 0}
    for _ in range(300):
        name = rng.choice(list(counts))
        kind = rng.choice(["increment", "increment with a body", "count", "head", "error"])
        if kind == "increment":
            counts[name] += 1
            assert client.ask("POST", f"/increment/{name}").json()["count"] == counts[name]
        elif kind == "increment with a body":
            counts[name] -= 2
            assert client.ask("POST", f"/increment/{name}", body=b'{"amount": -2}').json()["count"] == counts[name]
        elif kind == "count":
            assert client.ask("GET", f"/count/{name}").json() == {"name": name, "count": counts[name]}
        elif kind == "head":
            assert client.ask("HEAD", f"/count/{name}").status == 200
        else:
            problem(client.ask("GET", f"/increment/{name}"), 405)


def test_100_continue_is_said(client):
    """The body is asked for once its head is good, and then counted."""
    client.send(request("POST", "/increment/continued", "Expect: 100-continue", "Content-Length: 13"))
    assert client.read().status == 100
    client.send(b'{"amount": 5}')
    assert client.read().json()["count"] == 5


@pytest.mark.parametrize(
    ("version", "pieces", "statuses"), [("1.1", 2, [100, 200]), ("1.1", 1, [200]), ("1.0", 2, [200])]
)
def test_100_continue_is_not_said_without_need(node, version, pieces, statuses):
    """Not where the body came along, nor to HTTP/1.0, which does not know it."""
    head = request("POST", "/increment/needless", "Expect: 100-continue", "Content-Length: 2", version=version)
    replies = replies_to_pieces(node, *[[head + b"{}"], [head, b"{}"]][pieces - 1])
    assert [reply.status for reply in replies] == statuses


def test_an_unknown_expectation_is_417(client):
    """It cannot be met, and whether a body follows is unknown."""
    client.send(request("POST", "/increment", "Expect: miracles"))
    closes_with(client, 417)


def test_a_target_may_be_absolute(client):
    """As a proxy gets it; the host in it does not matter."""
    assert client.ask("POST", "http://elsewhere:1/increment/absolute?amount=3").json()["name"] == "absolute"
    assert client.ask("GET", "HTTP://elsewhere/count/absolute").json()["count"] == 3


def test_only_a_whole_target_may_be_absolute(client):
    """A scheme in the middle of a path is a part of it."""
    problem(client.ask("POST", "/incrementhttp://elsewhere/x"), 404)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /count\r\n\r\n", 400),
        (b"GET /count HTTP/1.1\r\n\r\n", 400),
        (b"GET /count HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /count HTTP/1.1\nHost: a\n\r\n\r\n", 400),
        (b"GET /count HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
        (b"GET /count HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", 400),
        (b"GET /count HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /count HTTP/1.1\r\nHost: a\0\r\n\r\n", 400),
        (b"GET /co\0unt HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /increment HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST /increment HTTP/1.1\r\nHost: a\r\nContent-Length: 2, 2\r\n\r\n{}", 400),
        (b"POST /increment HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n{}", 400),
        (b"POST /increment HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (b"POST /increment HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 501),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
def test_what_is_no_clean_http_is_refused(client, connect, node, raw, status):
    """Nothing after it on the connection is served, for nobody knows where that begins."""
    client.send(raw + request("POST", "/increment/smuggled"))
    closes_with(client, status)
    assert connect(node).count("smuggled") == 0


def test_a_bare_lf_ends_nothing(client, monkeypatch):
    """A head whose lines end in LF alone is waited for in vain."""
    monkeypatch.setattr(serving, "HEAD_TIMEOUT_S", 0.1)
    client.send(b"GET /count HTTP/1.1\nHost: a\n\n")
    closes_with(client, 408)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /" + b"x" * http1.LINE_MAX, 414),
        (b"GET /" + b"x" * http1.LINE_MAX + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * http1.HEAD_MAX, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * http1.HEAD_MAX + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * http1.HEAD_LINES_MAX + b"\r\n", 431),
    ],
    ids=["line without an end", "line", "head without an end", "head", "lines"],
)
def test_a_head_that_is_too_large_is_refused(client, raw, status):
    """Whether it ends or not."""
    client.send(raw)
    closes_with(client, status)


def test_the_largest_head_may_be_cut_anywhere(node):
    """A line or a head that just keeps its limit is no longer for an end that comes in two pieces."""
    line = b"GET /count/" + b"n" * (http1.LINE_MAX - len("GET /count/ HTTP/1.1")) + b" HTTP/1.1"
    head = request("GET", "/count/cut")[:-4] + b"\r\nX: "
    head += b"x" * (http1.HEAD_MAX - len(head))
    for cut in range(1, 4):
        end = b"\r\nHost: a\r\n\r\n"
        assert [reply.status for reply in replies_to_pieces(node, line + end[:cut], end[cut:])] == [400]
        end = b"\r\n\r\n"
        assert [reply.status for reply in replies_to_pieces(node, head + end[:cut], end[cut:])] == [200]


def test_a_body_that_is_too_large_is_refused_and_the_answer_can_be_read(client, monkeypatch):
    """A client that first sends all of it is listened to until then."""
    monkeypatch.setattr(serving, "LINGER_S", 15.0)
    client.send(request("POST", "/increment/large", body=b"x" * (128 * BODY_MAX)))
    reply = client.read()
    problem(reply, 413)
    assert reply.headers["connection"] == "close"


def test_a_body_that_is_too_large_is_not_asked_for(client):
    """The answer to Expect is 413 at once, even for a single byte too many."""
    client.send(request("POST", "/increment/large", "Expect: 100-continue", f"Content-Length: {BODY_MAX + 1}"))
    closes_with(client, 413)


def test_a_head_must_be_complete_in_time(client, monkeypatch):
    """However steadily it trickles in."""
    monkeypatch.setattr(serving, "HEAD_TIMEOUT_S", 0.2)
    client.send(b"GET /count HTTP/1.1\r\nX: ")

    def answered():
        client.send(b"x")
        return select.select([client.socket], [], [], 0)[0]

    wait_until(answered)
    problem(client.read(), 408)


class NeverEnding:
    """A socket that always has one byte more, at once: a trickle faster than any client of a test can be."""

    def recv(self, _size):
        return b"x"

    def setsockopt(self, *_):
        pass


def test_time_is_over_though_more_is_there(monkeypatch):
    """However fast it trickles in: between two bytes a node need not have waited at all."""
    monkeypatch.setattr(serving, "HEAD_TIMEOUT_S", 0.01)
    connection = serving.Connection.__new__(serving.Connection)
    connection.request, connection.kind = NeverEnding(), serving.CLIENT
    connection._received, connection._receive_timeout_s = b"GET / HTTP/1.1\r\nX: ", None
    with pytest.raises(http1.Refused) as refused:
        connection._read_head()
    assert refused.value.status == 408


def test_a_body_must_be_complete_in_time(client, monkeypatch):
    """Nothing of a half one is counted."""
    monkeypatch.setattr(serving, "BODY_TIMEOUT_S", 0.1)
    client.send(request("POST", "/increment/half", "Content-Length: 13") + b'{"amount"')
    closes_with(client, 408)


@pytest.mark.parametrize("requests", [0, 1])
def test_an_idle_connection_is_closed(node, connect, monkeypatch, requests):
    """Without a word, before its first request or after one."""
    monkeypatch.setattr(serving, "IDLE_TIMEOUT_S", 0.1)
    client = connect(node)
    for _ in range(requests):
        assert client.ask("GET", "/count").status == 200
    assert client.is_over()


@pytest.mark.parametrize("hang_up", [Client.close, Client.reset])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /count HTTP/1.1\r\nHo",
        request("POST", "/increment", "Content-Length: 13") + b'{"amount"',
        request("POST", "/increment", "Expect: 100-continue", "Content-Length: 13"),
        request("GET", "/peers") * 2000,
        request("GET", f"/count?timeout=0.1&after={NOBODYS_ID}"),
        b"no HTTP\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "no body", "no reader", "while it waits", "after an error"],
)
def test_a_client_may_hang_up_at_any_time(node, connect, sent, hang_up):
    """Its thread ends, nobody else notices, and the log stays quiet."""
    others = serving_threads()
    client = connect(node)
    client.send(sent)
    wait_until(lambda: serving_threads() - others)
    hang_up(client)
    wait_until(lambda: not serving_threads() - others)
    assert connect(node).ask("GET", "/count").status == 200


# Many connections.


@pytest.fixture
def full(start_local, connect):
    """A node whose two connections for clients are taken, and those."""
    node = start_local("--max-connections", "2")
    clients = [connect(node), connect(node)]
    assert all(client.ask("GET", "/count").status == 200 for client in clients)
    return node, clients


def test_one_client_too_many_is_sent_away(full, connect):
    """It is told when to come back, the others go on, and once one leaves there is a place."""
    node, clients = full
    third = connect(node)
    third.send(request("POST", "/increment"))
    assert int(closes_with(third, 503).headers["retry-after"]) >= 1
    assert [client.count("default") for client in clients] == [0, 0]
    clients[0].close()
    wait_until(lambda: connect(node).ask("GET", "/count").status == 200)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_who_watches_a_full_node_is_answered(full, connect, path):
    """Whoever restarts what does not answer must not restart all nodes because they have many clients."""
    node, _ = full
    watcher = connect(node)
    watcher.send(request("GET", path))
    assert watcher.read().status == 200
    assert watcher.is_over()


def test_a_full_node_logs_it_once_and_so_when_there_is_room_again(full, connect, caplog):
    caplog.set_level(logging.INFO, "counter.serving")
    node, clients = full

    def lines():
        return [record.getMessage().partition(":")[0] for record in caplog.records]

    for _ in range(3):
        surplus = connect(node)
        surplus.send(request("GET", "/count"))
        closes_with(surplus, 503)
    assert lines() == ["clients are sent away"]
    clients[0].close()
    wait_until(lambda: lines() == ["clients are sent away", "clients are served again"])


def test_a_node_that_cannot_accept_says_so_and_goes_on(start_local, connect, caplog, monkeypatch):
    """Most likely all file descriptors are taken.  It is a line in the log, however often it happens."""
    node, accept, tries = start_local(), socketserver.TCPServer.get_request, itertools.count()

    def accept_later(server):
        if next(tries) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", accept_later)
    assert connect(node).ask("GET", "/count").status == 200
    assert [record.getMessage() for record in caplog.records] == [
        "no connection can be accepted: error=[Errno 24] Too many open files"
    ]


def test_a_node_that_can_start_no_further_thread_makes_room_to_be_watched(start_local, connect, caplog, monkeypatch):
    """As many clients as there are connections in reserve have to go, and it is a line in the log."""
    node, start = start_local(), threading.Thread.start
    clients = [connect(node) for _ in range(RESERVE_MAX + 2)]
    assert all(client.ask("GET", "/count").status == 200 for client in clients)

    def start_if_there_is_room(thread):
        if len(serving_threads()) >= len(clients):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_there_is_room)
    assert connect(node).is_over()
    wait_until(lambda: node.server.connections()[CLIENT] == 2)
    watcher = connect(node)
    watcher.send(request("GET", "/healthz"))
    assert watcher.read().status == 200
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "no thread could be started: clients served from now on, max=2",
        "clients are sent away: all of --max-connections are taken, max=2",
    ]


def test_a_peer_is_served_however_many_clients_there_are(full, connect):
    """It takes no client's place, may stay, and what it tells is counted."""
    node, clients = full
    replica = new_replica()
    peers = [connect(node) for _ in range(3)]
    for sequence in range(1, 7):
        peer = peers[sequence % len(peers)]
        totals = {"default": (sequence, sequence * 10)}
        peer.send(gossip_request(node, Delta(replica, sequence - 1, sequence, totals)))
        reply = peer.read()
        assert reply.status == 200
        assert wire.decode(reply.body).confirms == {replica: sequence}
    assert clients[0].count("default") == 60
    third = connect(node)
    third.send(request("GET", "/count"))
    closes_with(third, 503)


def test_a_long_message_is_not_read_unless_a_peer_vouches_for_it(client, connect, node):
    """Or anybody could fill the memory: only all of a body shows whether it was signed."""
    for length_signature in ("", node.signer.length("", 70_001)):
        stranger = connect(node)
        header = f"{wire.LENGTH_SIGNATURE}: {length_signature}"
        stranger.send(request("POST", wire.PATH, "Content-Length: 70000", header))
        closes_with(stranger, 401)
    totals = {f"{'x' * 50}{number}": (number, 1) for number in range(1, 2001)}
    client.send(message := gossip_request(node, Delta(new_replica(), 0, 2000, totals)))
    assert len(message) > wire.BODY_UNPROVEN
    assert client.read().status == 200
    assert client.count("x" * 50 + "2000") == 1


def test_a_node_vouches_for_its_long_messages(start_local):
    """One that nobody can dial hands over all it counted with its own requests."""
    node = start_local()
    sender = start_local("--peers", f"127.0.0.1:{node.port}", "--advertise", "127.0.0.1:1")
    for number in range(2000):
        sender.counter.increment(f"{'x' * 50}{number}")
    sender.replicator.wake()
    wait_until(lambda: node.counter.vector() == sender.counter.vector())
    assert sender.replicator.traffic.numbers()["bytes_sent"] > wire.BODY_UNPROVEN


def test_a_peer_that_came_as_a_client_makes_room_for_one(full, connect):
    """Once it has shown what it is, its place is free."""
    node, clients = full
    clients[0].send(gossip_request(node))
    assert clients[0].read().status == 200
    assert connect(node).ask("GET", "/count").status == 200
    assert clients[0].ask("GET", "/count").status == 200


def test_a_peer_that_came_on_a_connection_in_reserve_may_be_silent(full, connect, monkeypatch):
    """It is not to need a place in the reserve again for every heartbeat."""
    monkeypatch.setattr(serving, "RESERVE_TIMEOUT_S", 0.05)
    node, _ = full
    peer = connect(node)
    peer.send(gossip_request(node))
    assert peer.read().status == 200
    assert not select.select([peer.socket], [], [], 0.3)[0]
    peer.send(gossip_request(node))
    assert peer.read().status == 200


def test_silent_clients_do_not_keep_a_peer_out(full, connect, monkeypatch):
    """Those beyond the limit who say nothing are soon hung up on, and make room."""
    monkeypatch.setattr(serving, "RESERVE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(serving, "RESERVE_MAX", 2)
    node, _clients = full
    silent = [connect(node) for _ in range(4)]

    def served():
        with contextlib.suppress(EOFError, ConnectionError):
            peer = connect(node)
            peer.send(gossip_request(node))
            return peer.read().status == 200

    wait_until(served)
    assert all(client.is_over() for client in silent)


def test_increments_that_race_are_all_counted(node, client, connect):
    """Every one gets an id and a count of its own, and the total is exact."""
    threads, times = 8, 150
    clients = [connect(node) for _ in range(threads)]
    start = threading.Barrier(threads)

    def increment(client):
        start.wait()
        return [client.ask("POST", "/increment/raced").json() for _ in range(times)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            answers = [answer for answered in pool.map(increment, clients) for answer in answered]
    finally:
        sys.setswitchinterval(before)
    assert sorted(answer["count"] for answer in answers) == list(range(1, threads * times + 1))
    assert len({answer["id"] for answer in answers}) == threads * times
    assert client.count("raced") == threads * times


# Stopping.


def test_a_request_in_flight_is_answered_when_the_node_stops(start_local, connect):
    """One that waits is released, its connection closes, and nobody can connect any more."""
    node = start_local()
    client = connect(node)
    client.send(request("GET", f"/count?timeout=60&after={NOBODYS_ID}"))
    wait_until_waiting(node)
    node.stop()
    assert "retry-after" in closes_with(client, 503).headers
    with pytest.raises(ConnectionRefusedError):
        connect(node)


def test_a_request_that_comes_while_the_node_stops_does_not_wait(start_local, connect, monkeypatch):
    """It is answered at once, like those that waited already."""
    node = start_local()
    client = connect(node)
    assert client.ask("GET", "/count").status == 200
    stop_waiting = node.counter.stop_waiting

    def stop_waiting_just_before():
        stop_waiting()
        client.send(request("GET", f"/count?timeout=60&after={NOBODYS_ID}"))

    monkeypatch.setattr(node.counter, "stop_waiting", stop_waiting_just_before)
    node.stop()
    closes_with(client, 503)


def test_connections_without_a_request_end_when_the_node_stops(start_local, connect):
    """There is nothing to answer, and nothing is waited for."""
    node = start_local()
    client = connect(node)
    assert client.ask("GET", "/count").status == 200
    node.stop()
    assert client.is_over()


@pytest.mark.parametrize("sent", [b"GET /count HTTP/1.1\r\nHo", request("POST", "/increment", "Content-Length: 9")])
def test_who_has_sent_half_a_request_is_told_that_the_node_stops(start_local, connect, sent):
    """It is not waited for, and without an answer nobody would know whether it was counted."""
    node = start_local()
    client = connect(node)
    assert client.ask("GET", "/count").status == 200
    client.send(sent)
    node.stop()
    assert "retry-after" in closes_with(client, 503).headers
    assert node.counter.value("default") == 0


# The command line.


def test_defaults():
    """Without arguments a node listens on loopback, alone, with the documented times and limits."""
    assert vars(parse_arguments([])).items() >= {
        "port": 8080, "host": "127.0.0.1", "advertise": None, "peers": (), "heartbeat_interval": 1.0,
        "peer_timeout": 5.0, "join_timeout": 10.0, "fanout": 8, "retry_backoff": 0.1, "retry_backoff_max": 10.0,
        "retry_workers": 4, "drain_timeout": 5.0, "max_connections": 512, "log_level": "info",
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--port", "0"], "port", 0),
        (["--port=65535"], "port", 65535),
        (["--host", "::1"], "host", "::1"),
        (["--advertise", "Example.org:080"], "advertise", "example.org:80"),
        (["--peers", "a:1"], "peers", ("a:1",)),
        (["--peers", "a:1, b:2,,[::1]:3,"], "peers", ("a:1", "b:2", "[::1]:3")),
        (["--peers", "a:1", "--peers", "b:2"], "peers", ("a:1", "b:2")),
        (["--peers", "[0:0:0:0:0:0:0:1]:3"], "peers", ("[::1]:3",)),
        (["--heartbeat-interval", "0.5"], "heartbeat_interval", 0.5),
        (["--heartbeat-interval", ".5"], "heartbeat_interval", 0.5),
        (["--peer-timeout", "1.001"], "peer_timeout", 1.001),
        (["--join-timeout", "0"], "join_timeout", 0),
        (["--drain-timeout", "0"], "drain_timeout", 0),
        (["--retry-backoff", "10"], "retry_backoff", 10),
        (["--max-connections", "1"], "max_connections", 1),
        (["--log-level", "debug"], "log_level", "debug"),
        (["--log-format", "json"], "log_format", "json"),
        (["--cors-origin", "*", "--cors-origin", "null"], "cors_origin", ("*", "null")),
        (["--cors-origin", "https://Example.org"], "cors_origin", ("https://example.org",)),
        (["--cors-origin", "http://[::1]:8080"], "cors_origin", ("http://[::1]:8080",)),
    ],
)
def test_an_argument_is_taken(arguments, field, value):
    """Addresses come in their normal spelling, and times as numbers of seconds."""
    assert getattr(parse_arguments(arguments), field) == value


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--port", "65536"], "--port"),
        (["--port", "-1"], "--port"),
        (["--port", "80a"], "--port"),
        (["--port", "8_0"], "--port"),
        (["--port", "٣"], "--port"),
        (["--port", ""], "--port"),
        (["--port", "9\n"], "--port"),
        (["--port"], "--port"),
        (["--host", "a..b"], "--host"),
        (["--host", "a" * 64], "--host"),
        (["--advertise", "example.org"], "--advertise"),
        (["--advertise", "::1:80"], "--advertise"),
        (["--advertise", "example.org:0"], "--advertise"),
        (["--peers", "a"], "--peers"),
        (["--peers", "a:1,b"], "--peers"),
        (["--peers", "a:1 b:2"], "--peers"),
        (["--peers", "http://a:1"], "--peers"),
        (["--peers", "[::z]:1"], "--peers"),
        (["--peers", "a:65536"], "--peers"),
        (["--heartbeat-interval", "0"], "--heartbeat-interval"),
        (["--heartbeat-interval", "nan"], "--heartbeat-interval"),
        (["--heartbeat-interval", "1e3"], "--heartbeat-interval"),
        (["--peer-timeout", "inf"], "--peer-timeout"),
        (["--peer-timeout", "1"], "--peer-timeout"),
        (["--peer-timeout", "2", "--heartbeat-interval", "3"], "--peer-timeout"),
        (["--join-timeout", "-1"], "--join-timeout"),
        (["--drain-timeout", "5s"], "--drain-timeout"),
        (["--fanout", "0"], "--fanout"),
        (["--retry-backoff", "0"], "--retry-backoff"),
        (["--retry-backoff-max", "0.05"], "--retry-backoff-max"),
        (["--retry-workers", "0"], "--retry-workers"),
        (["--retry-workers", "1.5"], "--retry-workers"),
        (["--max-connections", "0"], "--max-connections"),
        (["--cluster", "\udcff"], "--cluster"),  # as a byte that is no UTF-8 arrives
        (["--cors-origin", "example.org"], "--cors-origin"),
        (["--cors-origin", "https://example.org/"], "--cors-origin"),
        (["--cors-origin", "https://example.org:443"], "--cors-origin"),  # browsers do not send it
        (["--cors-origin", "http://a http://b"], "--cors-origin"),
        (["--cors-origin", ""], "--cors-origin"),
        (["--log-level", "loud\n"], "--log-level"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--heartbeat", "1"], "--heartbeat"),
        (["--version=1"], "--version"),
        (["8080"], "8080"),  # its port without --port
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, flag, capsys):
    """The line names the flag."""
    with pytest.raises(SystemExit) as exit:
        parse_arguments(arguments)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("counter_server.py: ")
    assert flag in err.replace(":", " ").split()


def test_help_tells_every_flag_and_its_default(capsys):
    """On standard output, with status 0."""
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--help"])
    assert not exit.value.code
    help = " ".join(capsys.readouterr().out.split())
    for flag in ("--port", "--host", "--advertise", "--peers", "--heartbeat-interval", "--peer-timeout",
                 "--join-timeout", "--fanout", "--retry-backoff", "--retry-backoff-max", "--retry-workers",
                 "--drain-timeout", "--max-connections", "--log-level", "--log-format", "--version"):  # fmt: skip
        assert f" {flag} " in help
    assert "(default: 8080)" in help
    for nothing in ("None", "[]", "b''", "False"):
        assert f"(default: {nothing})" not in help


def run(*arguments):
    command = [sys.executable, "counter_server.py", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=30, check=False)


def test_the_version_is_printed():
    """As name and number, with status 0."""
    ended = run("--version")
    assert (ended.returncode, ended.stdout) == (0, f"counter_server.py {counter_server.__version__}\n")


@pytest.mark.parametrize(("flag", "value"), [("--port", "x"), ("--peers", "nowhere"), ("--peer-timeout", "0.5")])
def test_a_node_with_a_bad_argument_does_not_start(flag, value):
    """The process ends with status 2 and one line that names the flag."""
    ended = run(flag, value)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert flag in ended.stderr


def test_a_node_whose_port_is_taken_does_not_start():
    """The process ends with status 1 and one line that names the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("--port", port)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert port in ended.stderr


def test_a_node_with_an_old_urllib3_does_not_start(monkeypatch, capsys):
    """As distributions ship it: all sending would fail.  One line says what is needed, with status 1."""
    monkeypatch.setattr(urllib3, "__version__", "1.26.18")
    monkeypatch.setattr(counter_server, "Node", None)  # would it go on, it would fail here
    assert counter_server.main(["--port", "0"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "urllib3 1.26.18" in err


def test_a_node_whose_host_is_no_name_does_not_start():
    """The process ends with an error and one line that names the host, also where it may listen anywhere."""
    ended = run("--port", "0", "--insecure", "--host", "a..b")
    assert ended.returncode in (1, 2)
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)
    assert "a..b" in ended.stderr

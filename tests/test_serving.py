"""Serving: connections byte by byte, many of them, and how they end."""

import contextlib
import errno
import io
import itertools
import logging
import random
import select
import socketserver
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from clients import NOBODYS_ID, Client, closes_with, gossip_request, problem, read_reply, request
from conftest import wait_until, wait_until_waiting

from api import BODY_MAX, action
from counter import Delta, http1, new_replica, serving, wire
from counter.config import parse_arguments
from counter.serving import CLIENT, RESERVE_MAX, Connection
from counter_server import Node


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
    Connection(sock, node.server, CLIENT).serve()
    stream, replies = io.BytesIO(sock.sent), []
    while stream.tell() < len(sock.sent):
        replies.append(read_reply(stream))
    return replies


def serving_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("connection-")}


@pytest.fixture(scope="module")
def node():
    """A node for the tests that leave it as it is, but for counters of their own."""
    node = Node(parse_arguments(["--port", "0"]))
    node.start()
    yield node
    node.stop()


@pytest.fixture
def client(node, connect):
    return connect(node)


@pytest.fixture(autouse=True)
def no_traceback(caplog):
    """No test may make a node log a traceback; one that means to clears the log."""
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.exc_info]


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


def test_time_is_over_though_more_is_there(node, monkeypatch):
    """However fast it trickles in: between two bytes a node need not have waited at all."""
    monkeypatch.setattr(serving, "HEAD_TIMEOUT_S", 0.01)
    connection = Connection(NeverEnding(), node.server, CLIENT)
    connection._reader.feed(b"GET / HTTP/1.1\r\nX: ")
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


class Sink:
    """Takes a body as it arrives, and notes what it was fed."""

    def __init__(self, refuses=b"\0"):
        self.fed, self.refuses = [], refuses

    def feed(self, data):
        self.fed.append(data)
        if self.refuses in data:
            raise http1.Refused(400, "not this")


@pytest.fixture
def sinks(node, monkeypatch):
    """Give POST /increment/sink a Sink instead of a body; return those of all requests.  The answer has its size."""
    made, api = [], node.server.api

    def body_sink(head):
        made.append(Sink())
        return made[-1] if head.path == "/increment/sink" else None

    def action(head):
        return lambda body, _connection: http1.ok(f"{type(body).__name__} {sum(map(len, body.fed))}\n")

    monkeypatch.setattr(api, "body_max", lambda head: 2**20)
    monkeypatch.setattr(api, "body_sink", body_sink)
    monkeypatch.setattr(api, "action", action)
    return made


def test_a_sink_is_fed_the_body_as_it_arrives(client, sinks):
    """It stands for the body in the action, and the next request begins where the body ends."""
    for body in (b"", b"abc", b"x" * 200_000):
        client.send(request("POST", "/increment/sink", body=body))
        client.send(request("POST", "/increment/sink"))
        assert client.read().body == b"Sink %d\n" % len(body)
        assert client.read().body == b"Sink 0\n"
    assert [b"".join(sink.fed) for sink in sinks[::2]] == [b"", b"abc", b"x" * 200_000]
    assert all(len(piece) <= serving.RECEIVE_SIZE for sink in sinks for piece in sink.fed)


def test_a_sink_is_fed_before_the_body_is_whole(client, sinks):
    """What has arrived need not be kept until the rest has."""
    client.send(request("POST", "/increment/sink", "Content-Length: 6") + b"abc")
    wait_until(lambda: sinks and b"".join(sinks[0].fed) == b"abc")
    client.send(b"def")
    assert client.read().body == b"Sink 6\n"


def test_what_a_sink_refuses_is_refused_at_once(client, sinks):
    """The rest of the body is not waited for, and is not taken for a request."""
    client.send(request("POST", "/increment/sink", "Content-Length: 60") + b"\0")
    closes_with(client, 400)


def test_a_body_for_a_sink_may_take_long_while_it_goes_on(client, sinks, monkeypatch):
    """What ends it is a pause, not the time that it takes in all."""
    monkeypatch.setattr(serving, "BODY_TIMEOUT_S", 0.01)
    monkeypatch.setattr(serving, "PROGRESS_TIMEOUT_S", 5.0)
    client.send(request("POST", "/increment/sink", "Content-Length: 10"))
    for number in range(10):
        client.send(b"x")
        wait_until(lambda: sinks and sum(map(len, sinks[0].fed)) > number)  # noqa: B023
    assert client.read().body == b"Sink 10\n"
    monkeypatch.setattr(serving, "PROGRESS_TIMEOUT_S", 0.05)
    client.send(request("POST", "/increment/sink", "Content-Length: 10") + b"x")
    closes_with(client, 408)


def answering(monkeypatch, node, respond):
    """Have the node answer everything with what respond(body, connection) returns."""
    monkeypatch.setattr(node.server.api, "action", lambda head: respond)


@pytest.mark.parametrize("lines", [[], ["Connection: close"]])
def test_an_action_may_answer_in_pieces(client, node, monkeypatch, lines):
    """They arrive as one response, time and again on one connection; HEAD gets the head alone."""
    pieces = [http1.response(200, b"x" * 300_001)[:-300_001], *[b"x" * 100_000] * 3, b"x"]
    answering(monkeypatch, node, lambda *_: (piece for piece in pieces))
    for _ in range(1 if lines else 3):
        reply = client.ask("GET", "/count", *lines)
        assert (reply.status, reply.body) == (200, b"x" * 300_001)
        assert reply.headers.get("connection") == ("close" if lines else None)
        assert lines or client.ask("HEAD", "/count").headers["content-length"] == "300001"
    assert not lines or client.is_over()


def test_a_page_of_an_allowed_site_may_get_an_answer_in_pieces(start_local, connect, monkeypatch):
    """The headers that allow it are in the first piece."""
    node = start_local("--cors-origin", "https://a.example")
    in_pieces = action()(lambda *_: iter([http1.response(200, b"a"), b""]))
    monkeypatch.setattr(node.server.api._router, "action", lambda head: in_pieces)
    reply = connect(node).ask("GET", "/count", "Origin: https://a.example")
    assert (reply.headers["access-control-allow-origin"], reply.body) == ("https://a.example", b"a")


def test_a_bug_within_an_answer_in_pieces_ends_the_connection(client, node, monkeypatch, caplog):
    """The client sees that the response is not whole; no second response is put into it."""

    def pieces():
        yield http1.response(200, b"xyz")[:-2]
        raise ZeroDivisionError

    answering(monkeypatch, node, lambda *_: pieces())
    client.send(request("GET", "/count"))
    assert client.stream.read().endswith(b"\r\n\r\nx")
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
    caplog.clear()


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

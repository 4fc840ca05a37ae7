"""Serving: connections byte by byte, many of them, and how they end."""

import errno
import itertools
import logging
import random
import select
import socket
import socketserver
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from clients import NOBODYS_ID, Client, closes_with, gossip_request, next_id, problem, request
from conftest import wait_until, wait_until_waiting

import api
from api import BODY_MAX, action
from counter import Delta, connections, http1, lanes, new_replica, places, poller, wire
from counter.lanes import SLOW, WAITS
from counter.places import CLIENT, PEER
from counter.serving import SLOW_THREADS
from counter.signing import HEADER, PATH

pytestmark = pytest.mark.usefixtures("no_traceback")


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


def test_a_request_may_come_after_an_empty_line(client):
    """Some clients end a body with one that is not part of it."""
    client.send(b"\r\n" + request("POST", "/increment/empty-line", body=b"{}") + b"\r\n")
    assert client.ask("POST", "/increment/empty-line").json()["count"] == 1
    assert client.read().json()["count"] == 2


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
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.1)
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


def test_a_tls_hello_is_answered_at_once(client):
    """As curl https://… sends it to the plain port: it need not wait until a head has taken too long."""
    client.send(bytes.fromhex("1603010200010001fc0303"))
    assert "TLS" in problem(client.read(), 400)


def test_a_body_that_is_too_large_is_refused_and_the_answer_can_be_read(client, monkeypatch):
    """A client that first sends all of it is listened to until then."""
    monkeypatch.setattr(connections, "LINGER_S", 15.0)
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
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.2)
    client.send(b"GET /count HTTP/1.1\r\nX: ")

    def answered():
        client.send(b"x")
        return select.select([client.socket], [], [], 0)[0]

    wait_until(answered)
    problem(client.read(), 408)


@pytest.mark.parametrize("requests", [0, 1])
def test_an_idle_connection_is_closed(node, connect, monkeypatch, requests):
    """Without a word, before its first request or after one."""
    monkeypatch.setattr(connections, "IDLE_TIMEOUT_S", 0.1)
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
def test_a_client_may_hang_up_at_any_time(start_local, connect, sent, hang_up):
    """Its connection ends, nobody else notices, and the log stays quiet."""
    node = start_local()
    client = connect(node)
    client.send(sent)
    wait_until(lambda: any(node.server.connections().values()))
    hang_up(client)
    wait_until(lambda: not any(node.server.connections().values()))
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
    made = []

    def body_sink(head):
        made.append(Sink())
        return made[-1] if head.path == "/increment/sink" else None

    def answer(_head):
        return action(SLOW)(lambda body, _: http1.ok(f"{type(body).__name__} {sum(map(len, body.fed))}\n"))

    monkeypatch.setattr(node.api, "body_max", lambda head: 2**20)
    monkeypatch.setattr(node.api, "body_sink", body_sink)
    monkeypatch.setattr(node.api, "action", answer)
    return made


def test_a_sink_is_fed_the_body_as_it_arrives(client, sinks):
    """It stands for the body in the action, and the next request begins where the body ends."""
    for body in (b"", b"abc", b"x" * 200_000):
        client.send(request("POST", "/increment/sink", body=body))
        client.send(request("POST", "/increment/sink"))
        assert client.read().body == b"Sink %d\n" % len(body)
        assert client.read().body == b"Sink 0\n"
    assert [b"".join(sink.fed) for sink in sinks[::2]] == [b"", b"abc", b"x" * 200_000]
    assert all(len(piece) <= connections.BODY_RECEIVE_SIZE for sink in sinks for piece in sink.fed)


def test_a_sink_is_fed_before_the_body_is_whole(client, sinks):
    """What has arrived need not be kept until the rest has."""
    client.send(request("POST", "/increment/sink", "Content-Length: 6") + b"abc")
    wait_until(lambda: sinks and b"".join(sinks[0].fed) == b"abc")
    client.send(b"def")
    assert client.read().body == b"Sink 6\n"


def answering(monkeypatch, node, respond):
    """Have the node answer everything with what respond(body, connection) returns."""
    monkeypatch.setattr(node.api, "action", lambda head: action(SLOW)(respond))


@pytest.mark.parametrize("lines", [[], ["Connection: close"]])
def test_an_action_may_answer_in_pieces(client, node, monkeypatch, lines):
    """They arrive as one response, time and again on one connection; HEAD gets the head alone."""
    pieces = [http1.response(200, b"x" * 300_001)[:-300_001], *[b"x" * 100_000] * 3, b"x"]
    answering(monkeypatch, node, lambda *_: (piece for piece in pieces))
    for _ in range(1 if lines else 3):
        reply = client.ask("GET", "/anything", *lines)
        assert (reply.status, reply.body) == (200, b"x" * 300_001)
        assert reply.headers.get("connection") == ("close" if lines else None)
        assert lines or client.ask("HEAD", "/anything").headers["content-length"] == "300001"
    assert not lines or client.is_over()


def test_a_page_of_an_allowed_site_may_get_an_answer_in_pieces(start_local, connect, monkeypatch):
    """The headers that allow it are in the first piece."""
    node = start_local("--cors-origin", "https://a.example")
    in_pieces = action()(lambda *_: iter([http1.response(200, b"a"), b""]))
    monkeypatch.setattr(node.api._router, "action", lambda head: in_pieces)
    reply = connect(node).ask("GET", "/count", "Origin: https://a.example")
    assert (reply.headers["access-control-allow-origin"], reply.body) == ("https://a.example", b"a")


def test_the_kernel_keeps_little_of_an_answer(client, node, monkeypatch):
    """Or what a slow link has yet to carry would look as sent, and a peer at its other end as silent."""
    made = []
    pieces = (made.append(piece) or piece for piece in [http1.response(200, b"x")[:-1], *[b"x" * 40_000] * 100])
    answering(monkeypatch, node, lambda *_: pieces)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send(request("GET", "/anything"))
    wait_until(lambda: node.server._poller._held)  # now the connection takes no more
    assert sum(map(len, made)) < 800_000


def test_a_bug_within_an_answer_in_pieces_ends_the_connection(client, node, monkeypatch, caplog):
    """The client sees that the response is not whole; no second response is put into it."""

    def pieces():
        yield http1.response(200, b"xyz")[:-2]
        raise ZeroDivisionError

    answering(monkeypatch, node, lambda *_: pieces())
    client.send(request("GET", "/anything"))
    assert client.stream.read().endswith(b"\r\n\r\nx")
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
    caplog.clear()


# Many connections.


@pytest.fixture
def full(start_local, connect, monkeypatch):
    """A node whose two places for clients are taken, by clients that do not have to give way."""
    monkeypatch.setattr(places, "IDLE_LEAST_S", 1000.0)
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
    assert watcher.ask("GET", path).status == 200
    assert watcher.ask("GET", path).status == 200
    watcher.send(request("GET", "/count"))
    closes_with(watcher, 503)


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
        assert wire.decode([reply.body]).confirms == {replica: sequence}
    assert clients[0].count("default") == 60
    third = connect(node)
    third.send(request("GET", "/count"))
    closes_with(third, 503)


def test_a_long_message_is_not_read_unless_its_first_line_is_signed(client, connect, node):
    """Or anybody could fill the memory."""
    for line in (b"x" * 70_000, b"{}\n"):
        stranger = connect(node)
        stranger.send(request("POST", PATH, "Content-Length: 1000000", f"{HEADER}: {'0' * 64}") + line)
        closes_with(stranger, 401)
    totals = {f"{'x' * 50}{number}": (number, 1) for number in range(1, 2001)}
    client.send(message := gossip_request(node, Delta(new_replica(), 0, 2000, totals)))
    assert message.count(b"\n") > 20
    assert client.read().status == 200
    assert client.count("x" * 50 + "2000") == 1


def test_a_node_that_nobody_can_dial_hands_over_all_it_counted(start_local):
    """With its own requests, however long."""
    node = start_local()
    sender = start_local("--peers", f"127.0.0.1:{node.port}", "--advertise", "127.0.0.1:1")
    for number in range(2000):
        sender.counter.increment(f"{'x' * 50}{number}")
    sender.replicator.wake()
    wait_until(lambda: node.counter.vector() == sender.counter.vector())


def test_a_peer_that_came_as_a_client_makes_room_for_one(full, connect):
    """Once it has shown what it is, its place is free."""
    node, clients = full
    clients[0].send(gossip_request(node))
    assert clients[0].read().status == 200
    wait_until(lambda: node.server.connections()[CLIENT] == 1)
    assert connect(node).ask("GET", "/count").status == 200
    assert clients[0].ask("GET", "/count").status == 200


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


def test_the_client_that_is_idle_for_longest_gives_way(full, connect, monkeypatch):
    """So an active one gets a place; the one that was hung up on finds its connection closed, without a word."""
    monkeypatch.setattr(places, "IDLE_LEAST_S", 0.0)
    node, (first, second) = full
    assert first.ask("GET", "/count").status == 200
    assert connect(node).ask("GET", "/count").status == 200
    assert second.is_over()
    assert first.ask("GET", "/count").status == 200
    assert node.server.connections()[CLIENT] == 2


def test_silent_connections_keep_nobody_out(start_local, connect):
    """Clients, peers and who watches are served, however many there are that say nothing or next to nothing."""
    node = start_local("--max-connections", "20")
    client = connect(node)
    assert client.ask("GET", "/count").status == 200
    silent = []
    for number in range(100):
        silent.append(connect(node))
        if number % 2:
            silent[-1].send(b"GET")
        if number % 20 == 0:
            assert connect(node).ask("POST", "/increment").status == 200
            assert connect(node).ask("GET", "/healthz").status == 200
            peer = connect(node)
            peer.send(gossip_request(node))
            assert peer.read().status == 200
    assert client.ask("GET", "/count").json()["count"] == 5
    wait_until(lambda: sum(node.server.connections().values()) <= 20 + places.guests_for(20) + 5)
    assert silent[0].is_over()


def test_connections_of_peers_are_bounded_by_the_peers_there_are(start_local, connect, monkeypatch):
    """Whoever sends a message again and again on new connections closes the oldest of them."""
    node = start_local()
    monkeypatch.setattr(api, "CONNECTIONS_PER_PEER", 0)
    monkeypatch.setattr(api, "PEERS_SPARE", 3)
    peers = []
    for _ in range(6):
        peers.append(connect(node))
        peers[-1].send(gossip_request(node))
        assert peers[-1].read().status == 200
    wait_until(lambda: node.server.connections()[PEER] == 3)
    assert all(peer.is_over() for peer in peers[:3])
    peers[3].send(gossip_request(node))
    assert peers[3].read().status == 200


def test_there_may_be_connections_for_each_known_peer(start_local):
    """And some for peers to come."""
    node = start_local()
    spare = node.api.peers_max()
    other = start_local("--peers", f"127.0.0.1:{node.port}")
    wait_until(lambda: other.table.active() and node.api.peers_max() > spare >= 16)


# Threads.


def test_idle_and_busy_clients_take_no_threads(node, connect):
    """One serves them all."""
    clients = [connect(node) for _ in range(50)]
    threads = threading.active_count()
    for _ in range(3):
        for client in clients:
            client.send(request("POST", "/increment/threads"))
        for client in clients:
            assert client.read().status == 200
    assert threading.active_count() <= threads


def test_who_waits_holds_up_nobody(node, connect):
    """Not even many of them."""
    waiting = [connect(node) for _ in range(20)]
    for client in waiting:
        client.send(request("GET", f"/count?timeout=60&after={next_id(node)}"))
    wait_until(lambda: len(node.counter._waiters) == 20)
    assert connect(node).ask("POST", "/increment").status == 200
    assert all(client.read().status == 200 for client in waiting)


def test_a_connection_whose_first_request_waits_goes_on(start_local, connect, monkeypatch):
    """The poller listens for nothing on it yet, and must not wait for its next tick to hear that it is answered."""
    monkeypatch.setattr(poller, "TICK_S", 60.0)
    client = connect(start_local())
    for count in (1, 2):
        assert client.ask("POST", "/increment?acks=1").json()["count"] == count


def test_only_so_many_may_wait(start_local, connect):
    """The next is told so at once; what need not wait is served, and so is the next once one is through."""
    node = start_local("--max-waiting", "2")
    waiting, client = [connect(node), connect(node)], connect(node)
    for one in waiting:
        one.send(request("GET", f"/count?timeout=60&after={next_id(node)}"))
    wait_until(lambda: len(node.counter._waiters) == 2)
    refused = client.ask("POST", "/increment?acks=1")
    assert "--max-waiting" in problem(refused, 503)
    assert "retry-after" in refused.headers
    assert client.ask("POST", "/increment").json()["count"] == 1
    assert all(one.read().status == 200 for one in waiting)
    wait_until(lambda: client.ask("POST", "/increment?acks=1").status == 200)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_without_threads_a_node_serves_what_needs_none_and_recovers(start_local, connect, monkeypatch, error):
    """As many clients as before; what waits is told, and served once there are threads again."""
    node = start_local()

    def start_new_thread(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(lanes._thread, "start_new_thread", start_new_thread)
        clients = [connect(node) for _ in range(50)]
        assert all(client.ask("POST", "/increment").status == 200 for client in clients)
        problem(clients[0].ask("POST", "/increment?acks=1"), 503)
        assert clients[0].ask("GET", "/peers").status == 200  # of such threads there is always one
        assert connect(node).ask("GET", "/metrics").status == 200
    assert clients[0].ask("POST", "/increment?acks=1").json()["count"] == 51
    assert all(client.ask("GET", "/count").status == 200 for client in clients)


def test_a_thread_that_dies_as_it_starts_holds_up_nobody(start_local, connect, monkeypatch):
    """For lack of memory it may never come to life; its job is done by the next."""
    monkeypatch.setattr(lanes, "START_TIMEOUT_S", 0.1)
    node, client = start_local(), connect(start_local())
    client = connect(node)
    with monkeypatch.context() as patch:
        patch.setattr(lanes._thread, "start_new_thread", lambda *_: None)
        client.send(request("POST", "/increment?acks=1"))
        wait_until(lambda: node.server._lanes[WAITS]._jobs)
        assert connect(node).ask("POST", "/increment").status == 200
    assert client.read().json()["count"] == 2


def test_without_memory_for_a_connection_the_next_is_served(start_local, connect, monkeypatch, caplog):
    """The one is closed; it is a line in the log, not a traceback each."""
    node, tries = start_local(), itertools.count()
    reader = http1.RequestReader

    def read_later():
        if next(tries) < 3:
            raise MemoryError
        return reader()

    monkeypatch.setattr(connections.http1, "RequestReader", read_later)
    assert all(connect(node).is_over() for _ in range(3))
    assert connect(node).ask("GET", "/count").status == 200
    assert [record.getMessage() for record in caplog.records] == ["no memory to serve connections"]


def test_without_any_memory_what_is_half_way_ends_and_the_rest_goes_on(start_local, connect, monkeypatch, caplog):
    """Where not even events can be listed, something has to be let go, or it would stay so."""
    node = start_local()
    client, half = connect(node), connect(node)
    assert client.ask("GET", "/count").status == 200
    half.send(b"GET /count HTTP/1.1\r\nX: ")
    events, tries = node.server._poller._events, itertools.count()
    wait_until(lambda: node.server._poller._held)
    wait = events.wait

    def wait_later(timeout):
        if next(tries) < 3:
            raise MemoryError
        return wait(timeout)

    monkeypatch.setattr(events, "wait", wait_later)
    node.server._poller.call(lambda _now: None)
    assert half.is_over()
    assert client.ask("POST", "/increment").status == 200
    assert connect(node).ask("GET", "/count").status == 200
    assert [record.getMessage() for record in caplog.records] == ["no memory to serve connections"]


def test_new_connections_do_not_keep_the_others_waiting(node, client):
    """However fast they come: here, for ever."""
    poller, over = node.server._poller, threading.Event()

    def call_again(_now):
        if not over.is_set():
            poller.call(call_again)

    call_again(0.0)
    try:
        assert [client.ask("POST", "/increment/kept").status for _ in range(5)] == [200] * 5
    finally:
        over.set()


def test_an_action_that_is_slow_holds_up_nobody(start_local, connect, monkeypatch):
    """Not another slow one, until as many threads are taken as there are for those."""
    node, over = start_local(), threading.Event()
    monkeypatch.setattr(node.gossip, "unconfirmed", lambda: over.wait() and {})  # which /peers asks for
    slow = [connect(node) for _ in range(SLOW_THREADS - 1)]
    for client in slow:
        client.send(request("GET", "/peers"))
    assert connect(node).ask("GET", "/counts").status == 200
    assert connect(node).ask("POST", "/increment").status == 200
    over.set()
    assert all(client.read().status == 200 for client in slow)


# Stopping.


def test_who_has_connected_is_answered_when_the_node_stops(start_local, connect, monkeypatch):
    """Also where the connection has not been accepted yet: closing the listener would reset it."""
    node, accept, goes_on = start_local(), socketserver.TCPServer.get_request, threading.Event()

    def accept_later(server):
        goes_on.wait()
        return accept(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", accept_later)
    clients = [connect(node) for _ in range(50)]
    for client in clients[:-1]:
        client.send(request("POST", "/increment"))
    stopping = threading.Thread(target=node.stop)
    stopping.start()
    wait_until(node.server._stopped.is_set)
    goes_on.set()
    stopping.join()
    assert all("retry-after" in closes_with(client, 503).headers for client in clients[:-1])
    assert clients[-1].is_over()
    assert node.counter.value("default") == 0


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

"""The pool of threads that send, against peers that answer this and that."""

import contextlib
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import wait_until
from halves import AT_A, AT_B, ME, A, Half, answer, introduction

from counter import Delta
from counter.links import DOUBTFUL_MAX
from counter.signing import HEADER, Opener, Signer, seal
from counter.transport import _Socket
from counter.wire import decode, encode
from replication import Replicator

SIGNER = Signer((), "counter")


class Peer(ThreadingHTTPServer):
    """A peer that answers what `reply` returns for a message: (status, a Message or bytes, headers)."""

    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.messages = reply, []
        super().__init__(("127.0.0.1", 0), PeerHandler)
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass  # the node hung up on an answer that never ended


class PeerHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        chain = SIGNER.request()
        opener = Opener(chain, self.headers[HEADER])
        lines = opener.feed(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.messages.append(decode([*lines, opener.finish()]))
        status, answer, headers = self.server.reply(self.server.messages[-1])
        signature, pieces = seal(chain.answer(), [answer] if type(answer) is bytes else encode(answer))
        body = b"".join(pieces)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), HEADER: signature, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def pool():
    """Start a Replicator for a Half and Peers by the replies they give; all end with the test."""
    ending = []

    def start(*replies, workers=2):
        node, peers = Half(doubtful_max=DOUBTFUL_MAX), [Peer(reply) for reply in replies]
        for peer in peers:
            thread = threading.Thread(target=peer.serve_forever, args=(0.01,))
            thread.start()
            ending.append(lambda peer=peer, thread=thread: (peer.shutdown(), peer.server_close(), thread.join()))
        replicator = Replicator(
            node.gossip, node.links, node.table, SIGNER, 80, workers + DOUBTFUL_MAX, peer_timeout_s=2.0
        )
        replicator.start()
        ending.insert(0, lambda: replicator.stop(20))
        return node, replicator, peers

    yield start
    for end in ending:
        assert end() is not False


def good(message):
    """Answer as a peer that holds all it is sent, once it was asked who it is."""
    if message.to is None:
        return 200, introduction(address=None), {}
    confirms = {delta.replica: delta.through for delta in message.deltas}
    return 200, answer(message.applied, address=None, confirms=confirms or None), {}


def test_the_pool_delivers_increments(pool):
    node, replicator, (peer,) = pool(good)
    replicator.contact([peer.address], [])
    wait_until(lambda: A in node.gossip.unconfirmed())  # it has said what it holds
    node.counter.increment("x", 3)
    replicator.wake()
    wait_until(lambda: peer.messages[-1].deltas == [Delta(ME, 0, 1, {"x": (1, 3)})])
    wait_until(lambda: node.gossip.unconfirmed()[A] == 0)


def test_the_pool_looks_up_the_names_of_seeds(pool):
    node, replicator, (peer,) = pool(good)
    replicator.contact([], [f"localhost:{peer.server_address[1]}"])
    wait_until(node.table.active)


@pytest.mark.parametrize(
    "reply",
    [
        lambda message: (503, b"", {"Retry-After": "3600"}),
        lambda message: (500, b"x" * 1000, {}),
        lambda message: (302, b"", {"Location": "http://127.0.0.1:1/"}),
        lambda message: (200, b"", {}),
        lambda message: (200, b"{}", {}),
        lambda message: (200, answer(address=None), {}),
        lambda message: (200, b"not gossip", {"Content-Encoding": "gzip"}),
        lambda message: (200, b"{}", {"Content-Length": "999"}),
        lambda message: (*good(message)[:2], {HEADER: "0" * 64}),
    ],
)
def test_a_peer_that_answers_nonsense_is_tried_again_and_harms_nobody(pool, reply, caplog):
    caplog.set_level(logging.INFO)
    node, replicator, (bad, peer) = pool(reply, good)
    replicator.contact([bad.address, peer.address], [])
    wait_until(node.table.active)

    def contact_until(condition):
        wait_until(lambda: replicator.contact([bad.address], []) or condition())

    contact_until(lambda: len(bad.messages) >= 2)
    bad.reply = good
    contact_until(lambda: f"recovered: addr={bad.address}" in caplog.text)
    assert "Traceback" not in caplog.text


def test_the_head_of_a_message_is_sent_with_the_beginning_of_its_body(pool, monkeypatch):
    """Each by itself would wake the peer once more."""
    pieces, send = [], _Socket.sendall
    monkeypatch.setattr(_Socket, "sendall", lambda sock, data: (pieces.append(data), send(sock, data)))
    node, replicator, (peer,) = pool(good)
    replicator.contact([peer.address], [])
    wait_until(node.table.active)
    assert pieces
    assert all(piece.startswith(b"POST ") and b'\r\n\r\n{"v":' in piece for piece in pieces)


def test_a_send_wakes_no_other_worker_unless_there_is_something_for_it():
    """Each that wakes costs as much as a part of the send."""
    node = Half()
    links, taken = node.links, []
    link = node.meet()
    links.push_to([AT_A], 0.0)

    def work():
        taken.append(links.next_link(lambda: 9.0))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    wait_until(lambda: links._watched and len(links._idle._waiters) == 2)
    node.counter.increment("x")
    links.wake()
    wait_until(lambda: taken == [link])
    assert len(links._idle._waiters) == 2
    links.send_heartbeats([AT_B], [], 9.0)
    wait_until(lambda: len(taken) == 2)
    assert taken[1].address == AT_B
    links.close()
    for worker in workers:
        worker.join(10)
    assert taken[2] is None


def test_the_log_says_in_words_why_sending_failed(pool, caplog):
    """Without what requests wraps around it: it is read by operators."""
    caplog.set_level(logging.INFO)
    _, replicator, (peer,) = pool(lambda message: 1 / 0)  # which hangs up without an answer
    replicator.contact([peer.address], [])
    said = f"no answer yet: addr={peer.address} error=Remote end closed connection without response"
    wait_until(lambda: said in [record.getMessage() for record in caplog.records])


@pytest.fixture
def tarpit():
    """Start servers that accept whatever connects and then trickle the head of an answer, for ever."""
    over, threads, listeners = threading.Event(), [], []

    def trickle(listener):
        with contextlib.suppress(OSError), listener.accept()[0] as connection:  # it may be hung up on
            while not over.wait(0.1):
                connection.send(b"H")

    def start():
        listeners.append(socket.create_server(("127.0.0.1", 0)))
        threads.append(threading.Thread(target=trickle, args=listeners[-1:]))
        threads[-1].start()
        return f"127.0.0.1:{listeners[-1].getsockname()[1]}"

    yield start
    over.set()
    for thread, listener in zip(threads, listeners, strict=True):
        thread.join()
        listener.close()


def test_addresses_that_never_finish_an_answer_delay_nobody(pool, tarpit):
    """Where four of five are such, the fifth is joined through, and gets increments, as if they were not there."""
    node, replicator, (peer,) = pool(good)
    replicator.contact([*(tarpit() for _ in range(4)), peer.address], [])
    wait_until(node.table.active)
    node.counter.increment("x")
    replicator.wake()
    wait_until(lambda: node.gossip.unconfirmed().get(A) == 0)


def test_an_increment_wakes_a_worker_where_none_looks_by_itself(pool):
    """Once all peers have confirmed all; not for each increment while a push is under way."""
    answering = threading.Event()
    answering.set()

    def slow(message):
        answering.wait(30)
        return good(message)

    node, replicator, (peer,) = pool(slow)
    replicator.contact([peer.address], [])
    wait_until(lambda: node.links.asleep)
    answering.clear()
    node.counter.increment("x")
    replicator.wake()
    try:
        wait_until(lambda: peer.messages[-1].deltas)
        node.counter.increment("x")
        wait_until(lambda: not node.links.asleep)
        replicator.wake()
    finally:
        answering.set()
    wait_until(lambda: node.gossip.unconfirmed()[A] == 0)
    assert sum(delta.through for message in peer.messages for delta in message.deltas) == 1 + 2
    wait_until(lambda: node.links.asleep)


def test_a_worker_survives_a_bug(pool, monkeypatch, caplog):
    node, replicator, (peer,) = pool(good, workers=1)
    monkeypatch.setattr(node.gossip, "request", lambda link, now: 1 / 0)
    replicator.contact([peer.address], [])
    wait_until(lambda: "ZeroDivisionError" in caplog.text)
    monkeypatch.undo()
    replicator.contact([peer.address], [])
    wait_until(node.table.active)

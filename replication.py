"""Getting what one node counts to all others: sending messages, and receiving them.

    Replicator.wake()  an increment was accepted ──▶ Gossip: which peers are due
    Heartbeat          whom to contact           ──▶        │ next_link()
                                                            ▼
    a worker thread    Gossip.request() ─▶ POST /internal/gossip ─▶ Replicator.receive() at the other node
                       answered() or failed()  ◀─── its answer ───  Gossip.receive()

Gossip decides and is pure: it knows neither sockets nor threads, and what depends on time takes
`now`.  Replicator is the retry worker pool around it, sending through requests sessions.

There is no queue of increments.  What a peer still needs is the difference between what is
applied here and what that peer last confirmed, however long it was away; a message that is
lost, repeated or late does no harm.  A node pushes at once what it accepted itself.  What it
has from others it offers with the heartbeats, in which two nodes compare their vectors.
"""

import itertools
import logging
import socket
import threading
import time
from collections import OrderedDict, namedtuple

from counter.addresses import join_address, split_address
from counter.http1 import Refused
from counter.links import PeerRefuses
from counter.signing import HEADER, PATH, Opener, WrongSignature, seal, sealed_size
from counter.transport import FAILURES, Session, TlsSession
from counter.wire import Decoder, encode

log = logging.getLogger("counter.replication")

CONNECT_TIMEOUT_S = 1.0
REFUSALS = (400, 401, 403)  # what a node answers to messages that it will never take
PATIENCE_DOUBLINGS = 3  # how often the time an answer may take doubles with further failures
PROGRESS_TIMEOUT_S = 10.0  # between two parts of a long message, however long it takes in all
MERGED_PER_S = 10_000_000  # bytes of a long message that a peer takes in, at least
REFUSALS_MAX = 256  # that are remembered, so that each is logged once

# What to send in answer to a message: `body` is bytes, or an iterator of pieces where it is long;
# `taken` says whether the message was for this process, and new.
Reply = namedtuple("Reply", "body signature taken")


class Traffic:
    """How much was said to peers and heard from them since the start.  Threads may call anything."""

    def __init__(self):
        self._lock = threading.Lock()  # guards the numbers
        self._numbers = dict.fromkeys(
            ("messages", "messages_failed", "messages_refused", "retries", "deltas", "deltas_failed",
             "bytes_sent", "bytes_received"), 0
        )  # fmt: skip

    def add(self, **numbers):
        with self._lock:
            for name, number in numbers.items():
                self._numbers[name] += number

    def numbers(self):
        with self._lock:
            return dict(self._numbers)


class Incoming:
    """A message that a peer sends to this node: takes its bytes as they arrive."""

    def __init__(self, chain, signature, on_part):
        """`on_part(head)` is called with each part of a long message, whose first line says `head`, a Message."""
        self.chain, self.size = chain, 0
        self._opener, self._decoder, self._on_part, self._head = Opener(chain, signature), Decoder(), on_part, None

    def take(self, data):
        """Take some more of it; raises WrongSignature, ValueError, and Refused if it is not to be taken."""
        self.size += len(data)
        for line in self._opener.feed(data):
            self._decoder.feed(line)
        if self._decoder.is_long:
            self._head = self._head or self._decoder.head()
            self._on_part(self._head)

    def feed(self, data):
        """Take some more of it; raises Refused as soon as it shows that it is not to be taken."""
        try:
            self.take(data)
        except WrongSignature:
            raise _wrong_signature() from None
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def finish(self):
        """Return the whole Message; raises WrongSignature and ValueError."""
        self._decoder.feed(self._opener.finish())
        return self._decoder.finish()


def _wrong_signature():
    challenge = [("WWW-Authenticate", HEADER)]
    return Refused(401, "the signature is wrong: another --cluster or --secret-file?", challenge)


class Replicator:
    """Sends what Gossip says, and hands it what others send.

    Sending is done by the retry worker pool: threads, each of which sends to one peer at a time.
    Receiving is done in the thread that calls, which may be any.
    """

    def __init__(
        self, gossip, links, table, signer, port, workers, peer_timeout_s, certificates=None, clock=time.monotonic
    ):
        """`certificates` are for connections over TLS; None: plain ones."""
        self._gossip, self._links, self._table = gossip, links, table
        self._signer, self._port, self._clock = signer, port, clock
        self._certificates = certificates
        self._found = {}  # address of a seed -> (its host, the addresses that this led to); replaced one by one
        self.traffic = Traffic()
        self._lock = threading.Lock()  # guards the next
        self._refusals = OrderedDict()  # (host, reason), each logged once, the latest last
        # A peer that is stopped still accepts connections.  It is to hold a worker for less
        # than the time in which it is given up.
        self._read_timeout_s = max(1.0, peer_timeout_s / 2)
        self._threads = [
            threading.Thread(target=self._work, name=f"retry-worker-{number}", daemon=True) for number in range(workers)
        ]

    def start(self):
        for thread in self._threads:
            thread.start()

    def wake(self):
        """Send on what was just counted."""
        if self._links.asleep:  # under load a push is on its way already: one attribute read
            self._links.wake()

    def contact(self, addresses, seeds):
        """Send heartbeats to addresses and look up seeds: what a sweep asks for."""
        self._gossip.swept(addresses, seeds, self._clock())

    def incoming(self, signature):
        """Return an Incoming for a request with that signature."""
        return Incoming(self._signer.request(), signature, self._part_arrived)

    def _part_arrived(self, head):
        if not self._gossip.expects(head):
            raise Refused(409, "this message is for another process, or not new")
        self._gossip.progress(head.sender.id, self._clock())

    def receive(self, signature, body, local_host, remote_host):
        """Take in the message that has arrived, and return the Reply.

        `body` is bytes, or the Incoming that took them; `local_host()` is the address of this machine
        that it came to, `remote_host()` the one it came from.  Raises Refused unless it is a message of a
        node of this cluster; then nothing has changed.
        """
        try:
            incoming = body
            if type(body) is bytes:
                incoming = self.incoming(signature)
                incoming.take(body)
            message = incoming.finish()
        except WrongSignature:
            self._log_refusal(remote_host(), "the signature is wrong: another --cluster or --secret-file?")
            raise _wrong_signature() from None
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if message.sender.v == 0:
            self._log_refusal(remote_host(), "nodes before 1.1 and this one do not understand each other")
        reached_at = None if self._table.address else join_address(local_host(), self._port)
        answer = self._gossip.receive(message, self._clock(), reached_at)
        signature, body = _sealed(incoming.chain.answer(), answer)
        self.traffic.add(deltas=len(answer.deltas), bytes_received=incoming.size)
        if type(body) is bytes:
            self.traffic.add(bytes_sent=len(body))
        else:
            body = self._answering(message.sender.id, body)
        return Reply(body, signature, answer.number is None)

    def _answering(self, id, pieces):
        """Yield the pieces of a long answer: if the next is asked for, the one before got on."""
        for piece in pieces:
            self.traffic.add(bytes_sent=len(piece))
            yield piece
            self._gossip.progress(id, self._clock())

    def _log_refusal(self, host, reason):
        """Write that messages from a host are refused, once."""
        self.traffic.add(messages_refused=1)
        with self._lock:
            known = (host, reason) in self._refusals
            self._refusals[host, reason] = None
            if len(self._refusals) > REFUSALS_MAX:
                self._refusals.popitem(last=False)
        if not known:
            log.warning("messages refused: host=%s reason=%s", host, reason)

    def stop(self, timeout_s):
        """Ask the threads to end, wait for them, and return whether all did."""
        self._links.close()
        deadline = self._clock() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - self._clock()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self):
        while link := self._links.next_link(self._clock):
            try:
                if link.is_seed:
                    self._resolve(link)
                else:
                    self._exchange(link)
            except Exception as error:  # a worker that dies would end replication in silence
                log.exception("sending failed: addr=%s", link.address)
                self._links.failed(link, error, self._clock())

    def _resolve(self, link):
        """Look up the addresses of a seed, all of them, each time anew, and contact them."""
        host, port = split_address(link.address)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:  # ValueError: it cannot be a name at all
            self._links.failed(link, error, self._clock())
            return
        hosts = dict.fromkeys(info[4][0] for info in found)
        addresses = [join_address(host, port) for host in hosts if "%" not in host]
        self._found[link.address] = host, addresses
        self._links.send_heartbeats(self._table.resolved(link.address, addresses), [], self._clock())
        self._links.released(link)

    def _exchange(self, link):
        deltas = 0
        try:
            request = self._gossip.request(link, self._clock())
            if request is None:
                self._links.released(link)
                return
            deltas = len(request.deltas)
            self.traffic.add(messages=1, retries=int(link.failures > 0), deltas=deltas)
            answer = self._post(link, request)
            moved = answer.sender.address != link.address
            if moved and answer.number is None:  # it may be a load balancer: a new connection leads elsewhere
                link.session.close()
                link.session = None
            if self._table.address is None and answer.sender.id != request.sender.id:
                self._find_own_address(link.address)
            self._gossip.answered(link, request, answer, self._clock())  # frees the link, so it comes last
        except (*FAILURES, WrongSignature, ValueError) as error:
            self.traffic.add(messages_failed=1, deltas_failed=deltas)
            self._links.failed(link, error, self._clock())

    def _find_own_address(self, towards):
        try:
            host = _local_host_towards(towards)
        except OSError as error:
            log.warning("own address not found: towards=%s error=%s", towards, error)
            return
        self._table.advertise(join_address(host, self._port))
        self._links.compare_soon([towards], self._clock())

    def _post(self, link, request):
        """Return the Message that answers a request; one of FAILURES, WrongSignature or ValueError if none does."""
        if link.session is None:
            link.session = self._new_session(link.address)
        session, chain = link.session, self._signer.request()
        patience_s = self._read_timeout_s * 2 ** min(link.failures, PATIENCE_DOUBLINGS)
        signature, body = _sealed(chain, request)
        if type(body) is bytes:
            size = len(body)
        else:
            size = sealed_size(encode(request))
            body = self._requesting(session, request.to, body, patience_s + size / MERGED_PER_S)
        self.traffic.add(bytes_sent=size)
        session.deadline = self._clock() + CONNECT_TIMEOUT_S + patience_s
        response = session.post(body, {"Content-Length": str(size), HEADER: signature}, CONNECT_TIMEOUT_S)
        return self._read_answer(session, response, chain, request.to)

    def _new_session(self, address):
        if self._certificates is None:
            return Session(address, PATH)
        return TlsSession(address, PATH, self._certificates, self._name_of)

    def _name_of(self, address):
        """Return the host that a peer's certificate has to be for: the name of the seed that led there, if one did."""
        for name, addresses in list(self._found.values()):
            if address in addresses:
                return name
        return split_address(address)[0]

    def _requesting(self, session, id, pieces, patience_s):
        """Yield the pieces of a long request: if the next is asked for, the one before got on."""
        for piece in pieces:
            session.deadline = self._clock() + PROGRESS_TIMEOUT_S
            yield piece
            self._gossip.progress(id, self._clock())
        session.deadline = self._clock() + patience_s

    def _read_answer(self, session, response, chain, id):
        opener, decoder, beginning = Opener(chain.answer(), response.headers.get(HEADER, "")), Decoder(), b""
        for data in session.read(response):
            self.traffic.add(bytes_received=len(data))
            if response.status != 200:
                beginning = (beginning + data)[:200]
                continue
            for line in opener.feed(data):
                decoder.feed(line)
            if decoder.is_long:
                session.deadline = self._clock() + PROGRESS_TIMEOUT_S
                self._gossip.progress(id, self._clock())
        if response.status != 200:
            kind = PeerRefuses if response.status in REFUSALS else ValueError
            raise kind(f"answered {response.status}: {beginning!r}")
        decoder.feed(opener.finish())
        return decoder.finish()


def _sealed(chain, message):
    """Return (signature, body) of a message: bytes if it is short, else an iterator of pieces."""
    signature, pieces = seal(chain, encode(message))
    first, second = next(pieces), next(pieces, None)
    return signature, first if second is None else itertools.chain((first, second), pieces)


def _local_host_towards(address):
    """Return the address of this machine that faces another; nothing is sent for it."""
    family, kind, protocol, _, target = socket.getaddrinfo(*split_address(address), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return probe.getsockname()[0]

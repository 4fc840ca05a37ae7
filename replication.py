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

import logging
import socket
import threading
import time
from collections import namedtuple

import requests
import urllib3
from requests.adapters import HTTPAdapter

from counter.addresses import join_address, split_address
from counter.links import PeerRefuses
from counter.wire import BODY_MAX, BODY_UNPROVEN, LENGTH_SIGNATURE, PATH, SIGNATURE, decode, encode, same_signature

log = logging.getLogger("counter.replication")

CONNECT_TIMEOUT_S = 1.0
REFUSALS = (400, 401, 403)  # what a node answers to messages that it will never take
ANSWER_TIMEOUT_S = 30.0  # for a whole answer, however slowly it trickles in
PATIENCE_DOUBLINGS = 3  # how often the time an answer may take doubles with further failures
SLOWEST_LINK = 100_000  # bytes per second for which a long message is given time

# Merging is idempotent, so a POST may be repeated.  Long waits are the scheduler's, within
# stop()'s reach, so a read timeout is not tried again here and Retry-After is not slept for.
QUICK_TRIES = urllib3.util.Retry(
    connect=1, read=0, redirect=0, status=0, other=0,
    backoff_factor=0.05, allowed_methods={"POST"}, respect_retry_after_header=False,
)  # fmt: skip


# What to send in answer to a message; `taken` if that was for this process, and new.
Reply = namedtuple("Reply", "body signature taken")


class WrongSignature(Exception):
    """A message does not come from a node of this cluster, or not as it was sent."""


class Traffic:
    """How much was said to peers and heard from them since the start.  Threads may call anything."""

    def __init__(self):
        self._lock = threading.Lock()  # guards the numbers
        self._numbers = dict.fromkeys(
            ("messages", "messages_failed", "retries", "deltas", "deltas_failed", "bytes_sent", "bytes_received"), 0
        )

    def add(self, **numbers):
        with self._lock:
            for name, number in numbers.items():
                self._numbers[name] += number

    def numbers(self):
        with self._lock:
            return dict(self._numbers)


class Replicator:
    """Sends what Gossip says, and hands it what others send.

    Sending is done by the retry worker pool: threads, each of which sends to one peer at a time.
    Receiving is done in the thread that calls, which may be any.
    """

    def __init__(self, gossip, links, table, signer, port, workers, peer_timeout_s, clock=time.monotonic):
        self._gossip, self._links, self._table = gossip, links, table
        self._signer, self._port, self._clock = signer, port, clock
        self.traffic = Traffic()
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

    def receive(self, signature, body, local_host):
        """Take in a message that a peer sent to this node, and return the Reply.

        `local_host()` is the address of this machine that it came to.  Raises WrongSignature, and
        ValueError if it is no message; then nothing has changed.
        """
        if not same_signature(signature, self._signer.request(body)):
            raise WrongSignature
        message, size = decode(body), len(body)
        reached_at = None if self._table.address else join_address(local_host(), self._port)
        answer = self._gossip.receive(message, self._clock(), reached_at)
        body = encode(answer)
        self.traffic.add(deltas=len(answer.deltas), bytes_received=size, bytes_sent=len(body))
        return Reply(body, self._signer.answer(signature, body), answer.number is None)

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
        self._links.released(link)
        self._links.send_heartbeats(self._table.resolved(link.address, addresses), [], self._clock())

    def _exchange(self, link):
        deltas = 0
        try:
            request = self._gossip.request(link, self._clock())
            if request is None:
                self._links.released(link)
                return
            body, deltas = encode(request), len(request.deltas)
            self.traffic.add(messages=1, retries=int(link.failures > 0), deltas=deltas, bytes_sent=len(body))
            answer = self._post(link, body)
            self.traffic.add(bytes_received=len(answer))
            answer = decode(answer)
            if answer.sender.address != link.address:  # it may be a load balancer: a new connection leads elsewhere
                link.session.close()
                link.session = None
            self._gossip.answered(link, request, answer, self._clock())
            if self._table.address is None and answer.sender.id != request.sender.id:
                self._table.advertise(join_address(_local_host_towards(link.address), self._port))
                self._links.compare_soon([link.address], self._clock())
        except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:
            self.traffic.add(messages_failed=1, deltas_failed=deltas)
            self._links.failed(link, error, self._clock())

    def _post(self, link, body):
        """Return the body of the answer; OSError, HTTPError or ValueError if there is no good one."""
        if link.session is None:
            link.session = _new_session()
            link.prepared = link.session.prepare_request(requests.Request("POST", f"http://{link.address}{PATH}"))
        deadline = self._clock() + ANSWER_TIMEOUT_S
        signature = self._signer.request(body)
        # A peer may also be slow because it has so much to tell.
        read_s = self._read_timeout_s * 2 ** min(link.failures, PATIENCE_DOUBLINGS)
        # On a new connection the first counts for sending the body as well.
        timeouts_s = tuple(
            min(ANSWER_TIMEOUT_S, seconds + len(body) / SLOWEST_LINK) for seconds in (CONNECT_TIMEOUT_S, read_s)
        )
        # To prepare a request anew each time would be a third of the cost of sending it.
        link.prepared.body = body
        link.prepared.headers.update({"Content-Length": str(len(body)), SIGNATURE: signature})
        link.prepared.headers.pop(LENGTH_SIGNATURE, None)
        if len(body) > BODY_UNPROVEN:
            link.prepared.headers[LENGTH_SIGNATURE] = self._signer.length(signature, len(body))
        with link.session.send(
            link.prepared, timeout=timeouts_s, stream=True, allow_redirects=False, proxies={}
        ) as response:  # fmt: skip
            answer = bytearray()
            while chunk := response.raw.read1(2**20):
                answer += chunk
                if len(answer) > BODY_MAX or self._clock() > deadline:
                    raise ValueError("the answer is too long, or takes too long")
            if response.status_code != 200:
                kind = PeerRefuses if response.status_code in REFUSALS else ValueError
                raise kind(f"answered {response.status_code}: {bytes(answer[:200])!r}")
            if not same_signature(response.headers.get(SIGNATURE, ""), self._signer.answer(signature, answer)):
                raise ValueError("the answer's signature is wrong: another --cluster or --secret-file?")
            return answer


def _new_session():
    session = requests.Session()
    session.trust_env = False  # no proxy between nodes, whatever the environment says
    session.headers = {"Content-Type": "application/json"}
    session.mount("http://", HTTPAdapter(max_retries=QUICK_TRIES, pool_connections=1, pool_maxsize=1))
    return session


def _local_host_towards(address):
    """Return the address of this machine that faces another; nothing is sent for it."""
    family, kind, protocol, _, target = socket.getaddrinfo(*split_address(address), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return probe.getsockname()[0]

"""One connection of a client or a peer: which state it is in, and what happens next.

    accepted ─▶ RECEIVING ── a quick action answers at once ──▶ SENDING ─┬─▶ RECEIVING …
                    │                                              ▲     └─▶ LINGERING ─▶ CLOSED
                    └── any other in a thread ──▶ ANSWERING ───────┘         after the last response,
                                                                             or STREAMING ◀─▶ SENDING before

    state       it waits for                   for at most
    RECEIVING   the next request               IDLE_TIMEOUT_S
                … the rest of its head         HEAD_TIMEOUT_S
                … the rest of its body         BODY_TIMEOUT_S, or PROGRESS_TIMEOUT_S for the next piece to a sink
    ANSWERING   a thread of a lane             as long as the action takes
    STREAMING   something to send              as long as the stream goes on, see counter/watching.py
    SENDING     the other side to read         SEND_TIMEOUT_S, or PROGRESS_TIMEOUT_S for the next piece to a peer
    LINGERING   the other side to hang up      LINGER_S

A connection belongs to the poller, but while it is ANSWERING to a thread of a lane.  Only its owner calls
its methods, and nothing here waits for the other side.  The state is changed by the poller's thread alone.
What arrives goes through an Intake, what is sent through an Outgoing.  The socket may be anything that has
recv(), send() and shutdown() and raises BlockingIOError instead of waiting.
"""

import ipaddress
import socket
import time
from functools import partial

from counter import http1
from counter.exchanges import Exchange
from counter.http1 import Refused, unavailable
from counter.intake import BEFORE, HEAD, Intake
from counter.lanes import QUICK, STREAMS
from counter.outgoing import Outgoing
from counter.places import GUEST, PEER

RECEIVING, ANSWERING, SENDING, LINGERING, CLOSED = "receiving", "answering", "sending", "lingering", "closed"
STREAMING = "streaming"

RECEIVE_SIZE = 16 * 1024  # at once: some 200 requests, during which other connections wait
BODY_RECEIVE_SIZE = 256 * 1024
IDLE_TIMEOUT_S = 60.0
HEAD_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 30.0
PROGRESS_TIMEOUT_S = 10.0
LINGER_S = 1.0
HELD_MOST = 64 * 1024  # what counts at most of a request that is not complete: peers vouch for longer ones
RECENT_S, GRACE_S = 1.0, 0.25  # who sent a request so recently has so long to send another when the node stops

STOPPING = "this node is stopping; try another"
NO_PLACE = "all connections are taken; try again later"
NO_ROOM = "too much of other requests and answers is under way; try again later"
NO_THREAD = "as many requests as --max-waiting wait already; try again later"


class Connection:
    """Its public attributes belong to the poller and to Places."""

    def __init__(self, sock, poller, now):
        self.sock, self._poller = sock, poller
        self.state, self.kind = RECEIVING, GUEST
        self.active_at = now  # when it was accepted, or its latest request was complete
        self.deadline = now + IDLE_TIMEOUT_S
        self.watched = 0  # the events the poller listens for
        self.is_peer = False  # an action has found it to be a peer's
        self.held = 0  # bytes kept for it, see Poller.hold()
        self.answer = None  # the response that it sends at the end of this turn
        self._intake, self._outgoing = Intake(), Outgoing(sock)
        self._waits_for = BEFORE  # the part of a request that the deadline is for
        self._lane = None  # where the latest request ran that was not quick
        self._is_paced = False  # an answer goes to a peer in pieces, and may take long while that goes on
        self._is_last = False  # nothing is received after what is sent now
        self._stream = None  # what goes on after that, until it is over

    holds_more = False  # something was received that is not yet taken from the socket

    @property
    def busy(self):
        return self.state in (ANSWERING, STREAMING)

    @property
    def closed(self):
        return self.state is CLOSED

    def local_host(self):
        """Return the address of this machine that the connection came to."""
        return _host_of(self.sock.getsockname())

    def remote_host(self):
        """Return the address of the machine that it came from."""
        try:
            return _host_of(self.sock.getpeername())
        except OSError:  # it has hung up
            return "unknown"

    def complain(self, message):
        """Log a warning, if it was not logged just before."""
        self._poller.complain(message)

    # What the poller calls.

    def receive(self, now):
        """Take what has arrived, and answer as far as that can be done at once."""
        is_start = self._waits_for is BEFORE
        try:
            received = self.sock.recv(RECEIVE_SIZE if is_start else BODY_RECEIVE_SIZE)
        except BlockingIOError:
            return
        if not received:  # hung up
            self.state = CLOSED
        elif self.state in (LINGERING, STREAMING):
            pass
        elif is_start and self.kind is not GUEST and (repeated := self._poller.repeated.get(received)):
            self._repeat(repeated, now)
        else:
            self._intake.feed(received)
            self._serve(now, received if is_start else None)

    def send_answer(self, now):
        """Send the response that was made in this turn.  This is the hot path as well."""
        response, self.answer = self.answer, None
        try:
            sent = self.sock.send(response)
        except BlockingIOError:
            sent = 0
        if sent != len(response) or self._is_last:
            self._outgoing.add(response[sent:])
            self._go_on(now)

    def send_more(self, now):
        """Go on sending, and then with what follows."""
        if self._is_paced:
            self._due(now + PROGRESS_TIMEOUT_S)
        self._go_on(now)
        self._resume(now)

    def take_back(self, now):
        """Go on after a thread of a lane has done its part."""
        self.state, self._waits_for = RECEIVING, BEFORE
        if self._intake.exchange is None or self._is_last:
            self._go_on(now)
        self._resume(now)

    def expire(self, now):
        """End what has taken too long."""
        if self.busy:
            self.deadline = now + IDLE_TIMEOUT_S
        elif self._waits_for is not BEFORE:
            self._refuse(Refused(408, f"the {self._waits_for} of the request took too long"), now)
        else:
            self.state = CLOSED

    def give_way(self, now):
        """End at once, for the sake of another connection."""
        if self._intake.exchange is not None:
            self._refuse(unavailable(NO_PLACE), now)
        self.state = CLOSED

    def go_on_streaming(self, now):
        """Send what the stream has now, unless the other side has not read what it had before."""
        if self.state is not STREAMING:
            return
        event = self._stream.next(now)
        if event is None:
            self._stream = None
        elif event:
            self._outgoing.add(event)
        self._go_on(now)

    def stop(self, now):
        """End as the node does: after the request that is being answered, or may be on its way."""
        self._stream = None
        if self.state is STREAMING:
            self._go_on(now)
        if self.state is not RECEIVING:
            return  # see _resume()
        if self._waits_for is not BEFORE:
            self._refuse(unavailable(STOPPING), now)
        elif self.active_at > now - RECENT_S:
            self._due(min(self.deadline, now + GRACE_S))
        else:
            self.state = CLOSED

    # Receiving.

    def _resume(self, now):
        """Go on with what has arrived in the meantime, if all was sent."""
        if self.state is RECEIVING:
            self._serve(now)
        if self.state is RECEIVING and self._poller.ends(self):
            self.stop(now)

    def _serve(self, now, received=None):
        """Answer what has arrived, until a request is incomplete, needs a lane, or is the last.

        `received` are the bytes that arrived last, if a request begins with them.
        """
        try:
            while not self._is_last and not self._outgoing.has_further and self._read_request(now):
                exchange, self.active_at = self._intake.exchange, now
                exchange.began = time.perf_counter()  # what came before was the time of the other side
                if exchange.pace not in (QUICK, STREAMS):
                    self._outgoing.flush()
                    if self._hand_over(self._answer):
                        return
                    exchange.failure = unavailable(NO_THREAD)
                elif received and self._intake.is_empty and exchange.can_repeat():
                    self._poller.remember(received, exchange)
                received = None
                self._answer(self._poller.tally)
        except Refused as refused:
            self._refuse(refused, now)
            return
        if self.state is RECEIVING and not self._outgoing.is_empty:
            self._go_on(now)

    def _read_request(self, now):
        """Take a request from what has arrived; return whether it is complete."""
        while (event := self._intake.next()) is not None:
            if not event:
                self._waits_for = BEFORE
                return True
            if self._intake.exchange is None:
                self._begin(event, now)
            elif self._hand_over(partial(self._feed, event)):
                return False
            else:
                raise unavailable(NO_THREAD)
        self._await_rest(now)
        return False

    def _begin(self, head, now):
        """Find out what is to answer the request with this head."""
        api = self._poller.api
        exchange = self._intake.begin(head, api)
        if self.kind is GUEST and head.path not in api.vital_paths:
            self._poller.seat(self, now)
        exchange.choose(api)
        if self._intake.awaits_continue:
            self._outgoing.add(http1.CONTINUE)

    def _await_rest(self, now):
        """Set the deadline for what is missing of a request."""
        part = self._intake.missing
        if part is BEFORE:
            return
        if part is not self._waits_for:
            self._waits_for = part
            exchange = self._intake.exchange  # None before the head is there
            body_timeout_s = PROGRESS_TIMEOUT_S if exchange and exchange.sink is not None else BODY_TIMEOUT_S
            self._due(now + (HEAD_TIMEOUT_S if part is HEAD else body_timeout_s))
        if not self._poller.hold(self, min(self._intake.kept, HELD_MOST)):
            raise unavailable(NO_ROOM)

    def _due(self, deadline):
        moves_back = deadline < self.deadline
        self.deadline = deadline
        if moves_back:
            self._poller.schedule(self)

    # Answering.

    def _repeat(self, repeated, now):
        """Answer what came before byte by byte, perhaps on another connection.  This is the hot path."""
        response, self._is_last = repeated.respond(self)
        self.active_at, self.deadline = now, now + IDLE_TIMEOUT_S
        if self._is_last:
            response = http1.with_header(response, b"Connection: close")
        self.answer = response
        self._poller.answered.append(self)

    def _answer(self, tally):
        """Make the response to the request; of a long one, the first piece."""
        exchange = self._intake.exchange
        response, further, close = exchange.respond(self, tally)
        self._intake.exchange = None
        is_stream = exchange.pace is STREAMS and bool(further)
        self._is_last = close or is_stream or not exchange.keeps_alive or self._poller.ends(self)
        response, further = exchange.framed(response, further, self._is_last)
        if is_stream and further:
            self._stream, further = further, ()
        self._outgoing.add(response, further)
        self._is_paced = self._outgoing.has_further and self.is_peer

    def _refuse(self, refused, now):
        """Answer what cannot be read any further with the last response."""
        if refused.detail == http1.SPEAKS_PLAIN:
            self._poller.complain("TLS came to this port, which speaks plain HTTP: host=%s", self.remote_host())
        exchange = self._intake.exchange or Exchange()
        refused.close, self._waits_for = True, BEFORE
        self._intake.start_anew()
        self._intake.exchange, exchange.failure = exchange, refused
        self._answer(self._poller.tally)
        self._go_on(now)

    # Sending.

    def _go_on(self, now):
        """Send what is outgoing, and go on with what comes after."""
        if not self._outgoing.flush():
            if self.state is not SENDING:
                self.state, self._waits_for = SENDING, BEFORE
                self._due(now + (PROGRESS_TIMEOUT_S if self._is_paced else SEND_TIMEOUT_S))
            if not self.is_peer and not self._poller.hold(self, self._outgoing.size):
                self.state = CLOSED
        elif self._outgoing.has_further:
            if not self._hand_over(self._make_pieces):
                self.state = CLOSED
        elif self._stream is not None and not self._poller.ends(self):
            self.state = STREAMING
            self._poller.streams.add(self)
            self._poller.hold(self, 0)
        elif self._is_last:
            self.sock.shutdown(socket.SHUT_WR)
            self.state, self._waits_for = LINGERING, BEFORE
            self._due(now + LINGER_S)
            self._poller.hold(self, 0)
        else:
            self.state = RECEIVING
            if self._waits_for is BEFORE:
                self._due(now + IDLE_TIMEOUT_S)
                self._poller.hold(self, 0)

    # Working in a lane.

    def _hand_over(self, job):
        """Have a thread of the lane do a job, to which this belongs until then; return False if there is none."""
        self.state = ANSWERING
        if self._intake.exchange is not None:
            self._lane = self._poller.lanes[self._intake.exchange.pace]
        if self._lane.put(partial(self._work, job)):
            return True
        self.state = RECEIVING
        return False

    def _work(self, job, tally):
        try:
            job(tally)
            self._outgoing.flush()
        except OSError:
            pass  # it hung up, as the poller will find as well
        except BaseException:
            self._is_last = True
            raise
        finally:
            waits = self._intake.exchange is None and self._intake.is_empty and not self.holds_more
            is_done = self._outgoing.is_empty and not self._is_last
            is_urgent = not (waits and is_done) or (self.is_peer and self.kind is not PEER)
            self._poller.give_back(self, is_urgent)

    def _feed(self, piece, tally):
        """Give the sink of the request a piece of the body."""
        if not self._intake.exchange.feed(piece):
            self._answer(tally)

    def _make_pieces(self, _tally):
        """Make the next pieces of a response, as long as the socket takes them."""
        if not self._outgoing.make_pieces():
            self._is_last = True  # the other side must see that the response is not whole


def _host_of(name):
    host = ipaddress.ip_address(name[0].partition("%")[0])
    return str(getattr(host, "ipv4_mapped", None) or host)

"""The thread that serves all connections: it waits for whichever can go on, and never for one of them.

    accept thread ── add(socket) ──▶ Poller ─▶ Connection.receive() ── quick ──▶ its response is sent
                                       ▲ │                          └─ else ───▶ a thread of a lane
                                       └─┼── give_back(connection) ◀─────────────── which answers it
                                         └▶ Places: who may stay; Earliest: whose time is up

All else that is called from other threads is said there to be.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from functools import partial

from counter.connections import (
    ANSWERING,
    CLOSED,
    LINGERING,
    NO_PLACE,
    RECEIVING,
    SENDING,
    STOPPING,
    STREAMING,
    Connection,
)
from counter.events import READ, WRITE, Events, Waker
from counter.exchanges import Repeated
from counter.http1 import unavailable
from counter.places import GUEST, PEER, Earliest
from counter.watching import Streams

log = logging.getLogger("counter.serving")

WATCHED = {RECEIVING: READ, SENDING: WRITE, STREAMING: READ, LINGERING: READ}
TICK_S = 1.0  # what has no event of its own is seen to so often
REPEATED_MAX, REPEATED_SIZE_MAX = 1000, 1024  # requests remembered, and the bytes of each
HELD_MAX = 32 * 2**20  # bytes, see hold()
SPARE_SIZE = 4 * 2**20  # bytes of memory that are let go when there are no others
CALLS_MAX = 64  # what other threads ask for, new connections above all, between two looks at the others
NO_MEMORY_PAUSE_S = 0.05
COMPLAINT_INTERVAL_S = 60.0  # between two lines in the log that say the same


class Complaints:
    """Warnings that are logged now and then, however often there is reason.  Threads may call it."""

    def __init__(self):
        self._said_at = {}  # message -> when it was logged

    def __call__(self, message, *values):
        now = time.monotonic()
        if now - self._said_at.get(message, -math.inf) >= COMPLAINT_INTERVAL_S:
            self._said_at[message] = now
            with contextlib.suppress(MemoryError):
                log.warning(message, *values)


class Poller:
    """Owns the connections; see above."""

    def __init__(self, api, places, lanes, requests, complain, open_connection=Connection):
        """`open_connection(sock, poller, now)` returns the Connection that serves a new socket."""
        self.api, self.lanes, self.complain = api, lanes, complain  # lanes: {pace of an action: Lane}
        self._open_connection = open_connection
        self._places, self._requests = places, requests
        self.tally = requests.open()  # what this thread counts
        self.repeated = {}  # the bytes of a request -> Repeated
        self.answered = []  # the connections with an answer that is sent at the end of the turn
        self._deadlines = Earliest(lambda connection: connection.deadline, lambda connection: not connection.closed)
        self._connections = set()
        self.streams = Streams(api.wake_on_change, self.call, self._step)
        self._held = 0  # bytes, see hold()
        self._spare = bytes(SPARE_SIZE)
        self._ending = frozenset()  # kinds of connections that end after their request
        self._awaited = []  # (kinds, event to set once there are none of them)
        self._events = Events()
        self._now = self._look_at = time.monotonic()  # of this turn; when to look whose time is up
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)
        self._waker = Waker(self._events)
        self._calls, self._given_back = deque(), deque()  # other threads append to them, and wake this one
        self._entering = threading.Semaphore(places.entering_max)

    # Other threads may call these.

    def start(self):
        self._thread.start()

    def add(self, sock):
        """Serve a new connection; wait while those before have not been looked at."""
        while not self._entering.acquire(timeout=TICK_S):
            if not self._thread.is_alive():
                sock.close()
                return
        self.call(partial(self._enter, sock))

    def give_back(self, connection, is_urgent):
        """Take a connection back from the thread of a lane; at its next event if it is not urgent."""
        self._given_back.append(connection)
        if is_urgent or not connection.watched:  # or there is no next: a new connection is not watched yet
            self._waker.wake()

    def call(self, function):
        """Have the poller call a function of the time soon."""
        self._calls.append(function)
        self._waker.wake()

    def relieve(self):
        """Close the connection that is missed least."""
        self.call(lambda now: self._make_way(self._places.most_idle_guest(now), now))

    def end(self, kinds, timeout_s, release=lambda: None):
        """Have all connections of these kinds end after the request they are in; return whether they did in time.

        `release` is called once no request can begin any more whose connection goes on.
        """
        if not self._thread.is_alive():
            return True
        ended = threading.Event()
        self._ending = self._ending | frozenset(kinds)
        release()
        self.call(partial(self._end, kinds, ended))
        return ended.wait(timeout_s)

    def stop(self, timeout_s):
        """End the thread, and whatever it serves; return whether it did in time."""
        if not self._thread.is_alive():
            return True
        self.call(lambda _now: self._over.set())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def numbers(self):
        """Return {kind: number of open connections}."""
        return dict(self._places.numbers)

    def ends(self, connection):
        """Return whether a connection ends after its present request."""
        kinds = self._ending
        return bool(kinds) and ((PEER if connection.is_peer else connection.kind) in kinds)

    # Connections call these, in this thread.

    def seat(self, connection, now):
        """Give a guest the place of a client; Refused if there is none."""
        if self._ending:
            raise unavailable(STOPPING)
        was_full = self._places.full
        has_place, victim = self._places.take_client(connection, now)
        self._make_way(victim, now)
        if not has_place:
            if not was_full:
                maximum = self._places.clients_max
                log.warning("clients are sent away: all of --max-connections are taken, max=%d", maximum)
            raise unavailable(NO_PLACE)

    def schedule(self, connection):
        """See to a connection at its deadline; to be called when that has moved back, not when it has moved on."""
        self._deadlines.add(connection)
        self._look_at = min(self._look_at, connection.deadline)

    def hold(self, connection, size):
        """Count so many bytes as kept for a connection, instead of what it was; return whether there is room for all.

        It is for halves of requests and of answers, which may be many and long: a client decides how long they stay.
        """
        self._held += size - connection.held
        connection.held = size
        return self._held <= HELD_MAX

    def remember(self, request, exchange):
        """Answer these bytes without parsing them again when they are the next on any connection."""
        if len(request) <= REPEATED_SIZE_MAX and not self._ending:
            if len(self.repeated) >= REPEATED_MAX:
                self.repeated.clear()  # keys and the like; what is frequent is soon here again
            self.repeated[request] = Repeated(exchange, self.tally)

    # The thread.

    def _run(self):
        while not self._over.is_set():
            try:
                self._turn()
            except MemoryError:
                self._free_memory()
            except Exception:  # a bug; without this thread nobody would be served
                log.exception("serving connections failed")
        for connection in list(self._connections):
            self._close(connection)
        self._events.close()
        self._waker.close()
        self._requests.close(self.tally)

    def _free_memory(self):
        """End the connections that are half way through a request or an answer, and go on with the others."""
        self._spare = None  # for what the next lines need
        self.complain("no memory to serve connections")
        self.repeated.clear()
        for connection in [connection for connection in self._connections if connection.held]:
            self._close(connection)
        self._over.wait(NO_MEMORY_PAUSE_S)
        with contextlib.suppress(MemoryError):
            self._spare = bytes(SPARE_SIZE)  # which takes no memory until there is something in it

    def _turn(self):
        """Wait until some connections can go on, and let each of them do so once."""
        self._waker.is_asleep = True
        # Other threads may have added to these just before, and not have seen it asleep.
        patience_s = 0 if self._calls or self._given_back else self._look_at - self._now
        ready = self._events.wait(patience_s)
        self._waker.is_asleep = False
        now = self._now = time.monotonic()
        try:
            self._let_go_on(ready, now)
        finally:
            # Sending wakes a client that sleeps, which may cost as much as the whole request.  Answers in quick
            # succession wake a client with many connections once, instead of once for each of them.
            answered, self.answered = self.answered, []
            self._let_go_on(answered, now)
        if self._calls or self._given_back or now >= self._look_at:
            self._see_to_the_rest(now)

    def _let_go_on(self, connections, now):
        """Let each of these connections do what it can do now.  This is the hot path: _step() without its call."""
        for connection in connections:
            if connection is None:
                self._waker.clear()
                continue
            if connection.state is ANSWERING:
                self._take_back(now)
                if connection.state is ANSWERING:  # it has hung up, or sent more than one request
                    self._watch(connection, 0)
                    continue
            try:
                if connection.answer is not None:
                    connection.send_answer(now)
                elif connection.state is SENDING:
                    connection.send_more(now)
                elif connection.state is not CLOSED:
                    connection.receive(now)
            except Exception as error:  # it costs this connection only
                self._fail(connection, error)
            if connection.state is not RECEIVING or connection.watched != READ:
                self._settle(connection)

    def _see_to_the_rest(self, now):
        """Do what other threads have asked for, and what is due."""
        self._take_back(now)
        for _ in range(min(len(self._calls), CALLS_MAX)):  # others may add to them all the time
            self._calls.popleft()(now)
        self._look_at = min(self._look_at, self.streams.look(now))
        if now < self._look_at:
            return
        while (connection := self._deadlines.first()) is not None and connection.deadline <= now:
            self._step(connection, connection.expire, now)
        for lane in self.lanes.values():
            lane.tend()
        self._look_at = min(now + TICK_S, self._deadlines.bound(), self.streams.due_at)

    def _step(self, connection, step, now):
        """Let a connection go on, and wait for what it waits for then."""
        try:
            step(now)
        except Exception as error:  # it costs this connection only
            self._fail(connection, error)
        self._settle(connection)

    def _fail(self, connection, error):
        """End a connection for which a step failed, and log why unless it has just hung up."""
        connection.state = CLOSED
        if isinstance(error, MemoryError):
            self.complain("no memory to serve connections")
        elif not isinstance(error, OSError):  # a bug
            log.error("serving a connection failed", exc_info=error)

    def _settle(self, connection):
        """Wait for what a connection waits for now, if that is something else than before."""
        if connection.state is CLOSED:
            self._close(connection)
        elif connection.watched != WATCHED.get(connection.state, connection.watched):
            self._watch(connection, WATCHED[connection.state])

    def _watch(self, connection, events):
        if not events:
            self._events.unregister(connection.sock)
        elif not connection.watched:
            self._events.register(connection.sock, events, connection)
        else:
            self._events.modify(connection.sock, events)
        connection.watched = events

    def _take_back(self, now):
        for _ in range(len(self._given_back)):
            connection = self._given_back.popleft()
            self._step(connection, connection.take_back, now)
            if connection.is_peer and connection.kind is not PEER and not connection.closed:
                self._make_way(self._places.take_peer(connection, now), now)

    def _enter(self, sock, now):
        self._entering.release()
        try:
            connection = self._open_connection(sock, self, now)
            self.schedule(connection)
            victim = self._places.enter(connection, now)
            self._connections.add(connection)
        except MemoryError:
            sock.close()
            self.complain("no memory to serve connections")
            return
        self._step(connection, connection.receive, now)  # most send a request at once
        self._make_way(victim, now)
        if GUEST in self._ending and not connection.closed:
            self._step(connection, connection.stop, now)

    def _make_way(self, connection, now):
        if connection is not None and not connection.closed:
            self._step(connection, connection.give_way, now)

    def _close(self, connection):
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self.streams.discard(connection)
        if connection.watched:
            self._watch(connection, 0)
        connection.sock.close()
        self.hold(connection, 0)
        was_full = self._places.full
        self._places.leave(connection)
        if was_full and not self._places.full:
            log.info("clients are served again: there is room below --max-connections")
        self._tell_ended()

    def _end(self, kinds, ended, now):
        self._awaited.append((kinds, ended))
        self.repeated.clear()
        for connection in list(self._connections):
            if self.ends(connection) and not connection.closed:
                self._step(connection, connection.stop, now)
        self._tell_ended()

    def _tell_ended(self):
        for kinds, ended in self._awaited:
            if not any(self._places.numbers[kind] for kind in kinds):
                ended.set()

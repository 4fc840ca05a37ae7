"""Who may be connected, and who has to give way: pure bookkeeping, without sockets.

A new connection is a guest until it shows what it is.  With the first request of a client it takes
one of --max-connections places, with a message of a peer one of those for the known peers.  Guests
have what clients leave free and a few places of their own, so neither silent connections nor many
clients can keep peers and health checks out.  When all places of a kind are taken, the connection
that has been idle for longest gives way.
"""

import heapq
import itertools
import math

GUEST, CLIENT, PEER = "guest", "client", "peer"  # kinds of connections
GUESTS_LEAST, GUESTS_MOST = 16, 1000  # places for guests, whatever the number of clients
IDLE_LEAST_S = 1.0  # a client is not hung up on for another one if it was served so recently
ROOM = 0.9  # of the places for clients: with fewer clients there is room again


def guests_for(clients_max):
    """Return how many places there are for guests beside those of clients."""
    return min(max(GUESTS_LEAST, clients_max // 10), GUESTS_MOST)


class Earliest:
    """Connections by a time of theirs, the earliest first.

    A time that moves on costs nothing until its connection comes to the front; for one that moves
    back the connection must be added again.
    """

    def __init__(self, time_of, belongs):
        self._time_of, self._belongs = time_of, belongs  # functions of a connection
        self._heap, self._serial = [], itertools.count()  # of (time, serial number, connection)
        self._compact_at = 64

    def add(self, connection):
        heapq.heappush(self._heap, (self._time_of(connection), next(self._serial), connection))
        if len(self._heap) > self._compact_at:
            self._compact()

    def bound(self):
        """Return a time before which none is."""
        return self._heap[0][0] if self._heap else math.inf

    def first(self):
        """Return the connection with the earliest time; None if there is none."""
        heap, time_of = self._heap, self._time_of
        while heap:
            at, _, connection = heap[0]
            if not self._belongs(connection):
                heapq.heappop(heap)
            elif time_of(connection) > at:
                heapq.heapreplace(heap, (time_of(connection), next(self._serial), connection))
            else:
                return connection
        return None

    def _compact(self):
        """Forget the entries that no longer count, which would keep ended connections in memory."""
        connections = {connection for _, _, connection in self._heap if self._belongs(connection)}
        self._heap = [(self._time_of(connection), next(self._serial), connection) for connection in connections]
        heapq.heapify(self._heap)
        self._compact_at = 2 * len(self._heap) + 64


class Places:
    """The places of a node; all of a connection that counts here is `kind`, `active_at`, `busy` and `closed`."""

    def __init__(self, clients_max, peers_max):
        self.clients_max, self._peers_max = clients_max, peers_max  # the latter a function: it follows the cluster
        self._guests_min = guests_for(clients_max)
        self.entering_max = self._guests_min // 2  # connections that may be open and not yet counted
        self.numbers = dict.fromkeys((GUEST, CLIENT, PEER), 0)
        self.full = False  # clients are sent away
        self._idle = {kind: self._by_activity(kind) for kind in self.numbers}

    @staticmethod
    def _by_activity(kind):
        return Earliest(
            lambda connection: connection.active_at,
            lambda connection: connection.kind == kind and not connection.closed,
        )

    def enter(self, connection, now):
        """Count a new connection, a guest; return which has to give way for it, or None."""
        connection.kind = GUEST
        self.numbers[GUEST] += 1
        self._idle[GUEST].add(connection)
        if self.numbers[GUEST] + self.numbers[CLIENT] <= self.clients_max + self._guests_min:
            return None
        return self._longest_idle(GUEST, now) or connection

    def leave(self, connection):
        """Uncount a connection that has ended."""
        self.numbers[connection.kind] -= 1
        if self.numbers[CLIENT] < ROOM * self.clients_max:
            self.full = False

    def take_client(self, connection, now):
        """Give a guest the place of a client; return (whether there is one, who has to give way for it)."""
        victim = None
        if self.numbers[CLIENT] >= self.clients_max:
            victim = self._longest_idle(CLIENT, now)
            if victim is None or victim.active_at > now - IDLE_LEAST_S:
                self.full = True
                return False, None
        self._move(connection, CLIENT)
        return True, victim

    def take_peer(self, connection, now):
        """Give a connection the place of a peer; return which has to give way for it, or None."""
        self._move(connection, PEER)
        return self._longest_idle(PEER, now) if self.numbers[PEER] > self._peers_max() else None

    def most_idle_guest(self, now):
        """Return which guest is missed least; None if there is none."""
        return self._longest_idle(GUEST, now)

    def _move(self, connection, kind):
        self.numbers[connection.kind] -= 1
        self.numbers[kind] += 1
        connection.kind = kind
        self._idle[kind].add(connection)

    def _longest_idle(self, kind, now):
        while (connection := self._idle[kind].first()) is not None:
            if not connection.busy:
                return connection
            if connection.active_at >= now:
                return None
            connection.active_at = now  # a client that is being answered is not idle
        return None

"""What each peer is known to hold: for acks, for pushes, and for what is left to hand over.

It is known by replica id, and not by address: a peer that dials out but cannot be dialled shows
what it holds in its own requests.

A long message may be on its way for minutes.  The histories in it are confirmed only once its receiver
says so, but they are not sent a second time meanwhile.
"""

import threading

from counter.absorption import alone, is_shown
from counter.ids import SEQUENCE_MAX
from counter.vectors import Vector
from counter.waiting import Waiters
from counter.wire import SHORT

ANSWER, REQUEST = "answer", "request"  # what may carry histories to a peer
STALLED_S = 30.0  # a long message that has not got on for so long is taken for lost
NEVER = float("inf")
NOTHING_HELD = Vector({})


def is_long(deltas):
    """Return whether a message with these deltas may take long on its way."""
    return sum(len(delta.totals) + len(delta.keys) + len(delta.absorbed) for delta in deltas) > SHORT


class Confirmations:
    """Which peer has confirmed what.  Threads may call anything at any time.

    `vectors` is {id of a peer: the Vector it last confirmed}; it may be read without a lock.
    `carriers(replica, sequence)` returns the dots of which each holds a dot.
    """

    def __init__(self, carriers=alone):
        self._carriers = carriers
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self.vectors = {}
        self._heard_at = {}  # id of a peer -> when it last confirmed anything
        # (id of a peer, ANSWER or REQUEST) -> (the replicas in a long one, when to take it for lost)
        self._on_the_way = {}
        self._told_leaving = set()  # ids of peers that know that this node is leaving
        self._waiters = Waiters(self._lock)  # who waits for acks of a dot, or for any change

    def confirm(self, peer, vector, now, answered=None):
        """Record what a peer holds, in place of what was known before; None if nothing is known any more.

        If it said so in a request, `answered` are the deltas for it, and what of them to send is returned,
        as by requested(): the answer to an earlier request has arrived, or never will.
        """
        with self._lock:
            to_send = self._send_locked(peer, REQUEST if answered is None else ANSWER, answered or [], now)
            before = self.vectors.get(peer, NOTHING_HELD)
            if vector is None:
                self.vectors.pop(peer, None)
            else:
                self.vectors[peer], self._heard_at[peer] = vector, now
            if self._waiters.anybody:
                self._waiters.advanced_locked(before, vector or NOTHING_HELD)
            return to_send

    def requested(self, peer, deltas, now):
        """Record that a request brings these deltas to a peer, and that an earlier one does so no longer.

        Return those to send: without the histories that an answer has begun to bring in the meantime.
        """
        with self._lock:
            return self._send_locked(peer, REQUEST, deltas, now)

    def _send_locked(self, peer, carrier, deltas, now):
        replicas, until = self._on_the_way.get((peer, REQUEST if carrier is ANSWER else ANSWER), _NOTHING)
        if now < until:
            deltas = [delta for delta in deltas if delta.replica not in replicas]
        self._on_the_way.pop((peer, carrier), None)
        if is_long(deltas):
            self._on_the_way[peer, carrier] = {delta.replica for delta in deltas}, now + STALLED_S
        return deltas

    def progress(self, peer, now):
        """Record that bytes of a long message pass to a peer."""
        with self._lock:
            for carrier in (ANSWER, REQUEST):
                if sent := self._on_the_way.get((peer, carrier)):
                    self._on_the_way[peer, carrier] = sent[0], now + STALLED_S

    def to_send_from(self, peer, now, shown=None):
        """Return the vector from which on to cut deltas for a peer; None if it is not known what it holds.

        They are for the answer to a request that has `shown` that, or else for a request.  Histories that
        the other of the two is bringing are left out: what comes after them would be a GAP.
        """
        with self._lock:
            vector = self.vectors.get(peer) if shown is None else shown
            replicas, until = self._on_the_way.get((peer, ANSWER if shown is None else REQUEST), _NOTHING)
        return vector.updated(dict.fromkeys(replicas, SEQUENCE_MAX)) if vector is not None and now < until else vector

    def sent_until(self, peer, replica):
        """Return until when a history is on its way to a peer; -NEVER if it is not.  Needs no lock."""
        sent = (self._on_the_way.get((peer, carrier), _NOTHING) for carrier in (ANSWER, REQUEST))
        return max(until if replica in replicas else -NEVER for replicas, until in sent)

    def knows_of_leaving(self, peer):
        """Record that a peer knows that this node is leaving."""
        with self._lock:
            self._told_leaving.add(peer)
            self._waiters.wake_all_locked()

    def forget_idle(self, heard_before, kept):
        """Forget what was heard before that time, except of the peers `kept`.

        In a large cluster, a vector kept of each peer would grow with the square of the cluster.
        """
        with self._lock:
            for peer in [peer for peer, at in self._heard_at.items() if at < heard_before and peer not in kept]:
                del self._heard_at[peer]
                self.vectors.pop(peer, None)
            self._on_the_way = {key: sent for key, sent in self._on_the_way.items() if sent[1] >= heard_before}

    # What others ask.

    @property
    def awaited(self):
        """Whether somebody waits for a peer to confirm something."""
        return self._waiters.anybody

    def holders(self, replica, sequence):
        """Return the ids of the replicas that are known to hold a dot; the one that counted it does anyway."""
        dots = self._carriers(replica, sequence)
        with self._lock:
            holders = {peer for peer, vector in self.vectors.items() if is_shown(vector, dots)}
        return holders | {replica}

    def unconfirmed(self, vector, without):
        """Return {peer: number of increments of a vector it has yet to confirm}, without those of some replicas."""
        with self._lock:
            vectors = dict(self.vectors)
        return {peer: self._missing(vector, [its], {*without, peer}) for peer, its in vectors.items()}

    def held_by_none(self, vector, peers):
        """Return how many of the increments in a vector none of these peers is known to hold."""
        with self._lock:
            held = [self.vectors[peer] for peer in peers if peer in self.vectors]
        return self._missing(vector, held, peers)

    def _missing(self, vector, others, replicas):
        """Return how many increments of a vector none of the others holds; those of some replicas are left out."""
        first, *others = others or [NOTHING_HELD]
        missing = 0
        for replica, sequence, held in vector.beyond(first):
            held = max([held, *(other.get(replica) for other in others)])
            if held < sequence and replica not in replicas:
                dots = self._carriers(replica, sequence)
                missing += 0 if any(is_shown(other, dots) for other in (first, *others)) else sequence - held
        return missing

    def know_of_leaving(self, peers):
        """Return whether all of these peers know that this node is leaving."""
        with self._lock:
            return self._told_leaving.issuperset(peers)

    # Waiting.

    def wait(self, is_over, timeout_s, dot=None):
        """Wait until is_over(), as Waiters.wait() does: for a dot to be confirmed by a peer, or for any change."""
        self._waiters.wait(is_over, timeout_s, dot)

    def membership_changed(self):
        """Have all waiters check again: a peer that is back counts again, and one that is gone does not."""
        with self._lock:
            self._waiters.wake_all_locked()

    def stop_waiting(self):
        """Wake all who wait for a dot and refuse new waits; called when the node stops."""
        self._waiters.stop()


_NOTHING = ((), -NEVER)  # is on its way

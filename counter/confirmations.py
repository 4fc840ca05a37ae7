"""What each peer is known to hold: for acks, for pushes, and for what is left to hand over.

It is known by replica id, and not by address: a peer that dials out but cannot be dialled shows
what it holds in its own requests.
"""

import threading

from counter.waiting import Waiters


class Confirmations:
    """Which peer has confirmed what.  Threads may call anything at any time.

    `vectors` is {id of a peer: the vector it last confirmed}; it may be read without a lock, and no
    vector is ever changed in place.
    """

    def __init__(self):
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self.vectors = {}
        self._heard_at = {}  # id of a peer -> when it last confirmed anything
        self._told_leaving = set()  # ids of peers that know that this node is leaving
        self._waiters = Waiters(self._lock)  # who waits for acks of a dot, or for any change
        self.agreed = False  # vectors were equal when two nodes last compared them

    def confirm(self, peer, vector, now):
        """Record what a peer holds, in place of what was known before; None if nothing is known any more."""
        with self._lock:
            before = self.vectors.get(peer) or {}
            if vector is None:
                self.vectors.pop(peer, None)
            else:
                self.vectors[peer], self._heard_at[peer] = vector, now
            if self._waiters:
                self._waiters.advanced_locked(before, vector or {})

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

    # What others ask.

    def holders(self, replica, sequence):
        """Return the ids of the replicas that are known to hold a dot; the one that counted it does anyway."""
        with self._lock:
            holders = {peer for peer, vector in self.vectors.items() if vector.get(replica, 0) >= sequence}
        return holders | {replica}

    def unconfirmed(self, owed):
        """Return {peer: number of increments it has yet to confirm} of `owed`, a vector."""
        with self._lock:
            vectors = dict(self.vectors)
        return {peer: _missing(owed, [vector], {peer}) for peer, vector in vectors.items()}

    def held_by_none(self, vector, peers):
        """Return how many of the increments in a vector none of these peers is known to hold."""
        with self._lock:
            held = [self.vectors[peer] for peer in peers if peer in self.vectors]
        return _missing(vector, held, peers)

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


def _missing(vector, others, peers):
    """Return how many increments of a vector are in none of the other vectors, nor counted by one of the peers."""
    return sum(
        max(0, sequence - max((other.get(replica, 0) for other in others), default=0))
        for replica, sequence in vector.items()
        if replica not in peers
    )

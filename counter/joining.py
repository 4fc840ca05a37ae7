"""When a node has joined its cluster: when clients may rely on what it counts.

A node without seeds is ready at once.  Any other is ready once it has caught up with a peer that is
itself ready: two empty nodes must not make each other ready, since a third may hold the counts.  If no
peer is ready, as when all start together, a node is ready after the join timeout, provided that it
has caught up with every peer it has heard of, and that no seed refuses it.

This cannot deadlock: among nodes that can reach each other, one eventually has heard of all, becomes
ready, and makes the others ready.  A node waits for ever only if it was told of increments that no
other node gives it, or while a seed refuses it; the log and /readyz then say so.

All that its peers hold may be much, and each would send it.  So a node takes it from one of them: see Givers.
"""

import logging
import threading

from counter.confirmations import NEVER, STALLED_S
from counter.vectors import lacks

log = logging.getLogger("counter.peers")

PATIENCE_S = 300.0  # with those who give and get on slowly, before a further one gives as well


class _Goal:
    """What a peer held when this node first heard it from that peer itself."""

    def __init__(self, vector, is_ready):
        self.vector = vector  # None once this node holds all of it
        self.is_ready = is_ready  # the peer was ready as it said so


class Givers:
    """From whom a node that joins takes what it lacks.  Threads may call anything at any time.

    It is one peer at a time: the first that is asked, until it has given all that it showed, or fails.  It gives
    in its answers: peers are told to send nothing else as long as that takes.  But nobody is waited for without end:
    whenever those that give have not got on for STALLED_S, or have not ended within PATIENCE_S, a further one
    may give as well.
    """

    def __init__(self):
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._givers = {}  # address that was asked -> id of the peer there
        self._more_at = self._patient_until = -NEVER  # when a further one may give as well; at most until when not
        self._put_off = {}  # addresses of others that hold more, as an ordered set

    def take(self, address, peer, now):
        """Return whether the peer at an address is to give, if it is asked now.

        A second address of one that gives is not: it would give all of it twice.
        """
        with self._lock:
            if address not in self._givers and (not self._givers or now >= self._more_at):
                self._givers[address] = peer
                self._more_at, self._patient_until = now + STALLED_S, now + PATIENCE_S
            return address in self._givers

    def progress(self, peer, now):
        """Record that bytes of a long message pass from or to a peer."""
        with self._lock:
            if peer in self._givers.values():
                self._more_at = min(now + STALLED_S, self._patient_until)

    def compared(self, address, peer, lacks):
        """Record whether this node lacks something of what a peer has shown; return the addresses to ask now."""
        with self._lock:
            if not lacks:
                self._givers = {address: id for address, id in self._givers.items() if id != peer}
            elif peer not in self._givers.values() and address:
                self._put_off[address] = None
            return self._to_ask_locked()

    def end(self, is_failing):
        """Take it from others than those where `is_failing(address)`; return the addresses to ask now."""
        with self._lock:
            givers = list(self._givers)
        failing = list(filter(is_failing, givers))
        with self._lock:
            for address in failing:
                self._givers.pop(address, None)
            return self._to_ask_locked()

    def _to_ask_locked(self):
        if self._givers:
            return []
        addresses, self._put_off = list(self._put_off), {}
        return addresses


class Joining:
    """Whether a node is ready, and what it waits for.  Threads may call anything at any time.

    `timeout_s` is for how long a node with seeds waits for a peer that is ready.  `lacks(mine, vector)`
    tells whether this node lacks something that is in another vector.
    """

    def __init__(self, has_seeds, timeout_s, lacks=lacks):
        self._timeout_s, self._lacks = timeout_s, lacks
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._goals = {}  # id of a peer -> _Goal
        self._began_at = None
        self.givers = Givers()
        self.ready = not has_seeds  # once it is ready, a node stays so
        self.waits_for = "a peer that is ready"

    def heard(self, peer, is_ready, vector, mine):
        """Record what a peer holds and whether it is ready; `mine` is the vector of this node."""
        with self._lock:
            if self.ready:
                return
            goal = self._goals.get(peer)
            if goal is None or (is_ready and not goal.is_ready):
                self._goals[peer] = _Goal(vector, is_ready)
        self._compare(mine, [peer])
        with self._lock:
            goal = self._goals[peer]
            if self.ready or not goal.is_ready or goal.vector is not None:
                return
            self.ready = True
        log.info("ready: caught up with id=%s", peer)

    def look(self, now, own, mine, present, refusals):
        """Find out whether this node, with the id `own` and the vector `mine`, is ready or what it waits for.

        `present` are the ids of the peers that anybody has heard of lately, `refusals` is {address of
        a seed that refuses this node: why}.
        """
        self._compare(mine)
        with self._lock:
            if self.ready:
                return
            if self._began_at is None:
                self._began_at = now
            behind = [peer for peer, goal in self._goals.items() if goal.vector is not None]
            untold = [peer for peer in present if peer not in self._goals]
            before = self.waits_for
            if any(goal.is_ready for peer, goal in self._goals.items() if peer not in behind):
                self.ready = True
            elif now - self._began_at < self._timeout_s:
                return
            elif refusals:
                self.waits_for = "a seed that refuses it: " + ", ".join(f"{a}: {why}" for a, why in refusals.items())
            elif behind:
                self.waits_for = f"increments that peer {behind[0]} holds, or held"
            elif untold:
                self.waits_for = f"peer {untold[0]} to say what it holds"
            else:
                self.ready = True
            peers = len(self._goals)
        if not self.ready:
            if self.waits_for != before:
                log.warning("not ready: this node waits for %s", self.waits_for)
        elif peers:
            log.info("ready: caught up with all peers=%d", peers)
        elif mine.keys() <= {own}:
            log.warning("ready alone, and without counts: no seed has answered")
        else:
            log.info("ready alone: no seed has answered")

    def _compare(self, mine, peers=None):
        """Take note of the goals that the vector of this node has reached, of some peers or of all."""
        with self._lock:
            goals = {peer: self._goals[peer].vector for peer in (self._goals if peers is None else peers)}
        wanted = {peer: vector for peer, vector in goals.items() if vector is not None}
        reached = [peer for peer, vector in wanted.items() if not self._lacks(mine, vector)]
        with self._lock:
            for peer in reached:
                if self._goals[peer].vector is wanted[peer]:  # else it has said anew what it holds
                    self._goals[peer].vector = None

"""Who has failed, and whom to contact to find out: what happens once an interval.

Beats are raised once an interval and travel by gossip (van Renesse, Minsky, Hayden, "A Gossip-Style
Failure Detection Service", 1998).  A node that looks late forgives the others its own lateness
(Dadgar, Phillips, Currey, "Lifeguard", 2017).  Pure, and not locked: it belongs to a PeerTable.
"""

import math
from operator import attrgetter

from counter.roster import ACTIVE, FORGOTTEN, LOST, UNVERIFIED

LOST_MAX = 64  # lost peers probed for ever; older ones are forgotten
TIMEOUT_GROWTH = 3.0  # intervals of allowed silence per power of ten of the cluster's size, beyond the fan-out
_LAST_HEARD = attrgetter("last_heard")


class Detector:
    """Finds the peers of a Roster that have failed.

    Every `interval_s` seconds look() is called, and at most `fanout` peers are contacted.
    """

    def __init__(self, roster, interval_s, timeout_s, fanout, rng):
        self._roster, self._interval_s, self._timeout_s = roster, interval_s, timeout_s
        self._fanout, self._rng = fanout, rng
        self._looked_at = None

    def look(self, now, own_address):
        """Move silent peers; return (active peers that are about to fail, those that are lost now).

        A peer known from gossip alone is lost as well, since it may be counting beyond a partition; but not if
        another node is known to be at its address, as after a restart.
        """
        self._forgive_lateness(now)
        failure_timeout_s = self._failure_timeout_s()
        silent, failed = [], []
        for peer in list(self._roster.peers.values()):
            silent_s = now - peer.last_heard
            if silent_s > failure_timeout_s:
                if peer.state == UNVERIFIED and self._is_replaced(peer, own_address):
                    self._roster.move(peer, FORGOTTEN)
                elif peer.state != LOST:
                    self._roster.move(peer, LOST)
                    failed.append(peer)
            elif silent_s > failure_timeout_s / 2 and peer.state == ACTIVE:
                silent.append(peer)
        lost = sorted((peer for peer in self._roster.inactive() if peer.state == LOST), key=_LAST_HEARD)
        for peer in lost[:-LOST_MAX]:
            self._roster.move(peer, FORGOTTEN)
        return silent, failed

    def _is_replaced(self, peer, own_address):
        owner = self._roster.owners.get(peer.address, peer.id)
        return peer.address == own_address or owner != peer.id

    def _failure_timeout_s(self):
        """Return for how long a peer may be silent: what reaches fewer than all takes its time."""
        if not self.is_large():
            return self._timeout_s
        return max(self._timeout_s, TIMEOUT_GROWTH * math.log10(len(self._roster.peers) + 1) * self._interval_s)

    def is_large(self):
        """Return whether there are too many peers to contact each of them in every interval."""
        return len(self._roster.peers) > self._fanout

    def _forgive_lateness(self, now):
        # After a pause, this node cannot tell whether the peers were silent or it was not listening, so
        # it extends their deadlines by its own lateness (Lifeguard).  A tenth of an interval is the
        # ordinary unevenness of a thread's waking up.
        late_s = now - self._looked_at - 1.1 * self._interval_s if self._looked_at is not None else 0
        self._looked_at = now
        if late_s > 0:
            for peer in self._roster.peers.values():
                peer.last_heard = min(now, peer.last_heard + late_s)  # some were heard again before this sweep

    def heartbeats(self, silent, probes):
        """Return the addresses of the active peers that get a heartbeat now, beside that many probes.

        A peer that gossip has not mentioned for half the failure timeout is asked directly before it
        is declared lost.  At most a quarter of the fan-out is used for this: in a partition half
        the peers fall silent at once, and the rest still need heartbeats.
        """
        active = self._roster.active
        if len(active) <= self._fanout:
            return [peer.address for peer in active]
        most = max(1, self._fanout // 4)
        silent = sorted(silent, key=_LAST_HEARD)[: 4 * most]  # some of them may be dead
        asked = self._rng.sample(silent, min(most, len(silent)))
        picked = asked + self._rng.sample(active, self._fanout)
        addresses = list(dict.fromkeys(peer.address for peer in picked))
        return addresses[: max(1, self._fanout - probes)]

    def probes(self, now, own_address):
        """Return the addresses of the inactive peers to probe now, except for the own one.

        Oldest first; otherwise many dead peers could starve the live ones.  Of those never probed,
        the one that was heard of last.
        """
        waiting = sorted(self._roster.inactive(), key=lambda peer: (peer.probe.due_at, -peer.last_heard))
        # In a large cluster what others probe is enough, once there are others.
        most = max(1, self._fanout - len(self._roster.active)) if self.is_large() else self._fanout
        due = []
        for peer in waiting:
            if len(due) == most:
                break
            if peer.address != own_address and peer.probe.take(now, self._interval_s, self._rng):
                due.append(peer.address)
        return due

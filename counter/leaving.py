"""How a node leaves: it names an heir, says that it leaves, and hands over what it holds.

Pure: the clock is an argument, and waiting is done by Confirmations.
"""

import logging
from collections import namedtuple

from counter.confirmations import NOTHING_HELD
from counter.roster import ACTIVE, LOST
from counter.wire import ABSORBING

log = logging.getLogger("counter.replication")

RETRY_LOST_S = 0.5  # between two tries to hand over to a lost peer

# Whether all is handed over, how many increments no peer is known to hold, and the ids of the peers that hold all.
Handover = namedtuple("Handover", "complete left_over holders")


def all_absorb(table):
    """Return whether all active peers are known to understand who ended, and was absorbed."""
    return all(table.v_of(id) >= ABSORBING for id, _ in table.active())


class Leaving:
    """What a node does that stops in order.  end() and drain() are for one thread."""

    def __init__(self, counter, table, links, confirmations):
        self._counter, self._table, self._links, self._confirmations = counter, table, links, confirmations

    def end(self):
        """Make a peer the heir of this node, which counts nothing any more; return its id, None if there is none.

        The one that started last is likely to stay for longest.
        """
        if not all_absorb(self._table):
            log.info("stopping without an heir: a peer runs an older version, or its version is not known")
            return None
        heir = self._table.youngest(self._confirmations.vectors.keys() - {self._counter.replica})
        return heir if heir and self._counter.end(heir) else None

    def drain(self, clock, timeout_s):
        """Say to all peers that this node leaves, and hand over what it holds.

        Return a Handover.  Where no peer is active, those that are lost are tried until one of them holds everything.
        """
        self._table.leave()
        mine = self._counter.vector()  # what peers tell it from now on they hold anyway
        told, deadline = set(), clock() + timeout_s

        def is_over():
            return self._is_handed_over(mine) or not told.issuperset(id for id, _ in self._table.active())

        while True:
            # Some may leave as well, or turn out to have restarted, and then their successors are told.
            active = dict(self._table.active())
            new = [address for id, address in active.items() if id not in told]
            told.update(active)
            lost = [peer.address for peer in self._table.snapshot(clock()) if peer.state == LOST]
            self._links.send_heartbeats(new if active else lost, [], clock())
            left_s = deadline - clock()
            complete = self._is_handed_over(mine)
            if complete or left_s <= 0:
                peers = {peer.id for peer in self._table.snapshot(clock())}
                holders = {id for id in peers if self._holds(id, mine)}
                return Handover(complete, self._confirmations.held_by_none(mine, peers), holders)
            self._confirmations.wait(is_over, min(RETRY_LOST_S, left_s))

    def sender(self, asking, sender, lacks_something):
        """Return what an answer says of this node, which leaves, to a peer that asked by itself.

        One that cannot be dialled hears nothing else.  While it lacks something it is not told, so
        that it comes back and shows that it has got that.
        """
        if lacks_something:
            return sender._replace(leaving=False)
        if self._links.is_failing(asking.address):
            self._confirmations.knows_of_leaving(asking.id)
        return sender

    def _is_handed_over(self, mine):
        """Return whether all active peers hold `mine` and know that this node leaves.

        If none is active, return whether those that are lost hold it between them.
        """
        states = {peer.id: peer.state for peer in self._table.snapshot(0.0)}
        active = [id for id, state in states.items() if state == ACTIVE]
        if not active:
            return not states or not self._confirmations.held_by_none(mine, states.keys())
        return self._confirmations.know_of_leaving(active) and all(self._holds(id, mine) for id in active)

    def _holds(self, peer, mine):
        """Return whether a peer is known to hold all of a vector."""
        return not self._counter.lacks(self._confirmations.vectors.get(peer, NOTHING_HELD), mine)

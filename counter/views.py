"""Which peers a message shows, and who has left.  Pure, and not locked."""

from collections import deque
from itertools import islice
from operator import attrgetter

from counter.roster import ACTIVE
from counter.wire import View

# Peers in a message: the latest contacts, and all others in turn.  The chance of a false removal falls
# exponentially with this number: at 1,000 nodes with 10 % loss, 192 caused one in 10 minutes.
VIEW_MAX = 256
RECENT_MAX = 32  # of these, recent contacts: their beats are news to most other nodes
_ENTRY = attrgetter("entry")


class Views:
    """What the messages of a node say of other nodes: a part of the active peers, and departures."""

    def __init__(self):
        self._next = 0  # the index among the active peers at which the next view goes on
        self._contacts = deque(maxlen=RECENT_MAX)  # peers that were heard directly, the latest last
        self._departures = {}  # id -> (its last beat, until when to pass on that it left), the latest last

    def view(self, active):
        """Return the View of the next message, given a list of the active peers.

        They take turns, so each is shown about every N / VIEW_MAX messages.  Recent contacts are always
        included, since their beats are the freshest: gossip then needs half as many messages.
        """
        newest = islice(reversed(self._departures.items()), VIEW_MAX)
        return View(self._shown(active), [(id, beat) for id, (beat, _) in newest])

    def _shown(self, active):
        if len(active) <= VIEW_MAX:
            return list(map(_ENTRY, active))
        recent = [peer.entry for peer in self._contacts if peer.state == ACTIVE]
        start = self._next if self._next < len(active) else 0
        self._next = start + VIEW_MAX - len(recent)
        return recent + list(map(_ENTRY, active[start : self._next]))

    def contacted(self, peer):
        """Record that a peer was heard directly, with a new beat."""
        self._contacts.append(peer)

    def has_left(self, id):
        """Return whether messages say that this id has left."""
        return id in self._departures

    def left(self, id, beat, until):
        """Record that an id has left, with this beat as its last; pass it on until then."""
        self._departures.pop(id, None)  # so that it comes last
        self._departures[id] = beat, until

    def is_back(self, id):
        """Record that an id that has left is alive after all."""
        self._departures.pop(id, None)

    def expire(self, now):
        """Drop the departures that have been passed on for long enough."""
        self._departures = {id: (beat, until) for id, (beat, until) in self._departures.items() if now < until}

"""What a PeerTable knows of each peer, and the indexes over it.  Pure, and not locked."""

from collections import OrderedDict

from counter.probing import Probe

UNVERIFIED = "unverified"  # known from gossip only: not passed on, and not counted as a peer
ACTIVE = "active"
LOST = "lost"  # silent for longer than the failure timeout, also where it was unverified; probed until it answers
FORGOTTEN = "forgotten"  # only its tombstone is left

TOMBSTONES_MAX = 4096
SKEW_MAX_S = 1.0  # between wall clocks; more is reported


class Peer:
    """What is known of one replica id."""

    # One per peer, so keep it small.
    __slots__ = ("advanced_since_lost", "entry", "index", "last_heard", "probe", "skew_s", "state", "v", "version")

    def __init__(self, id, address, beat, now):
        # What a message says of it: (id, address, beat), the greatest beat known.  A tuple, so that a
        # part of the membership is copied without building it.
        self.entry = (id, address, beat)
        self.state = UNVERIFIED
        self.last_heard = now  # when it last proved to be alive
        self.index = None  # in Roster.active, while it is active
        self.advanced_since_lost = False  # its beat has risen since it was lost
        self.version = None  # of its program, as it said itself
        self.v = 0  # what it knows of messages: wire.VERSION there; 0 until it has said it
        self.skew_s = None  # by how much its wall clock is ahead of this node's, as of its latest answer
        self.probe = Probe()

    @property
    def id(self):
        return self.entry[0]

    @property
    def address(self):
        return self.entry[1]

    @property
    def beat(self):
        return self.entry[2]

    def compare_clock(self, ahead_s, took_s):
        """Take note of its wall clock, which in an answer that took so long was ahead: see PeerTable.compare_clocks."""
        before, self.skew_s = self.skew_s, ahead_s - took_s / 2
        room_s = SKEW_MAX_S + took_s / 2  # the answer may have taken all of the time, or none
        return self.skew_s if abs(self.skew_s) > room_s and (before is None or abs(before) <= SKEW_MAX_S) else None


class Roster:
    """All peers by id, by address, and those that are active.

    `owners` is the id that last answered at an address; it may be that of this very node.
    `tombstones` is the beat above which gossip may bring an id back: without them, stale gossip
    would resurrect a removed peer.
    """

    def __init__(self):
        self.peers = {}  # id -> Peer
        self.active = []  # the active ones of them in any order, so that some can be picked without a scan
        self.owners = {}  # address -> id
        self.tombstones = OrderedDict()  # id -> beat
        self.has_had_peers = False
        self._ids_at = {}  # address -> {id: None}, of the peers said to be there

    def add(self, id, address, beat, now):
        """Add a peer, unverified, and return it."""
        self.tombstones.pop(id, None)
        self.has_had_peers = True
        peer = self.peers[id] = Peer(id, address, beat, now)
        self._ids_at.setdefault(address, {})[id] = None
        return peer

    def move(self, peer, state):
        """Give a peer another state."""
        if peer.state == ACTIVE:
            last = self.active.pop()
            if last is not peer:
                self.active[peer.index], last.index = last, peer.index
        if state == ACTIVE:
            peer.index = len(self.active)
            self.active.append(peer)
        elif state == LOST:
            peer.advanced_since_lost = False
            peer.probe.reset()
        elif state == FORGOTTEN:
            del self.peers[peer.id]
            self._leave_address(peer)
            if self.owners.get(peer.address) == peer.id:
                del self.owners[peer.address]
            self.bury(peer.id, peer.beat)
        peer.state = state

    def bury(self, id, beat):
        """Leave a tombstone for an id: gossip does not bring it back without a greater beat."""
        self.tombstones[id] = beat
        if len(self.tombstones) > TOMBSTONES_MAX:
            self.tombstones.popitem(last=False)

    def update(self, peer, address, beat):
        """Record the address of a peer, and its beat."""
        if address != peer.address:
            self._leave_address(peer)
            self._ids_at.setdefault(address, {})[peer.id] = None
        peer.entry = (peer.id, address, beat)

    def _leave_address(self, peer):
        ids = self._ids_at[peer.address]
        del ids[peer.id]
        if not ids:
            del self._ids_at[peer.address]

    def beat_of(self, id):
        """Return the greatest beat known of an id, also of one that is gone; -1 if none is known."""
        peer = self.peers.get(id)
        return peer.beat if peer else self.tombstones.get(id, -1)

    def at(self, address):
        """Return the peers said to be at an address."""
        return [self.peers[id] for id in self._ids_at.get(address, ())]

    def owner(self, address):
        """Return the peer that last answered at an address, if it is still one; else None."""
        return self.peers.get(self.owners.get(address))

    def has_active(self, address):
        """Return whether an active peer is said to be at an address."""
        return any(peer.state == ACTIVE for peer in self.at(address))

    def inactive(self):
        """Return the peers that are not active; most often there are none."""
        if len(self.active) == len(self.peers):
            return []
        return [peer for peer in self.peers.values() if peer.state != ACTIVE]

    def forget_owners(self, kept):
        """Drop the owners of addresses that have stopped being peers, except for the id `kept`."""
        self.owners = {address: id for address, id in self.owners.items() if id in self.peers or id == kept}

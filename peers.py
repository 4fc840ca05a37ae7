"""Who is in the cluster.

PeerTable is pure: addresses, beats and states; what depends on time takes `now`, in seconds of
any clock that only moves forward.  Heartbeat is the one thread here: it sweeps the table.  This
file knows neither counters nor sockets; it says whom to contact, and others do so.

A node is its replica id; an address is only where an id last answered.  Every node raises its
own *beat* once an interval, and beats travel by gossip, so everyone notices a silent node without
asking it; counter/detector.py decides which peers have failed.

What a node sends in an interval does not grow with the cluster: beyond `fanout` peers it contacts
some at random, and a message carries a bounded part of the membership.  Gossip then takes a time
that grows with log N to reach everyone, so the failure timeout grows with it, and a peer that has
been silent for half of it is asked directly.  benchmarks/simulate.py measures all this.
"""

import logging
import random
import threading
import time
from collections import namedtuple

from counter.detector import Detector
from counter.own import Own
from counter.probing import Seeds
from counter.roster import ACTIVE, FORGOTTEN, LOST, UNVERIFIED, Roster
from counter.views import Views

log = logging.getLogger("counter.peers")

DEPARTURE_TIMEOUTS = 10  # how long a departure is passed on, in peer timeouts
CONFLICT = "advertises this node's address"  # a Change, as for two nodes behind one load balancer
CONFLICT_REPORT_S = 600.0  # between two reports of that
NEVER = float("inf")

Sweep = namedtuple("Sweep", "contact seeds changes")  # addresses, names to resolve, [Change]
Change = namedtuple("Change", "what id address")
# version, and skew_s, by how much its wall clock is ahead: None if it is not known
PeerState = namedtuple("PeerState", "id address state silent_s version skew_s")


def log_changes(changes, active):
    """Write one line for every change of the membership; `active` is how many peers are active after it."""
    for change in changes:
        level = logging.WARNING if change.what in ("lost", CONFLICT) else logging.INFO
        log.log(level, "peer %s: addr=%s id=%s active=%d", change.what, change.address, change.id, active)


class PeerTable:
    """The peers of one node.  Threads may call anything at any time.

    `address` is what this node tells peers, None until it is known; `seeds` are the addresses,
    by name or by number, through which it joins.
    """

    def __init__(
        self, replica, address, seeds, heartbeat_interval_s, peer_timeout_s, fanout, rng=random, wall=time.time
    ):
        self._interval_s, self._timeout_s = heartbeat_interval_s, peer_timeout_s
        self._fanout, self._rng, self._wall = fanout, rng, wall
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._own = Own(replica, address)
        self._roster = Roster()
        self._detector = Detector(self._roster, heartbeat_interval_s, peer_timeout_s, fanout, rng)
        self._views = Views()
        self._seeds = Seeds(seeds)
        self._conflict_reported_at = -NEVER

    @property
    def address(self):
        return self._own.address

    def advertise(self, address):
        """Set the address under which this node can be reached, unless it is known already."""
        with self._lock:
            self._own.address = self._own.address or address

    def rename(self, replica):
        """Take a new replica id; another node may go on under the old one, and is then a peer."""
        with self._lock:
            if replica != self._own.id:
                self._roster.bury(self._own.id, self._own.beat)
                self._own.id = replica

    def become_ready(self):
        """Announce in every message from now on that this node is ready."""
        with self._lock:
            self._own.ready = True

    def leave(self):
        """Announce in every message from now on that this node is leaving."""
        with self._lock:
            self._own.leaving = True
            self._own.beat += 1

    def describe(self):
        """Return what a message says of this node and of its peers: (Sender, View)."""
        with self._lock:
            return self._own.sender(self._wall()), self._views.view(self._roster.active)

    def sender(self):
        """Return what a message says of this node alone, as a Sender."""
        with self._lock:
            return self._own.sender(self._wall())

    def id_at(self, address):
        """Return the id that answers at an address, as far as is known, or None."""
        with self._lock:
            return self._roster.owners.get(address) or next((peer.id for peer in self._roster.at(address)), None)

    def v_of(self, id):
        """Return what a peer knows of messages, a wire.VERSION; 0 if it has not said so."""
        with self._lock:
            peer = self._roster.peers.get(id)
            return peer.v if peer else 0

    def active(self):
        """Return [(id, address)] of the active peers."""
        with self._lock:
            return [peer.entry[:2] for peer in self._roster.active]

    def youngest(self, ids):
        """Return the active peer, one of these ids, that started last as its beat tells; None if none is active."""
        with self._lock:
            found = [(peer.beat, peer.id) for peer in self._roster.active if peer.id in ids]
        return min(found)[1] if found else None

    @property
    def has_heard_of_peers(self):
        """Whether this node has ever heard of another one, directly or through gossip."""
        return self._roster.has_had_peers

    def present(self):
        """Return the ids of the active and unverified peers, except those that claim this node's address."""
        return list(self.others()[0])

    def others(self):
        """Return ({id: address} of the active and unverified peers, addresses of the lost), as present() has them."""
        with self._lock:
            peers = [peer for peer in self._roster.peers.values() if peer.address != self._own.address]
        present = {peer.id: peer.address for peer in peers if peer.state != LOST}
        return present, [peer.address for peer in peers if peer.state == LOST]

    @property
    def is_ready(self):
        """Whether this node has announced that it is ready."""
        return self._own.ready

    def seed_addresses(self):
        """Return all addresses that the seeds last resolved to."""
        with self._lock:
            return self._seeds.addresses()

    def choose(self, kept, most):
        """Return the addresses of up to `most` active peers: first those among `kept`, then random ones."""
        with self._lock:
            active = self._roster.active
            chosen = {address: None for address in kept if self._roster.has_active(address)}
            if len(chosen) == most < len(active):
                # All nodes first meet the seed they join through; without this, all would keep it.
                del chosen[self._rng.choice(list(chosen))]
            for peer in self._rng.sample(active, min(len(active), most + len(chosen))):
                if len(chosen) < most:
                    chosen[peer.address] = None
            return list(chosen)

    def snapshot(self, now):
        """Return a PeerState of every active and every lost peer."""
        with self._lock:
            listed = [peer for peer in self._roster.peers.values() if peer.state != UNVERIFIED]
            return [
                PeerState(peer.id, peer.address, peer.state, max(0.0, now - peer.last_heard), peer.version, peer.skew_s)
                for peer in listed
            ]

    def compare_clocks(self, asking, answering, took_s):
        """Take note of how wall clocks differ, given the Senders of a request and its answer, and how long that took.

        Return by how many seconds the peer's is ahead for certain, below 0 if it is behind, if that has come to
        be more than roster.SKEW_MAX_S; else None.
        """
        if asking.wall is None or answering.wall is None:
            return None
        with self._lock:
            peer = self._roster.peers.get(answering.id)
            return peer and peer.compare_clock(answering.wall - asking.wall, took_s)

    def resolved(self, name, addresses):
        """Record what a seed's name resolves to; return which of these addresses to contact."""
        with self._lock:
            self._seeds.resolved(name, addresses)
            # An address where this node answered, or a peer that advertises another one, may be a load
            # balancer's: a different node may answer there now.
            return [a for a in addresses if a != self._own.address and not self._roster.has_active(a)]

    # Once an interval.

    def sweep(self, now):
        """Raise the beat, drop failed peers, and return whom to contact now, as a Sweep."""
        with self._lock:
            self._own.beat += 1
            silent, lost = self._detector.look(now, self._own.address)
            self._roster.forget_owners(self._own.id)
            self._views.expire(now)
            probes = self._detector.probes(now, self._own.address)
            heartbeats = self._detector.heartbeats(silent, len(probes))
            eager = not self._own.ready  # it has to find those that hold the counts before the join timeout
            seeds = self._seeds.due(now, self._interval_s, self._rng, self._is_found_locked, eager)
            return Sweep(heartbeats + probes, seeds, [Change("lost", peer.id, peer.address) for peer in lost])

    def _is_found_locked(self, addresses):
        """Return whether an active peer answered at one of these addresses."""
        return any(peer and peer.state == ACTIVE for peer in map(self._roster.owner, addresses))

    # What messages say.

    def heard(self, sender, view, now, answered_at=None, took=True):
        """Take in what a message says; return (addresses to contact at once, [Change]).

        `answered_at` is the address that was contacted, if the message is an answer; the sender then owns that
        address.  If it `took` nothing it is not active yet: it may never have heard of this node.  A message
        proves its sender alive, since none is accepted twice; a beat greater than the known one proves others alive.
        """
        with self._lock:
            contact, changes = [], []
            if sender.id == self._own.id:
                if answered_at:
                    self._roster.owners[answered_at] = self._own.id
                return contact, changes
            self._heard_of_sender_locked(sender, now, answered_at, took, contact, changes)
            peer_of = self._roster.peers.get
            for entry in view.peers:  # this loop is most of the work in a large cluster
                peer = peer_of(entry[0])
                if peer is None:
                    self._heard_of_unknown_locked(entry, now, contact, changes)
                elif entry[2] > peer.entry[2]:  # else it is known already, as most is
                    peer.entry = entry if entry[1] == peer.entry[1] else (entry[0], peer.entry[1], entry[2])
                    if peer.state == ACTIVE:
                        peer.last_heard = now
                    else:
                        self._heard_of_inactive_locked(peer, now, contact, changes)
            for id, beat in view.left:
                self._departed_locked(id, beat, now, changes)
            contact = [address for address in dict.fromkeys(contact) if address != self._own.address]
            return contact[: self._fanout], changes

    def progress(self, id, now):
        """Take note that bytes of a long message pass from or to a peer: it is alive, though it says nothing else."""
        with self._lock:
            peer = self._roster.peers.get(id)
            if peer:
                peer.last_heard = max(peer.last_heard, now)

    def _heard_of_sender_locked(self, sender, now, answered_at, took, contact, changes):
        roster = self._roster
        if answered_at:
            self._claim_address_locked(answered_at, sender.id, changes)
        known_beat = roster.beat_of(sender.id)
        if sender.leaving:
            self._departed_locked(sender.id, max(sender.beat, known_beat), now, changes)
            return
        address = sender.address or answered_at
        if not address or (self._views.has_left(sender.id) and sender.beat <= known_beat):
            return  # sent before the node said that it leaves
        peer = roster.peers.get(sender.id) or roster.add(sender.id, address, sender.beat, now)
        roster.update(peer, address, max(known_beat, sender.beat))
        peer.last_heard, peer.version, peer.v = now, sender.version, sender.v
        self._views.is_back(peer.id)
        if sender.beat > known_beat:  # else there is nothing new to tell others
            self._views.contacted(peer)
        if address == self._own.address:
            self._report_conflict_locked(peer.id, now, changes)
        if peer.state == ACTIVE or not took:
            return
        owner = roster.owner(address)
        if not answered_at and owner and owner is not peer and owner.state == ACTIVE:
            contact.append(address)  # another peer answered there last: ask which one does now
            return
        self._activate_locked(peer, changes)

    def _report_conflict_locked(self, id, now, changes):
        """Report a peer that advertises this node's address: neither would ever dial the other."""
        if now - self._conflict_reported_at >= CONFLICT_REPORT_S:
            self._conflict_reported_at = now
            changes.append(Change(CONFLICT, id, self._own.address))

    def _claim_address_locked(self, address, id, changes):
        """Record that this id answered at an address, so no other id is there."""
        former = self._roster.owners.get(address)
        self._roster.owners[address] = id
        for peer in self._roster.at(address):
            if peer.id == id:
                continue
            if peer.id == former:
                changes.append(Change("restarted", peer.id, address))
            if peer.id == former or peer.state != ACTIVE:
                # If it is alive after all, its next message or a greater beat brings it back.
                self._roster.move(peer, FORGOTTEN)

    def _heard_of_inactive_locked(self, peer, now, contact, changes):
        """Record that gossip shows a greater beat of an inactive peer."""
        if self._detector.is_large() and (peer.state == UNVERIFIED or peer.advanced_since_lost):
            # There are too many peers to contact each; its beat has risen twice.
            peer.last_heard = now
            self._activate_locked(peer, changes)
        else:
            # One rise may be stale gossip; a second proves it alive (used only in large clusters).
            peer.advanced_since_lost = True
            if self._is_eager_locked():
                contact.append(peer.address)

    def _heard_of_unknown_locked(self, entry, now, contact, changes):
        id, address, beat = entry
        if id == self._own.id:
            self._own.outlive(beat)
        elif beat > self._roster.beat_of(id):
            if (
                address == self._own.address and id in self._roster.tombstones
            ):  # its beat rises, so it is no predecessor
                self._report_conflict_locked(id, now, changes)
            self._roster.add(id, address, beat, now)
            if self._is_eager_locked():
                contact.append(address)

    def _is_eager_locked(self):
        """Return whether to contact newly heard-of peers at once, rather than wait for their beat to rise."""
        return not self._detector.is_large() or len(self._roster.active) < self._fanout

    def _activate_locked(self, peer, changes):
        changes.append(Change("back" if peer.state == LOST else "joined", peer.id, peer.address))
        self._roster.move(peer, ACTIVE)

    def _departed_locked(self, id, beat, now, changes):
        """Record that an id has left, with this beat as its last."""
        if id == self._own.id:
            if not self._own.leaving:
                self._own.outlive(beat + 1)
            return
        peer, known_beat = self._roster.peers.get(id), self._roster.beat_of(id)
        if beat < known_beat or (beat == known_beat and not peer):
            return  # it has been alive since then, or this is known already
        if peer:
            if peer.state != UNVERIFIED:
                changes.append(Change("left", id, peer.address))
            self._roster.move(peer, FORGOTTEN)
        self._roster.bury(id, beat)
        self._views.left(id, beat, now + DEPARTURE_TIMEOUTS * self._timeout_s)


class Heartbeat:
    """The thread that sweeps a PeerTable once an interval, the first time at once.

    `contact(addresses, seeds)` is called after each sweep with whom to contact; it must not block.
    """

    def __init__(self, table, interval_s, contact, clock=time.monotonic):
        self._table, self._interval_s, self._contact, self._clock = table, interval_s, contact, clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self):
        self._thread.start()

    def stop(self, timeout_s):
        """Ask the thread to end, wait for it, and return whether it did."""
        self._stopping.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self):
        due = self._clock()
        while True:
            try:
                sweep = self._table.sweep(self._clock())
                if sweep.changes:
                    log_changes(sweep.changes, len(self._table.active()))
                self._contact(sweep.contact, sweep.seeds)
            except Exception:  # a dead thread would end the heartbeats in silence
                log.exception("heartbeat sweep failed")
            due = max(due + self._interval_s, self._clock())  # no burst of sweeps after a pause
            if self._stopping.wait(due - self._clock()):
                return

"""Who is in the cluster.

PeerTable is pure: addresses, beats and states; what depends on time takes `now`, in seconds of
any clock that only moves forward.  Heartbeat is the one thread here: it sweeps the table.  This
file knows neither counters nor sockets; whom to contact it says, and others do it.

A node is its replica id; an address is only where an id last answered.  Every node raises its
own *beat* once an interval, and beats travel by gossip, so that a silent node is noticed by
everyone without everyone asking it (van Renesse, Minsky, Hayden, "A Gossip-Style Failure
Detection Service", 1998).  A node that sweeps late forgives the others its own lateness
(Dadgar, Phillips, Currey, "Lifeguard", 2017).

What a node sends in an interval does not grow with the cluster: beyond `fanout` peers it contacts
some at random, and a message carries a bounded part of the membership.  News then needs a time
that grows with log N to go round, so the allowed silence grows with it, and whoever is silent for
half of that is asked directly before it is given up.  benchmarks/simulate.py measures all this.
"""

import itertools
import logging
import math
import random
import threading
import time
from collections import OrderedDict, deque, namedtuple

from counter import __version__
from counter.wire import Sender, View

log = logging.getLogger("counter.peers")

RUMOURED = "rumoured"  # known from others only: not gossiped on, not counted as there
ACTIVE = "active"
LOST = "lost"  # silent for too long; probed until it answers

PROBE_INTERVAL_MAX_S = 10.0
MET_SEED_INTERVAL_S = 30.0  # between two looks at where a seed leads through which somebody was met
LOST_MAX = 64  # lost peers probed for ever; older ones are forgotten
GONE_MAX = 4096  # ids remembered so that late rumours of them revive nobody
# Peers in a message: the latest met, and all others in turn.  The chance not to have heard of a peer for so
# long falls with e to the power of it: at 1,000 nodes with 10 % loss, 192 had one removed in 10 minutes.
VIEW_MAX = 256
MET_MAX = 32  # of these, peers met directly: what is known of them is new to most
PATIENCE = 3.0  # intervals of allowed silence per power of ten of the cluster's size, beyond the fan-out
LEFT_NEWS_TIMEOUTS = 10  # how long a departure is passed on, in peer timeouts
NEVER = float("inf")

Sweep = namedtuple("Sweep", "contact seeds changes")  # addresses, names to resolve, [Change]
Change = namedtuple("Change", "what id address")
PeerState = namedtuple("PeerState", "id address state silent_s version")  # version: None if it is not known


def log_changes(changes, active):
    """Write one line for every change of the membership; `active` is how many peers are active after it."""
    for change in changes:
        level = logging.WARNING if change.what == "lost" else logging.INFO
        log.log(level, "peer %s: addr=%s id=%s active=%d", change.what, change.address, change.id, active)


class _Probe:
    """When to try somebody next who is not active: at intervals that grow to 10 s."""

    __slots__ = ("_tries", "at")  # there is one for every peer, as of the next class

    def __init__(self):
        self.at = 0.0
        self._tries = 0

    def reset(self):
        self.at, self._tries = 0.0, 0

    def take(self, now, interval_s, rng):
        """Return whether a try is due; if so the next one is later."""
        if now < self.at:
            return False
        wait_s = min(PROBE_INTERVAL_MAX_S, interval_s * 1.5 ** min(self._tries, 30))
        self._tries += 1
        self.at = now + wait_s * rng.uniform(0.8, 1.0)  # nodes that lost each other try out of step
        return True


class _Peer:
    __slots__ = ("address", "heard", "id", "place", "probe", "risen", "state", "version")

    def __init__(self, id, address, now):
        self.id, self.address = id, address
        self.state = RUMOURED
        self.heard = now  # when it last proved to be alive
        self.place = None  # its index in PeerTable._roll and _news while it is active
        self.risen = False  # its beat has risen since it was lost
        self.version = None  # of its program, as it said itself
        self.probe = _Probe()


class _Seed:
    def __init__(self, name):
        self.name = name
        self.addresses = ()  # what the name last resolved to
        self.looked_up = -NEVER  # when that was last asked for
        self.probe = _Probe()


class PeerTable:
    """The peers of one node.  Threads may call anything at any time.

    `address` is what this node tells peers, None until it is known; `seeds` are the addresses,
    by name or by number, through which it joins.
    """

    def __init__(self, replica, address, seeds, heartbeat_interval_s, peer_timeout_s, fanout, rng=random):
        self._interval_s, self._timeout_s = heartbeat_interval_s, peer_timeout_s
        self._fanout, self._rng = fanout, rng
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._id, self._address, self._beat, self._leaving = replica, address, 0, False
        self._peers = {}  # id -> _Peer
        # id -> the greatest beat known of each of them.  Most that a message says is known already, and
        # to find that out is most of the work in a large cluster: one look-up, without the _Peer.
        self._beat_of = {}
        # The active ones of them in any order, to pick some without a look at all; and beside each what
        # a message says of it: (id, address, beat), so that a part of the membership is a slice.
        self._roll, self._news = [], []
        self._shown = 0  # the index there at which the next view goes on
        self._met = deque(maxlen=MET_MAX)  # the peers met directly, the latest last
        self._ids_at = {}  # address -> {id: None} of the peers said to be there
        self._answered = {}  # address -> the id that last answered there directly
        self._gone = OrderedDict()  # id -> the beat above which it may return: NEVER, or its last
        self._left = {}  # id that said leave -> until when to pass that on
        self._disowned = None  # the own id, once somebody has left under it
        self._seeds = [_Seed(name) for name in dict.fromkeys(seeds)]
        self._swept = None

    @property
    def address(self):
        return self._address

    @property
    def disowned(self):
        """The id of this node if somebody left under it: a clone, or itself before it was set back; else None."""
        return self._disowned

    def advertise(self, address):
        """Say under which address this node can be reached, unless that is known already."""
        with self._lock:
            self._address = self._address or address

    def rename(self, replica):
        """Take on a new replica id; the old one may be that of another node, which goes on under it."""
        with self._lock:
            self._forget_locked(self._id, self._beat)
            self._id, self._disowned = replica, None

    def leave(self):
        """Say from now on, in every message, that this node is leaving."""
        with self._lock:
            self._leaving = True
            self._beat += 1

    def describe(self):
        """Return what a message says of this node and of those it knows: (Sender, View)."""
        with self._lock:
            left = list(itertools.islice(reversed(self._left), VIEW_MAX))
            return self._sender_of_locked(), View(self._shown_locked(), left)

    def sender(self):
        """Return what a message says of this node alone, as a Sender."""
        with self._lock:
            return self._sender_of_locked()

    def _sender_of_locked(self):
        return Sender(self._id, self._address, self._beat, self._leaving, __version__)

    def _shown_locked(self):
        """Return what a message says of the active peers: of all, or of some.

        In turn, everyone is shown by everyone every N / VIEW_MAX messages or so.  The latest met come
        along, since their beats are the freshest there are: that spreads news in half the messages.
        """
        if len(self._news) <= VIEW_MAX:
            return self._news.copy()
        met = [self._news[peer.place] for peer in self._met if peer.state == ACTIVE]
        start = self._shown if self._shown < len(self._news) else 0
        self._shown = start + VIEW_MAX - len(met)
        return met + self._news[start : self._shown]

    def id_at(self, address):
        """Return the id that answers at an address, or most likely does; None if none is known there."""
        with self._lock:
            return self._answered.get(address) or next(iter(self._ids_at.get(address, ())), None)

    def active(self):
        """Return [(id, address)] of the active peers."""
        with self._lock:
            return [(peer.id, peer.address) for peer in self._roll]

    def choose(self, kept, most):
        """Return the addresses of that many active peers: those of `kept` that are, then random ones."""
        with self._lock:
            chosen = {address: None for address in kept if self._is_active_locked(address)}
            if len(chosen) == most < len(self._roll):
                # All are first told of the seed they join through.  It is not to be kept by all.
                del chosen[self._rng.choice(list(chosen))]
            for peer in self._rng.sample(self._roll, min(len(self._roll), most + len(chosen))):
                if len(chosen) < most:
                    chosen[peer.address] = None
            return list(chosen)

    def _is_active_locked(self, address):
        return any(self._peers[id].state == ACTIVE for id in self._ids_at.get(address, ()))

    def snapshot(self, now):
        """Return a PeerState of every active and every lost peer."""
        with self._lock:
            listed = [peer for peer in self._peers.values() if peer.state != RUMOURED]
            return [
                PeerState(peer.id, peer.address, peer.state, max(0.0, now - peer.heard), peer.version)
                for peer in listed
            ]

    def sweep(self, now):
        """Raise the beat, drop the silent, and return whom to contact now, as a Sweep."""
        with self._lock:
            changes = []
            self._forgive_lateness_locked(now)
            self._beat += 1
            patience_s = self._patience_s_locked()
            silent = []  # so far active
            for peer in list(self._peers.values()):
                if now - peer.heard > patience_s / 2 and peer.state == ACTIVE:
                    silent.append(peer)
                if now - peer.heard > patience_s:
                    if peer.state == ACTIVE:
                        self._deactivate_locked(peer, LOST)
                        peer.risen = False
                        peer.probe.reset()
                        changes.append(Change("lost", peer.id, peer.address))
                    elif peer.state == RUMOURED:
                        self._forget_locked(peer.id)
            lost = sorted((peer for peer in self._others_locked() if peer.state == LOST), key=lambda peer: peer.heard)
            for peer in lost[:-LOST_MAX]:
                self._forget_locked(peer.id)
            self._answered = {a: id for a, id in self._answered.items() if id in self._peers or id == self._id}
            self._left = {id: until for id, until in self._left.items() if now < until}
            probes = self._probes_locked(now)
            beats = self._beats_locked([peer for peer in silent if peer.state == ACTIVE], len(probes))
            return Sweep(beats + probes, self._due_seeds_locked(now), changes)

    def _patience_s_locked(self):
        """Return for how long a peer may be silent: what reaches fewer than all takes its time."""
        if not self._large_locked():
            return self._timeout_s
        return max(self._timeout_s, PATIENCE * math.log10(len(self._peers) + 1) * self._interval_s)

    def _large_locked(self):
        """Return whether there are too many peers to contact each of them in every interval."""
        return len(self._peers) > self._fanout

    def _forgive_lateness_locked(self, now):
        # Whoever was stopped or starved cannot tell its own silence from that of the others.
        # A tenth of an interval is the ordinary unevenness of a thread's waking up.
        late_s = now - self._swept - 1.1 * self._interval_s if self._swept is not None else 0
        self._swept = now
        if late_s > 0:
            for peer in self._peers.values():
                peer.heard = min(now, peer.heard + late_s)  # some were heard again before this sweep

    def _beats_locked(self, silent, probes):
        """Return the addresses of the peers that get a heartbeat in this sweep, beside that many probes.

        The `silent`, of whom gossip has said nothing new for half of what is allowed, are asked before
        others, so that no unlucky one is given up unasked.  They get a quarter of the fan-out
        only: in a partition half of all fall silent at once, and the others must hear of each other.
        """
        if len(self._roll) <= self._fanout:
            return [peer.address for peer in self._roll]
        most = max(1, self._fanout // 4)
        silent = sorted(silent, key=lambda peer: peer.heard)[: 4 * most]  # some of them may be dead
        asked = self._rng.sample(silent, min(most, len(silent)))
        picked = asked + self._rng.sample(self._roll, self._fanout)
        addresses = list(dict.fromkeys(peer.address for peer in picked))
        return addresses[: max(1, self._fanout - probes)]

    def _probes_locked(self, now):
        """Return the addresses of lost and rumoured peers whose turn it is.

        Who has waited longest comes first, or the dead, if they are many, could keep the living from
        ever being tried; of those never tried, who was heard of last.
        """
        waiting = sorted(self._others_locked(), key=lambda peer: (peer.probe.at, -peer.heard))
        # In a large cluster what others probe is enough, once there are others.
        most = max(1, self._fanout - len(self._roll)) if self._large_locked() else self._fanout
        due = []
        for peer in waiting:
            if len(due) == most:
                break
            if peer.address != self._address and peer.probe.take(now, self._interval_s, self._rng):
                due.append(peer.address)
        return due

    def _due_seeds_locked(self, now):
        """Return the names of the seeds to look up now.

        One through which a peer was met is looked up again now and then: it may lead to others as
        well, whom nobody here has met, because they started beyond a partition.
        """
        due = []
        for seed in self._seeds:
            peers = [self._peers.get(id) for id in self._answerers_locked(seed)]
            met = any(peer and peer.state == ACTIVE for peer in peers)
            if met:
                seed.probe.reset()
                is_due = now - seed.looked_up >= MET_SEED_INTERVAL_S
            else:
                is_due = seed.probe.take(now, self._interval_s, self._rng)
            if is_due:
                seed.looked_up = now
                due.append(seed.name)
        return due

    def resolved(self, name, addresses):
        """Take note of what a seed's name resolves to; return which of these addresses to contact."""
        with self._lock:
            for seed in self._seeds:
                if seed.name == name:
                    seed.addresses = tuple(addresses)
            # Where a peer answered that says it is elsewhere, or this node, another may answer now: it may
            # be a load balancer's address.
            return [a for a in addresses if a != self._address and not self._is_active_locked(a)]

    def heard(self, sender, view, now, answered_at=None):
        """Take in what a message says; return (addresses to contact at once, [Change]).

        `answered_at` is the address that was contacted, if the message is an answer.  An answer
        proves its sender to be alive, and the owner of that address; a message that came by
        itself proves it by a greater beat, since an equal one may be a replay.
        """
        with self._lock:
            contact, changes = [], []
            if sender.id == self._id:
                if answered_at:
                    self._answered[answered_at] = self._id
                return contact, changes
            self._sender_locked(sender, now, answered_at, contact, changes)
            beat_of = self._beat_of.get
            for news in view.peers:
                if news[2] > beat_of(news[0], -1):
                    self._rumour_locked(news, now, contact, changes)
            if self._id in view.left and not self._leaving:
                self._disowned = self._id
            for id in view.left:
                self._departure_locked(id, now, changes)
            contact = [address for address in dict.fromkeys(contact) if address != self._address]
            return contact[: self._fanout], changes

    def _sender_locked(self, sender, now, answered_at, contact, changes):
        if answered_at:
            self._owner_locked(answered_at, sender.id, changes)
        if sender.leaving:
            self._departure_locked(sender.id, now, changes)
        peer = self._peers.get(sender.id)
        known_beat = self._beat_of[sender.id] if peer else self._gone.get(sender.id, -1)
        address = sender.address or answered_at
        if known_beat == NEVER and not sender.leaving:
            self._left[sender.id] = now + LEFT_NEWS_TIMEOUTS * self._timeout_s  # for the sender to hear of
        if known_beat == NEVER or not address or not (answered_at or sender.beat > known_beat):
            return
        if peer is None:
            peer = self._meet_locked(sender.id, address, sender.beat, now)
        self._place_locked(peer, address)
        self._beat_of[peer.id], peer.heard, peer.version = max(known_beat, sender.beat), now, sender.version
        self._met.append(peer)
        if peer.state == ACTIVE:
            self._news[peer.place] = self._news_of_locked(peer)
            return
        owner = self._peers.get(self._answered.get(address))
        if not answered_at and owner and owner is not peer and owner.state == ACTIVE:
            contact.append(address)  # somebody else answered there: who does now?
            return
        changes.append(Change("back" if peer.state == LOST else "joined", peer.id, peer.address))
        self._activate_locked(peer)

    def _owner_locked(self, address, id, changes):
        """Take note that this id answered at an address: no other one lives there."""
        former = self._answered.get(address)
        self._answered[address] = id
        others = [self._peers[other] for other in self._ids_at.get(address, ()) if other != id]
        for peer in others:
            if peer.id == former:
                changes.append(Change("restarted", peer.id, address))
            if peer.id == former or peer.state != ACTIVE:
                # Only a greater beat can bring it back: if it lives after all, it has one.
                self._forget_locked(peer.id)

    def _rumour_locked(self, news, now, contact, changes):
        """Take in (id, address, beat) with a beat that is greater than the one known, or of an unknown id."""
        id, address, beat = news
        peer = self._peers.get(id)
        if peer is None:
            if id == self._id or beat <= self._gone.get(id, -1):
                return
            self._meet_locked(id, address, beat, now)
            if self._eager_locked():
                contact.append(address)
            return
        self._beat_of[id] = beat
        if peer.state == ACTIVE:
            peer.heard = now
            self._news[peer.place] = news if address == peer.address else self._news_of_locked(peer)
        elif self._large_locked() and (peer.state == RUMOURED or peer.risen):
            # Too many to contact everyone.  Somebody has heard it beat, and again just now.
            changes.append(Change("back" if peer.state == LOST else "joined", id, peer.address))
            peer.heard = now
            self._activate_locked(peer)
        else:
            peer.risen = True  # once may be an old rumour, late; and twice is a proof in a large cluster
            if self._eager_locked():
                contact.append(peer.address)

    def _eager_locked(self):
        """Return whether to contact who is heard of; with enough peers to talk to, their beats can rise first."""
        return not self._large_locked() or len(self._roll) < self._fanout

    def _meet_locked(self, id, address, beat, now):
        """Return the new peer with that id."""
        self._gone.pop(id, None)
        peer = self._peers[id] = _Peer(id, address, now)
        self._beat_of[id] = beat
        self._place_locked(peer, address)
        return peer

    def _news_of_locked(self, peer):
        return peer.id, peer.address, self._beat_of[peer.id]

    def _departure_locked(self, id, now, changes):
        if id == self._id or self._gone.get(id) == NEVER:
            return
        peer = self._peers.get(id)
        if peer and peer.state != RUMOURED:
            changes.append(Change("left", id, peer.address))
        self._left[id] = now + LEFT_NEWS_TIMEOUTS * self._timeout_s
        self._forget_locked(id, NEVER)

    def _forget_locked(self, id, beat=None):
        """Drop a peer, if it is one; its id may return above that beat, or else above its last."""
        last_beat = self._beat_of.pop(id, 0)
        peer = self._peers.pop(id, None)
        if peer:
            if peer.state == ACTIVE:
                self._deactivate_locked(peer, LOST)
            self._place_locked(peer, None)
            if self._answered.get(peer.address) == id:
                del self._answered[peer.address]
        self._gone[id] = last_beat if beat is None else beat
        if len(self._gone) > GONE_MAX:
            self._gone.popitem(last=False)

    def _activate_locked(self, peer):
        peer.state, peer.place = ACTIVE, len(self._roll)
        self._roll.append(peer)
        self._news.append(self._news_of_locked(peer))

    def _deactivate_locked(self, peer, state):
        peer.state = state
        last, news = self._roll.pop(), self._news.pop()
        if last is not peer:
            self._roll[peer.place], self._news[peer.place], last.place = last, news, peer.place

    def _place_locked(self, peer, address):
        """Take note that a peer is at an address, or with None that it is nowhere any more."""
        if address == peer.address and peer.id in self._ids_at.get(address, ()):
            return
        former = self._ids_at.get(peer.address, {})
        former.pop(peer.id, None)
        if not former:
            self._ids_at.pop(peer.address, None)
        if address is not None:
            peer.address = address
            self._ids_at.setdefault(address, {})[peer.id] = None

    def _others_locked(self):
        """Return the peers that are not active; most often there are none."""
        if len(self._roll) == len(self._peers):
            return []
        return [peer for peer in self._peers.values() if peer.state != ACTIVE]

    def _answerers_locked(self, seed):
        return {self._answered[address] for address in seed.addresses if address in self._answered}


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

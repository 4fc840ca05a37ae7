"""Version vectors, {replica: sequence}: what a node holds, and how two nodes compare it.

Most replicas are gone for good, and their entries never change again.  A Vector keeps these apart,
as its *settled* part, which all vectors made from it share.  Between nodes a vector travels as a
Summary: the entries that changed lately, and one hash for all others.  A node that gets it takes the
same entries off its own vector and hashes the rest.  If the hashes agree, it knows the whole vector
of its peer.  So what a heartbeat says, and what it costs, does not grow with the past of the cluster.
A peer may lag behind: so a node also tries the settled parts that it had a while ago.

Source: Bellare, Micciancio, "A New Paradigm for Collision-Free Hashing: Incrementality at Reduced
Cost" (1997), for a hash that is the sum of the hashes of all entries (AdHash).
"""

import hashlib
from array import array
from bisect import bisect_left
from collections import namedtuple
from collections.abc import Mapping
from functools import lru_cache

from counter.ids import replica_bits, replica_of

SETTLING_S = 60.0  # an entry that did not change for so long, and twice that at most, is settled
CROWD = 256  # entries that changed; of more, as after a join, those that did not change for CROWDED_S are settled
CROWDED_S = 1.0
EARLIER = 16  # settled parts that are remembered
HASH_BITS = 128

# What a message says of a vector: `recent` are some of its entries, {replica: sequence}, 0 for what is
# not held; `rest` is the hash of all others, 0 if there are none.
Summary = namedtuple("Summary", "rest recent")


def lacks(vector, other):
    """Return whether a node that holds `vector` lacks something that `other` shows."""
    return bool(Vector.of(other).beyond(vector))


class Vector(Mapping):
    """A version vector that never changes.  `recent` takes precedence over `settled`; 0 is an entry that is gone.

    `earlier` are the settled parts that the node had before, the latest first.
    """

    __slots__ = ("_digest", "_earlier", "_recent", "_settled")

    def __init__(self, recent, settled=None, earlier=()):
        self._recent, self._settled, self._earlier = recent, settled or NOTHING, earlier
        self._digest = None  # once it is needed

    @classmethod
    def of(cls, entries):
        """Return a Vector with the entries of a mapping."""
        return entries if type(entries) is cls else cls(entries)

    def get(self, replica, default=0):
        sequence = self._recent.get(replica)
        if sequence is None:
            sequence = self._settled.get(replica)
        return sequence or default

    def __getitem__(self, replica):
        if sequence := self.get(replica):
            return sequence
        raise KeyError(replica)

    def __iter__(self):
        yield from (replica for replica, sequence in self._recent.items() if sequence)
        yield from (replica for replica in self._settled if replica not in self._recent)

    def __len__(self):
        held, replaced = sum(map(bool, self._recent.values())), sum(map(bool, map(self._settled.get, self._recent)))
        return len(self._settled) + held - replaced

    def __eq__(self, other):
        return not self.differing(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None

    def __repr__(self):
        return f"Vector({dict(self)})"

    def updated(self, entries):
        """Return this vector with other entries for some replicas."""
        return Vector({**self._recent, **entries}, self._settled, self._earlier)

    def differing(self, other):
        """Return the replicas whose entries differ, a set.  That is quick where the settled parts are related."""
        if self is other:
            return set()
        other = Vector.of(other)
        replicas = {replica for replica, _ in self._recent.items() ^ other._recent.items()}
        if self._settled is not other._settled:
            replicas |= self._resettled(other)
        return {replica for replica in replicas if self.get(replica) != other.get(replica)}

    def _resettled(self, other):
        """Return all replicas whose settled entries differ, and perhaps others, a set."""
        for later, settled in ((self, other._settled), (other, self._settled)):
            if settled in later._earlier:
                between = later._settled, *later._earlier[: later._earlier.index(settled)]
                if all(one.changed is not None for one in between):
                    return {replica_of(bits) for one in between for bits in one.changed}
        return self._settled.differing(other._settled)

    def beyond(self, other):
        """Return [(replica, sequence, sequence in the other)] of the entries that are greater here than there."""
        entries = ((replica, self.get(replica), other.get(replica, 0)) for replica in self.differing(other))
        return [(replica, mine, its) for replica, mine, its in entries if mine > its]

    # What messages say of it.

    def summary(self, listed=()):
        """Return the Summary that lists the recent entries and those of some more replicas."""
        recent = self._recent | {replica: self.get(replica) for replica in listed}
        return Summary(self._hash_without(recent), recent)

    def digest(self):
        """Return the Summary that lists nothing: enough for a peer that holds the same."""
        if self._digest is None:
            self._digest = Summary(self._hash_without(()), {})
        return self._digest

    def listing(self):
        """Return the Summary that lists all entries."""
        entries = self._settled.as_dict() | self._recent
        return Summary(0, {replica: sequence for replica, sequence in entries.items() if sequence})

    def completed(self, summary):
        """Return the vector that a Summary is of; None if its other entries are not, or were not, the same here."""
        if not summary.rest:
            return self._like(summary.recent)
        if not summary.recent:
            return self if summary == self.digest() else None
        if self._hash_without(summary.recent) == summary.rest:
            return self.updated(summary.recent)
        for settled in (self._settled, *self._earlier):
            if settled.hash_without(summary.recent) == summary.rest:
                return Vector(summary.recent, settled)
        return None

    def _like(self, entries):
        """Return the vector with these entries, on the settled part of this one if most are in there.

        Then comparing the two is quick from now on.
        """
        if not len(self._settled) < 2 * len(entries) < 4 * len(self._settled):
            return Vector(entries)
        settled = self._settled.as_dict()
        recent = dict(entries.items() - settled.items()) | dict.fromkeys(settled.keys() - entries.keys(), 0)
        return Vector(recent, self._settled) if 2 * len(recent) < len(entries) else Vector(entries)

    def _hash_without(self, replicas):
        """Return the hash of the entries of all replicas but these."""
        rest = self._recent.keys() - replicas
        hash = sum(_hash(replica, self._recent[replica]) for replica in rest)
        return (hash + self._settled.hash_without([*rest, *replicas])) % 2**HASH_BITS


class _Run(namedtuple("_Run", "bits sequences")):
    """Some entries in two columns, ordered by the bits of their replica ids; a sequence of 0: it is gone."""

    __slots__ = ()

    @classmethod
    def of(cls, entries):
        """Return the run with the entries of a mapping {bits: sequence}."""
        bits = sorted(entries)
        return cls(array("Q", bits), array("Q", map(entries.__getitem__, bits)))

    def get(self, bits):
        """Return the sequence of a replica, None if the run does not have it."""
        place = bisect_left(self.bits, bits)
        return self.sequences[place] if place < len(self.bits) and self.bits[place] == bits else None


class _Settled:
    """Entries that never change, 16 bytes each; `hash` is that of all of them.

    They are in runs, of which a later one takes precedence and is at most a quarter as long.  What is updated
    shares most runs with what it was made from; `changed` has the bits of the replicas that were updated then,
    or None if they were many.
    """

    __slots__ = ("_length", "_runs", "changed", "hash")

    def __init__(self, runs, length, hash, changed=None):
        self._runs, self._length, self.hash, self.changed = runs, length, hash, changed

    def __len__(self):
        return self._length

    def __iter__(self):
        return iter(self.as_dict())

    def as_dict(self):
        """Return all entries as {replica: sequence}."""
        found = {}
        for run in self._runs:
            found.update(zip(run.bits, run.sequences, strict=True))
        return {replica_of(bits): sequence for bits, sequence in found.items() if sequence}

    def get(self, replica):
        """Return the sequence of a replica, 0 if it has none."""
        return self._find(replica_bits(replica)) if self._runs else 0

    def _find(self, bits):
        for run in reversed(self._runs):
            sequence = run.get(bits)
            if sequence is not None:
                return sequence
        return 0

    def hash_without(self, replicas):
        """Return the hash of the entries of all replicas but these."""
        left_out = sum(_hash(replica, self.get(replica)) for replica in replicas) if self._runs else 0
        return (self.hash - left_out) % 2**HASH_BITS

    def updated(self, entries):
        """Return these entries with others for some replicas, {replica: sequence}; 0 drops one."""
        new, length, hash = {}, self._length, self.hash
        for replica, sequence in entries.items():
            bits = replica_bits(replica)
            before = self._find(bits)
            new[bits] = sequence
            length += bool(sequence) - bool(before)
            hash += _hash(replica, sequence) - _hash(replica, before)
        runs, changed = list(self._runs), array("Q", new) if len(new) < self._length else None
        while runs and len(runs[-1].bits) < 4 * len(new):
            new = {**dict(zip(*runs.pop(), strict=True)), **new}
        if not runs:
            new = {bits: sequence for bits, sequence in new.items() if sequence}
        return _Settled((*runs, _Run.of(new)), length, hash % 2**HASH_BITS, changed)

    def differing(self, other):
        """Return the replicas whose entries differ, a set."""
        mine, its = ({id(run): run for run in one._runs} for one in (self, other))
        changed = {bits for key in mine.keys() ^ its.keys() for bits in (mine.get(key) or its[key]).bits}
        return {replica_of(bits) for bits in changed if self._find(bits) != other._find(bits)}


NOTHING = _Settled((), 0, 0)


class _Generations:
    """Replicas whose entries changed lately, in two generations: so nothing has to be remembered per replica."""

    def __init__(self):
        self.young, self.old = set(), set()
        self._turned_at = -float("inf")

    def __contains__(self, replica):
        return replica in self.young or replica in self.old

    def is_over(self, now, after_s):
        """Return whether the young generation is as old as that."""
        return now - self._turned_at >= after_s

    def turn(self, now):
        """Begin a new generation."""
        self.young, self.old, self._turned_at = set(), self.young, now


class Changes:
    """Which replicas changed lately, and so what of a vector is settled.  Not for several threads at once.

    A crowd of new entries settles soon.  An entry that was there before will likely change again, as it is that of an
    active node: if it settled with the crowd, at different times on different nodes, their settled parts would differ.

    `own` is the replica that counts here, which never settles; held(replica) returns the sequence of any, 0 if none.
    """

    def __init__(self):
        self._new, self._changed = _Generations(), _Generations()
        self._settled, self._earlier = NOTHING, ()

    def touch(self, replica):
        """Take note that the entry of a replica is about to change, or to go."""
        if replica in self._new or replica in self._changed or self._settled.get(replica):
            self._changed.young.add(replica)  # first, as there may be no memory for it
            self._new.young.discard(replica)
            self._new.old.discard(replica)
        else:
            self._new.young.add(replica)

    def _lately(self):
        """Return the replicas whose entries are not settled."""
        return self._new.young | self._new.old | self._changed.young | self._changed.old

    def vector(self, own, held):
        """Return the Vector as it is now."""
        recent = {replica: held(replica) for replica in {own, *self._lately()}}
        gone = {replica for replica, sequence in recent.items() if not sequence and not self._settled.get(replica)}
        return Vector({replica: recent[replica] for replica in recent.keys() - gone}, self._settled, self._earlier)

    def settle(self, own, held):
        """Settle all that has changed: it was read from a file, and will not change soon."""
        self._settle(self._lately() - {own}, held)
        self._new, self._changed = _Generations(), _Generations()

    def grow_older(self, own, held, now):
        """Settle what has not changed for a while; return whether there was anything."""
        is_crowd = max(len(self._new.young), len(self._new.old)) > CROWD
        ages = (self._new, CROWDED_S if is_crowd else SETTLING_S), (self._changed, SETTLING_S)
        over = [generations for generations, after_s in ages if generations.is_over(now, after_s)]
        quiet = {replica for generations in over for replica in generations.old - generations.young} - {own}
        self._settle(quiet, held)  # first, as there may be no memory for it
        for generations in over:
            generations.turn(now)
        return bool(quiet)

    def _settle(self, quiet, held):
        if quiet:
            settled = self._settled.updated({replica: held(replica) for replica in quiet})
            self._settled, self._earlier = settled, (self._settled, *self._earlier)[:EARLIER]


@lru_cache(4096)
def _hash(replica, sequence):
    """Return the hash of an entry as a number; that of one that is not held is 0."""
    if not sequence:
        return 0
    return int.from_bytes(hashlib.sha256(f"{replica} {sequence}".encode()).digest()[: HASH_BITS // 8], "big")

"""The replicated counter: what a node counts, and how it takes over what others counted.

Pure: no socket, no thread, no clock.  Every replica (one life of one process) numbers the
increments it accepts 1, 2, 3, …; the pair (replica, sequence) is a *dot* and, written as a
UUIDv8, the id of the increment.  Counter keeps per replica the running total of every counter
it touched, and one invariant: **of every replica it holds an exact prefix of the history.**
Whether an increment was seen before is one comparison with the length of that prefix, so what
a node remembers does not grow with the number of increments.

Idempotency keys are remembered for a while, and travel with the increments they came with.  A
key that two nodes took which could not talk is counted twice until somebody holds both dots:
then the smaller one stays, and the larger is *cancelled* by an increment of minus its amount,
under a replica id derived from it, so that everyone who notices writes the very same.

Sources: Almeida, Shoker, Baquero, "Delta State Replicated Data Types" (2018), for deltas and
the causal condition on merging them; RFC 9562 section 5.8 for UUIDv8.
"""

import bisect
import hashlib
import heapq
import re
import secrets
import threading
from collections import OrderedDict, namedtuple

AMOUNT_MAX = 2**53 - 1  # what a double holds exactly, and so every JSON parser
SEQUENCE_MAX = 2**62 - 1  # the bits a UUIDv8 leaves behind its variant
NAME = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9._:-]{1,128}\Z")  # clients rewrite the paths /. and /..
REPLICA = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}\Z")
_INCREMENT_ID = re.compile(r"([0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3})-([89ab][0-9a-f]{3})-([0-9a-f]{12})\Z")

# What `Counter.merge` found a delta to be.
APPLIED = "applied"  # some of it was new, and all of it holds now
HELD = "held"  # all of it was held already
GAP = "gap"  # it begins after the end of what is held
NEEDS = "needs"  # it cancels increments that are not both held

# What `replica` did after sequence `after`, as of sequence `through`.
#   totals: {name: (sequence, total)}, the entries touched since `after`
#   keys: ((sequence, digest, name, amount, age in seconds), …), the keys it accepted since
#   requires: ((replica, sequence), …), the dots without which a cancellation must not be merged
Delta = namedtuple("Delta", "replica after through totals keys requires", defaults=((), ()))


class TooManyCounters(Exception):
    """A new counter would be one more than this node creates."""


class TooManyKeys(Exception):
    """No further idempotency key can be remembered; the argument is for how many seconds."""


class KeyReused(Exception):
    """The idempotency key came before, with another counter or amount."""


def new_replica(randbits=secrets.randbits):
    """Return a fresh replica id: the first three groups of a UUIDv8, 60 random bits."""
    digits = f"{randbits(60):015x}"
    return f"{digits[:8]}-{digits[8:12]}-8{digits[12:]}"


def increment_id(replica, sequence):
    """Return the UUIDv8 of a dot: `rrrrrrrr-rrrr-8rrr-vsss-ssssssssssss`."""
    if sequence < 1 << 48:  # the hot path's: formatting a number is a good part of it
        return f"{replica}-8000-{sequence:012x}"
    high, low = divmod(sequence, 1 << 48)
    return f"{replica}-{0x8000 | high:04x}-{low:012x}"


def parse_increment_id(text):
    """Return the dot (replica, sequence) of an increment id; ValueError if it is none."""
    match = _INCREMENT_ID.match(text.lower())
    sequence = int(match[2] + match[3], 16) & SEQUENCE_MAX if match else 0
    if not sequence:
        raise ValueError(f"{text!r} is no increment id")
    return match[1], sequence


def key_digest(key):
    """Return what is remembered of an idempotency key, any string: 32 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def cancelling_replica(dot):
    """Return the replica id under which everybody cancels this dot."""
    digest = hashlib.sha256(increment_id(*dot).encode()).digest()
    return new_replica(lambda bits: int.from_bytes(digest, "big") >> (len(digest) * 8 - bits))


def _with_ages(delta, now):
    """Return a Delta as it is sent from one of _delta_locked.  Without the lock: a million keys take a second."""
    keys = [
        # `now` may have been read before the key was accepted.
        (sequence, digest, name, amount, max(0.0, round(now - at, 3)))
        for sequence, (digest, name, amount, at) in reversed(delta.keys)
    ]
    return delta._replace(keys=tuple(keys))


class Counter:
    """Named counters of one node, replicated by deltas.

    Threads may call anything at any time.  `replica` is the id under which this node counts.
    `now` is in seconds of any clock that only moves forward; keys are remembered for
    `key_window_s`.  The two limits hold for what this node accepts, never for what it merges.
    """

    def __init__(self, replica, counters_max=100_000, keys_max=1_000_000, key_window_s=3600.0):
        self._counters_max, self._keys_max, self._key_window_s = counters_max, keys_max, key_window_s
        # Guards everything below.  Held for dictionary work only: no I/O, no call out of this
        # file, so it is never held together with another lock.
        self._lock = threading.Lock()
        self._replica = replica
        self._applied = {}  # replica -> the sequence through which its history is held here
        # replica -> {name: (sequence, total)}: the running total of the replica's increments to
        # a counter, as of the latest that touched it.  Invariant: ordered by sequence.
        self._entries = {}
        self._values = {}  # name -> the sum of its totals over all replicas; none is ever dropped
        self._names = []  # the names that were the first in _values, sorted; replaced as a whole
        self._vector = {}  # the copy of _applied last handed out; None once out of date
        self._waiting = {}  # replica -> [(sequence, threading.Event)]: who waits for a dot
        self._impatient = False  # nobody is to wait any more
        self._watching = set()  # of threading.Event: who wants to know of the next change
        # replica -> {sequence: (digest, name, amount, when it was accepted)}, by sequence
        self._accepted = {}
        self._dot_of = {}  # digest -> (replica, sequence): the smallest dot seen of that key
        self._expiry = []  # heap of (when accepted, replica, sequence), all of _accepted
        self._keys_loaded_at = float("-inf")  # no key is forgotten within the window after that
        self._requires = {}  # replica of a cancellation -> (smaller dot, cancelled dot)

    @property
    def replica(self):
        return self._replica

    @property
    def sequence(self):
        """The sequence of the last increment accepted under this id; 0 before the first."""
        return self._applied.get(self._replica, 0)

    def increment(self, name, amount=1):
        """Count `amount`, any integer but 0; return (replica, sequence, value of the counter).

        Raises TooManyCounters, and then has changed nothing.
        """
        with self._lock:
            return self._increment_locked(name, amount)

    def increment_once(self, key, name, amount, now):
        """Count `amount` unless it was counted under the same key, a string, before.

        Returns (replica, sequence, value, replayed) with the first dot of that key, as far as
        known here.  Raises KeyReused, TooManyKeys, TooManyCounters, and then has changed nothing.
        """
        digest = key_digest(key)
        with self._lock:
            self._expire_locked(now)
            dot = self._dot_of.get(digest)
            if dot:
                if self._accepted[dot[0]][dot[1]][1:3] != (name, amount):
                    raise KeyReused
                return *dot, self._values[name], True
            if len(self._dot_of) >= self._keys_max:
                raise TooManyKeys(self._expiry[0][0] + self._key_window_s - now if self._expiry else 0.0)
            replica, sequence, value = self._increment_locked(name, amount)
            self._dot_of[digest] = (replica, sequence)
            self._remember_locked(replica, sequence, (digest, name, amount, now))
            return replica, sequence, value, False

    def _increment_locked(self, name, amount):
        value = self._values.get(name)
        if value is None:
            if len(self._values) >= self._counters_max:
                raise TooManyCounters
            value = 0
        replica = self._replica
        sequence = self._applied.get(replica, 0) + 1
        entries = self._entries.get(replica)
        if entries is None:
            entries = self._entries[replica] = OrderedDict()
        entry = entries.get(name)
        entries[name] = (sequence, entry[1] + amount if entry else amount)
        entries.move_to_end(name)
        self._applied[replica] = sequence
        self._vector = None
        self._values[name] = value = value + amount
        if self._watching:
            self._tell_watching_locked()
        if self._waiting:
            self._wake_locked(replica, sequence)
        return replica, sequence, value

    def _wake_locked(self, replica, through):
        for sequence, event in self._waiting.get(replica, ()):
            if sequence <= through:
                event.set()

    def wake_on_change(self, vector, event):
        """Set a threading.Event at the next change, once; at once if `vector`, from vector(), is out of date."""
        with self._lock:
            if self._vector is vector:
                self._watching.add(event)
            else:
                event.set()

    def _tell_watching_locked(self):
        for event in self._watching:
            event.set()
        self._watching = set()

    def _remember_locked(self, replica, sequence, accepted):
        self._accepted.setdefault(replica, {})[sequence] = accepted
        heapq.heappush(self._expiry, (accepted[3], replica, sequence))

    def expire(self, now):
        """Forget the idempotency keys whose time has passed."""
        with self._lock:
            self._expire_locked(now)

    def keys_were_loaded(self, now):
        """Keep every key for a whole window from now on, however old it is.

        The nodes of a cluster that was down for longer than the window may have taken one key at two
        of them; only while both uses are remembered is that noticed.
        """
        with self._lock:
            self._keys_loaded_at = now

    def _expire_locked(self, now):
        if self._keys_loaded_at + self._key_window_s >= now:
            return
        while self._expiry and self._expiry[0][0] + self._key_window_s < now:
            _, replica, sequence = heapq.heappop(self._expiry)
            accepted = self._accepted[replica].pop(sequence, None)  # a cancelled one is in the heap twice
            if accepted and self._dot_of.get(accepted[0]) == (replica, sequence):
                del self._dot_of[accepted[0]]

    def value(self, name):
        """Return the value of a counter; one never incremented is 0."""
        return self._values.get(name, 0)  # one dictionary look-up is atomic

    def list(self, prefix, start, limit):
        """Return the counters whose names begin with `prefix`, from the name `start` on, at most `limit`.

        They come as ({name: value}, next), by name; `next` is where the next page starts, or None.
        """
        names = self._sorted_names()
        first = bisect.bisect_left(names, max(prefix, start))
        page = [name for name in names[first : first + limit + 1] if name.startswith(prefix)]
        with self._lock:
            values = {name: self._values[name] for name in page[:limit]}
        return values, page[limit] if len(page) > limit else None

    def _sorted_names(self):
        with self._lock:
            names = self._names
            new = list(self._values)[len(names) :] if len(names) < len(self._values) else []
        if new:  # sorted without the lock; what is sorted already costs one comparison each
            names = self._names = sorted(names + new)
        return names

    def sizes(self):
        """Return how many counters and how many idempotency keys this node knows."""
        return len(self._values), len(self._dot_of)

    def holds(self, replica, sequence):
        """Return whether this dot has been applied here."""
        return self._applied.get(replica, 0) >= sequence

    def vector(self):
        """Return what is applied: {replica: sequence}.  It is shared; nobody may change it."""
        with self._lock:
            if self._vector is None:
                self._vector = dict(self._applied)
            return self._vector

    def wait_until_held(self, replica, sequence, timeout_s):
        """Wait until this dot is applied here; return whether it is."""
        event = threading.Event()
        with self._lock:
            if self._impatient or self._applied.get(replica, 0) >= sequence:
                return self._applied.get(replica, 0) >= sequence
            self._waiting.setdefault(replica, []).append((sequence, event))
        event.wait(timeout_s)
        with self._lock:
            waiting = self._waiting.get(replica, [])
            waiting[:] = [entry for entry in waiting if entry[1] is not event]
            if not waiting:
                self._waiting.pop(replica, None)
            return self._applied.get(replica, 0) >= sequence

    def stop_waiting(self):
        """Let everyone go who waits in wait_until_held, now and from now on: the node is stopping."""
        with self._lock:
            self._impatient = True
            waiting = [entry for entries in self._waiting.values() for entry in entries]
        for _, event in waiting:
            event.set()

    def deltas(self, known, size_max, now):
        """Return what a node that holds the vector `known` lacks: a list of Delta, to be merged in order.

        `size_max` is in bytes on the wire, roughly.  No replica's delta is ever split, or two
        nodes could hold equal vectors and different totals; so a list of one may be larger.
        """
        with self._lock:
            found, size = [], 0
            # Cancellations go last: a receiver takes one only when it holds both dots, and what
            # holds a dot may be a later delta than the one it was first in.
            increments = [replica for replica in self._applied if replica not in self._requires]
            for replica in (*increments, *self._requires):
                after, through = known.get(replica, 0), self._applied[replica]
                if after < through and size < size_max:
                    delta = self._delta_locked(replica, after)
                    found.append(delta)
                    size += sum(len(name) + 40 for name in delta.totals) + 150 * len(delta.keys)
        return [_with_ages(delta, now) for delta in found]

    def delta(self, replica, after, now):
        """Return what `replica` did after sequence `after`, as a Delta; None if nothing is known.

        10,000 increments of one counter are one entry: the cost is that of what changed.
        """
        with self._lock:
            delta = self._delta_locked(replica, after) if self._applied.get(replica, 0) > after else None
        return delta and _with_ages(delta, now)

    def _delta_locked(self, replica, after):
        """Return a Delta with its keys still as they are kept, the latest first."""
        totals, keys = {}, []
        entries, accepted = self._entries[replica], self._accepted.get(replica, {})
        for name in reversed(entries):
            entry = entries[name]
            if entry[0] <= after:
                break
            totals[name] = entry
        for item in reversed(accepted.items()):
            if item[0] <= after:
                break
            keys.append(item)
        return Delta(replica, after, self._applied[replica], totals, keys, self._requires.get(replica, ()))

    def merge(self, delta, now):
        """Take over a delta, all of it or nothing; return APPLIED, HELD, GAP or NEEDS.

        Only APPLIED has changed anything.  A delta of this very replica is HELD: nobody knows
        more of it.
        """
        with self._lock:
            return self._merge_locked(delta, now)

    def _merge_locked(self, delta, now):
        replica, after, through, totals, keys, requires = delta
        held = self._applied.get(replica, 0)
        if replica == self._replica or through <= held:
            return HELD
        if after > held:
            return GAP
        if any(self._applied.get(r, 0) < sequence for r, sequence in requires):
            return NEEDS  # a cancellation must not be applied before both increments it refers to
        entries = self._entries.setdefault(replica, OrderedDict())
        # A delta cut further back than `held` has entries that are held already.  Sorted, the
        # new ones keep the order by sequence, whatever order they came in.
        for name, entry in sorted(totals.items(), key=lambda item: item[1][0]):
            if entry[0] > held:
                before = entries.get(name)
                self._values[name] = self._values.get(name, 0) + entry[1] - (before[1] if before else 0)
                entries[name] = entry
                entries.move_to_end(name)
        self._applied[replica] = through
        self._vector = None
        self._tell_watching_locked()
        if requires:
            self._requires[replica] = requires
        self._wake_locked(replica, through)
        for sequence, digest, name, amount, age_s in sorted(keys):
            if sequence > held:
                self._remember_locked(replica, sequence, (digest, name, amount, now - age_s))
                self._see_key_locked(digest, (replica, sequence), now)
        return APPLIED

    def _see_key_locked(self, digest, dot, now):
        """Take note that a key came with this dot; of two dots of one key, cancel the larger."""
        known = self._dot_of.setdefault(digest, dot)
        if known == dot:
            return
        (_, _, _, before), (_, _, _, at) = (self._accepted[replica][sequence] for replica, sequence in (known, dot))
        if abs(at - before) > self._key_window_s:
            # Used anew after its time, and here it has not been forgotten yet.
            self._dot_of[digest] = dot if at > before else known
        else:
            smaller, larger = sorted((known, dot))
            self._dot_of[digest] = smaller
            _, name, amount, accepted_at = self._accepted[larger[0]][larger[1]]
            if min(at, before) < accepted_at:
                # Cancelled, it is a retry of the other: it must not outlive that, and cancel what comes later.
                self._remember_locked(*larger, (digest, name, amount, min(at, before)))
            totals = {name: (1, -amount)}
            self._merge_locked(Delta(cancelling_replica(larger), 0, 1, totals, (), (smaller, larger)), now)

    def renew_if_cloned(self, known):
        """Draw a new replica id if `known` shows that the present one is used twice; return whether it does.

        `known` is the vector of another node.  It can only hold more of this replica than this
        node did if somebody else counts under the same id: the machine was cloned, or set back
        to a snapshot.  What was counted so far stays, as the past of a foreign replica.
        """
        replica = self._replica
        return known.get(replica, 0) > self._applied.get(replica, 0) and self.renew(replica)

    def renew(self, replica):
        """Draw a new replica id if this one is the present one; return whether it was."""
        with self._lock:
            if self._replica != replica:
                return False  # another thread has done it
            self._replica = new_replica()
            return True

"""What a node holds of every replica: how it takes over what others counted, and tells what it holds.

Pure: no socket, no thread.  Every replica (one life of one process) numbers the increments it
accepts 1, 2, 3, …, and this holds: **of every replica a node holds an exact prefix of its history.**
Whether an increment was seen before is one comparison with the length of that prefix, so what a node
remembers does not grow with the number of increments.

Idempotency keys are remembered for a while, and travel with the increments they came with.  If two
partitioned nodes accept the same key, it is counted twice until some node holds both dots.  That
node keeps the smaller dot and cancels the larger with an increment of minus its amount.  The
cancelling replica id is derived from the dot, so every node that finds the conflict writes the
same entry.

Source: Almeida, Shoker, Baquero, "Delta State Replicated Data Types" (2018), for deltas and the
causal condition on merging them.
"""

import threading
from contextlib import suppress
from functools import partial

from counter.absorption import is_shown
from counter.cancellations import Cancellations
from counter.deltas import APPLIED, GAP, HELD, NEEDS, Delta
from counter.histories import Histories
from counter.ids import cancelling_replica
from counter.keys import PIECE, KeyTable, SentKeys
from counter.vectors import Changes, Vector
from counter.waiting import Waiters
from counter.windows import is_window


class ReplicatedState:
    """The state of one node, replicated by deltas: see Counter, which counts in it and reads it.

    Threads may call anything at any time.  When memory runs out a call raises MemoryError and has
    changed nothing.
    """

    def __init__(self, replica, counters_max, keys_max, key_window_s):
        # Guards everything below, and in Counter.  Held for work in memory only: no I/O, no call out of
        # this package, so it is never held together with another lock.
        self._lock = threading.Lock()
        self._keys = KeyTable(keys_max, key_window_s)
        self._histories = Histories(replica, self._keys, counters_max)
        self._counters, self._applied = self._histories.counters, self._histories.applied  # parts of it
        self._absorptions = self._histories.absorptions
        self._cancellations = Cancellations()
        self._changes = Changes()  # is told of every replica but this one before its history changes
        self._vector = None  # the vector last handed out; None once out of date
        self._waiters = Waiters(self._lock)

    @property
    def replica(self):
        return self._histories.own.replica

    @property
    def sequence(self):
        """The sequence of the last increment accepted under this id; 0 before the first."""
        return self._applied.get(self.replica, 0)

    @property
    def accepted(self):
        """How many increments were accepted under this id."""
        with self._lock:
            return max(0, self.sequence - self._histories.uncounted)

    def _changed_locked(self, replica, through):
        """Take note that the history of a replica is now held through a sequence."""
        self._vector = None
        if self._waiters.anybody:
            self._waiters.reached_locked(replica, through)

    # What is held.

    def holds(self, replica, sequence):
        """Return whether this dot has been applied here."""
        if self._applied.get(replica, 0) >= sequence:
            return True
        with self._lock:
            return self._holds_locked(replica, sequence)

    def _holds_locked(self, replica, sequence):
        return self._held_locked(replica) >= sequence or self._absorptions.final(replica) >= sequence

    def _held_locked(self, replica):
        """Return the sequence through which the history of a replica is held; 0 if none of it is, as such."""
        return self._applied.get(replica, 0) or int(replica in self._cancellations)

    def lacks(self, vector, other):
        """Return whether a node that holds `vector` lacks something that `other` shows, as far as is known here."""
        missing = Vector.of(other).beyond(vector)
        return not all(is_shown(vector, self.carriers(replica, sequence)) for replica, sequence, _ in missing)

    def carriers(self, replica, sequence):
        """Return the dots of which each holds this one: itself, and those that absorbed its replica."""
        with self._lock:
            return self._absorptions.carriers(replica, sequence)

    def absorbed(self, replicas):
        """Return {replica: its last sequence} of those that were absorbed here."""
        with self._lock:
            finals = {
                replica: self._absorptions.final(replica) for replica in replicas if not self._held_locked(replica)
            }
        return {replica: final for replica, final in finals.items() if final}

    def vector(self):
        """Return what is applied, {replica: sequence}, as a Vector."""
        with self._lock:
            return self._vector_locked()

    def _vector_locked(self):
        if self._vector is None:
            self._vector = self._changes.vector(self.replica, self._held_locked)
        return self._vector

    # Waiting.

    def wait_until_held(self, replica, sequence, timeout_s):
        """Wait until this dot is applied here; return whether it is."""
        if not self.holds(replica, sequence):
            self._waiters.wait(lambda: self.holds(replica, sequence), timeout_s, (replica, sequence))
        return self.holds(replica, sequence)

    def wake_on_change(self, vector, event):
        """Set a threading.Event at the next change, once; at once if `vector`, from vector(), is out of date."""
        with self._lock:
            if self._vector is vector:
                self._waiters.watch_locked(event.set)
            else:
                event.set()

    def stop_waiting(self):
        """Wake all who wait in wait_until_held and refuse new waits; called when the node stops."""
        self._waiters.stop()

    # Replicating.

    def deltas(self, known, size_max, now, with_endings=True):
        """Return what a node that holds the vector `known` lacks: a list of Delta, to be merged in order.

        Without endings there is none that has an heir, or something absorbed.  `size_max` is in bytes on the
        wire, roughly.  No replica's delta is ever split, or two nodes could hold equal vectors and different
        totals; so a list of one may be larger.
        """
        found, size = [], 0
        with self._lock:
            # Cancellations come last: a receiver takes one only when it holds both dots, and what
            # holds a dot may be a later delta than the one it was first in.
            lacking = self._vector_locked().beyond(known)
            for replica, _, after in sorted(lacking, key=lambda entry: (entry[0] in self._cancellations, entry)):
                withheld = not with_endings and self._has_endings_locked(replica, after)
                if size < size_max and not withheld:
                    delta = self._delta_locked(replica, after, now)
                    found.append(delta)
                    size += 80 * len(delta.totals) + 150 * (len(delta.keys) + len(delta.absorbed))
        return [_finished(delta) for delta in found]

    def has_endings(self, replica, after):
        """Return whether a delta of a replica after a sequence has an heir, or something absorbed."""
        with self._lock:
            return self._has_endings_locked(replica, after)

    def _has_endings_locked(self, replica, after):
        return replica in self._histories.heirs or self._absorptions.latest(replica) > after

    def delta(self, replica, after, now):
        """Return what `replica` did after sequence `after`, as a Delta; None if nothing is known.

        10,000 increments of one counter are one entry: the cost is that of what changed.
        """
        with self._lock:
            through = self._held_locked(replica)
            delta = self._delta_locked(replica, after, now) if through > after else None
        return delta and _finished(delta)

    def _delta_locked(self, replica, after, now):
        """Return a Delta with its keys as SentKeys, which are read without the lock."""
        if replica in self._cancellations:
            *dots, number, amount = self._cancellations.get(replica)
            totals = {} if number is None else {self._counters.names[number]: (1, -amount)}
            return Delta(replica, after, 1, totals, (), tuple(dots))
        through, uses = self._applied[replica], self._keys.number(replica, after)
        keys = (
            SentKeys(partial(self._copy_uses, replica), after, through, uses, self._counters.names, now) if uses else ()
        )
        totals = self._histories.streams[replica].cut(after, self._counters.names)
        heir, absorbed = self._histories.heirs.get(replica), self._absorptions.since(replica, after)
        return Delta(replica, after, through, totals, keys, (), heir, absorbed)

    def _copy_uses(self, *range):
        with self._lock:
            return self._keys.copy(*range)

    def merge(self, delta, now):
        """Take over a delta, all of it or nothing; return APPLIED, HELD, GAP or NEEDS.

        Only APPLIED has changed anything.  A delta of this very replica is HELD: nobody knows
        more of it.  `now` is when the delta was cut, as far as known: the ages of keys are as of then.
        """
        replica, after, through = delta[:3]
        with self._lock:
            if delta.requires:
                return self._merge_cancellation_locked(delta)
            held = self._applied.get(replica, 0)
            if replica == self.replica or through <= held or self._is_over_locked(replica):
                return HELD
            if after > held:
                return GAP
            if self.replica in delta.absorbed and not self._histories.ended:
                self._renew_locked()  # a copy of this very process has ended
            for changed in (replica, *filter(self._applied.__contains__, delta.absorbed)):
                self._changes.touch(changed)
            self._histories.take(delta, now)
            self._changed_locked(replica, through)
            if delta.absorbed:
                self._waiters.wake_all_locked()
            with suppress(MemoryError):  # what is not settled now is at the next call of expire()
                self._settle_locked()
            return APPLIED

    def _is_over_locked(self, replica):
        """Return whether there can be nothing new of a replica: it is held to its end, or was absorbed."""
        return replica in self._histories.heirs or self._absorptions.final(replica) > 0

    def _merge_cancellation_locked(self, delta):
        replica, through, totals, dots = delta.replica, delta.through, delta.totals, delta.requires
        if self._holds_locked(replica, through):
            return HELD
        # A cancellation must not be applied before both increments it refers to.  What is none, though
        # it says so, never is.
        is_one = through == 1 >= len(totals) and len(dots) == 2 and replica == cancelling_replica(dots[1])
        if not is_one or not all(self._holds_locked(*dot) for dot in dots):
            return NEEDS
        # Without a name it is one of a window that has ended; if it is not held, it has ended here.
        name, (_, amount) = next(iter(totals.items()), ("/", (1, 0)))
        number = self._counters.numbers.get(name)
        if number is None and not is_window(name):
            return NEEDS
        self._cancel_locked(replica, dots, number, -amount)
        return APPLIED

    # Keys that came to several replicas.

    def _settle_locked(self):
        """Cancel what was counted more than once because several replicas took one key."""
        conflicts = self._histories.conflicts
        while conflicts:
            for stays, cancelled in self._keys.settle(conflicts[-1], self._holds_locked):
                dots = (stays.replica, stays.sequence), (cancelled.replica, cancelled.sequence)
                self._cancel_locked(cancelling_replica(dots[1]), dots, cancelled.counter, cancelled.amount)
            conflicts.pop()

    def _cancel_locked(self, replica, dots, number, amount):
        """Cancel the second of two dots, which counted `amount`, unless that was done."""
        if replica in self._cancellations:
            return
        self._changes.touch(replica)
        is_held = number is not None and self._counters.is_held(number)  # else it is a window that has ended
        value = self._counters.values[number] - amount if is_held else None
        self._cancellations.add(*dots, number if is_held else None, amount)
        if is_held:
            self._counters.values[number] = value
        self._changed_locked(replica, 1)

    # Ending, and what is left of those that ended.

    def end(self, heir):
        """Write the will of this replica; return whether it did.

        It counts nothing any more, so increments raise Ended; and `heir`, a replica, may absorb it.
        One that has counted nothing leaves nothing, and needs no will.
        """
        with self._lock:
            if self._histories.ended or not self.sequence:
                return False
            self._histories.end(heir)
            self._changed_locked(self.replica, self.sequence)
            return True

    def absorb(self, kept=()):
        """Absorb a replica that has ended, if there is one that this may absorb; return it, or None.

        Those in `kept` are left alone, and those of whom a key is remembered, for as long as it is.
        """
        with self._lock:
            for replica in self._histories.heirs:
                if replica not in kept and self._may_absorb_locked(replica):
                    self._changes.touch(replica)
                    self._changed_locked(self.replica, self._histories.absorb(replica))
                    self._waiters.wake_all_locked()
                    return replica
        return None

    def _may_absorb_locked(self, replica):
        # Of an heir that was absorbed itself, the right goes to who absorbed it.
        heir = self._absorptions.successor(self._histories.heirs[replica])
        return heir == self.replica and not self._histories.ended and not self._keys.number(replica, 0)

    # The own id.

    def renew_if_cloned(self, known):
        """Draw a new replica id if `known` shows that the present one is used twice; return whether it does.

        `known` is the vector of another node.  It can only hold more of this replica than this
        node did if somebody else counts under the same id: the machine was cloned, or set back
        to a snapshot.  What was counted so far stays, as the past of a foreign replica.
        """
        replica = self.replica
        return not self.holds(replica, known.get(replica, 0)) and self.renew(replica)

    def renew(self, replica):
        """Draw a new replica id if this one is the present one; return whether it was."""
        with self._lock:
            if self.replica != replica or self._histories.ended:
                return False  # another thread has done it, or it counts nothing any more
            self._renew_locked()
            return True

    def _renew_locked(self):
        self._changes.touch(self.replica)
        self._histories.renew()
        self._vector = None


def _finished(delta):
    """Return a Delta from _delta_locked with its keys read, unless they are many."""
    return delta._replace(keys=tuple(delta.keys)) if 0 < len(delta.keys) <= PIECE else delta

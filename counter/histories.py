"""The histories of all replicas as far as they are held, and the values of the counters they make up.

Each change is made all at once or not at all: what allocates comes first, and what changes counts
afterwards only replaces what is there.  When memory runs out, MemoryError is raised, and what was
prepared is taken back.
"""

from array import array
from itertools import chain, repeat
from operator import add, setitem, sub

from counter.ids import new_replica
from counter.keys import Use
from counter.streams import OwnStream, Stream
from counter.values import Values


class TooManyCounters(Exception):
    """A new counter would be one more than this node creates."""


class Histories:
    """What each replica counted; of this one, which counts under the id `replica`, all of it.

    Not for several threads at once.  `keys` is the KeyTable in which uses of keys are remembered;
    `counters_max` holds for what is counted here, not for what is merged.
    """

    def __init__(self, replica, keys, counters_max):
        self._keys, self._counters_max = keys, counters_max
        self.counters = Values()
        self.own = OwnStream(replica)
        self.streams = {replica: self.own}  # replica -> Stream
        self.applied = {replica: 0}  # replica -> the sequence through which its history is held here
        self.conflicts = []  # digests of keys with several uses, yet to be settled

    def count(self, name, amount, use=None):
        """Count; return (replica, sequence, value).  `use` is (digest, now, renewed dots) of a key that came with it.

        Raises TooManyCounters, and then has changed nothing.
        """
        own, counters, values = self.own, self.counters, self.counters.values
        number, known, replica = counters.numbers.get(name), len(values), own.replica
        if number is None and known >= self._counters_max:
            raise TooManyCounters
        held = self.applied[replica]
        try:
            if number is None:
                self._create([name])
                number = known
            sequence, total, value = held + 1, own.totals[number] + amount, values[number] + amount
            counted = replica, sequence, value
            if use:
                digest, now, renews = use
                self._keys.add(Use(replica, sequence, digest, number, amount, now, renews))
            if len(own.log) > own.log_max:
                own.begin_log(held)
            own.log.append(number)
        except BaseException:
            self._undo(own, held, known, known)
            raise
        own.totals[number], own.sequences[number] = total, sequence
        values[number], self.applied[replica] = value, sequence
        return counted

    def count_many(self, amounts, uses=()):
        """Count a batch, {name: amount}; return (replica, last sequence, {name: value}).

        `uses` are of keys that came with each of its items, as for count(), or there are none.
        Raises TooManyCounters, and then has changed nothing.
        """
        own, counters, values = self.own, self.counters, self.counters.values
        replica, known = own.replica, len(values)
        held = self.applied[replica]
        new = [name for name in amounts if name not in counters.numbers]
        if new and known + len(new) > self._counters_max:
            raise TooManyCounters
        try:
            self._create(new)
            numbers = list(map(counters.numbers.__getitem__, amounts))
            totals = list(map(add, map(own.totals.__getitem__, numbers), amounts.values()))
            sums = list(map(add, map(values.__getitem__, numbers), amounts.values()))
            sequences = list(range(held + 1, held + 1 + len(numbers)))
            changes = _changes(
                (own.sequences, numbers, sequences), (own.totals, numbers, totals), (values, numbers, sums)
            )
            counted = replica, sequences[-1], dict(zip(amounts, sums, strict=True))
            for use, sequence, number, amount in zip(uses, sequences, numbers, amounts.values()):  # noqa: B905
                digest, now, renews = use
                self._keys.add(Use(replica, sequence, digest, number, amount, now, renews))
            if len(own.log) > own.log_max:
                own.begin_log(held)
            own.log.extend(array("I", numbers))
        except BaseException:
            self._undo(own, held, known, known)
            raise
        any(changes)
        self.applied[replica] = counted[1]
        return counted

    def _create(self, names):
        """Return the numbers of new counters."""
        length = len(self.counters)
        numbers = range(length, length + len(names))
        try:
            self.counters.create(names)
            self.own.extend(numbers)
        except BaseException:
            self.own.truncate(length)
            self.counters.truncate(length)
            raise
        return numbers

    def _undo(self, stream, held, rows, counters):
        """Take back what was prepared: rows of a stream, uses of keys after `held`, and new counters."""
        self._keys.drop_after(stream.replica, held)
        stream.truncate(rows)
        self.own.truncate(counters)
        self.counters.truncate(counters)

    def take(self, delta, now):
        """Take over a delta of another replica that begins within what is held, and ends beyond it."""
        replica, _, through, totals, keys, _ = delta
        held = self.applied.get(replica, 0)
        stream = self.streams.get(replica) or Stream(replica)
        length, counters = len(stream), len(self.counters)
        try:
            rows, sequences, sums, numbers, values = self._prepare(stream, held, totals)
            changes = _changes(
                (stream.sequences, rows, sequences),
                (stream.totals, rows, sums),
                (self.counters.values, numbers, values),
            )
            conflicts = self.conflicts + self._remember(replica, held, keys, now)
            self.streams.setdefault(replica, stream)
            self.applied.setdefault(replica, 0)
            stream.log_touched(rows, sequences, held, through)
        except BaseException:
            if not held:
                self.streams.pop(replica, None)
                self.applied.pop(replica, None)
            self._undo(stream, held, length, counters)
            raise
        any(changes)
        self.applied[replica], self.conflicts = through, conflicts

    def _prepare(self, stream, held, totals):
        """Make room for what is new in some totals; return of it the rows, sequences, totals, numbers and values."""
        # A delta cut further back than `held` has entries that are held already.  Lists of what is there
        # already: objects made for each of 100,000 entries, if only for a while, cost four times as much.
        names = [name for name, entry in totals.items() if entry[0] > held]
        sequences = [entry[0] for _, entry in totals.items() if entry[0] > held]
        sums = [entry[1] for _, entry in totals.items() if entry[0] > held]
        numbers = list(map(self.counters.numbers.get, names))
        if None in numbers:
            created = iter(self._create([name for name in names if name not in self.counters.numbers]))
            numbers = [next(created) if number is None else number for number in numbers]
        rows = stream.rows(numbers)
        stream.make_room(sums)
        before, values = map(stream.totals.__getitem__, rows), map(self.counters.values.__getitem__, numbers)
        return rows, sequences, sums, numbers, list(map(add, values, map(sub, sums, before)))

    def _remember(self, replica, held, keys, now):
        """Remember the keys of a delta; return the digests of those that were used before."""
        used_before = []
        for sequence, digest, name, amount, age_s, *renews in sorted(keys) if isinstance(keys, (tuple, list)) else keys:
            if sequence > held:
                number, renews = self.counters.numbers[name], renews[0] if renews else ()
                use = Use(replica, sequence, int(digest, 16), number, amount, now - age_s, renews)
                if self._keys.add(use):
                    used_before.append(use.digest)
        return used_before

    def renew(self):
        """Go on under a new replica id; what was counted so far is then the past of another replica."""
        replica, new = self.own.replica, OwnStream(new_replica())
        given_up = self.own.given_up(self.applied[replica])
        new.extend(range(len(self.counters)))
        self.applied[new.replica] = 0
        self.streams[new.replica] = new
        self.streams[replica], self.own = given_up, new
        if not self.applied[replica]:
            del self.applied[replica], self.streams[replica]


def _changes(*changes):
    """Return an iterator that puts values into columns while any() goes through it, given (column, indexes, values).

    That allocates nothing, and so cannot fail half way.  A `for` loop would make an iterator, and
    taking a tuple apart makes another where the code has not run often yet.
    """
    return chain(*[map(setitem, repeat(column), indexes, values) for column, indexes, values in changes])

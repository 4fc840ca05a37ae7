"""The histories of all replicas as far as they are held, and the values of the counters they make up.

Each change is made all at once or not at all: what allocates comes first, and what changes counts
afterwards only replaces what is there.  When memory runs out, MemoryError is raised, and what was
prepared is taken back.
"""

from array import array
from collections import namedtuple
from itertools import chain, compress, repeat
from operator import add, delitem, setitem, sub

from counter.absorption import Absorptions
from counter.ids import new_replica
from counter.keys import Use
from counter.streams import OwnStream, Stream
from counter.values import Values
from counter.windows import NEVER, end_of, is_window, listed_name

# How many replicas that have counted are active, and how many are not; how many cancellations there are;
# and how many entries the histories of those two have.
Weight = namedtuple("Weight", "active inactive cancellations active_entries inactive_entries absorbed", defaults=(0,))


class TooManyCounters(Exception):
    """A new counter would be one more than this node creates."""


class WindowEnded(Exception):
    """The wall clock shows a time in a window that has ended: it was set back."""


class Ended(Exception):
    """This replica has written its will, and counts nothing any more."""


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
        self.horizon = NEVER  # no window that ended then or before is taken any more
        self.conflicts = []  # digests of keys with several uses, yet to be settled
        self.heirs = {}  # replica -> its heir, of those that have ended and are not absorbed
        self.absorptions = Absorptions()
        self.ended = False  # this replica has written its will
        self.uncounted = 0  # how many of its dots are no increments: its will, and those that absorb others

    def count(self, name, amount, use=None):
        """Count; return (replica, sequence, value).  `use` is (digest, now, renewed dots) of a key that came with it.

        Raises TooManyCounters, WindowEnded or Ended, and then has changed nothing.
        """
        if self.ended:
            raise Ended
        own, counters, values = self.own, self.counters, self.counters.values
        number, replica, known, free = counters.numbers.get(name), own.replica, len(values), counters.free_left
        if number is None:
            self._check_room([name])
        held = self.applied[replica]
        try:
            if number is None:
                (number,) = self._create([name])
            sequence, total, value = held + 1, own.totals[number] + amount, values[number] + amount
            counted = replica, sequence, value
            if use:
                digest, now, renews = use
                self._keys.add(Use(replica, sequence, digest, number, amount, now, renews))
            if len(own.log) > own.log_max:
                own.begin_log(held)
            own.log.append(number)
        except BaseException:
            self._undo(own, held, known, known, free)
            raise
        own.totals[number], own.sequences[number] = total, sequence
        values[number], self.applied[replica] = value, sequence
        return counted

    def count_many(self, amounts, uses=()):
        """Count a batch, {name: amount}; return (replica, last sequence, {name: value}).

        `uses` are of keys that came with each of its items, as for count(), or there are none.
        Raises TooManyCounters, WindowEnded or Ended, and then has changed nothing.
        """
        if self.ended:
            raise Ended
        own, counters, values = self.own, self.counters, self.counters.values
        replica, known, free = own.replica, len(values), counters.free_left
        held = self.applied[replica]
        new = [name for name in amounts if name not in counters.numbers]
        if new:
            self._check_room(new)
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
            self._undo(own, held, known, known, free)
            raise
        any(changes)
        self.applied[replica] = counted[1]
        return counted

    def _check_room(self, names):
        """Raise an exception unless new counters with these names may be counted here."""
        if any(end_of(name) <= self.horizon for name in names):
            raise WindowEnded
        new = {listed_name(name) for name in names if self.counters.is_new(name)}
        if new and len(self.counters) + len(new) > self._counters_max:
            raise TooManyCounters

    def _create(self, names):
        """Return the numbers of new counters."""
        counters, length, free = self.counters, len(self.counters.values), self.counters.free_left
        try:
            numbers = counters.create(names)
            self.own.extend(range(length, len(counters.values)))
        except BaseException:
            self.own.truncate(length)
            counters.truncate(length, free)
            raise
        return numbers

    def _undo(self, stream, held, rows, counters, free):
        """Take back what was prepared: rows of a stream, uses of keys after `held`, and new counters."""
        self._keys.drop_after(stream.replica, held)
        stream.truncate(rows)
        self.own.truncate(counters)
        self.counters.truncate(counters, free)

    def take(self, delta, now):
        """Take over a delta of another replica that begins within what is held, and ends beyond it."""
        replica, _, through, totals, keys, _, heir, absorbed = delta
        held = self.applied.get(replica, 0)
        stream = self.streams[replica] if replica in self.streams else Stream(replica)
        length, counters, free = len(stream), len(self.counters.values), self.counters.free_left
        absorbed, facts = {other: fact for other, fact in absorbed.items() if fact[3] > held}, len(self.absorptions)
        try:
            rows, sequences, sums, numbers, gains = self._prepare(stream, held, totals)
            conflicts = self.conflicts + self._remember(replica, held, keys, now)
            values = self._values_without(absorbed)  # which may be a copy: no counter is created from here on
            arrivals, drops = self._prepare_absorption(replica, absorbed)
            changes = _changes(
                (stream.sequences, rows, sequences),
                (stream.totals, rows, sums),
                (values, numbers, list(map(add, map(values.__getitem__, numbers), gains))),
                *arrivals,
            )
            changes = chain(changes, drops)
            self.streams.setdefault(replica, stream)
            self.applied.setdefault(replica, 0)
            if heir:
                self.heirs[replica] = heir
            stream.log_touched(rows, sequences, held, through)
        except BaseException:
            self.absorptions.undo(facts)
            self.heirs.pop(replica, None)
            if not held:
                self.streams.pop(replica, None)
                self.applied.pop(replica, None)
            self._undo(stream, held, length, counters, free)
            raise
        any(changes)
        self.counters.values = values
        self.applied[replica], self.conflicts = through, conflicts

    def _values_without(self, absorbed):
        """Return the values without what is held of some replicas: a copy, if there are any of these."""
        values = self.counters.values
        if absorbed:
            values = values[:]
            for stream in filter(None, map(self.streams.get, absorbed)):
                for number, total in zip(stream.numbers, stream.totals, strict=True):
                    values[number] -= total
        return values

    def _prepare_absorption(self, replica, facts):
        """Make room for facts in the history of a replica, as Absorptions.prepare() does.

        Return changes of columns, and an iterator for any() that drops the streams of those that were absorbed.
        """
        if not facts:
            return (), chain()  # an iterator: making one of a tuple later might fail
        change, inside = self.absorptions.prepare(replica, facts)
        tables = self.streams, self.applied, self.heirs, self.absorptions.inside
        drops = [map(delitem, repeat(table), [other for other in facts if other in table]) for table in tables]
        return (change,), chain(*drops, map(setitem, repeat(self.absorptions.inside), [replica], [inside]))

    def end(self, heir):
        """Write the will of this replica, its last dot: from now on it counts nothing."""
        replica, empty = self.own.replica, OwnStream(self.own.replica)
        stream, through = self.own.given_up(self.applied[replica]), self.applied[replica] + 1
        empty.extend(range(len(self.counters.values)))
        self.heirs[replica] = heir
        # What it counted is kept as that of others is, so that it goes like that when it is absorbed.
        self.streams[replica], self.applied[replica] = stream, through
        self.own, self.ended, self.uncounted = empty, True, self.uncounted + 1

    def absorb(self, replica):
        """Count as one's own what a replica counted that has ended: all at once; return the sequence.

        That is greater by as many as the replica had: so many increments are behind the totals.
        """
        own, stream, facts = self.own, self.streams[replica], len(self.absorptions)
        held, final = self.applied[own.replica], self.applied[replica]
        numbers, through = array("I", compress(stream.numbers, stream.sequences)), held + final
        try:
            moving = {other: (*fact[:3], through) for other, fact in self.absorptions.since(replica, 0).items()}
            moving[replica] = final, own.replica, through, through
            arrivals, drops = self._prepare_absorption(own.replica, moving)
            sequences = [through] * len(numbers)
            totals = list(map(add, map(own.totals.__getitem__, numbers), compress(stream.totals, stream.sequences)))
            changes = _changes((own.sequences, numbers, sequences), (own.totals, numbers, totals), *arrivals)
            changes = chain(changes, drops)
            own.log_touched(numbers, sequences, held, through)
        except BaseException:
            self.absorptions.undo(facts)
            raise
        any(changes)
        self.applied[own.replica] = through
        self.uncounted += final
        return through

    def _prepare(self, stream, held, totals):
        """Make room for what is new in some totals; return of it the rows, sequences, totals, numbers and gains."""
        # A delta cut further back than `held` has entries that are held already.  Lists of what is there
        # already: objects made for each of 100,000 entries, if only for a while, cost four times as much.
        names = [name for name, entry in totals.items() if entry[0] > held]
        sequences = [entry[0] for _, entry in totals.items() if entry[0] > held]
        sums = [entry[1] for _, entry in totals.items() if entry[0] > held]
        numbers = list(map(self.counters.numbers.get, names))
        if None in numbers:
            new = [name for name in names if name not in self.counters.numbers]
            if ended := {name for name in new if is_window(name) and end_of(name) <= self.horizon}:
                new = {name: entry for name, entry in totals.items() if entry[0] > held and name not in ended}
                return self._prepare(stream, held, new)
            created = iter(self._create(new))
            numbers = [next(created) if number is None else number for number in numbers]
        rows = stream.rows(numbers)
        stream.make_room(sums)
        return rows, sequences, sums, numbers, map(sub, sums, map(stream.totals.__getitem__, rows))

    def _remember(self, replica, held, keys, now):
        """Remember the keys of a delta; return the digests of those that were used before."""
        used_before = []
        for sequence, digest, name, amount, age_s, *renews in sorted(keys) if isinstance(keys, (tuple, list)) else keys:
            if sequence > held:
                number, renews = self.counters.number_of_key(name), renews[0] if renews else ()
                if number is None:  # the window it counted in has ended
                    (number,) = self._create([name])
                    self.counters.retire(number)
                use = Use(replica, sequence, int(digest, 16), number, amount, now - age_s, renews)
                if self._keys.add(use):
                    used_before.append(use.digest)
        return used_before

    def end_windows(self, horizon, limit):
        """Take out up to `limit` windows that have ended; return (a set of their numbers, whether there may be more).

        Their entries are to be cleared from every stream, and the numbers to be freed then.
        """
        numbers, reached = self.counters.end(horizon, limit)
        self.horizon = max(self.horizon, reached)  # also where others of the same end are yet to be taken out
        return numbers, bool(numbers) or reached < horizon

    def free(self, numbers):
        """Free the numbers of counters whose entries are cleared, but for those that keys still refer to."""
        self.own.clear(numbers, 0, len(self.own))
        self.counters.free([number for number in numbers if not self._keys.refers_to(number)])
        for number in filter(self._keys.refers_to, numbers):
            self.counters.retire(number)

    def free_forgotten(self):
        """Free the numbers of windows that have ended and that no key refers to any more."""
        forgotten, retired = self._keys.unreferenced, self.counters.retired
        if retired and forgotten:
            self.counters.free([n for n in set(forgotten) if n in retired and not self._keys.refers_to(n)])
        forgotten.clear()

    def weight(self, active):
        """Return how much is held of whom, without the cancellations; `active` are the replicas of active peers."""
        streams = [self.streams[replica] for replica in {self.own.replica, *active} if replica in self.streams]
        entries, present = sum(map(len, self.streams.values())), sum(map(len, streams))
        counting = sum(self.applied[stream.replica] > 0 for stream in streams)
        gone = len(self.streams) - len(streams)
        return Weight(counting, gone, 0, present, entries - present, len(self.absorptions))

    def renew(self):
        """Go on under a new replica id; what was counted so far is then the past of another replica."""
        replica, new = self.own.replica, OwnStream(new_replica())
        given_up = self.own.given_up(self.applied[replica])
        new.extend(range(len(self.counters.values)))
        self.applied[new.replica] = 0
        self.streams[new.replica] = new
        self.streams[replica], self.own, self.uncounted = given_up, new, 0
        if not self.applied[replica]:
            del self.applied[replica], self.streams[replica]


def _changes(*changes):
    """Return an iterator that puts values into columns while any() goes through it, given (column, indexes, values).

    That allocates nothing, and so cannot fail half way.  A `for` loop would make an iterator, and
    taking a tuple apart makes another where the code has not run often yet.
    """
    return chain(*[map(setitem, repeat(column), indexes, values) for column, indexes, values in changes])

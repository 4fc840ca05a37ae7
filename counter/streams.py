"""What each replica counted, as far as it is held: columns of numbers, not an object per entry.

Counters are known by numbers here: 0, 1, 2, … in the order in which a node met their names.
An entry takes 20 bytes, or 32 where it is looked up; as a tuple in a dictionary it took 268.
"""

from array import array
from collections.abc import Mapping
from itertools import compress

SMALL = 32  # rows that are searched one by one; of more there is an index
LARGE = 100  # rows; of more the columns are copied: a memcpy for who holds the lock, and 20 bytes each afterwards
_MIX = 0x9E3779B97F4A7C15  # odd, its bits in no order: what is multiplied by it is spread (Fibonacci hashing)


class Index:
    """Where numbers stand in a column, an array of distinct ones: 6 to 12 bytes each.

    A hash table with open addressing (Knuth, TAOCP volume 3, 6.4), whose slots hold rows plus 1.
    """

    __slots__ = ("_column", "_slots")

    def __init__(self, column):
        self._column, self._slots = column, array("I", [0])
        self.add(0)

    def find(self, numbers):
        """Return the rows of some numbers, a list; -1 for one that has none."""
        column, slots, rows = self._column, self._slots, []
        last = len(slots) - 1
        for number in numbers:
            slot = number * _MIX >> 20 & last
            while (row := slots[slot]) and column[row - 1] != number:
                slot = slot + 1 & last
            rows.append(row - 1)
        return rows

    def add(self, first):
        """Take in the rows of the column from `first` on, whose numbers are new."""
        column, slots = self._column, self._slots
        if 3 * len(column) > 2 * len(slots):
            first, slots = 0, array("I", bytes(4 << (3 * len(column) // 2).bit_length()))
        last = len(slots) - 1
        for row in range(first, len(column)):
            slot = column[row] * _MIX >> 20 & last
            while slots[slot]:
                slot = slot + 1 & last
            slots[slot] = row + 1
        self._slots = slots


class Totals(Mapping):
    """Many entries {name: (sequence, total)} as columns: those of a delta as it was cut, or as it is read.

    It does not change with the stream it was cut from.  Looking up a single name takes a search.
    """

    __slots__ = ("_after", "_length", "_names", "_numbers", "_sequences", "_totals")

    def __init__(self):
        self._names, self._numbers = [], None  # of each row the name, or with numbers, of each number
        self._sequences, self._totals = array("Q"), array("q")
        self._after, self._length = None, None  # only rows with a greater sequence count (None: all), so many

    @classmethod
    def cut(cls, names, numbers, sequences, totals, after):
        """Return the rows of these columns whose sequence is greater than `after`."""
        cut = cls()
        cut._names, cut._numbers, cut._sequences, cut._totals, cut._after = names, numbers, sequences, totals, after
        return cut

    def extend(self, entries):
        """Append entries, pairs (name, (sequence, total)) of names that are not there yet."""
        for name, (sequence, total) in entries:
            self._names.append(name)
            self._sequences.append(sequence)
            try:
                self._totals.append(total)
            except OverflowError:
                self._totals = [*self._totals, total]
        self._length = None

    def items(self):
        """Return an iterator over pairs (name, (sequence, total))."""
        names, after = self._names, self._after
        if self._numbers is not None:
            names = map(names.__getitem__, self._numbers)
        rows = zip(names, zip(self._sequences, self._totals))  # noqa: B905 - names may have grown since
        return rows if after is None else (entry for entry in rows if entry[1][0] > after)

    def values(self):
        """Return an iterator over pairs (sequence, total)."""
        return (entry for _, entry in self.items())

    def __iter__(self):
        return (name for name, _ in self.items())

    def __len__(self):
        if self._length is None:
            after = self._after or 0
            self._length = sum(1 for sequence in self._sequences if sequence > after)
        return self._length

    def __getitem__(self, wanted):
        for name, entry in self.items():
            if name == wanted:
                return entry
        raise KeyError(wanted)


class Stream:
    """The history of a replica as far as it is held: of each counter it touched the latest entry.

    Rows never move, but for compact().  One with sequence 0 holds nothing: room was made for it, and not
    used, or it was cleared.
    """

    __slots__ = ("_before", "_index", "_log_after", "log", "log_max", "numbers", "replica", "sequences", "totals")

    LOGGED_MIN = 16

    def __init__(self, replica):
        self.replica = replica
        self.numbers = array("I")  # of the counters, row by row
        self.sequences, self.totals = array("Q"), array("q")  # totals: a list once they exceed 64 bits
        self._index = None  # the Index of the numbers, once it is needed
        # The rows in the order in which they were touched after the sequence `_log_after`, the latest
        # last, and as `_before` such a pair from before that.  Older touches are looked for in all rows.
        self.log, self._log_after, self._before = array("I"), 0, (0, ())
        self.log_max = self.LOGGED_MIN  # the length at which a new log is begun

    def __len__(self):
        return len(self.sequences)

    def rows(self, numbers):
        """Return the rows of some counters, a list; where one has none yet, a new one that holds nothing."""
        length = len(self)
        if not length:
            rows = [-1] * len(numbers)
        elif length <= SMALL and self._index is None:
            rows = [self.numbers.index(number) if number in self.numbers else -1 for number in numbers]
        else:
            self._index = self._index or Index(self.numbers)
            rows = self._index.find(numbers)
        if -1 in rows:
            new = [number for number, row in zip(numbers, rows, strict=True) if row < 0]
            self.extend(new)
            places = iter(range(length, length + len(new)))
            rows = [next(places) if row < 0 else row for row in rows]
        return rows

    def extend(self, numbers):
        """Make rows for counters that have none."""
        length = len(self)
        self.numbers.extend(numbers)
        self.sequences.frombytes(bytes(8 * len(numbers)))
        self.totals.extend([0] * len(numbers))
        if self._index is not None:
            self._index.add(length)

    def truncate(self, length):
        """Drop the rows from `length` on, as there was no memory for something else that goes with them."""
        self._index = None
        for column in (self.totals, self.sequences, self.numbers):
            del column[length:]

    def make_room(self, totals):
        """Make sure that these totals can be written to rows that are there."""
        if totals and not (min(totals) >= -(2**63) and max(totals) < 2**63):
            self.totals = list(self.totals)

    def begin_log(self, through):
        """Begin a new log, given the sequence through which the history is held."""
        log = array("I")
        self._before, self.log, self._log_after = (self._log_after, self.log), log, through
        self.log_max = self.LOGGED_MIN + len(self) // 16

    def log_touched(self, rows, sequences, held, through):
        """Log that rows are touched with these sequences, in whatever order; held becomes `through`."""
        if len(rows) > self.log_max:  # it is not worth it
            self._skip_log(through)
            return
        if len(self.log) > self.log_max:
            self.begin_log(held)
        self.log.extend(array("I", [row for _, row in sorted(zip(sequences, rows, strict=True))]))

    def clear(self, numbers, start, stop):
        """Clear the rows from `start` to `stop` that are those of some counters, a set of numbers."""
        if not numbers.isdisjoint(part := self.numbers[start:stop]):
            for row, number in enumerate(part, start):
                if number in numbers:
                    self.sequences[row] = self.totals[row] = 0

    def compact(self, through):
        """Leave out the rows that hold nothing, if they are most; the history is held through that sequence."""
        if not 2 * self.sequences.count(0) > len(self) > SMALL:
            return
        numbers, totals = (compress(column, self.sequences) for column in (self.numbers, self.totals))
        numbers, totals = array("I", numbers), (array("q", totals) if type(self.totals) is array else list(totals))
        sequences = array("Q", filter(None, self.sequences))
        self.numbers, self.sequences, self.totals, self._index = numbers, sequences, totals, None
        self._skip_log(through)

    def _skip_log(self, through):
        self.log, self._log_after, self._before = array("I"), through, (through, ())

    def touched(self, after):
        """Return the rows with a greater sequence than `after`, the latest first; None if only a search finds them."""
        rows, logs = {}, [(self._log_after, self.log), self._before]
        for log_after, log in logs:
            for row in reversed(log):
                sequence = self.sequences[row]
                if 0 < sequence <= after:
                    return rows  # and so it is with all that were touched before
                if sequence:  # else it was cleared since
                    rows[row] = None
            if log_after <= after:
                return rows
        return None

    def cut(self, after, names):
        """Return the entries with a greater sequence than `after`, a mapping {name: (sequence, total)}."""
        rows = self.touched(after)
        if rows is None:
            if len(self) > LARGE:
                return Totals.cut(names, self.numbers[:], self.sequences[:], self.totals[:], after)
            rows = [row for row, sequence in enumerate(self.sequences) if sequence > after]
        numbers, sequences, totals = self.numbers, self.sequences, self.totals
        return {names[numbers[row]]: (sequences[row], totals[row]) for row in rows}


class OwnStream(Stream):
    """The history of the replica that counts here: each counter has the row of its number, touched or not."""

    __slots__ = ()

    LOGGED_MIN = 1024  # peers ask for what was counted a moment ago

    def __init__(self, replica):
        super().__init__(replica)
        self.totals = []  # integers of any size: nothing is to be made room for when counting

    def rows(self, numbers):
        return numbers

    def clear(self, numbers, start, stop):
        for row in numbers:
            if start <= row < stop:
                self.sequences[row] = self.totals[row] = 0

    def compact(self, through):
        """Do nothing: rows are numbers of counters."""

    def given_up(self, through):
        """Return the same history, held through a sequence, as that of a replica that does not count here."""
        stream = Stream(self.replica)
        stream.rows([row for row, sequence in enumerate(self.sequences) if sequence])
        stream.make_room(self.totals)
        for row, number in enumerate(stream.numbers):
            stream.sequences[row], stream.totals[row] = self.sequences[number], self.totals[number]
        stream._skip_log(through)
        return stream

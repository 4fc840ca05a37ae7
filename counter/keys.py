"""The idempotency keys that replicas accepted, and which of their uses are one request sent twice.

A *use* of a key is the dot that came with it.  Uses of one key by different replicas within a window
are one request that reached nodes which could not talk: all but the smallest dot are cancelled.  That
holds unless one *renews* the other: its replica knew the other, and that its window had passed.
So a use is remembered for two windows: in the first it answers a repetition, in the second it is
what a new use renews.

Memory: some 180 bytes a key.
"""

from array import array
from bisect import bisect_left
from collections import namedtuple

PIECE = 2000  # uses copied at a time where a delta has many
FORGOTTEN_AT_ONCE = 2000  # or the lock would be held for long when many keys come of age
_NUMBER_BITS = 20  # of a packed dot: the number of its log

# replica, sequence: the dot; digest: of the key, an integer; counter: its number; at: when it was
# accepted, by the clock of this node; renews: a tuple of dots
Use = namedtuple("Use", "replica sequence digest counter amount at renews")


class TooManyKeys(Exception):
    """No further idempotency key can be remembered; the argument is for how many seconds."""


class KeyReused(Exception):
    """The idempotency key came before, with another counter or amount, or with another batch."""


class _Columns:
    """Uses by one replica, by sequence, as columns: 44 bytes each and what tells the counter."""

    __slots__ = ("amounts", "counters", "digests", "renews", "sequences", "times")

    def __init__(self, counters):
        self.sequences, self.digests, self.counters = array("Q"), bytearray(), counters
        self.amounts, self.times = array("q"), array("d")
        self.renews = {}  # sequence -> dots, of the few that renew any

    def __len__(self):
        return len(self.sequences)

    def append(self, sequence, digest, counter, amount, time, renews):
        """Append a use, or raise and have changed nothing."""
        length = len(self.sequences)
        try:
            self.digests += digest.to_bytes(16, "big")
            self.counters.append(counter)
            self.amounts.append(amount)
            self.times.append(time)
            self.sequences.append(sequence)
            if renews:
                self.renews[sequence] = renews
        except BaseException:
            self.truncate(length)
            raise

    def truncate(self, length):
        for column in (self.sequences, self.counters, self.amounts, self.times):
            del column[length:]
        del self.digests[16 * length :]

    def copy(self, start, stop):
        """Return the rows from `start` to `stop` by themselves."""
        copy = _Columns(self.counters[start:stop])
        copy.sequences, copy.digests = self.sequences[start:stop], self.digests[16 * start : 16 * stop]
        copy.amounts, copy.times = self.amounts[start:stop], self.times[start:stop]
        if self.renews:
            copy.renews = {sequence: self.renews[sequence] for sequence in copy.sequences if sequence in self.renews}
        return copy

    def row(self, row):
        """Return a row as a tuple (sequence, digest, counter, amount, time, renews)."""
        sequence, digest = self.sequences[row], int.from_bytes(self.digests[16 * row : 16 * row + 16], "big")
        return (
            sequence, digest, self.counters[row], self.amounts[row], self.times[row], self.renews.get(sequence, ()),
        )  # fmt: skip

    def __iter__(self):
        return map(self.row, range(len(self)))


def _record(sequence, digest, name, amount, age_s, renews):
    """Return a use as it is in a Delta."""
    fields = sequence, f"{digest:032x}", name, amount, age_s
    return (*fields, renews) if renews else fields


class KeyRecords:
    """The keys of a delta as it is read, where they are many: 52 bytes each.

    Iterating gives records as they are in a Delta: (sequence, digest as 32 hexadecimal digits, name,
    amount, age in seconds), and at the end a tuple of dots if the use renews any.
    """

    def __init__(self):
        self._columns = _Columns([])

    def __len__(self):
        return len(self._columns)

    def extend(self, records):
        """Append records; ValueError if a sequence is not greater than the one before."""
        columns = self._columns
        for sequence, digest, name, amount, age_s, *renews in records:
            if columns.sequences and sequence <= columns.sequences[-1]:
                raise ValueError("keys out of order")
            columns.append(sequence, int(digest, 16), name, amount, age_s, renews[0] if renews else ())

    def __iter__(self):
        return (_record(*row) for row in self._columns)


class SentKeys:
    """The keys of a delta as it is sent: a piece at a time is copied from the table when it is asked for.

    `copy(after, through, limit)` returns the first uses after a sequence, as _Columns.  What is
    forgotten meanwhile is left out.  Ages are as of `now`.
    """

    def __init__(self, copy, after, through, number, names, now):
        self._copy, self._after, self._through, self._number = copy, after, through, number
        self._names, self._now = names, now

    def __len__(self):
        return self._number

    def __iter__(self):
        after = self._after
        while piece := self._copy(after, self._through, PIECE):
            for sequence, digest, counter, amount, at, renews in piece:
                # `now` may have been read before the key was accepted.
                yield _record(
                    sequence, digest, self._names[counter], amount, max(0.0, round(self._now - at, 3)), renews
                )
            after = piece.sequences[-1]


class _Log(_Columns):
    """The uses by a replica that are remembered: those from row `first` on."""

    __slots__ = ("first", "number", "replica")

    def __init__(self, replica, number):
        super().__init__(array("I"))
        self.replica, self.number, self.first = replica, number, 0

    def pack(self, sequence):
        """Return a dot of the replica as one integer."""
        return sequence << _NUMBER_BITS | self.number

    def find(self, sequence):
        """Return the row of a use that is remembered, or the first after it."""
        return bisect_left(self.sequences, sequence, self.first)

    def free(self):
        """Free the memory of forgotten rows, once they are so many that moving the others is worth it."""
        if 2 * self.first > len(self):
            for column in (self.sequences, self.counters, self.amounts, self.times):
                del column[: self.first]
            del self.digests[: 16 * self.first]
            self.first = 0


class KeyTable:
    """The uses of keys that are remembered, by all replicas.  Not for several threads at once."""

    def __init__(self, keys_max, window_s):
        self._keys_max, self._window_s = keys_max, window_s
        self._logs = {}  # replica -> _Log, none of them empty
        self._by_number = []  # _Log, or None where the number is free
        # Of a digest the use that was learnt of last, and of a use the one of the same key before: packed dots.
        self._latest, self._previous = {}, {}
        self._references = {}  # number of a counter -> how many uses are of it
        self.unreferenced = []  # numbers of counters whose last use was forgotten; emptied by the caller
        self._oldest = float("inf")  # no use that is remembered was accepted before
        self._kept, self._kept_until = {}, float("-inf")  # what keep() said, replica -> sequence, and until when

    def __len__(self):
        """Return how many keys are remembered."""
        return len(self._latest)

    def refers_to(self, counter):
        """Return whether a use of a key is remembered that was of the counter with that number."""
        return self._references.get(counter, 0) > 0

    def uses(self, digest):
        """Return the uses of a key that are remembered, a list of Use."""
        found, packed = [], self._latest.get(digest)
        while packed is not None:
            log = self._by_number[packed & (1 << _NUMBER_BITS) - 1]
            found.append(Use(log.replica, *log.row(log.find(packed >> _NUMBER_BITS))))
            packed = self._previous.get(packed)
        return found

    def known(self, digest, now):
        """Return the Use that a repetition of a key is answered with, or None; and the dots that a new use renews."""
        if digest not in self._latest:
            return None, ()
        uses, kept = self.uses(digest), self._kept if now <= self._kept_until else {}
        answering = (use for use in uses if use.at + self._window_s >= now or use.sequence <= kept.get(use.replica, 0))
        first = min(answering, default=None)
        return first, tuple((use.replica, use.sequence) for use in uses)

    def at(self, replica, sequence):
        """Return the Use that is this dot, if it is remembered; else None."""
        log = self._logs.get(replica)
        row = log.find(sequence) if log else 0
        return Use(replica, *log.row(row)) if log and row < len(log) and log.sequences[row] == sequence else None

    def make_room(self, now, keys=1):
        """Make room for so many keys to be accepted, or raise TooManyKeys."""
        if keys > self._keys_max:
            raise TooManyKeys(self._window_s)
        while len(self._latest) + keys > self._keys_max:
            log = min(self._logs.values(), key=lambda log: log.times[log.first])
            until = max(log.times[log.first] + self._window_s, self._kept_until)
            if until >= now:
                raise TooManyKeys(until - now)
            self._forget_first(log)  # it was remembered only to be renewed

    def add(self, use):
        """Remember a use, the latest of its replica; return whether there are others of its key.

        If it raises an exception, nothing has changed.
        """
        replica, sequence, digest, counter, amount, at, renews = use
        log, before = self._logs.get(replica) or self._new_log(replica), self._latest.get(digest)
        length = len(log.sequences)
        if length and sequence <= log.sequences[-1]:
            return True  # there was no memory to forget it again, as there was none for the rest of its delta
        try:
            dot = sequence << _NUMBER_BITS | log.number
            references = self._references.get(counter, 0) + 1
            log.append(sequence, digest, counter, amount, at, renews)
            if before is not None:
                self._previous[dot] = before
            self._references.setdefault(counter, 0)
            self._latest[digest] = dot
            self._references[counter] = references
            if at < self._oldest:
                self._oldest = at
        except BaseException:
            if length < len(log):
                self._previous.pop(dot, None)
                log.renews.pop(sequence, None)
            log.truncate(length)
            if log.first == length:
                self._drop(log)
            raise
        return before is not None

    def drop_after(self, replica, sequence):
        """Undo the adding of all uses by a replica after a sequence."""
        log = self._logs.get(replica)
        while log and log.sequences[-1] > sequence:
            _, digest, counter, *_ = log.row(len(log) - 1)
            self._unlink(digest, log.pack(log.sequences[-1]))
            self._references[counter] -= 1
            log.renews.pop(log.sequences[-1], None)
            log.truncate(len(log) - 1)
            if log.first == len(log):
                self._drop(log)
                break

    def _new_log(self, replica):
        number = self._by_number.index(None) if None in self._by_number else len(self._by_number)
        log = _Log(replica, number)
        if number == len(self._by_number):
            self._by_number.append(None)
        self._logs[replica] = self._by_number[number] = log
        return log

    def _drop(self, log):
        """Drop a log that became empty."""
        self._by_number[log.number] = None
        del self._logs[log.replica]

    def _unlink(self, digest, dot):
        """Take a use out of those of its key."""
        before, later = self._previous.pop(dot, None), self._latest[digest]
        if later == dot:
            if before is None:
                del self._latest[digest]
            else:
                self._latest[digest] = before
            return
        while self._previous[later] != dot:
            later = self._previous[later]
        if before is None:
            del self._previous[later]
        else:
            self._previous[later] = before

    def _forget_first(self, log):
        sequence, digest, counter, *_ = log.row(log.first)
        if self._references[counter] == 1:
            self.unreferenced.append(counter)
        self._unlink(digest, log.pack(sequence))
        self._references[counter] -= 1
        if not self._references[counter]:
            del self._references[counter]
        log.renews.pop(sequence, None)
        log.first += 1
        if log.first == len(log):
            self._drop(log)

    def keep(self, now):
        """Let all uses answer repetitions, and be remembered, for a whole window from now on, however old they are."""
        self._kept = {replica: log.sequences[-1] for replica, log in self._logs.items()}
        self._kept_until = now + self._window_s

    def forget(self, now):
        """Forget some uses that came of age; return whether there are more of them."""
        before, left = now - 2 * self._window_s, FORGOTTEN_AT_ONCE
        if self._oldest >= before or now <= self._kept_until:
            return False
        for log in list(self._logs.values()):
            while left and log.first < len(log) and log.times[log.first] < before:
                self._forget_first(log)
                left -= 1
            log.free()
        if left:
            self._oldest = min((log.times[log.first] for log in self._logs.values()), default=float("inf"))
        return not left

    def number(self, replica, after):
        """Return how many uses by a replica after a sequence are remembered."""
        log = self._logs.get(replica)
        return len(log) - log.find(after + 1) if log else 0

    def copy(self, replica, after, through, limit):
        """Return the first uses by a replica after one sequence, up to another, as _Columns; () if there are none."""
        log = self._logs.get(replica)
        if log is None:
            return ()
        start = log.find(after + 1)
        return log.copy(start, min(start + limit, log.find(through + 1)))

    def settle(self, digest, holds):
        """Find out which uses of a key are one request; return pairs of Use: one that stays, and one to be cancelled.

        A request has the time of its first use, in all its uses: they expire with it.
        `holds(replica, sequence)` tells whether a dot is held.
        """
        uses = sorted(self.uses(digest), key=lambda use: (use.at, use.replica, use.sequence))
        if not all(holds(*dot) for use in uses for dot in use.renews):
            return []  # what it renews may well be what others repeat
        requests = []  # lists of Use, by time
        for use in uses:
            request = None
            for candidate in requests:
                if any(_differ(use, other) for other in candidate):
                    request = None
                elif request is None and use.at - candidate[0].at <= self._window_s:
                    request = candidate
            if request is None:
                requests.append([use])
            else:
                request.append(use)
                log = self._logs[use.replica]
                log.times[log.find(use.sequence)] = request[0].at
        return [(min(request), use) for request in requests for use in sorted(request)[1:]]


def _differ(one, other):
    """Return whether two uses of a key are known to be two requests."""
    return (
        one.replica == other.replica
        or (one.replica, one.sequence) in other.renews
        or (other.replica, other.sequence) in one.renews
    )

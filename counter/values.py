"""The counters of a node by name: their numbers, and their values."""

import bisect
import heapq


class Values:
    """What each counter stands at: the sum of its totals over all replicas.

    Counters are numbered 0, 1, 2, … in the order in which they were met.  A caller that changes anything
    holds the lock of the Counter that this belongs to; get() needs none.
    """

    def __init__(self):
        self.numbers = {}  # name -> number
        self.names, self.values = [], []  # by number
        self._sorted = []  # the names that were the first in `names`, sorted; replaced as a whole

    def __len__(self):
        return len(self.names)

    def create(self, names):
        """Make counters, which stand at 0.  It may raise MemoryError with only some of them made."""
        self.values.extend([0] * len(names))
        for name in names:
            self.names.append(name)
            self.numbers[name] = len(self.names) - 1

    def truncate(self, length):
        """Drop the counters from number `length` on: they were not needed after all."""
        while len(self.names) > length:
            self.numbers.pop(self.names.pop(), None)
        del self.values[length:]

    def get(self, name):
        """Return the value of a counter; one that is not there is 0."""
        number = self.numbers.get(name)
        try:
            return 0 if number is None else self.values[number]
        except IndexError:  # it was dropped between the two look-ups
            return 0

    def list(self, prefix, start, limit, lock):
        """Return ({name: value}, next) as Counter.list() does."""
        names = self._sorted_names(lock)
        first = bisect.bisect_left(names, max(prefix, start))
        page = [name for name in names[first : first + limit + 1] if name.startswith(prefix)]
        with lock:
            values = {name: self.values[self.numbers[name]] for name in page[:limit]}
        return values, page[limit] if len(page) > limit else None

    def largest(self, prefix, limit, lock):
        """Return {name: value} as Counter.largest() does."""
        with lock:
            names, values = self.names[:], self.values[:]
        if prefix:
            chosen = [(name, value) for name, value in zip(names, values, strict=True) if name.startswith(prefix)]
            names, values = zip(*chosen, strict=True) if chosen else ((), ())
        # First the value that it takes, so that most counters cost one comparison; sorting all of
        # 100,000 takes ten times as long, and no other thread runs meanwhile.
        least = min(heapq.nlargest(limit, values), default=0)
        first = heapq.nsmallest(
            limit, ((-value, name) for name, value in zip(names, values, strict=True) if value >= least)
        )
        return {name: -value for value, name in first}

    def _sorted_names(self, lock):
        with lock:
            names = self._sorted
            new = self.names[len(names) :]
        if new:  # sorted without the lock; what is sorted already costs one comparison each
            names = self._sorted = sorted(names + new)
        return names

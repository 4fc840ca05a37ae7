"""The counters of a node by name: their numbers, and their values."""

import bisect
import heapq
from array import array

from counter.windows import Schedule, is_window, listed_name, present_window


class Values:
    """What each counter stands at: the sum of its totals over all replicas.

    Counters are numbered 0, 1, 2, … in the order in which they were met; the numbers of windows that ended
    are given out again.  A caller that changes anything holds the lock of the Counter that this belongs
    to; get() needs none.  Windows are listed by their series.
    """

    def __init__(self):
        self.numbers = {}  # name -> number
        self.names, self.values = [], []  # by number; `names` is replaced when numbers become free
        self.windows = 0  # how many of the names are those of windows
        self.retired = {}  # number -> name, of windows that ended and that keys still refer to
        self._retired_numbers = {}  # name of such a window -> one of its numbers
        self.free_left = 0  # the first so many of the next are free, and stand at 0
        self._free = array("I")
        self._series = {}  # series -> how many of its windows there are
        self._schedule = Schedule()
        # For lists: names, sorted; those that are not among them yet, plain ones and series; and how many
        # names have gone since.
        self._sorted, self._new, self._new_series, self._gone = [], [], {}, 0

    def __len__(self):
        """Return how many counters there are: plain ones, and series."""
        return len(self.numbers) - self.windows + len(self._series)

    def is_new(self, name):
        """Return whether a counter that is not there would be one more: no further window of a series."""
        return listed_name(name) not in self._series

    def create(self, names):
        """Make counters, which stand at 0; return their numbers.

        It may raise MemoryError with only some of them made.
        """
        length = len(self.names)
        numbers = []
        for name in names:
            if self.free_left:
                number = self._free[self.free_left - 1]
                self.names[number] = name
                self.free_left -= 1
            else:
                number = len(self.names)
                self.names.append(name)
            numbers.append(number)
            if is_window(name):
                self._create_window(name, number)
            else:
                self._new.append(name)
                self.numbers[name] = number
        self.values.extend([0] * (len(self.names) - length))
        return numbers

    def _create_window(self, name, number):
        series = listed_name(name)
        held, windows = self._series.get(series, 0) + 1, self.windows + 1
        self._schedule.add(name)  # if it is not made after all, it is not there when its end comes
        if held == 1:
            self._new_series[series] = None
        self.numbers[name] = number
        try:
            self._series[series] = held
        except BaseException:
            del self.numbers[name]
            raise
        self.windows = windows

    def truncate(self, length, free_left):
        """Drop the counters made since there were so many numbers, and so many free: they were not needed after all."""
        for place in range(self.free_left, free_left):
            self._remove(self.names[self._free[place]], self._free[place])
        self.free_left = free_left
        while len(self.names) > length:
            self._remove(self.names.pop(), len(self.names))
        del self.values[length:]

    def _remove(self, name, number):
        """Take out a counter by name, unless it was not made."""
        self._forget_retired(number)
        if self.numbers.get(name) != number:
            return
        # What allocates comes first.
        series = listed_name(name) if is_window(name) else None
        left, windows, gone = self._series.get(series, 1) - 1, self.windows - (series is not None), self._gone + 1
        del self.numbers[name]
        self.windows = windows
        if left:
            self._series[series] = left
        else:
            self._gone = gone
            self._series.pop(series, None)
            self._new_series.pop(series, None)

    # Windows that end.

    def end(self, horizon, limit):
        """Take out up to `limit` windows that have ended; return (their numbers, the end of these, at most `horizon`).

        The numbers are to be freed, or to be retired.
        """
        names, reached = self._schedule.first(horizon, limit)
        numbers = {self.numbers[name] for name in names if name in self.numbers}
        for number in numbers:
            self._remove(self.names[number], number)
            self.values[number] = 0
        self._schedule.drop(len(names))
        return numbers, reached

    def is_held(self, number):
        """Return whether a counter is not a window that has ended."""
        return self.numbers.get(self.names[number]) == number

    def retire(self, number):
        """Keep the name of a window that ended, or is not held."""
        name = self.names[number]
        self._remove(name, number)
        self.retired[number] = name
        self._retired_numbers[name] = number

    def _forget_retired(self, number):
        name = self.retired.pop(number, None)
        if name is not None and self._retired_numbers.get(name) == number:
            del self._retired_numbers[name]

    def number_of_key(self, name):
        """Return a number of a counter, or of a window that has ended; None if it has none."""
        return self.numbers.get(name, self._retired_numbers.get(name))

    def free(self, numbers):
        """Have numbers given out again: a list."""
        names = self.names[:]  # a delta that was cut has the old ones, and may still be on its way
        for number in numbers:
            self._forget_retired(number)
            names[number], self.values[number] = "", 0
        self.names = names
        del self._free[self.free_left :]
        self._free.extend(numbers)
        self.free_left = len(self._free)

    # Reading.

    def get(self, name):
        """Return the value of a counter; one that is not there is 0."""
        number = self.numbers.get(name)
        try:
            return 0 if number is None else self.values[number]
        except IndexError:  # it was dropped between the two look-ups
            return 0

    def list(self, prefix, start, limit, time, lock):
        """Return ({name: value}, next) as Counter.list() does; of series the value of the window of a time."""
        names = self._sorted_names(lock)
        first = bisect.bisect_left(names, max(prefix, start))
        page = [name for name in names[first : first + limit + 1] if name.startswith(prefix)]
        with lock:
            values = {name: self.get(present_window(name, time)) for name in page[:limit]}
        return values, page[limit] if len(page) > limit else None

    def largest(self, prefix, limit, time, lock):
        """Return {name: value} as Counter.largest() does; of series the value of the window of a time."""
        with lock:
            names, values, series = self.names[:], self.values[:], list(self._series)
            only_plain = len(names) == len(self.numbers) and not series
        if prefix or not only_plain:
            values = [(name, value) for name, value in zip(names, values, strict=True) if name and not is_window(name)]
            values += [(name, self.get(present_window(name, time))) for name in series]
            chosen = [(name, value) for name, value in values if name.startswith(prefix)]
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
            before, new, series, gone = self._sorted, self._new[:], list(self._new_series), self._gone
        if not new and not series and not gone:
            return before
        names = before + new + series
        if gone:
            names = [name for name in dict.fromkeys(names) if name in self.numbers or name in self._series]
        names = sorted(names)  # without the lock; what is sorted already costs one comparison each
        with lock:
            if self._sorted is before and self._gone == gone:  # nobody else did it, and what was left out stays out
                self._sorted, self._gone = names, 0
                del self._new[: len(new)]
                for name in series:
                    self._new_series.pop(name, None)
        return names

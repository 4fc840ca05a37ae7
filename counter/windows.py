"""Windowed counters: what is counted per minute, hour or day, and goes by itself.

    visits@1h               a series: counts per hour, of which 60 past ones are kept
    visits@1d:400           counts per day, kept for 400 days
    visits@1h:60/490512     the counter of one window; only nodes use such names

Window i of a series of width W is the time [i * W, (i + 1) * W), in seconds since 1970, UTC.  To all that
replicates and stores, its counter is one like any other.  What tells when it ends is its name: at
(i + 1 + KEEP) * W nobody can ask for it any more.  Every node drops it by itself once it has seen that
time pass, see Horizon.  That takes no message and leaves no tombstone: what comes later under such a
name has ended as well, and is not taken.
"""

import heapq
import re
from collections import deque, namedtuple
from datetime import datetime, timezone
from functools import lru_cache

from counter.ids import NAME

KEEP_DEFAULT, KEEP_MAX = 60, 1000
WIDTH_MAX_S = 366 * 86_400
GRACE_S = 60.0  # for how long a clock has to show that a window ended before it is dropped
NEVER = float("-inf")
_UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_SERIES = re.compile(r"([^@]*)@([1-9][0-9]{0,7})([smhd])(?::([1-9][0-9]{0,3}))?\Z", re.ASCII)
_INDEX = re.compile(r"(?:0|[1-9][0-9]{0,14})\Z", re.ASCII)


class Series(namedtuple("Series", "name width_s keep")):
    """A windowed counter: of how many seconds its windows are, and how many past ones are kept."""

    __slots__ = ()

    def __str__(self):
        """Return its name in the one spelling in which it is listed: 1h for 60m, and no KEEP of 60."""
        return self._full_name().removesuffix(f":{KEEP_DEFAULT}")

    def _full_name(self):
        for unit, seconds in _UNITS.items():
            if self.width_s % seconds == 0:
                return f"{self.name}@{self.width_s // seconds}{unit}:{self.keep}"

    def index_at(self, time):
        """Return the number of the window that a time, in seconds since 1970, is in."""
        return int(time // self.width_s)

    def window(self, index):
        """Return the name of the counter of a window."""
        return f"{self._full_name()}/{index}"

    def end_of(self, index):
        """Return the time from which on a window is not kept, in seconds since 1970."""
        return (index + 1 + self.keep) * self.width_s


@lru_cache(maxsize=4096)
def parse_series(text):
    """Return the Series with that name, in any spelling; ValueError, which says why, if there can be none."""
    match = _SERIES.match(text)
    if not match or not NAME.match(match[1]):
        raise ValueError("a windowed counter is NAME@WIDTH or NAME@WIDTH:KEEP, such as visits@1h or visits@1d:400")
    width_s, keep = int(match[2]) * _UNITS[match[3]], int(match[4] or KEEP_DEFAULT)
    if width_s > WIDTH_MAX_S:
        raise ValueError("a window is from 1s to 366d wide")
    if keep > KEEP_MAX:
        raise ValueError(f"of a windowed counter 1 to {KEEP_MAX:,} past windows are kept")
    return Series(match[1], width_s, keep)


def is_series(name):
    """Return whether a good name from a client is that of a series."""
    return "@" in name


def canonical(name):
    """Return a good name from a client in the one spelling in which it is listed."""
    return str(parse_series(name)) if "@" in name else name


def present_window(name, time):
    """Return the name of the counter that a good name from a client stands for at a time."""
    if "@" not in name:
        return name
    series = parse_series(name)
    return series.window(series.index_at(time))


def is_window(name):
    """Return whether a name is that of a window."""
    return "/" in name


def parse_window(name):
    """Return the Series and the index of a window; ValueError if it is none, or is spelled in another way."""
    text, _, index = name.rpartition("/")
    series = parse_series(text)
    if not _INDEX.match(index) or series.window(int(index)) != name:
        raise ValueError(f"{name!r} is not the name of a window")
    return series, int(index)


def is_counter(name):
    """Return whether a name may be that of a counter among nodes: a plain one or a window."""
    if NAME.match(name):
        return True
    try:
        return bool(parse_window(name))
    except ValueError:
        return False


def end_of(name):
    """Return the time from which on a counter is not kept, in seconds since 1970; infinity for a plain one."""
    if "/" not in name:
        return float("inf")
    series, index = parse_window(name)
    return series.end_of(index)


def listed_name(name):
    """Return the name under which a counter is listed: of a window that of its series."""
    return name.rpartition("/")[0].removesuffix(f":{KEEP_DEFAULT}") if "/" in name else name


def rfc3339(time):
    """Return a time in whole seconds since 1970 as RFC 3339 has it."""
    return f"{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


class Horizon:
    """Up to when windows have ended: the least that the wall clock showed within the last GRACE_S.

    With a clock that runs evenly that is the time GRACE_S ago.  A clock that jumps ahead for less
    than that, as one may that is set while a machine starts, ends no window.
    """

    def __init__(self):
        self._looks = deque()  # (now, wall), both rising: a look after which the clock showed less is left out
        self._since = self._latest = NEVER  # looks were taken without a gap since then, and the latest

    def look(self, now, wall):
        """Take in what the wall clock shows `now`, by a clock that only moves forward; return the horizon, or NEVER."""
        if now - self._latest > GRACE_S:
            self._looks.clear()
            self._since = now
        self._latest = now
        while self._looks and self._looks[-1][1] >= wall:
            self._looks.pop()
        self._looks.append((now, wall))
        while self._looks[0][0] < now - GRACE_S:
            self._looks.popleft()
        return self._looks[0][1] if now - self._since >= GRACE_S else NEVER


class Schedule:
    """Which windows end when.  Not for several threads at once."""

    def __init__(self):
        self._by_end = {}  # end -> names
        self._ends = []  # a heap of them

    def add(self, name):
        """Add a window; one may be there twice, or be gone when its end comes."""
        end = end_of(name)
        names = self._by_end.get(end)
        if names is None:
            names = self._by_end[end] = []
            try:
                heapq.heappush(self._ends, end)
            except BaseException:
                del self._by_end[end]
                raise
        names.append(name)

    def first(self, horizon, limit):
        """Return some windows that end first, and have ended at `horizon`: up to `limit`, all with one end.

        They come as (names, their end), or as ([], horizon) if there are none.
        """
        if not self._ends or self._ends[0] > horizon:
            return [], horizon
        end = self._ends[0]
        return self._by_end[end][-limit:], end

    def drop(self, number):
        """Drop the windows that first() returned, so many."""
        if number:
            names = self._by_end[self._ends[0]]
            del names[-number:]
            if not names:
                del self._by_end[heapq.heappop(self._ends)]

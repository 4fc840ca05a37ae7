"""Counts of requests, by route and status, and how long they took.

A repeated request takes a few microseconds, so counting it must not take a lock: every thread that
answers requests has a ThreadTally that only it writes.  Requests adds them up for a scrape, together
with the counts of threads that have ended.
"""

import random
import threading
from bisect import bisect_left
from collections import defaultdict

OTHER = "other"  # the route of requests to an unknown path, or with a malformed head
TIMED_ONE_IN = 64  # repeated requests: two readings of the clock would be a tenth of the cost of one
BUCKETS_S = (0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)  # up to ?timeout=, which is 60 s at most


class Tally:
    """The requests to one route, by status, and how long they took."""

    def __init__(self):
        self.statuses = {}  # status, as bytes -> [number]: a holder of the list counts without a lookup
        self.buckets = [0] * (len(BUCKETS_S) + 1)  # not cumulative; the last is for slower requests
        self.seconds = 0.0
        self.untimed = random.randrange(TIMED_ONE_IN)  # repeated requests until one is timed

    def number(self, response):
        """Return the list with the number of responses of the same status as this one."""
        return self._number(response[9:12])  # of "HTTP/1.1 200 OK"

    def _number(self, status):
        return self.statuses.setdefault(status, [0])

    def count(self, response, seconds):
        """Count one request and its duration."""
        self.number(response)[0] += 1
        self.observe(seconds, 1)

    def observe(self, seconds, times):
        """Count a duration that stands for `times` requests."""
        self.buckets[bisect_left(BUCKETS_S, seconds)] += times
        self.seconds += seconds * times

    def add(self, other):
        """Add another tally.  Its thread may go on counting: copying a dictionary is atomic."""
        for status, (number,) in dict(other.statuses).items():
            self._number(status)[0] += number
        self.buckets = [mine + its for mine, its in zip(self.buckets, other.buckets, strict=True)]
        self.seconds += other.seconds


class ThreadTally:
    """What one thread counts.  Only that thread calls `of` and writes to the tallies."""

    def __init__(self):
        self._routes = {}  # route -> Tally

    def of(self, route):
        tally = self._routes.get(route)
        if tally is None:
            tally = self._routes[route] = Tally()
        return tally

    def add_to(self, totals):
        for route, tally in dict(self._routes).items():
            totals[route].add(tally)


class Requests:
    """All requests of a node, by route."""

    def __init__(self):
        # Guards the two below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._open = set()  # the ThreadTally of every live thread
        self._ended = defaultdict(Tally)  # route -> the counts of threads that have ended

    def open(self):
        """Return the tally of a new thread."""
        tally = ThreadTally()
        with self._lock:
            self._open.add(tally)
        return tally

    def close(self, tally):
        """Take over the counts of a thread that ends."""
        with self._lock:
            self._open.remove(tally)
            tally.add_to(self._ended)

    def totals(self):
        """Return {route: Tally} since the start, sorted by route; it belongs to the caller."""
        totals = defaultdict(Tally)
        with self._lock:
            for route, tally in self._ended.items():
                totals[route].add(tally)
            for tally in self._open:
                tally.add_to(totals)
        return dict(sorted(totals.items()))

"""The counter of a node: what it counts for clients, what they read, and what goes by itself.

What it holds, and how that is replicated, is in counter/replicated.py.  Pure: no socket, no thread; of
clocks only the wall's, which tells the window to count in.
"""

import threading
import time

from counter import batches
from counter.replicated import ReplicatedState
from counter.windows import Horizon, canonical, is_series, parse_series, present_window

ENDED_AT_ONCE, CLEARED_AT_ONCE = 50, 4000  # windows and rows; what takes longer than a millisecond stalls readers
ENDED_MIN = 5000  # windows that are dropped in a sweep, if so many have ended
PAUSE_S = 0.002  # in which others run


class Counter(ReplicatedState):
    """Named counters of one node, replicated by deltas.

    Threads may call anything at any time.  `replica` is the id under which this node counts.
    `now` is in seconds of any clock that only moves forward; a key answers repetitions for
    `key_window_s`.  The two limits hold for what this node accepts, never for what it merges.

    When memory runs out a call raises MemoryError and has changed nothing.
    """

    def __init__(self, replica, counters_max=100_000, keys_max=1_000_000, key_window_s=3600.0, wall=time.time):
        super().__init__(replica, counters_max, keys_max, key_window_s)
        self._wall = wall
        self._horizon = Horizon()  # used by one thread, the one that calls expire()
        self._pausing = threading.Event()  # set: make no pauses, the node is shutting down

    # Counting.

    def increment(self, name, amount=1):
        """Count `amount`, any integer but 0; return (replica, sequence, value of the counter).

        Raises TooManyCounters or WindowEnded, and then has changed nothing.
        """
        if is_series(name):
            name = present_window(name, self._wall())
        with self._lock:
            counted = self._histories.count(name, amount)
            self._vector = None
            if self._waiters.anybody:
                self._waiters.reached_locked(*counted[:2])
            return counted

    def increment_once(self, key, name, amount, now):
        """Count `amount` unless it was counted under the same key, a string, before.

        Returns (replica, sequence, value, replayed) with the first dot of that key, as far as
        known here.  Raises KeyReused, TooManyKeys, TooManyCounters, WindowEnded, and then has changed nothing.
        """
        name, window = canonical(name), present_window(name, self._wall())
        (digest,) = batches.key_digests(key, [name])
        with self._lock:
            self._keys.forget(now)
            first, renews = self._keys.known(digest, now)
            if first:
                dot = batches.repeated(key, {name: amount}, [first], self._keys, self._counters)
                return *dot, self._counters.get(window), True
            self._keys.make_room(now)
            counted = self._histories.count(window, amount, (digest, now, renews))
            self._changed_locked(counted[0], counted[1])
            return *counted, False

    def increment_many(self, amounts):
        """Count a batch, {name: amount}, all of it or nothing; return (replica, sequence, {name: value}).

        Its increments have consecutive sequences, in the order given; the last one is returned.  No node
        ever holds a part of them.  No two names may be spellings of one series.
        Raises TooManyCounters or WindowEnded, and then has changed nothing.
        """
        windows = self._windows(amounts)
        with self._lock:
            replica, sequence, counts = self._histories.count_many(windows)
            self._changed_locked(replica, sequence)
        return replica, sequence, counts if windows is amounts else dict(zip(amounts, counts.values(), strict=True))

    def increment_many_once(self, key, amounts, now):
        """Count a batch unless it was counted under the same key, a string, before.

        Returns (replica, sequence, {name: value}, replayed) with the last dot of the first batch under
        that key, as far as known here.  Raises KeyReused, TooManyKeys, TooManyCounters, WindowEnded, and
        then has changed nothing.
        """
        windows, items = self._windows(amounts), {canonical(name): amount for name, amount in amounts.items()}
        digests = batches.key_digests(key, items)
        with self._lock:
            self._keys.forget(now)
            known = [self._keys.known(digest, now) for digest in digests]
            firsts = [first for first, _ in known]
            if any(firsts):
                dot = batches.repeated(key, items, firsts, self._keys, self._counters)
                return *dot, dict(zip(amounts, map(self._counters.get, windows), strict=True)), True
            self._keys.make_room(now, len(digests))
            uses = [(digest, now, renews) for digest, (_, renews) in zip(digests, known, strict=True)]
            replica, sequence, counts = self._histories.count_many(windows, uses)
            self._changed_locked(replica, sequence)
        return replica, sequence, dict(zip(amounts, counts.values(), strict=True)), False

    def _windows(self, amounts):
        """Return a batch with the present windows in place of series."""
        if not any(map(is_series, amounts)):
            return amounts
        time = self._wall()
        return {present_window(name, time): amount for name, amount in amounts.items()}

    # What goes by itself.

    def expire(self, now):
        """Forget the idempotency keys whose time has passed, and drop the windows that have ended."""
        more = True
        while more:
            with self._lock:  # anew each time, as they may be many
                self._settle_locked()
                more = self._keys.forget(now)
                self._histories.free_forgotten()
        with self._lock:
            if self._changes.grow_older(self.replica, self._held_locked, now):
                self._vector = None
        most = max(ENDED_MIN, self._counters.windows // 20)
        self.end_windows(self._horizon.look(now, self._wall()), most)

    def end_windows(self, horizon, most=float("inf")):
        """Drop windows that have ended at a time, in seconds since 1970, and take none of them from now on.

        About `most` are dropped, a few at a time and with pauses, or clients would wait where many end at once.
        """
        ended, more = set(), True
        while more and len(ended) < most:
            with self._lock:
                numbers, more = self._histories.end_windows(horizon, ENDED_AT_ONCE)
            ended |= numbers
            if len(numbers) == ENDED_AT_ONCE:
                self._pausing.wait(PAUSE_S)
        if not ended:
            return
        with self._lock:
            cleared = dict(self._histories.streams)
        for replica, stream in cleared.items():
            for start in range(0, len(stream), CLEARED_AT_ONCE):
                with self._lock:
                    stream.clear(ended, start, start + CLEARED_AT_ONCE)
                if start:
                    self._pausing.wait(PAUSE_S)
            with self._lock:
                stream.compact(self._applied.get(replica, 0))
        with self._lock:
            for replica, stream in self._histories.streams.items():
                if cleared.get(replica) is not stream:  # it is new
                    stream.clear(ended, 0, len(stream))
            self._cancellations.end(ended)
            self._histories.free(ended)

    @property
    def horizon(self):
        """The time, in seconds since 1970, up to which windows have ended here."""
        return self._histories.horizon

    def was_loaded(self, now):
        """Take note that what was merged so far is from a file: it is the past.

        Every key is kept for a whole window from now on, however old it is.  The nodes of a cluster that
        was down for longer than the window may have taken one key at two of them; only while both uses
        are remembered is that noticed.
        """
        with self._lock:
            self._keys.keep(now)
            self._changes.settle(self.replica, self._held_locked)
            self._vector = None

    # Reading.

    def value(self, name):
        """Return the value of a counter, of a series that of its present window; one never incremented is 0."""
        return self._counters.get(present_window(name, self._wall()))

    def windows(self, name, last):
        """Return the last so many windows of a series, the present one included: [(start, value)], oldest first.

        A start is in seconds since 1970.
        """
        series = parse_series(name)
        present = series.index_at(self._wall())
        indexes = range(max(0, present + 1 - last), present + 1)
        names = [series.window(index) for index in indexes]
        with self._lock:
            values = list(map(self._counters.get, names))
        return [(index * series.width_s, value) for index, value in zip(indexes, values, strict=True)]

    def list(self, prefix, start, limit):
        """Return the counters whose names begin with `prefix`, from the name `start` on, at most `limit`.

        They come as ({name: value}, next), by name; `next` is where the next page starts, or None.  A
        series has the value of its present window.
        """
        return self._counters.list(prefix, start, limit, self._wall(), self._lock)

    def largest(self, prefix, limit):
        """Return the counters with the largest values whose names begin with `prefix`, at most `limit`.

        They come as {name: value}, the largest first; equal ones by name.
        """
        return self._counters.largest(prefix, limit, self._wall(), self._lock)

    def sizes(self):
        """Return how many counters and how many idempotency keys this node knows; of a series all windows are one."""
        return len(self._counters), len(self._keys)

    @property
    def held_windows(self):
        """How many windows of windowed counters this node holds."""
        return self._counters.windows

    def weight(self, active):
        """Return how much is held of whom, a Weight; `active` are the replicas of the peers that are."""
        with self._lock:
            return self._histories.weight(active)._replace(cancellations=len(self._cancellations))

    def stop_waiting(self):
        """Wake all who wait in wait_until_held and refuse new waits; called when the node stops."""
        super().stop_waiting()
        self._pausing.set()

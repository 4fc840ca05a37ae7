"""Keeping a counter in a file: the disk is a peer.

    Store.open()     lock the file, merge everything in it into the counter
    thread `store`   counter.deltas(what the file holds) ─▶ one transaction ─▶ the file holds more

There is no queue and no log of increments: what the file still needs is the difference between
what is applied here and what was last committed.  A slow disk makes that difference larger and
commits rarer, never the node slower; a dead one does no more.  A process never resumes the replica
id of an earlier one: it merges the file as it would merge the deltas of a peer that is gone.
"""

import logging
import sqlite3
import threading
import time
from collections import namedtuple

from counter import datafile
from counter.absorption import is_shown
from counter.datafile import DataFileError
from counter.datawriter import Writer
from counter.vectors import Vector
from counter.waiting import Waiters
from counter.windows import NEVER

log = logging.getLogger("counter.store")

COMMIT_PAUSE_S = 0.05  # between the starts of two commits, unless somebody waits for the second
DELTAS_MAX = 2**20  # bytes of deltas in a transaction of several replicas, roughly
UPKEEP_S = 5.0  # between two looks whether the file is still in its place, and at keys whose time has passed
RETRY_S, RETRY_MAX_S = 0.1, 10.0  # the first and the longest pause after a failure; it doubles in between

# ok: the last transaction succeeded.  lag_increments: how many are applied here and not in the file, and
# lag_s: for how long.  error: why the last transaction failed, or None.
Status = namedtuple("Status", "ok lag_increments lag_s error")


class Store:
    """A counter's data file, and the thread that writes to it.

    Threads may call anything at any time, after open().  `clock` only moves forward; `wall`, in
    seconds since 1970, may be set back and forth, and is needed for the times of keys alone.
    """

    def __init__(self, path, counter, cluster, fsync=True, key_window_s=3600.0, clock=time.monotonic, wall=time.time):
        self._path, self._counter, self._cluster, self._fsync = path, counter, cluster, fsync
        self._key_window_s, self._clock, self._wall = key_window_s, clock, wall
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._wake = threading.Event()  # look again: somebody waits, the counter changed, or the node stops
        self._stopping = False
        # Guards the six below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._saved = {}  # what the file holds for certain, {replica: sequence}; written by one thread
        self._waiters = Waiters(self._lock)  # who waits for a dot to be saved
        self._error = None  # why the last transaction failed
        self._complete_at = clock()  # when everything applied was in the file
        self._numbers = {"commits": 0, "errors": 0, "commit_seconds": 0.0}
        # Used by one thread at a time: the one that calls open(), then the store's.
        self._lock_file = self._writer = None
        self._loaded = None  # the identity of the file that was read, or made, last
        self._started = clock()
        self._pause_until = self._upkeep_at = -float("inf")
        self._failures = 0  # in a row
        self._horizon = NEVER  # windows that ended until then are not in the file any more
        self._given_up = False  # the last commit failed, and the node is stopping

    def open(self):
        """Lock the file and merge what it holds into the counter, or make one.  Raises DataFileError.

        One that can be read but not written to counts as failing, and is tried again.
        """
        self._lock_file = datafile.lock(self._path)
        try:
            there = datafile.exists(self._path)
            self._load()
            try:
                self._open_writer()
            except (sqlite3.Error, OSError) as error:
                if not there:
                    raise DataFileError(self._path, f"cannot be made: {error}") from None
                self._failed(error)
        except BaseException:
            self._close()
            raise

    def start(self):
        self._thread.start()

    def stop(self, timeout_s):
        """Save everything, end the thread and close the file; return whether everything is in it."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is None:  # it was never started
            self._close()
        else:
            self._thread.join(timeout_s)
        lacking = self._lacks(self._counter.vector())
        with self._lock:
            return not self._thread.is_alive() and self._error is None and not lacking

    def stop_waiting(self):
        """Wake all who wait for a dot to be saved and refuse new waits; called when the node stops."""
        self._waiters.stop()

    # What others ask.

    def wait_until_saved(self, replica, sequence, timeout_s):
        """Wait until a dot that is held here is in the file for certain; return whether it is.

        It is so at once, and False, while the file fails: what it held may be gone with it.
        """

        def is_saved():
            return is_shown(self._saved, self._counter.carriers(replica, sequence))

        def is_over():
            self._wake.set()  # the file has to be written to at once: a request waits for it
            return self._error or is_saved()

        if not is_over():
            self._waiters.wait(is_over, timeout_s, (replica, sequence))
        saved = is_saved()
        with self._lock:
            return not self._error and saved

    def status(self):
        """Return the Status of the file."""
        mine, now = self._counter.vector(), self._clock()
        with self._lock:
            lag = sum(through - saved for _, through, saved in mine.beyond(self._saved))
            return Status(self._error is None, lag, max(0.0, now - self._complete_at) if lag else 0.0, self._error)

    def numbers(self):
        """Return what was done since the start: commits, errors, and commit_seconds."""
        with self._lock:
            return dict(self._numbers)

    # The thread.

    def _run(self):
        while self._wait():
            try:
                self._commit()
            except Exception as error:  # the thread must not end: it would do so in silence
                if not isinstance(error, (sqlite3.Error, OSError, DataFileError)):
                    log.exception("a bug: saving failed")
                self._failed(error)
        self._close()

    def _wait(self):
        """Wait until a commit is due; return False once the node stops and none is to come."""
        while True:
            self._wake.clear()
            vector, now = self._counter.vector(), self._clock()
            lacking = self._lacks(vector)
            if self._stopping:
                return lacking and not self._given_up
            with self._lock:
                urgent = self._waiters.anybody and self._error is None
            due_at = self._pause_until if lacking or self._error else self._upkeep_at
            if now >= due_at or (urgent and lacking):
                return True
            if not lacking:
                self._counter.wake_on_change(vector, self._wake)
            self._wake.wait(due_at - now)
            if not lacking:
                self._complete_at = self._clock()

    def _lacks(self, vector):
        return self._counter.lacks(self._saved, vector)

    def _commit(self):
        began = self._clock()
        if self._writer is None:
            self._load()
            self._open_writer()
        vector = self._counter.vector()
        deltas = self._counter.deltas(self._saved, DELTAS_MAX, began)
        if deltas:
            self._pause_until = began + COMMIT_PAUSE_S
            self._writer.save(deltas, self._wall())
        if began >= self._upkeep_at:
            self._upkeep_at = began + UPKEEP_S
            self._writer.check_in_place()
            if began - self._started > self._key_window_s:  # as long as the counter remembers what was loaded
                self._writer.forget_keys(self._wall() - 2 * self._key_window_s)
            if self._counter.horizon > self._horizon:
                if self._writer.end_windows(self._counter.horizon):
                    self._upkeep_at = began  # and the others with the next commit
                else:
                    self._horizon = self._counter.horizon
        self._committed(deltas, vector, began)

    def _committed(self, deltas, vector, began):
        """Take note that a transaction, perhaps an empty one, holds; tell those who waited for it."""
        self._failures = 0
        saved = {delta.replica: self._saved_through(delta) for delta in deltas}
        with self._lock:
            failed, self._error = self._error, None
            before, news = self._saved, {}
            for delta in deltas:
                news[delta.replica] = saved[delta.replica]
                news |= dict.fromkeys(delta.absorbed, 0)
            self._saved = before.updated(news)
            for replica, through in news.items():
                self._waiters.reached_locked(replica, through, before.get(replica))
            if any(delta.absorbed for delta in deltas):
                self._waiters.wake_all_locked()
            self._numbers["commits"] += bool(deltas)
            self._numbers["commit_seconds"] += self._clock() - began
        if not self._lacks(vector):
            with self._lock:
                self._complete_at = began
                self._saved = vector.updated(news)  # the same, but comparing it with the counter's next one is quick
        if failed:
            log.info("data file works again: file=%s", self._path)

    def _saved_through(self, delta):
        """Return the sequence through which the file holds the replica of a delta that it was given."""
        # Another process may have written to the file that it was absorbed: then it is held, but not in the vector.
        through = self._writer.vector.get(delta.replica, 0)
        return through or (delta.through if self._writer.holds(delta.replica, delta.through) else 0)

    def _failed(self, error):
        """Take note that a transaction failed: it is tried again, from opening the file on."""
        self._close_writer()
        self._given_up = self._stopping
        self._failures += 1
        self._pause_until = self._clock() + min(RETRY_MAX_S, RETRY_S * 2 ** min(self._failures - 1, 30))
        what = getattr(error, "what", None) or str(error)
        with self._lock:
            first, self._error = self._error is None, what
            self._numbers["errors"] += 1
            self._waiters.wake_all_locked()
        # A disk that stays full is one line, not one per try.
        log.log(logging.WARNING if first else logging.DEBUG, "data file failing: file=%s error=%s", self._path, what)

    # The file.

    def _load(self):
        """Merge what the file holds, unless that was done; if there is none, there is nothing to do."""
        found = datafile.identity(self._path)
        if not datafile.exists(self._path) or found == self._loaded:
            return
        held = {}
        with datafile.Reader(self._path, self._cluster) as reader:
            for delta in reader.deltas(self._wall()):
                self._counter.merge(delta, self._clock())
                held[delta.replica] = delta.through
                # Not what merge() says: two loaded keys may have made a cancellation before it was read.
                if not self._counter.holds(delta.replica, delta.through):
                    raise datafile.damaged(self._path, f"replica {delta.replica} lacks what it requires")
        with self._lock:
            # What the writer finds will be the same; but the file may be one that cannot be written.
            self._saved = Vector(held)
        self._counter.was_loaded(self._clock())
        self._loaded = found

    def _open_writer(self):
        self._writer = Writer(self._path, self._cluster, self._fsync)
        self._horizon = NEVER
        self._loaded = datafile.identity(self._path)
        with self._lock:
            self._saved = Vector(dict(self._writer.vector))

    def _close_writer(self):
        if self._writer:
            self._writer.close()
            self._writer = None

    def _close(self):
        self._close_writer()
        if self._lock_file:
            self._lock_file.close()

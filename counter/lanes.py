"""Threads for what may take long, so that the thread that serves all connections never has to wait.

There is a lane for each reason to take long, so that clients who wait cannot keep peers waiting.
"""

import _thread
import itertools
import logging
import threading
import time
from collections import deque

log = logging.getLogger("counter.serving")

# What an action says of itself (api.action), from which follows where it runs.
QUICK = "quick"  # takes microseconds: in the thread that serves all connections
SLOW = "slow"  # computes for longer than that
WAITS = "waits"  # for something that others do
PEERS = "peers"  # exchanges a message with a peer
STREAMS = "streams"  # goes on for ever: begins and goes on in the thread that serves all connections

IDLE_S = 10.0  # after which a thread without work ends
START_TIMEOUT_S = 5.0  # for a new thread to come to life


class Lane:
    """Threads for one kind of jobs: started when they are needed, at most so many, one kept for good.

    A job is a function that is called with the ThreadTally of its thread.
    """

    def __init__(self, name, threads_max, requests, queues=True):
        self._name, self._threads_max, self._requests, self._queues = name, threads_max, requests, queues
        self._serial = itertools.count(1)
        # Guards all below.  Who waits on it waits for a job, or for the end of a thread.
        self._changed = threading.Condition()
        self._jobs = deque()
        self._idle = 0  # threads that wait for a job
        self._live = 0  # threads there are
        # Threads that were started and have not come to life.  For lack of memory they may never do so.
        self._starting, self._started_at = 0, 0.0
        self._stopping = False

    def start(self):
        """Start the thread that is kept for good."""
        with self._changed:
            self._has_thread_for_locked(1)

    def put(self, job):
        """Have a thread do a job; return False if there is none for it.

        Where the lane queues, jobs wait until a thread is free; otherwise none does.
        """
        with self._changed:
            if not self._has_thread_for_locked(1) and not (self._queues and self._live + self._starting):
                return False
            self._jobs.append(job)
            self._changed.notify()
        return True

    def tend(self):
        """Start a thread for jobs that were left behind; to be called now and then."""
        with self._changed:
            self._has_thread_for_locked(0)

    @property
    def busy(self):
        """How many threads do a job."""
        return self._live - self._idle

    def stop(self, timeout_s):
        """Let the threads finish their jobs and end; return whether they did in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def _has_thread_for_locked(self, further):
        """Return whether a thread is free for the jobs there are and as many further ones, having started one."""
        if time.monotonic() > self._started_at + START_TIMEOUT_S:
            self._starting = 0
        if len(self._jobs) + further <= self._idle + self._starting:
            return True
        if self._live + self._starting >= self._threads_max:
            return False
        try:
            # threading.Thread.start() waits for the new thread, which is for ever if that dies at once.
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError):
            return False
        self._starting, self._started_at = self._starting + 1, time.monotonic()
        return True

    def _run(self):
        with self._changed:
            self._starting, self._live = max(0, self._starting - 1), self._live + 1
        try:
            threading.current_thread().name = f"{self._name}-{next(self._serial)}"
            tally = self._requests.open()
        except MemoryError:
            self._leave()
            return
        try:
            while job := self._next_job():
                self._do(job, tally)
        except MemoryError:
            self._leave()
        finally:
            self._requests.close(tally)

    def _leave(self):
        with self._changed:
            self._leave_locked()

    def _leave_locked(self):
        self._live -= 1
        self._changed.notify_all()

    def _next_job(self):
        """Wait for a job and return it; None if this thread ends, which then stops being counted."""
        with self._changed:
            while not self._jobs:
                if self._stopping:
                    return self._leave_locked()
                self._idle += 1
                try:
                    has_come = self._changed.wait(IDLE_S)
                finally:
                    self._idle -= 1
                if not has_come and not self._jobs and self._live > 1:
                    return self._leave_locked()
            return self._jobs.popleft()

    def _do(self, job, tally):
        try:
            job(tally)
        except Exception:  # a bug; the thread must live on
            log.exception("a job failed")

"""Waiting for an increment: to arrive here, at other nodes, or in a file.

This is the one place where a request blocks.  Who would rather be called than block a thread adds
a function of its own, and asks again what it waits for when that is called.
"""

import threading
import time


class Waiters:
    """Who waits for which dot, and who for the next change of anything.

    `lock` is the one of the object whose changes they wait for: it calls reached(), advanced() and
    wake_all() under it.  What they call must neither block nor take that lock.
    """

    def __init__(self, lock):
        self._lock = lock
        # Guarded by the lock.
        self._waiting = {}  # replica -> {wake: sequence}
        self._watching = set()  # the wakes of those who want to know of the next change, once
        self._stopping = False  # waiters return at once: the node is shutting down
        self.anybody = False  # whether there is anybody to wake: read once per increment

    def __len__(self):
        """Return how many wait for a dot."""
        return sum(map(len, self._waiting.values()))

    # For those who wait.

    def add(self, wake, replica, sequence):
        """Have wake() called whenever a dot may have come, until it is removed."""
        with self._lock:
            self._waiting.setdefault(replica, {})[wake] = sequence
            self._count_locked()

    def remove(self, wake, replica):
        with self._lock:
            wakes = self._waiting[replica]
            del wakes[wake]
            if not wakes:
                del self._waiting[replica]
            self._count_locked()

    def watch_locked(self, wake):
        """Have wake() called at the next change of anything, once."""
        self._watching.add(wake)
        self._count_locked()

    def wait(self, is_over, timeout_s, dot=None):
        """Wait until is_over() is true, which is asked anew whenever the dot (replica, sequence) may have come.

        It ends when the node stops.  Without a dot, is_over() is asked at every change, also then.
        """
        event, deadline = threading.Event(), time.monotonic() + timeout_s
        if dot:
            self.add(event.set, *dot)
        try:
            while True:
                event.clear()
                if not dot:
                    with self._lock:
                        self.watch_locked(event.set)
                over = is_over() or (dot and self._stopping)
                if over or not event.wait(deadline - time.monotonic()):
                    return
        finally:
            if dot:
                self.remove(event.set, dot[0])
            else:
                with self._lock:
                    self._watching.discard(event.set)
                    self._count_locked()

    def stop(self):
        """Wake all who wait for a dot and refuse new waits; called when the node stops."""
        with self._lock:
            self._stopping = True
            self.wake_all_locked()

    # For those whose changes they wait for, who hold the lock.

    def reached_locked(self, replica, through, after=0):
        """Wake those who wait for a dot of that replica with after < sequence <= through, and no others.

        Hundreds may wait while hundreds of changes arrive in a second.
        """
        if self._watching:
            self._tell_watching_locked()
        for wake, sequence in self._waiting.get(replica, {}).items():
            if after < sequence <= through:
                wake()

    def advanced_locked(self, before, after):
        """Wake who waits for a dot that is in the vector `after`, and was not in the vector `before`."""
        self._tell_watching_locked()
        for replica in self._waiting:
            self.reached_locked(replica, after.get(replica, 0), before.get(replica, 0))

    def wake_all_locked(self):
        """Have all waiters ask anew."""
        self._tell_watching_locked()
        for wakes in self._waiting.values():
            for wake in wakes:
                wake()

    def _tell_watching_locked(self):
        for wake in self._watching:
            wake()
        self._watching.clear()
        self._count_locked()

    def _count_locked(self):
        self.anybody = bool(self._waiting or self._watching)

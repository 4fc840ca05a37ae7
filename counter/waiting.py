"""Threads that wait until an increment has arrived, or until anything has."""

import threading


class Waiters:
    """Who waits for which dot to be held, and who for the next change.

    `holds(replica, sequence)` tells whether a dot is held; `lock` is the one under which that changes,
    and under which wake() is called.
    """

    def __init__(self, holds, lock):
        self._holds, self._lock = holds, lock
        # Guarded by the lock.
        self._waiting = {}  # replica -> [(sequence, threading.Event)]
        self._watching = set()  # of threading.Event: who wants to know of the next change
        self._suspended = False  # waiters return at once
        self._stopping = False  # and will for good: the node is shutting down

    def __len__(self):
        """Return how many wait for a dot."""
        return sum(map(len, self._waiting.values()))

    def __bool__(self):
        """Return whether there is anybody to wake."""
        return bool(self._waiting or self._watching)

    def wait(self, replica, sequence, timeout_s):
        """Wait until a dot is held; return whether it is."""
        event = threading.Event()
        with self._lock:
            if self._suspended or self._holds(replica, sequence):
                return self._holds(replica, sequence)
            self._waiting.setdefault(replica, []).append((sequence, event))
        event.wait(timeout_s)
        with self._lock:
            waiting = self._waiting.get(replica, [])
            waiting[:] = [entry for entry in waiting if entry[1] is not event]
            if not waiting:
                self._waiting.pop(replica, None)
            return self._holds(replica, sequence)

    def watch(self, event):
        """Set a threading.Event at the next change, once.  Under the lock."""
        self._watching.add(event)

    def wake(self, replica, through):
        """Wake who waits for what has become held: a replica, through a sequence.  Under the lock."""
        for event in self._watching:
            event.set()
        self._watching.clear()
        for sequence, event in self._waiting.get(replica, ()):
            if sequence <= through:
                event.set()

    def suspend(self):
        """Wake all waiters for dots, and let nobody wait until resume().  Under the lock."""
        self._suspended = True
        for entries in self._waiting.values():
            for _, event in entries:
                event.set()

    def resume(self):
        """Let threads wait again.  Under the lock."""
        self._suspended = self._stopping

    def stop(self):
        """Wake all waiters for dots and refuse new waits; called when the node stops."""
        with self._lock:
            self._stopping = True
            self.suspend()

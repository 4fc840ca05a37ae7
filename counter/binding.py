"""Whether a message is for this process, and new: so that a recording of it is worth nothing.

A sender numbers its messages, and names in each the replica id it is for.  Ids are fresh for every
process, so beyond its own life a process has nothing to remember; within it, one number and a few
bits per sender.
"""

import threading
from collections import OrderedDict

WINDOW = 64  # messages of one sender that may overtake each other on their way
SENDERS_MAX = 4096  # whose numbers are remembered one by one


class Numbers:
    """Which numbers have come from which senders.  Threads may call anything at any time."""

    def __init__(self, senders_max=SENDERS_MAX):
        self._senders_max = senders_max
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        # sender -> (greatest number, bits: bit i says that the number i below it came), the latest heard last
        self._came = OrderedDict()
        self._floor = 0  # the greatest number of those that are no longer in _came

    def latest(self, sender):
        """Return a number beyond which all numbers of a sender are new."""
        with self._lock:
            return self._came[sender][0] if sender in self._came else self._floor

    def is_new(self, sender, number):
        """Return whether a number has not come, for all that is known."""
        with self._lock:
            return self._is_new_locked(sender, number)

    def take(self, sender, number):
        """Take note that a number came; return whether it was new."""
        with self._lock:
            if not self._is_new_locked(sender, number):
                return False
            greatest, bits = self._came.get(sender, (self._floor, -1))
            ahead = number - greatest
            if ahead > 0:
                greatest, bits = number, (bits << ahead | 1) if ahead < WINDOW else 1
            else:
                bits |= 1 << -ahead
            self._came[sender] = (greatest, bits & (1 << WINDOW) - 1)
            self._came.move_to_end(sender)
            if len(self._came) > self._senders_max:
                _, (forgotten, _) = self._came.popitem(last=False)
                self._floor = max(self._floor, forgotten)
            return True

    def _is_new_locked(self, sender, number):
        greatest, bits = self._came.get(sender, (self._floor, -1))
        return number > greatest or (greatest - number < WINDOW and not bits & 1 << greatest - number)

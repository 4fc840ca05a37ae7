"""How much of what a node holds is of processes that are gone, and a warning once it outweighs the rest.

What a process leaves behind stays for as long as the cluster lives.  Only a new cluster is rid of it.
"""

import logging
import threading

log = logging.getLogger("counter.server")

LOOK_S = 60.0  # between two looks
TIMES = 10  # how many entries and cancellations of the past outweigh a counter
SMALL = 10_000  # as many take less than a megabyte, which is nobody's trouble
REMEDY = (
    "all nodes restarted with their values in a new cluster hold none of it: stop them, then"
    " counter_server.py export --data FILE --values > VALUES, and"
    " counter_server.py import --data NEW --cluster NAME --values VALUES"
)


class Past:
    """What a node holds of replicas that count no more.  `table` knows the active ones."""

    def __init__(self, counter, table):
        self._counter, self._table = counter, table
        # Guards the two below.  Never held together with another.
        self._lock = threading.Lock()
        self._look_at = -float("inf")
        self._has_warned = False

    def weight(self):
        """Return what the node holds of whom, a Weight."""
        return self._counter.weight([id for id, _ in self._table.active()])

    def look(self, now):
        """Warn once if the past outweighs the present; to be called now and then."""
        with self._lock:
            if now < self._look_at or self._has_warned:
                return
            self._look_at = now + LOOK_S
        weight, (counters, _) = self.weight(), self._counter.sizes()
        if outweighs(weight, counters):
            with self._lock:
                self._has_warned = True
            log.warning(
                "the past outweighs the present: inactive_entries=%d cancellations=%d counters=%d remedy=%s",
                weight.inactive_entries, weight.cancellations, counters, REMEDY,
            )  # fmt: skip


def outweighs(weight, counters):
    """Return whether what is held of replicas that are gone is too much, beside so many counters."""
    return weight.inactive_entries + weight.cancellations > max(TIMES * counters, SMALL)

"""When a message was cut, by the clock of the node that receives it.

Clocks of nodes have nothing in common but their pace.  A message says what its sender's clock showed
as it was cut.  The smallest difference to the receiver's clock that was ever seen belongs to the
message that was fastest; what another one exceeds that by is the time it waited somewhere: in a
buffer, at a process that was stopped, or on a slow link.
"""

import threading
from collections import OrderedDict

DRIFT = 0.0005  # how much faster one clock may run than another: what time servers slew at most
PEERS_MAX = 4096  # whose differences are remembered


class Clocks:
    """How the clocks of peers differ from that of this node.  Threads may call anything at any time."""

    def __init__(self, peers_max=PEERS_MAX):
        self._peers_max = peers_max
        # Guards the next.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._differences = OrderedDict()  # id of a peer -> (own clock minus its clock, as of when), latest heard last

    def cut_at(self, peer, clock, now, asked_at=None):
        """Return when a message was cut that arrives `now`, in seconds of the own clock, never after `now`.

        `clock` is what its sender's clock showed, None if it did not say.  An answer was cut after
        the request, at `asked_at`: that corrects the difference where a clock stood still.
        """
        if clock is None:
            return now
        with self._lock:
            difference = now - clock
            if peer in self._differences:
                smallest, seen_at = self._differences[peer]
                difference = min(difference, smallest + DRIFT * max(0.0, now - seen_at))
            if asked_at is not None:
                difference = max(difference, asked_at - clock)
            self._differences[peer] = (difference, now)
            self._differences.move_to_end(peer)
            if len(self._differences) > self._peers_max:
                self._differences.popitem(last=False)
        return min(now, clock + difference)

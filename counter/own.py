"""What a node says of itself.  Pure, and not locked."""

from counter import __version__
from counter.wire import BEAT_MAX, Sender


class Own:
    """The id, address (None until it is known) and beat of a node, and whether it is ready or leaving."""

    def __init__(self, id, address):
        self.id, self.address, self.beat = id, address, 0
        self.leaving = self.ready = False

    def sender(self, wall):
        """Return what a message says of the node, as a Sender; `wall` is what its wall clock shows."""
        return Sender(self.id, self.address, self.beat, self.leaving, __version__, self.ready, wall=wall)

    def outlive(self, beat):
        """Raise the beat to one that others remember of this id.

        They remember a greater one if this machine was restored from a snapshot, or if another process
        left under this id.  Until the beat has caught up, gossip about this node would prove nothing.
        """
        if self.beat < beat < BEAT_MAX // 2:  # otherwise a faulty message could exhaust the range
            self.beat = beat

"""What a connection has to send: bytes, and after them the pieces of a long response that are still to be made.

It belongs to the thread that owns the connection, and does not wait for the other side.
"""

import logging

log = logging.getLogger("counter.serving")


class Outgoing:
    """Sends through `sock`, which has a send() that raises BlockingIOError when it takes nothing."""

    __slots__ = ("_further", "_sock", "_unsent")

    def __init__(self, sock):
        self._sock = sock
        self._unsent = []
        self._further = None  # an iterator of what comes after that, or None

    @property
    def size(self):
        """How many bytes wait to be sent."""
        return sum(map(len, self._unsent))

    @property
    def has_further(self):
        """Whether there may be pieces still to be made; nothing may be added until there are none."""
        return self._further is not None

    @property
    def is_empty(self):
        return not self._unsent and self._further is None

    def add(self, data, further=()):
        """Send these bytes, and then those of the iterable."""
        self._unsent.append(data)
        if further:
            self._further = iter(further)

    def flush(self):
        """Send as many of the bytes as the socket takes; return whether that was all."""
        unsent = self._unsent
        if len(unsent) > 1:  # answers to requests that came together
            unsent[:] = [b"".join(unsent)]
        while unsent:
            try:
                sent = self._sock.send(unsent[0])
            except BlockingIOError:
                return False
            if sent == len(unsent[0]):
                del unsent[0]
            else:
                unsent[0] = memoryview(unsent[0])[sent:]
        return True

    def make_pieces(self):
        """Make further pieces as long as the socket takes them; return whether none failed."""
        while self._further is not None and self.flush():
            try:
                self._unsent.append(next(self._further))
            except StopIteration:
                self._further = None
            except Exception:  # a bug
                log.exception("making a response failed after its head was sent")
                self._further = None
                return False
        return True

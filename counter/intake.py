"""What arrives on a connection: from bytes to requests, each with what is to answer it.

It belongs to the thread that owns the connection, and knows neither its socket nor the time.
"""

from counter import http1
from counter.exchanges import Exchange

BEFORE, HEAD, BODY = "before", "head", "body"  # the part of a request that has not arrived


class Intake:
    """Takes requests apart.  `exchange` is the one at hand, from its head until there is a response, or None."""

    __slots__ = ("_reader", "exchange")

    def __init__(self):
        self.start_anew()

    def start_anew(self):
        """Forget what has arrived: the next bytes begin a request."""
        self._reader, self.exchange = http1.RequestReader(), None

    @property
    def is_empty(self):
        """Whether next() has returned all that has arrived."""
        return not self._reader.buffered

    @property
    def kept(self):
        """How many bytes are kept of a request that is not complete."""
        in_exchange = 0 if self.exchange is None else sum(map(len, self.exchange.chunks))
        return self._reader.buffered + in_exchange

    @property
    def missing(self):
        """The part of a request that has not arrived."""
        if self.exchange is not None:
            return BODY
        return BEFORE if self._reader.waits_for_request else HEAD

    @property
    def awaits_continue(self):
        """Whether the client waits for a sign to send the body of the request at hand."""
        head = self.exchange.head
        return head.expects_continue and self._reader.buffered < head.length

    def feed(self, received):
        self._reader.feed(received)

    def next(self):
        """Return what comes next of what has arrived; None if that takes more bytes.

        Of a request it is the Head, upon which begin() is to be called; then the pieces of its body,
        if they go to a sink; then b"".  Raises Refused for what is not clean HTTP.
        """
        while (event := self._reader.next()) and self.exchange is not None and self.exchange.sink is None:
            self.exchange.chunks.append(event)
        return event

    def begin(self, head, api):
        """Return the Exchange of the request with this head."""
        self.exchange = Exchange(head, api.route_of(head.path))
        return self.exchange

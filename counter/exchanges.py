"""Requests on their way through a connection: what is to answer one, and the answer."""

import logging
import time

from counter import http1, metrics
from counter.http1 import Refused, unavailable
from counter.lanes import QUICK

log = logging.getLogger("counter.serving")

NO_MEMORY = "this node is out of memory; try another"


class Exchange:
    """A request that is being received or answered; without a head, one whose head was refused."""

    __slots__ = ("action", "began", "chunks", "failure", "head", "route", "sink")

    def __init__(self, head=None, route=metrics.OTHER):
        self.head, self.route = head, route
        self.action = self.failure = None  # what is to answer it, or the exception for which nothing can
        self.sink, self.chunks = None, []  # the body goes to the one, or into the other
        self.began = time.perf_counter()

    @property
    def pace(self):
        return self.action.pace if self.failure is None else QUICK

    def choose(self, api):
        """Choose what takes the body and what answers; Refused if the body is not to be read."""
        size_max = api.body_max(self.head)
        if self.head.length > size_max:
            raise Refused(413, f"the body may have at most {size_max} bytes")
        try:
            self.action = api.action(self.head)
            self.sink = api.body_sink(self.head)
        except Refused as refused:  # it is told once the body is there, so that the connection can go on
            self.failure = refused

    def feed(self, piece):
        """Give the sink a piece of the body; return whether it goes on to take them."""
        try:
            self.sink.feed(piece)
        except Refused as refused:
            refused.close = True  # the rest of the body is not a request
            self.failure = refused
        except Exception as error:  # a bug: respond() raises it again, and there it is logged
            self.failure = error
        return self.failure is None

    @property
    def keeps_alive(self):
        """Whether the client means to send another request after this one."""
        return self.head is not None and self.head.keep_alive

    def can_repeat(self):
        """Return whether its action alone answers the same bytes, should they come again."""
        head = self.head
        goes_on = head.keep_alive and not head.is_http10
        return self.failure is None and self.pace is QUICK and goes_on and not head.length and head.method != "HEAD"

    def respond(self, connection, tally):
        """Return (response, further pieces of it, whether the connection cannot go on after it)."""
        further, close = (), False
        try:
            if self.failure is not None:
                raise self.failure
            body = b"".join(self.chunks) if self.sink is None else self.sink
            response, further = http1.opened(self.action(body, connection))
        except Refused as refused:
            response, close = refused.response(), refused.close
        except Exception as error:  # a bug: it is logged, and costs this connection only
            response, close = _response_to_failure(error, connection), True
        tally.of(self.route).count(response, time.perf_counter() - self.began)
        return response, further, close

    def framed(self, response, further, is_last):
        """Return (response, further pieces) as they are sent, of what respond() returned."""
        head = self.head
        if is_last:
            response = http1.with_header(response, b"Connection: close")
        elif head.is_http10:
            response = http1.with_header(response, b"Connection: keep-alive")
        if head is not None and head.method == "HEAD":
            return http1.without_body(response), ()
        return response, further


class Repeated:
    """A request without a body that came before, and what answers it when its bytes come again.

    Most clients send one head again and again.  To count it must cost next to nothing: where its
    status is counted is looked up only when that changes, and only some requests are timed.
    """

    __slots__ = ("_action", "_number", "_status", "_tally")

    def __init__(self, exchange, tally):
        self._action, self._tally = exchange.action, tally.of(exchange.route)
        self._status = self._number = None  # the latest status, and where it is counted

    def respond(self, connection):
        """Return (response, whether the connection cannot go on after it)."""
        tally, close = self._tally, False
        began = None if tally.untimed else time.perf_counter()
        try:
            response = self._action(b"", connection)
        except Refused as refused:
            response, close = refused.response(), refused.close
        except Exception as error:  # a bug: it is logged, and costs this connection only
            response, close = _response_to_failure(error, connection), True
        if response[9:12] != self._status:
            self._status, self._number = response[9:12], tally.number(response)
        self._number[0] += 1
        if began is None:
            tally.untimed -= 1
        else:
            tally.observe(time.perf_counter() - began, metrics.TIMED_ONE_IN)
            tally.untimed = metrics.TIMED_ONE_IN - 1
        return response, close


def _response_to_failure(error, connection):
    """Log an exception of an action, which costs its connection only, and return the response."""
    if isinstance(error, MemoryError):
        connection.complain("no memory to answer a request")
        return unavailable(NO_MEMORY).response()
    log.error("serving a request failed", exc_info=error)
    return Refused(500, "this node failed to serve the request; see its log").response()

"""Answers that go on: a stream of events, one whenever what it shows has changed.

    a change of the counter ── set() ──▶ Streams.look() ──▶ Connection.go_on_streaming() ──▶ Watch.next()

A stream takes a connection and no thread.  What changes faster than it may be sent, or than its reader
reads, is left out: the next event has the latest count.  Source: server-sent events,
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import math

INTERVAL_S = 0.1  # between two looks at what has changed, so that a stream has at most 10 events a second
LOOK_S = 1.0  # a look without a change: for tokens that are no longer good, windows that end, and comments
AT_ONCE = 100  # streams that go on while all other connections wait: a millisecond
COMMENT_S = 15.0  # a stream is not silent for longer: proxies hang up on what is, and a reader that is gone is found
CONTENT_TYPE = "text/event-stream"
HEADERS = (("Cache-Control", "no-store"), ("X-Accel-Buffering", "no"))  # the latter for nginx, which would hold it back


class Watch:
    """The events of one counter.

    `standing` and `is_allowed` are functions: the JSON that says what it stands at, and whether the client may know.
    """

    def __init__(self, standing, is_allowed):
        self._standing, self._is_allowed = standing, is_allowed
        self._sent, self._sent_at = None, -math.inf  # the JSON in the latest event, and when something was sent

    def next(self, now):
        """Return what is to be sent now, as bytes: b"" for nothing, None if the stream is over."""
        if not self._is_allowed():
            return None
        standing = self._standing()
        if standing != self._sent:
            self._sent, self._sent_at = standing, now
            return f"data: {standing}\n\n".encode()
        if now >= self._sent_at + COMMENT_S:
            self._sent_at = now
            return b":\n\n"
        return b""


class Streams:
    """The connections of a poller that have a stream.  All but set() is for the poller's thread.

    `wake_on_change(event)` has event.set() called once anything has changed, `call(function)` has the poller
    call a function of the time, `step(connection, function, now)` lets a connection go on.
    """

    def __init__(self, wake_on_change, call, step):
        self._wake_on_change, self._call, self._step = wake_on_change, call, step
        self._connections = set()
        self._has_changed, self._looked_at = False, -math.inf
        self._to_go_on = []  # those whose turn is still to come in the present look

    def __len__(self):
        return len(self._connections)

    @property
    def due_at(self):
        """When to look next."""
        if self._to_go_on:
            return -math.inf
        return self._looked_at + (INTERVAL_S if self._has_changed else LOOK_S) if self._connections else math.inf

    def add(self, connection):
        """Have a connection go on whenever something has changed, until it is discarded."""
        if connection not in self._connections:
            self._connections.add(connection)
            self.set()  # its first event may be out of date already

    def discard(self, connection):
        self._connections.discard(connection)

    def set(self):
        """Take note that something has changed, as a threading.Event does.  Any thread may call it."""
        self._call(self._changed)

    def _changed(self, _now):
        self._has_changed = True

    def look(self, now):
        """Let some streams go on if it is time; return when it is next."""
        if now >= self.due_at:
            if not self._to_go_on:
                self._looked_at, self._has_changed = now, False
                self._wake_on_change(self)  # before they look: what changes in between has another look
                self._to_go_on = list(self._connections)
            turn = self._to_go_on[-AT_ONCE:]
            del self._to_go_on[-AT_ONCE:]
            for connection in turn:
                self._step(connection, connection.go_on_streaming, now)
        return self.due_at

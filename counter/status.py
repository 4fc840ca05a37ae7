"""What a node tells of itself: its routes for the page, for probes, and for those who watch it."""

import time

from counter import __version__, dashboard, exposition, http1, openapi
from counter.connections import STOPPING
from counter.http1 import unavailable
from counter.routing import QUICK, action


class Status:
    """The routes that change nothing and read every part of a node.  Without --data, `store` is None.

    `limits` are {what is limited: how many there may be}; `readiness` is a function that returns (ready,
    alone, what the node waits for).
    """

    def __init__(self, counter, table, gossip, traffic, server, store, limits, readiness):
        self._counter, self._table, self._gossip = counter, table, gossip
        self._traffic, self._server, self._store = traffic, server, store
        self._limits, self._readiness = limits, readiness
        self._started, self._started_at = time.monotonic(), time.time()

    def peers(self, head):
        http1.parse_query(head.query, ())

        @action()
        def peers(_body, _connection):
            now, unconfirmed = time.monotonic(), self._gossip.unconfirmed()
            about = {
                "id": self._counter.replica,
                "address": self._table.address,
                "uptime_s": round(now - self._started, 1),
                "version": __version__,
                "data": self._data(),
            }
            listed = [
                {
                    "id": peer.id,
                    "address": peer.address,
                    "state": peer.state,
                    "silent_s": round(peer.silent_s, 3),
                    "unconfirmed": unconfirmed.get(peer.id),
                    "version": peer.version,
                    "skew_s": None if peer.skew_s is None else round(peer.skew_s, 3),
                }
                for peer in self._table.snapshot(now)
            ]
            return http1.ok_json({"self": about, "peers": listed})

        return peers

    def _data(self):
        """Return what /peers says of the data file; None without one."""
        if not self._store:
            return None
        status = self._store.status()
        return status._asdict() | {"lag_s": round(status.lag_s, 3)}

    def healthz(self, head):
        http1.parse_query(head.query, ())

        @action(QUICK)
        def health(_body, _connection):
            return http1.ok_json({"status": "alive"})

        return health

    def readyz(self, head):
        http1.parse_query(head.query, ())

        @action(QUICK)
        def readiness(_body, _connection):
            if self._server.stopping:
                raise unavailable(STOPPING)
            ready, alone, waits_for = self._readiness()
            if not ready:
                raise unavailable(f"this node is not ready: it waits for {waits_for}")
            data = {"data": "ok" if self._store.status().ok else "failing"} if self._store else {}
            return http1.ok_json({"status": "ready", "alone": alone, **data})

        return readiness

    def metrics(self, head):
        http1.parse_query(head.query, ())

        @action()
        def scrape(_body, _connection):
            text = exposition.render(
                self._counter,
                self._table,
                self._gossip,
                self._traffic,
                self._server,
                self._store,
                self._limits,
                self._started_at,
                time.monotonic(),
            )
            return http1.response(200, text.encode(), exposition.CONTENT_TYPE)

        return scrape

    def openapi(self, head):
        http1.parse_query(head.query, ())

        @action()
        def document(_body, _connection):
            return http1.response(200, openapi.BODY)

        return document

    def dashboard(self, head):
        http1.parse_query(head.query, ())

        @action()
        def page(_body, _connection):
            return http1.response(200, dashboard.PAGE, "text/html; charset=utf-8", dashboard.HEADERS)

        return page

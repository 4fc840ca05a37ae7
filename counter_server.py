#!/usr/bin/env python3
"""A node of the distributed counter: command line, routes, start and stop.

    python counter_server.py --port 8080 --peers localhost:8081

Threads: `accept` takes connections, `connection-N` serves one each, `heartbeat` sweeps the
peer table, `retry-worker-N` send to peers; the main thread waits for a signal.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while the imports run

import ipaddress
import itertools
import json
import logging
import math
import re
import sys
import time
from dataclasses import replace
from functools import partial

import urllib3

from counter import (
    Counter,
    KeyReused,
    TooManyCounters,
    TooManyKeys,
    __version__,
    dashboard,
    exposition,
    http1,
    increment_id,
    logs,
    metrics,
    new_replica,
    parameters,
    wire,
)
from counter.addresses import join_address
from counter.config import parse_arguments
from counter.http1 import Refused, unavailable
from counter.serving import STOPPING, Server, provide_descriptors
from counter.wire import Signer, same_signature
from gossip import Gossip
from peers import Heartbeat, PeerTable
from replication import Replicator

log = logging.getLogger("counter.server")

BODY_MAX = 64 * 1024  # bytes of a public request's body
COUNTS_MAX = 1000  # counters in one answer
URLLIB3_LEAST = (2, 2)
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
STOP_S = 2.0  # for each kind of threads to end when the node stops

_PREFIX = re.compile(r"[A-Za-z0-9._:-]{0,128}\Z")
_UUID7 = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z", re.IGNORECASE)


class Node:
    """One member of the cluster, whole: state, threads and listening socket.

    Raises OSError if it cannot listen, UnicodeError if its host cannot be a name.
    """

    def __init__(self, config):
        self.config = config
        self.started, self.started_at = time.monotonic(), time.time()
        self.counter = Counter(
            new_replica(), config.max_counters, config.max_idempotency_keys, config.idempotency_window
        )  # fmt: skip
        self.signer = Signer(config.secret, config.cluster)
        self.server = Server(config, Api(self))
        host, self.port = self.server.server_address[:2]
        wildcard = ipaddress.ip_address(host).is_unspecified
        self.address = config.advertise or (None if wildcard else join_address(host, self.port))
        self.table = PeerTable(
            self.counter.replica, self.address, config.peers,
            config.heartbeat_interval, config.peer_timeout, config.fanout,
        )  # fmt: skip
        self.gossip = Gossip(
            self.counter, self.table, config.retry_backoff, config.retry_backoff_max,
            pushed_to=config.fanout, doubtful_max=max(1, config.retry_workers // 2),
        )  # fmt: skip
        self.replicator = Replicator(
            self.gossip, self.table, self.signer, self.port, config.retry_workers, config.peer_timeout
        )  # fmt: skip
        self._ready = False  # once it is ready, a node stays so
        self.heartbeat = Heartbeat(self.table, config.heartbeat_interval, self.replicator.contact)

    def start(self):
        self.server.start()
        self.replicator.start()
        self.heartbeat.start()

    def stop(self):
        """Answer what is in flight, hand everything to the peers, say leave, end all threads."""
        self.server.stop_serving_clients(self._stop_waiting)
        peers = self.table.active()
        if peers and not self.gossip.drain(time.monotonic, self.config.drain_timeout):
            log.warning("stopping: not all peers confirmed everything within --drain-timeout")
        ended = [self.heartbeat.stop(STOP_S), self.replicator.stop(STOP_S), self.server.stop()]
        if not all(ended):
            log.warning("stopping: some threads still run")
        accepted, unconfirmed = self.counter.vector().get(self.counter.replica, 0), self.gossip.unconfirmed()
        held_by = sum(unconfirmed.get(address) == 0 for _, address in peers)
        log.info("stopped: accepted=%d held_by=%d peers=%d", accepted, held_by, len(peers))

    def _stop_waiting(self):
        self.counter.stop_waiting()
        self.gossip.stop_waiting()

    def readiness(self):
        """Return (ready, alone): whether this node has caught up with a peer, or has none to expect."""
        alone = not self.table.active()
        waited = time.monotonic() - self.started > self.config.join_timeout
        self._ready = self._ready or self.gossip.caught_up or (alone and (waited or not self.config.peers))
        return self._ready, alone


class Api:
    """The routes.  A route parses everything its request's head says and returns an action.

    An action takes (body, connection) and returns the bytes of a response, or an iterable of its
    pieces, the first of which has the whole head.  Both may raise Refused.  An action may be
    called again for a request with the very same head.
    """

    # Served even when all connections are taken: to peers, and to those who would else take the node for
    # dead.  They might restart all nodes at once that have too many clients, and so lose the counts.
    vital_paths = frozenset({wire.PATH, "/healthz", "/readyz", "/metrics"})

    def __init__(self, node):
        self._node = node
        self._routes = {  # path -> {method: route}; a GET serves HEAD as well
            "/increment": {"POST": self._increment},
            "/count": {"GET": self._count},
            "/counts": {"GET": self._counts},
            "/peers": {"GET": self._peers},
            "/healthz": {"GET": self._healthz},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._metrics},
            "/": {"GET": self._dashboard},
            wire.PATH: {"POST": self._gossip},
        }
        self._named_routes = {  # path up to its last part, which the route is called with
            "/increment/": {"POST": self._increment},
            "/count/": {"GET": self._count},
            "/increments/": {"GET": self._increment_status},
        }

    def route_of(self, path):
        """Return the path by which requests are counted, one of few."""
        parent = path.rpartition("/")[0]
        return path if path in self._routes else parent if f"{parent}/" in self._named_routes else metrics.OTHER

    def body_max(self, head):
        """Return how many bytes the body of a request with this head may have; Refused if nobody vouches for it."""
        if head.path != wire.PATH:
            return BODY_MAX
        if head.length > wire.BODY_UNPROVEN:
            signature = head.headers.get(wire.SIGNATURE.lower(), "")
            given = head.headers.get(wire.LENGTH_SIGNATURE.lower(), "")
            if not same_signature(given, self._node.signer.length(signature, head.length)):
                raise _wrong_signature(close=True)
        return wire.BODY_MAX

    def body_sink(self, head):
        """Return what takes the body of a request with this head as it arrives; None to have it as bytes."""
        return None

    def action(self, head):
        """Return what answers a request with this head."""
        cors = self._cors_headers(head)
        if cors is None:
            return self._route(head)
        try:
            action = self._route(head)
        except Refused as refused:
            action = _refusing(refused)
        return _with_headers(action, cors)

    def _cors_headers(self, head):
        """Return the header lines that let a page of another origin use the answer; None without one.

        A browser sends a POST to any site before it asks whether it may, so one that comes from
        another site is refused here unless that site is allowed to (--cors-origin).
        """
        origin, site = head.headers.get("origin"), head.headers.get("sec-fetch-site")
        allowed = self._node.config.cors_origin
        if origin and ("*" in allowed or origin in allowed):
            lines = [f"Access-Control-Allow-Origin: {origin}", "Vary: Origin",
                     "Access-Control-Expose-Headers: Idempotent-Replayed"]  # fmt: skip
            if head.method == "OPTIONS":
                lines += ["Access-Control-Allow-Methods: GET, HEAD, POST",
                          "Access-Control-Allow-Headers: Content-Type, Idempotency-Key",
                          "Access-Control-Max-Age: 600"]  # fmt: skip
            return "\r\n".join(lines).encode()
        same = site in ("same-origin", "none") if site else not origin or _host_of(origin) == head.headers.get("host")
        if head.method == "POST" and not same:
            raise Refused(403, "this comes from a page of another site; --cors-origin can allow that site")
        return None

    def _route(self, head):
        parent, slash, last = head.path.rpartition("/")
        if head.path in self._routes:
            routes, arguments = self._routes[head.path], ()
        elif parent + slash in self._named_routes:
            routes, arguments = self._named_routes[parent + slash], (last,)
        elif head.path == "*" and head.method == "OPTIONS":
            routes, arguments = {"GET": None, "POST": None}, ()
        else:
            raise Refused(404, "no such path; try POST /increment, GET /count or GET /peers")
        route = routes.get("GET" if head.method == "HEAD" else head.method)
        if route:
            return route(head, *arguments)
        allowed = ", ".join([*routes, *(["HEAD"] if "GET" in routes else []), "OPTIONS"])
        if head.method == "OPTIONS":
            return partial(_no_content, allowed)
        raise Refused(405, f"this path takes {allowed}", [("Allow", allowed)])

    def _increment(self, head, name="default"):
        name = parameters.name(name)
        query = http1.parse_query(head.query, ("amount", "acks", "timeout"))
        if "timeout" in query and "acks" not in query:
            raise Refused(400, "timeout goes with acks")
        given = "amount" in query
        amount = parameters.amount(query["amount"]) if given else 1
        counter, replicator = self._node.counter, self._node.replicator
        if "idempotency-key" in head.headers or "acks" in query:
            return self._increment_with_options(head, name, amount, given, query)

        def increment(body, _connection):
            by = parameters.body_amount(body, amount, given) if body else amount
            try:
                replica, sequence, count = counter.increment(name, by)
            except TooManyCounters:
                raise _too_many_counters() from None
            replicator.wake()
            return http1.ok(f'{{"id": "{increment_id(replica, sequence)}", "name": "{name}", "count": {count}}}\n')

        return increment

    def _increment_with_options(self, head, name, amount, given, query):
        """Return the action of an increment with an idempotency key, with acks, or with both."""
        counter, replicator, gossip = self._node.counter, self._node.replicator, self._node.gossip
        key = head.headers.get("idempotency-key")
        if key is not None:
            key = parameters.idempotency_key(key)
        acks = parameters.acks(query["acks"]) if "acks" in query else None
        timeout_s = parameters.timeout_s(query)

        def increment(body, _connection):
            by = parameters.body_amount(body, amount, given) if body else amount
            replayed = False
            try:
                if key is None:
                    replica, sequence, count = counter.increment(name, by)
                else:
                    self._refuse_if_old(key)
                    replica, sequence, count, replayed = counter.increment_once(key, name, by, time.monotonic())
            except TooManyCounters:
                raise _too_many_counters() from None
            except TooManyKeys as error:
                retry_after = [("Retry-After", str(math.ceil(error.args[0])))]
                raise Refused(503, "no further idempotency key can be remembered for now", retry_after) from None
            except KeyReused:
                raise Refused(422, "this idempotency key came before, with another counter or amount") from None
            replicator.wake()
            answer, status = {"id": increment_id(replica, sequence), "name": name, "count": count}, 200
            if acks is not None:
                answer["acks"] = gossip.wait_for_acks(replica, sequence, acks, time.monotonic, timeout_s)
                status = 200 if answer["acks"] >= acks else 202
            headers = [("Idempotent-Replayed", "true")] if replayed else []
            return http1.response(status, json.dumps(answer).encode() + b"\n", headers=headers)

        return increment

    def _refuse_if_old(self, key):
        """Refuse a UUIDv7 that was made so long ago that it may have been counted and forgotten."""
        match = _UUID7.match(key)
        if match and time.time() - int(match[1] + match[2], 16) / 1000 > self._node.config.idempotency_window:
            raise Refused(400, "this idempotency key is a UUIDv7 older than --idempotency-window; use a new one")

    def _count(self, head, name="default"):
        name = parameters.name(name)
        query = http1.parse_query(head.query, ("after", "timeout"))
        if "timeout" in query and "after" not in query:
            raise Refused(400, "timeout goes with after")
        dot = parameters.dot(query["after"]) if "after" in query else None
        timeout_s = parameters.timeout_s(query)
        counter = self._node.counter

        def count(_body, _connection):
            if dot and not counter.wait_until_held(*dot, timeout_s):
                if self._node.server.stopping:
                    raise unavailable(STOPPING)
                raise Refused(504, "that increment has not arrived here within the timeout; try again")
            return http1.ok(f'{{"name": "{name}", "count": {counter.value(name)}}}\n')

        return count

    def _counts(self, head):
        query = http1.parse_query(head.query, ("prefix", "start", "limit"))
        prefix, limit = query.get("prefix", ""), query.get("limit", "100")
        start = parameters.checked_name(query["start"]) if "start" in query else ""
        if not _PREFIX.match(prefix):
            raise Refused(400, "a prefix is up to 128 of A-Z a-z 0-9 . _ : -")
        if not re.fullmatch("[1-9][0-9]{0,3}", limit) or int(limit) > COUNTS_MAX:
            raise Refused(400, f"limit must be an integer from 1 to {COUNTS_MAX}")

        def counts(_body, _connection):
            values, next = self._node.counter.list(prefix, start, int(limit))
            return _json({"counts": values, "next": next})

        return counts

    def _increment_status(self, head, id):
        http1.parse_query(head.query, ())
        dot = parameters.dot(http1.decode_component(id))

        def status(_body, _connection):
            if not self._node.counter.holds(*dot):
                raise Refused(404, "that increment has not arrived here, or not yet")
            return _json({"id": increment_id(*dot), "applied": True})

        return status

    def _peers(self, head):
        http1.parse_query(head.query, ())
        return self._list_peers

    def _list_peers(self, _body, _connection):
        node, now = self._node, time.monotonic()
        unconfirmed = node.gossip.unconfirmed()
        about = {"id": node.counter.replica, "address": node.table.address, "uptime_s": round(now - node.started, 1)}
        peers = [
            {"id": id, "address": address, "state": state, "silent_s": round(silent_s, 3),
             "unconfirmed": unconfirmed.get(address)}
            for id, address, state, silent_s in node.table.snapshot(now)
        ]  # fmt: skip
        return _json({"self": about | {"version": __version__}, "peers": peers})

    def _healthz(self, head):
        http1.parse_query(head.query, ())
        return lambda _body, _connection: _json({"status": "alive"})

    def _readyz(self, head):
        http1.parse_query(head.query, ())
        return self._readiness

    def _readiness(self, _body, _connection):
        if self._node.server.stopping:
            raise unavailable(STOPPING)
        ready, alone = self._node.readiness()
        if not ready:
            raise unavailable("this node has not yet caught up with any of its peers")
        return _json({"status": "ready", "alone": alone})

    def _metrics(self, head):
        http1.parse_query(head.query, ())

        def scrape(_body, _connection):
            text = exposition.render(self._node, __version__, time.monotonic())
            return http1.response(200, text.encode(), exposition.CONTENT_TYPE)

        return scrape

    def _dashboard(self, head):
        http1.parse_query(head.query, ())
        return lambda _body, _connection: http1.response(
            200, dashboard.PAGE, "text/html; charset=utf-8", dashboard.HEADERS
        )  # fmt: skip

    def _gossip(self, head):
        http1.parse_query(head.query, ())
        return partial(self._receive, head.headers.get(wire.SIGNATURE.lower(), ""))

    def _receive(self, signature, body, connection):
        signer = self._node.signer
        if not same_signature(signature, signer.request(body)):
            raise _wrong_signature()
        try:
            message = wire.decode(body)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        node = self._node
        if node.table.address is None and message.sender.id != node.counter.replica:
            node.table.advertise(join_address(connection.local_host(), node.port))
        answer = node.gossip.receive(message, time.monotonic())
        node.server.recognise_peer(connection)
        deltas, answer = len(answer.deltas), wire.encode(answer)
        node.replicator.traffic.add(deltas=deltas, bytes_received=len(body), bytes_sent=len(answer))
        return http1.response(200, answer, headers=[(wire.SIGNATURE, signer.answer(signature, answer))])


def _json(fields):
    return http1.ok(json.dumps(fields) + "\n")


def _refusing(refused):
    def refuse(_body, _connection):
        raise refused

    return refuse


def _with_headers(action, lines):
    """Return the action with further header lines in its response, also where it refuses."""

    def answer(body, connection):
        try:
            response, further = http1.opened(action(body, connection))
        except Refused as refused:
            response, further = refused.response(), ()
        response = http1.with_header(response, lines)
        return itertools.chain([response], further) if further else response

    return answer


def _host_of(origin):
    return origin.partition("://")[2]


def _wrong_signature(close=False):
    challenge = [("WWW-Authenticate", wire.SIGNATURE)]
    return Refused(401, "the signature is wrong: another --cluster or --secret-file?", challenge, close)


def _too_many_counters():
    return Refused(507, "this node has --max-counters counters; increment one that exists")


def _no_content(allowed, _body, _connection):
    return http1.response(204, b"", headers=[("Allow", allowed)])


def main(arguments=None):
    """Run a node until SIGINT or SIGTERM; return the exit status."""
    config = parse_arguments(arguments)
    if tuple(map(int, urllib3.__version__.split(".")[:2])) < URLLIB3_LEAST:  # all sending would fail
        print(
            f"counter_server.py: urllib3 {urllib3.__version__} is too old; pip install -U requests urllib3",
            file=sys.stderr,
        )
        return 1
    logs.set_up(config.log_level, config.log_format)
    clients_max = provide_descriptors(config.max_connections)
    if clients_max < config.max_connections:
        log.warning(
            "fewer clients are served: the limit of open files is too low for --max-connections, max=%d", clients_max
        )
        config = replace(config, max_connections=clients_max)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler prints a traceback
    # Blocked here and so in every thread to come, a signal waits for sigwait(), whatever runs.
    # With handlers instead the kernel may pick any thread, and the main thread may sleep on.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        node = Node(config)
    except (OSError, UnicodeError) as error:
        print(f"counter_server.py: cannot listen on {config.host} port {config.port}: {error}", file=sys.stderr)
        return 1
    node.start()
    log.info("listening: addr=%s id=%s", join_address(node.server.server_address[0], node.port), node.counter.replica)
    number = signal.sigwait(STOP_SIGNALS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a second one ends the process at once
    log.info("stopping: signal=%s", signal.Signals(number).name)
    node.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

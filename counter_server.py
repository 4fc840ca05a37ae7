#!/usr/bin/env python3
"""A node of the distributed counter: command line, routes, start and stop.

    python counter_server.py --port 8080 --peers localhost:8081

Threads: `accept` takes connections, `connection-N` serves one each, `heartbeat` sweeps the
peer table, `retry-worker-N` send to peers; the main thread waits for a signal.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while the imports run

import argparse
import ipaddress
import json
import logging
import math
import os
import re
import socket
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import urllib3

import dashboard
import http1
import logs
import metrics
import replication
from counter import (
    AMOUNT_MAX,
    NAME,
    Counter,
    KeyReused,
    TooManyCounters,
    TooManyKeys,
    increment_id,
    new_replica,
    parse_increment_id,
)
from http1 import Refused, unavailable
from peers import Heartbeat, PeerTable, join_address, parse_address
from replication import Gossip, Replicator, Signer, same_signature
from serving import STOPPING, Server, provide_descriptors

__version__ = "1.0.0"

log = logging.getLogger("counter.server")

BODY_MAX = 64 * 1024  # bytes of a public request's body
COUNTS_MAX = 1000  # counters in one answer
WAIT_DEFAULT_S, WAIT_MAX_S = 5.0, 60.0  # of ?timeout=
URLLIB3_LEAST = (2, 2)
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
STOP_S = 2.0  # for each kind of threads to end when the node stops

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})\Z", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,9})?\Z", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{0,128}\Z")
_ORIGIN = re.compile(
    r"(?!https://.*:443\Z|http://.*:80\Z)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?\Z"
)
_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")
_UUID7 = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Config:
    """What the command line sets; times are in seconds."""

    port: int
    host: str
    advertise: str  # HOST:PORT, or None: derived from the listening address
    peers: tuple  # of HOST:PORT
    heartbeat_interval: float
    peer_timeout: float
    join_timeout: float
    fanout: int
    retry_backoff: float
    retry_backoff_max: float
    retry_workers: int
    drain_timeout: float
    max_connections: int
    max_counters: int
    idempotency_window: float
    max_idempotency_keys: int
    cors_origin: tuple  # of origins whose pages may use this node; "*" is any
    secret: bytes  # b"" without --secret-file
    cluster: str
    log_level: str
    log_format: str


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
        if self.table.active() and not self.gossip.drain(time.monotonic, self.config.drain_timeout):
            log.warning("stopping: not all peers confirmed everything within --drain-timeout")
        ended = [self.heartbeat.stop(STOP_S), self.replicator.stop(STOP_S), self.server.stop()]
        if not all(ended):
            log.warning("stopping: some threads still run")

    def _stop_waiting(self):
        self.counter.stop_waiting()
        self.gossip.stop_waiting()

    def readiness(self):
        """Return (ready, alone): whether this node has caught up with a peer, or has none to expect."""
        alone = not self.table.active()
        waited = time.monotonic() - self.started > self.config.join_timeout
        self._ready = self._ready or self.gossip.caught_up or alone and (waited or not self.config.peers)
        return self._ready, alone


class Api:
    """The routes.  A route parses everything its request's head says and returns an action.

    An action takes (body, connection) and returns the bytes of a response.  Both may raise
    Refused.  An action may be called again for a request with the very same head.
    """

    # Served even when all connections are taken: to peers, and to those who would else take the node for
    # dead.  They might restart all nodes at once that have too many clients, and so lose the counts.
    vital_paths = frozenset({replication.PATH, "/healthz", "/readyz", "/metrics"})

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
            replication.PATH: {"POST": self._gossip},
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
        if head.path != replication.PATH:
            return BODY_MAX
        if head.length > replication.BODY_UNPROVEN:
            signature = head.headers.get(replication.SIGNATURE.lower(), "")
            given = head.headers.get(replication.LENGTH_SIGNATURE.lower(), "")
            if not same_signature(given, self._node.signer.length(signature, head.length)):
                raise _wrong_signature(close=True)
        return replication.BODY_MAX

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
        name = _name(name)
        query = http1.parse_query(head.query, ("amount", "acks", "timeout"))
        if "timeout" in query and "acks" not in query:
            raise Refused(400, "timeout goes with acks")
        given = "amount" in query
        amount = _amount(query["amount"]) if given else 1
        counter, replicator = self._node.counter, self._node.replicator
        if "idempotency-key" in head.headers or "acks" in query:
            return self._increment_with_options(head, name, amount, given, query)

        def increment(body, _connection):
            by = _body_amount(body, amount, given) if body else amount
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
            key = _idempotency_key(key)
        acks = _acks(query["acks"]) if "acks" in query else None
        timeout_s = _timeout_s(query)

        def increment(body, _connection):
            by = _body_amount(body, amount, given) if body else amount
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
        name = _name(name)
        query = http1.parse_query(head.query, ("after", "timeout"))
        if "timeout" in query and "after" not in query:
            raise Refused(400, "timeout goes with after")
        dot = _dot(query["after"]) if "after" in query else None
        timeout_s = _timeout_s(query)
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
        start = _checked_name(query["start"]) if "start" in query else ""
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
        dot = _dot(http1.decode_component(id))

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
            text = metrics.render(self._node, __version__, time.monotonic())
            return http1.response(200, text.encode(), metrics.CONTENT_TYPE)

        return scrape

    def _dashboard(self, head):
        http1.parse_query(head.query, ())
        return lambda _body, _connection: http1.response(
            200, dashboard.PAGE, "text/html; charset=utf-8", dashboard.HEADERS
        )  # fmt: skip

    def _gossip(self, head):
        http1.parse_query(head.query, ())
        return partial(self._receive, head.headers.get(replication.SIGNATURE.lower(), ""))

    def _receive(self, signature, body, connection):
        signer = self._node.signer
        if not same_signature(signature, signer.request(body)):
            raise _wrong_signature()
        try:
            message = replication.decode(body)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        node = self._node
        if node.table.address is None and message.sender.id != node.counter.replica:
            node.table.advertise(join_address(connection.local_host(), node.port))
        answer = node.gossip.receive(message, time.monotonic())
        node.server.recognise_peer(connection)
        deltas, answer = len(answer.deltas), replication.encode(answer)
        node.replicator.traffic.add(deltas=deltas, bytes_received=len(body), bytes_sent=len(answer))
        return http1.response(200, answer, headers=[(replication.SIGNATURE, signer.answer(signature, answer))])


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
            response = action(body, connection)
        except Refused as refused:
            response = refused.response()
        return http1.with_header(response, lines)

    return answer


def _host_of(origin):
    return origin.partition("://")[2]


def _wrong_signature(close=False):
    challenge = [("WWW-Authenticate", replication.SIGNATURE)]
    return Refused(401, "the signature is wrong: another --cluster or --secret-file?", challenge, close)


def _too_many_counters():
    return Refused(507, "this node has --max-counters counters; increment one that exists")


def _idempotency_key(text):
    key = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    if not _KEY.match(key):
        raise Refused(400, "an Idempotency-Key is 1 to 255 visible ASCII characters, in double quotes or not")
    return key


def _acks(text):
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise Refused(400, "acks must be an integer of at least 1: on how many nodes, this one included")
    return int(text)


def _no_content(allowed, _body, _connection):
    return http1.response(204, b"", headers=[("Allow", allowed)])


def _name(text):
    return _checked_name(http1.decode_component(text))


def _checked_name(name):
    if not NAME.match(name):
        raise Refused(400, "a counter's name is 1 to 128 of A-Z a-z 0-9 . _ : - and neither . nor ..")
    return name


def _amount(text):
    return _checked_amount(int(text) if _INTEGER.match(text) else None)


def _checked_amount(amount):
    if type(amount) is not int or not 0 < abs(amount) <= AMOUNT_MAX:
        raise Refused(400, "amount must be an integer other than 0, from -(2**53-1) to 2**53-1")
    return amount


def _body_amount(body, default, given_in_query):
    """Return the amount a JSON body says; without one it is `default`."""
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        raise Refused(400, 'the body must be JSON in UTF-8, such as {"amount": 5}, or empty') from None
    if type(fields) is not dict or fields.keys() - {"amount"}:
        raise Refused(400, 'the body must be a JSON object with no other field than "amount"')
    if not fields:
        return default
    if given_in_query:
        raise Refused(400, "send amount in the query or in the body, not in both")
    return _checked_amount(fields["amount"])


def _distinct(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise Refused(400, "a field of the JSON body is there more than once")
    return fields


def _dot(text):
    try:
        return parse_increment_id(text)
    except ValueError:
        raise Refused(400, 'an increment id is a UUIDv8 as POST /increment answers it in "id"') from None


def _timeout_s(query):
    text = query.get("timeout")
    if text is None:
        return WAIT_DEFAULT_S
    if not _SECONDS.match(text) or float(text) > WAIT_MAX_S:
        raise Refused(400, f"timeout must be a number of seconds from 0 to {WAIT_MAX_S:.0f}")
    return float(text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and shows help as the user wrote it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        # "default: None" tells nobody anything.
        says = isinstance(action.default, (str, int, float)) and action.default is not False
        return super()._get_help_string(action) if says else action.help


def parse_arguments(arguments):
    """Return the Config of a command line; SystemExit with status 2 and one line if it is wrong."""
    parser = _Parser(
        prog="counter_server.py",
        description="A node of a distributed in-memory counter. Times are in seconds, fractions allowed.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    listen = parser.add_argument_group("listening").add_argument
    listen("--port", type=_integer(0, 65535), default=8080, metavar="N", help="port to listen on; 0 takes a free one")
    listen("--host", default="127.0.0.1", help="address to listen on")
    listen("--advertise", type=_address, metavar="HOST:PORT", help="what peers are told to connect to")
    listen("--max-connections", type=_integer(1, 100_000), default=512, metavar="N", help="clients served at once")
    listen("--cors-origin", type=_origin, action="append", default=[], metavar="ORIGIN",
           help="let web pages of this origin use this node; repeatable, * is any")  # fmt: skip
    trust = parser.add_argument_group("trust").add_argument
    trust("--secret-file", dest="secret", type=_secret, default=b"", metavar="FILE",
          help="sign all messages between nodes with the secret in this file")  # fmt: skip
    trust("--cluster", type=_text, default="counter", metavar="NAME", help="nodes of another cluster are not talked to")
    trust("--insecure", action="store_true", help="listen beyond loopback without a secret")
    limits = parser.add_argument_group("limits").add_argument
    limits("--max-counters", type=_integer(1, 10**6), default=100_000, metavar="N", help="counters created here")
    limits("--idempotency-window", type=_seconds(0.001), default=3600.0, metavar="S", help="how long keys are kept")
    limits("--max-idempotency-keys", type=_integer(1, 10**6), default=1_000_000, metavar="N", help="keys kept at once")
    cluster = parser.add_argument_group("cluster").add_argument
    cluster("--peers", type=_addresses, action="extend", default=[], metavar="HOST:PORT,...",
            help="nodes to join through; repeatable")  # fmt: skip
    cluster("--heartbeat-interval", type=_seconds(0.01), default=1.0, metavar="S", help="between two heartbeats")
    cluster("--peer-timeout", type=_seconds(0.01), default=5.0, metavar="S", help="silence until a peer is lost")
    cluster(
        "--join-timeout", type=_seconds(0), default=10.0, metavar="S", help="until a node is ready without its seeds"
    )
    cluster("--fanout", type=_integer(1, 1000), default=8, metavar="N", help="peers contacted at once")
    retry = parser.add_argument_group("replication").add_argument
    retry("--retry-backoff", type=_seconds(0.001), default=0.1, metavar="S", help="first backoff, at most")
    retry("--retry-backoff-max", type=_seconds(0.001), default=10.0, metavar="S", help="longest backoff")
    retry("--retry-workers", type=_integer(2, 256), default=4, metavar="N", help="threads that send to peers")
    retry("--drain-timeout", type=_seconds(0), default=5.0, metavar="S", help="to hand over to the peers when stopping")
    logging_ = parser.add_argument_group("logging, to stderr").add_argument
    logging_("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="the least to log")
    logging_("--log-format", choices=("text", "json"), default="text", help="lines of text, or of JSON objects")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    if options.peer_timeout <= options.heartbeat_interval:
        parser.error("argument --peer-timeout: must be longer than --heartbeat-interval")
    if options.retry_backoff_max < options.retry_backoff:
        parser.error("argument --retry-backoff-max: must not be shorter than --retry-backoff")
    if not options.secret and not options.insecure and not _is_loopback(options.host, parser):
        parser.error("argument --host: to listen beyond loopback give --secret-file, or --insecure")
    fields = vars(options) | {"peers": tuple(options.peers), "cors_origin": tuple(options.cors_origin)}
    del fields["insecure"]
    return Config(**fields)


def _is_loopback(host, parser):
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        parser.error(f"argument --host: {host}: {error}")
    return all(ipaddress.ip_address(info[4][0].partition("%")[0]).is_loopback for info in found)


def _origin(text):
    if text not in ("*", "null") and not _ORIGIN.match(text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin as browsers send it, such as https://example.org")
    return text.lower()


def _text(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not in the encoding of this system") from None
    return text


def _secret(path):
    try:
        with open(path, "rb") as file:
            readable_by_others = os.fstat(file.fileno()).st_mode & 0o007
            secret = file.read(65536).strip()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    if readable_by_others:
        raise argparse.ArgumentTypeError(f"{path} is open to other users; chmod o= {path}")
    if not secret:
        raise argparse.ArgumentTypeError(f"{path} is empty")
    return secret


def _integer(least, most):
    def integer(text):
        if not re.fullmatch("-?[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {most}")
        return int(text)

    return integer


def _seconds(least):
    def seconds(text):
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text) or float(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, {least} or more")
        return float(text)

    return seconds


def _address(text):
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _addresses(text):
    return [_address(part) for part in text.split(",") if part.strip()]


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

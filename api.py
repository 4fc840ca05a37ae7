"""What requests mean: from the head of a request to the action that answers it.

    api.action(head)           a route checks everything that the head says, and returns an action
    action(body, connection)   answers the request; called again when the same head comes again

Routes use the parts of a node and know nothing of sockets.  They run in the thread that serves all
connections, so they only check; the pace of the action decides which thread runs that.
"""

import json
import math
import re
import time

from counter import (
    Ended,
    KeyReused,
    TooManyCounters,
    TooManyKeys,
    WindowEnded,
    auth,
    http1,
    increment_id,
    parameters,
    watching,
    wire,
)
from counter.connections import STOPPING
from counter.http1 import Refused, unavailable
from counter.lanes import PEERS, QUICK, SLOW, STREAMS, WAITS
from counter.parameters import BY_NAME, BY_VALUE
from counter.routing import Router, action, refusing, with_headers
from counter.signing import HEADER, PATH
from counter.windows import is_series, parse_series, rfc3339

BODY_MAX = 64 * 1024  # bytes of a public request's body
WINDOWS_QUICK = 100  # of which the counts are answered in a fraction of a millisecond
BATCH_QUICK = 4096  # bytes of a batch that takes a fraction of a millisecond: some hundred names
CONDITIONS = ("acks", "durable", "timeout")  # parameters: where an increment is to be before the answer
RETRY_AFTER_MAX_S = 60
NOT_COUNTED = (Ended, TooManyCounters, TooManyKeys, KeyReused, WindowEnded)
SHOWN_MAX = 5  # addresses in a refusal
# A peer needs one connection; a second one while it replaces that.  The others are for peers to come.
CONNECTIONS_PER_PEER, PEERS_SPARE = 2, 16

_UUID7 = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z", re.IGNORECASE)


class Api:
    """The routes of a node, and what the server asks about a request."""

    # Always served, even at --max-connections: peer messages and health checks.  An orchestrator whose
    # probes fail on every overloaded node at once would restart them all and lose the counts.
    vital_paths = frozenset({PATH, "/healthz", "/readyz", "/metrics"})
    peer_paths = frozenset({PATH})  # where TLS is, only nodes with a certificate get there
    # Open to clients without a token: probes, the page, which knows nothing and asks for one, and the description.
    open_paths = frozenset({PATH, "/healthz", "/readyz", "/", "/openapi.json"})

    def __init__(self, config, counter, table, gossip, replicator, server, store, tokens, status):
        self._hosts = auth.Hosts(config, server.server_address[0])
        self._cors_origins, self._window_s = config.cors_origin, config.idempotency_window
        self._store, self._fsync = store, config.fsync  # the store is None without --data
        self._counter, self._table, self._gossip = counter, table, gossip
        self._replicator, self._server = replicator, server
        self._tokens = tokens  # Tokens, or None: every client may do anything
        routes = {
            "/increment": {"POST": self._increment},
            "/increment/NAME": {"POST": self._increment},
            "/count": {"GET": self._count},
            "/count/NAME": {"GET": self._count},
            "/increments": {"POST": self._increment_many},
            "/increments/ID": {"GET": self._increment_status},
            "/counts": {"GET": self._counts},
            "/watch": {"GET": self._watch},
            "/watch/NAME": {"GET": self._watch},
            "/peers": {"GET": status.peers},
            "/healthz": {"GET": status.healthz},
            "/readyz": {"GET": status.readyz},
            "/metrics": {"GET": status.metrics},
            "/openapi.json": {"GET": status.openapi},
            "/": {"GET": status.dashboard},
            PATH: {"POST": self._message},
        }
        self._router = Router(routes, hidden=("/", PATH))
        self.public = self._router.public

    def route_of(self, path):
        """Return the path by which requests are counted, one of few."""
        return self._router.path_of(path)

    def body_max(self, head):
        """Return how many bytes the body of a request may have."""
        return BODY_MAX if head.path != PATH else wire.BODY_MAX

    def peers_max(self):
        """Return how many connections may be those of peers."""
        return CONNECTIONS_PER_PEER * len(self._table.snapshot(time.monotonic())) + PEERS_SPARE

    def body_sink(self, head):
        """Return what takes the body of a request with this head as it arrives; None to have it as bytes."""
        if head.path != PATH or head.length <= BODY_MAX:
            return None
        return self._replicator.incoming(head.headers.get(HEADER.lower(), ""))

    def wake_on_change(self, event):
        """Have event.set() called once a count changes; it must not block."""
        self._counter.wake_on_change(self._counter.vector(), event)

    def action(self, head):
        """Return what answers a request with this head; Refused if nothing does."""
        self._hosts.check(head)
        lines = auth.cross_origin_headers(head, self._cors_origins)
        if lines is None:
            return self._admitted(head)
        try:
            answer = self._admitted(head)
        except Refused as refused:
            answer = refusing(refused)
        return with_headers(answer, lines)

    def _admitted(self, head):
        """Return what answers a request, for as long as its token is good."""
        if not self._tokens or head.path in self.open_paths or head.method == "OPTIONS":
            return self._router.action(head)
        access, answer = self._tokens.access(head), self._router.action(head)

        @action(answer.pace)
        def check_again(body, connection):
            return (answer if access.valid else self._admitted(head))(body, connection)

        return check_again

    def _counter_for(self, head):
        """Return the Counter as the client that sends this may increment it; Refused if it may not."""
        return self._tokens.access(head).limited(self._counter) if self._tokens else self._counter

    def _increment(self, head, name="default"):
        name = parameters.name(name)
        query = http1.parse_query(head.query, ("amount", *CONDITIONS))
        amount = parameters.amount(query["amount"]) if "amount" in query else None
        key, conditions = self._key(head), self._conditions(query)
        counter, replicator = self._counter_for(head), self._replicator

        @action(QUICK if conditions is None else WAITS)
        def increment(body, _connection):
            by = parameters.body_amount(body, amount) if body else amount or 1
            try:
                if key is None:
                    replica, sequence, count = counter.increment(name, by)
                    replayed = False
                else:
                    self._refuse_if_old(key)
                    replica, sequence, count, replayed = counter.increment_once(key, name, by, time.monotonic())
            except NOT_COUNTED as error:
                raise _not_counted(error) from None
            replicator.wake()
            fields = f'"id": "{increment_id(replica, sequence)}", "name": "{name}", "count": {count}'
            return self._counted((replica, sequence), fields, replayed, conditions)

        return increment

    def _increment_many(self, head):
        query = http1.parse_query(head.query, CONDITIONS)
        key, conditions = self._key(head), self._conditions(query)
        counter, replicator = self._counter_for(head), self._replicator

        @action(WAITS if conditions else QUICK if head.length <= BATCH_QUICK else SLOW)
        def increment_many(body, _connection):
            amounts = parameters.batch(body)
            try:
                if key is None:
                    replica, sequence, counts = counter.increment_many(amounts)
                    replayed = False
                else:
                    self._refuse_if_old(key)
                    replica, sequence, counts, replayed = counter.increment_many_once(key, amounts, time.monotonic())
            except NOT_COUNTED as error:
                raise _not_counted(error) from None
            replicator.wake()
            # Names need no escapes, and json.dumps would take twice as long.
            counts = ", ".join([f'"{name}": {count}' for name, count in counts.items()])
            fields = f'"id": "{increment_id(replica, sequence)}", "counts": {{{counts}}}'
            return self._counted((replica, sequence), fields, replayed, conditions)

        return increment_many

    def _counted(self, dot, fields, replayed, conditions):
        """Return the response about what was counted, once its conditions hold or their time is up."""
        if conditions is None and not replayed:
            return http1.ok(f"{{{fields}}}\n")
        done, further = self._wait(dot, *conditions) if conditions else (True, "")
        headers = [("Idempotent-Replayed", "true")] if replayed else []
        return http1.response(200 if done else 202, f"{{{fields}{further}}}\n".encode(), headers=headers)

    def _key(self, head):
        key = head.headers.get("idempotency-key")
        return None if key is None else parameters.idempotency_key(key)

    def _conditions(self, query):
        """Return what a client waits for, (acks or None, durable, timeout_s); None if it does not wait."""
        acks = parameters.acks(query["acks"]) if "acks" in query else None
        durable = self._durable(query)
        timeout_s = parameters.timeout_s(query, "acks", "durable")
        return None if acks is None and not durable else (acks, durable, timeout_s)

    def _durable(self, query):
        """Return whether a client asks for durability; Refused where this node has none to give."""
        durable = parameters.durable(query.get("durable", "false"))
        if durable and not self._store:
            raise Refused(400, "this node has no data file (--data), so nothing it counts is durable")
        if durable and self._fsync == "never":
            raise Refused(400, "this node runs with --fsync never: what it saves does not survive a power cut")
        return durable

    def _wait(self, dot, acks, durable, timeout_s):
        """Wait until a dot is where a client wants it; return whether it is, and the fields that say so."""
        deadline, done, fields = time.monotonic() + timeout_s, True, ""
        saved = self._store.wait_until_saved(*dot, timeout_s) if durable else None
        if acks is not None:
            left_s = max(0.0, deadline - time.monotonic())
            reached = self._gossip.wait_for_acks(*dot, acks, left_s)
            done, fields = reached >= acks, f', "acks": {reached}'
        if durable:
            done, fields = done and saved, f'{fields}, "durable": {"true" if saved else "false"}'
        return done, fields

    def _refuse_if_old(self, key):
        """Refuse a UUIDv7 that was made so long ago that it may have been counted and forgotten."""
        match = _UUID7.match(key)
        if match and time.time() - int(match[1] + match[2], 16) / 1000 > self._window_s:
            raise Refused(400, "this idempotency key is a UUIDv7 older than --idempotency-window; use a new one")

    def _count(self, head, name="default"):
        name = parameters.name(name)
        query = http1.parse_query(head.query, ("after", "fresh", "last", "timeout"))
        dot = parameters.dot(query["after"]) if "after" in query else None
        fresh = parameters.fresh(query.get("fresh", "false"))
        timeout_s = parameters.timeout_s(query, "after", "fresh")
        counter, last = self._counter, parameters.last(query, name)
        if fresh:
            if dot:
                raise Refused(
                    400, "send after or fresh, not both: a fresh read includes all that was counted before it"
                )
            return self._count_fresh(name, last, fresh == parameters.ACTIVE, timeout_s)

        @action(WAITS if dot else QUICK if (last or 1) <= WINDOWS_QUICK else SLOW)
        def count(_body, _connection):
            if dot and not counter.wait_until_held(*dot, timeout_s):
                if self._server.stopping:
                    raise unavailable(STOPPING)
                raise Refused(504, "that increment has not arrived here within the timeout; try again")
            return http1.ok(f"{{{_standing(counter, name, last)}}}\n")

        return count

    def _count_fresh(self, name, last, without_lost, timeout_s):
        @action(WAITS)
        def count(_body, _connection):
            if not self._table.is_ready:
                raise unavailable("this node is not ready: it does not know yet whom to ask")
            read = self._gossip.freshness.wait(timeout_s, time.monotonic, without_lost)
            if not read.fresh:
                raise unavailable(STOPPING) if self._server.stopping else _not_fresh(read)
            return http1.ok(f'{{{_standing(self._counter, name, last)}, "nodes": {read.nodes}}}\n')

        return count

    def _watch(self, head, name="default"):
        name = parameters.name(name)
        http1.parse_query(head.query, ())
        access = self._tokens.access(head) if self._tokens else None
        counter = self._counter

        @action(STREAMS)
        def watch(_body, _connection):
            found = watching.Watch(
                lambda: f"{{{_standing(counter, name, None)}}}", lambda: access is None or access.valid
            )
            return http1.unending(watching.CONTENT_TYPE, watching.HEADERS) + (
                found.next(time.monotonic()) or b""
            ), found

        return watch

    def _counts(self, head):
        query = http1.parse_query(head.query, ("prefix", "start", "limit", "order"))
        prefix = parameters.prefix(query.get("prefix", ""))
        start = parameters.checked_name(query["start"]) if "start" in query else ""
        limit = parameters.limit(query.get("limit", "100"))
        by_value = parameters.order(query.get("order", BY_NAME)) == BY_VALUE
        if by_value and start:
            raise Refused(400, "start goes with the order by name: values change between two pages")

        @action()
        def counts(_body, _connection):
            if by_value:
                values, next = self._counter.largest(prefix, limit), None
            else:
                values, next = self._counter.list(prefix, start, limit)
            return http1.ok_json({"counts": values, "next": next})

        return counts

    def _increment_status(self, head, id):
        http1.parse_query(head.query, ())
        dot = parameters.dot(http1.decode_component(id))

        @action(QUICK)
        def status(_body, _connection):
            if not self._counter.holds(*dot):
                raise Refused(404, "that increment has not arrived here, or not yet")
            return http1.ok_json({"id": increment_id(*dot), "applied": True})

        return status

    def _message(self, head):
        http1.parse_query(head.query, ())
        signature = head.headers.get(HEADER.lower(), "")

        @action(PEERS)
        def receive(body, connection):
            reply = self._replicator.receive(signature, body, connection.local_host, connection.remote_host)
            if reply.taken:
                self._server.recognise_peer(connection)
            respond = http1.response if type(reply.body) is bytes else http1.chunked
            return respond(200, reply.body, headers=[(HEADER, reply.signature)])

        return receive


def _standing(counter, name, last):
    """Return the fields that say what a counter stands at; of a windowed one also the `last` windows, unless None."""
    if not is_series(name):
        return f'"name": "{name}", "count": {counter.value(name)}'
    windows = [(rfc3339(start), count) for start, count in counter.windows(name, last or 1)]
    start, count = windows[-1]
    fields = {"name": name, "count": count, "window": {"start": start, "seconds": parse_series(name).width_s}}
    if last:
        fields |= {"total": sum(count for _, count in windows), "windows": windows}
    return json.dumps(fields)[1:-1]


def _not_fresh(read):
    """Return the Refused that tells a client why a read is not fresh."""
    if read.lost:
        advice = f"lost, so nobody knows what they count: {_some(read.lost)}; fresh=active leaves them out"
    else:
        advice = f"no answer in time from {_some(read.missing)}; try again"
    return Refused(504, f"not all nodes could be asked: {advice}")


def _some(addresses):
    shown = ", ".join(sorted(addresses)[:SHOWN_MAX])
    return shown if len(addresses) <= SHOWN_MAX else f"{shown} and {len(addresses) - SHOWN_MAX} more"


def _not_counted(error):
    """Return the Refused that tells a client why its increment was not counted."""
    if isinstance(error, Ended):
        return unavailable(STOPPING)
    if isinstance(error, TooManyCounters):
        return Refused(507, "this node has --max-counters counters; increment one that exists")
    if isinstance(error, WindowEnded):
        return Refused(503, "the clock of this node was set back, to windows that have ended here; ask another node")
    if isinstance(error, TooManyKeys):
        # The next key may be forgotten in an hour only, but clients obey, and another node may have room.
        retry_after = [("Retry-After", str(min(RETRY_AFTER_MAX_S, math.ceil(error.args[0]))))]
        return Refused(503, "no further idempotency key can be remembered for now", retry_after)
    return Refused(422, "this idempotency key came before, with another counter, amount or batch")

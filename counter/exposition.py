"""What a node tells Prometheus: all its numbers in the text format.

render() reads the parts of a node through methods that others use as well, and changes nothing.

Sources: Prometheus, "Exposition formats" (text format 0.0.4) and "Metric and label naming".
"""

import platform
import time
from itertools import accumulate

from counter import __version__
from counter.metrics import BUCKETS_S, TIMED_ONE_IN

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NAMED_MAX = 1000  # counters exposed one by one: every name is a series, in every node
DURATION_HELP = (
    "From having read a request to having its response. Of requests that repeat the one before on their connection"
    f" one in {TIMED_ONE_IN} is timed, and stands for {TIMED_ONE_IN}."
)


def render(counter, table, gossip, traffic, server, started_at, now):
    """Return the metrics of a node as text.

    `started_at` is its start in seconds since 1970; `now` is of the clock its peer table uses.
    """
    said = traffic.numbers()
    values, _ = counter.list("", "", NAMED_MAX)
    counters, keys = counter.sizes()
    vector = counter.vector()
    peers = table.snapshot(now)
    unconfirmed = gossip.unconfirmed()
    states = [peer.state for peer in peers]
    requests = server.requests.totals()
    families = [
        ("counter_increments_total", "counter", "Increments this node accepted.",
         [("", {}, vector.get(counter.replica, 0))]),
        ("counter_value", "gauge", f"Value of a counter; of the first {NAMED_MAX} by name.",
         [("", {"name": name}, value) for name, value in values.items()]),
        ("counter_counters", "gauge", "Counters known.", [("", {}, counters)]),
        ("counter_idempotency_keys", "gauge", "Idempotency keys remembered.", [("", {}, keys)]),
        ("counter_replicas", "gauge", "Replicas known: every process that ever counted, and cancellations.",
         [("", {}, len(vector))]),
        ("counter_http_requests_total", "counter", "Requests answered, by route and status.",
         [("", {"route": route, "status": status.decode()}, number)
          for route, tally in requests.items() for status, (number,) in sorted(tally.statuses.items())]),
        ("counter_http_request_duration_seconds", "histogram", DURATION_HELP,
         [sample for route, tally in requests.items() for sample in _histogram(route, tally)]),
        ("counter_connections", "gauge", "Open connections: of clients, of peers, and not yet known whose.",
         [("", {"kind": kind}, number) for kind, number in server.connections().items()]),
        ("counter_peers", "gauge", "Peers, by state.",
         [("", {"state": state}, states.count(state)) for state in ("active", "lost")]),
        ("counter_peer_unconfirmed_increments", "gauge",
         "Increments that a peer has yet to confirm, of those accepted here or by nodes that are gone.",
         # Of the addresses a set: a series that is there twice voids a scrape.
         [("", {"address": address}, unconfirmed[address])
          for address in sorted({peer.address for peer in peers} & unconfirmed.keys())]),
        ("counter_gossip_messages_sent_total", "counter", "Messages sent to peers, heartbeats included.",
         [("", {}, said["messages"])]),
        ("counter_gossip_messages_failed_total", "counter", "Messages to peers that got no good answer.",
         [("", {}, said["messages_failed"])]),
        ("counter_gossip_retries_total", "counter", "Messages to peers where the one before had failed.",
         [("", {}, said["retries"])]),
        ("counter_deltas_sent_total", "counter", "Deltas sent to peers, in messages and in answers.",
         [("", {}, said["deltas"])]),
        ("counter_deltas_failed_total", "counter", "Deltas in messages to peers that got no good answer.",
         [("", {}, said["deltas_failed"])]),
        ("counter_gossip_sent_bytes_total", "counter", "Bytes sent to peers, without HTTP heads.",
         [("", {}, said["bytes_sent"])]),
        ("counter_gossip_received_bytes_total", "counter", "Bytes received from peers, without HTTP heads.",
         [("", {}, said["bytes_received"])]),
        ("counter_build_info", "gauge", "Always 1.",
         [("", {"version": __version__, "python": platform.python_version()}, 1)]),
        ("process_start_time_seconds", "gauge", "Start of this node, in seconds since 1970.",
         [("", {}, round(started_at, 3))]),
        ("process_cpu_seconds_total", "counter", "User and system CPU time spent.", [("", {}, time.process_time())]),
    ]  # fmt: skip
    return "".join(line for family in families for line in _lines(*family))


def _histogram(route, tally):
    *bounded, count = accumulate(tally.buckets)
    for bound, number in zip(BUCKETS_S, bounded, strict=True):
        yield "_bucket", {"route": route, "le": f"{bound:g}"}, number
    yield "_bucket", {"route": route, "le": "+Inf"}, count
    yield "_sum", {"route": route}, tally.seconds
    yield "_count", {"route": route}, count


def _lines(name, kind, help, samples):
    """Yield the lines of a metric family; `samples` are (suffix, labels, value)."""
    yield f"# HELP {name} {help}\n# TYPE {name} {kind}\n"
    for suffix, labels, value in samples:
        # No label's value needs escaping: names, addresses, routes and versions have no quotes.
        pairs = ",".join(f'{label}="{text}"' for label, text in labels.items())
        yield f"{name}{suffix}{{{pairs}}} {value}\n" if pairs else f"{name}{suffix} {value}\n"

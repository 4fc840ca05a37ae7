"""What a node tells Prometheus: all its numbers in the text format.

render() reads the parts of a node through methods that others use as well, and changes nothing.

Sources: Prometheus, "Exposition formats" (text format 0.0.4) and "Metric and label naming".
"""

import platform
import time
from itertools import accumulate

from counter import __version__, process
from counter.metrics import BUCKETS_S, TIMED_ONE_IN

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NAMED_MAX = 1000  # counters exposed one by one: every name is a series, in every node
DURATION_HELP = (
    "From having read a request to having its response. Of requests that repeat the one before on their connection"
    f" one in {TIMED_ONE_IN} is timed, and stands for {TIMED_ONE_IN}."
)


def render(counter, table, gossip, traffic, server, store, limits, started_at, now):
    """Return the metrics of a node as text.

    `store` is None without a data file; `limits` are {what is limited: how many there may be}.
    `started_at` is the node's start in seconds since 1970; `now` is of the clock its peer table uses.
    """
    families = [
        *_counts(counter),
        *_past(gossip.past.weight()),
        *_requests(server),
        *_limits(limits),
        *_peers(table.snapshot(now), gossip.unconfirmed()),
        *_traffic(traffic.numbers()),
        *(_data(store) if store else ()),
        *_process(started_at),
    ]
    return "".join(line for family in families for line in _lines(*family))


def _single(name, kind, help, value):
    """Return a family of one sample without labels."""
    return name, kind, help, [("", {}, value)]


def _counts(counter):
    counters, keys = counter.sizes()
    values, _ = counter.list("", "", NAMED_MAX)
    yield _single("counter_increments_total", "counter", "Increments this node accepted.", counter.accepted)
    help = f"Value of a counter, of a windowed one that of the present window; of the first {NAMED_MAX} by name."
    yield "counter_value", "gauge", help, [("", {"name": name}, value) for name, value in values.items()]
    yield _single("counter_counters", "gauge", "Counters known, windowed ones included.", counters)
    yield _single("counter_windows", "gauge", "Windows held of windowed counters.", counter.held_windows)
    yield _single("counter_idempotency_keys", "gauge", "Idempotency keys remembered.", keys)


def _past(weight):
    kinds = {
        "active": weight.active, "inactive": weight.inactive, "absorbed": weight.absorbed,
        "cancellation": weight.cancellations,
    }  # fmt: skip
    help = "Replicas that counted: of active nodes, of others, those that active ones absorbed, and cancellations."
    yield "counter_replicas", "gauge", help, [("", {"kind": kind}, number) for kind, number in kinds.items()]
    entries = {"active": weight.active_entries, "inactive": weight.inactive_entries}
    help = "Entries in their histories, one for each counter that a replica touched."
    yield "counter_entries", "gauge", help, [("", {"kind": kind}, number) for kind, number in entries.items()]


def _requests(server):
    totals = server.requests.totals()
    samples = [
        ("", {"route": route, "status": status.decode()}, number)
        for route, tally in totals.items()
        for status, (number,) in sorted(tally.statuses.items())
    ]
    yield "counter_http_requests_total", "counter", "Requests answered, by route and status.", samples
    samples = [sample for route, tally in totals.items() for sample in _histogram(route, tally)]
    yield "counter_http_request_duration_seconds", "histogram", DURATION_HELP, samples
    help = "Open connections: of clients, of peers, and of guests, which were neither so far."
    samples = [("", {"kind": kind}, number) for kind, number in server.connections().items()]
    yield "counter_connections", "gauge", help, samples
    yield _single("counter_waiting_requests", "gauge", "Requests that wait for something.", server.waiting())
    yield _single("counter_watchers", "gauge", "Clients that watch a counter, a connection each.", server.watchers())


def _limits(limits):
    for what, most in limits.items():
        yield _single(f"counter_{what}_limit", "gauge", f"How many counter_{what} there may be.", most)


def _peers(peers, unconfirmed):
    """Yield the families about peers, given as PeerTable.snapshot() and Gossip.unconfirmed() return them."""
    states = [peer.state for peer in peers]
    samples = [("", {"state": state}, states.count(state)) for state in ("active", "lost")]
    yield "counter_peers", "gauge", "Peers, by state.", samples
    # A set of addresses: a series that is there twice voids a scrape.
    known = {peer.address: unconfirmed[peer.id] for peer in peers if peer.id in unconfirmed}
    samples = [("", {"address": address}, number) for address, number in sorted(known.items())]
    help = "Increments that a peer has yet to confirm, of those accepted here or by nodes that are gone."
    yield "counter_peer_unconfirmed_increments", "gauge", help, samples
    skews = {peer.address: round(peer.skew_s, 3) for peer in peers if peer.skew_s is not None}
    samples = [("", {"address": address}, skew_s) for address, skew_s in sorted(skews.items())]
    help = "By how much the wall clock of a peer is ahead of that of this node, as of its latest answer."
    yield "counter_peer_clock_skew_seconds", "gauge", help, samples


def _traffic(numbers):
    for name, number, help in (
        ("counter_gossip_messages_sent_total", "messages", "Messages sent to peers, heartbeats included."),
        ("counter_gossip_messages_failed_total", "messages_failed", "Messages to peers that got no good answer."),
        (
            "counter_gossip_messages_refused_total",
            "messages_refused",
            "Messages from nodes with another secret or cluster name, or from nodes before 1.1.",
        ),
        ("counter_gossip_retries_total", "retries", "Messages to peers where the one before had failed."),
        ("counter_deltas_sent_total", "deltas", "Deltas sent to peers, in messages and in answers."),
        ("counter_deltas_failed_total", "deltas_failed", "Deltas in messages to peers that got no good answer."),
        ("counter_gossip_sent_bytes_total", "bytes_sent", "Bytes sent to peers, without HTTP heads."),
        ("counter_gossip_received_bytes_total", "bytes_received", "Bytes received from peers, without HTTP heads."),
    ):
        yield _single(name, "counter", help, numbers[number])


def _data(store):
    status, numbers = store.status(), store.numbers()
    for name, kind, help, value in (
        ("ok", "gauge", "Whether the data file takes what is written to it.", int(status.ok)),
        ("lag_increments", "gauge", "Increments held here that are not in the data file yet.", status.lag_increments),
        ("lag_seconds", "gauge", "For how long the data file has lacked some.", status.lag_s),
        ("commits_total", "counter", "Transactions written to the data file.", numbers["commits"]),
        ("commit_seconds_total", "counter", "Time spent on them.", numbers["commit_seconds"]),
        ("errors_total", "counter", "Transactions that failed.", numbers["errors"]),
    ):
        yield _single(f"counter_data_{name}", kind, help, value)


def _process(started_at):
    versions = {"version": __version__, "python": platform.python_version()}
    yield "counter_build_info", "gauge", "Always 1.", [("", versions, 1)]
    help = "Start of this node, in seconds since 1970."
    yield _single("process_start_time_seconds", "gauge", help, round(started_at, 3))
    yield _single("process_cpu_seconds_total", "counter", "User and system CPU time spent.", time.process_time())
    for name, help, value in (
        ("process_resident_memory_bytes", "Memory of this process.", process.resident_bytes()),
        (
            "counter_memory_limit_bytes",
            "Memory it may have, in its container or the machine.",
            process.memory_limit_bytes(),
        ),
        ("process_open_fds", "Open files and sockets.", process.open_files()),
        ("process_max_fds", "Files and sockets that it may have open.", process.open_files_max()),
    ):
        if value is not None:
            yield _single(name, "gauge", help, value)


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

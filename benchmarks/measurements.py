"""The measurements: each starts what it needs, loads it, checks what was counted, and yields figures.

A task is one of them with its parameters.  It measures one system: a checkout of this project, or one
of the servers to compare it with.  Its figures come as pairs (name, value); of one whose name ends in
`per_s` more is better, of all others less.
"""

import contextlib
import http.client
import itertools
import json
import random
import re
import time
from collections import namedtuple
from functools import partial

from load import HOST, PATIENCE_S, Failed, Load, as_bytes, ask, connect, load_by_sockets, percentile, receive
from nodes import cluster, start_node, wait_until
from rivals import load_redis, serve_fixed_bytes, serve_plainly, serving, start_redis

GET, POST = "GET /count", "POST /increment"
CLUSTER_CONNECTIONS = 8  # to each of the three nodes
BATCH_NAMES, BATCH_CONNECTIONS = 100, 24
BATCH = "POST /increments " + json.dumps({f"batch-{number}": 1 for number in range(BATCH_NAMES)})
BATCH_COUNTS = "GET /counts?prefix=batch-&limit=1000"
REDIS_CONNECTIONS, REDIS_PIPELINE = 24, 16
MESSAGE_INTERVAL_S = 0.02  # between two increments that are to be pushed one by one
SETTLE_S = 0.2  # in which a count that is right must not change any more

# name: by which it is chosen.  figures: {name: what it is}.  measure: (system, options) -> pairs (name, value).
Task = namedtuple("Task", "name figures measure")


class Skipped(Failed):
    """A figure that a system does not have."""


# What is measured.


class Checkout:
    """This project as it is in a directory."""

    counts = True

    def __init__(self, directory, name):
        self.directory, self.name = directory, name

    def start_node(self, peers=()):
        return start_node(peers, checkout=self.directory)

    def cluster(self, size):
        return cluster(size, self.directory)

    @contextlib.contextmanager
    def serve(self):
        with self.start_node() as node:
            node.wait_listening()
            yield node.port


class Rival:
    """A small server to compare a single node with; one that does not count answers the same to everything."""

    def __init__(self, name, serve, counts):
        self.name, self.serve, self.counts = name, partial(serving, serve), counts


class Redis:
    name = "Redis"


RIVALS = [Rival("http.server", serve_plainly, counts=True), Rival("bare thread", serve_fixed_bytes, counts=False)]

# Counts, and whether they are right.


def count_of(sock):
    return ask(sock, GET)["count"]


def batches_counted(sock):
    """Return how many batches were counted; Failed unless all names were counted equally often."""
    counts = ask(sock, BATCH_COUNTS)["counts"]
    numbers = set(counts.values()) or {0}
    if len(numbers) > 1 or len(counts) not in (0, BATCH_NAMES):
        raise Failed(f"a batch was counted in part: {len(counts)} names, from {min(numbers)} to {max(numbers)}")
    return numbers.pop()


def check(count, before, load):
    """Raise Failed unless everything answered was counted, and nothing that was not sent."""
    least, most = before + load.answered, before + load.answered + load.in_flight
    if not least <= count <= most:
        raise Failed(f"the count is {count}, right is {least} to {most}")


def converge(nodes, before, load, counted=count_of):
    """Return when all nodes came to show the same count, and that count; Failed if it is not right."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(node.port)) for node in nodes]

        def counts():
            return [counted(sock) for sock in socks]

        def same():
            found = counts()
            return min(found) == max(found) >= before + load.answered

        wait_until(same, "all nodes show all increments")
        when = time.monotonic()
        time.sleep(SETTLE_S)  # a time in which nothing may change
        count, *others = counts()
        if any(other != count for other in others):
            raise Failed(f"the nodes differ again: {count}, {others}")
        check(count, before, load)
        return when, count


def cpu_s(nodes):
    return sum(node.cpu_s() for node in nodes)


# The measurements.


def measure_single(system, options, key, request, connections):
    """One server, one kind of request, so many connections."""
    with system.serve() as port:
        options.load([port], 8, POST, options.warm_up_s)
        with connect(port) as sock:
            before = count_of(sock)
            load = options.load([port], connections, request, options.seconds)
            if system.counts:
                check(count_of(sock), before, load if request == POST else load._replace(answered=0, in_flight=0))
    yield f"{key}, per_s", load.answered / load.elapsed_s
    yield f"{key}, p50_ms", load.p50_ms
    yield f"{key}, p99_ms", load.p99_ms


def measure_batches(checkout, options):
    """One node, batches of BATCH_NAMES names."""
    with checkout.start_node() as node:
        node.wait_listening()
        with connect(node.port) as sock:
            ask(sock, BATCH)  # Unknown if the checkout is older than batches
            options.load([node.port], 8, BATCH, options.warm_up_s)
            before = batches_counted(sock)
            load = options.load([node.port], BATCH_CONNECTIONS, BATCH, options.seconds)
            check(batches_counted(sock), before, load)
    yield "batches_per_s", BATCH_NAMES * load.answered / load.elapsed_s
    yield "batches_p50_ms", load.p50_ms
    yield "batches_p99_ms", load.p99_ms


def measure_cluster(checkout, options, request=POST, names=1, counted=count_of, prefix="cluster"):
    """Three nodes, all loaded at once with a request that increments so many names, until all show everything."""
    with checkout.cluster(3) as nodes:
        ports = [node.port for node in nodes]
        with connect(ports[0]) as sock:
            ask(sock, request)
        one = Load(1, 0, None, None, None, None)
        _, before = converge(nodes, 0, one, counted)
        warm_up = options.load(ports, CLUSTER_CONNECTIONS, request, options.warm_up_s)
        _, before = converge(nodes, before, warm_up, counted)
        used_s = cpu_s(nodes)
        load = options.load(ports, CLUSTER_CONNECTIONS, request, options.seconds)
        when, _ = converge(nodes, before, load, counted)
        used_s = cpu_s(nodes) - used_s
    yield f"{prefix}_answered_per_s", names * load.answered / load.elapsed_s
    yield f"{prefix}_converged_per_s", names * load.answered / (when - load.started)
    yield f"{prefix}_convergence_s", max(0.0, when - load.started - load.elapsed_s)
    yield f"{prefix}_p50_ms", load.p50_ms
    yield f"{prefix}_p99_ms", load.p99_ms
    yield f"{prefix}_cpu_us", used_s / (names * load.answered) * 1e6


def measure_message(checkout, options):
    """Two nodes and increments that are pushed one by one, less what these cost a node alone."""
    used_s, messages = [], 0
    for size in (1, 2):
        with checkout.cluster(size) as nodes, connect(nodes[0].port) as sock:
            before, used_before_s = messages_sent(nodes), cpu_s(nodes)
            for _ in range(options.probes):
                ask(sock, POST)
                time.sleep(MESSAGE_INTERVAL_S)  # until it was pushed
            used_s.append(cpu_s(nodes) - used_before_s)
            messages = messages_sent(nodes) - before
    yield "message_cpu_us", (used_s[1] - used_s[0]) / messages * 1e6


def messages_sent(nodes):
    """Return how many messages these nodes sent, heartbeats included."""
    sent = 0
    for node in nodes:
        with contextlib.closing(http.client.HTTPConnection(HOST, node.port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", "/metrics")
            metrics = connection.getresponse().read().decode()
        sent += int(re.search(r"^counter_gossip_messages_sent_total (\d+)", metrics, re.MULTILINE)[1])
    return sent


def measure_lag(checkout, options):
    """Three idle nodes: an increment at one, and a read at another that waits for it."""
    rng, lags_s = random.Random(1), []
    with checkout.cluster(3) as nodes:
        used_s, started = cpu_s(nodes), time.monotonic()
        time.sleep(options.seconds)  # the CPU used in it is what is measured
        used_s = cpu_s(nodes) - used_s
        yield "idle_cpu_percent", used_s / len(nodes) / (time.monotonic() - started) * 100
        with connect(nodes[0].port) as writer, connect(nodes[2].port) as reader:
            for number in range(options.probes):
                time.sleep(rng.uniform(0.02, 0.06))  # not in step with the heartbeats
                sent = time.monotonic()
                id = ask(writer, POST)["id"]
                count = ask(reader, f"GET /count?after={id}&timeout={PATIENCE_S:.0f}")["count"]
                lags_s.append(time.monotonic() - sent)
                check(count, 0, Load(number + 1, 0, None, None, None, None))
    lags_s.sort()
    yield "lag_p50_ms", percentile(lags_s, 0.5) * 1e3
    yield "lag_p99_ms", percentile(lags_s, 0.99) * 1e3


def measure_memory(checkout, options):
    """One node, before and after --increments."""
    with checkout.cluster(1) as nodes:
        load_by_sockets([nodes[0].port], 32, GET, requests=2_000)  # so that threads and their buffers exist already
        before = nodes[0].rss_bytes()
        load = load_by_sockets([nodes[0].port], 32, POST, requests=options.increments)
        converge(nodes, 0, load)
        yield "memory_bytes_per_increment", max(0, nodes[0].rss_bytes() - before) / load.answered


def measure_join(checkout, options):
    """Three nodes after --increments, then with --counters as well, and a fourth that joins them."""
    with checkout.cluster(3) as nodes:
        load = load_by_sockets([node.port for node in nodes], CLUSTER_CONNECTIONS, POST, requests=options.increments)
        _, count = converge(nodes, 0, load)
        with checkout.start_node(nodes) as fourth:
            fourth.wait_listening()
            with connect(fourth.port) as sock:
                count_of(sock)
                answered = time.monotonic()
                yield "join_first_answer_s", answered - fourth.started
                wait_until(lambda: count_of(sock) >= count, "a fourth node has the count")
                yield "join_increments_s", time.monotonic() - answered
                check(count_of(sock), count, Load(0, 0, None, None, None, None))
        # The last of the increments of one node is held only where all before it are held.
        last = f"GET /count?after={create_counters(nodes[0], options.counters)}&timeout={PATIENCE_S:.0f}"
        for node in nodes[1:]:
            with connect(node.port) as sock:
                ask(sock, last)
        with checkout.start_node(nodes) as fourth:
            fourth.wait_listening()
            with connect(fourth.port) as sock:
                count_of(sock)
                answered = time.monotonic()
                ask(sock, last)
                elapsed_s = time.monotonic() - answered
                for number in random.Random(1).choices(range(options.counters), k=100):
                    if ask(sock, f"GET /count/counter-{number}")["count"] != 1:
                        raise Failed(f"counter-{number} is wrong in a node that joined")
                yield "join_counters_s", elapsed_s


def create_counters(node, number):
    """Increment so many counters once, many requests in one packet; return the id of the last increment."""
    with connect(node.port) as sock:
        for first in range(0, number, 100):
            names = range(first, min(first + 100, number))
            sock.sendall(b"".join(as_bytes(f"POST /increment/counter-{name}") for name in names))
            received = receive(sock, len(names))
    return json.loads(received.rpartition(b"\r\n\r\n")[2])["id"]


def measure_redis(_system, options):
    """Redis, which keeps nothing on disk here, one INCR at a time and pipelines of them."""
    with start_redis() as port:
        for pipeline, key, per_s in ((1, "redis", 40_000), (REDIS_PIPELINE, "redis_pipelined", 400_000)):
            answered_per_s, p99_ms = load_redis(port, REDIS_CONNECTIONS, pipeline, round(per_s * options.seconds))
            yield f"{key}_per_s", answered_per_s
            yield f"{key}_p99_ms", p99_ms


# The tasks.


def single_tasks(connections):
    """Return a task for each kind of request and each of these numbers of connections."""
    tasks = []
    for request, number in itertools.product((GET, POST), connections):
        key = f"{request}, {number} connection{'s' * (number > 1)}"
        figures = {f"{key}, {unit}": f"one node, {key}: {what}" for unit, what in UNITS.items()}
        tasks.append(Task("single", figures, partial(measure_single, key=key, request=request, connections=number)))
    return tasks


def _cluster(name, of, **parameters):
    figures = {
        f"{name}_answered_per_s": f"3 nodes, all loaded{of}: increments/s answered",
        f"{name}_converged_per_s": "… increments/s, until all nodes show all of them",
        f"{name}_convergence_s": "… seconds from the last answer until then",
        f"{name}_p50_ms": "… latency p50, ms",
        f"{name}_p99_ms": "… latency p99, ms",
        f"{name}_cpu_us": "… CPU of all nodes per increment, µs",
    }
    return Task(name, figures, partial(measure_cluster, prefix=name, **parameters))


UNITS = {"per_s": "requests/s", "p50_ms": "latency p50, ms", "p99_ms": "latency p99, ms"}
TASKS = [  # beside the single ones
    Task(
        "batches",
        {
            "batches_per_s": f"one node, batches of {BATCH_NAMES} names, {BATCH_CONNECTIONS} connections: increments/s",
            "batches_p50_ms": "… latency p50, ms",
            "batches_p99_ms": "… latency p99, ms",
        },
        measure_batches,
    ),
    _cluster("cluster", ""),
    _cluster(
        "cluster-batches",
        f", batches of {BATCH_NAMES} names",
        request=BATCH,
        names=BATCH_NAMES,
        counted=batches_counted,
    ),
    Task("message", {"message_cpu_us": "CPU of one message between two nodes, both sides, µs"}, measure_message),
    Task(
        "lag",
        {
            "idle_cpu_percent": "3 nodes, idle: CPU per node, % of a core",
            "lag_p50_ms": "… propagation lag p50, ms",
            "lag_p99_ms": "… propagation lag p99, ms",
        },
        measure_lag,
    ),
    Task("memory", {"memory_bytes_per_increment": "one node: memory per increment, bytes"}, measure_memory),
    Task(
        "join",
        {
            "join_first_answer_s": "a fourth node: seconds from its start to its first answer",
            "join_increments_s": "… from then to the count of all --increments",
            "join_counters_s": "… from then to all --counters, where there are that many",
        },
        measure_join,
    ),
]
REDIS = Task(
    "redis",
    {
        "redis_per_s": f"Redis, {REDIS_CONNECTIONS} connections: INCR/s",
        "redis_p99_ms": "… latency p99, ms",
        "redis_pipelined_per_s": f"… in pipelines of {REDIS_PIPELINE}: INCR/s",
        "redis_pipelined_p99_ms": "… latency p99, ms",
    },
    measure_redis,
)

"""GET /metrics, read by the parser of the official client, and the counting behind it."""

import contextlib
import http.client
import re
import threading

import pytest
from conftest import PROJECT, wait_until
from prometheus_client.parser import text_string_to_metric_families

from counter import exposition
from counter.metrics import BUCKETS_S, TIMED_ONE_IN, Requests, Tally
from counter_server import Node, parse_arguments

OK, NOT_FOUND = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n\r\n"


@pytest.fixture
def node(tmp_path):
    file = str(tmp_path / "counter.db")
    node = Node(parse_arguments(["--port", "0", "--cors-origin", "https://a.example", "--data", file]))
    node.start()
    yield node
    node.stop()


@pytest.fixture
def connect(node):
    """Open a connection to the node by calling it; afterwards all are closed."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", node.port, timeout=10))
        )


def ask(connection, method, path, **headers):
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response, response.read().decode()


def samples(text):
    """Return {(name, labels): value} of an exposition, which has nothing twice."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    by_key = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in found}
    assert len(by_key) == len(found)
    return by_key


def scrape(connection):
    response, text = ask(connection, "GET", "/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"] == exposition.CONTENT_TYPE
    return samples(text)


def requests_to(found, route, status):
    return found.get(("counter_http_requests_total", ("route", route), ("status", status)), 0)


def test_every_metric_is_conventional(connect):
    """Each has HELP and TYPE and base units; counters, and only counters, end in _total."""
    connection = connect()
    ask(connection, "POST", "/increment")
    families = list(text_string_to_metric_families(ask(connection, "GET", "/metrics")[1]))
    for family in families:
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert family.name.startswith(("counter_", "process_"))
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
    assert {"counter_build_info", "process_start_time_seconds"} <= {family.name for family in families}


def test_alerts_name_metrics_that_exist(connect):
    """An expression that never matches would alert nobody."""
    named = set(re.findall(r"\bcounter_(?!server)[a-z_]+", (PROJECT / "docs/operations.md").read_text()))
    exposed = ask(connect(), "GET", "/metrics")[1]
    assert len(named) > 5
    assert [name for name in named if f"# TYPE {name} " not in exposed] == []


def test_what_is_counted_is_exposed(connect):
    """Increments accepted, the value of each counter, and how many there are."""
    connection = connect()
    for path in ("/increment/a?amount=5", "/increment/a?amount=-7", "/increment/b"):
        ask(connection, "POST", path)
    found = scrape(connection)
    assert found[("counter_increments_total",)] == 3
    assert found["counter_value", ("name", "a")] == -2
    assert found["counter_value", ("name", "b")] == 1
    assert found[("counter_counters",)] == 2
    assert found["counter_replicas", ("kind", "active")] == 1
    assert found["counter_replicas", ("kind", "inactive")] == found["counter_replicas", ("kind", "cancellation")] == 0
    assert found["counter_entries", ("kind", "active")] == 2
    assert found["counter_entries", ("kind", "inactive")] == 0


def test_limits_stand_beside_what_they_limit(connect, node):
    """Also those of the system, with the names that Prometheus's own clients give them."""
    found = scrape(connect())
    config = node.config
    for name, most in (
        ("counters", config.max_counters),
        ("idempotency_keys", config.max_idempotency_keys),
        ("connections", config.max_connections),
        ("waiting_requests", config.max_waiting),
    ):
        assert found[(f"counter_{name}_limit",)] == most
        assert [key for key in found if key[0] == f"counter_{name}"]
    assert 10 < found[("process_open_fds",)] < found[("process_max_fds",)]
    assert 2**20 < found[("process_resident_memory_bytes",)] < found[("counter_memory_limit_bytes",)]
    assert found[("counter_waiting_requests",)] == 0


def test_requests_that_wait_are_counted(connect, node):
    waiting = connect()
    waiting.request("POST", "/increment?acks=2&timeout=20")
    connection = connect()
    wait_until(lambda: scrape(connection)[("counter_waiting_requests",)] == 1)
    node.gossip.stop_waiting()
    assert waiting.getresponse().read()
    wait_until(lambda: scrape(connection)[("counter_waiting_requests",)] == 0)


def test_only_so_many_counters_are_exposed_one_by_one(connect, node, monkeypatch):
    """Only the first by name; counter_counters has the number of all."""
    monkeypatch.setattr(exposition, "NAMED_MAX", 3)
    for name in "edcba":
        node.counter.increment(name)
    found = scrape(connect())
    assert [key[1][1] for key in found if key[0] == "counter_value"] == ["a", "b", "c"]
    assert found[("counter_counters",)] == 5


def test_every_request_is_counted_by_route_and_status(connect):
    """Also a repeated one, a refused one, and one to an unknown path."""
    connection = connect()
    for path in [*["/count/x"] * 200, "/count/x?bad", "/nowhere", "/increments/00000000-0000-8000-8000-000000000001"]:
        ask(connection, "GET", path)
    for _ in range(5):
        ask(connection, "POST", "/increment/y?acks=1")
        ask(connection, "OPTIONS", "/increment")
    ask(connection, "POST", "/increments")
    found = scrape(connection)
    assert requests_to(found, "/count", "200") == 200
    assert requests_to(found, "/count", "400") == 1
    assert requests_to(found, "other", "404") == 1
    assert requests_to(found, "/increments", "400") == 1
    assert requests_to(found, "/increments/ID", "404") == 1
    assert requests_to(found, "/increment", "200") == 5
    assert requests_to(found, "/increment", "204") == 5
    assert requests_to(found, "/metrics", "200") == 0  # this one is answered before it is counted
    assert requests_to(scrape(connection), "/metrics", "200") == 1


@pytest.mark.parametrize("headers", [{}, {"Origin": "https://a.example"}])
def test_a_repeated_request_is_counted_by_its_own_status(node, connect, monkeypatch, headers):
    """The same bytes may get another status than before, also with CORS headers."""
    connection, path = connect(), f"/increments/{node.counter.replica}-8000-000000000001"
    assert [ask(connection, "GET", path, **headers)[0].status for _ in range(3)] == [404, 404, 404]
    node.counter.increment("first")
    assert [ask(connection, "GET", path, **headers)[0].status for _ in range(3)] == [200, 200, 200]
    monkeypatch.setattr(node.counter, "holds", lambda replica, sequence: False)
    assert [ask(connection, "GET", path, **headers)[0].status for _ in range(2)] == [404, 404]
    found = scrape(connection)
    assert requests_to(found, "/increments/ID", "404") == 5
    assert requests_to(found, "/increments/ID", "200") == 3


def test_a_bug_is_counted_as_500(node, connect, monkeypatch, caplog):
    """On its route, whether or not an earlier request used that."""
    connection = connect()
    assert ask(connection, "GET", "/count")[0].status == 200
    monkeypatch.setattr(node.counter, "value", lambda name: 1 / 0)
    assert ask(connection, "GET", "/count")[0].status == 500
    assert requests_to(scrape(connect()), "/count", "500") == 1
    caplog.clear()


def test_what_a_connection_counted_outlives_it(node, connect):
    """Requests are counted for good, connections only while open."""
    closed, open = connect(), connect()
    ask(closed, "GET", "/count")
    ask(open, "GET", "/count")
    found = scrape(connect())
    assert found["counter_connections", ("kind", "client")] == 2
    assert found["counter_connections", ("kind", "guest")] == 1
    closed.close()
    wait_until(lambda: node.server.connections()["client"] == 1)
    found = scrape(open)
    assert requests_to(found, "/count", "200") == 2
    assert found["counter_connections", ("kind", "client")] == 1


def test_the_durations_are_a_histogram(connect):
    """It is cumulative, and its count is that of all requests, timed or not."""
    connection = connect()
    for _ in range(3 * TIMED_ONE_IN + 1):
        ask(connection, "GET", "/count")
    found = scrape(connection)
    name, route = "counter_http_request_duration_seconds", ("route", "/count")
    buckets = [value for key, value in found.items() if key[0] == f"{name}_bucket" and key[-1] == route]
    assert len(buckets) == len(BUCKETS_S) + 1
    assert buckets == sorted(buckets)
    assert buckets[-1] == found[f"{name}_count", route] == 3 * TIMED_ONE_IN + 1
    assert 0 < found[f"{name}_sum", route] < 10


def test_a_duration_falls_into_its_bucket():
    """A bound belongs to the bucket below it; the last bucket has no bound."""
    tally = Tally()
    for seconds in (0.0, *BUCKETS_S, 1000.0):
        tally.count(OK, seconds)
    assert tally.buckets == [2] + [1] * len(BUCKETS_S)
    tally.observe(0.05, 10)
    assert sum(tally.buckets) == len(BUCKETS_S) + 12


def test_totals_are_of_live_and_ended_threads():
    """The caller owns them: later requests do not change them."""
    requests = Requests()
    first, second = requests.open(), requests.open()
    first.of("/a").count(OK, 1.0)
    second.of("/a").count(NOT_FOUND, 2.0)
    second.of("/b").count(OK, 3.0)
    requests.close(first)
    totals = requests.totals()
    second.of("/a").count(OK, 0.0)
    assert {route: tally.statuses for route, tally in totals.items()} == {
        "/a": {b"200": [1], b"404": [1]},
        "/b": {b"200": [1]},
    }
    assert totals["/a"].seconds == 3.0
    requests.close(second)
    assert requests.totals()["/a"].statuses == {b"200": [2], b"404": [1]}


def test_scraping_disturbs_no_connection():
    """While threads count without a lock, totals never shrink, and the last is exact."""
    requests, seen = Requests(), []

    def connection(number):
        tally = requests.open()
        for i in range(3000):
            tally.of(f"/{i % 50}").count(OK if i % 2 else NOT_FOUND, 0.0)
        requests.close(tally)

    threads = [threading.Thread(target=connection, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(sum(sum(tally.buckets) for tally in requests.totals().values()))
    assert seen == sorted(seen)
    totals = requests.totals().values()
    assert sum(number for tally in totals for (number,) in tally.statuses.values()) == 12_000


def test_a_cluster_tells_of_its_peers(start_cluster):
    """Active and lost peers, what each has yet to confirm, and the messages it took."""
    one, two, three = start_cluster(3)

    def confirmed(seen, node):
        return seen["counter_peer_unconfirmed_increments", ("address", node.address)] == 0

    def scrape():
        return samples(one.ask("GET", "/metrics").body.decode())

    one.increment()
    wait_until(lambda: (seen := scrape()) and confirmed(seen, two) and confirmed(seen, three))
    three.kill()
    lost = wait_until(lambda: one.peers("lost"))
    one.increment()
    wait_until(lambda: two.count() == 2)

    def scrape_once_told():
        seen = scrape()
        return seen if confirmed(seen, two) and seen[("counter_gossip_retries_total",)] else None

    found = wait_until(scrape_once_told)
    assert found["counter_peers", ("state", "active")] == found["counter_peers", ("state", "lost")] == 1
    assert lost == {three.address}
    assert found["counter_peer_unconfirmed_increments", ("address", three.address)] == 1
    assert ("counter_peer_clock_skew_seconds", ("address", two.address)) in found
    assert found[("counter_deltas_sent_total",)] >= 2
    assert found[("counter_gossip_messages_sent_total",)] > found[("counter_gossip_messages_failed_total",)] > 0
    assert found[("counter_gossip_sent_bytes_total",)] > 100 < found[("counter_gossip_received_bytes_total",)]


def test_what_a_joiner_is_told_counts_as_sent(start_node):
    """A joiner gets everything with the answer to its first comparison."""
    one = start_node()
    one.increment()
    two = start_node(peers=[one])
    wait_until(lambda: two.count() == 1)
    assert samples(one.ask("GET", "/metrics").body.decode())[("counter_deltas_sent_total",)] >= 1

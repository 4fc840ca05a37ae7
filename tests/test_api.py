"""What requests mean: the API of one node, over real sockets."""

import socket
import time

import pytest
from clients import NOBODYS_ID, closes_with, gossip_request, next_id, problem, request
from conftest import wait_until, wait_until_waiting

from api import BODY_MAX
from counter import AMOUNT_MAX, Delta, __version__, http1, increment_id, new_replica
from counter.lanes import PEERS, QUICK, SLOW, WAITS
from counter.signing import HEADER, PATH, seal

pytestmark = pytest.mark.usefixtures("no_traceback")


# Incrementing and counting.


def test_an_increment_answers_its_id_and_the_count(client, node):
    """It has the next id of this node."""
    for count in (1, 2):
        expected = {"id": next_id(node), "name": "answered", "count": count}
        reply = client.ask("POST", "/increment/answered")
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        assert reply.json() == expected


def test_the_counter_without_a_name_is_default(client):
    """/increment and /count mean the counter that is named default."""
    before = client.ask("GET", "/count").json()
    after = client.ask("POST", "/increment").json()["count"]
    assert before == {"name": "default", "count": after - 1}
    assert client.ask("GET", "/count").json() == client.ask("GET", "/count/default").json()
    assert client.count("default") == after


def test_a_new_counter_is_0(client):
    """Counters need not be created."""
    assert client.ask("GET", "/count/untouched").json() == {"name": "untouched", "count": 0}


@pytest.mark.parametrize(
    ("name", "query", "body", "amount"),
    [
        ("good-1", "?amount=5", b"", 5),
        ("good-2", "?amount=-5", b"", -5),
        ("good-3", f"?amount={AMOUNT_MAX}", b"", AMOUNT_MAX),
        ("good-4", f"?amount={-AMOUNT_MAX}", b"", -AMOUNT_MAX),
        ("good-5", "?%61mount=%37", b"", 7),
        ("good-6", "?", b"", 1),
        ("good-7", "", b"{}", 1),
        ("good-8", "", b'{"amount": 5}', 5),
        ("good-9", "", b' {\r\n"\\u0061mount" :\t-5} \n', -5),
        ("good-10", "", b'{"amount": %d}' % -AMOUNT_MAX, -AMOUNT_MAX),
        ("good-11", "?amount=5", b"{}", 5),
        ("good-12", "", b'{"amount": 3}'.ljust(BODY_MAX), 3),
    ],
)
def test_an_amount_is_counted(client, name, query, body, amount):
    """The amount is in the query or in the body; the default is 1."""
    for times in (1, 2):
        assert client.ask("POST", f"/increment/{name}{query}", body=body).json()["count"] == times * amount
    assert client.count(name) == 2 * amount


@pytest.mark.parametrize(
    "amount",
    [
        "0",
        "-0",
        "1.0",
        "1e3",
        "true",
        "null",
        '"1"',
        "1_000",
        "01",
        "%2B1",
        "+1",
        "%201",
        "1%20",
        "1%0A",
        "0x1",
        "",
        "abc",
        "NaN",
        "%D9%A1",
        "%FF",
        "%3",
        str(AMOUNT_MAX + 1),
        str(-AMOUNT_MAX - 1),
        "9" * 5000,
    ],
)
def test_a_bad_amount_in_the_query_is_refused(client, amount):
    """Nothing is counted, and the connection stays open."""
    problem(client.ask("POST", f"/increment/bad-query?amount={amount}"), 400)
    assert client.count("bad-query") == 0


@pytest.mark.parametrize(
    "query",
    ["amount=1&amount=1", "amount=1&amount=2", "amount", "Amount=1", "by=1", "amount=1&x=1", "amount=1&", "timeout=1"],
)
def test_a_bad_query_of_an_increment_is_refused(client, query):
    """Parameters that are unknown, repeated or without the one they go with are 400."""
    problem(client.ask("POST", f"/increment/bad-query?{query}"), 400)
    assert client.count("bad-query") == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"amount": 0}',
        b'{"amount": -0}',
        b'{"amount": 1.0}',
        b'{"amount": 1e0}',
        b'{"amount": true}',
        b'{"amount": null}',
        b'{"amount": "1"}',
        b'{"amount": 1_000}',
        b'{"amount": 01}',
        b'{"amount": +1}',
        b'{"amount": [1]}',
        b'{"amount": {}}',
        b'{"amount": NaN}',
        b'{"amount": Infinity}',
        b'{"amount": %d}' % (AMOUNT_MAX + 1),
        b'{"amount": %d}' % (-AMOUNT_MAX - 1),
        b'{"amount": %s}' % (b"9" * 5000),
        b'{"amount": %s}' % (b"9" * 60_000),
        b'{"amount": 1, "amount": 1}',
        b'{"amount": 1, "\\u0061mount": 2}',
        b'{"amount": 1, "by": 1}',
        b'{"by": 1}',
        b'{"Amount": 1}',
        b'{"amount": {"a": 1, "a": 1}}',
        b'{"amount": 1}{}',
        b'{"amount": 1,}',
        b"{'amount': 1}",
        b'{"amount": 1',
        b"1",
        b"null",
        b"[]",
        b'["amount"]',
        b'"amount"',
        b" ",
        b"amount=1",
        b'\xef\xbb\xbf{"amount": 1}',
        b'{"amount": 1, "\xff": 1}',
        b"\xff",
        b"\0",
        '{"amount": 1}'.encode("utf-16"),
        b"[" * 60_000,
        b'{"amount": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"amount":' * 6_000,
    ],
    ids=lambda body: body[:40].decode("latin-1").encode("unicode_escape").decode() + f"-{len(body)}",
)
def test_a_bad_body_is_refused(client, body):
    """Nothing is counted, and the connection stays open."""
    problem(client.ask("POST", "/increment/bad-body", body=body), 400)
    assert client.count("bad-body") == 0


def test_an_amount_in_two_places_is_refused(client):
    """Even if both are equal."""
    problem(client.ask("POST", "/increment/both?amount=5", body=b'{"amount": 5}'), 400)
    assert client.count("both") == 0


@pytest.mark.parametrize(
    ("encoded", "name"),
    [
        ("a", "a"),
        ("%61%2D%3A%2e", "a-:."),
        ("A.b_c:d-9", "A.b_c:d-9"),
        ("...", "..."),
        ("-", "-"),
        ("increment", "increment"),
        ("n" * 128, "n" * 128),
    ],
)
def test_a_good_name_is_counted(client, encoded, name):
    """However it is encoded, it is the same counter."""
    before = client.count(name)
    assert client.ask("POST", f"/increment/{encoded}").json()["name"] == name
    assert client.ask("GET", f"/count/{encoded}").json() == {"name": name, "count": before + 1}


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        ".",
        "..",
        "%2e",
        "%2E%2e",
        "n" * 129,
        "a%2Fb",
        "a%20b",
        "a+b",
        "a%00",
        "a%0A",
        "%C3%A9",
        "%FF",
        "%",
        "%4",
        "%zz",
        "a%2561",
        "a,b",
        "a;b",
        "a~",
        "a#b",
        '"',
        "a\\b",
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/increment/"), ("GET", "/count/")])
def test_a_bad_name_is_refused(client, method, path, encoded):
    """In every path that takes a name; the connection stays open."""
    problem(client.ask(method, path + encoded), 400)
    assert client.ask("GET", "/healthz").status == 200


# Increments by id.


def test_an_increment_can_be_looked_up(client, node):
    """Its id is 404 before and 200 after; upper case is accepted."""
    id = next_id(node)
    problem(client.ask("GET", f"/increments/{id}"), 404)
    assert client.ask("POST", "/increment/looked-up").json()["id"] == id
    for spelling in (id, id.upper(), id.replace("-", "%2D")):
        reply = client.ask("GET", f"/increments/{spelling}")
        assert (reply.status, reply.json()) == (200, {"id": id, "applied": True})
    problem(client.ask("GET", f"/increments/{NOBODYS_ID}"), 404)


BAD_IDS = [
    "",
    "1",
    "00000000-0000-8000-8000-000000000000",  # no increment is number 0
    "00000000-0000-4000-8000-000000000001",  # another version
    "00000000-0000-8000-0000-000000000001",  # another variant
    "00000000-0000-8000-c000-000000000001",
    "00000000-0000-8000-8000-00000000001",
    "00000000-0000-8000-8000-0000000000001",
    "00000000000080008000000000000001",
    "{00000000-0000-8000-8000-000000000001}",
    "0000000g-0000-8000-8000-000000000001",
    "00000000-0000-8000-8000-000000000001%0A",
    "00000000-0000-8000-8000-00000000000%FF",
]


@pytest.mark.parametrize("path", ["/increments/", "/count?after=", "/count/x?timeout=0&after="])
@pytest.mark.parametrize("id", BAD_IDS)
def test_what_is_no_increment_id_is_refused(client, path, id):
    """An increment id is a UUIDv8 with the RFC's variant and a sequence of at least 1."""
    problem(client.ask("GET", path + id), 400)


def test_after_an_increment_that_is_held_the_count_comes_at_once(client):
    """Even with a timeout of 0."""
    id = client.ask("POST", "/increment/held").json()["id"]
    assert client.ask("GET", f"/count/held?timeout=0&after={id}").json() == {"name": "held", "count": 1}
    assert client.ask("GET", f"/count/held?after={id}").json()["count"] == 1


def test_after_waits_for_an_increment_of_this_node(client, connect, node):
    """The count in the answer includes that increment."""
    client.send(request("GET", f"/count/own?timeout=60&after={next_id(node)}"))
    wait_until_waiting(node)
    assert connect(node).ask("POST", "/increment/own?amount=4").status == 200
    assert client.read().json() == {"name": "own", "count": 4}


def test_after_waits_for_an_increment_of_a_peer(client, connect, node):
    """A delta wakes only the waiters whose increment it brings."""
    replica, peer, further = new_replica(), connect(node), connect(node)
    client.send(request("GET", f"/count/peers?timeout=60&after={increment_id(replica, 2)}"))
    further.send(request("GET", f"/count/peers?timeout=60&after={increment_id(replica, 3)}"))
    wait_until(lambda: len(node.counter._waiters) == 2)
    peer.send(gossip_request(node, Delta(replica, 0, 2, {"peers": (2, 7)})))
    assert peer.read().status == 200
    assert client.read().json() == {"name": "peers", "count": 7}
    peer.send(gossip_request(node, Delta(replica, 2, 3, {"peers": (3, 9)})))
    assert peer.read().status == 200
    assert further.read().json() == {"name": "peers", "count": 9}


@pytest.mark.parametrize("timeout", ["0", "0.0", "0.05"])
def test_an_increment_that_does_not_arrive_in_time_is_504(client, node, timeout):
    """The connection stays open, and the same request succeeds once the increment has arrived."""
    question = ("GET", f"/count/late?after={next_id(node)}&timeout={timeout}")
    problem(client.ask(*question), 504)
    problem(client.ask(*question), 504)
    assert client.ask("POST", "/increment/late").status == 200
    assert client.ask(*question).status == 200


@pytest.mark.parametrize("timeout", ["0", "1", "5.5", "60", "60.0", "0.000000001"])
def test_a_good_timeout_is_taken(client, timeout):
    """From 0 to 60 seconds, with fractions."""
    id = client.ask("POST", "/increment/timeouts").json()["id"]
    assert client.ask("GET", f"/count?after={id}&timeout={timeout}").status == 200


@pytest.mark.parametrize(
    "timeout",
    ["", "-1", "-0", "60.000000001", "61", "1e1", "1.", "1,5", "1s", "nan", "inf", "%D9%A1", "%201", "9" * 500],
)
def test_a_bad_timeout_is_refused(client, timeout):
    """Without waiting first."""
    problem(client.ask("GET", f"/count?after={NOBODYS_ID}&timeout={timeout}"), 400)


# Idempotency keys, acks and limits.


def test_a_key_counts_once_and_a_replay_says_so(client):
    """The same key, in quotes or not, answers the same id with the present count."""
    first = client.ask("POST", "/increment/keyed?amount=5", "Idempotency-Key: once")
    client.ask("POST", "/increment/keyed")
    replay = client.ask("POST", "/increment/keyed", 'Idempotency-Key: "once"', body=b'{"amount": 5}')
    assert (first.status, first.json()["count"], "idempotent-replayed" in first.headers) == (200, 5, False)
    assert (replay.status, replay.json()) == (200, {**first.json(), "count": 6})
    assert replay.headers["idempotent-replayed"] == "true"


def test_the_very_same_bytes_with_a_key_count_once(client):
    """A repeated request skips parsing, but its key is checked each time."""
    replies = [client.ask("POST", "/increment/keyed-again", "Idempotency-Key: same") for _ in range(4)]
    assert [reply.json()["count"] for reply in replies] == [1] * 4
    assert ["idempotent-replayed" in reply.headers for reply in replies] == [False, True, True, True]


@pytest.mark.parametrize("target", ["/increment/reused?amount=2", "/increment/reused2"])
def test_a_key_with_another_payload_is_422(client, target):
    """What was counted under the key stays."""
    client.ask("POST", "/increment/reused", "Idempotency-Key: reused")
    problem(client.ask("POST", target, "Idempotency-Key: reused"), 422)
    assert (client.count("reused"), client.count("reused2")) == (1, 0)


@pytest.mark.parametrize("key", ["", '""', "a b", "\xe4", "x" * 256, "a\tb"])
def test_what_is_no_key_is_refused(client, key):
    """A key is 1 to 255 visible ASCII characters."""
    problem(client.ask("POST", "/increment/no-key", f"Idempotency-Key: {key}"), 400)
    assert client.count("no-key") == 0


def test_two_keys_in_one_request_are_refused(client):
    """Another program might read the other key."""
    client.send(request("POST", "/increment", "Idempotency-Key: a", "Idempotency-Key: a"))
    closes_with(client, 400)


def uuid7(seconds_ago):
    milliseconds = f"{int((time.time() - seconds_ago) * 1000):012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}-7abc-8abc-0123456789ab"


def test_a_uuid7_that_may_have_been_forgotten_is_refused(client):
    """So that not even a very late retry counts twice."""
    assert client.ask("POST", "/increment/stale-key", f"Idempotency-Key: {uuid7(3000)}").status == 200
    problem(client.ask("POST", "/increment/stale-key", f"Idempotency-Key: {uuid7(4000)}"), 400)
    assert client.count("stale-key") == 1


def test_without_room_for_a_key_the_client_is_told_when_to_come_back(start_local, connect):
    """Known keys and increments without a key are still served."""
    client = connect(start_local("--max-idempotency-keys", "1", "--idempotency-window", "3600"))
    assert client.ask("POST", "/increment", "Idempotency-Key: first").status == 200
    refused = client.ask("POST", "/increment", "Idempotency-Key: second")
    problem(refused, 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 60  # common clients sleep for as long as it says
    assert client.ask("POST", "/increment", "Idempotency-Key: first").status == 200
    assert client.ask("POST", "/increment").json()["count"] == 2


def test_without_room_for_a_counter_existing_ones_go_on(start_local, connect):
    """Only new names are refused, and a refusal changes nothing."""
    client = connect(start_local("--max-counters", "1"))
    assert client.ask("POST", "/increment/first").status == 200
    problem(client.ask("POST", "/increment/second"), 507)
    problem(client.ask("POST", "/increment/second", "Idempotency-Key: k"), 507)
    assert client.ask("POST", "/increment/first", "Idempotency-Key: k").json()["count"] == 2
    assert client.count("second") == 0


def test_acks_says_how_many_nodes_hold_it(client):
    """A lone node answers 202 after the timeout, and the increment stays counted."""
    assert client.ask("POST", "/increment/acked?acks=1").json()["acks"] == 1
    short = client.ask("POST", "/increment/acked?acks=2&timeout=0.01")
    assert (short.status, short.json()["acks"], short.json()["count"]) == (202, 1, 2)


def test_a_replay_waits_for_acks_as_well(client):
    """It answers as the lost first answer would have."""
    client.ask("POST", "/increment/acked-again", "Idempotency-Key: acked")
    replay = client.ask("POST", "/increment/acked-again?acks=2&timeout=0", "Idempotency-Key: acked")
    assert (replay.status, replay.json()["acks"], replay.json()["count"]) == (202, 1, 1)


@pytest.mark.parametrize(
    "query", ["acks=0", "acks=-1", "acks=x", "acks=", "acks=1.0", "acks=1&timeout=61", "timeout=1"]
)
def test_acks_that_make_no_sense_are_refused(client, query):
    """Nothing is counted."""
    problem(client.ask("POST", f"/increment/no-acks?{query}"), 400)
    assert client.count("no-acks") == 0


def test_waiting_for_acks_ends_when_the_node_stops(start_local, connect):
    """The answer says how many nodes hold the increment by then."""
    node = start_local()
    client = connect(node)
    client.send(request("POST", "/increment?acks=2&timeout=60"))
    wait_until(lambda: node.counter.value("default") == 1)
    node.stop()
    reply = client.read()
    assert (reply.status, reply.json()["acks"]) == (202, 1)


# Listing.


def test_counters_are_listed_by_name(client, start_local, connect):
    """Counters of all replicas, with their values, also those that are back at 0."""
    node = start_local()
    own, peer = connect(node), connect(node)
    for path in ("/increment/b?amount=-5", "/increment/a", "/increment/a?amount=-1", "/increment/c"):
        own.ask("POST", path)
    peer.send(gossip_request(node, Delta(new_replica(), 0, 2, {"aa": (1, 7), "c": (2, 1)})))
    assert peer.read().status == 200
    reply = own.ask("GET", "/counts")
    assert reply.json() == {"counts": {"a": 0, "aa": 7, "b": -5, "c": 2}, "next": None}
    assert list(reply.json()["counts"]) == ["a", "aa", "b", "c"]
    assert own.ask("GET", "/counts?start=aa&limit=2").json() == {"counts": {"aa": 7, "b": -5}, "next": "c"}
    assert own.ask("GET", "/counts?prefix=a&limit=1&start=a").json() == {"counts": {"a": 0}, "next": "aa"}
    assert own.ask("GET", "/counts?prefix=%61a").json() == {"counts": {"aa": 7}, "next": None}
    assert own.ask("GET", "/counts?prefix=z").json() == {"counts": {}, "next": None}


@pytest.mark.parametrize(("query", "size"), [("", 100), ("?limit=1000", 1000), ("?limit=1", 1)])
def test_a_page_has_as_many_counters_as_were_asked_for(start_local, connect, query, size):
    """100 by default, and at most 1,000."""
    node = start_local()
    for number in range(1001):
        node.counter.increment(f"n{number:04}")
    page = connect(node).ask("GET", f"/counts{query}").json()
    assert list(page["counts"]) == [f"n{number:04}" for number in range(size)]
    assert page["next"] == f"n{size:04}"


def test_counters_are_listed_by_value(start_local, connect):
    """The largest first, equal ones by name; there is no next page, as values change between two."""
    node = start_local()
    client = connect(node)
    client.ask("POST", "/increments", body=b'{"b": 7, "a": 7, "c": -1, "ab": 9}')
    reply = client.ask("GET", "/counts?order=value")
    assert list(reply.json()["counts"].items()) == [("ab", 9), ("a", 7), ("b", 7), ("c", -1)]
    assert reply.json()["next"] is None
    assert client.ask("GET", "/counts?order=value&limit=1&prefix=a").json() == {"counts": {"ab": 9}, "next": None}
    assert client.ask("GET", "/counts?order=name&start=b&limit=1").json() == {"counts": {"b": 7}, "next": "c"}
    assert "start" in problem(client.ask("GET", "/counts?order=value&start=a"), 400)


@pytest.mark.parametrize(
    "query",
    [
        "order=",
        "order=size",
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=1.0",
        "limit=01",
        "limit=",
        "limit=10&limit=10",
        "prefix=a/b",
        "prefix=%C3%A4",
        f"prefix={'a' * 145}",
        "prefix=a%0A",
        "start=",
        "start=..",
        "start=a%20b",
        "start=%2561",
        "after=a",
    ],
)
def test_a_bad_query_of_a_listing_is_refused(client, query):
    """Malformed, unknown and repeated parameters are 400."""
    problem(client.ask("GET", f"/counts?{query}"), 400)


# Other paths and methods.


def test_a_node_alone_lists_itself_and_no_peer(start_local, connect):
    """Its address is where it listens."""
    node = start_local()
    about = connect(node).ask("GET", "/peers").json()
    assert about["peers"] == []
    assert about["self"]["id"] == node.counter.replica
    assert about["self"]["address"] == f"127.0.0.1:{node.port}"
    assert about["self"]["uptime_s"] >= 0


def test_a_peer_is_listed(start_local, connect):
    """With its id, address, state, version, silence, and how much it has yet to confirm."""
    first = start_local()
    second = start_local("--peers", f"127.0.0.1:{first.port}")
    client = connect(first)
    client.ask("POST", "/increment")

    def settled():
        return [peer for peer in client.ask("GET", "/peers").json()["peers"] if peer["unconfirmed"] == 0]

    (peer,) = wait_until(settled)
    assert peer["silent_s"] >= 0
    assert (peer["id"], peer["address"]) == (second.counter.replica, f"127.0.0.1:{second.port}")
    assert (peer["state"], peer["unconfirmed"], peer["version"]) == ("active", 0, __version__)
    assert abs(peer["skew_s"]) < 60  # they have one clock


def test_an_advertised_address_is_what_a_node_says_of_itself(start_local, connect):
    """Not the address it listens on."""
    node = start_local("--advertise", "Counter.Example:80")
    assert connect(node).ask("GET", "/peers").json()["self"]["address"] == "counter.example:80"


def test_a_node_alone_is_alive_and_ready(client):
    """/readyz says that it is alone."""
    assert client.ask("GET", "/healthz").status == 200
    reply = client.ask("GET", "/readyz")
    assert (reply.status, reply.json()["alone"]) == (200, True)


def test_a_node_whose_seeds_are_silent_is_alive_but_not_ready(start_local, connect):
    """The answer says when to ask again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(start_local("--peers", f"127.0.0.1:{silent.getsockname()[1]}", "--join-timeout", "60"))
        assert client.ask("GET", "/healthz").status == 200
        reply = client.ask("GET", "/readyz")
    problem(reply, 503)
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "//",
        "/count/a/b",
        "//count",
        "/Count",
        "/counter",
        "/increments/a/b",
        "/peers/",
        "/internal",
        "count",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_an_unknown_path_is_404(client, path, method):
    """With every method; the connection stays open."""
    problem(client.ask(method, path), 404)
    assert client.ask("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    ("method", "path", "advice"),
    [
        ("GET", "/counts/", "GET /counts"),
        ("GET", "/healthz/", "GET /healthz"),
        ("GET", "/peers/?x=1", "GET /peers"),
        ("GET", "/Count", "GET /count[/NAME]"),
        ("GET", "/counter", "GET /count[/NAME]"),
        ("GET", "/health", "GET /healthz"),
        ("GET", "/metric", "GET /metrics"),
        ("POST", "/inc/x", "POST /increment[/NAME]"),
        ("POST", "/increment/", "a counter's name"),
        ("POST", "/increment/a/b", "a counter's name has no slash"),
        ("GET", "/count/a/b", "a counter's name has no slash"),
        ("POST", "/decrement/X.y", "POST /increment/X.y?amount=-1"),
        ("POST", "/decrement", "POST /increment?amount=-1"),
        ("POST", "/nowhere/at/all", "POST /increment[/NAME], GET /count[/NAME] and GET /peers"),
        ("POST", f"/{'count' * 1000}", "POST /increment[/NAME], GET /count[/NAME] and GET /peers"),
        ("POST", "/count", "POST /increment[/NAME] adds to a counter"),
        ("POST", "/count/x", "POST /increment[/NAME] adds to a counter"),
        ("PUT", "/count/x", "POST /increment[/NAME] adds to a counter"),
        ("GET", "/increment/x", "GET /count[/NAME] reads a counter"),
        ("POST", "/counts", "POST /increment[/NAME] adds to a counter"),
        ("GET", "/increment?amunt=1", "GET /count[/NAME] reads a counter"),
        ("POST", "/increment?amunt=1", "unknown query parameter amunt; known here: amount, acks, durable, timeout"),
        ("GET", "/healthz?x%20y=1", "unknown query parameter x y; known here: none"),
        ("GET", f"/healthz?{'x' * 1000}=1", f"unknown query parameter {'x' * 40}…; known here: none"),
    ],
)
def test_a_near_miss_is_told_what_was_meant(client, method, path, advice):
    """A mistyped path or method is answered with the right one."""
    reply = client.ask(method, path)
    assert 400 <= reply.status < 500
    assert advice in problem(reply, reply.status)
    assert client.ask("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    ("origin", "named"),
    [("http://counter.example", "http://counter.example"), ("null", "null"), ("https://x." + "y" * 9000, "ORIGIN")],
)
def test_a_page_behind_a_proxy_is_told_both_remedies(client, origin, named):
    """A proxy that rewrites Host makes the page's own requests look like those of another site."""
    detail = problem(client.ask("POST", "/increment/proxied", f"Origin: {origin}"), 403)
    assert "let the proxy pass the Host header on" in detail
    assert f"--cors-origin {named}" in detail
    assert "localhost" in detail  # the Host it was asked as
    assert client.count("proxied") == 0


PATHS = [
    ("/increment", {"POST", "OPTIONS"}),
    ("/increment/x", {"POST", "OPTIONS"}),
    (PATH, {"POST", "OPTIONS"}),
    ("/count", {"GET", "HEAD", "OPTIONS"}),
    ("/count/x", {"GET", "HEAD", "OPTIONS"}),
    ("/increments", {"POST", "OPTIONS"}),
    ("/increments/x", {"GET", "HEAD", "OPTIONS"}),
    ("/peers", {"GET", "HEAD", "OPTIONS"}),
    ("/healthz", {"GET", "HEAD", "OPTIONS"}),
    ("/readyz", {"GET", "HEAD", "OPTIONS"}),
]


@pytest.mark.parametrize(("path", "allowed"), PATHS)
def test_a_wrong_method_is_405(client, path, allowed):
    """Allow lists what the path takes; methods are case-sensitive."""
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW", "get", "post", "options"} - allowed:
        reply = client.ask(method, path)
        problem(reply, 405)
        assert set(reply.headers["allow"].split(", ")) == allowed
    if "HEAD" not in allowed:
        assert client.ask("HEAD", path).status == 405


@pytest.mark.parametrize(("path", "allowed"), [*PATHS, ("*", {"GET", "HEAD", "POST", "OPTIONS"})])
def test_options_are_told(client, path, allowed):
    """204 with Allow and without content."""
    reply = client.ask("OPTIONS", path)
    assert (reply.status, set(reply.headers["allow"].split(", "))) == (204, allowed)
    assert not reply.headers.keys() & {"content-length", "content-type"}


@pytest.mark.parametrize(
    "path", ["/increments/1?x", "/peers?x=1", "/healthz?x", "/readyz?x", "/count?x", "/count?timeout=1"]
)
def test_a_query_that_means_nothing_is_refused(client, path):
    """A parameter that is unknown, or lacks the one it goes with, is 400."""
    problem(client.ask("GET", path), 400)


@pytest.mark.parametrize(
    ("method", "target", "pace"),
    [
        ("POST", "/increment/x?amount=2", QUICK),
        ("POST", "/increment?acks=1", WAITS),
        ("POST", "/increment?%61cks=1", WAITS),
        ("GET", "/count/x", QUICK),
        ("HEAD", "/count/x", QUICK),
        ("GET", f"/count?after={NOBODYS_ID}", WAITS),
        ("GET", f"/increments/{NOBODYS_ID}", QUICK),
        ("POST", "/increments", QUICK),
        ("POST", "/increments?acks=1", WAITS),
        ("GET", "/healthz", QUICK),
        ("GET", "/readyz", QUICK),
        ("OPTIONS", "/count", QUICK),
        ("GET", "/counts", SLOW),
        ("GET", "/peers", SLOW),
        ("GET", "/metrics", SLOW),
        ("GET", "/", SLOW),
        ("POST", PATH, PEERS),
    ],
)
@pytest.mark.parametrize("headers", [(), ("Origin: https://a.example",)])
def test_an_action_says_where_it_runs(start_local, method, target, pace, headers):
    """The thread that serves all connections runs only those that answer at once."""
    api = start_local("--cors-origin", "https://a.example").api
    head = http1.parse_head(request(method, target, *headers)[:-4])
    assert api.action(head).pace is pace


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/count", 200),
        ("/count/x?after=1", 400),
        ("/peers", 200),
        ("/healthz", 200),
        ("/readyz", 200),
        ("/nowhere", 404),
        (f"/increments/{NOBODYS_ID}", 404),
        (f"/count?timeout=0&after={NOBODYS_ID}", 504),
    ],
)
def test_head_is_get_without_a_body(client, path, status):
    """With the same headers, the length of the body included, in whatever order they are asked."""

    def described(reply):
        assert reply.status == status
        return reply.headers.keys(), reply.headers["content-type"], reply.headers.get("allow")

    got = client.ask("GET", path)
    for _ in range(2):
        head = client.ask("HEAD", path)
        assert described(head) == described(got)
        assert int(head.headers["content-length"]) > 0
    assert described(client.ask("GET", path)) == described(got)


def test_head_says_how_long_the_body_would_be(client):
    """It is the length of the body that GET gets."""
    body = client.ask("GET", "/count/at-rest").body
    assert int(client.ask("HEAD", "/count/at-rest").headers["content-length"]) == len(body)


def test_what_is_no_gossip_is_refused(client, node):
    """A signed but damaged message changes nothing."""
    for body in (b"x", b"{}", b"[" * 60_000):
        signature, _ = seal(node.signer.request(), [body])
        problem(client.ask("POST", PATH, f"{HEADER}: {signature}", body=body), 400)

"""Batches: all of it or nothing, in one piece everywhere, and once for each idempotency key."""

import json
import os
import random
import threading

import batch_retries
import pytest
from clients import gossip_request, next_id, problem
from conftest import wait_until

from counter import AMOUNT_MAX, NAME, Counter, KeyReused, TooManyCounters, TooManyKeys, increment_id, parameters
from counter.http1 import Refused

A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "abc")
NAMES = [f"n{number}" for number in range(9)]


def sync(sender, receiver, now=0):
    for delta in sender.deltas(receiver.vector(), 10**6, now):
        receiver.merge(delta, now)


def values(counter, *names):
    return [counter.value(name) for name in names]


# The counter.


def test_a_batch_has_consecutive_sequences_in_its_order():
    """The last one is returned; a peer that holds it holds all."""
    counter = Counter(A)
    counter.increment("y", 5)
    assert counter.increment_many({"y": 1, "x": -3, "z": 2}) == (A, 4, {"y": 6, "x": -3, "z": 2})
    (delta,) = counter.deltas({}, 10**6, 0)
    assert delta.totals == {"y": (2, 6), "x": (3, -3), "z": (4, 2)}
    assert (counter.increment("x"), values(counter, "y", "x", "z")) == ((A, 5, -2), [6, -2, 2])


def test_a_batch_without_room_for_its_counters_changes_nothing():
    """Those that exist need no room."""
    counter = Counter(A, counters_max=2)
    counter.increment("x")
    for count in (counter.increment_many, lambda amounts: counter.increment_many_once("k", amounts, 0)):
        with pytest.raises(TooManyCounters):
            count({"x": 1, "y": 1, "z": 1})
    assert counter.list("", "", 9) == ({"x": 1}, None)
    assert (counter.vector(), counter.sizes()) == ({A: 1}, (1, 0))
    assert counter.increment_many({"x": 1, "y": 1})[1] == 3


def test_a_repeated_batch_counts_once():
    """It answers the last dot of the first with the present values; the order of names does not matter."""
    counter = Counter(A)
    assert counter.increment_many_once("k", {"y": 1, "x": 2}, 0) == (A, 2, {"y": 1, "x": 2}, False)
    counter.increment("x", 5)
    assert counter.increment_many_once("k", {"y": 1, "x": 2}, 1) == (A, 2, {"y": 1, "x": 7}, True)
    assert counter.increment_many_once("k", {"x": 2, "y": 1}, 1) == (A, 2, {"x": 7, "y": 1}, True)
    assert counter.increment_many_once("other", {"y": 1, "x": 2}, 1)[1:] == (5, {"y": 2, "x": 9}, False)


@pytest.mark.parametrize(
    "amounts",
    [
        {"b": 1, "c": 2, "d": 4}, {"b": 1, "c": 2, "e": 3}, {"b": 1, "c": 2, "d": 3, "e": 1},
        {"a": 1, "b": 1, "c": 2, "d": 3},
        {"b": 1, "c": 2}, {"c": 2, "d": 3}, {"b": 1, "d": 3}, {"b": 1}, {"c": 2}, {"d": 3}, {"x": 1}, {"x": 1, "y": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", ["bcd", "dcb", "cdb"])
def test_a_key_with_another_batch_is_refused(order, amounts):
    """Whether it has fewer names, more, others, or another amount; also at a node that was told of the first."""
    first, peer = Counter(A), Counter(B)
    for counter in (first, peer):
        counter.increment_many_once("before", {"b": 1, "c": 1}, 0)
    batch = {"b": 1, "c": 2, "d": 3}
    first.increment_many_once("k", {name: batch[name] for name in order}, 0)
    first.increment_many_once("after", {"b": 1, "c": 1}, 0)
    sync(first, peer)
    for counter in (first, peer):
        before = counter.list("", "", 9), counter.vector()
        with pytest.raises(KeyReused):
            counter.increment_many_once("k", amounts, 0)
        if len(amounts) == 1:
            with pytest.raises(KeyReused):
                counter.increment_once("k", *next(iter(amounts.items())), 0)
        assert (counter.list("", "", 9), counter.vector()) == before
        assert counter.increment_many_once("k", batch, 0)[0::3] == (A, True)


def test_a_batch_of_one_is_an_increment():
    """Under one key either is a repetition of the other, and a batch with more is not."""
    counter = Counter(A)
    counter.increment_once("k", "x", 5, 0)
    assert counter.increment_many_once("k", {"x": 5}, 0) == (A, 1, {"x": 5}, True)
    counter.increment_many_once("l", {"x": 1}, 0)
    assert counter.increment_once("l", "x", 1, 0) == (A, 2, 6, True)
    with pytest.raises(KeyReused):
        counter.increment_many_once("k", {"x": 5, "y": 1}, 0)


def test_a_key_of_age_counts_anew():
    """Its next batch is a repetition of its own, though it follows the first without a gap."""
    counter = Counter(A, key_window_s=10)
    assert counter.increment_many_once("k", {"x": 1, "y": 1}, 0)[1] == 2
    assert counter.increment_many_once("k", {"x": 1, "y": 1}, 11)[1:] == (4, {"x": 2, "y": 2}, False)
    assert counter.increment_many_once("k", {"x": 1, "y": 1}, 12)[1:] == (4, {"x": 2, "y": 2}, True)
    assert counter.increment_many_once("k", {"y": 1}, 22)[1:] == (5, {"y": 3}, False)


def test_a_batch_without_room_for_its_keys_changes_nothing():
    """Each name needs a key's room, and gets it once older keys are forgotten."""
    counter = Counter(A, keys_max=3, key_window_s=10)
    counter.increment_many_once("k", {"x": 1, "y": 1}, 0)
    with pytest.raises(TooManyKeys) as refused:
        counter.increment_many_once("l", {"x": 1, "z": 1}, 1)
    assert refused.value.args[0] == pytest.approx(9)
    assert (counter.list("", "", 9)[0], counter.vector(), counter.sizes()) == ({"x": 1, "y": 1}, {A: 2}, (2, 2))
    assert counter.increment_many_once("k", {"x": 1, "y": 1}, 1)[3]
    with pytest.raises(TooManyKeys):
        counter.increment_many_once("l", dict.fromkeys(NAMES, 1), 11)
    assert counter.increment_many_once("l", {"x": 1, "z": 1}, 11)[1] == 4


@pytest.mark.parametrize("replicas", [(A, B, C), (C, B, A), (B, C, A)])
def test_of_batches_under_one_key_the_smallest_dot_wins_every_item(replicas):
    """Nodes that could not talk each took it; when all have met, every item counts once."""
    batch, counters = dict(zip(NAMES, range(1, 10), strict=True)), [Counter(replica) for replica in replicas]
    for counter in counters:
        counter.increment("before")
        items = list(batch.items())
        random.Random(counter.replica).shuffle(items)
        assert not counter.increment_many_once("k", dict(items), 0)[3]
    for sender, receiver in ((1, 2), (0, 1), (2, 0), (1, 2), (0, 1)):
        sync(counters[sender], counters[receiver])
    smallest = next(counter for counter in counters if counter.replica == A)
    for counter in counters:
        assert values(counter, *batch) == list(batch.values())
        assert counter.value("before") == 3
        assert counter.increment_many_once("k", batch, 0)[:2] == (A, smallest.sequence)
    assert counters[0].vector() == counters[1].vector() == counters[2].vector()


def test_no_delta_ends_inside_a_batch(tiny_switch_interval):
    """However threads interleave, all names of a batch have been counted equally often."""
    counter, over, seen = Counter(A), threading.Event(), []

    def count():
        while not over.is_set():
            counter.increment_many(dict.fromkeys(NAMES, 1))

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: counter.sequence > 0)
        for _ in range(300):
            delta = counter.delta(A, 0, 0)
            seen.append(delta.through)
            assert len({total for _, total in delta.totals.values()}) == 1
            assert len(set(counter.list("", "", 99)[0].values())) == 1
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert all(through % len(NAMES) == 0 for through in seen)
    assert len(set(seen)) > 1


# The API.


def post(client, amounts, query="", *headers):
    body = amounts if isinstance(amounts, bytes) else json.dumps(amounts).encode()
    return client.ask("POST", f"/increments{query}", *headers, body=body)


def counts(client, prefix):
    return client.ask("GET", f"/counts?prefix={prefix}&limit=1000").json()["counts"]


@pytest.fixture
def node(start_local):
    return start_local()


def test_a_batch_answers_the_counts_and_the_last_id(client, node):
    """Who waits for that id has all of it."""
    client.ask("POST", "/increment/y?amount=5")
    reply = post(client, {"y": 1, "x": -3, "z": AMOUNT_MAX})
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json() == {"id": increment_id(node.counter.replica, 4), "counts": {"y": 6, "x": -3, "z": AMOUNT_MAX}}
    assert client.ask("GET", f"/count/x?after={reply.json()['id']}").json()["count"] == -3
    assert next_id(node) == increment_id(node.counter.replica, 5)


def test_the_very_same_bytes_count_again(client):
    """A repeated batch without a key is another one."""
    assert [post(client, {"x": 1, "y": 2}).json()["counts"]["y"] for _ in range(4)] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("amounts", "named"),
    [
        ({"a": 1, "b c": 1}, "b c: a counter's name"), ({"a": 1, "": 1}, ": a counter's name"),
        ({"a": 1, ".": 1}, ".: a counter's name"), ({"a": 1, "x" * 129: 1}, "x" * 40 + "…: a counter's name"),
        ({"a": 1, "\ud800": 1}, "a counter's name"), ({"a": 1, "b\n": 1}, "a counter's name"),
        ({"a": 1, "visits@1y": 1}, "visits@1y: a windowed counter"),
        ({"a": 1, "b": 0}, "b: amount"), ({"a": 1, "b": 1.0}, "b: amount"), ({"a": 1, "b": True}, "b: amount"),
        ({"a": 1, "b": None}, "b: amount"), ({"a": 1, "b": "1"}, "b: amount"), ({"a": 1, "b": [1]}, "b: amount"),
        ({"a": 1, "b": {"amount": 1}}, "b: amount"), ({"a": 1, "b": AMOUNT_MAX + 1}, "b: amount"),
        ({"a": 1, "b": -AMOUNT_MAX - 1}, "b: amount"), ({"a": 1, "b": 10**4000}, "b: amount"),
        (b'{"a": 1, "b": NaN}', "b: amount"), (b'{"a": 1, "b": 1e3}', "b: amount"),
    ],
)  # fmt: skip
def test_a_batch_with_a_bad_item_says_which_and_changes_nothing(client, node, amounts, named):
    """Not even the items before it are counted."""
    assert named in problem(post(client, amounts), 400)
    assert (counts(client, ""), node.counter.sequence) == ({}, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b"1", b"null", b'"a"', b'[["a", 1]]', b'{"a": 1', b'{"a": 1}}', b"{'a': 1}", b'{"a": 1,}',
        b'{"a": 1, "a": 1}', b'{"a": 1, "b": 2, "\\u0061": 1}', b'\xff{"a": 1}', b'{"a": 1\xff}', b'\xef\xbb\xbf{}',
        b"[" * 10**4, b'{"a": ' * 10**4, b'{"a": ' + b"1" * 5000 + b"}",
        json.dumps(dict.fromkeys(map(str, range(1001)), 1)).encode(),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_refused(client, node, body):
    """A batch is a JSON object in UTF-8 with 1 to 1,000 names, each once."""
    problem(post(client, body), 400)
    assert node.counter.sequence == 0


def test_a_batch_is_checked_as_its_items_are():
    """Whatever the characters and the numbers are: names and amounts that are good by themselves, and no others."""
    rng, good = random.Random(1), 0
    for _ in range(20_000):
        names = ["".join(rng.choices("aaaaZZZZ0000....::::----/ \né", k=rng.randint(0, 4))) for _ in range(3)]
        amounts = {
            name: rng.choice((1, 1, -1, AMOUNT_MAX, -AMOUNT_MAX, 0, 2**53, -(2**53), 1.0, True)) for name in names
        }

        def is_good(item):
            return NAME.match(item[0]) and type(item[1]) is int and 0 < abs(item[1]) <= AMOUNT_MAX

        bad = [item for item in amounts.items() if not is_good(item)]
        try:
            assert parameters.batch(json.dumps(amounts).encode()) == amounts
            assert not bad
            good += 1
        except Refused as refused:
            assert refused.detail.startswith(f"{bad[0][0]}: ")
    assert good > 100


def test_a_batch_has_up_to_1000_names(client):
    """Within the 64 KiB of a body; who sends more is told the limit."""
    batch = {f"a-longer-name-of-a-counter-{number}": number + 1 for number in range(1000)}
    assert post(client, batch).json()["counts"] == batch == counts(client, "a-longer-name")
    assert "1 to 1,000 names" in problem(post(client, {**batch, "one": 1}), 400)
    problem(post(client, b" " * 65537), 413)


@pytest.mark.parametrize("query", ["?amount=1", "?acks=0", "?timeout=1", "?durable=true", "?durable=yes", "?name=x"])
def test_a_bad_query_of_a_batch_is_refused(client, node, query):
    """`amount` is in the body; without a data file nothing is durable."""
    problem(post(client, {"a": 1}, query), 400)
    assert node.counter.sequence == 0


def test_a_batch_waits_for_acks(client):
    """A lone node answers 202 after the timeout, and the batch stays counted."""
    assert post(client, {"x": 1, "y": 1}, "?acks=1").json()["acks"] == 1
    short = post(client, {"x": 1, "y": 1}, "?acks=2&timeout=0.01")
    assert (short.status, short.json()["acks"], short.json()["counts"]) == (202, 1, {"x": 2, "y": 2})
    assert counts(client, "") == {"x": 2, "y": 2}


def test_a_batch_is_durable(start_node, tmp_path):
    """What was answered so is counted after the node was killed; of a batch all names are."""
    node = start_node("--data", tmp_path / "data")
    answer = node.ask("POST", "/increments?durable=true&acks=1", json.dumps({"x": 1, "y": 2})).json()
    assert (answer["durable"], answer["acks"], answer["counts"]) == (True, 1, {"x": 1, "y": 2})
    node.kill()
    again = start_node("--data", tmp_path / "data")
    assert again.get("/counts")["counts"] == {"x": 1, "y": 2}


def test_a_batch_with_a_key_counts_once(client):
    """A replay says so, answers the same id, and waits as well."""
    batch, key = {"x": 1, "y": 2}, "Idempotency-Key: once"
    first, replay = post(client, batch, "", key), post(client, batch, "?acks=1", key)
    assert (first.status, "idempotent-replayed" in first.headers) == (200, False)
    assert (replay.status, replay.headers["idempotent-replayed"]) == (200, "true")
    assert replay.json() == {**first.json(), "acks": 1}
    problem(post(client, {"x": 1}, "", key), 422)
    problem(client.ask("POST", "/increment/z", key), 422)
    problem(post(client, batch, "", "Idempotency-Key: 0188e2a0-0000-7000-8000-000000000000"), 400)
    assert counts(client, "") == batch


def test_a_batch_without_room_changes_nothing(start_local, connect):
    """507 without room for its counters, 503 for its keys."""
    client = connect(start_local("--max-counters", "3", "--max-idempotency-keys", "3"))
    problem(post(client, dict.fromkeys("abcd", 1)), 507)
    problem(post(client, dict.fromkeys("abcd", 1), "", "Idempotency-Key: k"), 503)
    assert post(client, dict.fromkeys("abc", 1), "", "Idempotency-Key: k").status == 200
    refused = post(client, dict.fromkeys("abc", 1), "", "Idempotency-Key: l")
    problem(refused, 503)
    assert int(refused.headers["retry-after"]) > 0
    assert counts(client, "") == dict.fromkeys("abc", 1)


def test_a_peer_holds_all_of_a_batch(client, node, connect):
    """It learns of the keys as well: the same batch at the peer is a replay."""
    other = Counter(B)
    other.increment_many_once("k", {"x": 1, "y": 2}, 0)
    peer = connect(node)
    peer.send(gossip_request(node, *other.deltas({}, 10**6, 0)))
    assert peer.read().status == 200
    replay = post(client, {"x": 1, "y": 2}, "", "Idempotency-Key: k")
    assert replay.headers["idempotent-replayed"] == "true"
    assert replay.json() == {"id": increment_id(B, 2), "counts": {"x": 1, "y": 2}}


def test_batches_retried_at_nodes_that_cannot_talk_count_once():
    """Answer lost, retried beyond a cut, healed: every item of every batch counts once at all nodes."""
    assert batch_retries.run(batches=4, names=50, seed=int.from_bytes(os.urandom(4), "big"))

"""Messages, and what becomes due when, on a hand-driven clock; then the pool of real threads."""

import contextlib
import json
import logging
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import wait_until

import gossip
from counter import AMOUNT_MAX, APPLIED, Counter, Delta, wire
from counter.wire import Message, Sender, Signer, View, decode, encode, lacks, vector_hash
from gossip import Gossip, backoff_s
from peers import PeerTable
from replication import Replicator

ME, A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "fabc")
AT_ME, AT_A, AT_B = (f"10.0.0.{number}:80" for number in range(3))
NOBODY = View([], [])
SIGNER = Signer(b"", "counter")
A_SENDS = Sender(A, AT_A, 1, False)


class Half:
    """One node without threads: what Node wires together."""

    def __init__(self, replica=ME, address=AT_ME, pushed_to=8, doubtful_max=2):
        rng = random.Random(1)
        self.counter = Counter(replica)
        self.table = PeerTable(replica, address, [], 1.0, 5.0, 8, rng)
        self.gossip = Gossip(self.counter, self.table, 0.1, 10.0, pushed_to, doubtful_max, rng)

    def meet(self, address=AT_A, id=A, applied=None, now=0.0):
        """Have a peer answer a first heartbeat with this vector."""
        self.gossip.swept([address], [], now)
        link = self.gossip.take(now)
        request = self.gossip.request(link, 0.0)
        self.gossip.answered(link, request, answer(applied or {}, id, address), now)
        return link


def answer(applied=None, id=A, address=AT_A, hash=None, confirms=None, deltas=()):
    return Message(Sender(id, address, 1, False), NOBODY, applied, hash, confirms, list(deltas))


def talk(sender, receiver, link, now):
    """Carry one exchange between two halves."""
    request = sender.gossip.request(link, 0.0)
    reply = receiver.gossip.receive(decode(encode(request)), now)
    sender.gossip.answered(link, request, decode(encode(reply)), now)


# Messages.


@pytest.mark.parametrize(
    "message",
    [
        Message(A_SENDS, View([(B, AT_B, 3)], [C]), {A: 5}, None, None, []),
        Message(A_SENDS, NOBODY, None, "0" * 32, {A: 5}, []),
        Message(
            A_SENDS._replace(address=None, leaving=True), NOBODY, None, None, None, [Delta(A, 1, 3, {"x": (3, -7)})]
        ),
    ],
)
def test_a_message_survives_its_journey(message):
    assert decode(encode(message)) == message


def test_where_there_is_a_hash_the_vector_stays_at_home():
    message = Message(A_SENDS, NOBODY, {A: 5}, "0" * 32, None, [])
    assert decode(encode(message)) == message._replace(applied=None)


DIGEST = "0123456789abcdef" * 2
GOOD_KEY = [3, DIGEST, "y", 1, 0.5]
GOOD_DELTA = {"replica": A, "after": 1, "through": 3, "totals": {"x": [2, 5], "y": [3, 1]}}


def with_delta(**changes):
    return {"from": A_SENDS._asdict(), "deltas": [GOOD_DELTA | changes]}


def with_sender(**changes):
    return {"from": A_SENDS._asdict() | changes}


@pytest.mark.parametrize("body", [b"", b"x", b"\xff", b"[]", b"{}", b"1", b'"x"', b"null", b"[" * 60_000])
def test_what_is_no_message_is_refused(body):
    with pytest.raises(ValueError):
        decode(body)


@pytest.mark.parametrize(
    "fields",
    [
        {"from": None},
        {"from": []},
        {"from": {}},
        {"from": {"id": A}},
        with_sender(extra=1),
        with_sender(id="x"),
        with_sender(id=None),
        with_sender(id=A + "\n"),
        with_sender(address="x"),
        with_sender(address=5),
        with_sender(address=[]),
        with_sender(beat=-1),
        with_sender(beat=1.5),
        with_sender(beat=True),
        with_sender(beat=2**60),
        with_sender(leaving=1),
        with_sender() | {"unknown": 1},
        with_sender() | {"view": None},
        with_sender() | {"view": {"peers": [[A, AT_A]], "left": []}},
        with_sender() | {"view": {"peers": [[A, "x", 1]], "left": []}},
        with_sender() | {"view": {"peers": [["x", AT_A, 1]], "left": []}},
        with_sender() | {"view": {"peers": [[A, AT_A, "1"]], "left": []}},
        with_sender() | {"view": {"peers": [], "left": ["x"]}},
        with_sender() | {"view": {"peers": [], "left": [None]}},
        with_sender() | {"applied": []},
        with_sender() | {"applied": {"x": 1}},
        with_sender() | {"applied": {A: -1}},
        with_sender() | {"applied": {A: 2**62}},
        with_sender() | {"applied": {A: "1"}},
        with_sender() | {"hash": 1},
        with_sender() | {"confirms": {A: None}},
        with_sender() | {"confirms": [A]},
        with_sender() | {"deltas": {}},
        with_sender() | {"deltas": [None]},
        with_sender() | {"deltas": [[]]},
        with_delta(replica="x"),
        with_delta(replica=[]),
        with_delta(after=-1),
        with_delta(after=3),
        with_delta(after="1"),
        with_delta(through=2**62),
        with_delta(through=4),
        with_delta(totals={}),
        with_delta(totals=[]),
        with_delta(totals={"x": [3]}),
        with_delta(totals={"x": 3}),
        with_delta(totals={"x": [3, 1, 1]}),
        with_delta(totals={"a b": [3, 1]}),
        with_delta(totals={"x": [1, 1], "y": [3, 1]}),
        with_delta(totals={"x": [3, 1], "y": [3, 1]}),
        with_delta(totals={"x": [3.0, 1]}),
        with_delta(totals={"x": [3, 1.0]}),
        with_delta(totals={"x": [3, 3 * AMOUNT_MAX + 1]}),
        with_delta(extra=1),
        *(
            with_delta(keys=[key])
            for key in (
                [1, DIGEST, "y", 1, 0],
                [4, DIGEST, "y", 1, 0],
                [3, "x", "y", 1, 0],
                [3, DIGEST, "z", 1, 0],
                [3, DIGEST, "y", 0, 0],
                [3, DIGEST, "y", 1.0, 0],
                [3, DIGEST, "y", 1, -1],
                [3, DIGEST, "y", 1],
                None,
            )
        ),
        with_delta(keys=[GOOD_KEY, GOOD_KEY]),
        with_delta(requires=[[A, 0]]),
        with_delta(requires=[["x", 1]]),
        with_delta(requires=None),
    ],
)
def test_a_message_with_any_impossible_part_is_refused(fields):
    with pytest.raises(ValueError):
        decode(json.dumps(fields).encode())


def test_a_good_message_of_that_kind_is_taken():
    delta = Delta(A, 1, 3, {"x": (2, 5), "y": (3, 1)})
    assert decode(json.dumps(with_delta()).encode()).deltas == [delta]
    fields = with_delta(keys=[GOOD_KEY], requires=[[B, 2]])
    delta = delta._replace(keys=(tuple(GOOD_KEY),), requires=((B, 2),))
    assert decode(json.dumps(fields).encode()).deltas == [delta]


@pytest.mark.parametrize("seed", range(20))
def test_a_message_damaged_anywhere_is_refused_or_still_makes_sense(seed):
    """Whatever bytes arrive, nothing but ValueError comes out."""
    rng = random.Random(seed)
    body = encode(Message(A_SENDS, View([(B, AT_B, 3)], [C]), {A: 5}, None, {B: 1}, [Delta(A, 1, 3, {"x": (3, -7)})]))
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            assert encode(decode(bytes(damaged)))


def test_equal_vectors_have_equal_hashes():
    assert vector_hash({A: 1, B: 2}) == vector_hash({B: 2, A: 1})
    assert vector_hash({A: 1, B: 2}) != vector_hash({A: 2, B: 1})


def test_a_key_accepted_while_an_answer_is_made_does_not_spoil_it():
    """The time of a message is read before its deltas are cut, and the key may be a little younger."""
    node = Half()
    node.counter.increment_once("k", "x", 1, now=100.001)
    message = Message(A_SENDS, NOBODY, {}, None, None, [])
    ((_, _, _, _, age_s),) = decode(encode(node.gossip.receive(message, 100.0))).deltas[0].keys
    assert age_s == 0


def test_lacking_is_to_hold_less_of_any_replica():
    assert not lacks({A: 2}, {A: 2})
    assert not lacks({A: 2, B: 1}, {A: 1})
    assert lacks({A: 2}, {A: 1, B: 1})
    assert lacks({}, {A: 1})


def test_the_backoff_doubles_up_to_its_maximum_with_full_jitter():
    rng = random.Random(1)
    for failures in (1, 2, 5, 8, 100, 10**9):
        waits = [backoff_s(failures, 0.1, 10, rng) for _ in range(2000)]
        most = min(10, 0.1 * 2 ** min(failures - 1, 30))
        assert max(waits) <= most
        assert max(waits) > 0.95 * most
        assert min(waits) < 0.05 * most


# What becomes due.


def test_an_increment_is_due_at_once_and_travels_alone():
    node = Half()
    link = node.meet()
    assert node.gossip.take(1.0) is None
    node.counter.increment("x", 5)
    node.gossip.touch(1.0)
    assert node.gossip.take(1.0) is link
    request = node.gossip.request(link, 0.0)
    assert (request.applied, request.hash, request.deltas) == (None, None, [Delta(ME, 0, 1, {"x": (1, 5)})])
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.0)
    assert node.gossip.take(9.0) is None
    assert node.gossip.unconfirmed() == {AT_A: 0}


def test_what_is_counted_during_a_send_goes_in_the_next_after_a_pause():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.gossip.touch(1.0)
    node.gossip.take(1.0)
    request = node.gossip.request(link, 0.0)
    node.counter.increment("x")
    node.gossip.touch(1.001)
    assert node.gossip.take(1.001) is None
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.002)
    assert node.gossip.take(1.002) is None
    assert node.gossip.take(1.0 + gossip.PACING_S) is link
    assert node.gossip.request(link, 0.0).deltas == [Delta(ME, 1, 2, {"x": (2, 2)})]


def test_a_push_that_another_send_made_needless_is_not_sent():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.gossip.touch(1.0)
    node.gossip.take(1.0)
    request = node.gossip.request(link, 0.0)
    node.gossip.touch(1.0)
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.0)
    assert node.gossip.next_due(1.0) == gossip.NEVER
    node.counter.increment("x")
    assert not node.gossip.touched  # or nobody would call the next
    node.gossip.touch(2.0)
    assert node.gossip.take(2.0) is link


def test_a_failed_send_is_tried_again_later_and_later():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.gossip.touch(1.0)
    now, waits = 1.0, []
    for _ in range(200):
        assert node.gossip.take(now) is link
        node.gossip.failed(link, OSError("down"), now)
        due = node.gossip.next_due(now - 1)
        waits.append(due - now)
        now = due
    assert max(waits[:3]) <= 0.4
    assert 5 < max(waits[10:]) <= 10
    node.gossip.take(now)
    request = node.gossip.request(link, 0.0)
    assert (request.applied, request.deltas) == ({ME: 1}, [])  # did it arrive after all?
    node.gossip.answered(link, request, answer({}), now)
    assert node.gossip.take(now + 1) is link
    assert node.gossip.request(link, now).deltas == [Delta(ME, 0, 1, {"x": (1, 1)})]


def test_a_peer_that_stays_down_is_one_line(caplog):
    caplog.set_level(logging.INFO)
    node = Half()
    link = node.meet()
    for now in range(1, 10):
        node.gossip.swept([AT_A], [], float(now))
        node.gossip.take(float(now))
        node.gossip.failed(link, OSError("down"), float(now))
    node.meet(now=10.0)
    lines = [record.getMessage() for record in caplog.records if record.name == "counter.replication"]
    assert lines == [f"retrying: addr={AT_A} error=down", f"recovered: addr={AT_A}"]


def test_only_what_failed_recovers(caplog):
    """An answer that takes nothing makes the node back off, but is no trouble that an operator should read of."""
    caplog.set_level(logging.INFO)
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.gossip.touch(1.0)
    node.gossip.take(1.0)
    node.gossip.answered(link, node.gossip.request(link, 1.0), answer({}, confirms={}), 1.0)
    assert link.failures == 1
    node.meet(now=10.0)
    assert link.failures == 0
    assert not [record for record in caplog.records if record.name == "counter.replication"]


def test_a_seed_that_cannot_be_looked_up_is_a_line_and_so_is_its_return(caplog):
    caplog.set_level(logging.INFO)
    node = Half()
    for now, fails in enumerate((True, True, False, False)):
        node.gossip.swept([], ["seed:80"], float(now))
        link = node.gossip.take(float(now))
        if fails:
            node.gossip.failed(link, OSError("no such name"), float(now))
        else:
            node.gossip.released(link)
    lines = [record.getMessage() for record in caplog.records if record.name == "counter.replication"]
    assert lines == ["retrying: addr=seed:80 error=no such name", "recovered: addr=seed:80"]


def test_a_heartbeat_does_not_wait_for_the_backoff():
    node = Half()
    link = node.meet()
    node.gossip.swept([AT_A], [], 1.0)
    node.gossip.take(1.0)
    node.gossip.failed(link, OSError("down"), 1.0)
    node.gossip.swept([AT_A], [], 1.0)
    assert node.gossip.take(1.0) is link


def test_one_send_at_a_time_is_in_flight_to_a_peer():
    node = Half()
    link = node.meet()
    node.gossip.swept([AT_A], [], 1.0)
    assert node.gossip.take(1.0) is link
    node.gossip.swept([AT_A], [], 2.0)
    assert node.gossip.take(2.0) is None


def test_peers_that_failed_leave_workers_to_the_others():
    node = Half(doubtful_max=1)
    addresses = [f"10.0.1.{number}:80" for number in range(3)]
    for number, address in enumerate(addresses):
        node.meet(address, f"{number:08x}-0000-8000")
    node.gossip.swept(addresses[:2], [], 1.0)
    for _ in addresses[:2]:
        node.gossip.failed(node.gossip.take(1.0), OSError("down"), 1.0)
    node.gossip.swept(addresses, [], 2.0)
    assert node.gossip.take(2.0).address == addresses[2]
    first = node.gossip.take(2.0)
    assert first.address in addresses[:2]
    assert node.gossip.take(2.0) is None
    node.gossip.failed(first, OSError("down"), 2.0)
    assert node.gossip.take(3.0) is not None


def test_many_dead_do_not_keep_an_active_peer_waiting_nor_it_them():
    """One that did not answer once is asked before all the dead, whatever their number, but not in place of them."""
    node = Half(doubtful_max=2)
    dead = [f"10.0.1.{number}:80" for number in range(20)]

    def fail(addresses, now):
        node.gossip.contact(addresses, now)
        while link := node.gossip.take(now):
            node.gossip.failed(link, OSError("no answer"), now)

    fail(dead, 0.0)
    for address, id in ((AT_A, A), (AT_B, B)):
        node.meet(address, id, now=0.0)
    fail([AT_A, AT_B], 1.0)
    node.gossip.contact(dead, 20.0)
    node.gossip.contact([AT_A, AT_B], 21.0)
    first, second = node.gossip.take(30.0), node.gossip.take(30.0)
    assert second.address in dead
    assert node.gossip.take(30.0) is None
    node.gossip.answered(first, node.gossip.request(first, 30.0), answer({}, first.peer, first.address), 30.0)
    assert {first.address, node.gossip.take(30.0).address} == {AT_A, AT_B}


def test_only_some_peers_are_told_of_an_increment_at_once():
    node = Half(pushed_to=2)
    for number in range(5):
        node.meet(f"10.0.1.{number}:80", f"{number:08x}-0000-8000")
    node.counter.increment("x")
    node.gossip.touch(1.0)
    assert len({node.gossip.take(1.0).address for _ in range(2)}) == 2
    assert node.gossip.take(1.0) is None


def test_joining_with_full_catch_up_is_one_round_trip():
    old, new = Half(A, AT_A), Half()
    for number in range(100):
        old.counter.increment(f"counter-{number}")
    new.gossip.contact([AT_A], 0.0)
    assert not new.gossip.caught_up
    talk(new, old, new.gossip.take(0.0), 0.0)
    assert new.counter.vector() == old.counter.vector()
    assert new.gossip.caught_up
    assert new.table.active() == [(A, AT_A)]
    assert old.table.active() == [(ME, AT_ME)]


def test_who_only_meets_itself_has_caught_up_with_nobody():
    node = Half()
    node.gossip.contact(["localhost:80"], 0.0)
    talk(node, node, node.gossip.take(0.0), 0.0)
    assert not node.gossip.caught_up
    assert node.gossip.take(1.0) is None


def test_catching_up_in_several_messages_goes_on_until_it_is_done():
    old, new = Half(A, AT_A), Half()
    for number in range(40):
        totals = {f"{'x' * 100}-{n}": (n, 1) for n in range(1, 501)}
        old.counter.merge(Delta(f"{number:08x}-1111-8111", 0, 500, totals), 0)
    new.gossip.contact([AT_A], 0.0)
    rounds = 0
    while link := new.gossip.take(float(rounds)):
        assert not new.gossip.caught_up
        talk(new, old, link, float(rounds))
        rounds += 1
    assert 1 < rounds < 10
    assert new.gossip.caught_up
    assert new.counter.vector() == old.counter.vector()


def test_what_the_peer_lacks_follows_at_once():
    node, peer = Half(), Half(A, AT_A)
    node.counter.merge(Delta(B, 0, 2, {"x": (2, 9)}), 0)
    node.counter.increment("x")
    node.gossip.contact([AT_A], 0.0)
    talk(node, peer, node.gossip.take(0.0), 0.0)
    assert peer.counter.value("x") == 0
    talk(node, peer, node.gossip.take(1.0), 1.0)
    assert peer.counter.value("x") == 10
    assert node.gossip.take(9.0) is None


def test_a_peer_that_takes_nothing_does_not_make_the_node_spin():
    """Without news the next heartbeat is soon enough, even for a peer that refuses what it lacks."""
    node = Half()
    node.counter.merge(Delta(B, 0, 2, {"x": (2, 9)}), 0)
    node.gossip.contact([AT_A], 0.0)
    sends = 0
    while link := node.gossip.take(float(sends)):
        node.gossip.answered(link, node.gossip.request(link, 0.0), answer({}), float(sends))
        sends += 1
        assert sends < 5
    node.gossip.swept([AT_A], [], 10.0)
    assert node.gossip.take(10.0)


def test_a_peer_that_answers_but_takes_nothing_is_pushed_to_less_and_less():
    node = Half()
    link, sends, now = node.meet(), 0, 1.0
    node.counter.increment("x")
    node.gossip.touch(now)
    while now < 100:
        if node.gossip.take(now):
            node.gossip.answered(link, node.gossip.request(link, now), answer({}, confirms={}), now)
            sends += 1
        now = min(100, node.gossip.next_due(now))
    assert 10 < sends < 150


def test_an_increment_that_arrives_as_its_predecessor_is_confirmed_is_not_forgotten(monkeypatch):
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.gossip.touch(1.0)
    node.gossip.take(1.0)
    request = node.gossip.request(link, 1.0)
    vector = node.counter.vector

    def vector_and_an_increment():
        before = vector()
        node.counter.increment("x")
        node.gossip.touch(1.0)
        return before

    monkeypatch.setattr(node.counter, "vector", vector_and_an_increment)
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.0)
    assert node.gossip.take(2.0) is link


def test_a_peer_that_cannot_be_dialled_is_dialled_once_a_heartbeat_at_most():
    node = Half()
    link, tries = node.meet(), 0
    for step in range(100):
        now = 1 + step / 100
        message = Message(Sender(A, AT_A, step + 2, False), NOBODY, None, None, None, [])
        node.gossip.receive(message._replace(applied={}) if step % 50 == 0 else message, now)
        node.counter.increment("x")
        node.gossip.touch(now)
        while node.gossip.take(now):
            tries += 1
            node.gossip.failed(link, OSError("down"), now)
    assert tries < 20


def test_a_heartbeat_answered_without_a_vector_is_no_answer():
    node = Half()
    link = node.meet()
    node.gossip.contact([AT_A], 1.0)
    node.gossip.take(1.0)
    with pytest.raises(ValueError):
        node.gossip.answered(link, node.gossip.request(link, 1.0), answer(), 1.0)


def test_long_vectors_that_agreed_are_compared_by_their_hash():
    node, peer = Half(), Half(A, AT_A)
    for number in range(gossip.VECTOR_SHORT + 1):
        delta = Delta(f"{number:08x}-1111-8111", 0, 1, {"x": (1, 1)})
        assert node.counter.merge(delta, 0) == APPLIED
        assert peer.counter.merge(delta, 0) == APPLIED
    node.gossip.contact([AT_A], 0.0)
    talk(node, peer, node.gossip.take(0.0), 0.0)
    node.gossip.contact([AT_A], 1.0)
    link = node.gossip.take(1.0)
    assert node.gossip.request(link, 0.0).hash == vector_hash(node.counter.vector())
    node.gossip.contact([AT_A], 1.0)
    peer.counter.increment("x", 7)
    talk(node, peer, link, 1.0)
    talk(node, peer, node.gossip.take(2.0), 2.0)
    assert node.counter.value("x") == gossip.VECTOR_SHORT + 1 + 7


def test_a_restarted_peer_is_owed_everything_again():
    node, first, second = Half(), Half(A, AT_A), Half(B, AT_A)
    node.counter.increment("x")
    node.gossip.contact([AT_A], 0.0)
    for now in (0.0, 1.0):
        talk(node, first, node.gossip.take(now), now)
    assert first.counter.value("x") == 1
    node.counter.increment("x")
    node.gossip.touch(2.0)
    now = 2.0
    while link := node.gossip.take(now):
        talk(node, second, link, now)
        now += 1
    assert second.counter.value("x") == 2
    assert node.table.active() == [(B, AT_A)]


def test_a_message_from_a_peer_ends_its_backoff():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.gossip.touch(1.0)
    node.gossip.take(1.0)
    for _ in range(20):
        node.gossip.failed(link, OSError("down"), 1.0)
    node.gossip.receive(Message(Sender(B, AT_A, 1, False), NOBODY, {}, None, None, []), 1.0)
    assert node.gossip.take(1.0) is link


def test_a_cloned_node_finds_a_new_id(caplog):
    node = Half()
    node.counter.increment("x")
    node.gossip.receive(Message(A_SENDS, NOBODY, {ME: 2}, None, None, []), 0.0)
    assert node.counter.replica != ME
    assert node.table.describe()[0].id == node.counter.replica
    assert "cloned" in caplog.text


def test_draining_ends_when_all_have_confirmed_all_and_know_of_the_leaving():
    node, peer = Half(), Half(A, AT_A)
    link = node.meet()
    node.counter.increment("x")
    drained = []
    thread = threading.Thread(target=lambda: drained.append(node.gossip.drain(time.monotonic, 20)))
    thread.start()
    while thread.is_alive():
        if taken := node.gossip.take(time.monotonic()):
            assert taken is link
            talk(node, peer, link, time.monotonic())
    assert drained == [True]
    assert peer.counter.value("x") == 1
    assert peer.table.active() == []


def test_a_node_that_takes_more_than_it_sent_for_its_own_is_cloned(caplog):
    """It learns so with the first push: what it counts until then, no peer will take."""
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.gossip.touch(1.0)
    assert node.gossip.take(1.0) is link
    node.gossip.answered(link, node.gossip.request(link, 1.0), answer(confirms={ME: 2}), 1.0)
    assert node.counter.replica != ME
    assert "cloned" in caplog.text


def test_a_node_under_whose_id_another_left_finds_a_new_one(caplog):
    """Nobody would list it any more."""
    node = Half()
    node.gossip.receive(Message(A_SENDS, View([], [ME]), {}, None, None, []), 0.0)
    assert node.counter.replica != ME
    assert node.table.describe()[0].id == node.counter.replica
    assert "cloned" in caplog.text


def test_a_node_that_leaves_hears_that_it_leaves():
    """And so nothing new."""
    node = Half()
    node.table.leave()
    node.gossip.receive(Message(A_SENDS, View([], [ME]), {}, None, None, []), 0.0)
    assert node.counter.replica == ME


def test_who_waits_for_acks_is_woken_by_what_it_waits_for_only(monkeypatch):
    """Hundreds may wait while hundreds of answers arrive in a second."""
    node, looked, reached = Half(), threading.Semaphore(0), []
    links = [node.meet(AT_A, A), node.meet(AT_B, B)]
    node.counter.increment("x")
    active = node.table.active
    monkeypatch.setattr(node.table, "active", lambda: looked.release() or active())
    waiting = threading.Thread(target=lambda: reached.append(node.gossip.wait_for_acks(ME, 1, 3, time.monotonic, 30)))
    waiting.start()
    assert looked.acquire(timeout=10)

    def confirm(link, id, address):
        node.gossip.swept([address], [], 1.0)
        assert node.gossip.take(1.0) is link
        node.gossip.answered(link, node.gossip.request(link, 1.0), answer({ME: 1}, id, address), 1.0)

    confirm(links[0], A, AT_A)
    assert looked.acquire(timeout=10)
    confirm(links[0], A, AT_A)
    assert not any(event.is_set() for event in node.gossip._awaited)
    confirm(links[1], B, AT_B)
    waiting.join(10)
    assert reached == [3]
    assert not node.gossip._awaited


def test_draining_hands_over_to_the_successor_of_a_peer():
    """Which it meets only while it drains."""
    node, successor = Half(), Half(B, AT_A)
    node.counter.increment("x")
    node.meet(applied={ME: 1})
    drained = []
    thread = threading.Thread(target=lambda: drained.append(node.gossip.drain(time.monotonic, 20)))
    thread.start()
    while thread.is_alive():
        if taken := node.gossip.take(time.monotonic()):
            talk(node, successor, taken, time.monotonic())
    assert drained == [True]
    assert successor.counter.value("x") == 1


def test_draining_tells_who_joins_meanwhile():
    """At once: in a large cluster its turn to get a heartbeat may come late."""
    node, peers = Half(), {AT_A: Half(A, AT_A), AT_B: Half(B, AT_B)}
    node.meet()
    drained = []
    thread = threading.Thread(target=lambda: drained.append(node.gossip.drain(time.monotonic, 20)))
    thread.start()
    wait_until(lambda: node.gossip._pending)
    peers[AT_B].gossip.contact([AT_ME], 0.0)
    talk(peers[AT_B], node, peers[AT_B].gossip.take(0.0), 0.0)
    while thread.is_alive():
        if taken := node.gossip.take(time.monotonic()):
            talk(node, peers[taken.address], taken, time.monotonic())
    assert drained == [True]
    assert peers[AT_A].table.active() == peers[AT_B].table.active() == []


def test_draining_gives_up_after_its_timeout():
    node = Half()
    node.meet()
    assert not node.gossip.drain(time.monotonic, 0.01)


# The threads.


class Peer(ThreadingHTTPServer):
    """A peer that answers what `reply` returns for a request's body: (status, body, headers)."""

    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.bodies = reply, []
        super().__init__(("127.0.0.1", 0), PeerHandler)
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass  # the node hung up on an answer that never ended


class PeerHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        status, answer, headers = self.server.reply(body)
        self.send_response(status)
        signature = SIGNER.answer(self.headers[wire.SIGNATURE], answer)
        for name, value in {"Content-Length": str(len(answer)), wire.SIGNATURE: signature, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def pool():
    """Start a Replicator for a Half and Peers by the replies they give; all end with the test."""
    ending = []

    def start(*replies, workers=2):
        node, peers = Half(), [Peer(reply) for reply in replies]
        for peer in peers:
            thread = threading.Thread(target=peer.serve_forever, args=(0.01,))
            thread.start()
            ending.append(lambda peer=peer, thread=thread: (peer.shutdown(), peer.server_close(), thread.join()))
        replicator = Replicator(node.gossip, node.table, SIGNER, 80, workers, peer_timeout_s=2.0)
        replicator.start()
        ending.insert(0, lambda: replicator.stop(20))
        return node, replicator, peers

    yield start
    for end in ending:
        assert end() is not False


def good(body):
    """Answer as a peer that holds all it is sent."""
    message = decode(body)
    confirms = {delta.replica: delta.through for delta in message.deltas}
    return 200, encode(answer(message.applied, address=None, confirms=confirms or None)), {}


def test_the_pool_delivers_increments(pool):
    node, replicator, (peer,) = pool(good)
    replicator.contact([peer.address], [])
    wait_until(node.table.active)
    node.counter.increment("x", 3)
    replicator.wake()
    wait_until(lambda: decode(peer.bodies[-1]).deltas == [Delta(ME, 0, 1, {"x": (1, 3)})])
    wait_until(lambda: node.gossip.unconfirmed()[peer.address] == 0)


def test_the_pool_looks_up_the_names_of_seeds(pool):
    node, replicator, (peer,) = pool(good)
    replicator.contact([], [f"localhost:{peer.server_address[1]}"])
    wait_until(node.table.active)


@pytest.mark.parametrize(
    "reply",
    [
        lambda body: (503, b"", {"Retry-After": "3600"}),
        lambda body: (500, b"x" * 1000, {}),
        lambda body: (302, b"", {"Location": "http://127.0.0.1:1/"}),
        lambda body: (200, b"", {}),
        lambda body: (200, b"{}", {}),
        lambda body: (200, encode(answer(address=None)), {}),
        lambda body: (200, b"not gossip", {"Content-Encoding": "gzip"}),
        lambda body: (200, b"{}", {"Content-Length": "999"}),
        lambda body: (*good(body)[:2], {wire.SIGNATURE: "0" * 64}),
    ],
)
def test_a_peer_that_answers_nonsense_is_tried_again_and_harms_nobody(pool, reply, caplog):
    caplog.set_level(logging.INFO)
    node, replicator, (bad, peer) = pool(reply, good)
    replicator.contact([bad.address, peer.address], [])
    wait_until(node.table.active)

    def contact_until(condition):
        wait_until(lambda: replicator.contact([bad.address], []) or condition())

    contact_until(lambda: len(bad.bodies) >= 2)
    bad.reply = good
    contact_until(lambda: f"recovered: addr={bad.address}" in caplog.text)
    assert "Traceback" not in caplog.text


def test_the_log_says_in_words_why_sending_failed(pool, caplog):
    """Without what requests wraps around it: it is read by operators."""
    _, replicator, (peer,) = pool(lambda body: 1 / 0)  # which hangs up without an answer
    replicator.contact([peer.address], [])
    said = f"retrying: addr={peer.address} error=Remote end closed connection without response"
    wait_until(lambda: said in [record.getMessage() for record in caplog.records])


def test_peers_that_hang_hold_no_worker_that_others_need(pool):
    """With as many hanging peers as workers, a good one is served as soon as they are known for it."""
    released = threading.Event()

    def hang(body):
        released.wait(30)
        return good(body)

    node, replicator, (*hanging, peer) = pool(hang, hang, good)
    try:
        replicator.contact([bad.address for bad in hanging], [])
        wait_until(lambda: all(bad.bodies for bad in hanging))
        replicator.contact([peer.address], [])
        wait_until(node.table.active)
        for _ in range(3):
            known = len(peer.bodies)
            replicator.contact([bad.address for bad in hanging] + [peer.address], [])
            wait_until(lambda known=known: len(peer.bodies) > known)
    finally:
        released.set()


def test_a_worker_survives_a_bug(pool, monkeypatch, caplog):
    node, replicator, (peer,) = pool(good, workers=1)
    monkeypatch.setattr(node.gossip, "request", lambda link, now: 1 / 0)
    replicator.contact([peer.address], [])
    wait_until(lambda: "ZeroDivisionError" in caplog.text)
    monkeypatch.undo()
    replicator.contact([peer.address], [])
    wait_until(node.table.active)


def test_a_link_that_is_new_where_vectors_agree_starts_with_a_hash():
    node, peer = Half(), Half(A, AT_A)
    for number in range(gossip.VECTOR_SHORT + 1):
        delta = Delta(f"{number:08x}-1111-8111", 0, 1, {"x": (1, 1)})
        assert node.counter.merge(delta, 0) == APPLIED
        assert peer.counter.merge(delta, 0) == APPLIED
    node.gossip.contact([AT_A], 0.0)
    talk(node, peer, node.gossip.take(0.0), 0.0)
    node.gossip.contact([AT_B], 1.0)
    assert node.gossip.request(node.gossip.take(1.0), 1.0).hash == vector_hash(node.counter.vector())


def test_links_to_the_many_that_are_not_pushed_to_are_closed_when_idle():
    node = Half(pushed_to=2)
    addresses = [f"10.0.1.{number}:80" for number in range(6)]
    for number, address in enumerate(addresses):
        node.meet(address, f"{number:08x}-0000-8000")
    assert len(node.gossip.unconfirmed()) == 6
    node.gossip.swept([], [], 1.0 + gossip.LINK_IDLE_S)
    assert len(node.gossip.unconfirmed()) == 2


def test_unconfirmed_is_what_this_node_has_to_see_to():
    """What active nodes count they push themselves; once one is gone, this node owes it to the others."""
    node = Half()
    node.meet(AT_A, A)
    node.meet(AT_B, B)
    node.gossip.contact(["10.0.0.9:80"], 0.0)  # which has never said what it holds
    node.counter.merge(Delta(A, 0, 2, {"x": (2, 2)}), 0.0)
    node.counter.increment("x")
    assert node.gossip.unconfirmed() == {AT_A: 1, AT_B: 1}
    for now in range(1, 8):
        node.table.heard(Sender(B, AT_B, now + 1, False), NOBODY, float(now))
        node.table.sweep(float(now))
    assert [id for id, _ in node.table.active()] == [B]
    assert node.gossip.unconfirmed() == {AT_A: 1, AT_B: 3}


def test_whom_to_push_to_changes_where_there_are_more():
    """All join through one seed; it is not to get every increment at once for ever."""
    node, told = Half(pushed_to=2), set()
    for number in range(6):
        node.meet(f"10.0.1.{number}:80", f"{number:08x}-0000-8000")
    for now in range(1, 30):
        node.gossip.swept([], [], float(now))
        node.counter.increment("x")
        node.gossip.touch(float(now))
        links = [node.gossip.take(float(now)) for _ in range(2)]
        assert node.gossip.take(float(now)) is None
        for link in links:
            told.add(link.address)
            node.gossip.failed(link, OSError("down"), float(now))
            link.failures, link.retry_at, link.due = 0, 0.0, gossip.NEVER
            node.gossip.released(link)
    assert len(told) == 6


def test_a_large_delta_is_encoded_like_a_small_one():
    names = range(2 * wire.PIECE + 1)
    totals = {f"x{number}": (number + 1, number) for number in names}
    keys = tuple((number + 1, DIGEST, f"x{number}", 1, 0.5) for number in names)
    large = [Delta(A, 0, len(names), totals, (), ((B, 1),)), Delta(A, 0, len(names), totals, keys)]
    message = Message(A_SENDS, NOBODY, {A: 5}, None, None, [Delta(A, 1, 3, {"x": (3, -7)}), *large])
    assert decode(encode(message)) == message
    assert b" " not in encode(message)


def test_no_call_of_json_gets_more_than_a_piece(monkeypatch):
    """Or all other threads would stand still: also where one counter has many keys."""
    sizes, dumps = [], json.dumps
    monkeypatch.setattr(json, "dumps", lambda value, **how: sizes.append(len(value)) or dumps(value, **how))
    many = range(1, 2 * wire.PIECE + 2)
    keys = tuple((number, DIGEST, "x", 1, 0.5) for number in many)
    encode(Message(A_SENDS, NOBODY, None, None, None, [Delta(A, 0, many[-1], {"x": (many[-1], many[-1])}, keys)]))
    assert max(sizes) == wire.PIECE

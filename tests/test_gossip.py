"""What becomes due when, and what is made of messages, on a hand-driven clock."""

import itertools
import logging
import random
import threading
import time

import pytest
from conftest import wait_until
from halves import A_SENDS, AT_A, AT_B, AT_ME, ME, NOBODY, A, B, C, Half, answer, introduction, talk

from counter import GAP, NEEDS, Delta
from counter.links import LINK_IDLE_S, NEVER, PACING_S, STREAM_PACING_S, backoff_s
from counter.wire import Message, Sender, View, decode, encode


def test_the_backoff_doubles_up_to_its_maximum_with_full_jitter():
    rng = random.Random(1)
    for failures in (1, 2, 5, 8, 100, 10**9):
        waits = [backoff_s(failures, 0.1, 10, rng) for _ in range(2000)]
        most = min(10, 0.1 * 2 ** min(failures - 1, 30))
        assert max(waits) <= most
        assert max(waits) > 0.95 * most
        assert min(waits) < 0.05 * most


def test_an_increment_is_due_at_once_and_travels_alone():
    node = Half()
    link = node.meet()
    assert node.links.take(1.0) is None
    node.counter.increment("x", 5)
    assert node.links.take(1.0) is link
    request = node.gossip.request(link, 0.0)
    assert (request.applied, request.summary, request.deltas) == (None, None, [Delta(ME, 0, 1, {"x": (1, 5)})])
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.0)
    assert node.links.take(9.0) is None
    assert node.gossip.unconfirmed() == {A: 0}


def test_what_is_counted_during_a_send_goes_in_the_next_after_a_pause():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.links.take(1.0)
    request = node.gossip.request(link, 0.0)
    node.counter.increment("x")
    assert node.links.take(1.001) is None
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.002)
    assert node.links.take(1.002) is None
    assert node.links.take(1.0 + PACING_S) is link
    assert node.gossip.request(link, 0.0).deltas == [Delta(ME, 1, 2, {"x": (2, 2)})]


def pushes(node, link, until, interval_s):
    """Count an increment every interval, have every push confirmed after 1 ms, and return when they were sent."""
    now, sent = 1.0, []
    while now < until:
        node.counter.increment("x")
        if node.links.take(now):
            sent.append(now)
            node.gossip.answered(
                link, node.gossip.request(link, now), answer(confirms={ME: node.counter.sequence}), now
            )
        now += interval_s
    return sent


def test_pushes_are_rarer_while_increments_stream():
    node = Half()
    link = node.meet()
    sent = pushes(node, link, 2.0, 0.0005)
    gaps = [after - before for before, after in itertools.pairwise(sent)]
    assert gaps[0] == pytest.approx(PACING_S, abs=0.001)
    assert gaps[-1] == max(gaps) == pytest.approx(STREAM_PACING_S, abs=0.001)
    for now in (3.0, 4.0, 4.0 + PACING_S):  # once they stream no more
        node.counter.increment("x")
        assert node.links.take(now) is link
        node.gossip.answered(link, node.gossip.request(link, now), answer(confirms={ME: node.counter.sequence}), now)


def test_few_increments_are_pushed_as_soon_as_ever():
    node = Half()
    assert len(pushes(node, node.meet(), 2.0, 2 * PACING_S)) == 50


def test_a_client_that_waits_for_acks_ends_long_pacing():
    node = Half()
    link = node.meet()
    last = pushes(node, link, 2.0, 0.0005)[-1]
    node.counter.increment("x")
    assert node.links.take(last + PACING_S) is None
    waiting = threading.Thread(target=node.gossip.wait_for_acks, args=(ME, node.counter.sequence, 2, 60))
    waiting.start()
    wait_until(lambda: node.links.take(last + PACING_S) is link)
    node.gossip.answered(link, node.gossip.request(link, last), answer(confirms={ME: node.counter.sequence}), last)
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_push_that_a_heartbeat_of_the_peer_made_needless_is_not_sent():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.hear(Message(A_SENDS._replace(beat=2), NOBODY, {ME: 1}, None, None, []), 1.0)
    assert node.links.take(1.0) is None
    assert node.links.next_due(1.0) == NEVER
    node.counter.increment("x")
    assert node.links.take(2.0) is link


def test_an_increment_counted_while_nobody_was_there_delays_no_later_one():
    """A peer that joins by calling is pushed to at once, not from the next heartbeat on."""
    node = Half()
    node.counter.increment("x")
    node.hear(Message(A_SENDS, NOBODY, {}, None, None, []), 1.0)
    node.counter.increment("x")
    assert node.links.take(1.0).address == AT_A


def test_an_answer_overtaken_by_a_heartbeat_of_the_peer_is_no_failure():
    """The heartbeat shows what the answer would have confirmed."""
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    assert node.links.take(1.0) is link
    request = node.gossip.request(link, 1.0)
    node.hear(Message(A_SENDS._replace(beat=2), NOBODY, {ME: 1}, None, None, []), 1.0)
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.0)
    node.counter.increment("x")
    assert link.failures == 0
    assert node.links.take(1.0 + PACING_S) is link


def test_a_failed_send_is_tried_again_later_and_later():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    now, waits = 1.0, []
    for _ in range(200):
        assert node.links.take(now) is link
        node.links.failed(link, OSError("down"), now)
        due = node.links.next_due(now - 1)
        waits.append(due - now)
        now = due
    assert max(waits[:3]) <= 0.4
    assert 5 < max(waits[10:]) <= 10
    node.links.take(now)
    request = node.gossip.request(link, 0.0)
    assert (request.applied, request.deltas) == ({ME: 1}, [])  # did it arrive after all?
    node.gossip.answered(link, request, answer({}), now)
    assert node.links.take(now + 1) is link
    assert node.gossip.request(link, now).deltas == [Delta(ME, 0, 1, {"x": (1, 1)})]


def test_a_peer_that_stays_down_is_one_line(caplog):
    caplog.set_level(logging.INFO)
    node = Half()
    link = node.meet()
    for now in range(1, 10):
        node.gossip.swept([AT_A], [], float(now))
        node.links.take(float(now))
        node.links.failed(link, OSError("down"), float(now))
    node.meet(now=10.0)
    lines = [record.getMessage() for record in caplog.records if record.name == "counter.replication"]
    assert lines == [f"retrying: addr={AT_A} error=down", f"recovered: addr={AT_A}"]


@pytest.mark.parametrize("says_so_in", ["a request", "an answer"])
def test_a_seed_that_left_in_order_is_no_warning_and_its_successor_is_one(caplog, says_so_in):
    """A node goes on trying the addresses of its seeds, since another may start there."""
    caplog.set_level(logging.INFO)
    node = Half()
    link, leaves = node.meet(), A_SENDS._replace(beat=2, leaving=True)

    def fails(now):
        node.gossip.swept([AT_A], [], now)
        assert node.links.take(now) is link
        node.links.failed(link, OSError("down"), now)

    if says_so_in == "a request":
        node.hear(Message(leaves, NOBODY, {}, None, None, []), 1.0)
    else:
        node.gossip.swept([AT_A], [], 1.0)
        assert node.links.take(1.0) is link
        node.gossip.answered(link, node.gossip.request(link, 1.0), answer({})._replace(sender=leaves), 1.0)
    fails(2.0)
    fails(3.0)
    node.meet(id=B, now=4.0)
    fails(5.0)
    lines = [record for record in caplog.records if record.name == "counter.replication"]
    assert [(record.levelname, record.getMessage()) for record in lines] == [
        ("INFO", f"no answer since it left: addr={AT_A} error=down"),
        ("INFO", f"recovered: addr={AT_A}"),
        ("WARNING", f"retrying: addr={AT_A} error=down"),
    ]


def test_only_what_failed_recovers(caplog):
    """An answer that takes nothing makes the node wait, but is no trouble that an operator should read of."""
    caplog.set_level(logging.INFO)
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    assert node.links.take(1.0) is link
    node.gossip.answered(link, node.gossip.request(link, 1.0), answer({}, confirms={}), 1.0)
    node.meet(now=10.0)
    assert not [record for record in caplog.records if record.name == "counter.replication"]


def test_a_seed_that_cannot_be_looked_up_is_a_line_and_so_is_its_return(caplog):
    caplog.set_level(logging.INFO)
    node = Half()
    for now, fails in enumerate((True, True, False, False)):
        node.gossip.swept([], ["seed:80"], float(now))
        link = node.links.take(float(now))
        if fails:
            node.links.failed(link, OSError("no such name"), float(now))
        else:
            node.links.released(link)
    lines = [record.getMessage() for record in caplog.records if record.name == "counter.replication"]
    assert lines == ["no answer yet: addr=seed:80 error=no such name", "recovered: addr=seed:80"]


def test_a_heartbeat_does_not_wait_for_the_backoff():
    node = Half()
    link = node.meet()
    node.gossip.swept([AT_A], [], 1.0)
    node.links.take(1.0)
    node.links.failed(link, OSError("down"), 1.0)
    node.gossip.swept([AT_A], [], 1.0)
    assert node.links.take(1.0) is link


def test_one_send_at_a_time_is_in_flight_to_a_peer():
    node = Half()
    link = node.meet()
    node.gossip.swept([AT_A], [], 1.0)
    assert node.links.take(1.0) is link
    node.gossip.swept([AT_A], [], 2.0)
    assert node.links.take(2.0) is None


def test_doubtful_sends_leave_workers_to_the_others():
    """To an address that has never answered, or did not answer last time, and any that takes long."""
    node = Half(doubtful_max=1)
    addresses = [f"10.0.1.{number}:80" for number in range(3)]
    for number, address in enumerate(addresses):
        node.meet(address, f"{number:08x}-0000-8000")
    node.gossip.swept(addresses[:1], [], 1.0)
    node.links.failed(node.links.take(1.0), OSError("down"), 1.0)
    node.gossip.swept([addresses[0], "10.0.2.1:80", addresses[1]], [], 2.0)
    working, doubtful = node.links.take(2.0), node.links.take(2.0)
    assert (working.address, doubtful.address) == (addresses[1], "10.0.2.1:80")
    assert node.links.take(2.0) is None
    node.links.failed(doubtful, OSError("no answer"), 2.0)
    assert node.links.take(3.5) is None  # the other send may well hang
    node.gossip.swept([addresses[2]], [], 4.0)
    assert node.links.take(4.0).address == addresses[2]
    node.links.failed(working, OSError("no answer"), 4.0)
    assert node.links.take(4.0).address in addresses[:2]


def test_the_dead_neither_keep_a_peer_that_failed_once_waiting_nor_wait_for_ever():
    node = Half(doubtful_max=2)
    dead = [f"10.0.1.{number}:80" for number in range(20)]
    node.meet()

    def fail(addresses, now):
        node.gossip.swept(addresses, [], now)
        while link := node.links.take(now):
            node.links.failed(link, OSError("no answer"), now)

    for now in range(10):
        fail(dead, float(now))
    fail([AT_A], 15.0)
    node.gossip.swept(dead, [], 20.0)
    node.gossip.swept([AT_A], [], 25.0)
    assert node.links.take(25.0).address == AT_A
    assert node.links.take(25.0).address in dead
    assert node.links.take(25.0) is None


def test_the_dead_are_tried_however_often_others_fail_once():
    node = Half(doubtful_max=1)
    for _ in range(10):
        node.gossip.swept(["10.0.1.1:80"], [], 0.0)
        node.links.failed(node.links.take(0.0), OSError("no answer"), 0.0)
    node.gossip.swept(["10.0.1.1:80"], [], 0.0)
    tried = []
    for now in range(20):
        node.gossip.swept([f"10.0.2.{now}:80"], [], float(now))
        link = node.links.take(float(now))
        tried.append(link.address)
        node.links.failed(link, OSError("no answer"), float(now))
    assert "10.0.1.1:80" in tried


def test_only_some_peers_are_told_of_an_increment_at_once():
    node = Half(push_fanout=2)
    for number in range(5):
        node.meet(f"10.0.1.{number}:80", f"{number:08x}-0000-8000")
    node.counter.increment("x")
    assert len({node.links.take(1.0).address for _ in range(2)}) == 2
    assert node.links.take(1.0) is None


def test_joining_with_full_catch_up_is_one_round_trip():
    old, new = Half(A, AT_A), Half(has_seeds=True)
    for number in range(100):
        old.counter.increment(f"counter-{number}")
    new.links.compare_soon([AT_A], 0.0)
    assert not new.joining.ready
    talk(new, old, new.links.take(0.0), 0.0)
    assert new.counter.vector() == old.counter.vector()
    assert new.joining.ready
    assert new.table.active() == [(A, AT_A)]
    assert old.table.active() == [(ME, AT_ME)]


def halves_of_a_join():
    """Return (one that holds many counters, one that joins)."""
    old, new = Half(A, AT_A), Half(has_seeds=True)
    old.counter.increment_many({f"counter-{number}": 1 for number in range(1500)})
    return old, new


def asks(half, other, now):
    """Have one half compare vectors with another; return (link, request, reply) of that, as it is under way."""
    while True:
        link = half.links.take(now)
        request = half.gossip.request(link, now)
        reply = other.gossip.receive(request, now)
        if reply.number is None and request.wants:
            return link, request, reply
        half.gossip.answered(link, request, reply, now)
        now += 0.1


def entries_in(*messages):
    return sum(len(delta.totals) for message in messages for delta in message.deltas)


def entries_sent(half, other, now, heartbeat_to=None):
    """Have one half send all that is due to another; return how many entries that were."""
    sent = 0
    if heartbeat_to:
        half.gossip.swept([heartbeat_to], [], now)
    while link := half.links.take(now):
        request = half.gossip.request(link, now)
        if request is None:
            half.links.released(link)
            continue
        reply = other.gossip.receive(request, now)
        half.gossip.answered(link, request, reply, now)
        sent += entries_in(request, reply)
    return sent


def test_what_is_on_its_way_in_a_long_answer_is_not_sent_again():
    old, new = halves_of_a_join()
    new.gossip.swept([AT_A], [], 0.0)
    link, request, reply = asks(new, old, 0.0)
    assert entries_in(reply) == 1500
    for now in range(1, 100):  # it takes long, and meanwhile the one counts and sends heartbeats
        old.counter.increment("later")
        old.gossip.progress(ME, float(now))
        assert entries_sent(old, new, float(now), AT_ME) == 0
    new.gossip.answered(link, request, reply, 100.0)
    soon = [entries_sent(*halves, 100 + step / 10) for step in (1, 2, 3) for halves in ((new, old), (old, new))]
    assert 1 <= sum(soon) <= 2  # without a heartbeat
    assert new.counter.vector() == old.counter.vector()
    assert new.joining.ready


def test_what_is_on_its_way_in_a_long_request_is_not_sent_again():
    old, new = halves_of_a_join()
    link = old.meet(AT_ME, ME)
    old.gossip.swept([AT_ME], [], 1.0)
    assert old.links.take(1.0) is link
    request = old.gossip.request(link, 1.0)
    assert entries_in(request) == 1500
    for now in range(2, 100):
        old.gossip.progress(ME, float(now))
        assert entries_sent(new, old, float(now), AT_A) == 0
    old.gossip.answered(link, request, new.gossip.receive(request, 100.0), 100.0)
    assert new.counter.vector() == old.counter.vector()
    assert entries_sent(old, new, 101.0, AT_ME) + entries_sent(new, old, 101.0, AT_A) == 0


def test_what_did_not_arrive_in_a_long_message_is_sent_again():
    """Who asks anew has not got it; to one that neither asks nor gets on it is sent after a while."""
    old, new = halves_of_a_join()
    for now in (0.0, 1.0):
        new.gossip.swept([AT_A], [], now)
        link, _, reply = asks(new, old, now)
        assert entries_in(reply) == 1500
        new.links.failed(link, OSError("reset"), now)
    assert entries_sent(old, new, 2.0, AT_ME) == 0
    assert entries_sent(old, new, 1000.0, AT_ME) == 1500
    assert new.counter.vector() == old.counter.vector()


def test_a_long_request_that_failed_is_sent_again():
    old, new = halves_of_a_join()
    link = old.meet(AT_ME, ME)
    old.gossip.swept([AT_ME], [], 1.0)
    assert entries_in(old.gossip.request(old.links.take(1.0), 1.0)) == 1500
    old.links.failed(link, OSError("reset"), 2.0)
    assert entries_sent(old, new, 3.0, AT_ME) + entries_sent(new, old, 3.0) == 1500
    assert new.counter.vector() == old.counter.vector()


def test_who_only_meets_itself_has_caught_up_with_nobody():
    node = Half(has_seeds=True)
    node.links.compare_soon(["localhost:80"], 0.0)
    talk(node, node, node.links.take(0.0), 0.0)
    assert not node.joining.ready
    assert node.links.take(1.0) is None


def test_catching_up_in_several_messages_goes_on_until_it_is_done():
    old, new = Half(A, AT_A), Half(has_seeds=True)
    for number in range(40):
        totals = {f"{'x' * 100}-{n}": (n, 1) for n in range(1, 501)}
        old.counter.merge(Delta(f"{number:08x}-1111-8111", 0, 500, totals), 0)
    new.links.compare_soon([AT_A], 0.0)
    rounds = 0
    while link := new.links.take(float(rounds)):
        assert not new.joining.ready or new.counter.vector() == old.counter.vector()
        talk(new, old, link, float(rounds))
        rounds += 1
    assert 1 < rounds < 10
    assert new.joining.ready
    assert new.counter.vector() == old.counter.vector()


def test_what_the_peer_lacks_follows_at_once():
    node, peer = Half(), Half(A, AT_A)
    node.counter.merge(Delta(B, 0, 2, {"x": (2, 9)}), 0)
    node.counter.increment("x")
    node.links.compare_soon([AT_A], 0.0)
    talk(node, peer, node.links.take(0.0), 0.0)
    assert peer.counter.value("x") == 0
    talk(node, peer, node.links.take(1.0), 1.0)
    assert peer.counter.value("x") == 10
    assert node.links.take(9.0) is None


def test_a_peer_that_takes_nothing_does_not_make_the_node_spin():
    """Without news the next heartbeat is soon enough, even for a peer that refuses what it lacks."""
    node = Half()
    node.counter.merge(Delta(B, 0, 2, {"x": (2, 9)}), 0)
    node.meet()
    sends = 0
    while link := node.links.take(float(sends)):
        node.gossip.answered(link, node.gossip.request(link, 0.0), answer({}), float(sends))
        sends += 1
        assert sends < 5
    node.gossip.swept([AT_A], [], 10.0)
    assert node.links.take(10.0)


def test_a_peer_that_answers_but_takes_nothing_is_asked_what_it_holds_and_then_left_until_its_heartbeat():
    node = Half()
    link, sends = node.meet(), []
    node.counter.increment("x")
    for now in (1.0, 1.1, 1.2, 50.0, 100.0, 100.1, 100.2):
        if now == 100.0:
            node.gossip.swept([AT_A], [], now)
        if node.links.take(now):
            request = node.gossip.request(link, now)
            sends.append((now, request.applied is not None))
            node.gossip.answered(link, request, answer({} if request.applied else None, confirms={}), now)
    assert sends == [(1.0, False), (1.1, True), (100.0, True)]
    node.hear(Message(A_SENDS._replace(beat=2), NOBODY, {}, None, None, []), 101.0)
    assert node.links.take(101.0) is link


def test_an_increment_that_arrives_as_its_predecessor_is_confirmed_is_not_forgotten(monkeypatch):
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.links.take(1.0)
    request = node.gossip.request(link, 1.0)
    vector = node.counter.vector

    def vector_and_an_increment():
        before = vector()
        node.counter.increment("x")
        return before

    monkeypatch.setattr(node.counter, "vector", vector_and_an_increment)
    node.gossip.answered(link, request, answer(confirms={ME: 1}), 1.0)
    assert node.links.take(2.0) is link


def test_a_peer_that_cannot_be_dialled_is_dialled_once_a_heartbeat_at_most():
    node = Half()
    link, tries = node.meet(), 0
    for step in range(100):
        now = 1 + step / 100
        message = Message(Sender(A, AT_A, step + 2, False), NOBODY, None, None, None, [])
        node.hear(message._replace(applied={}) if step % 50 == 0 else message, now)
        node.counter.increment("x")
        while node.links.take(now):
            tries += 1
            node.links.failed(link, OSError("down"), now)
    assert tries < 20


def test_a_heartbeat_answered_without_a_vector_is_no_answer():
    node = Half()
    link = node.meet()
    node.links.compare_soon([AT_A], 1.0)
    node.links.take(1.0)
    with pytest.raises(ValueError):
        node.gossip.answered(link, node.gossip.request(link, 1.0), answer(), 1.0)


def test_a_restarted_peer_is_owed_everything_again():
    node, first, second = Half(), Half(A, AT_A), Half(B, AT_A)
    node.counter.increment("x")
    node.links.compare_soon([AT_A], 0.0)
    for now in (0.0, 1.0):
        talk(node, first, node.links.take(now), now)
    assert first.counter.value("x") == 1
    node.counter.increment("x")
    now = 2.0
    while link := node.links.take(now):
        talk(node, second, link, now)
        now += 1
    assert second.counter.value("x") == 2
    assert node.table.active() == [(B, AT_A)]


def test_a_message_from_a_peer_ends_its_backoff():
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    node.links.take(1.0)
    for _ in range(20):
        node.links.failed(link, OSError("down"), 1.0)
    node.hear(Message(Sender(B, AT_A, 1, False), NOBODY, {}, None, None, []), 1.0)
    assert node.links.take(1.0) is link


def test_a_cloned_node_finds_a_new_id(caplog):
    node = Half()
    node.counter.increment("x")
    node.hear(Message(A_SENDS, NOBODY, {ME: 2}, None, None, []), 0.0)
    assert node.counter.replica != ME
    assert node.table.describe()[0].id == node.counter.replica
    assert "cloned" in caplog.text


def test_draining_ends_when_all_have_confirmed_all_and_know_of_the_leaving():
    node, peer = Half(), Half(A, AT_A)
    link = node.meet()
    node.counter.increment("x")
    drained = []
    thread = threading.Thread(target=lambda: drained.append(node.gossip.leaving.drain(time.monotonic, 20)))
    thread.start()
    while thread.is_alive():
        if taken := node.links.take(time.monotonic()):
            assert taken is link
            talk(node, peer, link, time.monotonic())
    assert drained == [(True, 0, {A})]
    assert peer.counter.value("x") == 1
    assert peer.table.active() == []


def test_a_node_that_takes_more_than_it_sent_for_its_own_is_cloned(caplog):
    """It learns so with the first push: what it counts until then, no peer will take."""
    node = Half()
    link = node.meet()
    node.counter.increment("x")
    assert node.links.take(1.0) is link
    node.gossip.answered(link, node.gossip.request(link, 1.0), answer(confirms={ME: 2}), 1.0)
    assert node.counter.replica != ME
    assert "cloned" in caplog.text


def test_a_node_under_whose_id_another_left_goes_on_under_it():
    """Others take its next beat for that of a live node; if both counted, the vectors show it."""
    node = Half()
    node.hear(Message(A_SENDS, View([], [(ME, 5)]), {}, None, None, []), 0.0)
    assert node.counter.replica == ME
    assert node.table.sender().beat == 6


def test_a_node_that_leaves_hears_that_it_leaves():
    """And so nothing new."""
    node = Half()
    node.table.leave()
    node.hear(Message(A_SENDS, View([], [(ME, 5)]), {}, None, None, []), 0.0)
    assert node.counter.replica == ME


def test_waiting_for_acks_ends_once_enough_peers_have_confirmed():
    node, reached = Half(), []
    links = [node.meet(AT_A, A), node.meet(AT_B, B)]
    node.counter.increment("x")
    waiting = threading.Thread(target=lambda: reached.append(node.gossip.wait_for_acks(ME, 1, 3, 30)))
    waiting.start()
    wait_until(lambda: node.confirmations._waiters.anybody)
    assert {node.links.take(1.0), node.links.take(1.0)} == set(links)
    for link in links:
        assert reached == []
        confirmed = answer({ME: 1}, link.peer, link.address, confirms={ME: 1})
        node.gossip.answered(link, node.gossip.request(link, 1.0), confirmed, 1.0)
    waiting.join(10)
    assert reached == [3]


def test_draining_hands_over_to_the_successor_of_a_peer():
    """Which it meets only while it drains."""
    node, successor = Half(), Half(B, AT_A)
    node.counter.increment("x")
    node.meet(applied={ME: 1})
    drained = []
    thread = threading.Thread(target=lambda: drained.append(node.gossip.leaving.drain(time.monotonic, 20)))
    thread.start()
    while thread.is_alive():
        if taken := node.links.take(time.monotonic()):
            talk(node, successor, taken, time.monotonic())
    assert drained == [(True, 0, {B})]
    assert successor.counter.value("x") == 1


def test_draining_tells_who_joins_meanwhile():
    """At once: in a large cluster its turn to get a heartbeat may come late."""
    node, peers = Half(), {AT_A: Half(A, AT_A), AT_B: Half(B, AT_B)}
    node.meet()
    drained = []
    thread = threading.Thread(target=lambda: drained.append(node.gossip.leaving.drain(time.monotonic, 20)))
    thread.start()
    wait_until(lambda: node.links.next_due(0.0) < NEVER)
    peers[AT_B].links.compare_soon([AT_ME], 0.0)
    talk(peers[AT_B], node, peers[AT_B].links.take(0.0), 0.0)
    while thread.is_alive():
        if taken := node.links.take(time.monotonic()):
            talk(node, peers[taken.address], taken, time.monotonic())
    assert drained == [(True, 0, {A, B})]
    assert peers[AT_A].table.active() == peers[AT_B].table.active() == []


def test_draining_gives_up_after_its_timeout():
    node = Half()
    node.meet()
    assert node.gossip.leaving.drain(time.monotonic, 0.01) == (False, 0, {A})


def calls(beat, applied):
    """Return the heartbeat of a peer that calls by itself."""
    return Message(A_SENDS._replace(beat=beat), NOBODY, applied, None, None, [])


def test_a_peer_that_calls_and_cannot_be_dialled_counts_for_acks():
    """Its requests show what it holds."""
    node = Half()
    node.counter.increment("x")
    node.hear(calls(1, {}), 0.0)
    assert node.gossip.wait_for_acks(ME, 1, 2, 0) == 1
    node.hear(calls(2, {ME: 1}), 1.0)
    assert node.gossip.wait_for_acks(ME, 1, 2, 0) == 2


def test_draining_hands_over_to_a_peer_that_calls_and_cannot_be_dialled():
    """It is told of the leaving only once it has shown that it lacks nothing: then it calls no more."""
    node = Half()
    node.hear(calls(1, {}), 0.0)
    node.counter.increment("x")
    drained = []
    thread = threading.Thread(target=lambda: drained.append(node.gossip.leaving.drain(time.monotonic, 20)))
    thread.start()
    node.links.failed(wait_until(lambda: node.links.take(time.monotonic())), OSError("no route"), time.monotonic())
    reply = node.hear(calls(2, {}), 1.0)
    assert ([delta.replica for delta in reply.deltas], reply.sender.leaving) == ([ME], False)
    reply = node.hear(calls(2, {})._replace(wants=False), 1.5)  # it joins, and is getting that from another
    assert (reply.deltas, reply.sender.leaving) == ([], False)
    assert node.hear(calls(3, {ME: 1}), 2.0).sender.leaving
    thread.join(10)
    assert drained == [(True, 0, {A})]


def lose(node, id):
    """Let a peer be silent until it is lost."""
    for now in range(1, 8):
        node.table.sweep(float(now))
    assert [(peer.id, peer.state) for peer in node.table.snapshot(7.0)] == [(id, "lost")]


def test_draining_hands_over_to_peers_that_are_lost_where_none_is_active():
    """One that was in a partition, say, may be back within the time."""
    node, peer = Half(), Half(A, AT_A)
    node.meet()
    lose(node, A)
    node.counter.increment("x")
    drained, now = [], 100.0
    thread = threading.Thread(target=lambda: drained.append(node.gossip.leaving.drain(time.monotonic, 20)))
    thread.start()
    link = wait_until(lambda: node.links.take(time.monotonic()))
    node.links.failed(link, OSError("no route"), time.monotonic())
    while thread.is_alive():
        if taken := node.links.take(time.monotonic()):
            talk(node, peer, taken, now)
    assert drained == [(True, 0, {A})]
    assert peer.counter.value("x") == 1


def test_draining_says_how_many_increments_nobody_is_known_to_hold():
    node = Half()
    node.meet(applied={B: 2})
    node.counter.merge(Delta(B, 0, 3, {"x": (3, 3)}), 0.0)
    node.counter.increment("x")
    lose(node, A)
    assert node.gossip.leaving.drain(time.monotonic, 0.01) == (False, 2, set())


def test_draining_alone_ends_at_once():
    node = Half()
    node.counter.increment("x")
    assert node.gossip.leaving.drain(time.monotonic, 60) == (True, 1, set())


# Messages are for one process, and once.


def test_a_peer_is_met_once_it_has_taken_a_message():
    """Who only said who it is has never heard of this node, nor would others hear of it from there."""
    node, peer = Half(), Half(A, AT_A)
    node.links.compare_soon([AT_A], 0.0)
    for met in ([], [(A, AT_A)]):
        link = node.links.take(0.0)
        request = node.gossip.request(link, 0.0)
        node.gossip.answered(link, request, peer.gossip.receive(request, 0.0), 0.0)
        assert node.table.active() == met
        assert [id for id, _ in peer.table.active()] == [ME] * len(met)


def test_a_first_contact_asks_who_is_there_and_tells_nothing():
    node, peer = Half(), Half(A, AT_A)
    node.counter.increment("x")
    node.links.compare_soon([AT_A], 0.0)
    link = node.links.take(0.0)
    question = node.gossip.request(link, 0.0)
    assert question == Message(node.table.sender(), NOBODY, None, None, None, [], number=question.number, clock=0.0)
    reply = peer.gossip.receive(question, 0.0)
    assert reply == Message(peer.table.sender(), NOBODY, None, None, None, [], number=0, clock=0.0)
    assert peer.table.snapshot(0.0) == []
    node.gossip.answered(link, question, reply, 0.0)
    assert node.links.take(0.0) is link
    request = node.gossip.request(link, 0.0)
    assert (request.to, request.applied) == (A, {ME: 1})
    assert request.number > question.number


@pytest.mark.parametrize("reply", [answer({}), introduction(id=B)], ids=["answer", "introduction"])
def test_whatever_goes_wrong_with_an_answer_the_link_is_freed_once(reply, monkeypatch):
    """Freed before the error, it would be freed again for it, with another thread's send under way over its session."""
    node = Half()
    link = node.meet()
    node.links.send_heartbeats([AT_A], [], 1.0)
    assert node.links.take(1.0) is link
    request = node.gossip.request(link, 1.0)

    def broken(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(node.gossip, "_membership_changed", broken)
        with pytest.raises(RuntimeError):
            node.gossip.answered(link, request, reply, 1.0)
    node.links.send_heartbeats([AT_A], [], 1.0)
    assert node.links.take(1.0) is None  # the thread that failed still has it
    node.links.failed(link, RuntimeError("no memory"), 1.0)
    node.links.send_heartbeats([AT_A], [], 1.0)
    assert node.links.take(1.0) is link


def test_who_is_known_from_others_is_not_asked():
    """In a large cluster most are contacted for the first time again and again."""
    node = Half()
    node.hear(Message(A_SENDS, View([(B, AT_B, 1)], []), {}, None, None, []))
    node.gossip.swept([AT_A, AT_B], [], 0.0)
    links = [node.links.take(0.0) for _ in range(2)]
    assert {link.address: node.gossip.request(link, 0.0).to for link in links} == {AT_A: A, AT_B: B}


def test_each_message_has_a_greater_number():
    node, numbers = Half(), []
    node.meet()
    for now in (1.0, 2.0, 3.0):
        node.gossip.swept([AT_A, AT_B], [], now)
        for _ in range(2):
            link = node.links.take(now)
            numbers.append(node.gossip.request(link, now).number)
            node.links.failed(link, OSError("down"), now)
    assert sorted(set(numbers)) == numbers


@pytest.mark.parametrize("change", [{"to": B}, {"to": None}, {"number": None}, {}])
def test_what_is_for_another_or_comes_again_changes_nothing(change):
    """It is answered with who this is, and nothing else."""
    node = Half()
    deltas = [Delta(A, 0, 1, {"x": (1, 1)})]
    message = Message(A_SENDS, View([(B, AT_B, 1)], [(C, 5)]), {A: 1, ME: 5}, None, {ME: 5}, deltas, to=ME, number=7)
    node.counter.increment("y")
    if not change:  # then it comes again
        node.gossip.receive(message._replace(view=NOBODY, applied={}, confirms=None, deltas=[]), 0.0)
    before = node.counter.vector(), node.table.snapshot(0.0), node.table.describe(), node.links.next_due(-1.0)
    reply = node.gossip.receive(message._replace(**change), 0.0, "10.9.9.9:80")
    assert reply == Message(node.table.sender(), NOBODY, None, None, None, [], number=0 if change else 7, clock=0.0)
    assert node.counter.replica == ME
    assert before == (
        node.counter.vector(), node.table.snapshot(0.0), node.table.describe(), node.links.next_due(-1.0)
    )  # fmt: skip


def test_a_peer_that_restarted_is_asked_again_at_once():
    node, successor = Half(), Half(B, AT_A)
    link = node.meet()
    node.counter.increment("x")
    assert node.links.take(1.0) is link
    talk(node, successor, link, 1.0)
    assert (link.peer, node.table.active()) == (B, [(B, AT_A)])
    while link := node.links.take(2.0):
        talk(node, successor, link, 2.0)
    assert successor.counter.value("x") == 1


def test_an_answer_that_says_the_number_is_old_raises_it():
    """Of two clones that talk to one peer the one that is behind catches up, and then they find out."""
    node, clone, peer = Half(), Half(), Half(A, AT_A)
    for half, contacts in ((node, 5), (clone, 1)):
        half.counter.increment("x")
        for now in range(contacts):
            half.gossip.swept([AT_A], [], float(now))
            while link := half.links.take(float(now)):
                talk(half, peer, link, float(now))
    node.counter.increment("x")
    for now in (10.0, 11.0, 12.0):
        for half in (node, clone):
            half.gossip.swept([AT_A], [], now)
            while link := half.links.take(now):
                talk(half, peer, link, now)
    assert node.counter.replica == ME != clone.counter.replica


def test_two_addresses_of_one_peer_do_not_disturb_each_other():
    """Their messages may overtake each other."""
    node, peer = Half(), Half(A, AT_A)
    for address in (AT_A, AT_B):
        node.meet(address, A)
    node.gossip.swept([AT_A, AT_B], [], 1.0)
    requests = [node.gossip.request(node.links.take(1.0), 1.0) for _ in range(2)]
    assert [peer.gossip.receive(request, 1.0).number for request in reversed(requests)] == [None, None]


def test_a_peer_that_takes_nothing_is_backed_off_from():
    """Though it answers: whatever is sent, it only says who it is."""
    node = Half()
    link, now, sends = node.meet(), 1.0, 0
    node.gossip.swept([AT_A], [], now)
    while now < 2.0 and node.links.take(now) is link:
        request, sends = node.gossip.request(link, now), sends + 1
        try:
            node.gossip.answered(link, request, introduction(number=request.number), now)
        except ValueError as error:
            node.links.failed(link, error, now)
            now = node.links.next_due(now)
    assert link.failures > 1
    assert sends < 20


def test_an_answer_says_what_was_not_taken_and_why():
    node = Half()
    deltas = [
        Delta(A, 0, 1, {"x": (1, 1)}),
        Delta(B, 3, 4, {"x": (4, 1)}),
        Delta(C, 0, 1, {"x": (1, -1)}, (), ((B, 1),)),
    ]
    message = Message(A_SENDS, NOBODY, None, None, None, deltas)
    assert node.hear(message, 0.0).refused == {B: GAP, C: NEEDS}
    assert node.hear(message._replace(deltas=deltas[:1]), 0.0).refused == {}


def test_a_key_accepted_while_an_answer_is_made_does_not_spoil_it():
    """The time of a message is read before its deltas are cut, and the key may be a little younger."""
    node = Half()
    node.counter.increment_once("k", "x", 1, now=100.001)
    message = Message(A_SENDS, NOBODY, {}, None, None, [])
    ((_, _, _, _, age_s),) = decode(encode(node.hear(message, 100.0))).deltas[0].keys
    assert age_s == 0


def late_uses(wait_s):
    """Return what a node counts that hears of a use of a key `wait_s` late, and of one by another replica then.

    The window is 3600 s; the node has heard of both peers before, without delay.
    """
    node, ahead_s = Half(), 5000.0  # the clock of A
    node.hear(Message(A_SENDS, NOBODY, {}, None, None, [], clock=ahead_s), 0.0)
    node.hear(Message(Sender(B, AT_B, 1, False), NOBODY, {}, None, None, [], clock=0.0), 0.0)
    for replica, clock, now in ((A, ahead_s, wait_s), (B, wait_s, wait_s)):
        key = (1, "0123456789abcdef" * 2, "x", 1, 0.0)
        sender = Sender(replica, AT_A if replica == A else AT_B, 2, False)
        node.hear(
            Message(sender, NOBODY, None, None, None, [Delta(replica, 0, 1, {"x": (1, 1)}, (key,))], clock=clock), now
        )
    return node.counter.value("x")


def test_the_time_that_a_message_waited_counts_for_the_ages_of_keys():
    """Uses of a key by two replicas, more than a window apart, are two requests, however late the first is heard of."""
    assert late_uses(3590.0) == 1
    assert late_uses(3610.0) == 2


def test_links_to_the_many_that_are_not_pushed_to_are_closed_when_idle():
    node = Half(push_fanout=2)
    addresses = [f"10.0.1.{number}:80" for number in range(6)]
    for number, address in enumerate(addresses):
        node.meet(address, f"{number:08x}-0000-8000")
    assert len(node.gossip.unconfirmed()) == 6
    node.gossip.swept([], [], 1.0 + LINK_IDLE_S)
    assert len(node.gossip.unconfirmed()) == 2


def test_unconfirmed_is_what_this_node_has_to_see_to():
    """What active nodes count they push themselves; once one is gone, this node owes it to the others."""
    node = Half()
    node.meet(AT_A, A)
    node.meet(AT_B, B)
    node.links.compare_soon(["10.0.0.9:80"], 0.0)  # which has never said what it holds
    node.counter.merge(Delta(A, 0, 2, {"x": (2, 2)}), 0.0)
    node.counter.increment("x")
    assert node.gossip.unconfirmed() == {A: 1, B: 1}
    for now in range(1, 8):
        node.table.heard(Sender(B, AT_B, now + 1, False), NOBODY, float(now))
        node.table.sweep(float(now))
    assert [id for id, _ in node.table.active()] == [B]
    assert node.gossip.unconfirmed() == {A: 1, B: 3}


def test_whom_to_push_to_changes_where_there_are_more():
    """All join through one seed; it is not to get every increment at once for ever."""
    node, told = Half(push_fanout=2), set()
    for number in range(6):
        node.meet(f"10.0.1.{number}:80", f"{number:08x}-0000-8000")
    for now in range(1, 30):
        node.gossip.swept([], [], float(now))
        node.counter.increment("x")
        links = [node.links.take(float(now)) for _ in range(2)]
        assert node.links.take(float(now)) is None
        for link in links:
            told.add(link.address)
            confirmed = answer(None, link.peer, link.address, confirms={ME: now})
            node.gossip.answered(link, node.gossip.request(link, float(now)), confirmed, float(now))
    assert len(told) == 6

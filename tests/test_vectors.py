"""Version vectors, alone and as two nodes compare them."""

import random
import tracemalloc
from array import array

import pytest
from halves import AT_A, AT_ME, ME, NOBODY, A, B, C, Half, talk

from counter import APPLIED, Counter, Delta, cancelling_replica, new_replica, vectors
from counter.vectors import CROWD, EARLIER, SETTLING_S, Changes, Summary, lacks
from counter.wire import Message, Sender, decode, encode


def a_vector(rng, entries):
    """Return a vector with these entries, as it may have come to be."""
    changes, held = Changes(), {}
    for replica in rng.sample(sorted(entries), len(entries)):
        changes.touch(replica)
        held[replica] = rng.randint(1, entries[replica])
        if rng.random() < 0.2:
            changes.grow_older(ME, lambda id: held.get(id, 0), rng.uniform(0, 9 * SETTLING_S))
    gone = new_replica(rng.getrandbits)
    for replica, sequence in [(gone, 5), *entries.items(), (gone, 0)]:
        if held.get(replica) != sequence:
            changes.touch(replica)
            held[replica] = sequence
    return changes.vector(ME, lambda id: held.get(id, 0))


@pytest.mark.parametrize("seed", range(100))
def test_a_vector_is_a_mapping_however_much_of_it_is_settled(seed):
    rng = random.Random(seed)
    replicas = [new_replica(rng.getrandbits) for _ in range(12)]
    one, other = ({replica: rng.choice((1, 2, 2**62 - 1)) for replica in rng.sample(replicas, 8)} for _ in range(2))
    vector, same, different = a_vector(rng, one), a_vector(rng, one), a_vector(rng, other)
    assert vector == one == same == vector == dict(vector)
    assert (len(vector), set(vector)) == (len(one), set(one))
    assert (vector == different) == (one == other) == (vector == other)
    keys = one.keys() | other.keys()
    assert vector.differing(different) == {id for id in keys if one.get(id) != other.get(id)}
    ahead = {(id, one[id], other.get(id, 0)) for id in one if one[id] > other.get(id, 0)}
    assert set(vector.beyond(different)) == set(vector.beyond(other)) == ahead
    assert lacks(different, vector) == lacks(other, one) == bool(ahead)
    assert vector.updated({replicas[0]: 7, replicas[1]: 0}) == {
        id: sequence for id, sequence in {**one, replicas[0]: 7, replicas[1]: 0}.items() if sequence
    }


@pytest.mark.parametrize("seed", range(100))
def test_a_summary_tells_the_whole_vector_where_the_rest_is_the_same(seed):
    """However the two came to be, and whichever entries are listed; where the rest is not, it tells nothing."""
    rng = random.Random(seed)
    entries = {new_replica(rng.getrandbits): rng.randint(1, 5) for _ in range(12)}
    changed = {replica: rng.randint(0, 5) for replica in rng.sample(sorted(entries), rng.randrange(4))}
    changed |= {new_replica(rng.getrandbits): 1 for _ in range(rng.randrange(2))}
    before, after = a_vector(rng, entries), a_vector(rng, {id: s for id, s in (entries | changed).items() if s})
    listed = before.differing(after)
    assert before.completed(after.summary(listed)) == after
    assert after.completed(before.summary(listed)) == before
    assert before.completed(after.listing()) == after
    assert before.completed(after.digest()) == (None if listed else after)
    assert after.digest() == a_vector(rng, dict(after)).digest() == Summary(after.digest().rest, {})
    for summary in (after.summary(), after.summary(rng.sample(sorted(entries), 3))):
        found = before.completed(summary)
        assert found == after or (found is None and not listed <= summary.recent.keys() and summary.rest)


def test_only_what_has_been_quiet_for_a_while_is_settled():
    """What counts here never is; what changes again is recent again."""
    changes, held = Changes(), {ME: 1, A: 1, B: 1}

    def recent():
        return changes.vector(ME, held.get).summary().recent

    for replica in (A, B):
        changes.touch(replica)
    for now in (0, SETTLING_S):
        changes.grow_older(ME, held.get, now)
        changes.touch(A)
        assert recent() == ({ME: 1, A: 1, B: 1} if now == 0 else {ME: 1, A: 1})
    assert changes.vector(ME, held.get) == held
    changes.touch(B)
    held[B] = 2
    assert recent() == {ME: 1, A: 1, B: 2}
    assert changes.vector(ME, held.get) == held


def test_a_crowd_settles_soon():
    """Else a node that has just joined would list everything for a minute or two."""
    changes, held = Changes(), {f"{number:08x}-1111-8111": 1 for number in range(CROWD + 1)}
    changes.grow_older(ME, held.get, 0.0)
    for replica in held:
        changes.touch(replica)
    for now in (1.0, 2.0):
        assert len(changes.vector(ME, lambda id: held.get(id, 0)).summary().recent) == CROWD + 1
        changes.grow_older(ME, held.get, now)
    changes.touch(A)
    held[A] = 1
    changes.grow_older(ME, held.get, 3.0)
    assert changes.vector(ME, lambda id: held.get(id, 0)).summary().recent == {A: 1}


def test_what_has_changed_before_does_not_settle_with_a_crowd():
    """It is the entry of an active node: at another node it may settle with another crowd, and so in another state."""
    changes, held = Changes(), {ME: 1, A: 0}

    def recent(now):
        changes.grow_older(ME, lambda id: held.get(id, 0), now)
        return changes.vector(ME, lambda id: held.get(id, 0)).summary().recent

    for now in range(4):
        crowd = [f"{number:08x}-{now:04x}-8111" for number in range(CROWD + 1)]
        held.update(dict.fromkeys(crowd, 1), **{A: now + 1})
        for replica in (A, *crowd):
            changes.touch(replica)
        recent(float(now))
    assert recent(4.0) == recent(SETTLING_S - 1) == {ME: 1, A: 4}
    recent(SETTLING_S + 1)
    assert recent(2 * SETTLING_S + 2) == {ME: 1}


def test_a_vector_keeps_what_could_not_be_settled_for_want_of_memory(monkeypatch):
    changes, held = Changes(), {ME: 1, A: 1}
    changes.touch(A)
    changes.grow_older(ME, held.get, 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(vectors._Settled, "updated", full)
        with pytest.raises(MemoryError):
            changes.grow_older(ME, held.get, SETTLING_S)
    assert changes.vector(ME, held.get) == held
    assert changes.grow_older(ME, held.get, SETTLING_S)
    assert changes.vector(ME, held.get) == held


def test_an_entry_that_cannot_be_touched_for_want_of_memory_stays():
    changes, held = Changes(), {ME: 1, A: 1}
    changes.touch(A)
    changes._changed.young = FullSet()
    with pytest.raises(MemoryError):
        changes.touch(A)
    assert changes.vector(ME, held.get) == held


def full(*_):
    raise MemoryError


class FullSet(set):
    """A set for which there is no more memory."""

    add = full


def test_a_peer_that_lags_behind_is_understood():
    """It lacks what has settled here since, and lists what it heard of itself: that is all it has to say."""
    changes, held = Changes(), {ME: 1}

    def turn(now, *replicas):
        for replica in replicas:
            changes.touch(replica)
            held[replica] = 1
        changes.grow_older(ME, lambda id: held.get(id, 0), now)
        return changes.vector(ME, lambda id: held.get(id, 0))

    for number in range(EARLIER):
        turn(number * SETTLING_S, f"{number:08x}-1111-8111")
    late = EARLIER * SETTLING_S
    lagging = turn(late).updated({A: 5})
    for number in range(EARLIER):
        here = turn(late + (number + 1) * SETTLING_S, f"{number:08x}-2222-8222")
        assert here.completed(lagging.summary()) == lagging
        assert len(here.differing(lagging)) == number + 2


def test_settled_entries_are_small():
    """16 bytes each, and shared by all vectors that are made."""
    counter = with_a_past(Half(), 2000).counter
    columns = [column for run in counter.vector()._settled._runs for column in run]
    assert {type(column) for column in columns} == {array}
    assert sum(column.itemsize * len(column) for column in columns) == 16 * 2000
    counter.increment("x")
    assert counter.vector()._settled is counter.vector().updated({A: 1})._settled


def most_memory(function):
    """Return how many bytes a function needs at most beside what there was; and its result."""
    tracemalloc.start()
    try:
        result = function()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def two_states_of_a_long_past(number=20_000, more=100):
    """Return a vector with many settled entries, and a later one with a few more of them."""
    rng, changes, held = random.Random(1), Changes(), {ME: 1}
    found = []
    for new in number, more:
        added = [new_replica(rng.getrandbits) for _ in range(new)]
        for replica in added:
            changes.touch(replica)
            held[replica] = 1
        changes.settle(ME, lambda id: held.get(id, 0))
        found.append(changes.vector(ME, lambda id: held.get(id, 0)))
    return *found, added


def test_comparing_with_what_had_settled_before_looks_up_what_has_changed_only(monkeypatch):
    """However the runs were merged meanwhile."""
    changes, held, found, looked_up = Changes(), {ME: 1}, [], []
    for number in range(EARLIER):
        for replica in (f"{number:08x}-{other:04x}-8111" for other in range(500 if not number else 100)):
            changes.touch(replica)
            held[replica] = 1
        changes.settle(ME, lambda id: held.get(id, 0))
        found.append(changes.vector(ME, lambda id: held.get(id, 0)))
    monkeypatch.setattr(vectors._Settled, "_find", lambda _, bits: looked_up.append(bits) or 0)
    for number, earlier in enumerate(found[:-1]):
        looked_up.clear()
        earlier.differing(found[-1])
        assert len(looked_up) == 2 * 100 * (EARLIER - 1 - number)


def test_comparing_settled_parts_costs_what_has_changed():
    before, after, added = two_states_of_a_long_past()
    for one, other in (before, after), (after, before):
        needed, differing = most_memory(lambda one=one, other=other: one.differing(other))
        assert differing == set(added)
        assert needed < 100_000


def test_a_vector_that_was_listed_whole_is_compared_like_another():
    """Once it was understood: that costs what there is, and each comparison what differs."""
    before, after, added = two_states_of_a_long_past()
    shown = before.completed(after.listing())
    assert shown == dict(after)
    needed, missing = most_memory(lambda: shown.beyond(before))
    assert {replica for replica, _, _ in missing} == set(added)
    assert needed < 100_000
    shown = after.completed(before.listing())
    assert shown == dict(before)
    assert shown.differing(after) == set(added)


@pytest.mark.parametrize("seed", range(20))
def test_settled_entries_are_replaced_and_go(seed):
    """However many are settled at a time, in whichever order; entries that are gone take no memory in the end."""
    rng, changes, held = random.Random(seed), Changes(), {}
    replicas = [new_replica(rng.getrandbits) for _ in range(60)]
    settled = changes._settled
    for _ in range(40):
        entries = {replica: rng.randint(0, 3) for replica in rng.sample(replicas, rng.choice((1, 2, 7, 30)))}
        before, settled = settled, settled.updated(entries)
        changed = {replica for replica, sequence in entries.items() if sequence != held.get(replica, 0)}
        assert before.differing(settled) == settled.differing(before) == changed
        held = {replica: sequence for replica, sequence in (held | entries).items() if sequence}
        assert sorted(settled) == sorted(held)
        assert len(settled) == len(held)
        assert all(settled.get(replica) == held.get(replica, 0) for replica in replicas)
        assert settled.hash == vectors.NOTHING.updated(held).hash
    assert len(settled.updated(dict.fromkeys(replicas, 0))._runs[0].bits) == 0


# Two nodes that compare theirs.

PAST = [f"{number:08x}-1111-8111" for number in range(10_000)]


def with_a_past(node, replicas, at=0.0):
    """Have a node hold what so many dead replicas counted, and as many cancellations, all of it settled; return it."""
    for replica in PAST[: replicas // 2 - 2]:
        assert node.counter.merge(Delta(replica, 0, 1, {"x": (1, 1)}), at) == APPLIED
    number = replicas - replicas // 2
    for replica in (B, C) if number else ():
        node.counter.merge(Delta(replica, 0, number, {"x": (number, number)}), at)
    for sequence in range(1, number + 1):
        dots = (B, sequence), (C, sequence)
        assert node.counter.merge(Delta(cancelling_replica(dots[1]), 0, 1, {"x": (1, -1)}, (), dots), at) == APPLIED
    node.counter.expire(at)
    node.counter.expire(at + SETTLING_S)
    return node


def heartbeats(one, other, now, rounds=1, counting=()):
    """Have both nodes send each other heartbeats, and these count; return the bytes of all messages, in order."""
    sizes, at = [], {one: AT_ME, other: AT_A}
    for _ in range(rounds):
        for sender, receiver in ((one, other), (other, one)):
            now += 1.0
            sender.gossip.swept([at[receiver]], [], now)
            while link := sender.links.take(now):
                sizes += talk(sender, receiver, link, now)
                now += 0.01
                assert len(sizes) < 1000, "they do not come to an end"
        for node in counting:
            node.counter.increment("x")
    return sizes


def two_nodes(replicas):
    return with_a_past(Half(ME, AT_ME), replicas), with_a_past(Half(A, AT_A), replicas)


@pytest.mark.parametrize("counting", [False, True])
def test_heartbeats_do_not_grow_with_the_past(counting):
    """Of 20,000 dead replicas and cancellations that two nodes agree on they say nothing, in no message."""
    sizes = []
    for replicas in (0, 20_000):
        one, other = two_nodes(replicas)
        for node in (one, other):
            node.counter.increment("x")
        heartbeats(one, other, 100.0, 2)
        sizes.append(heartbeats(one, other, 200.0, 10, (one, other) if counting else ()))
        heartbeats(one, other, 300.0)
        assert one.counter.vector() == other.counter.vector()
    assert sizes[0] == sizes[1]
    assert max(sizes[1]) < 1000


def test_heartbeats_of_nodes_that_hold_the_same_list_nothing():
    """However many replicas have counted lately."""
    one, other = Half(ME, AT_ME), Half(A, AT_A)
    for node in (one, other):
        for replica in PAST[:100]:
            node.counter.merge(Delta(replica, 0, 1, {"x": (1, 1)}), 100.0)
    heartbeats(one, other, 100.0, 2)
    assert len(one.counter.vector().summary().recent) == 100
    assert max(heartbeats(one, other, 110.0, 2)) < 1000
    one.counter.increment("x")
    assert max(heartbeats(one, other, 120.0)) > 23 * 100
    assert one.counter.vector() == other.counter.vector()
    assert max(heartbeats(one, other, 130.0, 2)) < 1000


def test_a_heartbeat_hashes_what_changed_lately_alone(monkeypatch):
    one, other = two_nodes(2000)
    one.counter.increment("x")
    heartbeats(one, other, 100.0, 2)
    hashed, hash = [], vectors._hash
    monkeypatch.setattr(vectors, "_hash", lambda *entry: hashed.append(entry) or hash(*entry))
    sizes = heartbeats(one, other, 200.0, 10, [one])
    assert 0 < len(hashed) < 20 * len(sizes)


@pytest.mark.parametrize("replicas", [2, 40, 2000])
def test_nodes_whose_settled_parts_differ_exchange_them_and_agree_again(replicas):
    """Each has something that the other lacks, of long ago."""
    one, other = two_nodes(2000)
    for number in range(replicas):
        node = (one, other)[number % 2]
        node.counter.merge(Delta(f"{number:08x}-2222-8222", 0, 3, {"y": (3, 5)}), 0)
    for node in (one, other):
        node.counter.was_loaded(100.0)
    assert one.counter.vector() != other.counter.vector()
    sizes = heartbeats(one, other, 100.0)
    assert one.counter.vector() == other.counter.vector()
    assert one.counter.value("y") == other.counter.value("y") == 5 * replicas
    assert max(sizes) > 23 * 2000
    heartbeats(one, other, 110.0, 2)
    assert max(heartbeats(one, other, 120.0, 5)) < 1000 + 23 * min(replicas, CROWD)
    heartbeats(one, other, 200.0)
    assert max(heartbeats(one, other, 300.0, 5)) < 1000


def test_a_joiner_is_told_everything_once():
    old, new = with_a_past(Half(A, AT_A), 2000), Half(ME, AT_ME, has_seeds=True)
    sizes = heartbeats(new, old, 100.0)
    assert new.joining.ready
    assert new.counter.vector() == old.counter.vector()
    assert max(sizes) > 23 * 2000
    for now in (103.0, 104.0):
        new.counter.expire(now)
    assert max(heartbeats(new, old, 105.0, 3)) < 1000


def test_a_node_that_is_a_little_behind_is_told_without_its_vector():
    """What the peer has just heard of, and this node has not, costs one more message, and no settled entry."""
    one, other = two_nodes(2000)
    heartbeats(one, other, 100.0, 2)
    other.counter.merge(Delta(PAST[0], 1, 2, {"x": (2, 7)}), 150.0)
    other.counter.merge(Delta("eeeeeeee-eeee-8eee", 0, 2, {"x": (2, 7)}), 150.0)
    now = 150.0
    one.gossip.swept([AT_A], [], now)
    sizes = []
    while link := one.links.take(now):
        sizes.append(talk(one, other, link, now))
        now += 0.1
    assert len(sizes) == 2
    assert max(map(max, sizes)) < 1000
    assert one.counter.vector() == other.counter.vector()


def test_a_node_of_version_1_is_shown_whole_vectors():
    """It would take the entries of a summary for all there are."""
    node = with_a_past(Half(), 100)
    old = Sender(A, AT_A, 1, False, v=1)
    for applied in ({}, {A: 1}):
        reply = decode(encode(node.hear(Message(old, NOBODY, applied, None, None, []), 100.0)))
        assert (reply.applied, reply.summary) == (node.counter.vector(), None)
        assert len(reply.deltas) == 100
    assert node.gossip.unconfirmed() == {A: 48 + 2 * 50 + 50}
    reply = node.hear(Message(old, NOBODY, None, None, None, [], hash="0" * 32), 100.0)
    assert (reply.applied, reply.summary, reply.deltas) == (node.counter.vector(), None, [])
    node.links.compare_soon([AT_A], 101.0)
    link = node.links.take(101.0)
    request = node.gossip.request(link, 101.0)
    assert (request.applied, request.summary) == (node.counter.vector(), None)
    same = Message(old, NOBODY, None, None, None, [], hash="0" * 32)  # it holds what the request showed
    node.gossip.answered(link, request, same, 101.0)
    assert node.gossip.unconfirmed() == {A: 0}


def test_a_summary_that_fits_no_vector_is_no_answer():
    """A peer knows the whole vector of who listed it, so its answer can be completed."""
    node = Half()
    node.table.heard(Sender(A, AT_A, 1, False), NOBODY, 0.0)
    node.links.compare_soon([AT_A], 0.0)
    link = node.links.take(0.0)
    request = node.gossip.request(link, 0.0)
    assert request.summary == Summary(0, {})
    with pytest.raises(ValueError):
        node.gossip.answered(
            link, request, Message(Sender(A, AT_A, 2, False), NOBODY, None, Summary(5, {}), None, []), 1
        )


def test_a_node_that_leaves_says_so_once_its_peer_lacks_nothing():
    """What it cannot tell from a summary, it takes for lacking."""
    one, other = two_nodes(100)
    one.counter.merge(Delta(PAST[5000], 0, 1, {"x": (1, 1)}), 0)
    one.counter.was_loaded(100.0)
    heartbeats(one, other, 100.0)
    one.counter.merge(Delta(PAST[5001], 0, 1, {"x": (1, 1)}), 0)
    one.counter.was_loaded(200.0)
    one.table.leave()
    for node in (one, other):
        assert node.table.active()
    other.gossip.swept([AT_ME], [], 201.0)
    talk(other, one, other.links.take(201.0), 201.0)
    assert other.table.active()
    now = 202.0
    while link := other.links.take(now):
        talk(other, one, link, now)
        now += 1.0
    assert other.counter.vector() == one.counter.vector()


def test_a_clone_is_found_out_though_its_vector_is_settled():
    """A peer that holds more of a node than that has counted says so, whatever it lists."""
    one, other = two_nodes(100)
    other.counter.merge(Delta(ME, 0, 9, {"x": (9, 9)}), 0.0)
    other.counter.was_loaded(100.0)
    one.counter.increment("x")
    heartbeats(one, other, 100.0)
    assert one.counter.replica != ME
    heartbeats(one, other, 200.0)
    assert one.counter.vector() == other.counter.vector()
    assert one.counter.value("x") == other.counter.value("x")


def test_a_renewed_node_shows_what_it_did_before():
    counter = Counter(A)
    assert counter.vector() == {}
    counter.increment("x")
    assert counter.renew(A)
    assert counter.vector() == {A: 1}
    assert counter.vector().summary() == Summary(0, {A: 1})
    counter.increment("x")
    assert counter.vector() == {A: 1, counter.replica: 1}

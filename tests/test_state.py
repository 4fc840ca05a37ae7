"""The replicated state by itself: ids, deltas, merging, waiting, races."""

import random
import threading
import time
import uuid

import pytest
from conftest import wait_until

from counter import (
    AMOUNT_MAX,
    APPLIED,
    GAP,
    HELD,
    NAME,
    NEEDS,
    REPLICA,
    SEQUENCE_MAX,
    Counter,
    Delta,
    KeyReused,
    TooManyCounters,
    TooManyKeys,
    cancelling_replica,
    increment_id,
    key_digest,
    new_replica,
    parse_increment_id,
)
from counter.keys import KeyRecords
from counter.streams import Totals

A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "abc")


class Interruptible(dict):
    """A dictionary in whose look-ups another thread may take over, as the interpreter does between
    bytecodes that call Python functions; in those of a built-in one it hardly ever does."""

    def get(self, key, default=None):
        value = super().get(key, default)
        time.sleep(0)
        return value

    def __getitem__(self, key):
        value = super().__getitem__(key)
        time.sleep(0)
        return value


def interruptible(counter):
    """Return the counter, with state in which races show."""
    counter._applied = counter._histories.applied = Interruptible(counter._applied)
    counter._counters.numbers = Interruptible()
    return counter


def copy(counter, replica=C):
    """Return a new Counter that holds the same."""
    other = Counter(replica)
    for delta in counter.deltas({}, 10**9, 0):
        assert other.merge(delta, 0) == APPLIED
    return other


def test_replica_ids_are_random_and_well_formed():
    ids = {new_replica() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(REPLICA.match(id) for id in ids)


@pytest.mark.parametrize("sequence", [1, 2, 0xFFFF, 2**48 - 1, 2**48, SEQUENCE_MAX])
def test_an_increment_id_is_a_uuid8_and_gives_its_dot_back(sequence):
    id = increment_id(A, sequence)
    assert uuid.UUID(id).variant == uuid.RFC_4122
    assert uuid.UUID(id).version == 8
    assert parse_increment_id(id) == parse_increment_id(id.upper()) == (A, sequence)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        str(uuid.UUID(int=0)),
        "aaaaaaaa-aaaa-4aaa-8000-000000000001",  # version 4
        "aaaaaaaa-aaaa-8aaa-c000-000000000001",  # another variant
        "aaaaaaaa-aaaa-8aaa-0000-000000000001",
        "aaaaaaaa-aaaa-8aaa-8000-000000000000",  # no sequence is 0
        "aaaaaaaaaaaa8aaa8000000000000001",
        "{aaaaaaaa-aaaa-8aaa-8000-000000000001}",
        "aaaaaaaa-aaaa-8aaa-8000-000000000001\n",
    ],
)
def test_anything_else_is_no_increment_id(text):
    with pytest.raises(ValueError, match="not the id of an increment"):
        parse_increment_id(text)


@pytest.mark.parametrize("name", ["a", "default", "A-z_0.9:x", "...", "a" * 128])
def test_good_names(name):
    assert NAME.match(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a b", "a/b", "ä", "a\n", "a" * 129])
def test_bad_names(name):
    assert not NAME.match(name)


def test_increments_are_numbered_and_summed():
    counter = Counter(A)
    assert counter.increment("x") == (A, 1, 1)
    assert counter.increment("x", -5) == (A, 2, -4)
    assert counter.increment("y", AMOUNT_MAX) == (A, 3, AMOUNT_MAX)
    assert [counter.value(name) for name in "xyz"] == [-4, AMOUNT_MAX, 0]
    assert counter.vector() == {A: 3}
    assert counter.holds(A, 3)
    assert not counter.holds(A, 4)
    assert not counter.holds(B, 1)


def test_a_new_replica_is_in_no_vector_before_it_counts():
    counter = Counter(A)
    assert counter.vector() == {}
    assert counter.deltas({}, 10**6, 0) == []
    assert counter.delta(A, 0, 0) is None


def test_many_increments_of_one_counter_are_one_entry():
    counter = Counter(A)
    for _ in range(10_000):
        counter.increment("x")
    assert counter.delta(A, 0, 0) == Delta(A, 0, 10_000, {"x": (10_000, 10_000)})


def test_a_delta_has_what_changed_since_and_nothing_else():
    counter = Counter(A)
    for name in "abcab":
        counter.increment(name)
    assert counter.delta(A, 3, 0) == Delta(A, 3, 5, {"a": (4, 2), "b": (5, 2)})
    assert counter.delta(A, 5, 0) is None
    assert counter.deltas({A: 5}, 10**6, 0) == []


def test_deltas_of_several_replicas_fill_a_message_but_none_is_split():
    counter = Counter(A)
    for number in range(100):
        counter.increment(f"counter-{number}")
    counter.merge(Delta(B, 0, 1, {"x": (1, 1)}), 0)
    (first,) = counter.deltas({}, 1, 0)
    assert len(first.totals) == 100
    assert len(counter.deltas({}, 10**6, 0)) == 2


def test_merging_a_delta_again_changes_nothing():
    counter, delta = Counter(A), Delta(B, 0, 3, {"x": (2, 7), "y": (3, -1)})
    assert counter.merge(delta, 0) == APPLIED
    assert counter.merge(delta, 0) == HELD
    assert (counter.value("x"), counter.value("y"), counter.vector()) == (7, -1, {B: 3})


def test_an_old_delta_is_ignored():
    counter = Counter(A)
    counter.merge(Delta(B, 0, 3, {"x": (3, 7)}), 0)
    assert counter.merge(Delta(B, 0, 2, {"x": (2, 4)}), 0) == HELD
    assert counter.value("x") == 7


def test_a_delta_behind_a_gap_is_refused_whole():
    counter = Counter(A)
    assert counter.merge(Delta(B, 1, 3, {"x": (2, 7), "y": (3, -1)}), 0) == GAP
    assert (counter.vector(), counter.value("x"), counter.value("y")) == ({}, 0, 0)


def test_a_delta_that_overlaps_what_is_held_adds_only_the_rest():
    counter = Counter(A)
    counter.merge(Delta(B, 0, 2, {"x": (1, 1), "y": (2, 10)}), 0)
    assert counter.merge(Delta(B, 0, 4, {"y": (2, 10), "x": (3, 2), "z": (4, 5)}), 0) == APPLIED
    assert [counter.value(name) for name in "xyz"] == [2, 10, 5]


def test_entries_stay_in_order_when_a_delta_lists_them_in_another():
    """Cutting stops at the first old entry, so one out of its place would be lost for ever."""
    counter = Counter(A)
    counter.merge(Delta(B, 0, 4, {"d": (4, 1), "a": (1, 1), "c": (3, 1), "b": (2, 1)}), 0)
    assert counter.delta(B, 2, 0).totals == {"c": (3, 1), "d": (4, 1)}
    assert copy(counter).delta(B, 1, 0).totals == {"b": (2, 1), "c": (3, 1), "d": (4, 1)}


def test_nothing_is_taken_over_of_the_own_replica():
    counter = Counter(A)
    counter.increment("x")
    assert counter.merge(Delta(A, 0, 9, {"x": (9, 9)}), 0) == HELD
    assert counter.value("x") == 1


def test_any_node_passes_on_what_a_dead_one_counted():
    first = Counter(A)
    first.increment("x", 3)
    assert copy(copy(first, B), C).value("x") == 3


def test_a_vector_that_was_handed_out_does_not_change():
    counter = Counter(A)
    counter.increment("x")
    before = counter.vector()
    counter.increment("x")
    assert (before, counter.vector()) == ({A: 1}, {A: 2})


def test_a_cloned_machine_goes_on_under_a_new_id():
    """Whoever sees more of its own replica than it counted shares its id, and gives it up."""
    counter = Counter(A)
    counter.increment("x", 2)
    assert not counter.renew_if_cloned({A: 1, B: 99})
    assert counter.renew_if_cloned({A: 2})
    assert counter.replica != A
    assert counter.increment("x") == (counter.replica, 1, 3)
    assert not counter.renew_if_cloned({A: 2})
    assert counter.merge(Delta(A, 1, 3, {"x": (3, 5)}), 0) == APPLIED
    assert counter.value("x") == 6


def test_a_key_counts_once_at_a_node():
    counter = Counter(A)
    assert counter.increment_once("k", "x", 5, now=0) == (A, 1, 5, False)
    counter.increment("x")
    assert counter.increment_once("k", "x", 5, now=1) == (A, 1, 6, True)
    assert counter.vector() == {A: 2}


@pytest.mark.parametrize(("name", "amount"), [("y", 5), ("x", 6)])
def test_a_key_with_another_payload_is_refused(name, amount):
    counter = Counter(A)
    counter.increment_once("k", "x", 5, now=0)
    with pytest.raises(KeyReused):
        counter.increment_once("k", name, amount, now=0)
    assert (counter.vector(), counter.value("x"), counter.value("y")) == ({A: 1}, 5, 0)


def test_a_key_is_remembered_for_its_window():
    counter = Counter(A, key_window_s=60)
    counter.increment_once("k", "x", 1, now=0)
    assert counter.increment_once("k", "x", 1, now=60)[3]
    assert not counter.increment_once("k", "x", 1, now=61)[3]
    counter.expire(200)
    assert counter.delta(A, 0, 200) == Delta(A, 0, 2, {"x": (2, 2)})


def test_a_key_keeps_its_age_on_its_way():
    first, second, third = Counter(A, key_window_s=60), Counter(B, key_window_s=60), Counter(C, key_window_s=60)
    first.increment_once("k", "x", 1, now=0)
    second.merge(first.delta(A, 0, now=40), now=1040)
    third.merge(second.delta(A, 0, now=1050), now=5)
    assert third.increment_once("k", "x", 1, now=14)[3]
    assert not third.increment_once("k", "x", 1, now=16)[3]


def test_at_the_cap_a_new_key_is_refused_until_one_expires():
    counter = Counter(A, keys_max=2, key_window_s=60)
    counter.increment_once("k1", "x", 1, now=0)
    counter.increment_once("k2", "x", 1, now=10)
    with pytest.raises(TooManyKeys) as refused:
        counter.increment_once("k3", "x", 1, now=20)
    assert refused.value.args == (40,)
    assert counter.increment_once("k1", "x", 1, now=20)[3]
    assert counter.increment_once("k3", "x", 1, now=61) == (A, 3, 3, False)


def test_at_the_cap_no_new_counter_is_created_but_those_of_peers_are_merged():
    counter = Counter(A, counters_max=2)
    counter.increment("x")
    counter.increment("y")
    with pytest.raises(TooManyCounters):
        counter.increment("z")
    with pytest.raises(TooManyCounters):
        counter.increment_once("k", "z", 1, now=0)
    assert counter.increment("x")[2] == 2
    counter.merge(Delta(B, 0, 1, {"z": (1, 1)}), 0)
    assert counter.increment("z")[2] == 2
    assert not counter.increment_once("k", "z", 1, now=0)[3]


def test_a_key_taken_by_two_nodes_counts_once_when_they_meet():
    first, second = Counter(A), Counter(B)
    first.increment_once("k", "x", 5, now=0)
    second.increment_once("k", "x", 5, now=0)
    first.merge(second.delta(B, 0, 0), 0)
    second.merge(first.delta(A, 0, 0), 0)
    assert first.value("x") == second.value("x") == 5
    assert first.vector() == second.vector() == {A: 1, B: 1, cancelling_replica((B, 1)): 1}
    assert second.increment_once("k", "x", 5, now=0) == (A, 1, 5, True)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_key_used_anew_after_its_window_counts_anew_everywhere(order):
    """Also where the first use has not been forgotten yet, and in whatever order both arrive."""
    first, second, third = Counter(A, key_window_s=60), Counter(B, key_window_s=60), Counter(C, key_window_s=60)
    first.increment_once("k", "x", 1, now=0)
    assert not second.increment_once("k", "x", 1, now=60.5)[3]
    deltas = {1: first.delta(A, 0, 60), 2: second.delta(B, 0, 60.5)}
    for number in order:
        third.merge(deltas[number], now=60 if number == 1 else 60.5)
    assert third.value("x") == 2
    assert third.vector() == {A: 1, B: 1}
    assert third.increment_once("k", "x", 1, now=61)[:2] == (B, 1)


def sync(sender, receiver, now):
    for delta in sender.deltas(receiver.vector(), 10**6, now):
        receiver.merge(delta, now)


def test_a_cancelled_use_of_a_key_is_not_held_against_a_use_after_the_window():
    """Not by a node that joins later, either, and hears of the cancelled use but of the first no more."""
    first, second, joiner = Counter(A, key_window_s=60), Counter(B, key_window_s=60), Counter(C, key_window_s=60)
    first.increment_once("k", "x", 1, now=0)
    second.increment_once("k", "x", 1, now=50)
    sync(first, second, 51)
    assert not second.increment_once("k", "x", 1, now=61)[3]
    sync(second, joiner, 65)
    sync(joiner, second, 66)
    assert second.value("x") == joiner.value("x") == 2


def test_a_cancelled_use_of_a_key_cancels_none_itself():
    """Though it is within the window of a use that the first one is not."""
    first, second, third = Counter(A, key_window_s=60), Counter(B, key_window_s=60), Counter(C, key_window_s=60)
    first.increment_once("k", "x", 1, now=0)
    sync(first, third, 1)
    second.increment_once("k", "x", 1, now=36)
    sync(first, second, 39)
    sync(second, first, 39)
    assert not third.increment_once("k", "x", 1, now=72)[3]
    for sender, receiver in ((first, third), (third, first), (third, second), (second, third)) * 2:
        sync(sender, receiver, 79)
    assert [counter.value("x") for counter in (first, second, third)] == [2, 2, 2]


def test_keys_used_anew_are_not_cancelled_by_a_node_that_was_paused():
    """Such a node hears of the first uses late, so that they seem to be younger than they are."""
    first, paused = Counter(A, key_window_s=3), Counter(B, key_window_s=3)
    for number in range(5):
        first.increment_once(f"k{number}", "x", 1, now=0)
    early = first.delta(A, 0, now=0)
    for number in range(5):
        assert not first.increment_once(f"k{number}", "x", 1, now=3.3)[3]
    paused.merge(early, now=4)
    paused.merge(first.delta(A, 5, now=3.3), now=4)
    assert (paused.value("x"), paused.vector()) == (10, {A: 10})


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_key_that_another_node_used_anew_is_not_cancelled_either(order):
    """It knew of the first use, and that its time had passed, and said so."""
    first, second, paused = Counter(A, key_window_s=3), Counter(B, key_window_s=3), Counter(C, key_window_s=3)
    first.increment_once("k", "x", 1, now=0)
    early = first.delta(A, 0, now=0)
    sync(first, second, 0.1)
    assert not second.increment_once("k", "x", 1, now=3.3)[3]
    late = second.delta(B, 0, now=3.3)
    assert late.keys == ((1, key_digest("k"), "x", 1, 0.0, ((A, 1),)),)
    for number in order:
        paused.merge((early, late)[number], now=4)
    assert (paused.value("x"), paused.vector()) == (2, {A: 1, B: 1})


def test_a_key_used_anew_is_not_taken_for_a_repetition_of_a_use_that_is_not_known_here():
    """The third node knows a repetition and the renewal; only the first use tells them apart."""
    first, second, third, fourth = (Counter(new_replica(), key_window_s=60) for _ in range(4))
    first.increment_once("k", "x", 1, now=0)
    sync(first, second, 1)
    third.increment_once("k", "x", 1, now=40)
    assert not second.increment_once("k", "x", 1, now=61)[3]
    for sender in (second, third):
        fourth.merge(sender.delta(sender.replica, 0, now=62), now=62)
    sync(first, fourth, 62)
    assert fourth.value("x") == 2


def test_many_counters_and_keys_travel_as_columns():
    """They are copied while the counter goes on, and read while it does."""
    first, second = Counter(A), Counter(B)
    for number in range(5000):
        first.increment_once(f"k{number}", f"n{number}", 2**53 - 1, now=number / 1000)
    first.increment("n0", 2**63)
    (delta,) = first.deltas({}, 10**9, now=5)
    first.increment_once("later", "later", 1, now=5)
    first.increment("n1")
    assert (len(delta.totals), len(delta.keys), delta.through) == (5000, 5000, 5001)
    assert next(iter(delta.keys)) == (1, key_digest("k0"), "n0", 2**53 - 1, 5.0)
    read = delta._replace(totals=Totals(), keys=KeyRecords())
    read.totals.extend(delta.totals.items())
    read.keys.extend(delta.keys)
    assert second.merge(read, now=5) == APPLIED
    assert second.value("n0") == 2**63 + 2**53 - 1
    assert second.value("n1") == 2**53 - 1
    assert second.increment_once("k4999", "n4999", 2**53 - 1, now=6) == (A, 5000, 2**53 - 1, True)
    assert second.merge(first.delta(A, 5001, now=6), now=6) == APPLIED
    assert second.deltas({}, 10**9, 6)[0].totals == first.deltas({}, 10**9, 6)[0].totals


def test_keys_from_a_file_are_kept_for_a_whole_window():
    """Two nodes that were down for a day took one key; each has its use from its own file."""
    first, second = Counter(A, key_window_s=60), Counter(B, key_window_s=60)
    for counter, replica, age_s in ((first, C, 86400.0), (second, "dddddddd-dddd-8ddd", 86390.0)):
        counter.merge(Delta(replica, 0, 1, {"x": (1, 1)}, ((1, key_digest("k"), "x", 1, age_s),)), now=100)
        counter.was_loaded(now=100)
        counter.expire(now=160)
        assert counter.sizes()[1] == 1
    sync(first, second, 160)
    assert second.value("x") == 1
    second.expire(now=160.1)
    assert second.sizes()[1] == 0


def test_an_event_is_set_at_the_next_change_once():
    counter, event = Counter(A), threading.Event()
    counter.wake_on_change(counter.vector(), event)
    counter.wake_on_change(counter.vector(), event)
    assert not event.is_set()
    counter.increment("x")
    assert event.is_set()
    event.clear()
    counter.increment("x")
    assert not event.is_set()
    counter.wake_on_change(counter.vector(), event)
    counter.merge(Delta(B, 0, 1, {"x": (1, 1)}), now=0)
    assert event.is_set()


def test_an_event_is_set_at_once_where_something_changed_already():
    counter, event = Counter(A), threading.Event()
    vector = counter.vector()
    counter.increment("x")
    counter.wake_on_change(vector, event)
    assert event.is_set()


def test_a_cancellation_waits_for_both_dots_it_speaks_of():
    """Otherwise it could outlive them: their nodes may die before anybody else has heard of them."""
    first, second, third = Counter(A), Counter(B), Counter(C)
    first.increment_once("k", "x", 5, now=0)
    second.increment_once("k", "x", 5, now=0)
    first.merge(second.delta(B, 0, 0), 0)
    by_a, by_b, cancelling = first.deltas({}, 10**6, 0)
    assert cancelling.requires == ((A, 1), (B, 1))
    assert third.merge(cancelling, 0) == NEEDS
    third.merge(by_b, 0)
    assert third.merge(cancelling, 0) == NEEDS
    assert third.value("x") == 5
    third.merge(by_a._replace(keys=()), 0)
    assert third.merge(cancelling, 0) == APPLIED
    assert third.value("x") == 5


def test_cancellations_come_after_all_other_deltas():
    first, second = Counter(A), Counter(B)
    first.increment_once("k", "x", 5, now=0)
    second.increment_once("k", "x", 5, now=0)
    sync(first, second, 0)
    second.merge(Delta(C, 0, 1, {"x": (1, 1)}), 0)  # held later than the cancellation, which may need it
    assert [bool(delta.requires) for delta in second.deltas({}, 10**6, 0)] == [False, False, False, True]
    assert [bool(delta.requires) for delta in second.deltas({}, 1, 0)] == [False]


def test_of_many_dots_of_one_key_the_smallest_stays():
    counter, digest = Counter(C), key_digest("k")
    for replica, amount in ((B, 7), (A, 3), (new_replica(), 9)):
        counter.merge(Delta(replica, 0, 1, {"x": (1, amount)}, ((1, digest, "x", amount, 0),)), 0)
    smallest = min(replica for replica in counter.vector() if counter.delta(replica, 0, 0).keys)
    assert counter.value("x") == counter.delta(smallest, 0, 0).totals["x"][1]


def test_a_delta_carries_the_keys_accepted_in_its_range():
    counter = Counter(A)
    for number in range(5):
        counter.increment_once(f"k{number}", "x", 1, now=number)
    keys = counter.delta(A, 3, now=10).keys
    assert keys == ((4, key_digest("k3"), "x", 1, 7), (5, key_digest("k4"), "x", 1, 6))


def test_waiting_ends_when_the_increment_arrives():
    counter, held = Counter(A), []

    def wait(sequence):
        held.append(counter.wait_until_held(B, sequence, 20))

    threads = [threading.Thread(target=wait, args=(sequence,)) for sequence in (1, 2, 2)]
    for thread in threads:
        thread.start()
    counter.merge(Delta(B, 0, 2, {"x": (2, 2)}), 0)
    for thread in threads:
        thread.join(20)
    assert held == [True] * 3
    assert counter.wait_until_held(B, 2, 0)


def test_waiting_ends_with_its_timeout_or_when_told_to_stop():
    counter = Counter(A)
    assert not counter.wait_until_held(B, 1, 0)
    thread = threading.Thread(target=counter.wait_until_held, args=(B, 1, 60))
    thread.start()

    def ended():
        counter.stop_waiting()
        return not thread.is_alive()

    wait_until(ended)


def test_threads_that_increment_at_once_lose_nothing(tiny_switch_interval):
    counter, results = interruptible(Counter(A)), [[] for _ in range(8)]

    def work(mine, name):
        for _ in range(500):
            mine.append(counter.increment(name))

    threads = [threading.Thread(target=work, args=(results[n], "xy"[n % 2])) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sequence for mine in results for _, sequence, _ in mine) == list(range(1, 4001))
    assert counter.delta(A, 0, 0).totals.keys() == {"x", "y"}
    assert (counter.value("x"), counter.value("y"), counter.vector()) == (2000, 2000, {A: 4000})


def test_threads_that_merge_and_increment_at_once_agree(tiny_switch_interval):
    """Three counters exchange deltas from many threads while they count; all end up exact."""
    counters = [interruptible(Counter(replica)) for replica in (A, B, C)]
    errors = []

    def count(counter):
        for number in range(300):
            counter.increment("xyz"[number % 3], 1 + number % 2)

    def exchange(seed):
        rng = random.Random(seed)
        try:
            for _ in range(300):
                sender, receiver = rng.sample(counters, 2)
                for delta in sender.deltas(receiver.vector(), rng.choice((1, 10**6)), 0):
                    assert delta.through == max(sequence for sequence, _ in delta.totals.values())
                    receiver.merge(delta, 0)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=count, args=(counter,)) for counter in counters * 2]
    threads += [threading.Thread(target=exchange, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sender in counters * 2:
        for receiver in counters:
            for delta in sender.deltas(receiver.vector(), 10**6, 0):
                receiver.merge(delta, 0)
    assert not errors
    assert all(counter.vector() == {A: 600, B: 600, C: 600} for counter in counters)
    assert all([counter.value(name) for name in "xyz"] == [900, 900, 900] for counter in counters)


# Listing.


def test_pages_cover_all_counters_once():
    """Whatever their size, in the order of names, while new counters keep appearing behind."""
    counter, rng = Counter(A), random.Random(5)
    names = {f"{rng.choice(('x', 'y', 'z'))}{rng.randrange(10**6)}" for _ in range(500)}
    for name in names:
        counter.increment(name)
    for size in (1, 7, 499, 500, 501):
        listed, start = [], ""
        while start is not None:
            values, start = counter.list("", start, size)
            assert 1 <= len(values) <= size
            listed += values
        assert listed == sorted(names)
    counter.increment("y")
    assert counter.list("y", "", 1) == ({"y": 1}, min(name for name in names if name > "y"))
    assert counter.list("y", "z", 10) == ({}, None)
    assert counter.list("", "zz", 10) == ({}, None)
    assert counter.sizes() == (501, 0)


def test_names_are_listed_while_counters_appear(tiny_switch_interval):
    """Threads that list while others count new names miss none that was there before."""
    counter, errors = Counter(A), []

    def count():
        for number in range(2000):
            counter.increment(f"{number % 7}-{number}")

    def check():
        known = 0
        while known < 2000:
            sizes = counter.sizes()[0]
            values, following = counter.list("", "", 5000)
            if following or len(values) < max(known, sizes) or list(values) != sorted(values):
                errors.append(len(values))
                return
            known = len(values)

    threads = [threading.Thread(target=work) for work in (count, check, check)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("spread", [0, 3, 10**6])
def test_the_largest_counters_come_first(spread):
    """As a sort of all of them would have it: equal ones by name, also below zero, with any prefix and limit."""
    counter, rng = Counter(A), random.Random(spread)
    assert counter.largest("", 10) == {}
    for number in rng.sample(range(1000), 500):
        counter.increment(f"{number % 3}-{number}", rng.randint(1, 1 + spread) * rng.choice((1, -1)))
    everything, _ = counter.list("", "", 1000)
    for prefix in ("", "1", "1-9", "none"):
        ranked = sorted((-value, name) for name, value in everything.items() if name.startswith(prefix))
        for limit in (1, 10, 499, 500, 1000):
            largest = counter.largest(prefix, limit)
            assert [(-value, name) for name, value in largest.items()] == ranked[:limit]


def test_the_largest_are_found_while_counters_appear(tiny_switch_interval):
    """A counter that was there before, and is the largest, always comes first."""
    counter = Counter(A)
    counter.increment("first", 10**6)
    thread = threading.Thread(target=lambda: [counter.increment(f"n{number}") for number in range(2000)])
    thread.start()
    while thread.is_alive():
        assert next(iter(counter.largest("", 5).items())) == ("first", 10**6)
    thread.join()

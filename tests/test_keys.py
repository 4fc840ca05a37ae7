"""Idempotency keys: which are remembered for how long, and which uses of one are the same request."""

import random

import pytest
from key_schedules import BREAKS, Schedule

from counter.keys import FORGOTTEN_AT_ONCE, KeyRecords, KeyTable, TooManyKeys, Use

A, B, C, D = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "abcd")


def use(replica, sequence, digest=1, at=0.0, renews=(), counter=0, amount=1):
    return Use(replica, sequence, digest, counter, amount, at, renews)


def table_of(*uses, window_s=60, keys_max=100):
    table = KeyTable(keys_max, window_s)
    for one in uses:
        table.add(one)
    return table


def settled(*uses, holds=lambda *_: True):
    """Return the dots that are cancelled, given uses of a key."""
    return sorted((cancelled.replica, cancelled.sequence) for _, cancelled in table_of(*uses).settle(1, holds))


def test_uses_of_a_key_are_remembered_with_all_they_say():
    uses = [use(A, 3, 7, 1.5, counter=2**31, amount=-(2**53)), use(B, 2**62, 7, 9.0, ((A, 3), (C, 5)))]
    table = table_of(*uses, use(A, 4, 2**128 - 1))
    assert sorted(table.uses(7)) == uses
    assert table.uses(2**128 - 1) == [use(A, 4, 2**128 - 1)]
    assert table.uses(8) == []
    assert len(table) == 2


def test_a_use_answers_for_a_window_and_is_renewed_for_another():
    table = table_of(use(A, 1))
    assert table.known(1, 60) == (use(A, 1), ((A, 1),))
    assert table.known(1, 60.1) == (None, ((A, 1),))
    table.forget(120)
    assert table.known(1, 120) == (None, ((A, 1),))
    table.forget(120.1)
    assert table.known(1, 120.1) == (None, ())
    assert (len(table), table.number(A, 0)) == (0, 0)


def test_uses_by_two_replicas_within_a_window_are_one_request():
    assert settled(use(A, 1), use(B, 1, at=60)) == [(B, 1)]
    assert settled(use(B, 1), use(A, 1, at=60)) == [(B, 1)]
    assert settled(use(A, 1), use(B, 1, at=60.1)) == []
    assert settled(use(C, 1), use(B, 1, at=9), use(A, 1, at=5)) == [(B, 1), (C, 1)]


def test_uses_by_one_replica_are_never_one_request():
    assert settled(use(A, 1), use(A, 6, at=1)) == []
    assert settled(use(A, 1), use(A, 6, at=1), use(B, 1, at=0.5)) == [(B, 1)]


def test_a_use_is_not_the_request_that_it_renews():
    """Nor one before, whatever their times seem to be: they may have been under way for long."""
    assert settled(use(A, 1, at=50), use(B, 1, at=61, renews=((A, 1),))) == []
    assert settled(use(B, 1, at=61, renews=((A, 1),)), use(A, 1, at=62)) == []
    assert settled(use(A, 1), use(C, 1, at=50), use(B, 1, at=61, renews=((C, 1),))) == [(C, 1)]


def test_a_request_has_the_time_of_its_first_use():
    """The second use was a repetition, and the third came after the window of the first."""
    first, second, third = use(B, 1), use(A, 1, at=36), use(C, 1, at=72)
    assert settled(first, second, third) == [(B, 1)]
    table = table_of(first, second)
    table.settle(1, lambda *_: True)
    assert [one.at for one in table.uses(1)] == [0, 0]
    assert table.known(1, 60.1)[0] is None


def test_nothing_is_settled_before_it_is_known_what_was_renewed():
    """A repetition of a use that is not known here yet may look like one of its renewal."""
    uses = use(C, 1, at=61, renews=((A, 1),)), use(B, 1, at=36)
    assert settled(*uses, holds=lambda *dot: dot != (A, 1)) == []
    assert settled(*uses, use(A, 1)) == [(B, 1)]


def test_at_the_cap_what_is_only_there_to_be_renewed_makes_room():
    table = table_of(use(A, 1, 1, 0), use(B, 1, 2, 10), keys_max=2)
    with pytest.raises(TooManyKeys) as refused:
        table.make_room(20)
    assert refused.value.args == (40,)
    table.make_room(60.1)
    assert (len(table), table.uses(1), table.number(B, 0)) == (1, [], 1)
    table.make_room(60.1)


def test_all_is_kept_for_a_window_after_it_was_loaded():
    table = table_of(use(A, 1, 1, -1e6), keys_max=1)
    table.keep(0)
    table.forget(60)
    assert table.known(1, 60)[0] == use(A, 1, 1, -1e6)
    with pytest.raises(TooManyKeys) as refused:
        table.make_room(20)
    assert refused.value.args == (40,)
    assert table.known(1, 60.1)[0] is None
    table.forget(60.1)
    assert len(table) == 0


def test_many_uses_are_forgotten_in_several_steps():
    table = table_of(*(use(A, 1 + number, number, number / 1000) for number in range(3 * FORGOTTEN_AT_ONCE)))
    steps = 1
    while table.forget(122):
        steps += 1
    assert steps == 2
    assert len(table) == table.number(A, 0) == 3 * FORGOTTEN_AT_ONCE - 2000


def test_a_use_that_is_dropped_leaves_the_others_of_its_key():
    table = table_of(use(A, 1), use(B, 4), use(B, 5, 2))
    table.drop_after(B, 3)
    assert (table.uses(1), table.uses(2), len(table), table.number(B, 0)) == ([use(A, 1)], [], 1, 0)
    table.add(use(B, 4))
    table.drop_after(A, 0)
    assert table.uses(1) == [use(B, 4)]


@pytest.mark.parametrize("seed", range(10))
def test_a_table_remembers_what_a_list_would(seed):
    rng, table, listed, sequences, now = random.Random(seed), KeyTable(10**6, 10), [], {}, 0.0
    for _ in range(2000):
        now += rng.expovariate(4)
        replica = rng.choice((A, B, C, D))
        sequences[replica] = sequences.get(replica, 0) + rng.randrange(1, 4)
        renews = tuple((one.replica, one.sequence) for one in listed[:1]) if rng.random() < 0.1 else ()
        listed.append(use(replica, sequences[replica], rng.randrange(30), now, renews, rng.randrange(9)))
        table.add(listed[-1])
        if rng.random() < 0.1:
            last = listed.pop()
            table.drop_after(last.replica, last.sequence - 1)
        table.forget(now)
        listed = [one for one in listed if one.at >= now - 20]
        digest, after = rng.randrange(30), rng.randrange(sequences[replica])
        through = rng.randrange(after, sequences[replica] + 1)
        assert sorted(table.uses(digest)) == sorted(one for one in listed if one.digest == digest)
        assert len(table) == len({one.digest for one in listed})
        mine = [one for one in listed if one.replica == replica and one.sequence > after]
        assert table.number(replica, after) == len(mine)
        copied = [Use(replica, *row) for row in table.copy(replica, after, through, 5)]
        assert copied == [one for one in mine if one.sequence <= through][:5]


def test_records_are_read_piece_by_piece():
    digest = "0123456789abcdef" * 2
    pieces = [[(1, digest, "x", 5, 0.5)], [(3, digest[::-1], "y", -5, 0, ((A, 1), (B, 2))), (4, "0" * 32, "x", 1, 1e9)]]
    records = KeyRecords()
    for piece in pieces:
        records.extend(piece)
    assert list(records) == list(records) == [*pieces[0], *pieces[1]]
    assert len(records) == 3
    with pytest.raises(ValueError, match="out of order"):
        records.extend([(4, digest, "x", 1, 0)])


@pytest.mark.parametrize("first", range(0, 12, 4))
def test_each_request_counts_once_whatever_waits_and_expires(first):
    schedules = [Schedule(seed) for seed in range(first, first + 4)]
    assert [schedule.run() for schedule in schedules] == [None] * 4
    assert min(schedule.number["a"] for schedule in schedules) > 5
    for seen in ("repeated", "taken_twice", "used_at_once", "refused"):
        assert sum(getattr(schedule, seen) for schedule in schedules) > 10, seen


@pytest.mark.parametrize("rule", BREAKS)
def test_each_broken_rule_is_found(rule):
    with BREAKS[rule]():
        assert any(Schedule(seed).run() for seed in range(30))

"""Windowed counters in the replicated state: exact while they live, gone afterwards, whatever clocks do."""

import random
from functools import partial

import pytest
from test_state import A, B, C, copy

from counter import (
    APPLIED,
    HELD,
    Counter,
    Delta,
    KeyReused,
    TooManyCounters,
    WindowEnded,
    cancelling_replica,
    histories,
    key_digest,
    new_replica,
)
from counter.windows import end_of

D = "dddddddd-dddd-8ddd"
HOUR = 3600
T = 1_765_843_200.0  # 2025-12-16T00:00:00Z, where a day begins


class Clock:
    """A wall clock that tests set."""

    def __init__(self, time=T):
        self.time = time

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def counter(clock):
    return Counter(A, wall=clock)


def window(name, ago=0, clock_time=T):
    """Return the name, among nodes, of a window of an hour that keeps 60."""
    return f"{name}@1h:60/{int(clock_time) // HOUR - ago}"


def names(counter):
    """Return the names of all entries that a counter holds."""
    return {name for delta in counter.deltas({}, 10**9, 0) for name, _ in delta.totals.items()}


def test_an_increment_counts_in_the_window_of_the_clock(counter, clock):
    assert [counter.increment("v@1h")[2] for _ in range(3)] == [1, 2, 3]
    clock.time += HOUR
    assert counter.value("v@1h") == 0
    assert counter.increment("v@1h", 5)[2] == 5
    assert counter.value("v@1h") == counter.value("v@60m") == counter.value("v@1h:60") == 5
    assert counter.windows("v@1h", 4) == [(T - 2 * HOUR, 0), (T - HOUR, 0), (T, 3), (T + HOUR, 5)]
    assert (counter.value("v"), counter.value("v@1d"), counter.value("v@1h:61")) == (0, 0, 0)
    assert counter.list("", "", 9) == ({"v@1h": 5}, None)
    assert (counter.sizes(), counter.held_windows) == ((1, 0), 2)


def test_a_batch_counts_in_one_window_and_is_answered_as_it_was_asked(counter):
    assert counter.increment_many({"v@60m": 2, "x": 1, "w@1d:400": 3}) == (A, 3, {"v@60m": 2, "x": 1, "w@1d:400": 3})
    batch = {"w@1d:400": 3, "v@1h": 2}
    assert counter.increment_many_once("k", batch, 0) == (A, 5, {"w@1d:400": 6, "v@1h": 4}, False)
    assert counter.increment_many_once("k", {"v@60m": 2, "w@1d:400": 3}, 0) == (A, 5, {"v@60m": 4, "w@1d:400": 6}, True)
    assert counter.list("", "", 9)[0] == {"v@1h": 4, "w@1d:400": 6, "x": 1}


def test_an_ended_window_leaves_nothing(counter, clock):
    counter.increment("x")
    counter.increment("v@1h")
    clock.time += HOUR
    counter.increment("v@1h")
    counter.end_windows(T + 61 * HOUR - 1)
    assert names(counter) == {"x", window("v"), window("v", -1)}
    counter.end_windows(T + 61 * HOUR)
    assert names(counter) == {"x", window("v", -1)}
    counter.end_windows(T + 62 * HOUR)
    assert names(counter) == {"x"}
    assert (counter.sizes(), counter.held_windows, counter.vector()) == ((1, 0), 0, {A: 3})
    assert counter.list("", "", 9) == ({"x": 1}, None)


def test_slots_come_back_and_count_series(clock):
    counter = Counter(A, counters_max=3, wall=clock)
    for _ in range(50):
        counter.increment_many({"v@1h:1": 1, "w@1h:1": 1, "x": 1})
        with pytest.raises(TooManyCounters):
            counter.increment("y@1h")
        with pytest.raises(TooManyCounters):
            counter.increment_many({"x": 1, "y@1h": 1})
        clock.time += HOUR
        counter.end_windows(clock.time - 60)
    assert counter.value("x") == 50
    assert len(counter._counters.names) <= 7  # their numbers are given out again
    counter.end_windows(clock.time + 3 * HOUR)
    clock.time += 3 * HOUR
    assert counter.sizes() == (1, 0)
    counter.increment_many({"y@1h": 1, "z": 1})


def test_a_number_given_out_again_brings_nothing_of_the_old_window(counter, clock):
    """In no history, list or delta: also not in one that was cut before, and is read after."""
    other = Counter(B, wall=clock)
    for number in range(3000):
        other.increment(f"v{number}@1h", 7)
    counter.merge(other.delta(B, 0, 0), 0)
    counter.increment_many({f"v{number}@1h": 1 for number in range(500)})
    cut = counter.delta(B, 0, 0)
    before = dict(cut.totals.items())
    cut = counter.delta(B, 0, 0)
    clock.time += 100 * HOUR
    counter.end_windows(clock.time)
    counter.increment_many({f"n{number}": 2 for number in range(900)})
    counter.merge(Delta(C, 0, 2000, {f"m{number}": (number + 1, 3) for number in range(2000)}), 0)
    assert dict(cut.totals.items()) == before
    assert counter.list("", "", 10**6)[0] == {f"n{n}": 2 for n in range(900)} | {f"m{n}": 3 for n in range(2000)}
    assert all(counter.delta(B, after, 0).totals == {} for after in (0, 1, 1500, 2999))
    assert dict(counter.delta(A, 0, 0).totals.items()) == {f"n{n}": (501 + n, 2) for n in range(900)}
    assert copy(counter, D).list("", "", 10**6) == counter.list("", "", 10**6)


def test_where_many_end_at_once_all_have_ended_though_some_are_still_held(counter, clock):
    """A window that is gone already must not begin anew, from 0, while others of its end wait to be dropped."""
    for number in range(150):
        counter.increment(f"v{number}@1h")
    counter.end_windows(T + 61 * HOUR, most=60)
    assert 0 < counter.held_windows < 150
    for number in range(150):
        delta = Delta(B, number, number + 1, {window(f"v{number}"): (number + 1, 7)})
        assert counter.merge(delta, 0) == APPLIED
        held = window(f"v{number}") in counter._counters.numbers
        try:
            assert counter.increment(f"v{number}@1h")[2] > 7
            assert held
        except WindowEnded:
            assert not held
    counter.end_windows(T + 61 * HOUR)
    assert (names(counter), counter.held_windows) == (set(), 0)


def test_a_window_that_has_ended_is_not_taken(counter):
    counter.end_windows(T)
    old, live = window("v", 61), window("v", 60)
    delta = Delta(B, 0, 3, {old: (1, 5), live: (2, 1), "x": (3, 1)}, ((1, key_digest("k"), old, 5, 0.0),))
    assert counter.merge(delta, 0) == APPLIED
    assert names(counter) == {live, "x"}
    assert counter.vector() == {B: 3}
    assert counter.merge(Delta(B, 3, 4, {old: (4, 9)}), 0) == APPLIED
    assert counter.merge(Delta(B, 3, 4, {}), 0) == HELD
    assert names(counter) == {live, "x"}
    assert counter.merge(Delta(C, 0, 2, {}), 0) == APPLIED  # all of it has ended where it was cut
    assert counter.vector() == {B: 4, C: 2}
    assert counter.delta(C, 0, 0) == Delta(C, 0, 2, {})


def test_a_history_of_which_all_had_ended_goes_on(counter):
    """A replica whose first window is not taken is held all the same, without an entry."""
    counter.end_windows(T)
    assert counter.merge(Delta(C, 0, 1, {window("v", 61): (1, 5)}), 0) == APPLIED
    assert counter.merge(Delta(C, 1, 2, {"x": (2, 3)}), 0) == APPLIED
    assert counter.value("x") == 3
    assert counter.delta(C, 0, 0).totals == {"x": (2, 3)}


def test_counting_under_a_clock_that_was_set_back_by_more_than_is_kept_is_refused(counter, clock):
    """Nobody would ever see it, and the totals that others hold would be overwritten by smaller ones."""
    counter.increment("v@1h")
    counter.increment("x")
    counter.end_windows(T + 61 * HOUR)
    for count in (
        lambda: counter.increment("v@1h"),
        lambda: counter.increment_once("k", "v@1h", 1, 0),
        lambda: counter.increment_many({"x": 1, "v@1h": 1}),
        lambda: counter.increment_many_once("k", {"x": 1, "v@1h": 1}, 0),
    ):
        with pytest.raises(WindowEnded):
            count()
    assert (counter.vector(), counter.value("x"), counter.sizes()) == ({A: 2}, 1, (1, 0))
    clock.time += HOUR
    assert counter.increment("v@1h")[:2] == (A, 3)


def test_a_key_is_for_the_series(counter, clock):
    """So a repetition after the window has passed, or has even ended, counts nothing."""
    first = counter.increment_once("k", "v@1h", 2, 0)
    assert first == (A, 1, 2, False)
    clock.time += HOUR
    assert counter.increment_once("k", "v@60m", 2, 1) == (A, 1, 0, True)
    with pytest.raises(KeyReused):
        counter.increment_once("k", "v@1d", 2, 1)
    with pytest.raises(KeyReused):
        counter.increment_once("k", "v", 2, 1)
    clock.time += 100 * HOUR
    counter.end_windows(clock.time)
    for number in range(10):
        counter.increment(f"n{number}")  # none of which gets its number
    assert counter.increment_once("k", "v@1h", 2, 1) == (A, 1, 0, True)
    with pytest.raises(KeyReused):
        counter.increment_once("k", "n1", 2, 1)
    other = copy(counter)
    assert other.increment_once("k", "v@1h", 2, 1) == (A, 1, 0, True)
    before = len(counter._counters.names)
    counter.expire(3 * HOUR)  # now it is forgotten, and its number is free
    counter.increment("new")
    assert len(counter._counters.names) == before
    assert counter.increment_once("k", "v@1h", 2, 3 * HOUR) == (A, 13, 2, False)


def test_a_key_taken_in_two_windows_is_cancelled_in_its_own(clock):
    """The larger dot, where it was counted."""
    one, other = Counter(A, wall=clock), Counter(B, wall=clock)
    one.increment_once("k", "v@1h", 5, 0)
    one.increment("v@1h")
    clock.time += HOUR
    other.increment_once("k", "v@1h", 5, 1)
    other.increment("v@1h")
    for _ in range(2):
        for sender, receiver in ((one, other), (other, one)):
            for delta in sender.deltas(receiver.vector(), 10**6, 1):
                assert receiver.merge(delta, 1) in (APPLIED, HELD)
    assert one.windows("v@1h", 2) == other.windows("v@1h", 2) == [(T, 6), (T + HOUR, 1)]


@pytest.mark.parametrize("ended_at", ["sender", "receiver", "both", "between"])
def test_what_was_cancelled_in_a_window_that_ended_needs_no_entry(clock, ended_at):
    """Vectors become equal all the same."""
    one, other, third = Counter(A, wall=clock), Counter(B, wall=clock), Counter(C, wall=clock)
    cancelling = cancelling_replica((B, 1))
    one.increment_once("k", "v@1h", 5, 0)
    other.increment_once("k", "v@1h", 5, 0)
    if ended_at == "between":
        one.end_windows(T + 61 * HOUR)  # so it finds the conflict in a window that it does not hold
    one.merge(other.delta(B, 0, 0), 0)
    assert cancelling in one.vector()
    if ended_at in ("sender", "both"):
        one.end_windows(T + 61 * HOUR)
    if ended_at in ("receiver", "both"):
        third.end_windows(T + 61 * HOUR)
    for delta in one.deltas({}, 10**6, 0):
        assert third.merge(delta, 0) in (APPLIED, HELD)  # with the keys of both it finds the conflict itself
    assert third.vector() == one.vector()
    third.end_windows(T + 61 * HOUR)
    assert names(third) == set()
    assert third.held_windows == 0
    fresh = Counter(D, wall=clock)
    for delta in third.deltas({}, 10**6, 0):
        fresh.merge(delta, 0)
    assert fresh.vector() == third.vector()


def test_lists_follow_series_that_come_and_go(counter, clock):
    rng, expected = random.Random(1), {}
    for _ in range(200):
        name = f"{rng.choice('abcdefgh')}@{rng.choice((1, 2))}h:1"
        if rng.random() < 0.3:
            name = f"n{rng.randrange(50)}"
        counter.increment(name)
        expected[name] = clock.time
        clock.time += rng.choice((0, 0, HOUR / 2))
        counter.end_windows(clock.time)
        if rng.random() < 0.5:
            held = {
                name for name, at in expected.items()
                if "@" not in name or (at // (int(name[2]) * HOUR) + 2) * int(name[2]) * HOUR > clock.time
            }  # fmt: skip
            values, start = {}, ""
            while start is not None:
                page, start = counter.list("", start, 7)
                values |= page
            assert list(values) == sorted(held)
            largest = counter.largest("", 1000)
            assert largest == values
            assert list(largest) == sorted(values, key=lambda name: (-values[name], name))
            assert counter.sizes()[0] == len(held)


@pytest.mark.parametrize("block", range(5))
def test_any_clocks_and_any_order_of_deltas_lead_to_the_same_exact_counts(block, monkeypatch):
    """Clocks differ and jump, deltas are lost, late or cut too far back, one key reaches several nodes, ids are
    renewed: of windows that have ended nowhere, every node counts just what it holds; and of the others nothing."""
    for seed in range(block * 8, block * 8 + 8):
        rng = random.Random(seed)
        monkeypatch.setattr(histories, "new_replica", partial(new_replica, rng.getrandbits))
        clocks = [Clock(T + rng.uniform(-40, 40)) for _ in range(4)]
        counters = [Counter(f"{n}0000000-0000-8000", wall=clock) for n, clock in enumerate(clocks)]
        log, flying, true = {}, [], T
        kept = {"v@1m:2": (60, 2), "w@1h:1": (3600, 1), "x@10s:3": (10, 3), "n": None}

        def increment(number, log=log, counters=counters, clocks=clocks, rng=rng, kept=kept):
            counter, series = counters[number], rng.choice(list(kept))
            amount, key = (rng.choice((-2, 1, 3)), None) if rng.random() < 0.7 else (1, f"{series}{rng.randrange(12)}")
            width = kept[series] and kept[series][0]
            name = f"{series}/{int(clocks[number]() // width)}" if width else series
            try:
                if key:
                    *dot, _, replayed = counter.increment_once(key, series, amount, 0)
                else:
                    *dot, _ = counter.increment(series, amount)
                    replayed = False
            except WindowEnded:
                assert end_of(name) <= counter.horizon
                return
            if not replayed:
                log[tuple(dot)] = name, amount, key

        def check(seed=seed, counters=counters, log=log):
            ended = max(counter.horizon for counter in counters)
            for counter in counters:
                vector, values, seen = counter.vector(), {}, set()
                for dot, (name, amount, key) in sorted(log.items()):
                    if vector.get(dot[0], 0) >= dot[1]:
                        if key is None or key not in seen:
                            values[name] = values.get(name, 0) + amount
                        seen.add(key)
                held = names(counter)
                assert all(end_of(name) > counter.horizon for name in held)
                for name in {name for name, _, _ in log.values()}:
                    if end_of(name) > ended:
                        assert counter._counters.get(name) == values.get(name, 0), (seed, name)

        for _ in range(200):
            dice, number = rng.random(), rng.randrange(4)
            if dice < 0.45:
                increment(number)
            elif dice < 0.65:
                sender, receiver = rng.sample(counters, 2)
                for replica, held in sender.vector().items():
                    after = rng.choice((receiver.vector().get(replica, 0), 0, rng.randint(0, held)))
                    if delta := sender.delta(replica, after, 0):
                        flying += [(receiver, delta)] * rng.choice((0, 1, 2))
            elif dice < 0.85:
                rng.shuffle(flying)
                for receiver, delta in flying[:3]:
                    receiver.merge(delta, 0)
                del flying[:3]
            elif dice < 0.95:
                passed = rng.choice((1, 5, 30))
                true += passed
                for clock in clocks:
                    clock.time += passed
                clocks[number].time = true + rng.choice((0, -40, 40))
                counters[number].end_windows(clocks[number]() - 60)
            elif dice < 0.97:
                counters[number].renew(counters[number].replica)
            else:
                clocks[number].time += rng.choice((-600, 600))  # for now
            check()
        for _ in range(3):
            for sender in counters:
                for receiver in counters:
                    for delta in sender.deltas(receiver.vector(), 10**6, 0):
                        receiver.merge(delta, 0)
            check()
        assert all(counter.vector() == counters[0].vector() for counter in counters), seed
        for counter in counters:
            counter.end_windows(true + 10**5)
            assert names(counter) <= {"n"}
            assert counter.held_windows == 0
            assert len(counter._counters.names) <= 200

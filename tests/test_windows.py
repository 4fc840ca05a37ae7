"""Windowed counters: their names, when their windows end, and that they are exact until then and gone after it."""

import random

import pytest

from counter import windows
from counter.windows import GRACE_S, NEVER, Horizon, Schedule, Series, parse_series, parse_window

HOUR = 3600
T = 1_765_843_200.0  # 2025-12-16T00:00:00Z, where a day begins


@pytest.mark.parametrize(
    ("text", "series", "canonical"),
    [
        ("visits@1h", ("visits", HOUR, 60), "visits@1h"),
        ("visits@1h:60", ("visits", HOUR, 60), "visits@1h"),
        ("visits@60m", ("visits", HOUR, 60), "visits@1h"),
        ("visits@3600s:160", ("visits", HOUR, 160), "visits@1h:160"),
        ("visits@90m", ("visits", 5400, 60), "visits@90m"),
        ("visits@1d:400", ("visits", 86400, 400), "visits@1d:400"),
        ("a.b_c:d-1@1s:1", ("a.b_c:d-1", 1, 1), "a.b_c:d-1@1s:1"),
        ("x@366d:1000", ("x", 366 * 86400, 1000), "x@366d:1000"),
        ("x@31622400s", ("x", 366 * 86400, 60), "x@366d"),
    ],
)
def test_a_name_says_how_wide_windows_are_and_how_many_are_kept(text, series, canonical):
    assert parse_series(text) == Series(*series)
    assert windows.canonical(text) == canonical
    assert parse_series(canonical) == Series(*series)
    assert windows.listed_name(parse_series(text).window(7)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "x@", "x@1", "x@h", "x@1w", "x@0s", "x@01h", "x@1h:", "x@1h:0", "x@1h:1001", "x@1h:060", "x@367d",
        "x@31622401s", "@1h", ".@1h", "..@1h", "x/y@1h", "x@1h@1h", "x@1h:60/5", "x@-1h", "x@1H", "x@1h ", "x@1h\n",
        "x@١h", f"{'x' * 129}@1h", "x@1h:60:60",
    ],
)  # fmt: skip
def test_a_name_that_is_no_windowed_counter_is_refused(text):
    with pytest.raises(ValueError):
        parse_series(text)


def test_a_window_is_named_by_its_number_and_the_name_tells_its_end():
    """From then on nobody can ask for it: it is the one before the oldest that is kept."""
    name = windows.present_window("visits@1h:3", T + 1800)
    assert name == f"visits@1h:3/{int(T) // HOUR}"
    assert windows.present_window("visits@60m:3", T + 3599.999) == name
    assert windows.present_window("visits@1h:3", T + HOUR) != name
    assert parse_window(name) == (Series("visits", HOUR, 3), int(T) // HOUR)
    assert windows.end_of(name) == T + 4 * HOUR
    assert windows.end_of("visits") == float("inf")
    assert windows.present_window("visits", T) == "visits"
    assert windows.listed_name(name) == "visits@1h:3"
    assert windows.listed_name("visits") == "visits"


@pytest.mark.parametrize("name", ["visits", "a:b", "visits@1h:60/0", "visits@1d:400/20000"])
def test_these_are_counters_among_nodes(name):
    assert windows.is_counter(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "..", "a/1", "visits@1h", "visits@1h/5", "visits@60m:60/5", "visits@1h:60/05", "visits@1h:60/-5",
        "visits@1h:60/", "visits@1h:60/5/5", "visits@1h:60/1e3", "visits@1h:60/5\n", "@1h:60/5",
        "a@1h:60/9999999999999999",
    ],
)  # fmt: skip
def test_these_are_none(name):
    """One window has one name, or two nodes would count it under two."""
    assert not windows.is_counter(name)


def test_the_horizon_is_a_minute_behind_a_clock_that_runs_evenly():
    horizon = Horizon()
    found = [horizon.look(now, T + now) for now in range(200)]
    assert set(found[: int(GRACE_S)]) == {NEVER}
    assert found[int(GRACE_S) :] == [T + now - GRACE_S for now in range(int(GRACE_S), 200)]


def test_a_clock_that_jumps_ends_no_window_until_it_has_stayed():
    horizon = Horizon()
    for now in range(100):
        horizon.look(now, T + now)
    for now in range(100, 159):  # ahead by a year, and back
        assert horizon.look(now, T + now + 366 * 86400) == T + now - GRACE_S
    assert horizon.look(159, T + 159) == T + 99
    for now in range(160, 260):  # back by an hour, which stays
        found = horizon.look(now, T + now - HOUR)
        assert found <= T + now - HOUR
    assert found == T + 259 - HOUR - GRACE_S


def test_a_clock_nobody_looked_at_is_not_believed_at_once():
    horizon = Horizon()
    for now in range(100):
        horizon.look(now, T + now)
    assert horizon.look(500, T + 366 * 86400) == NEVER
    assert horizon.look(560, T + 560) == T + 560


@pytest.mark.parametrize("seed", range(20))
def test_the_horizon_is_the_least_of_a_minute_whatever_the_clock_does(seed):
    rng, horizon, looks, now = random.Random(seed), Horizon(), [], 0.0
    for _ in range(300):
        now += rng.choice((0.2, 1, 1, 5, 30))
        looks.append((now, T + now + rng.choice((0, 0, 0, -100, 100, 10**6))))
        expected = min(wall for at, wall in looks if at >= now - GRACE_S) if now - looks[0][0] >= GRACE_S else NEVER
        assert horizon.look(*looks[-1]) == expected


def test_windows_are_taken_when_they_end_a_few_at_a_time():
    schedule = Schedule()
    names = {end: [f"{letter}@1s:1/{end - 2}" for letter in "abcde"] for end in (30, 10, 20)}
    for some in names.values():
        for name in some:
            schedule.add(name)
    taken = []

    def take(horizon, limit):
        some, reached = schedule.first(horizon, limit)
        number = len(some)
        taken.extend(some)
        schedule.drop(number)
        return number, reached

    assert [take(9, 100), take(NEVER, 9)] == [(0, 9), (0, NEVER)]
    assert [take(25, 3), take(25, 4), take(25, 4), take(25, 4)] == [(3, 10), (2, 10), (4, 20), (1, 20)]
    assert sorted(taken) == sorted(names[10] + names[20])
    assert [take(25, 100), take(30, 100), take(99, 100)] == [(0, 25), (5, 30), (0, 99)]
    assert sorted(taken) == sorted(names[10] + names[20] + names[30])

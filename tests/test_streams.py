"""Columns of entries: what is looked up in them, cut from them, and does not fit in 64 bits."""

import random

import pytest

from counter import Counter, Delta
from counter.streams import LARGE, SMALL, Index, OwnStream, Stream, Totals

A, B = "aaaaaaaa-aaaa-8aaa", "bbbbbbbb-bbbb-8bbb"


@pytest.mark.parametrize("seed", range(5))
def test_an_index_finds_what_is_in_its_column(seed):
    rng, stream = random.Random(seed), Stream(A)
    numbers = rng.sample(range(10**6), 500) + list(range(2 * 10**6, 2 * 10**6 + 500))
    rng.shuffle(numbers)
    index = None
    for row, number in enumerate(numbers):
        stream.numbers.append(number)
        if row == 100:
            index = Index(stream.numbers)
        elif index:
            index.add(row)
    assert index.find(numbers) == list(range(1000))
    assert index.find(range(10**6 + 1, 10**6 + 10)) == [-1] * 9


def put(stream, touches, through):
    """Touch the counters of {number: (sequence, total)} in a stream, as Counter.merge does."""
    rows = stream.rows(list(touches))
    held = max(stream.sequences, default=0)
    stream.make_room([total for _, total in touches.values()])
    stream.log_touched(rows, [sequence for sequence, _ in touches.values()], held, through)
    for row, (sequence, total) in zip(rows, touches.values(), strict=True):
        stream.sequences[row], stream.totals[row] = sequence, total


@pytest.mark.parametrize("counters", [3, SMALL - 1, SMALL + 1, 400])
@pytest.mark.parametrize("seed", range(4))
def test_a_cut_has_just_what_was_touched_since(seed, counters):
    """Whatever was touched in which order, a few at a time or most, with totals of any size."""
    rng, stream, entries, through = random.Random(seed), Stream(A), {}, 0
    names = [f"n{number}" for number in range(counters)]
    for _ in range(120):
        numbers = rng.sample(range(counters), rng.choice((1, 1, 2, counters // 2, counters)))
        sequences = rng.sample(range(through + 1, through + 1 + 2 * len(numbers)), len(numbers))
        totals = (rng.choice((rng.randrange(-9, 9), 2**70)) for _ in numbers)
        touches = dict(zip(numbers, zip(sequences, totals, strict=True), strict=True))
        put(stream, touches, max(sequences))
        entries.update({names[number]: entry for number, entry in touches.items()})
        through = max(sequences)
        for after in (0, through - 1, rng.randrange(through), max(0, through - rng.randrange(1, 9))):
            expected = {name: entry for name, entry in entries.items() if entry[0] > after}
            assert stream.cut(after, names) == expected


def test_a_large_cut_does_not_change_with_its_stream():
    stream, names = Stream(A), [f"n{number}" for number in range(LARGE + 1)]
    put(stream, {number: (number + 1, 1) for number in range(LARGE + 1)}, LARGE + 1)
    cut = stream.cut(LARGE - 9, names)
    assert isinstance(cut, Totals)
    names.append("later")
    put(stream, {5: (LARGE + 2, 7), LARGE + 1: (LARGE + 3, 8)}, LARGE + 3)
    assert len(cut) == 10
    assert cut == {f"n{number}": (number + 1, 1) for number in range(LARGE - 9, LARGE + 1)}
    assert cut[f"n{LARGE}"] == (LARGE + 1, 1)
    assert "n5" not in cut
    assert list(cut) == [name for name, _ in cut.items()]
    with pytest.raises(KeyError):
        cut["later"]


def test_totals_are_read_piece_by_piece():
    totals = Totals()
    assert (len(totals), dict(totals.items())) == (0, {})
    totals.extend({"a": (1, 5), "b": (3, 2**80)}.items())
    totals.extend([("c", (2, -1))])
    assert totals == {"a": (1, 5), "b": (3, 2**80), "c": (2, -1)}
    assert len(totals) == 3


def test_a_replica_that_is_given_up_keeps_its_history():
    own, names = OwnStream(A), [f"n{number}" for number in range(50)]
    own.extend(range(50))
    for sequence, number in enumerate((7, 30, 7), 1):
        own.log.append(number)
        own.sequences[number], own.totals[number] = sequence, 2**66
    stream = own.given_up(3)
    assert own.cut(0, names) == stream.cut(0, names) == {"n7": (3, 2**66), "n30": (2, 2**66)}
    assert stream.cut(2, names) == {"n7": (3, 2**66)}
    assert stream.rows([30, 7]) == [1, 0]
    put(stream, {8: (4, 1)}, 4)
    assert stream.cut(3, names) == {"n8": (4, 1)}


def test_a_delta_has_no_entries_of_counters_that_its_replica_did_not_touch():
    """Also where they are so many that they are cut as columns, from the very beginning."""
    counter = Counter(A)
    counter.merge(Delta(B, 0, 3000, {f"n{number}": (number + 1, 1) for number in range(3000)}), 0)
    for number in range(10_000):
        counter.increment(f"n{number % 2000}")
    totals = counter.delta(A, 0, 0).totals
    assert len(totals) == 2000
    assert {name: total for name, (_, total) in totals.items()} == {f"n{number}": 5 for number in range(2000)}

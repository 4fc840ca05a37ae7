"""What is believed of a delta: all that a counter can have counted, and no more."""

import random

import pytest

from counter import Counter, Delta, new_replica
from counter.checks import checked_delta
from counter.dump import delta_of_values
from counter.ids import AMOUNT_MAX, SEQUENCE_MAX

A = "aaaaaaaa-aaaa-8aaa"
AMOUNTS = (1, -1, 5, AMOUNT_MAX, -AMOUNT_MAX, AMOUNT_MAX - 1, AMOUNT_MAX // 2)


def an_amount(rng):
    return rng.choice(AMOUNTS) if rng.random() < 0.7 else rng.randint(-AMOUNT_MAX, AMOUNT_MAX) or 1


@pytest.mark.parametrize("seed", range(40))
def test_whatever_counters_count_is_believed(seed):
    """Single increments and batches of the largest amounts, keys that several nodes took and the cancellations
    of them, renewed ids: each delta, from wherever it is cut, passes, and leads to the same counts."""
    rng = random.Random(seed)
    counters = [Counter(new_replica(rng.getrandbits)) for _ in range(3)]
    payloads = {}
    for _ in range(300):
        counter, key = rng.choice(counters), f"key-{rng.randrange(10)}"
        dice = rng.random()
        if dice < 0.3:
            counter.increment(rng.choice("abc"), an_amount(rng))
        elif dice < 0.4:
            counter.increment_many({name: an_amount(rng) for name in rng.sample("abcdef", 3)})
        elif dice < 0.5:
            counter.increment_once(key, "a", payloads.setdefault(key, an_amount(rng)), 0.0)
        elif dice < 0.52:
            counter.renew(counter.replica)
        else:
            other = rng.choice(counters)
            known = {replica: rng.randrange(sequence + 1) for replica, sequence in other.vector().items()}
            for delta in counter.deltas(known if rng.random() < 0.3 else other.vector(), 10**6, 0.0):
                assert other.merge(checked_delta(delta), 0.0)
    for _ in range(3):  # what cancels may come before what it cancels
        for counter in counters:
            for other in counters:
                for delta in counter.deltas(other.vector(), 10**9, 0.0):
                    other.merge(checked_delta(delta), 0.0)
    assert len({tuple(counter.value(name) for name in "abcdef") for counter in counters}) == 1
    assert len({tuple(sorted(counter.vector().items())) for counter in counters}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_imported_is_believed(seed):
    """Large counts take as many sequences as it takes to count them."""
    rng = random.Random(seed)
    values = {f"n{number}": rng.choice((0, 1, -1)) * rng.randrange(10 ** rng.randrange(1, 33)) for number in range(50)}
    delta = delta_of_values(values)
    assert checked_delta(delta) == delta


@pytest.mark.parametrize(
    ("through", "totals"),
    [
        (1, {"a": (1, AMOUNT_MAX + 1)}),
        (3, {"a": (2, 2 * AMOUNT_MAX), "b": (3, 2 * AMOUNT_MAX)}),
        (3, {"a": (2, -2 * AMOUNT_MAX), "b": (3, AMOUNT_MAX + 1)}),
        (4, {"a": (2, 0), "b": (3, 1), "c": (4, 2 * AMOUNT_MAX + 1)}),
        (SEQUENCE_MAX, {"a": (SEQUENCE_MAX, AMOUNT_MAX * (SEQUENCE_MAX + 1))}),
    ],
)
def test_more_than_so_many_increments_can_have_counted_is_refused(through, totals):
    """Each total alone may be possible; all of them take more increments than there were."""
    with pytest.raises(ValueError, match="impossible"):
        checked_delta(Delta(A, 0, through, totals))
    few = {name: (sequence, max(-AMOUNT_MAX, min(AMOUNT_MAX, total))) for name, (sequence, total) in totals.items()}
    assert checked_delta(Delta(A, 0, through, few)).totals == few

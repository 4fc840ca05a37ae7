"""What happens when memory runs out in the middle of something."""

from array import array

import pytest

from counter import Counter, Delta

A, B = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "ab")


class Full(list):
    """A list for which there is no more memory."""

    def append(self, _):
        raise MemoryError


class FullArray(array):
    """An array for which there is no more memory."""

    def append(self, _):
        raise MemoryError

    frombytes = append


def fill_names(counter):
    counter._counters.names = Full(counter._counters.names)


def fill_log(counter):
    counter._histories.own.log = FullArray("I", counter._histories.own.log)


def fill_sequences(counter):
    counter._histories.own.sequences = FullArray("Q", counter._histories.own.sequences)


@pytest.mark.parametrize("fill", [fill_names, fill_log, fill_sequences])
def test_an_increment_without_memory_changes_nothing(fill):
    counter = Counter(A)
    counter.increment("x")
    fill(counter)
    with pytest.raises(MemoryError):
        counter.increment("y")
    assert counter.list("", "", 9) == ({"x": 1}, None)
    assert counter.vector() == {A: 1}
    assert counter.deltas({}, 10**6, 0) == [Delta(A, 0, 1, {"x": (1, 1)})]


def test_a_merge_without_memory_changes_nothing():
    counter = Counter(A)
    counter.increment("x")
    fill_names(counter)
    with pytest.raises(MemoryError):
        counter.merge(Delta(B, 0, 3, {"x": (1, 1), "y": (2, 1), "z": (3, 1)}), 0)
    assert counter.list("", "", 9) == ({"x": 1}, None)
    assert counter.vector() == {A: 1}
    assert not counter.holds(B, 1)

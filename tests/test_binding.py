"""Numbers of messages: which are new."""

import random

import pytest

from counter.binding import WINDOW, Numbers


def test_a_number_counts_once():
    numbers = Numbers()
    assert [numbers.take("a", number) for number in (1, 2, 2, 1, 5, 3, 5, 3, 4)] == [
        True, True, False, False, True, True, False, False, True,
    ]  # fmt: skip
    assert numbers.latest("a") == 5


def test_every_sender_has_its_own():
    numbers = Numbers()
    assert numbers.take("a", 7)
    assert (numbers.latest("a"), numbers.latest("b")) == (7, 0)
    assert numbers.take("b", 7)


def test_what_is_far_behind_is_taken_for_old():
    """It may have come or not: only the latest are remembered one by one."""
    numbers = Numbers()
    assert numbers.take("a", 1000)
    assert not numbers.take("a", 1000 - WINDOW)
    assert numbers.take("a", 1000 - WINDOW + 1)


def test_a_first_number_is_no_reason_to_take_a_smaller_one():
    """But for the few that it may have overtaken."""
    numbers = Numbers()
    assert numbers.take("a", 3)
    assert numbers.take("a", 1)
    assert not numbers.take("a", 0)


def test_senders_that_are_forgotten_leave_a_number_beyond_which_all_are_new():
    """So what is remembered is bounded, and nothing that came is ever taken again."""
    numbers = Numbers(senders_max=2)
    assert numbers.take("a", 10)
    assert numbers.take("b", 20)
    assert numbers.take("a", 11)
    assert numbers.take("c", 5)
    assert (numbers.latest("b"), numbers.latest("d")) == (20, 20)
    assert not numbers.take("b", 20)
    assert not numbers.take("d", 20)
    assert numbers.take("b", 21)


@pytest.mark.parametrize("seed", range(20))
def test_no_number_is_ever_taken_twice(seed):
    """Whatever the order; and every number beyond the latest is taken."""
    rng, numbers, taken = random.Random(seed), Numbers(senders_max=3), set()
    for _ in range(3000):
        sender = rng.choice("abcde")
        number = max(0, numbers.latest(sender) + rng.randint(-2 * WINDOW, 3))
        beyond = number > numbers.latest(sender)
        if numbers.take(sender, number):
            assert (sender, number) not in taken
            taken.add((sender, number))
        else:
            assert not beyond

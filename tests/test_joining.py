"""When a node is ready, and what it waits for until then."""

import pytest
from halves import ME, A, B, C

from counter import Counter, Delta
from counter.joining import Joining

TIMEOUT_S = 10.0
SEED = "10.0.0.9:80"


@pytest.fixture
def joining():
    """A node with seeds that has just started."""
    joining = Joining(True, TIMEOUT_S)
    look(joining, 0.0)
    return joining


def look(joining, now, mine=(), present=(), refusals=()):
    joining.look(now, ME, dict(mine), list(present), dict(refusals))
    return joining.ready


def test_a_node_without_seeds_is_ready_at_once():
    assert Joining(False, TIMEOUT_S).ready


def test_vectors_are_compared_without_its_lock():
    """Comparing may take the lock of the counter, and no two locks are held together."""
    held = []

    def lacks(_mine, _vector):
        held.append(joining._lock.locked())
        return True

    joining = Joining(True, TIMEOUT_S, lacks)
    joining.heard(A, True, {A: 1}, {})
    look(joining, 1.0)
    assert held == [False, False]


def test_a_node_is_ready_once_it_has_caught_up_with_a_peer_that_is_ready(joining):
    joining.heard(A, True, {B: 5}, {})
    assert not joining.ready
    joining.heard(A, True, {B: 7}, {B: 5})  # what was counted since does not matter
    assert joining.ready


def test_it_may_get_from_others_what_that_peer_holds(joining):
    joining.heard(A, True, {B: 5}, {})
    assert look(joining, 1.0, {B: 5})


def test_peers_that_are_not_ready_make_nobody_ready_before_the_join_timeout(joining):
    """A third may hold the counts."""
    joining.heard(A, False, {}, {})
    assert not look(joining, TIMEOUT_S - 0.1)
    assert look(joining, TIMEOUT_S)


def test_what_a_peer_held_before_it_was_ready_is_not_what_counts(joining):
    joining.heard(A, False, {}, {})
    joining.heard(A, True, {B: 5}, {})
    assert not look(joining, TIMEOUT_S)
    assert look(joining, TIMEOUT_S + 1, {B: 5})


@pytest.mark.parametrize("present", [[A], []])
def test_a_peer_that_holds_more_is_waited_for_also_when_it_is_lost(joining, present, caplog):
    joining.heard(A, True, {B: 5}, {})
    assert not any(look(joining, float(now), {B: 4}, present) for now in range(100))
    assert joining.waits_for == f"increments that peer {A} holds, or held"
    assert caplog.messages == [f"not ready: this node waits for {joining.waits_for}"]


def test_a_peer_that_has_yet_to_say_what_it_holds_is_waited_for_as_long_as_somebody_hears_it(joining):
    joining.heard(A, False, {}, {})
    assert not look(joining, 50.0, present=[A, C])
    assert joining.waits_for == f"peer {C} to say what it holds"
    assert look(joining, 60.0, present=[A])


def test_a_seed_that_refuses_is_not_one_that_is_absent(joining, caplog):
    assert not look(joining, 50.0, refusals={SEED: "answered 401"})
    assert caplog.messages == [f"not ready: this node waits for a seed that refuses it: {SEED}: answered 401"]
    joining.heard(A, True, {}, {})
    assert joining.ready  # it has caught up with another


@pytest.mark.parametrize(("mine", "level"), [({}, "WARNING"), ({ME: 1}, "WARNING"), ({A: 1}, "INFO")])
def test_to_be_ready_alone_without_counts_is_a_warning(joining, caplog, mine, level):
    """The counts may be where nobody has answered, whatever was counted here since the start."""
    caplog.set_level("INFO")
    assert look(joining, TIMEOUT_S, mine)
    assert [record.levelname for record in caplog.records] == [level]


def test_ready_is_for_ever(joining):
    assert look(joining, TIMEOUT_S)
    joining.heard(A, True, {B: 5}, {})
    assert look(joining, TIMEOUT_S + 1, {}, [C], {SEED: "answered 401"})


def test_what_was_absorbed_meanwhile_is_reached():
    counter = Counter(B)
    counter.merge(Delta(A, 0, 5, {"x": (4, 1)}, heir=B), 0)
    joining = Joining(True, TIMEOUT_S, counter.lacks)
    joining.heard(C, True, {A: 5}, {})
    assert not joining.ready
    counter.absorb()
    joining.heard(C, True, {A: 5}, counter.vector())
    assert joining.ready

"""Who is woken by what."""

import threading
import time

import pytest
from conftest import wait_until
from halves import A, B

from counter.waiting import Waiters


@pytest.fixture
def waiters():
    return Waiters(threading.Lock())


@pytest.fixture
def woken(waiters):
    """Have somebody wait for each of some dots; return the names of those that were woken."""
    woken = []
    for name, dot in {"A1": (A, 1), "A3": (A, 3), "A5": (A, 5), "B3": (B, 3)}.items():
        waiters.add(lambda name=name: woken.append(name), *dot)
    return woken


def test_those_are_woken_whose_dots_have_come_and_nobody_else(waiters, woken):
    waiters.reached_locked(A, 3)
    assert woken == ["A1", "A3"]
    waiters.reached_locked(A, 5, after=3)
    assert woken == ["A1", "A3", "A5"]


def test_of_vectors_the_dots_are_what_only_the_later_one_has(waiters, woken):
    waiters.advanced_locked({A: 1, B: 2}, {A: 4, B: 2})
    assert woken == ["A3"]
    waiters.advanced_locked({}, {B: 3})
    assert woken == ["A3", "B3"]


def test_who_watches_is_told_of_the_next_change_once(waiters):
    told = []
    waiters.watch_locked(lambda: told.append("any"))
    assert waiters.anybody
    assert len(waiters) == 0  # nobody waits for a dot
    waiters.reached_locked(B, 1)
    waiters.reached_locked(B, 2)
    assert told == ["any"]
    assert not waiters.anybody


def test_who_is_removed_is_called_no_more(waiters):
    called = []
    wake = called.append
    waiters.add(wake, A, 1)
    assert len(waiters) == 1
    waiters.remove(wake, A)
    waiters.reached_locked(A, 1)
    assert called == []
    assert not waiters.anybody


def test_waiting_ends_with_its_condition(waiters):
    """What comes before it begins, or in the middle, is not missed."""
    waiters.wait(lambda: True, 60, (A, 1))
    lock, held = waiters._lock, []
    threads = [threading.Thread(target=waiters.wait, args=(lambda: held, 60, dot)) for dot in ((A, 1), None)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(waiters))
    with lock:
        held.append(1)
        waiters.reached_locked(A, 1)
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert not waiters.anybody


def test_waiting_ends_with_its_timeout(waiters):
    waiters.wait(lambda: False, 0.01, (A, 1))
    waiters.wait(lambda: False, 0.01)
    assert not waiters.anybody


def test_when_the_node_stops_no_request_waits_but_handing_over_does(waiters):
    """What it has counted is yet to reach its peers."""
    request = threading.Thread(target=waiters.wait, args=(lambda: False, 60, (A, 1)))
    request.start()
    wait_until(lambda: len(waiters))
    waiters.stop()
    request.join(10)
    assert not request.is_alive()
    waiters.wait(lambda: False, 60, (A, 1))
    asked, began = [], time.monotonic()
    waiters.wait(lambda: asked.append(time.monotonic() - began), 0.01)
    assert asked
    assert time.monotonic() - began >= 0.01

"""Threads for what takes long: as many as are needed, at most so many, and none that is lost."""

import threading

import pytest
from conftest import wait_until

from counter import lanes
from counter.lanes import Lane
from counter.metrics import Requests


@pytest.fixture
def make_lane():
    """Make lanes by calling it as Lane, with the requests made; afterwards they stop."""
    made = []

    def make(threads_max, queues=True):
        made.append(Lane("lane", threads_max, Requests(), queues))
        return made[-1]

    yield make
    for lane in made:
        assert lane.stop(5.0)


class Jobs:
    """Jobs that are under way until they are told to end."""

    def __init__(self):
        self.begun, self.over = 0, threading.Event()
        self.lock = threading.Lock()

    def __call__(self, _tally):
        with self.lock:
            self.begun += 1
        assert self.over.wait(10)

    def have_begun(self, number):
        wait_until(lambda: self.begun == number)


@pytest.fixture
def jobs():
    jobs = Jobs()
    yield jobs
    jobs.over.set()


def test_jobs_run_at_once_up_to_so_many(make_lane, jobs):
    """Further ones wait for a thread, and are done in turn."""
    lane, done = make_lane(3), []
    assert all(lane.put(jobs) for _ in range(3))
    jobs.have_begun(3)
    assert all(lane.put(lambda _tally, number=number: done.append(number)) for number in range(5))
    assert done == []
    jobs.over.set()
    wait_until(lambda: sorted(done) == list(range(5)))


def test_without_a_queue_the_job_too_many_is_refused(make_lane, jobs):
    """And again once one is over there is a thread for the next."""
    lane = make_lane(2, queues=False)
    assert [lane.put(jobs) for _ in range(4)] == [True, True, False, False]
    jobs.have_begun(2)
    jobs.over.set()
    wait_until(lambda: lane.put(jobs))
    jobs.have_begun(3)


def test_threads_are_used_again_and_end_when_idle(make_lane, jobs, monkeypatch):
    """One is kept."""
    monkeypatch.setattr(lanes, "IDLE_S", 0.05)
    lane, used = make_lane(10), set()
    for _ in range(5):
        lane.put(jobs)
    jobs.have_begun(5)
    jobs.over.set()
    wait_until(lambda: lane._live == 1)
    for _ in range(5):
        done = threading.Event()
        lane.put(lambda _tally, done=done: (used.add(threading.get_ident()), done.set()))
        assert done.wait(5)
    assert len(used) == 1


def test_a_job_that_fails_costs_no_thread(make_lane, caplog):
    """It is a bug, and in the log."""
    lane = make_lane(1)
    for _ in range(3):
        lane.put(lambda _tally: 1 / 0)
    done = threading.Event()
    lane.put(lambda _tally: done.set())
    assert done.wait(5)
    assert len(caplog.records) == 3
    caplog.clear()


def test_a_thread_counts_for_itself(make_lane):
    """What it counted outlives it."""
    lane, done = make_lane(2), threading.Event()
    lane.put(lambda tally: (tally.of("/a").count(b"HTTP/1.1 200 OK", 0.0), done.set()))
    assert done.wait(5)
    assert lane.stop(5.0)
    assert lane._requests.totals()["/a"].statuses == {b"200": [1]}


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
@pytest.mark.parametrize("queues", [True, False])
def test_without_a_thread_a_job_is_refused(make_lane, monkeypatch, jobs, queues, error):
    """With one it waits for that, where the lane queues."""
    lane = make_lane(5, queues)

    def start_new_thread(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(lanes._thread, "start_new_thread", start_new_thread)
        assert not lane.put(jobs)
    lane.start()
    wait_until(lambda: lane._live == 1)
    with monkeypatch.context() as patch:
        patch.setattr(lanes._thread, "start_new_thread", start_new_thread)
        assert [lane.put(jobs) for _ in range(2)] == [True, queues]
    jobs.over.set()
    jobs.have_begun(1 + queues)


def test_a_thread_that_dies_as_it_starts_is_replaced(make_lane, monkeypatch, jobs):
    """At the next look, after a while; nothing waits for it to come to life, and its place is free again."""
    monkeypatch.setattr(lanes, "START_TIMEOUT_S", 0.05)
    lane = make_lane(1, queues=False)
    with monkeypatch.context() as patch:
        patch.setattr(lanes._thread, "start_new_thread", lambda *_: None)
        assert lane.put(jobs)
        assert not lane.put(jobs)
    wait_until(lambda: lane.tend() or jobs.begun == 1)


def test_many_jobs_from_many_threads_are_all_done_once(make_lane, monkeypatch):
    """While threads end and start."""
    monkeypatch.setattr(lanes, "IDLE_S", 0.001)
    lane, done, lock = make_lane(4), [], threading.Lock()

    def job(number, _tally):
        with lock:
            done.append(number)

    def put(start):
        for number in range(start, start + 500):
            assert lane.put(lambda tally, number=number: job(number, tally))

    threads = [threading.Thread(target=put, args=(start,)) for start in range(0, 2000, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(done) == 2000)
    assert sorted(done) == list(range(2000))
    wait_until(lambda: lane._live == 1)

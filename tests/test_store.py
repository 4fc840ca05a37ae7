"""The store: what a counter holds gets into its file, and what the file holds into a counter."""

import contextlib
import os
import random
import shutil
import sqlite3
import threading
import time

import pytest
import simulation
from conftest import wait_until

from counter import AMOUNT_MAX, Counter, Delta, datafile, new_replica
from counter import store as store_module
from counter.datafile import DataFileError
from counter.datawriter import Writer
from counter.store import Store

A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "abc")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "counter.db")


@pytest.fixture
def opened(path):
    """Make an open Store with each call, for a new counter unless one is given; afterwards all are stopped."""
    with contextlib.ExitStack() as stack:

        def make(counter=None, path=path, start=True, **options):
            store = Store(path, counter or Counter(new_replica()), "counter", **options)
            store.open()
            stack.callback(store.stop, 10)
            if start:
                store.start()
            return store

        yield make


@pytest.fixture
def impatient(monkeypatch):
    """Let the store try again soon, and look soon whether its file is in place."""
    monkeypatch.setattr(store_module, "RETRY_MAX_S", 0.05)
    monkeypatch.setattr(store_module, "UPKEEP_S", 0.05)


def loaded(path):
    """Return a new Counter with what is in a file."""
    counter = Counter(new_replica())
    with datafile.Reader(path, "counter") as reader:
        for delta in reader.deltas(time.time()):
            counter.merge(delta, time.monotonic())
            assert counter.holds(delta.replica, delta.through)
    return counter


def test_what_is_counted_gets_into_the_file(path, opened):
    counter = Counter(A)
    store = opened(counter)
    dots = [counter.increment("x", amount)[:2] for amount in (AMOUNT_MAX,) * 3000]
    counter.merge(Delta(B, 0, 1, {"y": (1, -7)}), now=0)
    assert store.wait_until_saved(*dots[-1], 10)
    assert store.wait_until_saved(B, 1, 10)
    other = loaded(path)
    assert other.vector() == counter.vector()
    assert (other.value("x"), other.value("y")) == (3000 * AMOUNT_MAX, -7)
    assert store.status() == (True, 0, 0.0, None)


def test_windows_that_end_go_from_the_file_and_their_room_is_used_again(path, opened, impatient):
    """Also those of a file from long ago, once a minute has shown that the clock is right."""
    shown = [time.time()]
    counter = Counter(A, wall=lambda: shown[0])
    store = opened(counter)

    def entries():
        with contextlib.closing(sqlite3.connect(path)) as db:
            return db.execute("SELECT count(*), count(ends), (SELECT * FROM pragma_page_count()) FROM entry").fetchone()

    pages = []
    for hour in range(12):
        # In one transaction: several fill the pages of the file as it happens.
        *dot, _ = counter.increment_many(dict.fromkeys([*(f"v{number}@1h:1" for number in range(300)), "x"], 1))
        assert store.wait_until_saved(*dot, 10)
        shown[0] += 3600
        counter.end_windows(shown[0])
        wait_until(lambda hour=hour: entries()[:2] == (1 + 300, 300) if hour else True)
        pages.append(entries()[2])
    assert pages[-1] <= pages[3]
    assert store.stop(10)
    later = Counter(B, wall=lambda: shown[0] + 10**6)
    second = opened(later)
    assert (later.held_windows, later.value("v1@1h:1"), later.windows("v1@1h:1", 2)[0][1]) == (300, 0, 0)
    for now in range(0, 62, 2):
        later.expire(now)
    assert (later.held_windows, later.sizes()[0]) == (0, 1)
    wait_until(lambda: entries()[:2] == (1, 0))
    assert second.status().ok
    assert loaded(path).vector() == later.vector() == {A: 12 * 301}


def test_what_is_in_the_file_is_counted_by_the_next(path, opened):
    """Under a replica id of its own: the old one goes on nowhere."""
    first = opened()
    first._counter.increment("x", 5)
    assert first.stop(10)
    second = opened()
    assert second._counter.value("x") == 5
    assert second._counter.replica not in second._counter.vector()
    assert second.wait_until_saved(*second._counter.increment("x")[:2], 10)
    assert second.stop(10)
    assert loaded(path).value("x") == 6
    assert len(loaded(path).vector()) == 2


def test_stopping_saves_what_was_counted_last(path, opened, monkeypatch):
    monkeypatch.setattr(store_module, "COMMIT_PAUSE_S", 60.0)
    store = opened()
    store._counter.increment("x")
    wait_until(lambda: store.numbers()["commits"] == 1)
    store._counter.increment("x")
    assert store.status()[:2] == (True, 1)
    assert store.stop(10)
    assert loaded(path).value("x") == 2


def test_who_waits_does_not_wait_for_the_pause_between_commits(opened, monkeypatch):
    monkeypatch.setattr(store_module, "COMMIT_PAUSE_S", 60.0)
    store = opened()
    for _ in range(3):
        assert store.wait_until_saved(*store._counter.increment("x")[:2], 10)


def test_without_news_nothing_is_written(opened, impatient):
    store = opened()
    assert store.wait_until_saved(*store._counter.increment("x")[:2], 10)
    upkeeps = store._upkeep_at
    wait_until(lambda: store._upkeep_at > upkeeps + 5 * store_module.UPKEEP_S)
    assert store.numbers()["commits"] == 1


def test_what_many_threads_count_at_once_is_saved_together(opened, monkeypatch):
    """A slow disk makes commits larger, and the node no slower."""
    counter, first, go = Counter(A), threading.Event(), threading.Event()
    save = Writer.save

    def slow(writer, deltas, wall):
        first.set()
        assert go.wait(10)
        save(writer, deltas, wall)

    monkeypatch.setattr(Writer, "save", slow)
    store, results = opened(counter), []
    counter.increment("x")
    assert first.wait(10)

    def count():
        results.append(store.wait_until_saved(*counter.increment("x")[:2], 10))

    threads = [threading.Thread(target=count) for _ in range(50)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(store._waiters) == 50)
    assert counter.value("x") == 51
    assert store.status().lag_increments == 51
    go.set()
    for thread in threads:
        thread.join()
    assert results == [True] * 50
    assert store.numbers()["commits"] == 2


def test_waiting_ends_with_the_timeout_and_when_the_node_stops(opened, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(Writer, "save", lambda *_: gate.wait(10))
    store = opened()
    dot = store._counter.increment("x")[:2]
    assert not store.wait_until_saved(*dot, 0.01)
    results = []
    thread = threading.Thread(target=lambda: results.append(store.wait_until_saved(*dot, 60)))
    thread.start()
    wait_until(lambda: store._waiters.anybody)
    store.stop_waiting()
    thread.join(10)
    assert results == [False]
    assert not store.wait_until_saved(*dot, 60)
    monkeypatch.undo()
    gate.set()


def test_large_totals_and_many_replicas_take_several_commits(path, opened, monkeypatch):
    monkeypatch.setattr(store_module, "DELTAS_MAX", 3000)
    counter = Counter(A)
    for number in range(20):
        counter.merge(Delta(new_replica(), 0, 30, {f"c{i}": (i, i) for i in range(1, 31)}), now=0)
        counter.increment(f"c{number}")
    store = opened(counter)
    wait_until(lambda: not store.status().lag_increments)
    assert store.numbers()["commits"] > 5
    assert loaded(path).vector() == counter.vector()


# A file that fails.


def limit_pages(monkeypatch, pages):
    """Let a file have so many pages: beyond that the disk is full, as far as SQLite can tell."""
    connect = datafile.connect

    def limited(*arguments):
        db = connect(*arguments)
        db.execute(f"PRAGMA max_page_count = {pages}")
        return db

    monkeypatch.setattr(datafile, "connect", limited)


def test_a_full_disk_stops_nothing_and_is_recovered_from(path, opened, impatient, monkeypatch, caplog):
    limit_pages(monkeypatch, 12)
    caplog.set_level("INFO", "counter.store")
    counter = Counter(A)
    store = opened(counter)
    assert store.wait_until_saved(*counter.increment("x")[:2], 10)
    for number in range(2000):
        counter.increment(f"counter-{number}")
    wait_until(lambda: store.numbers()["errors"] > 3)
    began = time.monotonic()
    assert not store.wait_until_saved(*counter.increment("x")[:2], 60)
    assert time.monotonic() - began < 30  # at once, that is: not as long as it was ready to wait
    ok, lag, lag_s, error = store.status()
    assert (ok, lag, error) == (False, 2001, "database or disk is full")
    assert lag_s > 0
    assert loaded(path).vector() == {A: 1}
    monkeypatch.undo()
    wait_until(lambda: store.status() == (True, 0, 0.0, None))
    assert loaded(path).vector() == {A: 2002}
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == [
        f"data file failing: file={path} error=database or disk is full",
        f"data file works again: file={path}",
    ]


def test_a_commit_that_fails_confirms_nothing(path, opened, impatient, monkeypatch):
    store = opened()
    assert store.wait_until_saved(*store._counter.increment("x")[:2], 10)

    def fail(*_):
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as context:
        context.setattr(Writer, "save", fail)
        dot = store._counter.increment("x")[:2]
        assert not store.wait_until_saved(*dot, 10)
        # What it held may be gone, too: nobody knows while it fails.
        wait_until(lambda: not store.status().ok)
        assert not store.wait_until_saved(*next(iter(store._counter.vector().items())), 10)
    wait_until(lambda: store.status().ok)
    assert store.wait_until_saved(*dot, 10)


def test_a_bug_in_saving_does_not_end_the_thread(opened, impatient, monkeypatch, caplog):
    store = opened()
    with monkeypatch.context() as context:
        context.setattr(Writer, "save", lambda *_: 1 / 0)
        store._counter.increment("x")
        wait_until(lambda: store.numbers()["errors"] > 1)
    wait_until(lambda: store.status() == (True, 0, 0.0, None))
    assert "ZeroDivisionError" in caplog.text


def test_a_file_that_is_gone_is_made_anew(path, opened, impatient):
    """Noticed also while nothing is counted; what the file had the node still has."""
    store = opened()
    assert store.wait_until_saved(*store._counter.increment("x", 3)[:2], 10)
    os.remove(path)
    wait_until(lambda: os.path.exists(path) and store.status() == (True, 0, 0.0, None))
    assert store.numbers()["errors"] >= 1
    assert loaded(path).value("x") == 3
    assert store.stop(10)
    assert loaded(path).value("x") == 3


def test_a_file_that_is_put_in_its_place_is_merged(path, opened, impatient, tmp_path):
    other = str(tmp_path / "other.db")
    with contextlib.closing(Writer(other, "counter")) as writer:
        writer.save([Delta(B, 0, 1, {"x": (1, 10)})], time.time())
    store = opened()
    assert store.wait_until_saved(*store._counter.increment("x", 3)[:2], 10)
    shutil.move(other, path)
    wait_until(lambda: store._counter.value("x") == 13)
    wait_until(lambda: store.status() == (True, 0, 0.0, None))
    assert loaded(path).value("x") == 13


@pytest.mark.parametrize("damage", [b"this is no database" * 300, None])
def test_a_file_that_is_damaged_while_the_node_runs_is_left_alone(path, opened, impatient, damage, tmp_path):
    store = opened()
    assert store.wait_until_saved(*store._counter.increment("x", 3)[:2], 10)
    damaged = str(tmp_path / "damaged.db")
    if damage is None:
        Writer(damaged, "another cluster").close()
    else:
        (tmp_path / "damaged.db").write_bytes(damage)
    content = (tmp_path / "damaged.db").read_bytes()
    shutil.move(damaged, path)
    store._counter.increment("x")
    wait_until(lambda: store.numbers()["errors"] > 3)
    assert not store.status().ok
    with open(path, "rb") as file:
        assert file.read() == content
    os.remove(path)  # moved away, as the message says
    wait_until(lambda: store.status() == (True, 0, 0.0, None))
    assert loaded(path).value("x") == 4


def test_a_folder_that_is_gone_is_waited_for(opened, impatient, tmp_path):
    folder = tmp_path / "volume"
    folder.mkdir()
    store = opened(path=str(folder / "counter.db"))
    assert store.wait_until_saved(*store._counter.increment("x", 3)[:2], 10)
    shutil.move(folder, tmp_path / "unmounted")
    store._counter.increment("x")
    wait_until(lambda: store.numbers()["errors"] > 3)
    shutil.move(tmp_path / "unmounted", folder)
    wait_until(lambda: store.status() == (True, 0, 0.0, None))
    assert loaded(str(folder / "counter.db")).value("x") == 4


def test_stopping_while_the_file_fails_is_not_a_success(opened, monkeypatch):
    def fail(*_):
        raise sqlite3.OperationalError("disk I/O error")

    store = opened()
    monkeypatch.setattr(Writer, "save", fail)
    store._counter.increment("x")
    wait_until(lambda: not store.status().ok)
    assert not store.stop(10)
    assert not store._thread.is_alive()


# Starting.


def test_a_file_in_use_is_refused(path, opened):
    opened()
    with pytest.raises(DataFileError, match="is in use by another process"):
        opened()


def test_after_a_stop_the_file_is_free(path, opened):
    opened().stop(10)
    opened(start=False).stop(10)
    opened()


def test_what_cannot_be_opened_is_refused_and_not_locked(path, opened):
    with open(path, "wb") as file:
        file.write(b"x")
    for _ in range(2):
        with pytest.raises(DataFileError, match="is not a data file"):
            opened()
    os.remove(path)
    opened()
    with pytest.raises(DataFileError, match="No such file or directory"):
        opened(path="/nowhere/counter.db")


def test_a_cancellation_without_what_it_requires_is_damage(path, opened):
    with contextlib.closing(Writer(path, "counter")) as writer:
        cancelling = Delta(C, 0, 1, {"x": (1, -3)}, (), ((A, 1), (B, 1)))
        writer.save([Delta(A, 0, 1, {"x": (1, 3)}), Delta(B, 0, 1, {"x": (1, 3)}), cancelling], time.time())
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM replica WHERE id = ?", (A,))
        db.execute("DELETE FROM entry WHERE replica = 1")
    with pytest.raises(DataFileError, match="is damaged"):
        opened()


def test_a_file_that_can_only_be_read_is_loaded(path, opened, impatient, monkeypatch):
    """A full disk at every node must not keep all of them from starting."""
    first = opened()
    first._counter.increment("x", 3)
    assert first.stop(10)
    connect = datafile.connect

    def read_only(path, options):
        if options == "mode=rw":
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(path, options)

    with monkeypatch.context() as context:
        context.setattr(datafile, "connect", read_only)
        store = opened()
        assert store._counter.value("x") == 3
        assert not store.wait_until_saved(*store._counter.increment("x")[:2], 60)
        assert store.status().error == "attempt to write a readonly database"
    wait_until(lambda: store.status() == (True, 0, 0.0, None))
    assert loaded(path).value("x") == 4


# Keys and clocks.


class Clocks:
    """A clock that only moves forward, and one on the wall that somebody sets."""

    def __init__(self):
        self.now, self.offset = 1000.0, 1.7e9

    def clock(self):
        return self.now

    def wall(self):
        return self.now + self.offset


def restarted(opened, clocks, window_s=60.0):
    counter = Counter(new_replica(), key_window_s=window_s)
    store = opened(counter, start=False, key_window_s=window_s, clock=clocks.clock, wall=clocks.wall)
    return counter, store


def test_a_key_is_known_after_a_restart(opened):
    clocks = Clocks()
    counter, store = restarted(opened, clocks)
    dot = counter.increment_once("k", "x", 5, clocks.now)[:2]
    store._commit()
    store.stop(10)
    clocks.now += 3
    counter, _ = restarted(opened, clocks)
    assert counter.increment_once("k", "x", 5, clocks.now) == (*dot, 5, True)


@pytest.mark.parametrize("change_s", [-86400.0, -30.0, 30.0, 86400.0])
def test_a_wall_clock_that_was_set_makes_no_key_be_forgotten_within_a_window_of_the_start(opened, change_s):
    clocks = Clocks()
    counter, store = restarted(opened, clocks)
    dot = counter.increment_once("k", "x", 5, clocks.now)[:2]
    store._commit()
    store.stop(10)
    clocks.offset += change_s
    counter, store = restarted(opened, clocks)
    for _ in range(6):
        clocks.now += 9.9
        counter.expire(clocks.now)
        store._commit()
        assert counter.increment_once("k", "x", 5, clocks.now) == (*dot, 5, True)
    store.stop(10)
    counter, store = restarted(opened, clocks)
    assert counter.increment_once("k", "x", 5, clocks.now) == (*dot, 5, True)


def test_keys_are_forgotten_in_the_file_as_well(opened, path):
    """After two windows: in the second a use is what a new one of its key renews."""
    clocks = Clocks()
    counter, store = restarted(opened, clocks)
    for number in range(20):
        counter.increment_once(f"k{number}", "x", 5, clocks.now)
        clocks.now += 10
        store._commit()
    with datafile.Reader(path) as reader:
        (delta,) = reader.deltas(clocks.wall())
    assert [sequence for sequence, *_ in delta.keys] == list(range(9, 21))


def test_a_key_taken_by_two_nodes_that_were_down_for_long_counts_once(opened, tmp_path):
    """Each has its use from its own file, and they are older than the window by far."""
    clocks, counters = Clocks(), []
    for name in "ab":
        counter = Counter(new_replica(), key_window_s=60.0)
        store = opened(counter, str(tmp_path / name), False, key_window_s=60.0, clock=clocks.clock, wall=clocks.wall)
        counter.increment_once("k", "x", 5, clocks.now)
        store._commit()
        store.stop(10)
    clocks.now += 86400
    for name in "ab":
        counters.append(Counter(new_replica(), key_window_s=60.0))
        opened(counters[-1], str(tmp_path / name), False, key_window_s=60.0, clock=clocks.clock, wall=clocks.wall)
    clocks.now += 50
    for counter in counters:
        counter.expire(clocks.now)
    for one, other in (counters, counters[::-1]):
        for delta in one.deltas(other.vector(), float("inf"), clocks.now):
            other.merge(delta, clocks.now)
    assert [counter.value("x") for counter in counters] == [5, 5]


# Files of any age, and copies of them, in any order.


class Schedule:
    """A cluster whose nodes crash and start again from files: their own, old ones, copies, those of others."""

    def __init__(self, seed, folder, size=3):
        self.rng, self.folder, self.now = random.Random(seed), folder, 0.0
        self.log = {}  # every dot there ever was: what simulation.check_prefixes() asks for
        self.paths = [str(folder / f"node-{number}.db") for number in range(size)]
        self.backups = []
        self.counters = [self.new_counter() for _ in range(size)]
        self.writers = [self.open_writer(number) for number in range(size)]

    def new_counter(self):
        return Counter(new_replica(self.rng.getrandbits))

    def open_writer(self, number):
        return Writer(self.paths[number], "counter", fsync=False)

    def wall(self):
        """Return what some clock on some wall says: they differ by up to a quarter of the window."""
        return 1.7e9 + self.now + self.rng.uniform(-450, 450)

    def run(self, steps):
        actions = (self.count, 10), (self.send, 10), (self.save, 5), (self.restart, 1), (self.back_up, 1)
        actions, weights = zip(*actions, strict=True)
        for _ in range(steps):
            self.now += self.rng.random()
            self.rng.choices(actions, weights)[0](self.rng.randrange(len(self.counters)))

    def count(self, number):
        name, amount, key = self.rng.choice("abcdef"), self.rng.choice((1, -2, AMOUNT_MAX)), None
        if self.rng.random() < 0.3:
            number_of_key = self.rng.randrange(20)
            name, amount, key = "abcdef"[number_of_key % 6], number_of_key + 1, f"key {number_of_key}"
        simulation.increment(self.counters[number], self.log, name, amount, key, self.now)

    def send(self, number):
        other = self.rng.choice(self.counters)
        for delta in self.counters[number].deltas(other.vector(), self.rng.choice((1, 2**20)), self.now):
            if self.rng.random() < 0.9:
                other.merge(delta, self.now)

    def save(self, number):
        """Save a part of what a file lacks; now and then another node writes to it as well."""
        file = self.rng.choice(self.writers) if self.rng.random() < 0.1 else self.writers[number]
        deltas = self.counters[number].deltas(file.vector, self.rng.choice((1, 2**20)), self.now)
        file.save(deltas, self.wall())

    def back_up(self, number):
        backup = str(self.folder / f"backup-{len(self.backups)}.db")
        with contextlib.closing(sqlite3.connect(self.paths[number])) as db:
            db.execute("VACUUM INTO ?", (backup,))
        self.backups.append(backup)

    def restart(self, number):
        """Start a new process, from the file, another's, a backup, or without any."""
        dice = self.rng.random()
        if dice < 0.3:  # the file goes
            self.writers[number].close()
            os.remove(self.paths[number])
            if dice < 0.2 and self.backups:  # and another takes its place
                shutil.copy(self.rng.choice(self.backups), self.paths[number])
            self.writers[number] = self.open_writer(number)
        self.counters[number] = self.new_counter()
        self.load(self.counters[number], self.paths[number])

    def load(self, counter, path):
        with datafile.Reader(path, "counter") as reader:
            for delta in reader.deltas(self.wall()):
                counter.merge(delta, self.now)
                assert counter.holds(delta.replica, delta.through)
        counter.was_loaded(self.now)

    def settle(self):
        """Let everybody hear of everything, and check it."""
        for _ in range(3):
            for one in self.counters:
                for other in self.counters:
                    for delta in one.deltas(other.vector(), float("inf"), self.now):
                        other.merge(delta, self.now)
        for counter in self.counters:
            simulation.check_prefixes(counter, self.log)
        assert all(counter.vector() == self.counters[0].vector() for counter in self.counters)

    def close(self):
        for writer in self.writers:
            writer.close()


def run_schedule(seed, folder, steps=150):
    schedule = Schedule(seed, folder)
    with contextlib.closing(schedule):
        schedule.run(steps)
        schedule.settle()
        for number, writer in enumerate(schedule.writers):  # every file there is, of any age, into some node
            writer.save(schedule.counters[number].deltas(writer.vector, 1, schedule.now), schedule.wall())
            schedule.load(schedule.rng.choice(schedule.counters), schedule.paths[number])
        for backup in schedule.backups:
            schedule.load(schedule.rng.choice(schedule.counters), backup)
        schedule.settle()
        return schedule


@pytest.mark.parametrize("seed", range(200))
def test_files_of_any_age_and_copies_count_every_increment_once(seed, tmp_path):
    run_schedule(seed, tmp_path)

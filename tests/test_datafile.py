"""Data files by themselves: what is written is what is read, and no damage ever reads as another count."""

import contextlib
import random
import shutil
import sqlite3
import subprocess
import sys

import pytest

from counter import AMOUNT_MAX, Counter, Delta, cancelling_replica, datafile, datawriter, key_digest
from counter.datafile import DataFileError, Reader
from counter.datawriter import Writer

A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "abc")
WALL = 1_700_000_000.0  # seconds since 1970


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "counter.db")


@pytest.fixture
def writer(path):
    with contextlib.closing(Writer(path, "counter", fsync=False)) as writer:
        yield writer


def read(path, wall=WALL, cluster="counter"):
    """Return {replica: Delta} of a whole file."""
    with Reader(path, cluster) as reader:
        return {delta.replica: delta for delta in reader.deltas(wall)}


def everything(counter, now=0):
    """Return {replica: Delta} of a whole counter."""
    return {delta.replica: delta for delta in counter.deltas({}, float("inf"), now)}


def busy_counter(seed=0, counters=300, keys=60):
    """Return a Counter with entries of three replicas, windows, negative and very large totals, keys, cancellations."""
    rng, mine, other = random.Random(seed), Counter(A), Counter(B)
    for counter in (mine, other):
        for number in range(counters // 10):
            counter.increment_once(f"a key of {counter.replica} {number}", f"windowed@{number + 1}d", 3, now=0)
        for number in range(counters):
            counter.increment(f"counter:{number}", rng.choice((1, -5, AMOUNT_MAX)))
        for number in range(keys):
            counter.increment_once(f"key {number if number < 5 else (counter.replica, number)}", "keyed", 7, now=0)
    totals = {"large": (2**61, 2**70 + 1), "small": (2**61 + 1, -(2**63) - 1), "edge": (2**61 + 2, 2**63 - 1)}
    mine.merge(Delta(C, 0, 2**61 + 2, totals), now=0)
    for delta in everything(other).values():
        mine.merge(delta, now=0)
    assert cancelling_replica((B, counters + counters // 10 + 1)) in mine.vector()
    return mine


def test_what_is_written_is_read(path, writer):
    counter = busy_counter()
    writer.save(counter.deltas({}, float("inf"), now=5), WALL)
    assert writer.vector == counter.vector()
    assert read(path, WALL) == everything(counter, now=5)


def test_windows_that_have_ended_leave_the_file_a_part_at_a_time(path, writer, monkeypatch):
    """What is left is whole: also cancellations and keys of what has ended."""
    monkeypatch.setattr(datawriter, "ENDED_AT_ONCE", 7)
    counters = [Counter(replica, wall=lambda: WALL) for replica in (A, B)]
    for counter in counters:
        for number in range(30):
            counter.increment(f"x{number}@{1 + number % 3}h")
        counter.increment_once("k", "k@1h", 5, now=0)
        counter.increment("y@1d")
        counter.increment("z")
    counters[0].merge(counters[1].delta(B, 0, now=0), now=0)
    writer.save(counters[0].deltas({}, float("inf"), now=0), WALL)
    before = read(path)
    assert not writer.end_windows(WALL)
    assert read(path) == before
    horizon, rounds = WALL + 63 * 3600, 1
    while writer.end_windows(horizon):
        rounds += 1
    assert rounds >= 4
    counters[0].end_windows(horizon)
    assert read(path) == everything(counters[0])
    assert writer.vector == counters[0].vector()
    names = {name for delta in read(path).values() for name in delta.totals}
    assert "z" in names and any(name.startswith("x2@3h") for name in names)
    assert not any("@1h" in name for name in names)
    assert not writer.end_windows(horizon)
    while writer.end_windows(WALL + 10**9):
        pass
    counters[0].end_windows(WALL + 10**9)
    assert read(path) == everything(counters[0])


def test_cancellations_are_read_last(path, writer):
    writer.save(busy_counter().deltas({}, float("inf"), now=0), WALL)
    writer.save([Delta("dddddddd-dddd-8ddd", 0, 1, {"x": (1, 1)})], WALL)
    cancelling = [bool(delta.requires) for delta in read(path).values()]
    assert cancelling == sorted(cancelling)
    assert any(cancelling)


def test_many_small_commits_make_the_same_file_as_one(path, writer):
    rng, counter = random.Random(1), Counter(A)
    for number in range(300):
        counter.increment(f"counter-{rng.randrange(20)}", rng.choice((1, 2, -7, AMOUNT_MAX)))
        if rng.random() < 0.3:
            counter.increment_once(f"key {number}", "keyed", 1, now=0)
        if rng.random() < 0.5:
            writer.save(counter.deltas(writer.vector, float("inf"), now=0), WALL)
    writer.save(counter.deltas(writer.vector, float("inf"), now=0), WALL)
    assert read(path) == everything(counter)


def test_entries_are_written_in_pieces(path, writer, monkeypatch):
    monkeypatch.setattr(datawriter, "PIECE", 7)
    counter = busy_counter()
    for after in (100, 0):  # cut further back than what is held, the second time
        writer.save([counter.delta(A, 0, now=0)] if after == 100 else counter.deltas({}, float("inf"), now=0), WALL)
        counter.increment("counter:3")
    writer.save(counter.deltas({A: 50}, float("inf"), now=0), WALL)
    assert read(path) == everything(counter)


@pytest.mark.parametrize(
    "delta",
    [
        Delta(A, 0, 5, {"x": (5, 100)}),  # held
        Delta(A, 3, 4, {"x": (4, 100)}),
        Delta(A, 6, 8, {"x": (8, 100)}),  # a gap
        Delta(C, 0, 1, {"x": (1, -1)}, (), ((A, 5), (B, 1))),  # it requires what is not held
        Delta(C, 0, 1, {"x": (1, -1)}, (), ((A, 6), (A, 5))),
    ],
)
def test_what_a_counter_would_not_merge_a_file_does_not_take(path, writer, delta):
    writer.save([Delta(A, 0, 5, {"x": (5, 9)})], WALL)
    writer.save([delta], WALL)
    assert read(path) == {A: Delta(A, 0, 5, {"x": (5, 9)})}
    assert writer.vector.get(delta.replica, 0) == (5 if delta.replica == A else 0)


def test_a_cancellation_may_come_with_what_it_requires(path, writer):
    deltas = [Delta(A, 0, 1, {"x": (1, 3)}), Delta(B, 0, 1, {"x": (1, 3)}),
              Delta(C, 0, 1, {"x": (1, -3)}, (), ((A, 1), (B, 1)))]  # fmt: skip
    writer.save(deltas, WALL)
    assert list(read(path).values()) == deltas


def test_a_transaction_that_fails_leaves_nothing(path, writer, monkeypatch):
    writer.save([Delta(A, 0, 5, {"x": (5, 9)})], WALL)
    monkeypatch.setattr(datawriter, "_WRITE_KEYS", "no SQL")
    key = (6, key_digest("k"), "x", 1, 0.0)
    with pytest.raises(sqlite3.Error):
        writer.save([Delta(B, 0, 1, {"y": (1, 1)}), Delta(A, 5, 6, {"x": (6, 10)}, (key,))], WALL)
    assert writer.vector == {A: 5}
    assert read(path) == {A: Delta(A, 0, 5, {"x": (5, 9)})}
    monkeypatch.undo()
    writer.save([Delta(A, 5, 6, {"x": (6, 10)}, (key,))], WALL)
    assert read(path) == {A: Delta(A, 0, 6, {"x": (6, 10)}, (key,))}


def test_two_writers_of_one_file_keep_to_the_rules(path, writer):
    """The lock keeps nodes from it; without, each asks the file what it holds, within its transaction."""
    with contextlib.closing(Writer(path, "counter", fsync=False)) as other:
        writer.save([Delta(A, 0, 5, {"x": (5, 9)})], WALL)
        other.save([Delta(A, 0, 3, {"x": (3, 4)}), Delta(B, 0, 1, {"x": (1, 1)})], WALL)
        assert other.vector == {A: 5, B: 1}
        writer.save([Delta(B, 0, 2, {"x": (2, 2)}), Delta(A, 5, 6, {"x": (6, 10)})], WALL)
        assert writer.vector == {A: 6, B: 2}
    assert read(path) == {A: Delta(A, 0, 6, {"x": (6, 10)}), B: Delta(B, 0, 2, {"x": (2, 2)})}


def test_the_ages_of_keys_follow_the_wall_clock(path, writer):
    keys = tuple((sequence, key_digest(str(sequence)), "x", 1, age_s) for sequence, age_s in ((1, 10.0), (2, 2.5)))
    writer.save([Delta(A, 0, 2, {"x": (2, 2)}, keys)], WALL)

    def ages(wall):
        return [age_s for *_, age_s in read(path, wall)[A].keys]

    assert ages(WALL) == [10.0, 2.5]
    assert ages(WALL + 3600) == [3610.0, 3602.5]
    assert ages(WALL - 5) == [5.0, 0.0]  # set back: keys are kept longer
    assert ages(0.0) == [0.0, 0.0]
    assert ages(WALL + 1e11) == [datafile.AGE_MAX_S / 2] * 2


def test_a_use_that_renews_others_is_written_with_them(path, writer):
    key = (2, key_digest("k"), "x", 1, 0.0, ((A, 1), (B, 7)))
    writer.save([Delta(A, 0, 2, {"x": (2, 2)}, (key,))], WALL)
    assert read(path)[A].keys == (key,)


def test_keys_are_forgotten_by_their_time(path, writer):
    def key(sequence, age_s):
        return sequence, key_digest(f"{sequence}"), "x", 1, age_s

    writer.save([Delta(A, 0, 3, {"x": (3, 3)}, (key(1, 90.0), key(2, 50.0), key(3, 10.0)))], WALL)
    writer.save([Delta(B, 0, 1, {"x": (1, 1)}, (key(1, 70.0),))], WALL)
    writer.forget_keys(WALL - 60)
    assert {id: [sequence for sequence, *_ in delta.keys] for id, delta in read(path).items()} == {A: [2, 3], B: []}
    writer.close()
    with contextlib.closing(Writer(path, "counter")) as again:
        again.forget_keys(WALL)
    assert not any(delta.keys for delta in read(path).values())


def test_what_was_committed_is_on_the_disk_after_a_crash(path):
    """And what a process wrote that was killed is in the file itself once another has opened it."""
    subprocess.run([sys.executable, "-c", f"""if True:
        import os
        from counter import Delta
        from counter.datawriter import Writer
        writer = Writer({path!r}, "counter")
        for sequence in range(1, 6):
            writer.save([Delta({A!r}, sequence - 1, sequence, {{"x": (sequence, sequence)}})], {WALL})
        os._exit(0)"""], cwd=datafile.Path(__file__).parent.parent, check=True)  # fmt: skip
    assert read(path) == {A: Delta(A, 0, 5, {"x": (5, 5)})}
    with contextlib.closing(Writer(path, "counter")) as writer:
        assert writer.vector == {A: 5}
        shutil.copy(path, f"{path}-copy")  # without its log
    assert read(f"{path}-copy") == {A: Delta(A, 0, 5, {"x": (5, 5)})}


def test_a_file_that_is_moved_away_or_replaced_is_noticed(path, writer, tmp_path):
    writer.save([Delta(A, 0, 1, {"x": (1, 1)})], WALL)
    shutil.move(path, tmp_path / "elsewhere")
    with pytest.raises(DataFileError, match="was moved away, or replaced"):
        writer.save([Delta(A, 1, 2, {"x": (2, 2)})], WALL)
    assert writer.vector == {A: 1}
    Writer(str(tmp_path / "other"), "counter").close()
    shutil.move(tmp_path / "other", path)
    with pytest.raises(DataFileError, match="was moved away, or replaced"):
        writer.check_in_place()
    writer.close()
    assert read(path) == {}  # what was written for the other has not got into this one


@pytest.mark.parametrize("lost", ["-wal"])
def test_a_log_that_is_taken_away_is_noticed(path, writer, lost):
    writer.save([Delta(A, 0, 1, {"x": (1, 1)})], WALL)
    datafile.os.remove(path + lost)
    with pytest.raises(DataFileError, match="was moved away, or replaced"):
        writer.save([Delta(A, 1, 2, {"x": (2, 2)})], WALL)


def test_a_backup_is_made_beside_an_open_writer(path, writer, tmp_path):
    counter = busy_counter()
    writer.save(counter.deltas({}, float("inf"), now=0), WALL)
    backup = str(tmp_path / "backup.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", (backup,))
    writer.save([Delta("dddddddd-dddd-8ddd", 0, 1, {"x": (1, 1)})], WALL)
    assert read(backup) == everything(counter)
    with contextlib.closing(Writer(backup, "counter")) as writer:  # it can be written to as well
        writer.save([Delta("dddddddd-dddd-8ddd", 0, 1, {"x": (1, 1)})], WALL)
    assert read(backup) == read(path)


def test_a_transaction_that_a_crash_interrupted_without_a_log_is_rolled_back(path, tmp_path):
    """It has a journal instead, where a backup was about to get its log."""
    right = written(path)
    cut_short = str(tmp_path / "cut-short.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in (
            "PRAGMA journal_mode = DELETE",
            "PRAGMA cache_size = 1",
            "BEGIN",
            "UPDATE entry SET total = 0",
        ):
            db.execute(statement)
        for suffix in ("", "-journal"):
            shutil.copy(path + suffix, cut_short + suffix)
    assert read(cut_short) == right


# What is not a data file, or not one of these.


def test_there_is_a_file_or_none(path, writer):
    assert datafile.exists(path)
    assert not datafile.exists(f"{path}-absent")
    open(f"{path}-empty", "w").close()
    assert not datafile.exists(f"{path}-empty")


@pytest.mark.parametrize("content", [b"x", b"not a database at all" * 500, b"SQLite format 3\0", b"\0" * 8192])
def test_what_is_no_data_file_is_refused_and_stays(path, content):
    with open(path, "wb") as file:
        file.write(content)
    for user in (lambda: Writer(path, "counter"), lambda: datafile.exists(path)):
        with pytest.raises(DataFileError, match="is not a data file of a counter node") as raised:
            user()
        assert raised.value.status == 1
    with open(path, "rb") as file:
        assert file.read() == content


def test_the_database_of_another_program_is_refused(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t(x)")
    with pytest.raises(DataFileError, match="is not a data file of a counter node"):
        Writer(path, "counter")


def test_a_log_without_its_file_is_refused(path, writer):
    """SQLite would throw it away."""
    writer.save([Delta(A, 0, 1, {"x": (1, 1)})], WALL)
    shutil.copy(f"{path}-wal", f"{path}-other-wal")
    with pytest.raises(DataFileError, match="put the file back"):
        Writer(f"{path}-other", "counter")


def test_a_file_of_another_cluster_or_a_newer_version_is_refused(path, writer):
    writer.close()
    for refused in (lambda: Writer(path, "other"), lambda: Reader(path, "other")):
        with pytest.raises(DataFileError, match="is of the cluster 'counter', not of 'other'") as raised:
            refused()
        assert raised.value.status == 2
    with Reader(path) as reader:
        assert reader.cluster == "counter"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {datafile.FORMAT + 1}")
    for refused in (lambda: Writer(path, "counter"), lambda: Reader(path, "counter")):
        with pytest.raises(DataFileError, match="newer version") as raised:
            refused()
        assert raised.value.status == 2


def test_a_lock_is_held_by_one(path):
    with datafile.lock(path):
        with pytest.raises(DataFileError, match="is in use by another process") as raised:
            datafile.lock(path)
        assert raised.value.status == 1
    datafile.lock(path).close()
    with pytest.raises(DataFileError, match="No such file or directory"):
        datafile.lock("/nowhere/at/all")


# Damage.


def outcome(path):
    """Return what loading a file comes to: its deltas, or None if it is refused in one line."""
    try:
        return read(path)
    except DataFileError as error:
        assert len(str(error).splitlines()) == 1
        assert error.status in (1, 2)
        return None


def written(path):
    """Write a file with pages of all kinds; return what is in it."""
    counter = busy_counter()
    with contextlib.closing(Writer(path, "counter", fsync=False)) as writer:
        for _ in range(2):
            writer.save(counter.deltas(writer.vector, float("inf"), now=0), WALL)
            for number in range(0, 400, 2):
                counter.increment(f"counter:{number}", -(10**12))
        writer.forget_keys(WALL - 1)
    return read(path)


def flip(source, target, position, bit):
    content = bytearray(source)
    content[position] ^= 1 << bit
    with open(target, "wb") as file:
        file.write(content)


def test_a_flipped_bit_is_noticed_or_does_no_harm(path, tmp_path):
    right, rng, refused = written(path), random.Random(3), 0
    with open(path, "rb") as file:
        whole = file.read()
    positions = [*range(0, 108, 2), *range(100, 4096, 97), *(rng.randrange(len(whole)) for _ in range(250))]
    for position in positions:
        flip(whole, tmp_path / "flipped.db", position, rng.randrange(8))
        loaded = outcome(str(tmp_path / "flipped.db"))
        assert loaded in (None, right), position
        refused += loaded is None
    assert len(whole) > 10 * 4096
    assert refused > len(positions) / 3


def test_a_file_cut_short_is_refused(path, tmp_path):
    right = written(path)
    with open(path, "rb") as file:
        whole = file.read()
    for size in (*range(1, 200, 13), *range(512, len(whole), 1531), len(whole) - 1):
        (tmp_path / "cut.db").write_bytes(whole[:size])
        assert outcome(str(tmp_path / "cut.db")) in (None, right), size
        if size < 4096:
            assert outcome(str(tmp_path / "cut.db")) is None


def test_a_page_of_an_older_time_is_noticed(path, tmp_path):
    """Each row is right by itself, and SQLite finds nothing wrong with the page."""
    counter, pages, refused = Counter(A), 0, 0
    with contextlib.closing(Writer(path, "counter", fsync=False)) as writer:
        for _ in range(3):  # from the second on all numbers are of the same length
            for number in range(500):
                counter.increment(f"counter-{number:04d}")
            writer.save(counter.deltas(writer.vector, float("inf"), now=0), WALL)
            writer._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            shutil.copy(path, tmp_path / f"{writer.vector[A]}.db")
    old, new = ((tmp_path / f"{through}.db").read_bytes() for through in (1000, 1500))
    assert len(old) == len(new)
    for start in range(4096, len(new), 4096):
        if new[start : start + 4096] != old[start : start + 4096]:
            mixed = new[:start] + old[start : start + 4096] + new[start + 4096 :]
            (tmp_path / "mixed.db").write_bytes(mixed)
            pages, refused = pages + 1, refused + (outcome(str(tmp_path / "mixed.db")) is None)
    assert pages == refused
    assert pages > 3


@pytest.mark.parametrize("table", ["entry", "accepted"])
def test_a_row_that_is_missing_is_noticed(path, table):
    written(path)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        assert db.execute(f"DELETE FROM {table} WHERE replica = 1 AND name = 'keyed' AND sequence = 390").rowcount
    assert outcome(path) is None


def test_a_damaged_log_is_an_older_state(path, writer, tmp_path):
    """SQLite ends its log at the first frame that is not right: what peers bring again."""
    counter, states, rng = Counter(A), [{}], random.Random(4)
    for number in range(12):
        for _ in range(30):
            counter.increment(f"counter-{rng.randrange(60)}", rng.choice((1, -2)))
        counter.increment_once(f"key {number}", "keyed", 1, now=0)
        writer.save(counter.deltas(writer.vector, float("inf"), now=0), WALL)
        states.append(read(path))
    with open(f"{path}-wal", "rb") as file:
        log = file.read()
    copy, older = str(tmp_path / "copy.db"), 0
    for number in range(150):
        shutil.copy(path, copy)
        with contextlib.suppress(FileNotFoundError):
            datafile.os.remove(f"{copy}-shm")
        if number % 3:
            flip(log, f"{copy}-wal", rng.randrange(len(log)), rng.randrange(8))
        else:
            with open(f"{copy}-wal", "wb") as file:
                file.write(log[: rng.randrange(len(log))])
        loaded = outcome(copy)
        assert loaded in states
        older += loaded != states[-1]
    assert older > 100


def test_the_log_of_another_file_is_noticed(path, writer, tmp_path):
    """Where a backup was put in the place of a file whose log was left, after a kill."""
    counter, rng, backup, refused = Counter(A), random.Random(5), str(tmp_path / "backup.db"), 0
    for number in range(40):
        for _ in range(40):
            counter.increment(f"counter-{rng.randrange(2000)}")
        writer.save(counter.deltas(writer.vector, float("inf"), now=0), WALL)
        if number % 8 == 0:
            writer._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log begins anew
        if number == 20:
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute("VACUUM INTO ?", (backup,))
        if number > 20:
            copy = str(tmp_path / f"copy-{number}.db")
            shutil.copy(backup, copy)
            shutil.copy(f"{path}-wal", f"{copy}-wal")
            loaded = outcome(copy)
            assert loaded in (None, read(path), read(backup))
            refused += loaded is None
    assert refused

"""What is left of a replica that ended: wills, absorption, and that neither ever makes a count wrong."""

import contextlib
import json
import sqlite3
import tracemalloc

import pytest
from absorption_schedules import BREAKS, File, Schedule, Wrong, try_many
from halves import A_SENDS, NOBODY, A, B, C

from counter import HELD, Counter, Delta, Ended, datafile, dump, new_replica, wire
from counter.absorption import Absorptions
from counter.checks import checked_delta
from counter.datafile import Reader
from counter.datawriter import Writer
from counter.wire import Message, decode, encode

D = "dddddddd-dddd-8ddd"
ALL = float("inf")


def give(sender, receiver, now=0.0):
    """Have a counter merge all that another holds."""
    for delta in sender.deltas(receiver.vector(), ALL, now):
        receiver.merge(delta, now)


def ended(replica=A, heir=B, names="xxy"):
    """Return a counter that has counted each of these names, and ended."""
    counter = Counter(replica)
    for name in names:
        counter.increment(name)
    assert counter.end(heir)
    return counter


def absorbing(replica=B, other=A, **options):
    """Return a counter that has absorbed another replica, which counted x twice and y once."""
    counter = Counter(replica)
    counter.increment("x", 10)
    give(ended(other, replica, **options), counter)
    assert counter.absorb() == other
    return counter


def state(counter):
    return {delta.replica: delta for delta in counter.deltas({}, ALL, 0)}


# Wills.


def test_a_will_is_one_more_dot_that_touches_nothing():
    counter = ended()
    assert counter.vector() == {A: 4}
    assert counter.value("x") == 2
    assert counter.delta(A, 3, 0) == Delta(A, 3, 4, {}, heir=B)
    assert counter.delta(A, 0, 0) == Delta(A, 0, 4, {"x": (2, 2), "y": (3, 1)}, heir=B)


def test_after_its_will_a_replica_counts_nothing():
    counter = ended()
    for count in (
        lambda: counter.increment("x"),
        lambda: counter.increment_once("k", "x", 1, 0),
        lambda: counter.increment_many({"x": 1, "new": 1}),
        lambda: counter.increment_many_once("k", {"x": 1}, 0),
    ):
        with pytest.raises(Ended):
            count()
    assert counter.list("", "", 9) == ({"x": 2, "y": 1}, None)
    assert counter.sizes() == (2, 0)
    assert not counter.end(C)
    assert counter.delta(A, 3, 0).heir == B


def test_a_key_that_is_known_is_still_answered():
    counter = Counter(A)
    counter.increment_once("k", "x", 1, 0)
    counter.end(B)
    assert counter.increment_once("k", "x", 1, 1) == (A, 1, 1, True)


def test_a_replica_that_counted_nothing_leaves_nothing():
    counter = Counter(A)
    give(ended(B, C), counter)
    assert not counter.end(C)
    assert A not in counter.vector()
    assert counter.increment("x") == (A, 1, 3)


# Absorption.


def test_the_heir_counts_all_of_it_as_its_own():
    counter = absorbing()
    assert counter.vector() == {B: 5}
    assert counter.list("", "", 9) == ({"x": 12, "y": 1}, None)
    assert state(counter) == {B: Delta(B, 0, 5, {"x": (5, 12), "y": (5, 1)}, absorbed={A: (4, B, 5, 5)})}
    assert counter.holds(A, 4)
    assert not counter.holds(A, 5)
    assert counter.increment("y") == (B, 6, 2)
    assert counter.delta(B, 5, 0) == Delta(B, 5, 6, {"y": (6, 2)})
    assert counter.accepted == 2


def test_nobody_else_absorbs_it():
    counter = Counter(C)
    counter.increment("x")
    give(ended(), counter)
    assert counter.absorb() is None
    assert counter.vector() == {C: 1, A: 4}


def test_the_heir_of_the_heir_absorbs_it():
    heir = Counter(B)
    heir.increment("x", 10)
    give(ended(), heir)
    heir.end(C)
    assert heir.absorb() is None  # that would be one more dot
    counter = Counter(C)
    give(heir, counter)
    assert [counter.absorb(), counter.absorb(), counter.absorb()] == [B, A, None]
    assert counter.vector() == {C: 6}
    assert counter.list("", "", 9) == ({"x": 12, "y": 1}, None)


def test_what_the_absorbed_had_absorbed_comes_along():
    heir, late = absorbing(), ended()
    heir.end(C)
    counter = Counter(C)
    give(heir, counter)
    assert counter.absorb() == B
    assert state(counter)[C].absorbed == {A: (4, B, 5, 6), B: (6, C, 6, 6)}
    assert counter.merge(late.delta(A, 0, 0), 0) == HELD
    assert counter.value("x") == 12
    assert counter.carriers(A, 4) == [(A, 4), (B, 5), (C, 6)]
    assert counter.carriers(A, 5) == [(A, 5)]


def test_who_holds_any_part_of_it_drops_it():
    whole = ended()
    for through in (0, 1, 2, 3, 4):
        counter, absorbed = Counter(C), absorbing()
        counter.increment("x", 100)
        for sequence, totals in enumerate(({"x": (1, 1)}, {"x": (2, 2)}, {"y": (3, 1)}), 1):
            if sequence <= through:
                counter.merge(Delta(A, sequence - 1, sequence, totals), 0)
        if through == 4:
            give(whole, counter)
        give(absorbed, counter)
        assert counter.vector() == {C: 1, B: 5}
        assert counter.list("", "", 9) == ({"x": 112, "y": 1}, None)
        assert counter.merge(whole.delta(A, 0, 0), 0) == HELD
        assert counter.value("x") == 112
        assert counter.holds(A, 4)


def test_it_is_not_absorbed_while_one_of_its_keys_is_remembered():
    counter, heir = Counter(A, key_window_s=10), Counter(B, key_window_s=10)
    counter.increment_once("k", "x", 1, 0)
    counter.end(B)
    give(counter, heir)
    assert heir.absorb() is None
    assert heir.increment_once("k", "x", 1, 5) == (A, 1, 1, True)
    heir.expire(21)
    assert heir.absorb() == A


def test_those_that_are_to_be_kept_are():
    heir = Counter(B)
    give(ended(), heir)
    assert heir.absorb(kept={A}) is None
    assert heir.absorb(kept={C}) == A


def test_a_dot_of_an_absorbed_replica_can_be_cancelled():
    """Who loaded its keys late remembers them longer than its heir."""
    heir, late = Counter(B, key_window_s=10), Counter(C, key_window_s=10)
    counter = Counter(D, key_window_s=10)
    counter.increment_once("k", "x", 5, 0)
    late.was_loaded(0)
    late.increment_once("k", "x", 5, 0)
    counter.end(B)
    for other in (heir, late):
        give(counter, other)
    heir.expire(30)
    assert heir.absorb() == D
    give(heir, late, 30)
    give(late, heir, 30)
    assert late.value("x") == heir.value("x") == 5
    assert late.vector() == heir.vector()


def test_its_own_id_absorbed_means_that_it_was_used_twice():
    clone, heir = Counter(A), absorbing()
    clone.increment("x", 7)
    give(heir, clone)
    assert clone.replica not in (A, B)
    assert clone.vector() == {B: 5}
    assert clone.value("x") == 12
    assert clone.increment("x") == (clone.replica, 1, 13)


def test_one_that_ended_may_hear_that_it_was_absorbed():
    counter, heir = ended(), absorbing()
    give(heir, counter)
    assert counter.replica == A
    assert counter.vector() == {B: 5}
    assert counter.delta(A, 0, 0) is None
    assert not counter.renew_if_cloned({A: 4})
    assert counter.list("", "", 9) == ({"x": 12, "y": 1}, None)
    with pytest.raises(Ended):
        counter.increment("x")


def test_an_id_that_was_given_up_is_not_absorbed():
    counter = Counter(A)
    counter.increment("x")
    counter.renew(A)
    assert counter.absorb() is None
    counter.increment("x")
    counter.end(B)
    heir = Counter(B)
    give(counter, heir)
    assert [heir.absorb(), heir.absorb()] == [counter.replica, None]
    assert heir.vector() == {A: 1, B: 2}


@pytest.mark.parametrize("ended_first", [False, True])
def test_windows_are_absorbed_and_end_as_ever(ended_first):
    """Also where their entries are gone before the replica is absorbed, and their numbers are given out again."""
    hour = 500 * 3600.0
    counter, heir, other = (Counter(replica, wall=lambda: hour) for replica in (A, B, C))
    for name in ("v@1h:1", "x", "v@1h:1"):
        counter.increment(name)
    counter.end(B)
    give(counter, heir)
    give(counter, other)
    if ended_first:
        heir.end_windows(hour + 3 * 3600)
        heir.increment("new", 7)
    assert heir.absorb() == A
    assert heir.value("v@1h:1") == (0 if ended_first else 2)
    assert ("v@1h:1/500" in heir.delta(B, 0, 0).totals) is not ended_first
    give(heir, other)
    for each in (heir, other):
        each.end_windows(hour + 3 * 3600)
        each.increment("new", 7)
    give(heir, other)
    give(other, heir)
    assert state(heir) == state(other)
    assert heir.delta(B, 0, 0).totals.keys() == {"x", "new"}
    assert heir.value("x") == other.value("x") == 1
    assert heir.value("new") == other.value("new")
    assert heir.held_windows == other.held_windows == 0


# What vectors say.


def test_what_was_absorbed_is_not_lacking():
    counter = absorbing()
    assert not counter.lacks(counter.vector(), {A: 4, B: 5})
    assert counter.lacks(counter.vector(), {A: 5})
    assert counter.lacks({B: 4}, {A: 4})
    assert not counter.lacks({B: 5}, {A: 4})
    assert not counter.lacks({A: 4}, {A: 4})
    assert counter.lacks({}, {C: 1})


def test_absorbed_replicas_of_a_vector_are_told():
    assert absorbing().absorbed({A: 2, B: 1, C: 7}) == {A: 4}


def test_who_waits_for_a_dot_is_woken_when_its_replica_comes_absorbed():
    import threading

    counter, waits = Counter(C), threading.Event()
    result = []

    def wait():
        waits.set()
        result.append(counter.wait_until_held(A, 4, 60))

    thread = threading.Thread(target=wait)
    thread.start()
    waits.wait(10)
    give(absorbing(), counter)
    thread.join(10)
    assert result == [True]


# As bytes.


def some_facts(number=250):
    return {f"{place:08x}-1111-8111": (place + 1, D, 7, 5000) for place in range(number)}


def test_it_survives_the_journey():
    will = Delta(A, 3, 4, {}, heir=B)
    few = Delta(B, 0, 5000, {"x": (5000, 12), "y": (5000, 1), "z": (2, 5)}, absorbed=some_facts(3))
    many = few._replace(absorbed=some_facts(), totals={f"x{number}": (5000, 1) for number in range(2000)})
    for deltas in ([will, few], [will, many, few]):
        message = Message(A_SENDS, NOBODY, None, None, None, deltas)
        assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "changed",
    [
        {"heir": "x"},
        {"heir": A},
        {"heir": 7},
        {"heir": B, "requires": [[B, 1], [C, 1]]},
        {"absorbed": {"x": [4, D, 1, 3]}},
        {"absorbed": {A: [4, D, 1, 3]}},
        {"absorbed": {B: [0, D, 1, 3]}},
        {"absorbed": {B: [4, "x", 1, 3]}},
        {"absorbed": {B: [4, D, 0, 3]}},
        {"absorbed": {B: [4, D, 1, 1]}},
        {"absorbed": {B: [4, D, 1, 4]}},
        {"absorbed": {B: [4, D, 1]}},
        {"absorbed": [B]},
        {"absorbed": {B: [4, D, 1, 2]}, "totals": {"x": [3, 5], "y": [3, 1]}},
    ],
)
def test_an_impossible_one_is_refused(changed):
    fields = {"replica": A, "after": 1, "through": 3, "totals": {"x": [3, 5]}}
    message = {"v": 2, "from": A_SENDS._asdict(), "deltas": [fields | changed]}
    decode([json.dumps(message | {"deltas": [fields]}).encode()])
    with pytest.raises(ValueError):
        decode([json.dumps(message).encode()])


def test_an_export_has_it(monkeypatch):
    monkeypatch.setattr(dump, "PIECE", 2)
    deltas = [Delta(A, 0, 4, {"x": (2, 2)}, heir=B), Delta(C, 0, 5000, {"x": (5000, 12)}, absorbed=some_facts(3))]
    lines = [line for line, _ in dump.export_lines("counter", deltas, 2, 0)]
    assert list(dump.read_export(lines, "counter", 0, lambda *_: None)) == deltas


# In a file.


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "counts.db")


def read(path):
    with Reader(path) as reader:
        return {delta.replica: delta for delta in reader.deltas(0)}


def test_a_file_takes_it_and_drops_what_was_absorbed(path):
    counter, heir = ended(), absorbing()
    file = File(path)
    give(counter, file)
    assert read(path) == state(counter)
    give(heir, file)
    assert file.vector() == {B: 5}
    file.merge(counter.delta(A, 0, 0), 0)
    assert file.vector() == {B: 5}
    assert read(path) == state(heir)
    heir.end(C)
    last = Counter(C)
    give(heir, last)
    last.absorb()
    give(last, file)
    assert read(path) == state(last)
    file.close()
    with sqlite3.connect(path) as db:
        left = [db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("replica", "entry", "heir", "absorbed")]
    db.close()
    assert left == [1, 2, 0, 2]
    with contextlib.closing(File(path)) as file:
        assert file.vector() == {C: 6}


def test_damage_to_it_is_seen(path):
    give(absorbing(), file := File(path))
    give(ended(D, C), file)
    file.close()
    for change in ("UPDATE absorbed SET final = 5", "DELETE FROM absorbed", f"UPDATE heir SET id = '{A}'"):
        with sqlite3.connect(path) as db:
            db.execute(change)
            with pytest.raises(datafile.DataFileError, match="damaged"):
                read_with(db, path)
            db.rollback()
        db.close()
    assert read(path).keys() == {B, D}


def read_with(db, path):
    reader = Reader(path)
    reader._db.close()
    reader._db = db
    return list(reader.deltas(0))


FORMAT_1 = """\
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE replica(number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, applied INTEGER NOT NULL,\
 requires TEXT, checksum INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE entry(replica INTEGER, name TEXT, sequence INTEGER, total, crc INTEGER,\
 PRIMARY KEY(replica, name)) WITHOUT ROWID;
CREATE TABLE accepted(replica INTEGER, sequence INTEGER, digest TEXT, name TEXT, amount INTEGER,\
 at INTEGER, renews TEXT, crc INTEGER, PRIMARY KEY(replica, sequence)) WITHOUT ROWID;
ATTACH ? AS present;
INSERT INTO meta SELECT * FROM present.meta;
INSERT INTO replica SELECT * FROM present.replica;
INSERT INTO entry SELECT replica, name, sequence, total, crc FROM present.entry;
INSERT INTO accepted SELECT * FROM present.accepted"""


def old_file(path, counter):
    """Make a data file as nodes made it that knew format 1."""
    present = f"{path}-present"
    with contextlib.closing(Writer(present, "counter")) as writer:
        writer.save(counter.deltas({}, ALL, 0), 0)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA application_id = {datafile.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
        for statement in FORMAT_1.split(";\n"):
            db.execute(statement, (present,) * statement.count("?"))


def user_version(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_a_file_of_the_format_before_is_read_and_becomes_one_of_this(path):
    counter = Counter(A)
    counter.increment("x", 7)
    old_file(path, counter)
    assert read(path) == state(counter)
    assert user_version(path) == 1
    give(absorbing(C, B), file := File(path))
    assert read(path).keys() == {A, C}
    assert file.vector() == {A: 1, C: 5}
    file.close()
    assert user_version(path) == datafile.FORMAT


# Memory.


def test_a_fact_takes_less_than_120_bytes():
    facts = {new_replica(): (1000, new_replica(), 7, 9) for _ in range(10_000)}
    deltas = [Delta(A, 8, 9, {"x": (9, 1)}, absorbed=facts)]
    counter = Counter(B)
    counter.merge(Delta(A, 0, 8, {"x": (8, 1)}), 0)
    assert all(checked_delta(delta).absorbed == facts for delta in deltas)
    tracemalloc.start()
    try:
        counter.merge(deltas.pop(), 0)
        bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counter.holds(next(reversed(facts)), 1000)
    assert bytes < 120 * len(facts)


def test_facts_that_go_in_circles_end():
    absorptions = Absorptions()
    change, rows = absorptions.prepare(A, {B: (9, C, 1, 1), C: (9, B, 1, 1)})
    absorptions.inside[A] = rows
    assert change
    assert len(absorptions.carriers(B, 1)) == 3


# All of it at random.


@pytest.mark.parametrize("first", range(0, 300, 30))
def test_random_schedules(first):
    """Also with restarts from files of any age, copies of them, and late messages."""
    wrong, done = try_many(range(first, first + 30), steps=500)
    assert not wrong
    assert min(done[what] for what in ("wills", "absorbed", "backups_used", "cancellations")) > 30


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_with_data_files(seed, tmp_path):
    files = []

    def new_file():
        files.append(File(str(tmp_path / f"{len(files)}.db")))
        return files[-1]

    try:
        done = Schedule(seed, 500, new_file=new_file).run()
    finally:
        for file in files:
            file.close()
    assert done["wills"]


@pytest.mark.parametrize("rule", BREAKS)
def test_each_broken_rule_is_found(rule):
    for seed in range(5000, 5060):
        try:
            Schedule(seed, broken=rule).run()
        except (Wrong, KeyError, ValueError):
            return
    pytest.fail("it was not found")


def test_versions_of_messages_say_who_understands_wills():
    assert wire.VERSION >= wire.ABSORBING > 1

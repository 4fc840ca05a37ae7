"""Writing deltas to a data file."""

import contextlib
import itertools
import json
import sqlite3

from counter import datafile
from counter.datafile import (
    DataFileError,
    absorbed_crc,
    ends_at,
    entry_crc,
    identity,
    key_crc,
    log_of,
    replica_crc,
    seed_crc,
)
from counter.ids import SEQUENCE_MAX

PIECE = 500  # rows written by one statement: no other Python thread runs while their JSON is made
ENDED_AT_ONCE = 10_000  # windows dropped in one transaction
LOG_SIZE = 16 * 2**20  # bytes to which SQLite cuts its log back after a large transaction

# One statement for many rows: executemany takes and gives the GIL once a row, and beside two busy
# threads took 25 s for what these do in 0.1 s.
_OLD_CRCS = """
SELECT coalesce(sum(entry.crc), 0)
FROM json_each(?) AS new CROSS JOIN entry ON entry.replica = ? AND entry.name = new.key"""
_WRITE_ENTRIES = """
INSERT INTO entry SELECT ?, key, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
json_extract(value, '$[3]')
FROM json_each(?) WHERE true
ON CONFLICT DO UPDATE SET sequence = excluded.sequence, total = excluded.total, crc = excluded.crc"""
_WRITE_KEYS = """
INSERT INTO accepted SELECT ?, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'), json_extract(value, '$[6]')
FROM json_each(?)"""
_DROP = [
    f"DELETE FROM {table} WHERE {column} = ?"
    for table, column in (
        ("entry", "replica"), ("accepted", "replica"), ("heir", "replica"), ("absorbed", "replica"),
        ("replica", "number"),
    )
]  # fmt: skip

_ENDED = "SELECT replica, name, crc FROM entry WHERE ends <= ? ORDER BY ends, replica, name LIMIT ?"


class Writer:
    """A data file that takes deltas; made if there is none.  For one thread.

    `vector` is what the file holds, {replica: sequence}, of committed transactions only.  Raises
    sqlite3.Error, OSError or DataFileError where something fails; then nothing of the transaction holds.
    """

    def __init__(self, path, cluster, fsync=True):
        if not datafile.exists(path):
            datafile.create(path, cluster)
        self._path = path
        self._db = datafile.connect(path, "mode=rw")
        try:
            _, version = datafile.check(self._db, path, cluster)
            # A file that VACUUM INTO made has no log yet.  Sync FULL: what was committed survives a power cut.
            (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise DataFileError(path, "cannot have a log beside it (SQLite's WAL)")
            for pragma in (
                f"synchronous = {'FULL' if fsync else 'NORMAL'}", "fullfsync = 1", "checkpoint_fullfsync = 1",
                f"journal_size_limit = {LOG_SIZE}",
            ):  # fmt: skip
                self._db.execute(f"PRAGMA {pragma}")
            # What a process wrote that crashed or failed may be in the log, and not yet on the disk.
            _, frames, copied = self._db.execute("PRAGMA wal_checkpoint(FULL)").fetchone()
            if frames != copied:
                raise sqlite3.OperationalError("another program keeps the log from being copied")
            if version < datafile.FORMAT:
                self._upgrade()
            self.vector = dict(self._db.execute("SELECT id, applied FROM replica"))
            self._keyed = self._replicas_with_keys()
            self._identity = self._identities()
        except BaseException:
            self._db.close()
            raise

    def _upgrade(self):
        """Make a file of format 1 one of the present format; a crash leaves it as it was, or as it is to be."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self._db.execute("PRAGMA user_version").fetchone() == (1,):  # no other process has done it meanwhile
                for statement in datafile.UPGRADE:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {datafile.FORMAT}")
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _identities(self):
        return identity(self._path), identity(log_of(self._path))

    def _replicas_with_keys(self):
        """Return the numbers of the replicas that have keys: a look-up for each, not one for every key."""
        return {
            number
            for (number,) in self._db.execute(
                """WITH RECURSIVE found(number) AS (
                    SELECT min(replica) FROM accepted UNION ALL
                    SELECT (SELECT min(replica) FROM accepted WHERE replica > number) FROM found WHERE number NOTNULL
                ) SELECT number FROM found WHERE number NOTNULL"""
            )
        }

    def close(self):
        """Close the file, with its log copied into it.

        SQLite leaves the log of a file that was moved away, and would apply it to the next one of that name.
        """
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()

    def check_in_place(self):
        """Raise DataFileError if what is written does not go to the file of that name any more."""
        if self._identities() != self._identity:
            raise DataFileError(self._path, "was moved away, or replaced")

    def save(self, deltas, wall):
        """Take deltas in one transaction, each as Counter.merge() would, whole or not at all.

        `wall` is the present time in seconds since 1970, from which the times of keys are made.
        """

        def merge_all():
            held = {}
            for delta in deltas:
                held |= self._merge(delta, wall)
            return held

        self._transact(merge_all)

    def forget_keys(self, before):
        """Drop the keys that were accepted before a time, in seconds since 1970."""
        self._transact(lambda: self._forget_keys(int(before * 1000)))

    def end_windows(self, horizon):
        """Drop some windows that have ended at a time, in seconds since 1970; return whether there are more of them."""
        ended = horizon, ENDED_AT_ONCE
        number = self._sum(f"SELECT count(*) FROM ({_ENDED})", *ended)
        if number:
            self._transact(lambda: self._end_windows(ended))
        return number == ENDED_AT_ONCE

    def _transact(self, change):
        self._db.execute("BEGIN IMMEDIATE")
        try:
            held = change()
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self.check_in_place()
        self.vector.update(held)
        for replica in [replica for replica, through in held.items() if not through]:
            del self.vector[replica]

    def _merge(self, delta, wall):
        """Take a delta; return what changed of the vector, with 0 for a replica that is no more in it."""
        id, after, through, totals, keys, requires, heir, absorbed = delta
        # Asked of the file each time: another process may write to it.
        number, held = self._find(id)
        is_over = (held and self._has("heir", "replica", number)) or self._has("absorbed", "id", id)
        if through <= held or after > held or is_over or not all(self.holds(*dot) for dot in requires):
            return {id: held}
        if number is None:
            number = self._db.execute(
                "INSERT INTO replica(id, applied, requires, checksum, crc) VALUES (?, 0, ?, 0, 0)",
                (id, json.dumps(requires) if requires else None),
            ).lastrowid
        change = self._write_entries(number, id, (entry for entry in totals.items() if entry[1][0] > held))
        change += self._write_keys(number, id, (key for key in keys if key[0] > held), wall)
        absorbed = {other: fact for other, fact in absorbed.items() if fact[3] > held}
        change += self._write_absorbed(number, id, absorbed)
        if heir:
            self._db.execute("INSERT INTO heir VALUES (?, ?)", (number, heir))
        self._update(number, through, change)
        return {id: through, **dict.fromkeys(absorbed, 0)}

    def _find(self, replica):
        """Return (number, sequence through which it is held) of a replica, (None, 0) if it is not there."""
        return self._db.execute("SELECT number, applied FROM replica WHERE id = ?", (replica,)).fetchone() or (None, 0)

    def _has(self, table, column, value):
        return self._db.execute(f"SELECT 1 FROM {table} WHERE {column} = ?", (value,)).fetchone() is not None

    def holds(self, replica, sequence):
        """Return whether the file holds a dot."""
        _, applied = self._find(replica)
        if applied >= sequence:
            return True
        found = self._db.execute("SELECT final FROM absorbed WHERE id = ?", (replica,)).fetchone()
        return found is not None and found[0] >= sequence

    def _update(self, number, applied, change):
        """Write what a replica is held through, if not None, and by how much the sum of its checksums changed."""
        id, held, requires, checksum, heir = self._db.execute(
            "SELECT replica.id, applied, requires, checksum, heir.id FROM replica"
            " LEFT JOIN heir ON heir.replica = number WHERE number = ?",
            (number,),
        ).fetchone()
        applied, checksum = applied or held, (checksum + change) % 2**32
        self._db.execute(
            "UPDATE replica SET applied = ?, checksum = ?, crc = ? WHERE number = ?",
            (applied, checksum, replica_crc(id, applied, requires, checksum, heir), number),
        )

    def _write_entries(self, number, id, entries):
        """Write entries of a replica; return by how much that changes the sum of their checksums."""
        seed, change = seed_crc(id), 0
        for piece in _pieces(entries):
            rows = {}
            for name, (sequence, total) in piece:
                crc = entry_crc(seed, name, sequence, total)
                rows[name] = sequence, total if -(2**63) <= total < 2**63 else str(total), crc, ends_at(name)
                change += crc
            rows = json.dumps(rows)
            change -= self._sum(_OLD_CRCS, rows, number)
            self._db.execute(_WRITE_ENTRIES, (number, rows))
        return change

    def _write_keys(self, number, id, keys, wall):
        """Write keys that a replica accepted; return the sum of their checksums."""
        seed, change = seed_crc(id), 0
        for piece in _pieces(keys):
            rows = []
            for sequence, digest, name, amount, age_s, *renews in piece:
                at, renews = round((wall - age_s) * 1000), json.dumps(renews[0]) if renews else None
                crc = key_crc(seed, sequence, digest, name, amount, at, renews)
                rows.append((sequence, digest, name, amount, at, renews, crc))
                change += crc
            self._db.execute(_WRITE_KEYS, (number, json.dumps(rows)))
            self._keyed.add(number)
        return change

    def _end_windows(self, ended):
        sums = self._db.execute(f"SELECT replica, sum(crc) FROM ({_ENDED}) GROUP BY replica", ended).fetchall()
        self._db.execute(f"DELETE FROM entry WHERE (replica, name) IN (SELECT replica, name FROM ({_ENDED}))", ended)
        for number, sum in sums:
            self._update(number, None, -sum)
        return {}

    def _write_absorbed(self, number, id, absorbed):
        """Drop replicas, and write that they were absorbed into the history of one; return the sum of the checksums."""
        seed, sum = seed_crc(id), 0
        for other, fact in absorbed.items():
            dropped, _ = self._find(other)
            if dropped is not None:
                for statement in _DROP:
                    self._db.execute(statement, (dropped,))
                self._keyed.discard(dropped)
            crc = absorbed_crc(seed, other, *fact)
            self._db.execute(
                "INSERT OR REPLACE INTO absorbed VALUES (?, ?, ?, ?, ?, ?, ?)", (number, other, *fact, crc)
            )
            sum += crc
        return sum

    def _forget_keys(self, before):
        for number in list(self._keyed):
            # Sequences rise with time, so the scan ends at the first key that stays.
            kept = self._db.execute(
                "SELECT sequence FROM accepted WHERE replica = ? AND at >= ? ORDER BY sequence LIMIT 1",
                (number, before),
            ).fetchone()
            old = number, kept[0] - 1 if kept else SEQUENCE_MAX
            sum = self._sum("SELECT coalesce(sum(crc), 0) FROM accepted WHERE replica = ? AND sequence <= ?", *old)
            if self._db.execute("DELETE FROM accepted WHERE replica = ? AND sequence <= ?", old).rowcount:
                self._update(number, None, -sum)
            if not kept:
                self._keyed.discard(number)
        return {}

    def _sum(self, query, *values):
        return self._db.execute(query, values).fetchone()[0]


def _pieces(rows):
    rows = iter(rows)
    return iter(lambda: list(itertools.islice(rows, PIECE)), [])

"""A data file: what nodes counted, on disk, in SQLite.

To the rules of replication a file is one more peer: it holds of every replica an exact prefix of
the history, and takes deltas.  So it may be of any age, a copy, or another node's; loading it
merges its deltas, and merging is idempotent.  Reader, and the Writer of datawriter.py, know a file
and deltas; store.py keeps a counter in a file.

SQLite notices a page that cannot be, but no bit flipped inside a value.  So every row has a
checksum of its own, and every replica the sum of those of its entries, which also shows rows that
are missing or older than the rest.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
from pathlib import Path
from zlib import crc32

from counter.checks import AGE_MAX_S, checked_delta
from counter.deltas import Delta
from counter.windows import end_of, is_window

APPLICATION_ID = 0x436E7472  # "Cntr", in the header of the file
FORMAT = 2  # SQLite's user_version
PIECE = 500  # rows written by one statement: no other Python thread runs while their JSON is made
LOG_SIZE = 16 * 2**20  # bytes to which SQLite cuts its log back after a large transaction
BUSY_S = 5.0  # how long to wait for another program that has the file locked

_ENTRY = (
    # total has no type: it may pass 64 bits, is text then, and would be a float in an INTEGER column
    "CREATE TABLE entry(replica INTEGER, name TEXT, sequence INTEGER, total, crc INTEGER,{}"
    " PRIMARY KEY(replica, name)) WITHOUT ROWID"
)
_ALWAYS = (
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    # requires: JSON, of a cancellation only; checksum: the sum of `crc` over its entries and keys, modulo 2^32
    "CREATE TABLE replica(number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, applied INTEGER NOT NULL,"
    " requires TEXT, checksum INTEGER NOT NULL, crc INTEGER NOT NULL)",
    # at: milliseconds since 1970; renews: JSON, the dots that a use renews, or null
    "CREATE TABLE accepted(replica INTEGER, sequence INTEGER, digest TEXT, name TEXT, amount INTEGER,"
    " at INTEGER, renews TEXT, crc INTEGER, PRIMARY KEY(replica, sequence)) WITHOUT ROWID",
)
_ADDED = (  # by format 2
    # ends: of a window, from when on it is not kept, in seconds since 1970
    "CREATE INDEX ending ON entry(ends) WHERE ends IS NOT NULL",
    # Replicas that have ended, and of each replica those that were absorbed into its history.
    "CREATE TABLE heir(replica INTEGER PRIMARY KEY, id TEXT NOT NULL)",
    "CREATE TABLE absorbed(replica INTEGER, id TEXT UNIQUE, final INTEGER, absorber TEXT, at INTEGER,"
    " sequence INTEGER, crc INTEGER, PRIMARY KEY(replica, id)) WITHOUT ROWID",
)
SCHEMAS = {1: (*_ALWAYS, _ENTRY.format("")), FORMAT: (*_ALWAYS, _ENTRY.format(" ends INTEGER,"), *_ADDED)}
UPGRADE = ("ALTER TABLE entry ADD COLUMN ends INTEGER", *_ADDED)  # from format 1


class DataFileError(Exception):
    """A file that cannot be used.

    Its text is one line for the person who named the file, `what` the same without the name; `status` is
    the exit status of a program that needs the file.
    """

    def __init__(self, path, what, status=1):
        super().__init__(f"{path} {what}")
        self.what, self.status = what, status


def damaged(path, detail):
    return DataFileError(path, f"is damaged: move it away; peers or a backup have the counts ({detail})")


def lock(path):
    """Return an open file that keeps other nodes from using the data file for as long as it is open.

    It is for tidiness: two writers that keep to the rules would do no harm.
    """
    name = f"{os.path.realpath(path)}-lock"
    try:
        file = open(name, "ab")  # noqa: SIM115
    except OSError as error:
        raise DataFileError(path, f"cannot be used: {name}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise DataFileError(path, "is in use by another process") from None
    return file


def identity(path):
    """Return what tells a file from another that is put in its place; None if there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def exists(path):
    """Return whether there is a data file; DataFileError if there is something else.

    SQLite would take a file of one byte for an empty one, and throw away the log of an empty one.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        header = b""
    except OSError as error:
        raise DataFileError(path, f"cannot be read: {error.strerror}") from None
    if not header:
        log = log_of(path)
        if _size(log):
            raise DataFileError(path, f"is not there, but {log} is: put the file back, or move both away")
        return False
    if len(header) < 100 or header[:16] != b"SQLite format 3\0" or header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
        raise DataFileError(path, "is not a data file of a counter node, or its beginning is damaged")
    return True


def log_of(path):
    return f"{os.path.realpath(path)}-wal"


def _size(path):
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def connect(path, options):
    uri = f"{Path(os.path.realpath(path)).as_uri()}?{options}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA temp_store = MEMORY")  # there may be no folder for temporary files
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # it is opened only now
    except BaseException:
        db.close()
        raise
    return db


def _spelled(statements):
    """Return statements in one spelling: versions of SQLite may set other spaces where a column was added."""
    return sorted("".join(statement.split()) for statement in statements)


def check(db, path, cluster):
    """Return (cluster, format) of a data file; DataFileError unless it is of that cluster, where None is any."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > FORMAT:
        raise DataFileError(path, f"has format {version}, of a newer version; this one knows {FORMAT}", status=2)
    found = (sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"))
    if _spelled(found) != _spelled(SCHEMAS.get(version, ())):
        raise damaged(path, "its tables are not as they were made")
    (row,) = db.execute("SELECT value FROM meta WHERE key = 'cluster'").fetchall() or [(None,)]
    if cluster is not None and row[0] != cluster:
        raise DataFileError(path, f"is of the cluster {row[0]!r}, not of {cluster!r} (--cluster)", status=2)
    return row[0], version


# The checksums of rows.  `seed` is of the replica: its id is a part of what is summed up.


def seed_crc(id):
    return crc32(id.encode())


def replica_crc(id, applied, requires, checksum, heir=None):
    return crc32(f"{id} {applied} {requires or ''} {checksum}{' ' + heir if heir else ''}".encode())


def absorbed_crc(seed, id, final, absorber, at, sequence):
    return crc32(f"{id} {final} {absorber} {at} {sequence}".encode(), seed)


def ends_at(name):
    """Return what the column `ends` has for a counter."""
    return end_of(name) if is_window(name) else None


def entry_crc(seed, name, sequence, total):
    return crc32(f"{name} {sequence} {total}".encode(), seed)


def key_crc(seed, sequence, digest, name, amount, at, renews):
    return crc32(f"{sequence} {digest} {name} {amount} {at} {renews or ''}".encode(), seed)


def create(path, cluster):
    """Make an empty data file; a crash leaves all of it, or none."""
    path = os.path.realpath(path)
    new = f"{path}-new"
    with contextlib.suppress(FileNotFoundError):
        os.remove(new)
    db = sqlite3.connect(new, isolation_level=None)
    with contextlib.closing(db):
        db.execute("BEGIN")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {FORMAT}")
        for statement in SCHEMAS[FORMAT]:
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('cluster', ?)", (cluster,))
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")
    os.replace(new, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _connect_to_read(path):
    try:
        return connect(path, "mode=ro")
    except sqlite3.OperationalError:
        # Without room beside it, or the right to write there, it can be read as long as it needs no recovery.
        if not _size(log_of(path)) and not _size(f"{os.path.realpath(path)}-journal"):
            return connect(path, "immutable=1")
    return connect(path, "mode=rw")  # which may recover what read-only it may not


class Reader:
    """A data file as it was at one moment; a node may write to it meanwhile.

    Raises DataFileError for a file that is not whole, or of another cluster.
    """

    def __init__(self, path, cluster=None):
        self._path = path
        with self._refusals():
            self._db = _connect_to_read(path)
            try:
                self._db.execute("BEGIN")
                self.cluster, self._format = check(self._db, path, cluster)
                (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise damaged(path, " ".join(found.split()))
                (self.entries,) = self._db.execute("SELECT count(*) FROM entry").fetchone()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._db.close()

    @contextlib.contextmanager
    def _refusals(self):
        try:
            yield
        except sqlite3.OperationalError as error:
            raise DataFileError(self._path, f"cannot be read: {error}") from None
        except (sqlite3.DatabaseError, ValueError, TypeError, AttributeError) as error:
            raise damaged(self._path, error) from None

    def deltas(self, wall):
        """Yield everything in the file, a Delta for each replica, cancellations last.

        `wall` is the present time in seconds since 1970, from which the ages of keys are made.
        """
        with self._refusals():
            replicas = self._db.execute(
                "SELECT number, id, applied, requires, checksum, crc FROM replica ORDER BY requires IS NOT NULL, number"
            ).fetchall()
            heirs = dict(self._db.execute("SELECT replica, id FROM heir")) if self._format > 1 else {}
        for number, id, applied, requires, checksum, crc in replicas:
            with self._refusals():
                if crc != replica_crc(id, applied, requires, checksum, heirs.get(number)):
                    raise ValueError(f"replica {id!r}")
                totals, entries_sum = self._totals(number, id)
                keys, keys_sum = self._keys(number, id, wall)
                absorbed, absorbed_sum = self._absorbed(number, id)
                if (entries_sum + keys_sum + absorbed_sum) % 2**32 != checksum:
                    raise ValueError(f"entries or keys of replica {id!r}")
                requires = json.loads(requires or "[]")
                delta = checked_delta(Delta(id, 0, applied, totals, keys, requires, heirs.get(number), absorbed))
            yield delta

    def _totals(self, number, id):
        """Return {name: (sequence, total)} of a replica, and the sum of the checksums."""
        totals, seed, sum = {}, seed_crc(id), 0
        column = "ends" if self._format > 1 else "NULL"
        for name, sequence, total, crc, ends in self._db.execute(
            f"SELECT name, sequence, total, crc, {column} FROM entry WHERE replica = ?", (number,)
        ):
            if crc != entry_crc(seed, name, sequence, total) or ends != ends_at(name):
                raise ValueError(f"entry {name!r} of replica {id!r}")
            totals[name] = sequence, int(total)
            sum += crc
        return totals, sum

    def _absorbed(self, number, id):
        """Return what was absorbed into the history of a replica, as in a Delta, and the sum of the checksums."""
        absorbed, seed, sum = {}, seed_crc(id), 0
        for other, *fact, crc in (
            self._db.execute("SELECT id, final, absorber, at, sequence, crc FROM absorbed WHERE replica = ?", (number,))
            if self._format > 1
            else ()
        ):
            if crc != absorbed_crc(seed, other, *fact):
                raise ValueError(f"replica {other!r} absorbed into {id!r}")
            absorbed[other] = tuple(fact)
            sum += crc
        return absorbed, sum

    def _keys(self, number, id, wall):
        """Return the keys of a replica, as those of a Delta, and the sum of the checksums."""
        keys, seed, sum = [], seed_crc(id), 0
        for sequence, digest, name, amount, at, renews, crc in self._db.execute(
            "SELECT sequence, digest, name, amount, at, renews, crc FROM accepted WHERE replica = ?", (number,)
        ):
            if crc != key_crc(seed, sequence, digest, name, amount, at, renews):
                raise ValueError(f"key {sequence!r} of replica {id!r}")
            # A clock may have been set since; a file that was made in 1970 does not make it wrong.
            age_s = min(max(0.0, round(wall - at / 1000, 3)), AGE_MAX_S / 2)
            keys.append((sequence, digest, name, amount, age_s, *([json.loads(renews)] if renews else ())))
            sum += crc
        return keys, sum

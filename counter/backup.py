"""The commands that take the counts out of a data file, and put them into one.

    counter_server.py export --data FILE > backup.jsonl
    counter_server.py import --data FILE backup.jsonl

Importing merges, so an export of any age may be imported, any number of times.
"""

import contextlib
import io
import itertools
import signal
import sqlite3
import sys
import time

from counter import dump
from counter.config import Parser
from counter.datafile import DataFileError, Reader, exists, lock
from counter.datawriter import Writer

SHOWN_FROM = 100_000  # entries from which on progress is shown
SHOWN_INTERVAL_S = 0.1
BAR = 40  # characters


class ImportFailed(Exception):
    """Something that cannot be imported, and why, in one line; `status` is the exit status."""

    def __init__(self, what, status=1):
        super().__init__(what)
        self.status = status


def export_command(arguments):
    """Run `export`; return the exit status."""
    parser = Parser(
        prog="counter_server.py export",
        allow_abbrev=False,
        description="Write what is in a data file to the standard output. A node may be using the file.",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="the data file")
    parser.add_argument("--values", action="store_true", help="only the value of each counter")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader may have seen enough
    return _status(_export, options.data, options.values)


def import_command(arguments):
    """Run `import`; return the exit status."""
    parser = Parser(
        prog="counter_server.py import",
        allow_abbrev=False,
        description="Put exports, or values, into a data file that no node is using: all of them, or nothing.",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="the data file; made if there is none")
    parser.add_argument("--cluster", default="counter", metavar="NAME", help="that of the nodes (default: %(default)s)")
    parser.add_argument(
        "--values", action="store_true",
        help="count the values in the input: lines of JSON, CSV, or an export of any cluster",
    )  # fmt: skip
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="a file; without any, the standard input")
    options = parser.parse_args(arguments)
    return _status(_import, options.data, options.cluster, options.values, options.inputs or ["-"])


def _status(command, *arguments):
    """Run a command; return its exit status, with one line where it failed."""
    try:
        command(*arguments)
        return 0
    except (DataFileError, ImportFailed, OSError, sqlite3.Error) as error:
        print(f"counter_server.py: {error}", file=sys.stderr)
        return getattr(error, "status", 1)


def _export(path, values):
    if not exists(path):
        raise DataFileError(path, "is not there")
    now = time.time()
    with Reader(path) as reader, Progress() as progress:
        deltas = reader.deltas(now)
        if values:
            sys.stdout.writelines(dump.values_lines(dump.sums(progress.over(deltas, reader.entries), now)))
        else:
            for line, entries in dump.export_lines(reader.cluster, deltas, reader.entries, now):
                sys.stdout.write(line)
                progress.add(entries, reader.entries)
    sys.stdout.flush()


def _import(path, cluster, values, inputs):
    with lock(path), contextlib.closing(Writer(path, cluster)) as writer:
        before, found = dict(writer.vector), []
        with Progress() as progress:
            deltas = itertools.chain.from_iterable(_deltas(name, cluster, values, progress) for name in inputs)
            writer.save((found.append(delta.replica) or delta for delta in deltas), time.time())
        new = sum(writer.vector.get(replica) != before.get(replica) for replica in set(found))
    print(f"{path}: {new} of {len(set(found))} replicas brought something new")


def _deltas(name, cluster, values, progress):
    """Yield the deltas of one input."""
    try:
        with _opened(name) as lines:
            if values:
                yield dump.delta_of_values(_values(lines, progress))
            else:
                yield from dump.read_export(lines, cluster, time.time(), progress.add)
    except dump.OtherCluster as error:
        other = f"is an export of the cluster {error.args[0]!r}, not of {cluster!r}"
        raise ImportFailed(f"{name} {other}: give --cluster, or --values", status=2) from None
    except dump.NotAnExport:
        raise ImportFailed(f"{name} is not an export; values are counted with --values", status=2) from None
    except ValueError as error:
        raise ImportFailed(f"{name}: {error}") from None


def _opened(name):
    if name == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
    return open(name, encoding="utf-8-sig", newline="")


def _values(lines, progress):
    """Return {name: count} of values, or of an export."""
    first = next(lines, "")
    try:
        now = time.time()
        return dump.sums(dump.read_export(itertools.chain([first], lines), None, now, progress.add), now)
    except dump.NotAnExport:
        return dump.read_values(itertools.chain([first], lines), progress.add)


class Progress:
    """Shows on a terminal how far something with many entries is."""

    def __init__(self):
        self._entries, self._shown_at = 0, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._shown_at is not None:
            print(file=sys.stderr)

    def over(self, deltas, total):
        """Yield deltas, and count their entries."""
        for delta in deltas:
            yield delta
            self.add(len(delta.totals), total)

    def add(self, entries, total):
        """Count entries; `total` is how many there are, or None."""
        self._entries += entries
        if max(self._entries, total or 0) < SHOWN_FROM or not sys.stderr.isatty():
            return
        now = time.monotonic()
        if self._shown_at is None or now - self._shown_at >= SHOWN_INTERVAL_S or self._entries == total:
            self._shown_at = now
            print(f"\r{self._bar(total)}{self._entries:,} entries", end="", file=sys.stderr, flush=True)

    def _bar(self, total):
        if not total:
            return ""
        share = min(1.0, self._entries / total)
        return f"[{'#' * round(BAR * share):{BAR}}] {share:4.0%}  "

"""The content of a data file as lines of text: what export writes and import reads.

An export has a line of JSON that says what it is, then all deltas in pieces, as messages have them,
and a line that says it is complete.  Values are lines of JSON with a name and a count, or CSV.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import re

from counter.checks import AGE_MAX_S, checked_delta
from counter.deltas import Delta
from counter.ids import AMOUNT_MAX, SEQUENCE_MAX, replica_of
from counter.windows import end_of, is_counter

FORMAT = 1
PIECE = 1000  # entries or keys of a line
_COUNT = re.compile("-?[0-9]{1,36}\\Z")


class OtherCluster(Exception):
    """An export of another cluster; the argument is its name."""


class NotAnExport(Exception):
    """These lines are something else: values, perhaps."""


def export_lines(cluster, deltas, entries, now):
    """Yield (line, number of entries in it) of an export.

    `entries` is the number of all; `now`, in seconds since 1970, is when the ages of keys were right.
    """
    head = {"format": FORMAT, "cluster": cluster, "time": now, "entries": entries}
    for fields in itertools.chain([head], *map(_parts, deltas), [{"end": True}]):
        yield json.dumps(fields) + "\n", len(fields.get("totals", ()))


def _parts(delta):
    head = {"replica": delta.replica, "after": delta.after, "through": delta.through}
    if delta.requires:
        head["requires"] = delta.requires
    yield {"delta": head | {"heir": delta.heir} if delta.heir else head}
    for piece in _pieces(delta.absorbed.items()):
        yield {"absorbed": dict(piece)}
    for piece in _pieces(delta.totals.items()):
        yield {"totals": dict(piece)}
    for piece in _pieces(delta.keys):
        yield {"keys": piece}


def _pieces(rows):
    rows = iter(rows)
    return iter(lambda: list(itertools.islice(rows, PIECE)), [])


def read_export(lines, cluster, now, progress):
    """Yield the deltas of an export, cancellations last; the ages of keys become those of `now`.

    `progress(entries, of how many)` is called now and then.  Raises ValueError, which says in what line,
    for an export that is not whole, OtherCluster for one that is not of that cluster (None: any).
    """
    lines = enumerate(lines, 1)
    head = _read_head(next(lines, (1, ""))[1], cluster)
    growing, cancellations, complete = None, [], False
    for number, line in lines:
        with _at_line(number):
            finished, growing, complete = _read_part(json.loads(line), growing, now - head["time"])
        if finished and finished.requires:
            cancellations.append(finished)
        elif finished:
            progress(len(finished.totals), head["entries"])
            yield finished
        if complete:
            break
    if not complete:
        raise ValueError("it is cut short: its last line is missing")
    if any(line.strip() for _, line in lines):
        raise ValueError("it goes on after its end")
    yield from cancellations


def _read_head(line, cluster):
    try:
        head = json.loads(line)
        version, name, time, entries = (head[field] for field in ("format", "cluster", "time", "entries"))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise NotAnExport from None
    if version != FORMAT:
        raise ValueError(f"its format is {version!r}, of another version; this one knows {FORMAT}")
    if cluster is not None and name != cluster:
        raise OtherCluster(name)
    if type(time) not in (int, float) or type(entries) is not int:
        raise ValueError("line 1: no time, or no number of entries")
    return head


def _read_part(fields, growing, passed_s):
    """Take in a line of an export; return (a Delta that is complete, the one that grows, whether this is the end)."""
    finished, complete = None, fields.get("end") is True
    if growing and (complete or "delta" in fields):
        finished, growing = checked_delta(growing), None
    if "delta" in fields:
        head = fields["delta"]
        growing = Delta(
            head["replica"], head["after"], head["through"], {}, [], head.get("requires", ()), head.get("heir"), {}
        )
    if "absorbed" in fields:
        growing.absorbed.update(fields["absorbed"])
    if "totals" in fields:
        growing.totals.update(fields["totals"])
    if "keys" in fields:
        growing.keys.extend(_aged(key, passed_s) for key in fields["keys"])
    return finished, growing, complete


def _aged(key, passed_s):
    sequence, digest, name, amount, age_s, *further = key
    return sequence, digest, name, amount, min(age_s + max(0.0, passed_s), AGE_MAX_S / 2), *further


@contextlib.contextmanager
def _at_line(number):
    """Turn whatever is raised by what a line has into a ValueError that says in which line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None


# Values.


def sums(deltas, now):
    """Return {name: count} of all deltas together, without windows that have ended `now`, in seconds since 1970."""
    values = {}
    for delta in deltas:
        for name, (_, total) in delta.totals.items():
            if end_of(name) > now:
                values[name] = values.get(name, 0) + total
    return values


def values_lines(values):
    """Yield the lines of {name: count}, by name."""
    for name in sorted(values):
        yield json.dumps({"name": name, "count": values[name]}) + "\n"


def read_values(lines, progress):
    """Return {name: count} of lines of JSON or of CSV; ValueError, which says in what line, if they are neither."""
    lines = iter(lines)
    first = next((line for line in lines if line.strip()), "")
    lines, values = itertools.chain([first], lines), {}
    rows = _read_json(lines) if first.lstrip().startswith("{") else _read_csv(lines)
    for number, (name, count) in rows:
        with _at_line(number):
            if type(name) is not str or not is_counter(name):
                raise ValueError(f"{name!r} is not the name of a counter")
            if type(count) is not int and not (type(count) is str and _COUNT.match(count)):
                raise ValueError(f"the count {count!r} is not an integer")
            if name in values:
                raise ValueError(f"{name!r} comes a second time")
        values[name] = int(count)
        progress(1, None)
    if not values:
        raise ValueError("it has no values")
    return values


def _read_json(lines):
    for number, line in enumerate(lines, 1):
        if line.strip():
            with _at_line(number):
                fields = json.loads(line)
                row = fields["name"], fields["count"]
            yield number, row


def _read_csv(lines):
    rows = csv.reader(lines)
    for row in rows:
        if row and not (rows.line_num == 1 and row == ["name", "count"]):
            with _at_line(rows.line_num):
                name, count = (cell.strip() for cell in row)
            yield rows.line_num, (name, count)


def delta_of_values(values):
    """Return the Delta that counts some values: of a replica that did nothing else, and is made of them.

    So the same values are the same increments, wherever they are imported, and count once.
    """
    digest = hashlib.sha256("".join(sorted(f"{name} {count}\n" for name, count in values.items())).encode()).digest()
    sequence, totals = 0, {}
    for name in sorted(values):
        # No sequence can have counted more than the largest amount, so a large count takes many.
        sequence += max(1, -(-abs(values[name]) // AMOUNT_MAX))
        totals[name] = sequence, values[name]
    if sequence > SEQUENCE_MAX:
        raise ValueError("the counts are too large")
    return Delta(replica_of(int.from_bytes(digest[:8], "big") >> 4), 0, sequence, totals)

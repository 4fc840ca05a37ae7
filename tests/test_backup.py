"""Export and import: what is taken out of a data file is what is put in, once, however often."""

import contextlib
import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROJECT

from counter import AMOUNT_MAX, Counter, Delta, backup, datafile, dump, key_digest
from counter.datawriter import Writer

A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "abc")
NOW = 1_700_000_000.0


def ignore(*_):
    pass


def exported(deltas, now=NOW, cluster="counter"):
    return [line for line, _ in dump.export_lines(cluster, deltas, sum(len(delta.totals) for delta in deltas), now)]


def some_deltas():
    """Return deltas of several replicas, with large totals, keys, and a cancellation in between."""
    keys = ((2, key_digest("k"), "x", 7, 10.0), (3, key_digest("l"), "y", 7, 5.0, ((B, 1),)))
    return [
        Delta(A, 0, 2000, {"x": (2, 7), "y": (3, -7), "large": (2000, 1998 * AMOUNT_MAX)}, keys),
        Delta(C, 0, 1, {"x": (1, -7)}, (), ((A, 2), (B, 1))),
        Delta(B, 0, 1, {"x": (1, 7)}),
    ]


# Lines.


def test_an_export_is_read_as_it_was_written(monkeypatch):
    """Cancellations come last."""
    monkeypatch.setattr(dump, "PIECE", 2)
    first, cancellation, last = some_deltas()
    assert list(dump.read_export(exported(some_deltas()), "counter", NOW, ignore)) == [first, last, cancellation]


def test_keys_age_between_export_and_import():
    """Unless the clock was set back meanwhile."""
    for passed_s, ages in ((3600, [3610.0, 3605.0]), (-3600, [10.0, 5.0]), (1e12, [dump.AGE_MAX_S / 2] * 2)):
        delta = next(dump.read_export(exported(some_deltas()), "counter", NOW + passed_s, ignore))
        assert [key[4] for key in delta.keys] == ages


def test_an_export_that_is_not_whole_is_refused():
    """Wherever it is cut, and with whatever line gone."""
    lines = exported(some_deltas())
    for number in range(1, len(lines)):
        with pytest.raises(ValueError, match="cut short"):
            list(dump.read_export(lines[:number], "counter", NOW, ignore))
    text = "".join(lines)
    for length in range(len(lines[0]), len(text) - 1):
        with pytest.raises(ValueError, match=r"line \d+: |cut short"):
            list(dump.read_export(io.StringIO(text[:length]), "counter", NOW, ignore))
    with pytest.raises(ValueError, match="goes on after its end"):
        list(dump.read_export([*lines, lines[1]], "counter", NOW, ignore))


@pytest.mark.parametrize(
    "line",
    ["", "x", "[]", "1", '{"delta": 1}', '{"delta": {"replica": 1, "after": 0, "through": 1}}', '{"totals": [1]}',
     '{"totals": {"x": [1]}}', '{"totals": {"/": [1, 1]}}', '{"totals": {"x": [1, 1e9]}}', '{"keys": [[1]]}',
     '{"keys": [[1, "", "x", 1, 0]]}', "[" * 100_000],
)  # fmt: skip
def test_a_line_that_cannot_be_is_named(line):
    begin = json.dumps({"delta": {"replica": A, "after": 0, "through": 1}})
    lines = [exported([])[0], begin, line, '{"end": true}']
    with pytest.raises(ValueError, match=r"^line [34]: "):
        list(dump.read_export(lines, "counter", NOW, ignore))


def test_what_is_no_export_is_told_from_one_of_another_cluster():
    with pytest.raises(dump.OtherCluster, match="counter"):
        list(dump.read_export(exported([]), "other", NOW, ignore))
    assert list(dump.read_export(exported([]), None, NOW, ignore)) == []
    for line in ("", "name,count", '{"name": "x", "count": 1}', "[]"):
        with pytest.raises(dump.NotAnExport):
            list(dump.read_export([line], "counter", NOW, ignore))
    with pytest.raises(ValueError, match="of another version"):
        list(dump.read_export([exported([])[0].replace('"format": 1', '"format": 2')], "counter", NOW, ignore))


@pytest.mark.parametrize(
    "text",
    [
        "name,count\nx,5\ny,-3\n",
        'x,5\r\n"y",-3\r\n',
        "\nx, 5\n\ny ,-3",
        '{"name": "x", "count": 5}\n{"count": -3, "name": "y", "since": 2019}\n',
        '\n{"name": "x", "count": "5"}\n\n{"name": "y", "count": -3}',
    ],
)
def test_values_come_as_csv_or_as_lines_of_json(text):
    assert dump.read_values(io.StringIO(text), ignore) == {"x": 5, "y": -3}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no values"),
        ("name,count\n", "no values"),
        ("x,1\nx,1\n", "line 2: 'x' comes a second time"),
        ("x,1\ny\n", "line 2: "),
        ("x,1,2\n", "line 1: "),
        ("x,1.0\n", "line 1: the count '1.0' is not an integer"),
        ("x,1_0\n", "not an integer"),
        ("x,٣\n", "not an integer"),
        (f"x,{'9' * 37}\n", "not an integer"),
        ("a/b,1\n", "line 1: 'a/b' is not the name of a counter"),
        ('{"name": "x"}\n', "line 1: 'count'"),
        ('{"name": "x", "count": true}\n', "not an integer"),
        ('{"name": "x", "count": 1.5}\n', "not an integer"),
        ('{"name": 5, "count": 1}\n', "not the name"),
        ('{"name": "x", "count": 1}\nx,2\n', "line 2: "),
    ],
)
def test_values_that_are_none_are_refused_with_their_line(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        dump.read_values(io.StringIO(text), ignore)


def test_the_delta_of_values_is_made_of_them_alone():
    """In any order, and one that every node and file takes: no total is more than its sequence allows."""
    values = {"x": 5, "y": -3, "zero": 0, "large": 4 * 10**34}
    delta = dump.delta_of_values(values)
    assert delta == dump.delta_of_values(dict(reversed(values.items())))
    assert delta.replica != dump.delta_of_values(values | {"x": 6}).replica
    assert dump.sums([dump.checked_delta(delta)], NOW) == values
    with pytest.raises(ValueError, match="too large"):
        dump.delta_of_values({"x": 10**35})


# Commands.


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "counter.db")
    counter, other = Counter(A), Counter(B)
    for counting in (counter, other):
        counting.increment("x", 5)
        counting.increment_once("k", "keyed", 7, now=0)
    for delta in other.deltas({}, float("inf"), 0):
        counter.merge(delta, 0)
    with contextlib.closing(Writer(path, "counter", fsync=False)) as writer:
        writer.save(counter.deltas({}, float("inf"), 0), time.time())
    return path


def content(path, cluster="counter"):
    """Return {replica: (totals, digests of keys)} of a file."""
    with datafile.Reader(path, cluster) as reader:
        return {delta.replica: (delta.totals, [key[1] for key in delta.keys]) for delta in reader.deltas(time.time())}


def run(*arguments, **options):
    command = [sys.executable, PROJECT / "counter_server.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def refused(*arguments, **options):
    """Return the status and the only line of a command that fails."""
    ended = run(*arguments, **options)
    (line,) = ended.stderr.splitlines()
    return ended.returncode, line.partition(": ")[2]


def test_an_export_makes_an_equal_file(path, tmp_path):
    """From a file and from the standard input, once and again."""
    (tmp_path / "backup.jsonl").write_text(run("export", "--data", path).stdout)
    copy = tmp_path / "copy.db"
    assert run("import", "--data", copy, tmp_path / "backup.jsonl").stdout == (
        f"{copy}: 3 of 3 replicas brought something new\n"
    )
    assert content(copy) == content(path)
    again = run("import", "--data", copy, input=(tmp_path / "backup.jsonl").read_text())
    assert again.stdout == f"{copy}: 0 of 3 replicas brought something new\n"
    assert content(copy) == content(path)


def test_exports_of_several_files_are_put_together(path, tmp_path):
    with contextlib.closing(Writer(str(tmp_path / "other.db"), "counter")) as writer:
        writer.save([Delta(C, 0, 1, {"x": (1, 100)})], NOW)
    for name, source in (("one", path), ("two", tmp_path / "other.db")):
        (tmp_path / name).write_text(run("export", "--data", source).stdout)
    merged = tmp_path / "merged.db"
    assert run("import", "--data", merged, tmp_path / "one", tmp_path / "two").returncode == 0
    assert run("export", "--data", merged, "--values").stdout == (
        '{"name": "keyed", "count": 7}\n{"name": "x", "count": 110}\n'
    )


def test_values_count_once_wherever_and_however_often(path, tmp_path):
    (tmp_path / "values.csv").write_text("name,count\nx,1000\nnew,-5\n")
    for data in (path, path, tmp_path / "elsewhere.db"):
        assert run("import", "--data", data, "--values", tmp_path / "values.csv").returncode == 0
    (tmp_path / "elsewhere.jsonl").write_text(run("export", "--data", tmp_path / "elsewhere.db").stdout)
    assert run("import", "--data", path, tmp_path / "elsewhere.jsonl").returncode == 0
    assert run("export", "--data", path, "--values").stdout == (
        '{"name": "keyed", "count": 7}\n{"name": "new", "count": -5}\n{"name": "x", "count": 1010}\n'
    )


def test_the_values_of_another_cluster_may_be_counted(path, tmp_path):
    """Its deltas may not: the same increments could count twice."""
    (tmp_path / "backup.jsonl").write_text(run("export", "--data", path).stdout)
    new = ("import", "--data", tmp_path / "new.db", "--cluster", "counter-2")
    status, line = refused(*new, tmp_path / "backup.jsonl")
    assert (status, "of the cluster 'counter', not of 'counter-2'" in line) == (2, True)
    assert run(*new, "--values", tmp_path / "backup.jsonl").returncode == 0
    with datafile.Reader(str(tmp_path / "new.db"), "counter-2") as reader:
        assert [dump.sums([delta], NOW) for delta in reader.deltas(NOW)] == [{"x": 10, "keyed": 7}]


def test_an_import_is_all_or_nothing(path, tmp_path):
    before, good = content(path), exported([Delta(C, 0, 1, {"x": (1, 1)})])
    (tmp_path / "good").write_text("".join(good))
    (tmp_path / "cut").write_text("".join(good[:-1]))
    status, line = refused("import", "--data", path, tmp_path / "good", tmp_path / "cut")
    assert (status, line) == (1, f"{tmp_path}/cut: it is cut short: its last line is missing")
    assert content(path) == before


def test_what_cannot_be_is_one_line(path, tmp_path):
    (tmp_path / "values.csv").write_text("x,1\n")
    (tmp_path / "latin").write_bytes(b"\xe9,1\n")
    assert refused("import", "--data", path, tmp_path / "values.csv")[0] == 2
    assert refused("import", "--data", path, "--values", tmp_path / "latin")[0] == 1
    assert refused("import", "--data", path, tmp_path / "absent")[0] == 1
    assert refused("import", "--data", path, "--cluster", "other", tmp_path / "values.csv")[0] == 2
    assert refused("import", "--data", path, input="")[0] == 2
    assert refused("import")[0] == refused("export")[0] == refused("export", "--data", path, "--what")[0] == 2
    assert refused("export", "--data", tmp_path / "absent") == (1, f"{tmp_path}/absent is not there")
    assert refused("export", "--data", tmp_path / "latin")[0] == 1
    with datafile.lock(path):
        assert refused("import", "--data", path, input="") == (1, f"{path} is in use by another process")
        assert run("export", "--data", path).returncode == 0  # a node may be using it


def test_a_reader_of_an_export_that_has_seen_enough_is_no_error(path, tmp_path):
    with contextlib.closing(Writer(path, "counter", fsync=False)) as writer:
        writer.save([Delta(C, 0, 20_000, {f"counter-{i}": (i, 1) for i in range(1, 20_001)})], NOW)
    command = [sys.executable, "counter_server.py", "export", "--data", path, "--values"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == -signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("shown_from", "shown"), [(1, True), (100_000, False)])
def test_progress_is_shown_on_a_terminal_where_there_is_much(shown_from, shown, path, monkeypatch, capsys):
    """A bar where the number of entries is known."""
    monkeypatch.setattr(backup, "SHOWN_FROM", shown_from)
    master, terminal = pty.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        before = signal.getsignal(signal.SIGPIPE)
        assert backup.export_command(["--data", path]) == 0
        signal.signal(signal.SIGPIPE, before)
    said = b""
    with contextlib.suppress(OSError):  # the end, as the other side is closed
        while piece := os.read(master, 10_000):
            said += piece
    os.close(master)
    assert (b"100%  5 entries" in said) == shown
    assert (b"#" * backup.BAR in said) == shown
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()][-1] == {"end": True}


def test_random_files_survive_export_and_import(tmp_path):
    for seed in range(20):
        rng, source, copy = random.Random(seed), str(tmp_path / f"{seed}.db"), str(tmp_path / f"{seed}-copy.db")
        counters = [Counter(replica) for replica in (A, B, C)]
        for _ in range(60):
            one, other = rng.choice(counters), rng.choice(counters)
            one.increment_once(f"{rng.randrange(9)}", "keyed", 3, now=0)
            one.increment(f"c{rng.randrange(5)}", rng.choice((1, -1, AMOUNT_MAX)))
            for delta in one.deltas(other.vector(), 10**6, 0):
                other.merge(delta, 0)
        with contextlib.closing(Writer(source, "counter", fsync=False)) as writer:
            writer.save(counters[0].deltas({}, float("inf"), 0), NOW)
        with datafile.Reader(source) as reader, contextlib.closing(Writer(copy, "counter", fsync=False)) as writer:
            lines = [line for line, _ in dump.export_lines("counter", reader.deltas(NOW), reader.entries, NOW)]
            writer.save(dump.read_export(lines, "counter", NOW, ignore), NOW)
        assert content(copy) == content(source)

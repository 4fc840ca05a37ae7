"""The benchmark runs, and reports every figure; what the figures are is not tested here."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import report
from load import Failed

PROJECT = Path(__file__).parent.parent
TINY = shlex.split(
    "--rounds 1 --seconds 0.03 --load sockets --connections 1,20 --increments 500 --counters 250 --probes 3"
)


def run_benchmark(*arguments):
    # Measuring coverage as well would slow its nodes down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, PROJECT / "benchmarks" / "bench.py", *arguments]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)


def test_it_prints_every_figure(tmp_path):
    """All measurements end, none has failed, and each has its place in the tables and in the JSON."""
    result = run_benchmark(*TINY, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    for request in ("GET /count", "POST /increment"):
        for connections in (1, 20):
            rows = [line for line in result.stdout.splitlines() if line.startswith(f"{request}, {connections} ")]
            assert len(rows) == 1
            # Of three servers requests/s, p50 and p99, and of two how many times as fast the first is.
            assert len(rows[0].split()) == 4 + 3 * 3 + 2
    for what, times in {
        "until all nodes show": 2,
        "CPU of all nodes per increment": 2,
        "CPU of one message": 1,
        "lag p50": 1,
        "lag p99": 1,
        "memory per increment": 1,
        "first answer": 1,
        "all --increments": 1,
        "all --counters": 1,
    }.items():
        assert sum(what in line for line in result.stdout.splitlines()) == times, what
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert {system: len(found) for system, found in figures.items()} == {
        "this node": 4 * 3 + 23,
        "http.server": 4 * 3,
        "bare thread": 4 * 3,
    }
    for found in figures.values():
        assert all(len(values) == 1 and values[0] >= 0 for values in found.values())


def test_a_flood_is_watched():
    """It ends by itself, and tells of each that asked meanwhile; how fast they were served is not tested here."""
    command = [sys.executable, PROJECT / "benchmarks" / "flood.py", "--only", "bytes", "--rate", "50", "--seconds", "1"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode in (0, 1), result.stderr
    head, *lines = result.stdout.splitlines()
    assert head.startswith("bytes, ")
    assert [line.split(" asked ")[1].split()[:2] for line in lines] == [["0", "failed"]] * 5


def test_idle_and_busy_connections_are_all_answered():
    command = [sys.executable, PROJECT / "benchmarks" / "connections.py"]
    few = shlex.split("--idle 50 --busy 20 --seconds 0.5")
    result = subprocess.run([*command, *few], check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("50 idle: ")
    assert second.startswith("20 busy beside them: ")


def test_fresh_reads_are_never_stale():
    """The script counts them under load, beside plain reads."""
    command = [sys.executable, PROJECT / "benchmarks" / "fresh_reads.py", "--nodes", "3", "--reads", "40"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("fresh=true: 40 reads, 0 stale, p50 ")
    assert second.startswith("fresh=false: 40 reads, ")


def test_a_day_of_windows_is_counted_right():
    """What is held does not grow once windows end, and nothing is left in the end."""
    command = [sys.executable, PROJECT / "benchmarks" / "windows.py", "--hours", "2", "--series", "100"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second, last = result.stdout.splitlines()
    held = "windows", "numbers", "rows"
    for line, most in (first, 6000), (second, 6200):
        figures = {what: int(number.replace(",", "")) for number, what in re.findall(r"(\d[\d,]*) (\w+)", line)}
        assert all(6000 <= figures[what] <= most for what in held), line
        assert "12,200 counts right" in line
    assert last == "after the end of all: [0, 0] windows, 0 entries in the file"


def test_a_node_joins_over_a_narrow_link():
    """It is ready once it holds all, and not before; the state crosses once, and nobody is lost meanwhile."""
    command = [sys.executable, PROJECT / "benchmarks" / "slow_join.py", "--megabytes", "0.5", "--kilobytes-per-s", "80"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_cost_of_a_data_file_is_measured(tmp_path):
    command = [sys.executable, PROJECT / "benchmarks" / "data.py", "--folder", tmp_path]
    tiny = shlex.split("--rounds 1 --seconds 0.03 --counters 250")
    result = subprocess.run([*command, *tiny], check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for what in ("as a share of without", "memory of a node", "32 connections: latency p99", "reads meanwhile, p99"):
        assert sum(what in line for line in result.stdout.splitlines()) == 1, what
    assert "restart with 250 counters: seconds until ready" in result.stdout


def test_two_checkouts_are_compared():
    """Each figure has a line with both, and how many times better the one is in which the benchmark lies."""
    result = run_benchmark(*TINY, "--only", "single", "--connections", "8", "--paired", PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr
    head, *lines = [line for line in result.stdout.splitlines() if line][1:]
    assert head.index("there ") < head.index("here ", head.index("there ") + 2) < head.index("times better")
    for line in lines:
        _there, _here, times, least, _to, most = line.split()[-6:]
        assert times == least == most  # of one round
    assert len(lines) == 2 * 3


@pytest.mark.parametrize(
    ("figure", "ours", "theirs", "expected"),
    [
        ("cluster_per_s", [30, 60], [10, 30], [3, 2]),
        ("cluster_p99_ms", [10, 20], [30, 30], [3, 1.5]),
        ("cluster_p99_ms", [10, Failed("no")], [30, 30], [3]),
        ("cluster_p99_ms", [0, 10], [10, 10], [1]),
        ("cluster_p99_ms", [10], [Failed("no")], []),
    ],
)
def test_a_ratio_says_how_many_times_better(figure, ours, theirs, expected):
    """Of each round in which both were measured; more per second is better, and less of all else."""
    assert report.ratios(figure, ours, theirs) == expected


def test_a_wrong_flag_is_refused():
    """A measurement there is not is named, before anything is measured."""
    result = run_benchmark("--only", "lags")
    assert result.returncode == 2
    assert "cluster-batches" in result.stderr

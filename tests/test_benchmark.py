"""The benchmark runs, and reports every figure; what the figures are is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
TINY = (
    "--rounds",
    "1",
    "--seconds",
    "0.03",
    "--load",
    "sockets",
    "--increments",
    "500",
    "--counters",
    "250",
    "--probes",
    "3",
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
        for connections in (1, 8, 32):
            rows = [line for line in result.stdout.splitlines() if line.startswith(f"{request}, {connections} ")]
            assert len(rows) == 1
            assert len(rows[0].split()) == 3 + 3 * 3  # of three servers requests/s, p50 and p99
    for what in (
        "until all nodes show",
        "CPU of all nodes per increment",
        "lag p50",
        "lag p99",
        "memory per increment",
        "first answer",
        "all --increments",
        "all --counters",
    ):
        assert sum(what in line for line in result.stdout.splitlines()) == 1
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert len(figures) == 6 * 3 * 3 + 13
    assert all(len(values) == 1 and values[0] >= 0 for values in figures.values())


def test_a_wrong_flag_is_refused():
    """A measurement there is not is named, before anything is measured."""
    result = run_benchmark("--only", "lags")
    assert result.returncode == 2
    assert "cluster,lag" in result.stderr

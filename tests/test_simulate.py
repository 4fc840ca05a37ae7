"""The simulation's program runs, and its table and curves hold what it measured."""

import json
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "simulate.py"


def simulate(*arguments):
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_life_of_a_cluster_is_the_same_every_time(tmp_path):
    """One seed, one outcome, whatever order Python's sets and dictionaries have in this process."""
    first, second, plot = (tmp_path / name for name in ("first.json", "second.json", "curves.svg"))
    table = simulate("--nodes", 4, 12, "--seeds", 1, "--save", first, "--plot", plot)
    simulate("--nodes", 4, 12, "--seeds", 1, "--save", second)
    figures, again = (json.loads(path.read_text()) for path in (first, second))
    for figure in [*figures.values(), *again.values()]:
        del figure["cpu_s"]
    assert figures == again
    assert all(value is not None for value in figures["12 1"].values())
    assert "*" not in table
    drawn = xml.dom.minidom.parse(str(plot))
    assert len(drawn.getElementsByTagName("polyline")) == len(drawn.getElementsByTagName("circle")) / 2 == 8


def test_loss_is_measured_into_the_same_file(tmp_path):
    saved = tmp_path / "figures.json"
    saved.write_text('{"12 1": {"gone_s": 6}}')
    table = simulate(
        "--nodes", 12, "--seeds", 1, "--scenario", "loss", "--loss-seconds", 30, "--pause", 1, "--save", saved
    )
    assert json.loads(saved.read_text()) == {"12 1": {"gone_s": 6, "false_loss": 0}}
    assert "crashed node gone" in table

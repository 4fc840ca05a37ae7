"""The year of deploys runs, leaves nothing of processes that stopped in order, and counts exactly."""

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "year.py"


def year(*arguments):
    command = [sys.executable, PROGRAM, "--nodes", 3, "--counters", 40, "--touched", 10, *arguments]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


def figures(line):
    """Return (replicas, absorbed, entries, bytes of a heartbeat, bytes of one while counting)."""
    found = re.search(
        r"([\d,]+) replicas .* ([\d,]+) absorbed, ([\d,]+) entries, .* ([\d,]+) bytes, .* ([\d,]+) bytes", line
    )
    return [int(number.replace(",", "")) for number in found.groups()]


def test_processes_that_stop_in_order_leave_a_fact_each():
    first, last, total = year("--days", 4)
    replicas, absorbed, entries, idle, counting = figures(last)
    assert absorbed == 12
    assert replicas <= 4
    assert entries <= 4 * 40
    assert idle <= figures(first)[3] + 40
    assert counting <= figures(first)[4] + 40
    assert total.endswith("12 processes ended, wrong: 0")


def test_processes_that_crash_leave_their_entries():
    *_, last, total = year("--days", 3, "--kills", 1)
    replicas, absorbed, _, idle, _ = figures(last)
    assert absorbed == 0
    assert replicas >= 9
    assert idle < 1000
    assert total.endswith("9 processes ended, wrong: 0")

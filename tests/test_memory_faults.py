"""Each allocation of an increment, of a merge and so on fails once: all or nothing has changed then."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("_testcapi")  # of CPython; some distributions have it in a package of its own

from memory_faults import OPERATIONS

SCRIPT = Path(__file__).parent / "memory_faults.py"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_failing_allocation_leaves_a_wrong_count(operation):
    run = subprocess.run([sys.executable, SCRIPT, operation], capture_output=True, text=True, timeout=80)
    assert run.returncode == 0, run.stdout + run.stderr

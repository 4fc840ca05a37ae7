"""What the system gives to a process, as it says in files."""

import os
import platform
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from counter import process


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ("0::/", {"memory.max": "268435456"}, 2**28),
        ("0::/system.slice/counter.service", {"system.slice/counter.service/memory.max": "268435456"}, 2**28),
        (
            "0::/a/b",
            {"memory.max": "max", "a/memory.max": "134217728", "a/b/memory.max": "268435456"},
            2**27,  # of the group around it
        ),
        ("0::/outside/the/container", {"memory.max": "268435456"}, 2**28),
        ("4:cpu,cpuacct:/a\n3:memory:/a", {"memory/a/memory.limit_in_bytes": "268435456"}, 2**28),
        ("0::/", {"memory.max": "max"}, None),
        ("3:memory:/", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("0::/", {}, None),
    ],
)
def test_the_memory_limit_is_that_of_the_control_groups_or_the_machine(tmp_path, line, limits, expected):
    for name, text in limits.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    own = tmp_path / "own"
    own.write_text(line + "\n")
    machine = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    assert process.memory_limit_bytes(tmp_path, own) == min(machine, expected or machine)


def test_open_files_are_counted():
    before = process.open_files()
    reading, writing = os.pipe()
    assert process.open_files() == before + 2
    os.close(reading)
    os.close(writing)
    assert process.open_files() == before
    assert process.open_files_max() > before


def test_memory_that_is_used_is_resident():
    before = process.resident_bytes()
    data = b"x" * 2**26
    assert process.resident_bytes() >= before + len(data) // 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no heaps of threads")
def test_the_threads_of_a_node_share_one_heap(start_cluster):
    """glibc reserves 64 MiB of addresses for each further heap."""
    nodes = start_cluster(2)
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda _: nodes[0].increment("/increment?acks=2"), range(40)))
    for node in nodes:
        maps = Path(f"/proc/{node.process.pid}/maps").read_text()
        reserved = re.findall(r"^(\w+)-(\w+) ---p 00000000 00:00 0 *$", maps, re.MULTILINE)
        assert [area for area in reserved if int(area[1], 16) - int(area[0], 16) > 2**25] == []

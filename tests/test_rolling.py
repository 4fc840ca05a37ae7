"""What restarts of real nodes leave behind: nothing, if they stop in order."""

import re

import pytest
from conftest import PATIENT, wait_until

NAMES = ["a", "b", "c"]


def replicas(node):
    """Return how many replicas a node holds entries of."""
    metrics = node.ask("GET", "/metrics").body.decode()
    found = re.findall(r'^counter_replicas{kind="(?:in)?active"} (\d+)$', metrics, re.M)
    return sum(map(int, found))


def count_everywhere(nodes, expected):
    for node in nodes:
        for name in NAMES:
            expected[name] += 1
            node.increment(f"/increment/{name}")


def all_count(nodes, expected):
    wait_until(lambda: all(node.count(name) == count for node in nodes for name, count in expected.items()))


@pytest.mark.parametrize("with_data", [False, True])
def test_rolling_restarts_leave_nothing(start_node, tmp_path, with_data):
    """Every process counts, and is restarted, three times; in the end only those that live are in a vector."""

    def start(number, peers):
        file = ("--data", tmp_path / f"{number}.db") if with_data else ()
        return start_node(*PATIENT, *file, peers=peers)

    nodes, expected = [], dict.fromkeys(NAMES, 0)
    for number in range(3):
        nodes.append(start(number, nodes[-1:]))
    wait_until(lambda: all(len(node.peers()) == 2 for node in nodes))
    count_everywhere(nodes, expected)
    all_count(nodes, expected)
    for _ in range(3):
        for number, node in enumerate(nodes):
            assert node.stop() == 0
            assert "held_by=2 peers=2" in node.stderr()
            nodes[number] = start(number, [other for other in nodes if other is not node])
            wait_until(lambda: all(len(node.peers()) == 2 for node in nodes))
            wait_until(lambda: all(node.ask("GET", "/readyz").status == 200 for node in nodes))
            count_everywhere(nodes, expected)
    all_count(nodes, expected)
    wait_until(lambda: [replicas(node) for node in nodes] == [3, 3, 3])
    all_count(nodes, expected)


def test_a_crash_leaves_what_it_counted(start_cluster):
    """Nobody else can know where it ends."""
    first, second, third = start_cluster(3)
    third.increment()
    wait_until(lambda: [first.count(), second.count()] == [1, 1])
    third.kill()
    wait_until(lambda: [first.peers("lost"), second.peers("lost")] == [{third.address}] * 2)
    second.increment()
    wait_until(lambda: first.count() == 2)
    assert second.stop() == 0
    first.increment()
    wait_until(lambda: replicas(first) == 2)
    assert first.count() == 3
    assert "absorbed: id=" in first.stderr()


def test_a_node_that_stopped_and_counted_nothing_leaves_nothing(start_cluster):
    first, second = start_cluster(2)
    assert second.stop() == 0
    first.increment()
    assert replicas(first) == 1
    assert "absorbed" not in first.stderr()

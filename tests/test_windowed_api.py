"""Windowed counters as clients see them: at one node, over real sockets."""

import time

import pytest
from clients import problem
from conftest import wait_until
from test_openapi import check

from counter.windows import rfc3339

pytestmark = pytest.mark.usefixtures("no_traceback")
DAY = 86_400


@pytest.fixture
def wall(node, monkeypatch):
    """Return a list with what the node's wall clock shows, a day from now at noon, to be set by the test."""
    shown = [(time.time() // DAY + 1) * DAY + DAY / 2]
    monkeypatch.setattr(node.counter, "_wall", lambda: shown[0])
    return shown


def test_a_count_of_windows_is_that_of_the_present_one(client, wall):
    name, noon = "seen@1d:400", rfc3339(wall[0] - DAY / 2)
    for count in (1, 2):
        reply = client.ask("POST", f"/increment/{name}").json()
        assert (reply["name"], reply["count"]) == (name, count)
    shown = {"name": name, "count": 2, "window": {"start": noon, "seconds": DAY}}
    assert client.ask("GET", f"/count/{name}").json() == shown
    assert client.ask("GET", "/count/seen%401d:400").json() == shown
    assert client.ask("GET", "/count/seen@24h:400").json() == shown | {"name": "seen@24h:400"}
    wall[0] += 2 * DAY
    assert client.ask("GET", f"/count/{name}").json()["count"] == 0
    client.ask("POST", f"/increment/{name}?amount=5")
    days = [rfc3339((wall[0] // DAY - ago) * DAY) for ago in (3, 2, 1, 0)]
    reply = client.ask("GET", f"/count/{name}?last=4")
    assert reply.json() == {
        "name": name,
        "count": 5,
        "window": {"start": days[-1], "seconds": DAY},
        "total": 7,
        "windows": [[days[0], 0], [days[1], 2], [days[2], 0], [days[3], 5]],
    }
    check(reply, "GET", f"/count/{name}?last=4")
    assert len(client.ask("GET", f"/count/{name}?last=401").json()["windows"]) == 401
    assert client.ask("GET", f"/count/{name}?last=2&fresh=true").json()["total"] == 5


def test_windows_go_wherever_a_name_does(client, wall):
    reply = client.ask("POST", "/increments", body=b'{"a@1h": 2, "b@90m": 3, "c": 1}')
    assert reply.json()["counts"] == {"a@1h": 2, "b@90m": 3, "c": 1}
    check(reply, "POST", "/increments")
    key = "Idempotency-Key: windowed"
    first = client.ask("POST", "/increment/a@1h", key).json()
    wall[0] += 3600
    again = client.ask("POST", "/increment/a@60m", key)
    assert again.headers["idempotent-replayed"] == "true"
    assert (again.json()["id"], again.json()["count"]) == (first["id"], 0)
    assert client.ask("GET", f"/count/a@1h?after={first['id']}&last=2").json()["total"] == 3
    listed = client.ask("GET", "/counts?prefix=a@").json()
    assert listed == {"counts": {"a@1h": 0}, "next": None}
    client.ask("POST", "/increment/a@1h?amount=7")
    assert client.ask("GET", "/counts?prefix=a@1&order=value").json()["counts"] == {"a@1h": 7}
    assert client.ask("GET", "/counts?start=b@90m&limit=1").json()["counts"] == {"b@90m": 3}
    lines = client.ask("GET", "/metrics").body.decode().splitlines()
    assert 'counter_value{name="a@1h"} 7' in lines
    assert not any("/" in line for line in lines if line.startswith("counter_value"))
    windows = next(line for line in lines if line.startswith("counter_windows "))
    assert int(windows.split()[1]) >= 3


@pytest.mark.parametrize(
    ("method", "target", "body", "advice"),
    [
        ("POST", "/increment/a@", b"", "visits@1h"),
        ("POST", "/increment/a@1y", b"", "visits@1d:400"),
        ("GET", "/count/a@400d", b"", "from 1s to 366d"),
        ("GET", "/count/a@1h:1001", b"", "1 to 1,000"),
        ("GET", "/count/a@1h?last=62", b"", "from 1 to 61"),
        ("GET", "/count/a@1h?last=0", b"", "from 1 to 61"),
        ("GET", "/count/a?last=2", b"", "such as a@1h"),
        ("GET", "/count?last=2", b"", "such as default@1h"),
        ("POST", "/increment/a@1h:60%2F5", b"", "visits@1h"),
        ("POST", "/increments", b'{"a@1h": 1, "b": 1, "a@60m": 2}', "a@60m: it is the same counter as a@1h"),
        ("POST", "/increments", b'{"b": 1, "a@1h:60/5": 2}', "a@1h:60/5: a windowed counter is"),
        ("GET", "/counts?start=a@x", b"", "visits@1h"),
    ],
)
def test_what_is_no_windowed_counter_is_refused_with_advice(client, method, target, body, advice):
    assert advice in problem(client.ask(method, target, body=body), 400)


def test_a_clock_that_was_set_back_to_what_has_ended_counts_nothing(client, node, wall):
    name = "late@1s:1"
    assert client.ask("POST", f"/increment/{name}").status == 200
    node.counter.end_windows(wall[0] + 10)
    before = node.counter.sequence
    assert "set back" in problem(client.ask("POST", f"/increment/{name}"), 503)
    assert "set back" in problem(client.ask("POST", "/increments", body=b'{"x": 1, "late@1s:1": 1}'), 503)
    assert node.counter.sequence == before
    wall[0] += 20
    assert client.ask("POST", f"/increment/{name}").json()["count"] == 1


def test_nodes_whose_clocks_differ_agree_on_every_window(start_local, connect, caplog):
    """Each counts in the window it sees, tells by how much the other is ahead, and brings back nothing that ended."""
    shown = [time.time() // DAY * DAY + DAY / 2] * 2
    nodes = [start_local()]
    nodes.append(start_local("--peers", f"127.0.0.1:{nodes[0].port}"))
    for number, node in enumerate(nodes):
        wall = lambda number=number: shown[number]  # noqa: E731
        node.counter._wall = node.table._wall = wall
    first, second = clients = list(map(connect, nodes))

    def skews():
        peers = [peer for client in clients for peer in client.ask("GET", "/peers").json()["peers"]]
        return [None if peer["skew_s"] is None else round(peer["skew_s"]) for peer in peers]

    wait_until(lambda: skews() == [0, 0])  # they may have met while only one clock was set
    caplog.clear()

    def totals():
        return [client.ask("GET", "/count/late@1h:2?last=3").json()["total"] for client in clients]

    first.ask("POST", "/increment/late@1h:2")
    wait_until(lambda: totals() == [1, 1])
    shown[1] += 3600
    second.ask("POST", "/increment/late@1h:2?amount=2")
    wait_until(lambda: totals() == [1, 3])  # to the first it is in a window to come
    wait_until(lambda: skews() == [3600, -3600])
    wait_until(lambda: sum("wall clocks differ" in message for message in caplog.messages) == 2)
    nodes[1].counter.end_windows(shown[1] + 2 * 3600)  # the first window
    first.ask("POST", "/increment/late@1h:2?amount=10")  # which still lives here
    first.ask("POST", "/increment/plain")
    wait_until(lambda: second.ask("GET", "/count/plain").json()["count"] == 1)
    assert totals() == [11, 2]
    shown[0] = shown[1]
    assert totals() == [13, 2]
    nodes[0].counter.end_windows(shown[1] + 2 * 3600)
    assert totals() == [2, 2]
    wait_until(lambda: nodes[0].counter.vector() == nodes[1].counter.vector())
    assert [node.counter.held_windows for node in nodes] == [1, 1]

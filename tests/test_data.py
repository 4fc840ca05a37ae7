"""Nodes with data files, as real processes: what survives what, and how each is said."""

import contextlib
import http.client
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import crash
import power
import pytest
from clients import problem
from conftest import FAST, PROJECT, require_tools, wait_until

from counter import datafile
from counter.config import parse_arguments
from counter_server import Node

DURABLE = "/increment?durable=true"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "counter.db")


def saved(node):
    """Return whether everything that a node holds is in its file."""
    data = node.get("/peers")["self"]["data"]
    return data["ok"] and data["lag_increments"] == 0


def kill_all(*nodes):
    for node in nodes:
        node.process.kill()
    for node in nodes:
        node.kill()


def all_count(total, *nodes):
    wait_until(lambda: [node.count() for node in nodes] == [total] * len(nodes))
    return True


def in_file(path, name="default"):
    """Return the value of a counter in a file, as a sum over its replicas."""
    with datafile.Reader(path, "counter") as reader:
        return sum(delta.totals[name][1] for delta in reader.deltas(time.time()) if name in delta.totals)


def run(*arguments, **options):
    """Run the program to its end; return the finished process."""
    command = [sys.executable, PROJECT / "counter_server.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def refused(*arguments):
    """Return the status and the only line of a program that does not start."""
    ended = run("--port", "0", *arguments)
    (line,) = ended.stderr.splitlines()
    assert ended.stdout == ""
    return ended.returncode, line


# What survives what: the table in docs/data.md, row by row.


def test_stopping_and_starting_a_node_keeps_everything(start_node, path):
    node = start_node("--data", path)
    for amount in (2**53 - 1, 2**53 - 1, -7):
        node.increment(f"/increment/x?amount={amount}")
    assert node.stop() == 0
    assert in_file(path, "x") == 2**54 - 9
    node = start_node("--data", path)
    assert node.count("x") == 2**54 - 9
    assert node.ask("GET", "/readyz").json() == {"status": "ready", "alone": True, "data": "ok"}
    assert "loaded: file=" in node.stderr()


def test_stopping_all_nodes_keeps_everything(start_cluster, tmp_path):
    nodes = start_cluster(3, data=tmp_path)
    for node in nodes:
        node.increment()
    for node in nodes:
        node.process.terminate()
    assert [node.process.wait(15) for node in nodes] == [0, 0, 0]
    assert all_count(3, *start_cluster(3, data=tmp_path))


def test_killing_one_node_loses_nothing_that_another_node_or_its_file_holds(start_cluster, start_node, tmp_path):
    nodes = start_cluster(3, data=tmp_path)
    nodes[0].increment(f"{DURABLE}")
    nodes[0].increment("/increment?acks=2")
    nodes[0].kill()
    assert all_count(2, *nodes[1:])
    again = start_node("--data", tmp_path / "new.db", peers=[nodes[1]])
    assert all_count(2, again, *nodes[1:])


@pytest.mark.parametrize(("size", "rounds"), [(3, 3), (1, 10)])
def test_killing_all_nodes_at_once_loses_nothing_durable(size, rounds, tmp_path):
    """At random moments under load; tests/crash.py does it as often as wanted."""
    assert crash.run(seed=1, size=size, rounds=rounds, folder=tmp_path)


def test_what_is_not_durable_is_in_the_file_soon_after(start_node, path):
    """So that a kill loses no more than the latest moments."""
    node = start_node("--data", path)
    node.increment()
    wait_until(lambda: saved(node))
    node.kill()
    assert in_file(path) == 1


@pytest.mark.parametrize("fsync", ["always", "never"])
def test_a_power_cut_leaves_a_whole_file_with_everything_durable(fsync, path, tmp_path):
    """At any moment, whatever part of the unsynced the disk took; without fsync it is older, and whole all the same."""
    require_tools("strace")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no process trace another")
    trace, rng = str(tmp_path / "trace"), random.Random(1)
    command = power.command(trace, [sys.executable, "counter_server.py", "--port", "0", *FAST])
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([*command, "--data", path, "--fsync", fsync], cwd=PROJECT, stderr=log)
    try:
        port = wait_until(lambda: re.search(r"listening: addr=\S+:(\d+)", (tmp_path / "log").read_text()))[1]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)) as connection:
            for number in range(40):
                wait = "?durable=true" if fsync == "always" else ""
                connection.request("POST", f"/increment/counter-{number % 7}{wait}")
                assert connection.getresponse().read()
    finally:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
            os.kill(int(children.read().split()[0]), signal.SIGTERM)
        process.wait(30)
    disk, durable, cuts = power.Disk(tmp_path), 0, 0
    for event in power.events(trace):
        if event.what == "sent":
            durable += b'"durable": true' in event.data
            continue
        disk.take(event)
        if rng.random() < 0.3:
            folder = tmp_path / "cut"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            disk.cut(folder, rng)
            assert _sequence_in(str(folder / "counter.db")) >= durable
            cuts += 1
    assert cuts > (50 if fsync == "always" else 5)
    assert (durable == 40) == (fsync == "always")
    assert in_file(path, "counter-0") == 6


def _sequence_in(path):
    """Return through which sequence a file holds its only replica; DataFileError if it is not whole."""
    if not datafile.exists(path):
        return 0
    with datafile.Reader(path, "counter") as reader:
        deltas = list(reader.deltas(time.time()))
    for delta in deltas:
        assert sum(total for _, total in delta.totals.values()) == delta.through
    return sum(delta.through for delta in deltas)


def test_a_lost_disk_is_filled_by_the_peers(start_cluster, tmp_path):
    nodes = start_cluster(3, data=tmp_path)
    for node in nodes:
        node.increment()
    assert all_count(3, *nodes)
    wait_until(lambda: all(map(saved, nodes)))
    kill_all(*nodes)
    for number in (0, 1):  # two of three, even
        for suffix in ("", "-wal", "-shm"):
            os.remove(tmp_path / f"{number}.db{suffix}")
    nodes = start_cluster(3, data=tmp_path)
    assert all_count(3, *nodes)
    wait_until(lambda: all(map(saved, nodes)))
    assert in_file(tmp_path / "0.db") == 3


def test_a_backup_of_last_week_at_all_nodes_is_what_it_was_then(start_cluster, tmp_path):
    """Backed up at one node while it runs, put in the place of the files of all."""
    nodes = start_cluster(3, data=tmp_path)
    for node in nodes:
        node.increment()
    assert all_count(3, *nodes)
    wait_until(lambda: saved(nodes[0]))
    with contextlib.closing(sqlite3.connect(tmp_path / "0.db")) as db:
        db.execute(f"VACUUM INTO '{tmp_path}/backup.db'")
    nodes[1].increment()
    assert all_count(4, *nodes)
    kill_all(*nodes)
    for number in range(3):
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(tmp_path / f"{number}.db{suffix}")
        shutil.copy(tmp_path / "backup.db", tmp_path / f"{number}.db")
    nodes = start_cluster(3, data=tmp_path)
    assert all_count(3, *nodes)
    nodes[2].increment()
    assert all_count(4, *nodes)


def test_a_backup_of_last_week_at_one_node_changes_nothing(start_cluster, start_node, tmp_path):
    nodes = start_cluster(3, data=tmp_path)
    nodes[0].increment()
    wait_until(lambda: saved(nodes[0]))
    with contextlib.closing(sqlite3.connect(tmp_path / "0.db")) as db:
        db.execute(f"VACUUM INTO '{tmp_path}/backup.db'")
    for _ in range(3):
        nodes[0].increment()
    assert all_count(4, *nodes)
    restored = start_node("--data", tmp_path / "backup.db", peers=[nodes[1]])
    assert all_count(4, restored, *nodes)


def test_keys_are_known_after_all_nodes_were_killed(start_cluster, tmp_path):
    nodes, headers = start_cluster(3, data=tmp_path), {"Idempotency-Key": "order-4711"}
    first = nodes[0].increment(DURABLE, headers=headers)
    kill_all(*nodes)
    nodes = start_cluster(3, data=tmp_path)
    wait_until(lambda: nodes[1].count() == 1)
    answer = nodes[1].ask("POST", DURABLE, headers=headers)
    assert (answer.json(), answer.headers["Idempotent-Replayed"]) == (first, "true")


# Asking for it.


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    node = Node(parse_arguments(["--port", "0", "--data", str(tmp_path_factory.mktemp("data") / "counter.db")]))
    node.start()
    yield node
    assert node.stop()


def test_durable_is_answered_beside_acks(client):
    reply = client.ask("POST", "/increment/d?durable=true")
    assert (reply.status, reply.json()["count"], reply.json()["durable"]) == (200, 1, True)
    reply = client.ask("POST", "/increment/d?durable=true&acks=1")
    assert (reply.status, list(reply.json())) == (200, ["id", "name", "count", "acks", "durable"])
    reply = client.ask("POST", "/increment/d?durable=true&acks=2&timeout=1")
    assert (reply.status, reply.json()["acks"], reply.json()["durable"]) == (202, 1, True)
    assert "durable" not in client.ask("POST", "/increment/d?durable=false").json()


def test_a_replay_waits_to_be_durable_as_well(client):
    for _ in range(2):
        reply = client.ask("POST", "/increment/replayed?durable=true", "Idempotency-Key: k")
        assert (reply.status, reply.json()["count"], reply.json()["durable"]) == (200, 1, True)
    assert reply.headers["idempotent-replayed"] == "true"


def test_at_the_timeout_the_answer_is_202(client, node, monkeypatch):
    monkeypatch.setattr(node.store, "_commit", lambda: None)  # a disk that takes its time
    reply = client.ask("POST", "/increment/slow?durable=true&timeout=0.05")
    assert (reply.status, reply.json()["durable"], reply.json()["count"]) == (202, False, 1)
    assert client.count("slow") == 1


@pytest.mark.parametrize("query", ["durable", "durable=", "durable=1", "durable=True", "durable=true&durable=true"])
def test_durable_is_true_or_false(client, query):
    assert problem(client.ask("POST", f"/increment/bad?{query}"), 400)
    assert client.count("bad") == 0


def test_a_timeout_goes_with_what_waits(client):
    assert "timeout goes with acks or durable" in problem(client.ask("POST", "/increment?timeout=1"), 400)


def test_without_a_file_nothing_is_durable(connect, start_local, path):
    for arguments, reason in ((), "--data"), (("--data", path, "--fsync", "never"), "--fsync never"):
        client = connect(start_local(*arguments))
        assert reason in problem(client.ask("POST", DURABLE), 400)
        assert client.count("default") == 0
        assert client.ask("POST", "/increment?durable=false").status == 200


def test_the_file_shows_in_peers_and_metrics(client, node):
    client.ask("POST", "/increment/shown?durable=true")
    wait_until(lambda: node.store.status().lag_increments == 0)
    assert client.ask("GET", "/peers").json()["self"]["data"] == {
        "ok": True, "lag_increments": 0, "lag_s": 0.0, "error": None,
    }  # fmt: skip
    metrics = client.ask("GET", "/metrics").body.decode()
    assert "\ncounter_data_ok 1\n" in metrics
    assert "\ncounter_data_lag_increments 0\n" in metrics
    assert re.search(r"\ncounter_data_commits_total [1-9]", metrics)


# A file that fails.


def test_a_full_disk_stops_nothing_and_is_said(start_node, path):
    """The limit of a file's size is as good as the end of a disk; it is lifted without a restart."""
    node = start_node("--data", path, limit="-S -f 300")
    node.increment(DURABLE)
    for number in range(3000):
        node.increment(f"/increment/counter-{number:05d}" + "-" * 100)
    wait_until(lambda: not node.get("/peers")["self"]["data"]["ok"])
    answer = node.ask("POST", DURABLE)
    assert (answer.status, answer.json()["durable"], answer.json()["count"]) == (202, False, 2)
    assert node.ask("GET", "/readyz").json()["data"] == "failing"
    assert node.get("/peers")["self"]["data"]["lag_increments"] > 0
    assert b"\ncounter_data_ok 0\n" in node.ask("GET", "/metrics").body
    resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_until(lambda: saved(node))
    assert node.increment(DURABLE)["durable"]
    log = node.stderr()
    assert log.count("data file failing") == log.count("data file works again") >= 1
    node.kill()
    assert in_file(path) == 3


def test_a_full_disk_does_not_keep_a_node_from_starting_and_stopping_is_not_a_success(start_node, path):
    node = start_node("--data", path)
    node.increment()
    node.stop()
    node = start_node("--data", path, limit="-f 8")
    assert node.count() == 1
    node.increment()
    assert node.ask("GET", "/readyz").json() == {"status": "ready", "alone": True, "data": "failing"}
    assert node.stop() == 1
    assert "not everything is in the data file, lag_increments=1" in node.stderr()
    assert start_node("--data", path).count() == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_file_on_a_disk_that_becomes_full_or_read_only(start_node, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], check=True)
    try:
        node = start_node("--data", disk / "counter.db")
        node.increment(DURABLE)
        (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        for number in range(100):
            node.increment(f"/increment/counter-{number}")
        wait_until(lambda: not node.get("/peers")["self"]["data"]["ok"])
        (disk / "filler").unlink()
        wait_until(lambda: saved(node))
        node.kill()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        (status, line) = refused("--data", disk / "counter.db")
        assert (status, "cannot be" in line) == (1, True)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        node = start_node("--data", disk / "counter.db")
        assert (node.count(), node.count("counter-99")) == (1, 1)
        node.stop()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # where the test has failed, a node may still use it


# Starting.


def test_a_file_in_use_is_one_line_and_status_1(start_node, path):
    start_node("--data", path)
    assert refused("--data", path) == (1, f"counter_server.py: {path} is in use by another process")


def refused_and_left(path, content, expected):
    """Start with a file of this content: a line says so, and the file stays as it is."""
    with open(path, "wb") as file:
        file.write(content)
    status, line = refused("--data", path)
    assert (status, expected in line) == (1, True)
    with open(path, "rb") as file:
        assert file.read() == content


@pytest.mark.parametrize("content", [b"x", b"SQLite format 3\0" + bytes(5000), b"some text\n" * 1000])
def test_what_is_no_data_file_is_one_line_and_status_1(path, content):
    refused_and_left(path, content, "is not a data file of a counter node")


def test_a_damaged_file_is_one_line_and_status_1_and_stays(start_node, path):
    node = start_node("--data", path)
    for number in range(300):
        node.increment(f"/increment/counter-{number}")
    node.stop()
    with open(path, "rb") as file:
        content = file.read().replace(b"counter-150", b"counter-151")
    refused_and_left(path, content, "is damaged: move it away; peers or a backup have the counts")


def test_a_file_of_another_cluster_or_a_newer_version_is_one_line_and_status_2(start_node, path):
    start_node("--data", path).stop()
    status, line = refused("--data", path, "--cluster", "other")
    assert (status, "is of the cluster 'counter', not of 'other'" in line) == (2, True)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    status, line = refused("--data", path)
    assert (status, "of a newer version" in line) == (2, True)


@pytest.mark.parametrize("data", ["", "/nowhere/counter.db", "/"])
def test_a_file_that_cannot_be_is_one_line(data):
    status, line = refused("--data", data)
    assert status == (1 if data else 2)
    assert "--data" in line or data in line


def test_a_node_that_cannot_listen_leaves_its_file_free(start_node, path):
    ended = run("--data", path, "--port", start_node().port)
    assert (ended.returncode, "cannot listen" in ended.stderr) == (1, True)
    start_node("--data", path)


def test_what_arrives_while_a_node_hands_over_is_saved(start_cluster, tmp_path):
    """The last commit is after the drain: until then peers may bring news."""
    nodes = start_cluster(3, data=tmp_path)
    threads = [threading.Thread(target=lambda node=node: [node.increment() for _ in range(50)]) for node in nodes[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nodes[0].stop() == 0
    with datafile.Reader(tmp_path / "0.db") as reader:
        assert sum(delta.through for delta in reader.deltas(time.time())) > 0
    assert all_count(100, *nodes[1:])


def test_a_node_with_a_file_and_seeds_is_ready_once_it_has_caught_up(start_node, path):
    first = start_node("--data", path)
    first.increment(DURABLE)
    first.stop()
    node = start_node("--data", path, "--join-timeout", "60", "--peers", "127.0.0.1:1")
    assert node.count() == 1
    assert node.ask("GET", "/readyz").status == 503
    start_node("--join-timeout", "0.2", peers=[node])
    wait_until(lambda: node.ask("GET", "/readyz").status == 200)

"""GET /watch: an event for each change, at most ten a second, for as long as client and node go on."""

import json
import threading
import time

import pytest
from clients import Watcher, gossip_request, problem, request
from conftest import wait_until

from counter import Delta, new_replica
from counter.watching import AT_ONCE, COMMENT_S, INTERVAL_S, LOOK_S, Streams, Watch
from counter.windows import parse_series, rfc3339


class Watched:
    """A counter that a Watch shows."""

    def __init__(self):
        self.count, self.allowed = 0, True
        self.watch = Watch(lambda: f'{{"count": {self.count}}}', lambda: self.allowed)


def test_an_event_comes_at_once_and_then_for_each_change():
    watched = Watched()
    assert watched.watch.next(0.0) == b'data: {"count": 0}\n\n'
    assert watched.watch.next(0.1) == b""
    watched.count = -5
    assert watched.watch.next(0.2) == b'data: {"count": -5}\n\n'


def test_a_comment_comes_where_nothing_changes():
    watched = Watched()
    watched.watch.next(0.0)
    assert watched.watch.next(COMMENT_S - 0.1) == b""
    assert watched.watch.next(COMMENT_S) == b":\n\n"
    assert watched.watch.next(COMMENT_S + 1) == b""
    assert watched.watch.next(2 * COMMENT_S) == b":\n\n"


def test_a_watch_is_over_once_the_client_may_not_know():
    watched = Watched()
    watched.watch.next(0.0)
    watched.count, watched.allowed = 1, False
    assert watched.watch.next(1.0) is None


class Connection:
    """Takes note of when it went on."""

    def __init__(self):
        self.went_on = []

    def go_on_streaming(self, now):
        self.went_on.append(now)


class Loop:
    """A poller with streams, and a counter that says when it has changed."""

    def __init__(self):
        self.waiting, self.calls = set(), []
        self.streams = Streams(self.waiting.add, self.calls.append, lambda _connection, function, now: function(now))

    def add(self, connection, now):
        self.streams.add(connection)
        self.turn(now)

    def change(self, now):
        """Change something; return when the streams are looked at next."""
        for event in self.waiting:
            event.set()
        self.waiting.clear()
        return self.turn(now)

    def turn(self, now):
        """Do what the poller is called for, and look."""
        while self.calls:
            self.calls.pop()(now)
        return self.streams.look(now)


def test_changes_are_looked_at_at_once_and_then_once_an_interval():
    """However many there are; what came after the last look has one of its own."""
    loop, connection = Loop(), Connection()
    loop.add(connection, 10.0)
    assert loop.turn(10.5) == 10.0 + LOOK_S
    assert loop.change(10.6) == 10.6 + LOOK_S
    for number in range(100):
        assert loop.change(10.61 + number / 10_000) == 10.6 + INTERVAL_S
    loop.turn(10.6 + INTERVAL_S)
    assert connection.went_on == [10.0, 10.6, 10.6 + INTERVAL_S]


def test_what_changed_before_a_stream_was_added_is_seen():
    """After its first event was made: nobody waited for a change then."""
    loop, first, second = Loop(), Connection(), Connection()
    loop.add(first, 10.0)
    assert first.went_on == [10.0]
    loop.add(second, 10.01)
    loop.turn(10.0 + INTERVAL_S)
    assert second.went_on == [10.0 + INTERVAL_S]
    loop.add(second, 10.3)  # again, as it has read what it was sent
    assert second.went_on == [10.0 + INTERVAL_S]


def test_streams_are_looked_at_without_a_change_as_well():
    """A token may have lost its line, or a window may have ended."""
    loop, connection = Loop(), Connection()
    loop.add(connection, 10.0)
    loop.turn(10.0 + LOOK_S)
    loop.turn(10.0 + 2 * LOOK_S)
    assert connection.went_on == [10.0, 11.0, 12.0]


def test_of_many_streams_some_go_on_at_a_time():
    """Other connections are served in between; each has its turn once, also where some end meanwhile."""
    loop, connections = Loop(), [Connection() for _ in range(3 * AT_ONCE - 1)]
    for connection in connections:
        loop.streams.add(connection)
    for number in range(1, 3):
        assert loop.turn(10.0) <= 10.0  # there is more to do, at once
        assert sum(len(connection.went_on) for connection in connections) == number * AT_ONCE
    loop.streams.discard(next(connection for connection in connections if not connection.went_on))
    assert loop.change(10.01) == 10.0 + INTERVAL_S
    assert all(len(connection.went_on) == 1 for connection in connections)


def test_where_nobody_watches_nothing_is_looked_at():
    loop, connection = Loop(), Connection()
    loop.add(connection, 10.0)
    loop.streams.discard(connection)
    assert loop.change(10.1) == float("inf")
    assert loop.turn(20.0) == float("inf")
    assert connection.went_on == [10.0]


# At a node.


def test_a_client_sees_each_change_wherever_it_was_counted(start_local, connect):
    node = start_local()
    watcher = Watcher(connect(node), "/watch/x")
    assert watcher.head.startswith(b"HTTP/1.1 200 OK\r\n")
    for line in (b"Content-Type: text/event-stream", b"Cache-Control: no-store", b"Connection: close"):
        assert line + b"\r\n" in watcher.head
    assert b"Content-Length" not in watcher.head
    assert watcher.next() == 0
    client = connect(node)
    client.ask("POST", "/increment/x?amount=5")
    assert watcher.next() == 5
    client.send(gossip_request(node, Delta(new_replica(), 0, 1, {"x": (1, 7)})))
    assert client.read().status == 200
    assert watcher.next() == 12
    client.ask("POST", "/increments", body=b'{"y": 1, "x": -12}')
    assert watcher.next() == 0


def test_without_a_name_it_is_the_default_counter(start_local, connect):
    node = start_local()
    connect(node).ask("POST", "/increment")
    watcher = Watcher(connect(node), "/watch")
    assert json.loads(watcher.client.stream.readline()[6:]) == {"name": "default", "count": 1}


def test_of_many_changes_the_last_is_seen(start_local, connect):
    """The others may be left out."""
    node = start_local()
    watchers = [Watcher(connect(node), "/watch/x") for _ in range(3)]
    for _ in range(2000):
        node.counter.increment("x")
    assert all(watcher.last(2000) < 2000 for watcher in watchers)


@pytest.mark.parametrize("target", ["/watch/a%20b", "/watch/..", "/watch?fresh=true", "/watch/x?timeout=1"])
def test_a_bad_request_is_refused(start_local, connect, target):
    client = connect(start_local())
    problem(client.ask("GET", target), 400)
    assert client.count("x") == 0  # the connection goes on


def test_head_and_other_methods(start_local, connect):
    node = start_local()
    client = connect(node)
    client.send(request("HEAD", "/watch"))
    assert b"text/event-stream" in client.stream.read()
    assert problem(connect(node).ask("POST", "/watch"), 405)
    assert connect(node).ask("OPTIONS", "/watch").headers["allow"] == "GET, HEAD, OPTIONS"


def test_old_clients_can_watch(start_local, connect):
    """The stream ends with the connection, so HTTP/1.0 knows all that it takes."""
    node = start_local()
    client = connect(node)
    client.send(request("GET", "/watch/x", version="1.0"))
    while client.stream.readline() != b"\r\n":
        pass
    assert client.stream.readline().startswith(b"data: ")


def test_watchers_take_connections_and_no_threads(start_local, connect):
    """They keep theirs: a further client is sent away.  One that hangs up gives its own back."""
    node = start_local("--max-connections", "50")
    before = threading.active_count()
    watchers = [Watcher(connect(node), f"/watch/c{number}") for number in range(50)]
    assert threading.active_count() == before
    assert "all connections" in problem(connect(node).ask("GET", "/count"), 503)
    for number, watcher in enumerate(watchers):
        assert watcher.next() == 0
        node.counter.increment(f"c{number}", number + 1)
        assert watcher.next() == number + 1
    assert "counter_watchers 50\n" in connect(node).ask("GET", "/metrics").body.decode()
    watchers[0].client.close()
    watchers[1].client.reset()
    wait_until(lambda: node.server.watchers() == 48)
    assert connect(node).count("c2") == 3


def test_what_a_watcher_sends_is_ignored(start_local, connect):
    node = start_local()
    watcher = Watcher(connect(node), "/watch/x")
    assert watcher.next() == 0
    watcher.client.send(request("POST", "/increment/x") * 100)
    node.counter.increment("x", 7)
    assert watcher.next() == 7


def test_a_node_that_stops_ends_streams(start_local, connect):
    """As it ends an answer: with all that was sent, and no reset."""
    node = start_local()
    watchers = [Watcher(connect(node), "/watch/x") for _ in range(20)]
    assert node.stop()
    for watcher in watchers:
        assert watcher.next() == 0
        assert watcher.client.stream.read() in (b"", b":\n\n")


def test_a_stream_ends_with_its_token(start_local, connect, tmp_path):
    """One with another token goes on, and so does who comes again with a good one."""
    path = tmp_path / "tokens"

    def write(*lines):
        path.touch(0o600)
        path.write_text("\n".join(lines))

    write("read first", "read second")
    node = start_local("--token-file", str(path))
    problem(connect(node).ask("GET", "/watch/x"), 401)
    first, second = (
        Watcher(connect(node), "/watch/x", f"Authorization: Bearer {token}") for token in ("first", "second")
    )
    assert (first.next(), second.next()) == (0, 0)
    write("read second", "read third")
    node.read_files_again()
    node.counter.increment("x")
    assert first.client.stream.read() == b""
    assert second.next() == 1
    problem(connect(node).ask("GET", "/watch/x", "Authorization: Bearer first"), 401)
    assert Watcher(connect(node), "/watch/x", "Authorization: Bearer third").next() == 1


def test_a_page_of_another_site_can_watch_if_it_may_read(start_local, connect):
    node = start_local("--cors-origin", "https://shop.example")
    watcher = Watcher(connect(node), "/watch/x", "Origin: https://shop.example")
    assert b"Access-Control-Allow-Origin: https://shop.example\r\n" in watcher.head
    assert watcher.next() == 0


def test_a_watcher_of_one_node_sees_what_another_counts(start_cluster, connect):
    first, second = start_cluster(2)
    watcher = Watcher(connect(first), "/watch/x")
    assert watcher.next() == 0
    for number in range(1, 4):
        second.increment("/increment/x")
        assert watcher.next() == number
    assert first.stop() == 0
    assert watcher.client.stream.read() == b""


def test_the_turn_of_a_window_is_an_event(start_local, connect):
    """It tells which window it is of, so that one is told from the next even where both have the same count."""
    noon, hour = (time.time() // 86_400 + 1.5) * 86_400, 3600
    shown, node, series = [noon], start_local(), parse_series("x@1h")
    node.counter._wall = lambda: shown[0]
    node.counter.increment("x@1h", 5)
    early = {series.window(series.index_at(noon + hour)): (1, 5)}  # at a node with a clock that is ahead
    node.counter.merge(Delta(new_replica(), 0, 1, early), 0)
    watcher = Watcher(connect(node), "/watch/x@60m")
    for start, count in (noon, 5), (noon + hour, 5), (noon + 2 * hour, 0):
        shown[0] = start
        event = {"name": "x@60m", "count": count, "window": {"start": rfc3339(start), "seconds": hour}}
        assert watcher.event() == event

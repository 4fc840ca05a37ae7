"""One connection at a time, on a socket, a clock and lanes that the test holds in its hands."""

import io
import itertools

import pytest
from clients import read_reply, request

from counter import connections, http1, metrics
from counter.connections import (
    ANSWERING,
    BODY_TIMEOUT_S,
    CLOSED,
    GRACE_S,
    HEAD_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    LINGER_S,
    LINGERING,
    PROGRESS_TIMEOUT_S,
    RECEIVING,
    SEND_TIMEOUT_S,
    SENDING,
    STREAMING,
    Connection,
)
from counter.exchanges import Repeated
from counter.http1 import Refused, unavailable
from counter.lanes import PEERS, QUICK, SLOW, STREAMS, WAITS
from counter.places import CLIENT, GUEST, Earliest


class Socket:
    """A socket whose other side sends what a test feeds, and reads as much as it allows."""

    def __init__(self):
        self.arrived, self.sent, self.is_over, self.is_shut = [], b"", False, False
        self.room = 10**9  # bytes that can be sent before the other side reads

    def recv(self, size):
        if self.arrived:
            piece = self.arrived.pop(0)
            if len(piece) > size:
                self.arrived.insert(0, piece[size:])
            return piece[:size]
        if self.is_over:
            return b""
        raise BlockingIOError

    def send(self, data):
        sent = bytes(data[: self.room])
        if data and not sent:
            raise BlockingIOError
        self.sent, self.room = self.sent + sent, self.room - len(sent)
        return len(sent)

    def shutdown(self, _how):
        self.is_shut = True


class Lane:
    """Keeps its jobs for the test to do."""

    def __init__(self):
        self.jobs, self.is_full = [], False

    def put(self, job):
        if not self.is_full:
            self.jobs.append(job)
        return not self.is_full


class Stream:
    """Goes on with what a test says."""

    def __init__(self):
        self.event = b""

    def next(self, _now):
        return self.event


class Api:
    """Counts what it is asked; the path says how it answers."""

    vital_paths = frozenset({"/vital"})

    def __init__(self):
        self.count, self.sink, self.error, self.stream = 0, None, None, Stream()

    def route_of(self, path):
        return path

    def body_max(self, head):
        return 1000 if head.path != "/sink" else 10**9

    def body_sink(self, head):
        return self.sink if head.path == "/sink" else None

    def action(self, head):
        paces = {"/slow": SLOW, "/waits": WAITS, "/sink": PEERS, "/pieces": SLOW, "/peer-pieces": PEERS}
        paces["/stream"] = STREAMS
        if head.path == "/refused":
            raise Refused(404, "not here")

        def act(body, connection):
            self.count += 1
            if head.path == "/bug":
                raise self.error
            if head.path == "/refuse":
                raise Refused(422, "not so")
            if head.path.startswith("/peer"):
                connection.is_peer = True
            if head.path == "/stream":
                return http1.unending("text/event-stream") + b"first,", self.stream
            if "pieces" in head.path:
                return http1.chunked(200, (b"x" * 100 for _ in range(10)))
            return http1.ok(f"{self.count} {head.path} {body if type(body) is bytes else body.taken}\n")

        act.pace = paces.get(head.path, QUICK)
        return act


class Poller:
    """What a connection sees of its poller."""

    def __init__(self):
        self.api, self.tally = Api(), metrics.ThreadTally()
        self.lanes = {pace: Lane() for pace in (SLOW, WAITS, PEERS)}
        self.repeated, self.answered, self.given_back, self.complaints = {}, [], [], []
        self.ending, self.has_places = set(), True
        self.held, self.held_max = 0, 10**9
        self.streams = set()
        self.deadlines = Earliest(lambda connection: connection.deadline, lambda connection: not connection.closed)

    def remember(self, received, exchange):
        self.repeated[received] = Repeated(exchange, self.tally)

    def seat(self, connection, now):
        if not self.has_places:
            raise unavailable("full")
        connection.kind = CLIENT

    def ends(self, connection):
        return connection.kind in self.ending

    def give_back(self, connection, is_urgent):
        self.given_back.append((connection, is_urgent))

    def schedule(self, connection):
        self.deadlines.add(connection)

    def hold(self, connection, size):
        self.held += size - connection.held
        connection.held = size
        return self.held <= self.held_max

    def complain(self, message):
        self.complaints.append(message)


class Line:
    """A connection with both of its ends, at a time."""

    def __init__(self):
        self.poller, self.sock, self.now = Poller(), Socket(), 100.0
        self.connection = Connection(self.sock, self.poller, self.now)
        self.poller.deadlines.add(self.connection)
        self.replies_read = 0

    @property
    def state(self):
        return self.connection.state

    def receive(self, *pieces):
        """Have the pieces arrive one by one, and everything done that can be."""
        for piece in pieces:
            self.sock.arrived.append(piece)
            while self.sock.arrived and self.state in (RECEIVING, LINGERING):
                self.connection.receive(self.now)
                self.end_turn()
                self.work()
        return self

    def end_turn(self):
        """Send what was answered in this turn."""
        while self.poller.answered:
            self.poller.answered.pop().send_answer(self.now)

    def hang_up(self):
        self.sock.is_over = True
        self.connection.receive(self.now)

    def work(self):
        """Do the jobs in the lanes, and give the connection back."""
        jobs = [lane.jobs for lane in self.poller.lanes.values()]
        while any(jobs):
            next(filter(None, jobs)).pop(0)(self.poller.tally)
            assert self.state is ANSWERING
            self.connection.take_back(self.now)

    def read(self, room):
        """Have the other side read."""
        self.sock.room += room
        if self.state is SENDING:
            self.connection.send_more(self.now)
            self.work()

    def due_in(self):
        """Return the seconds until the deadline, which the poller knows of."""
        assert self.poller.deadlines.first() is self.connection
        return self.connection.deadline - self.now

    def wait(self, seconds):
        """Let time pass, and the deadline as well where it does."""
        self.now += seconds
        if self.connection.deadline <= self.now:
            self.connection.expire(self.now)

    def replies(self):
        """Return the replies since the last call."""
        stream = io.BytesIO(self.sock.sent)
        replies = []
        while stream.tell() < len(self.sock.sent):
            replies.append(read_reply(stream))
        new, self.replies_read = replies[self.replies_read :], len(replies)
        return new

    def statuses(self):
        return [reply.status for reply in self.replies()]


@pytest.fixture
def line():
    return Line()


BODIES = [b"", b'{"amount": 1}']


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("between", [b"", request("GET", "/refused"), request("GET", "/slow"), b"\r\n"])
@pytest.mark.parametrize("path", ["/quick", "/slow"])
def test_requests_may_be_cut_anywhere(body, between, path):
    """Three in a row are served alike wherever TCP divides them, in a lane and without one."""
    once = request("POST", path, body=body)
    raw = once + between + once * 2
    whole = Line().receive(raw).replies()
    for cut in range(1, len(raw)):
        replies = Line().receive(raw[:cut], raw[cut:]).replies()
        assert [reply.body for reply in replies] == [reply.body for reply in whole], raw[:cut]
    assert len(whole) == 3 + between.startswith(b"GET")


def test_a_request_that_comes_again_is_not_taken_apart_again(line, monkeypatch):
    """Not even on another connection of a client; each is counted, and none is confused with another."""
    line.receive(request("GET", "/a"), request("GET", "/b"))
    monkeypatch.setattr(http1, "parse_head", None)
    line.receive(*[request("GET", "/a"), request("GET", "/b")] * 3)
    assert [reply.body.split()[1] for reply in line.replies()] == [b"/a", b"/b"] * 4
    assert {route: tally.number(b"HTTP/1.1 200") for route, tally in line.poller.tally._routes.items()} == {
        "/a": [4],
        "/b": [4],
    }


@pytest.mark.parametrize(
    "raw",
    [
        request("HEAD", "/a"),
        request("GET", "/a", "Connection: keep-alive", version="1.0"),
        request("GET", "/a") * 2,
        request("POST", "/a", body=b"{}"),
        request("GET", "/slow"),
        request("GET", "/refused"),
        b"\r\n" + request("GET", "/a", "Connection: close"),
    ],
)
def test_what_takes_more_than_its_action_is_taken_apart_each_time(line, raw):
    """A body, a lane, a header of the answer that depends on the request."""
    for _ in range(3):
        line.receive(raw)
    assert line.poller.repeated == {}


def test_the_answer_to_a_request_that_comes_again_is_sent_as_the_turn_ends(line):
    """Together with those on other connections."""
    line.receive(request("GET", "/a"))
    line.sock.arrived.append(request("GET", "/a"))
    line.connection.receive(line.now)
    assert (line.statuses(), line.poller.api.count) == ([200], 2)
    line.end_turn()
    assert line.statuses() == [200]


def test_a_refusal_of_a_repeated_request_is_answered(line):
    """The connection goes on."""
    line.receive(*[request("GET", "/refuse")] * 3, request("GET", "/a"))
    assert line.statuses() == [422, 422, 422, 200]


@pytest.mark.parametrize("times", [1, 2])
def test_a_bug_is_a_500_and_ends_the_connection(line, times, caplog):
    """Whether the request came before or not; the log has the traceback."""
    for _ in range(times - 1):
        line.poller.api.error = Refused(404, "no bug this time")
        line.receive(request("GET", "/bug"))
    line.poller.api.error = ZeroDivisionError()
    line.receive(request("GET", "/bug"), request("GET", "/a"))
    assert line.statuses() == [404] * (times - 1) + [500]
    assert (line.state, line.sock.is_shut) == (LINGERING, True)
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_without_memory_for_an_answer_the_client_is_told(line, monkeypatch):
    """It is 503, the connection ends, and the log has no traceback, for which there is no memory either."""
    monkeypatch.setattr(http1, "ok", lambda _text: [0] * 10**18)
    line.receive(request("GET", "/a"))
    assert line.statuses() == [503]
    assert line.poller.complaints == ["no memory to answer a request"]


# Deadlines.


def test_an_idle_connection_ends_without_a_word(line):
    """A minute after it was accepted, or after its last request; empty lines are none."""
    line.wait(IDLE_TIMEOUT_S - 1)
    line.receive(b"\r\n", b"\r\n")
    assert line.due_in() == 1
    line.receive(request("GET", "/a"))
    assert line.due_in() == IDLE_TIMEOUT_S
    line.wait(1)
    line.receive(request("GET", "/a"))
    assert line.due_in() == IDLE_TIMEOUT_S
    line.replies()
    line.wait(IDLE_TIMEOUT_S)
    assert (line.state, line.replies()) == (CLOSED, [])


@pytest.mark.parametrize("before", [[], [request("GET", "/a")], [request("GET", "/slow")], [request("GET", "/a") * 2]])
def test_a_head_must_be_complete_in_time(line, before):
    """However steadily it trickles in."""
    line.receive(*before)
    for byte in request("GET", "/a")[: int(HEAD_TIMEOUT_S)]:
        line.receive(bytes([byte]))
        line.wait(0.99)
        assert line.state is RECEIVING
    line.wait(0.2)
    assert line.statuses()[-1] == 408
    assert line.state is LINGERING


def test_a_body_must_be_complete_in_time(line):
    """The time is for the whole body."""
    line.receive(request("POST", "/a", "Content-Length: 100"))
    for _ in range(int(BODY_TIMEOUT_S)):
        line.wait(0.99)
        line.receive(b"x")
        assert line.state is RECEIVING
    line.wait(0.5)
    assert line.statuses() == [408]
    assert line.poller.api.count == 0


def test_a_body_has_its_own_time_after_the_head(line):
    """And so has the next request after an answer."""
    raw = request("POST", "/a", "Content-Length: 2")
    line.receive(raw[:10])
    assert line.due_in() == HEAD_TIMEOUT_S
    line.wait(5)
    line.receive(raw[10:])
    assert line.due_in() == BODY_TIMEOUT_S
    line.wait(20)
    line.receive(b"{}" + raw[:10])
    assert (line.statuses(), line.due_in()) == ([200], HEAD_TIMEOUT_S)


def test_who_reads_slowly_has_a_total_time(line):
    """Not one for each part that was read."""
    line.sock.room = 10
    line.receive(request("GET", "/a"))
    assert (line.state, line.due_in()) == (SENDING, SEND_TIMEOUT_S)
    for _ in range(int(SEND_TIMEOUT_S)):
        line.wait(0.99)
        line.read(1)
        assert line.state is SENDING
    line.wait(0.5)
    assert line.state is CLOSED


def test_what_is_not_read_is_not_added_to(line):
    """Requests of a client that does not read are left unread; they are answered once it does."""
    line.sock.room = 150
    line.receive(request("GET", "/a") * 3 + request("GET", "/b")[:20])
    assert line.state is SENDING
    line.wait(20)
    line.read(10**6)
    assert (line.statuses(), line.state, line.due_in()) == ([200] * 3, RECEIVING, HEAD_TIMEOUT_S)
    line.receive(request("GET", "/b")[20:])
    assert line.statuses() == [200]


def test_the_last_response_can_be_read(line):
    """What the client still sends is taken until it hangs up, or for a second."""
    line.receive(request("GET", "/a", "Connection: close"))
    assert (line.state, line.sock.is_shut, line.due_in()) == (LINGERING, True, LINGER_S)
    line.receive(b"x" * 100_000, request("GET", "/a"))
    assert (line.statuses(), line.due_in()) == ([200], LINGER_S)
    line.hang_up()
    assert line.state is CLOSED


def test_who_does_not_hang_up_is_hung_up_on(line):
    """A second after the last response."""
    line.receive(request("GET", "/a", "Connection: close"))
    line.wait(LINGER_S)
    assert line.state is CLOSED


@pytest.mark.parametrize(
    "sent", [b"", b"GET /", request("POST", "/a", "Content-Length: 5") + b"x", request("GET", "/a")]
)
def test_who_hangs_up_is_forgotten(line, sent):
    """At any point of a request."""
    line.receive(sent)
    line.hang_up()
    assert line.state is CLOSED
    assert len(line.statuses()) == sent.count(b"\r\n\r\n") - sent.count(b"Length")


# Lanes.


@pytest.mark.parametrize(("path", "pace"), [("/slow", SLOW), ("/waits", WAITS), ("/sink", PEERS)])
def test_what_takes_long_is_done_in_a_lane(line, path, pace):
    """Nothing else is done on the connection until then, and nothing is due."""
    line.sock.arrived.append(request("GET", path) + request("GET", "/b"))
    line.connection.receive(line.now)
    assert (line.state, line.sock.sent, len(line.poller.lanes[pace].jobs)) == (ANSWERING, b"", 1)
    line.wait(1000)
    assert line.state is ANSWERING
    line.work()
    assert [reply.body.split()[1] for reply in line.replies()] == [path.encode(), b"/b"]
    assert line.due_in() == IDLE_TIMEOUT_S


def test_answers_before_one_that_waits_are_sent_at_once(line):
    """Though they came together with it."""
    line.sock.arrived.append(request("GET", "/a") * 2 + request("GET", "/waits"))
    line.connection.receive(line.now)
    assert (line.state, line.statuses()) == (ANSWERING, [200, 200])


def test_a_lane_sends_and_the_poller_need_not_hurry(line):
    """Who waits time and again is not bounced between threads: the next event is soon enough."""
    for _ in range(3):
        line.receive(request("GET", "/waits"))
    assert line.statuses() == [200] * 3
    assert [is_urgent for _, is_urgent in line.poller.given_back] == [False] * 3


@pytest.mark.parametrize("further", [b"G", request("GET", "/a")])
def test_what_came_meanwhile_is_urgent(line, further):
    """There may be no further event for it."""
    line.receive(request("GET", "/waits") + further)
    assert [is_urgent for _, is_urgent in line.poller.given_back] == [True]


def test_what_a_lane_cannot_send_the_poller_sends(line):
    """It has the whole time for it."""
    line.sock.room = 10
    line.receive(request("GET", "/slow"))
    assert (line.state, line.due_in()) == (SENDING, SEND_TIMEOUT_S)
    line.read(10**6)
    assert (line.statuses(), line.state, line.due_in()) == ([200], RECEIVING, IDLE_TIMEOUT_S)


def test_without_a_thread_it_is_503_and_the_connection_goes_on(line):
    """Nothing was done for the request."""
    line.poller.lanes[WAITS].is_full = True
    line.receive(request("GET", "/waits"), request("GET", "/a"))
    replies = line.replies()
    assert [reply.status for reply in replies] == [503, 200]
    assert "--max-waiting" in replies[0].json()["detail"]
    assert "retry-after" in replies[0].headers
    assert line.poller.api.count == 1


def test_a_client_that_has_hung_up_while_a_lane_answers_is_met_later(line):
    """The thread of the lane does not suffer from it."""

    def send(_data):
        raise ConnectionResetError

    line.sock.arrived.append(request("GET", "/slow"))
    line.connection.receive(line.now)
    line.sock.send = send
    line.poller.lanes[SLOW].jobs.pop()(line.poller.tally)
    with pytest.raises(ConnectionResetError):
        line.connection.take_back(line.now)


# Bodies and answers in pieces.


class Sink:
    def __init__(self, fails_at=None, error=None):
        self.taken, self.fails_at, self.error = 0, fails_at, error

    def feed(self, data):
        self.taken += len(data)
        if self.fails_at is not None and self.taken >= self.fails_at:
            raise self.error


def test_a_sink_is_fed_in_a_lane(line):
    """Piece by piece, and then the action gets it in place of the body."""
    line.poller.api.sink = Sink()
    raw = request("POST", "/sink", body=b"x" * 1000)
    line.receive(raw[:-900])
    assert line.poller.api.sink.taken == 100
    line.receive(raw[-900:] + request("GET", "/a"))
    assert [reply.body for reply in line.replies()] == [b"1 /sink 1000\n", b"2 /a b''\n"]


def test_a_body_for_a_sink_may_take_long_while_it_goes_on(line):
    """What ends it is a pause."""
    line.poller.api.sink = Sink()
    line.receive(request("POST", "/sink", "Content-Length: 100000"))
    for _ in range(100):
        line.wait(PROGRESS_TIMEOUT_S - 0.1)
        line.receive(b"x")
    assert (line.state, line.poller.api.sink.taken) == (RECEIVING, 100)
    line.wait(PROGRESS_TIMEOUT_S)
    assert line.statuses() == [408]


@pytest.mark.parametrize(("error", "status"), [(Refused(400, "not this"), 400), (ZeroDivisionError(), 500)])
def test_what_a_sink_refuses_is_refused_at_once(line, error, status, caplog):
    """The rest of the body is not waited for, and is not taken for a request."""
    line.poller.api.sink = Sink(50, error)
    line.receive(request("POST", "/sink", "Content-Length: 1000") + b"x" * 60, request("GET", "/a"))
    assert (line.statuses(), line.state) == ([status], LINGERING)


def test_without_a_thread_for_a_sink_the_connection_ends(line):
    """What follows is the body, which is not read."""
    line.poller.api.sink = Sink()
    line.poller.lanes[PEERS].is_full = True
    line.receive(request("POST", "/sink", body=b"x" * 100))
    assert (line.statuses(), line.state) == ([503], LINGERING)


def test_an_answer_in_pieces_is_made_as_it_is_read(line):
    """No piece is made before there is room for it, and in the end the connection goes on."""
    line.sock.room = 500
    line.receive(request("GET", "/pieces"))
    assert line.state is SENDING
    assert len(line.sock.sent) == 500
    sizes = [len(line.sock.sent)]
    while line.state is SENDING:
        line.read(150)
        sizes.append(len(line.sock.sent))
    assert line.state is RECEIVING
    assert line.sock.sent.endswith(b"x" * 100 + b"\r\n0\r\n\r\n")
    assert sizes[:3] == [500, 650, 800]
    assert line.due_in() == IDLE_TIMEOUT_S


def test_pieces_for_a_peer_may_take_long_while_that_goes_on(line):
    """What ends them is a pause."""
    line.sock.room = 300
    line.receive(request("GET", "/peer-pieces"))
    for _ in range(20):
        assert line.due_in() == PROGRESS_TIMEOUT_S
        line.wait(PROGRESS_TIMEOUT_S - 1)
        line.read(10)
    assert line.state is SENDING
    line.wait(PROGRESS_TIMEOUT_S)
    assert line.state is CLOSED


def test_the_head_of_an_answer_in_pieces_is_its_first(line):
    """HEAD gets that alone."""
    line.receive(request("HEAD", "/pieces"))
    assert line.sock.sent.endswith(b"Transfer-Encoding: chunked\r\n\r\n")
    assert line.state is RECEIVING


def test_100_continue_is_said_once_the_head_is_good(line):
    """Not without need: where the body came along, or to HTTP/1.0, which does not know it."""
    head = request("POST", "/a", "Expect: 100-continue", "Content-Length: 2")
    line.receive(head)
    assert (line.statuses(), line.due_in()) == ([100], BODY_TIMEOUT_S)
    line.receive(b"{}")
    assert line.statuses() == [200]
    line.receive(head + b"{}")
    assert line.statuses() == [200]
    line.receive(request("POST", "/a", "Expect: 100-continue", "Content-Length: 1001"))
    assert line.statuses() == [413]
    old = Line()
    old.receive(request("POST", "/a", "Expect: 100-continue", "Content-Length: 2", version="1.0"), b"{}")
    assert old.statuses() == [200]


def test_who_does_not_read_100_continue_keeps_its_time_for_the_body(line):
    """From when it was read."""
    line.sock.room = 0
    line.receive(request("POST", "/a", "Expect: 100-continue", "Content-Length: 2"))
    assert (line.state, line.due_in()) == (SENDING, SEND_TIMEOUT_S)
    line.read(1000)
    assert (line.state, line.due_in()) == (RECEIVING, BODY_TIMEOUT_S)
    line.receive(b"{}")
    assert line.statuses() == [100, 200]


# What is kept.


def test_what_is_kept_of_requests_and_answers_is_counted(line):
    """As long as it is, and of a long body, for which peers vouch, a part only."""
    line.receive(request("GET", "/a"))
    assert line.poller.held == 0
    raw = request("POST", "/a", "Content-Length: 900")
    line.receive(raw[:50])
    assert line.poller.held == 50
    line.receive(raw[50:], b"x" * 500)
    assert line.poller.held == 500
    line.sock.room = 0
    line.receive(b"x" * 400)
    assert 150 < line.poller.held < 1200
    line.read(10**6)
    assert line.poller.held == 0
    line.poller.api.sink = None
    line.receive(request("POST", "/sink", "Content-Length: 10000000") + b"x" * 1_000_000)
    assert line.poller.held == connections.HELD_MOST


@pytest.mark.parametrize("raw", [b"GET /a HTTP/1.1\r\nX: " + b"x" * 80, request("POST", "/a", body=b"x" * 900)[:-1]])
def test_without_room_for_half_a_request_the_client_is_told(line, raw):
    """Others are served, and what there was of it is let go."""
    line.poller.held_max = 50
    line.receive(request("GET", "/a"), raw)
    assert (line.statuses(), line.state, line.poller.held) == ([200, 503], LINGERING, 0)


def test_without_room_for_an_answer_nobody_reads_the_connection_ends(line):
    """But not that of a peer, which is known and waited for."""
    line.poller.held_max = 50
    line.sock.room = 10
    line.receive(request("GET", "/a"))
    assert line.state is CLOSED
    peer = Line()
    peer.poller.held_max, peer.sock.room = 50, 10
    peer.receive(request("GET", "/peer-pieces"))
    assert peer.state is SENDING


# Places, and stopping.


def test_a_connection_is_a_guest_until_it_asks_as_a_client(line):
    """Who watches takes no place."""
    line.receive(request("GET", "/vital"))
    assert line.connection.kind is GUEST
    line.receive(request("GET", "/a"))
    assert line.connection.kind is CLIENT


def test_without_a_place_only_what_is_vital_is_served(line):
    """Whether it came before or not; a client is told once its head is there, and then hung up on."""
    client = Line()
    client.receive(request("GET", "/a"))
    line.poller.repeated = client.poller.repeated
    line.poller.has_places = False
    line.receive(request("GET", "/vital"), request("GET", "/vital"), request("GET", "/a"))
    assert (line.statuses(), line.state) == ([200, 200, 503], LINGERING)
    line = Line()
    line.poller.has_places = False
    line.receive(request("POST", "/a", "Content-Length: 5"))
    assert (line.statuses(), line.state) == ([503], LINGERING)


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [(b"", []), (b"GET /a", []), (request("POST", "/a", "Content-Length: 5"), [503]), (request("GET", "/a"), [200])],
)
def test_who_gives_way_is_told_if_its_request_was_known(line, sent, statuses):
    """Otherwise nobody would know whether it was counted."""
    line.receive(sent)
    line.connection.give_way(line.now)
    assert (line.state, line.statuses()) == (CLOSED, statuses)


@pytest.mark.parametrize("sent", [b"GET /a", request("POST", "/a", "Content-Length: 5") + b"x"])
def test_who_has_sent_half_a_request_is_told_that_the_node_stops(line, sent):
    """It is not waited for."""
    line.receive(sent)
    line.connection.stop(line.now)
    assert (line.statuses(), line.state) == ([503], LINGERING)


def test_who_has_just_been_answered_may_ask_once_more_when_the_node_stops(line):
    """A request may be on its way; the connection ends after it, or soon without it."""
    other = Line()
    for each in (line, other):
        each.receive(request("GET", "/a"))
        each.poller.ending, each.poller.repeated = {CLIENT}, {}
        each.wait(0.5)
        each.connection.stop(each.now)
        assert (each.statuses(), each.state, each.due_in()) == ([200], RECEIVING, GRACE_S)
    line.receive(request("GET", "/a"))
    assert ([reply.headers["connection"] for reply in line.replies()], line.state) == (["close"], LINGERING)
    other.wait(GRACE_S)
    assert (other.replies(), other.state) == ([], CLOSED)


def test_who_is_idle_is_hung_up_on_when_the_node_stops(line):
    """Nothing is waited for."""
    line.receive(request("GET", "/a"))
    line.wait(5)
    line.connection.stop(line.now)
    assert line.state is CLOSED


@pytest.mark.parametrize("path", ["/waits", "/pieces"])
def test_what_is_being_answered_when_the_node_stops_is_the_last(line, path):
    """It is answered in full."""
    line.sock.room = 0
    line.sock.arrived.append(request("GET", path))
    line.connection.receive(line.now)
    line.poller.ending = {CLIENT}
    line.connection.stop(line.now)
    line.work()
    line.connection.stop(line.now)
    line.read(10**6)
    assert line.state is LINGERING
    assert b"\r\nConnection: close\r\n" in line.sock.sent
    assert line.sock.sent.endswith((b"/waits b''\n", b"\r\n0\r\n\r\n"))


def test_time_is_counted_from_when_the_request_was_there(line, monkeypatch):
    """Not the time the client took, but that in the queue of a lane."""
    times = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    line.receive(request("POST", "/slow", "Content-Length: 2"), b"{}")
    assert line.poller.tally.of("/slow").seconds == 1


# Streams.


@pytest.fixture
def streaming(line):
    """A connection with a stream, the head of which was read."""
    line.receive(request("GET", "/stream"))
    assert (line.state, line.sock.sent.partition(b"\r\n\r\n")[2]) == (STREAMING, b"first,")
    assert line.poller.streams == {line.connection}
    assert not line.poller.repeated
    return line


def go_on(line, event=b""):
    line.poller.api.stream.event = event
    line.connection.go_on_streaming(line.now)


def test_a_stream_goes_on_for_as_long_as_it_has_something(streaming):
    """No deadline ends it, and what the other side sends does nothing."""
    for event in (b"second,", b"", b"third,"):
        go_on(streaming, event)
        streaming.wait(1000)
        assert streaming.state is STREAMING
    streaming.sock.arrived.append(request("GET", "/quick"))
    streaming.connection.receive(streaming.now)
    assert streaming.sock.sent.endswith(b"\r\n\r\nfirst,second,third,")
    go_on(streaming, None)
    assert streaming.state is LINGERING
    assert streaming.sock.is_shut


def test_to_one_that_reads_slowly_a_stream_sends_less(streaming):
    """It waits until all was read, and keeps one event; for one that reads nothing it ends."""
    streaming.sock.room = 3
    for number in range(100):
        go_on(streaming, b"%03d," % number)
    assert (streaming.state, streaming.poller.held) == (SENDING, 1)
    streaming.read(100)
    assert streaming.state is STREAMING
    go_on(streaming, b"last")
    assert streaming.sock.sent.endswith(b"first,000,last")
    streaming.sock.room = 0
    go_on(streaming, b"unread")
    streaming.wait(SEND_TIMEOUT_S)
    assert streaming.state is CLOSED


def test_a_stream_ends_as_the_node_stops(streaming):
    streaming.poller.ending = {CLIENT}
    streaming.connection.stop(streaming.now)
    assert streaming.state is LINGERING


def test_a_stream_that_its_client_does_not_read_ends_as_the_node_stops(streaming):
    streaming.sock.room = 0
    go_on(streaming, b"unread")
    streaming.poller.ending = {CLIENT}
    streaming.connection.stop(streaming.now)
    assert streaming.state is SENDING
    streaming.read(100)
    assert streaming.state is LINGERING


def test_a_stream_ends_when_its_client_hangs_up(streaming):
    streaming.hang_up()
    assert streaming.state is CLOSED

import pytest

from counter.http1 import Refused
from counter.intake import BEFORE, BODY, HEAD, Intake
from counter.lanes import QUICK

REQUEST = b"POST /path HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"


class Api:
    def __init__(self, sink=None):
        self.sink = sink

    def route_of(self, path):
        return path

    def body_max(self, _head):
        return 10

    def body_sink(self, _head):
        return self.sink

    def action(self, _head):
        def act(_body, _connection):
            return b""

        act.pace = QUICK
        return act


def begun(intake, api):
    exchange = intake.begin(intake.next(), api)
    exchange.choose(api)
    return exchange


@pytest.mark.parametrize("cut", range(1, len(REQUEST)))
def test_a_request_may_arrive_in_any_two_parts(cut):
    intake, api = Intake(), Api()
    intake.feed(REQUEST[:cut])
    if b"\r\n\r\n" in REQUEST[:cut]:
        begun(intake, api)
    assert intake.next() is None
    assert intake.missing == (HEAD if intake.exchange is None else BODY)
    kept = intake.kept
    intake.feed(REQUEST[cut:])
    exchange = intake.exchange or begun(intake, api)
    assert intake.next() == b""
    assert b"".join(exchange.chunks) == b"body"
    assert kept in (cut, cut - len(REQUEST) + 4)
    assert intake.is_empty


def test_the_pieces_of_a_body_are_for_its_sink():
    intake = Intake()
    intake.feed(REQUEST[:-2])
    exchange = begun(intake, Api(sink=object()))
    assert intake.next() == b"bo"
    assert intake.next() is None
    intake.feed(REQUEST[-2:])
    assert [intake.next(), intake.next()] == [b"dy", b""]
    assert (exchange.chunks, intake.kept) == ([], 0)


def test_a_client_waits_for_a_sign_only_while_its_body_has_not_come():
    request = REQUEST.replace(b"Host", b"Expect: 100-continue\r\nHost")
    for raw, awaits in ((request, False), (request[:-1], True)):
        intake = Intake()
        intake.feed(raw)
        begun(intake, Api())
        assert intake.awaits_continue == awaits


def test_after_what_is_refused_it_starts_anew():
    intake = Intake()
    intake.feed(b"nonsense\r\n\r\n")
    with pytest.raises(Refused):
        intake.next()
    intake.start_anew()
    assert (intake.is_empty, intake.missing) == (True, BEFORE)

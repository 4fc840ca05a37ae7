"""Waiting for sockets, by both ways there are."""

import contextlib
import socket

import pytest

from counter import events
from counter.events import LOOKS, READ, REST, WRITE, BySelector, Events


@pytest.fixture
def pair():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(sock) for sock in socket.socketpair()]


@pytest.fixture(params=sorted({Events, BySelector}, key=str))
def waiting(request):
    waiting = request.param()
    yield waiting
    waiting.close()


def test_what_can_be_received_from_is_found(waiting, pair):
    ours, theirs = pair
    waiting.register(ours, READ, "ours")
    assert waiting.wait(0) == waiting.wait(-1) == []
    theirs.send(b"x")
    assert waiting.wait(60) == ["ours"]
    ours.recv(1)
    assert waiting.wait(0) == []


def test_what_is_waited_for_can_change(waiting, pair):
    ours, theirs = pair
    waiting.register(ours, READ, "ours")
    waiting.modify(ours, WRITE)
    assert waiting.wait(60) == ["ours"]
    waiting.modify(ours, READ)
    assert waiting.wait(0) == []
    theirs.send(b"x")
    assert waiting.wait(60) == ["ours"]
    waiting.unregister(ours)
    assert waiting.wait(0) == []


def test_a_socket_that_is_hung_up_on_is_found(waiting, pair):
    ours, theirs = pair
    waiting.register(ours, READ, "ours")
    theirs.close()
    assert waiting.wait(60) == ["ours"]


class Fake(events._Events):
    """Answers what it is told to, and notes for how long it was to wait."""

    def __init__(self, *answers):
        super().__init__()
        self._answers, self.timeouts = list(answers), []

    def _poll(self, timeout_s):
        self.timeouts.append(timeout_s)
        return self._answers.pop(0)


def test_a_single_client_is_looked_out_for():
    waiting = Fake(["a"], [], [], ["a"])
    assert waiting.wait(1) == ["a"]
    assert waiting.wait(1) == ["a"]
    assert waiting.timeouts == [1, 0, 0, 0]


def test_looks_in_vain_are_followed_by_a_rest():
    waiting = Fake(["a"], *[[]] * LOOKS, *[["a"]] * (REST + 2))
    for _ in range(REST + 3):
        assert waiting.wait(1) == ["a"]
    assert waiting.timeouts == [1, *[0] * LOOKS, *[1] * (REST + 1), 0]


def test_several_clients_are_not_looked_out_for():
    waiting = Fake(["a", "b"], ["a"], ["a"])
    for _ in range(3):
        waiting.wait(1)
    assert waiting.timeouts == [1, 1, 0]

import logging

import pytest

from counter.outgoing import Outgoing


class Socket:
    """Takes as many bytes as there is room for."""

    def __init__(self, room):
        self.room, self.sent = room, b""

    def send(self, data):
        taken = bytes(data[: self.room])
        if not taken:
            raise BlockingIOError
        self.sent, self.room = self.sent + taken, self.room - len(taken)
        return len(taken)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_all_is_sent_in_order_however_little_the_socket_takes(step):
    sock = Socket(0)
    outgoing = Outgoing(sock)
    outgoing.add(b"head ")
    outgoing.add(b"first ", iter([b"second ", b"third"]))
    while not outgoing.is_empty:
        assert outgoing.make_pieces()
        sock.room += step
    assert sock.sent == b"head first second third"


def test_a_piece_is_made_only_once_those_before_are_sent():
    made = []
    outgoing = Outgoing(Socket(3))
    outgoing.add(b"1234", (made.append(piece) or piece for piece in [b"a", b"b"]))
    assert outgoing.make_pieces()
    assert (made, outgoing.size, outgoing.has_further) == ([], 1, True)


def test_what_comes_together_is_sent_together():
    sock = Socket(100)
    outgoing = Outgoing(sock)
    outgoing.add(b"one")
    outgoing.add(b"two")
    assert outgoing.size == 6
    assert outgoing.flush()
    assert (sock.sent, outgoing.size) == (b"onetwo", 0)


def test_a_piece_that_fails_ends_the_response(caplog):
    def pieces():
        yield b"a"
        raise LookupError("a bug")

    sock = Socket(100)
    outgoing = Outgoing(sock)
    outgoing.add(b"head ", pieces())
    with caplog.at_level(logging.ERROR):
        assert not outgoing.make_pieces()
    assert (sock.sent, outgoing.is_empty) == (b"head a", True)
    assert "a bug" in caplog.text

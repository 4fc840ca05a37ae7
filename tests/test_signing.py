"""Signatures of lines: what proves, and what does not."""

import itertools
import random

import pytest

from counter.signing import LINE_MAX, Opener, Signer, WrongSignature, seal, sealed_size

LINES = [b'{"v":1}', b"second " * 1000, b"", b"last"]
OLD, NEW, OTHER = (letter * 32 for letter in (b"a", b"b", b"c"))


def opened(chain, signature, body, size=7):
    """Return the lines of a body that arrives in parts of that size."""
    opener, lines = Opener(chain, signature), []
    for start in range(0, len(body), size):
        lines += opener.feed(body[start : start + size])
    return [*lines, opener.finish()]


def sealed(signer, lines=LINES):
    signature, pieces = seal(signer.request(), lines)
    return signature, b"".join(pieces)


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_lines_come_out_as_they_went_in(size):
    signer = Signer((OLD,), "counter")
    signature, body = sealed(signer)
    assert opened(signer.request(), signature, body, size) == LINES
    assert sealed_size(LINES) == len(body)


def test_a_single_line_is_the_whole_body():
    """The signature of most messages is in their head alone."""
    signer = Signer((), "counter")
    signature, body = sealed(signer, LINES[:1])
    assert body == LINES[0]
    assert sealed_size(LINES[:1]) == len(body)
    assert opened(signer.request(), signature, body) == LINES[:1]


@pytest.mark.parametrize("seed", range(20))
def test_lines_cannot_be_changed_left_out_moved_or_repeated(seed):
    rng, signer = random.Random(seed), Signer((OLD,), "counter")
    signature, body = sealed(signer)
    damaged = bytearray(body)
    damaged[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    first, *rest = body.split(b"\n")
    orders = [order for order in itertools.product(rest, repeat=rng.randint(1, 4)) if list(order) != rest[: len(order)]]
    for bad in (bytes(damaged), b"\n".join([first, *rng.choice(orders)]), body[1:], body + b"x", body + b"\n"):
        with pytest.raises(WrongSignature):
            opened(signer.request(), signature, bad)


def test_no_more_than_a_line_is_kept_unproven():
    opener = Opener(Signer((), "counter").request(), "0" * 64)
    opener.feed(b"x" * LINE_MAX)
    with pytest.raises(WrongSignature):
        opener.feed(b"x")


def test_a_wrong_line_shows_as_soon_as_it_is_whole():
    signer = Signer((), "counter")
    opener = Opener(signer.request(), sealed(signer)[0])
    with pytest.raises(WrongSignature):
        opener.feed(b"wrong\n")


@pytest.mark.parametrize("signature", ["", "x", "ä", "0" * 64, "0" * 10**5])
def test_nonsense_proves_nothing(signature):
    signer = Signer((), "counter")
    with pytest.raises(WrongSignature):
        opened(signer.request(), signature, b"{}")


@pytest.mark.parametrize("other", [Signer((OTHER,), "counter"), Signer((), "counter"), Signer((OLD,), "other")])
def test_only_who_has_the_secret_and_the_name_can_sign(other):
    with pytest.raises(WrongSignature):
        opened(Signer((OLD,), "counter").request(), *sealed(other))


def test_an_answer_is_for_its_request_alone():
    signer = Signer((OLD,), "counter")
    asked, answering, asked_again = (signer.request() for _ in range(3))
    signature, pieces = seal(asked, [b"question"])
    opened(answering, signature, b"".join(pieces))
    seal(asked_again, [b"another question"])
    answer_signature, pieces = seal(answering.answer(), LINES)
    body = b"".join(pieces)
    assert opened(asked.answer(), answer_signature, body) == LINES
    for chain in (asked_again.answer(), signer.request()):
        with pytest.raises(WrongSignature):
            opened(chain, answer_signature, body)


@pytest.mark.parametrize(
    ("asking", "asked"),
    [((OLD,), (OLD, NEW)), ((OLD, NEW), (NEW, OLD)), ((NEW, OLD), (NEW,)), ((OLD, NEW), (OLD,))],
)
def test_a_secret_can_take_the_place_of_another_node_by_node(asking, asked):
    """Old; old and new; new and old; new: neighbours in this order understand each other, in both directions."""
    for one, other in ((asking, asked), (asked, asking)):
        asks, answers = Signer(one, "counter").request(), Signer(other, "counter").request()
        signature, pieces = seal(asks, LINES)
        assert opened(answers, signature, b"".join(pieces)) == LINES
        signature, pieces = seal(answers.answer(), LINES)
        assert opened(asks.answer(), signature, b"".join(pieces)) == LINES


def test_what_was_replaced_is_not_accepted():
    with pytest.raises(WrongSignature):
        opened(Signer((NEW,), "counter").request(), *sealed(Signer((OLD,), "counter")))

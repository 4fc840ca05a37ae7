"""Messages as bytes: what survives the journey, and what is refused."""

import contextlib
import json
import random

import pytest
from halves import A_SENDS, AT_A, AT_B, ME, NOBODY, A, B, C, with_more

from counter import AMOUNT_MAX, GAP, NEEDS, Counter, Delta, wire
from counter.config import parse_arguments
from counter.ids import SEQUENCE_MAX
from counter.signing import sealed_size
from counter.streams import LARGE, Totals
from counter.vectors import Summary
from counter.wire import SHORT, Message, Sender, View, decode, encode


@pytest.mark.parametrize(
    "message",
    [
        Message(A_SENDS, View([(B, AT_B, 3)], [(C, 5)]), {A: 5}, None, None, [], wants=False),
        Message(A_SENDS._replace(version="1.2.3"), NOBODY, None, None, {A: 5}, [], {A: GAP, B: NEEDS}, hash="0" * 32),
        Message(A_SENDS, View([(B, AT_B, 3)], [(C, 5)]), None, Summary(2**127 + 1, {A: 5, B: 0}), None, []),
        Message(
            A_SENDS._replace(address=None, leaving=True), NOBODY, None, None, None, [Delta(A, 1, 3, {"x": (3, -7)})]
        ),
    ],
)
def test_a_message_survives_its_journey(message):
    assert decode(encode(message)) == message


def test_where_there_is_a_summary_the_vector_stays_at_home():
    message = Message(A_SENDS, NOBODY, {A: 5}, Summary(7, {A: 5}), None, [])
    assert decode(encode(message)) == message._replace(applied=None)


DIGEST = "0123456789abcdef" * 2


def test_what_a_later_version_adds_is_ignored():
    """At every level: so the nodes of a cluster can be replaced by newer ones one by one."""
    keys = (2, DIGEST, "x", 1, 0.5), (3, DIGEST, "y", 1, 0.5, ((A, 1),))
    delta = Delta(B, 1, 3, {"x": (2, 5), "y": (3, 1)}, keys, ((A, 1), (C, 1)))
    for applied, summary in (({A: 5}, None), (None, Summary(7, {A: 5}))):
        message = Message(A_SENDS, View([(B, AT_B, 3)], [(C, 5)]), applied, summary, {B: 3}, [delta], {C: GAP})
        (line,) = encode(message)
        fields = json.loads(line)
        more = with_more(fields)
        assert json.dumps(more).count("later") == 12
        assert decode([json.dumps(more).encode()]) == decode(encode(message)) == message


def test_a_later_version_says_which_it_is():
    assert decode([json.dumps(with_sender() | {"v": 7}).encode()]).sender.v == 7
    assert decode(encode(Message(A_SENDS, NOBODY, None, None, None, []))).sender.v == wire.VERSION


# Recorded from nodes of version 1.0.0, commit 1601b23.
RECORDED = [
    b'{"from":{"id":"aaaaaaaa-aaaa-8aaa","address":"10.0.0.1:80","beat":7,"leaving":false},"view":{"peers":'
    b'[["bbbbbbbb-bbbb-8bbb","10.0.0.2:80",3],["cccccccc-cccc-8ccc","[::1]:80",9]],"left":["ffffffff-ffff-8fff"]},'
    b'"applied":{"aaaaaaaa-aaaa-8aaa":3,"bbbbbbbb-bbbb-8bbb":2},"deltas":[{"replica":"aaaaaaaa-aaaa-8aaa","after":1,'
    b'"through":3,"totals":{"y":[3,1],"x":[2,-5]},"keys":[[3,"0123456789abcdef0123456789abcdef","y",1,0.5]]},'
    b'{"replica":"ffffffff-ffff-8fff","after":0,"through":1,"totals":{"x":[1,-4]},"requires":'
    b'[["aaaaaaaa-aaaa-8aaa",1],["bbbbbbbb-bbbb-8bbb",1]]}]}',
    b'{"from":{"id":"aaaaaaaa-aaaa-8aaa","address":null,"beat":7,"leaving":true},"view":{"peers":[],"left":[]},'
    b'"hash":"00000000000000000000000000000000","confirms":{"bbbbbbbb-bbbb-8bbb":2}}',
    b'{"from":{"id":"aaaaaaaa-aaaa-8aaa","address":"10.0.0.1:80","beat":7,"leaving":false},"deltas":'
    b'[{"replica":"aaaaaaaa-aaaa-8aaa","after":0,"through":1,"totals":{"default":[1,1]}}]}',
    b'{"from":{"id":"aaaaaaaa-aaaa-8aaa","address":"10.0.0.1:80","beat":7,"leaving":false},"confirms":'
    b'{"bbbbbbbb-bbbb-8bbb":2}}',
]


def test_what_nodes_of_version_1_0_send_is_understood():
    """It says neither its version nor whom it is for."""
    sender = Sender(A, AT_A, 7, False, v=0)
    cancelling = Delta(ME, 0, 1, {"x": (1, -4)}, (), ((A, 1), (B, 1)))
    deltas = [Delta(A, 1, 3, {"y": (3, 1), "x": (2, -5)}, ((3, DIGEST, "y", 1, 0.5),)), cancelling]
    view = View([(B, AT_B, 3), (C, "[::1]:80", 9)], [(ME, wire.BEAT_MAX)])
    assert [decode([body]) for body in RECORDED] == [
        Message(sender, view, {A: 3, B: 2}, None, None, deltas),
        Message(sender._replace(address=None, leaving=True), NOBODY, None, None, {B: 2}, [], hash="0" * 32),
        Message(sender, NOBODY, None, None, None, [Delta(A, 0, 1, {"default": (1, 1)})]),
        Message(sender, NOBODY, None, None, {B: 2}, []),
    ]


GOOD_KEY = [3, DIGEST, "y", 1, 0.5]
GOOD_DELTA = {"replica": A, "after": 1, "through": 3, "totals": {"x": [2, 5], "y": [3, 1]}}


def with_delta(**changes):
    return {"from": A_SENDS._asdict(), "deltas": [GOOD_DELTA | changes]}


def with_sender(**changes):
    return {"from": A_SENDS._asdict() | changes}


@pytest.mark.parametrize("body", [b"", b"x", b"\xff", b"[]", b"{}", b"1", b'"x"', b"null", b"[" * 60_000])
def test_what_is_no_message_is_refused(body):
    with pytest.raises(ValueError):
        decode([body])


@pytest.mark.parametrize(
    "fields",
    [
        {"from": None},
        {"from": []},
        {"from": {}},
        {"from": {"id": A}},
        with_sender(id="x"),
        with_sender(id=None),
        with_sender(id=A + "\n"),
        with_sender(address="x"),
        with_sender(address=5),
        with_sender(address=[]),
        with_sender(beat=-1),
        with_sender(beat=1.5),
        with_sender(beat=True),
        with_sender(beat=2**60),
        with_sender(leaving=1),
        with_sender(version=1),
        with_sender(version=""),
        with_sender(version="1\n"),
        with_sender() | {"v": "1"},
        with_sender() | {"v": -1},
        with_sender() | {"refused": []},
        with_sender() | {"refused": {"x": "gap"}},
        with_sender() | {"refused": {A: None}},
        with_sender() | {"view": None},
        with_sender() | {"view": {"peers": [[A, AT_A]], "left": []}},
        with_sender() | {"view": {"peers": [[A, "x", 1]], "left": []}},
        with_sender() | {"view": {"peers": [["x", AT_A, 1]], "left": []}},
        with_sender() | {"view": {"peers": [[A, AT_A, "1"]], "left": []}},
        with_sender() | {"view": {"peers": [], "left": ["x"]}},
        with_sender() | {"view": {"peers": [], "left": [None]}},
        with_sender() | {"view": {"peers": [], "left": [[C]]}},
        with_sender() | {"view": {"peers": [], "left": [[C, -1]]}},
        with_sender() | {"applied": []},
        with_sender() | {"applied": {"x": 1}},
        with_sender() | {"applied": {A: -1}},
        with_sender() | {"applied": {A: 2**62}},
        with_sender() | {"applied": {A: "1"}},
        with_sender() | {"hash": 1},
        with_sender() | {"wants": 1},
        with_sender() | {"rest": "0" * 32},
        with_sender() | {"rest": "0" * 31 + "g", "recent": {}},
        with_sender() | {"rest": 1, "recent": {}},
        with_sender() | {"rest": "0" * 32, "recent": {A: -1}},
        with_sender() | {"rest": "0" * 32, "recent": [A]},
        with_sender() | {"confirms": {A: None}},
        with_sender() | {"confirms": [A]},
        with_sender() | {"deltas": {}},
        with_sender() | {"deltas": [None]},
        with_sender() | {"deltas": [[]]},
        with_delta(replica="x"),
        with_delta(replica=[]),
        with_delta(after=-1),
        with_delta(after=3),
        with_delta(after="1"),
        with_delta(through=2**62),
        with_delta(totals=[]),
        with_delta(totals={"x": [3]}),
        with_delta(totals={"x": 3}),
        with_delta(totals={"x": "31"}),
        with_delta(totals={"a b": [3, 1]}),
        with_delta(totals={"x": [1, 1], "y": [3, 1]}),
        with_delta(totals={"x": [3, 1], "y": [3, 1]}),
        with_delta(totals={"x": [3.0, 1]}),
        with_delta(totals={"x": [3, 1.0]}),
        with_delta(totals={"x": [3, 3 * AMOUNT_MAX + 1]}),
        with_delta(totals={"x": [2, AMOUNT_MAX + 1], "y": [3, -AMOUNT_MAX - 1]}),
        *(
            with_delta(keys=[key])
            for key in (
                [1, DIGEST, "y", 1, 0],
                [4, DIGEST, "y", 1, 0],
                [3, "x", "y", 1, 0],
                [3, DIGEST, "z", 1, 0],
                [3, DIGEST, "y", 0, 0],
                [3, DIGEST, "y", 1.0, 0],
                [3, DIGEST, "y", 1, -1],
                [3, DIGEST, "y", 1],
                None,
            )
        ),
        with_delta(keys=[GOOD_KEY, GOOD_KEY]),
        with_delta(requires=[[A, 0]]),
        with_delta(keys=[[*GOOD_KEY, [[A, 0]]]]),
        with_delta(keys=[[*GOOD_KEY, [["x", 1]]]]),
        with_delta(keys=[[*GOOD_KEY, 7]]),
        with_delta(requires=[["x", 1]]),
        with_delta(requires=None),
    ],
)
def test_a_message_with_any_impossible_part_is_refused(fields):
    with pytest.raises(ValueError):
        decode([json.dumps(fields).encode()])


def test_a_good_message_of_that_kind_is_taken():
    delta = Delta(A, 1, 3, {"x": (2, 5), "y": (3, 1)})
    assert decode([json.dumps(with_delta()).encode()]).deltas == [delta]
    fields = with_delta(keys=[GOOD_KEY], requires=[[B, 2]])
    delta = delta._replace(keys=(tuple(GOOD_KEY),), requires=((B, 2),))
    assert decode([json.dumps(fields).encode()]).deltas == [delta]


def long_message():
    """Return a message of which every part is too long for one line."""
    ids = [f"{number:08x}-1111-8111" for number in range(2 * wire.PIECE + 1)]
    names = [f"x{number}" for number in range(3 * wire.PIECE)]
    totals = {name: (number, -number) for number, name in enumerate(names, 1)}
    keys = tuple((number, DIGEST, name, 1, 0.5) for number, name in enumerate(names, 1))
    view = View([(id, AT_B, 3) for id in ids], [(id, 7) for id in ids])
    vector = {id: number for number, id in enumerate(ids)}
    small = Delta(A, 1, 3, {"x": (3, -7)}, (), ((A, 2), (B, 1)))
    deltas = [small, Delta(B, 0, len(names), totals, keys), small, Delta(C, 0, len(names), totals)]
    refused = dict.fromkeys(ids, GAP)
    return Message(A_SENDS, view, vector, None, vector, deltas, refused, C, 5)


def test_a_long_message_goes_in_lines_of_which_none_is_long():
    """So it is never whole in memory, and a slow link always moves something."""
    message = long_message()
    lines = list(encode(message))
    assert decode(lines) == message
    assert list(encode(message)) == lines
    assert len(lines) > 15
    assert max(map(len, lines)) < 20_000
    assert not any(b"\n" in line for line in lines)


@pytest.mark.parametrize("counters", [LARGE, LARGE + 1, SHORT - 1])
def test_many_entries_of_a_short_message_are_columns_at_both_ends(counters):
    """A dictionary of them takes 200 bytes an entry, and what a node frees it may keep."""
    one, other = Counter(A), Counter(B)
    one.increment_many({f"n{number}": number + 1 for number in range(counters)})
    for delta in one.deltas({}, 10**6, 0):
        other.merge(delta, 0)
    (delta,) = other.deltas({}, 10**6, 0)
    (line,) = encode(Message(A_SENDS, NOBODY, {A: counters}, None, None, [delta]))
    (arrived,) = decode([line]).deltas
    for end in (delta, arrived):
        assert isinstance(end.totals, Totals) == (counters > LARGE)
        assert {name: total for name, (_, total) in end.totals.items()} == {
            f"n{number}": number + 1 for number in range(counters)
        }


def test_a_short_message_of_long_parts_goes_in_lines_as_well():
    """Names of counters and of hosts may be long."""
    peers = [(A, f"{'x' * 60}.{'y' * 60}.{'z' * 60}.{number}.example:80", 1) for number in range(500)]
    message = Message(A_SENDS, View(peers, []), {}, None, None, [])
    lines = list(encode(message))
    assert decode(lines) == message
    assert len(lines) > 5
    assert max(map(len, lines)) <= wire.LINE_BYTES


def test_a_message_with_all_that_the_flags_allow_is_taken():
    """All of one node travels in one message; a bound below would keep it from its peers for ever."""
    numbers = range(1, 1001)
    totals = {f"{'x' * 124}{number:04}": (SEQUENCE_MAX - 1001 + number, -(2**70)) for number in numbers}
    last = SEQUENCE_MAX - 1001
    renewed = tuple((id, SEQUENCE_MAX) for id in (A, B))
    keys = [(last + number, DIGEST, name, -AMOUNT_MAX, 123456.789, renewed) for number, name in enumerate(totals, 1)]

    def size(*parts):
        return sealed_size(encode(Message(A_SENDS, NOBODY, None, None, None, [Delta(A, 0, SEQUENCE_MAX, *parts)])))

    flags = parse_arguments(["--max-counters", "1000000", "--max-idempotency-keys", "100000000", "--insecure"])
    per_counter, per_key = size(totals) / len(totals), size({}, keys) / len(keys)
    assert flags.max_counters * per_counter + flags.max_idempotency_keys * per_key < wire.BODY_MAX
    with pytest.raises(SystemExit):
        parse_arguments(["--max-idempotency-keys", "100000001", "--insecure"])


def test_no_call_of_json_gets_more_than_a_piece(monkeypatch):
    """Or all other threads would stand still."""
    sizes, dumps = [], json.dumps

    def size(value):
        return sum(map(size, value.values() if type(value) is dict else value)) if type(value) in (dict, list) else 1

    monkeypatch.setattr(json, "dumps", lambda value, **how: sizes.append(size(value)) or dumps(value, **how))
    list(encode(long_message()))
    assert max(sizes) <= wire.PIECE


def test_what_a_later_version_adds_to_a_long_message_is_ignored():
    message = long_message()
    lines = [json.dumps(with_more(json.loads(line))).encode() for line in encode(message)]
    lines[1:1] = [b'{"later":[1]}']
    assert decode(lines) == message


@pytest.mark.parametrize("left", [0, 1, 5, -1])
def test_a_long_message_that_is_cut_short_is_none(left):
    lines = list(encode(long_message()))
    with pytest.raises(ValueError):
        decode(lines[:left])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"5",
        b'{"totals":{"x":[1,1]}}',
        b'{"keys":[[1,"0123456789abcdef0123456789abcdef","x",1,0]]}',
        b'{"view":5}',
        b'{"view":{"peers":5}}',
        b'{"applied":5}',
        b'{"delta":{}}',
        b'{"end":true}',
    ],
)
def test_a_line_that_cannot_follow_is_refused(line):
    first, *_ = encode(long_message())
    with pytest.raises(ValueError):
        decode([first, line, b'{"end":true}', b'{"end":true}'])


@pytest.mark.parametrize("seed", range(20))
def test_a_message_damaged_anywhere_is_refused_or_still_makes_sense(seed):
    """Whatever bytes arrive, nothing but ValueError comes out."""
    rng = random.Random(seed)
    short = Message(A_SENDS, View([(B, AT_B, 3)], [(C, 5)]), {A: 5}, None, {B: 1}, [Delta(A, 1, 3, {"x": (3, -7)})])
    for message, tries in ((short, 300), (long_message(), 10)):
        lines = list(encode(message))
        for _ in range(tries):
            damaged = list(map(bytearray, lines))
            for _ in range(rng.randint(1, 3)):
                line = rng.choice(damaged)
                line[rng.randrange(len(line))] = rng.randrange(256)
            with contextlib.suppress(ValueError):
                assert list(encode(decode(map(bytes, damaged))))

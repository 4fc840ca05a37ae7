"""Messages between nodes: their shape, their lines of JSON, and what of them is believed.

Most messages are one line.  A long one says so in its first line, and goes on in others, each with
a piece of what is left, up to the line `{"end":true}`: so it is made, sent, read and checked piece
by piece, and nowhere there as a whole.

Nodes of different versions understand each other: a message says in `v` what its sender knows, and
whatever a receiver does not know of it, it ignores: further fields of any object, further items of
any entry.  A field without which a receiver would hold something wrong must not be sent to one
whose messages have a `v` that is too small for it.  What the versions added:

    1  `v` itself
    2  a vector as a summary: its latest entries in `recent`, and `rest`, a hash of all others
    3  in a delta `heir` and `absorbed`: who ended, and in whose history it is counted
"""

import itertools
import json
import re
from collections import namedtuple

from counter.addresses import parse_address
from counter.checks import GrowingDelta, is_int, require
from counter.ids import REPLICA, SEQUENCE_MAX
from counter.vectors import Summary

VERSION = 3  # of what a message may say
ABSORBING = 3  # the first that says which replicas ended, and were absorbed
SHORT = 1000  # entries; a message with more is cut into lines
PIECE = 100  # entries of a line, some 16 KB: so a slow link moves something all the time
LINE_BYTES = 48 * 1024  # of a line without its signature, at most
# Bytes of a message.  A receiver keeps no more of it than one line beyond what it needs, so this follows from
# what --max-counters and --max-idempotency-keys may be at most: 10^6 counters and 10^8 keys, with long names.
BODY_MAX = 2**36
BEAT_MAX = NUMBER_MAX = 2**53
CLOCK_MAX_S = 1e12
_WORD = re.compile("[!-~]{1,64}\\Z")
_HASH = re.compile("[0-9a-f]{32}\\Z")

# address: None while it is unknown; version: that of its program, None from nodes that do not say it;
# ready: clients may rely on what it counts; v: what it knows of messages, which says the message itself;
# wall: what its wall clock shows, in seconds since 1970, None from nodes that do not say it
Sender = namedtuple("Sender", "id address beat leaving version ready v wall", defaults=(None, False, VERSION, None))
View = namedtuple("View", "peers left")  # peers: [(id, address, beat)], left: [(id, its last beat)]
_FIELDS = "sender view applied summary confirms deltas refused to number clock hash wants"


class Message(namedtuple("Message", _FIELDS, defaults=({}, None, None, None, None, True))):
    """A request or its answer.

    `applied` is the complete vector of the sender; where there is a `summary`, that alone travels for
    it; a mere push has neither, and no view.  A `hash` is what nodes of version 1 may send for a vector: in
    an answer, it says that theirs is that of the request.

    Two parts answer deltas: `confirms` has the sequences through which their replicas are held now, and
    `refused` is {replica: why}, GAP or NEEDS.

    A request is for the process with the id `to`, and has a greater `number` with every request of its
    sender.  In an answer a number means that the request was not taken, as it was for another process,
    or is not new: the next is to have a greater number.

    `clock` is what the sender's clock showed as the message was cut, in seconds; None from nodes that do
    not say it: the ages of keys are as of then.

    A message that compares vectors and does not `wants` asks to be sent nothing until another one does: its sender
    joins, and takes what it lacks from another peer.  A node that does not know this field sends it all the same.
    """

    __slots__ = ()

    @property
    def compares(self):
        """Whether it says what its sender holds, and so is no mere push."""
        return self.applied is not None or self.summary is not None or self.hash is not None


def encode(message):
    """Yield the lines of a Message, as bytes; they are the same each time."""
    head = _head(message)
    entries = sum(len(delta.totals) + len(delta.keys) + len(delta.absorbed) for delta in message.deltas)
    entries += sum(len(entries) for _, entries in _collections(message))
    if entries <= SHORT:
        line = _json(head | _whole(message))
        if len(line) <= LINE_BYTES:
            yield line
            return
    yield _json(head | {"lines": True})
    yield from map(_json, _parts(message))
    yield b'{"end":true}'


def _json(value):
    return json.dumps(value, separators=(",", ":"), default=_plain).encode()


def _plain(totals):
    return dict(totals.items())  # dict(totals) would look up each name, which takes a search


def _head(message):
    """Return the fields that only the first line has, and those that say what there is."""
    sender = message.sender._asdict()
    head = {"v": sender.pop("v"), "from": sender}
    if message.to is not None:
        head["to"] = message.to
    if message.number is not None:
        head["n"] = message.number
    if message.clock is not None:
        head["clock"] = message.clock
    if message.hash is not None:
        head["hash"] = message.hash
    if not message.wants:
        head["wants"] = False
    if message.summary is not None:
        head |= {"rest": f"{message.summary.rest:032x}", "recent": {}}
    elif message.applied is not None:
        head["applied"] = {}
    if message.confirms is not None:
        head["confirms"] = {}
    return head


def _collections(message):
    """Yield (path, entries) of all that a message may have many of, but for its deltas."""
    if message.compares:
        yield ("view", "peers"), message.view.peers
        yield ("view", "left"), message.view.left
    if message.summary:
        yield ("recent",), message.summary.recent
    elif message.applied:
        yield ("applied",), dict(message.applied)
    if message.confirms:
        yield ("confirms",), message.confirms
    if message.refused:
        yield ("refused",), message.refused


def _whole(message):
    """Return all the fields of a short message that _head leaves out or empty."""
    fields = {}
    for (name, *inner), entries in _collections(message):
        if inner:
            fields.setdefault(name, {})[inner[0]] = entries
        else:
            fields[name] = entries
    if message.deltas:
        fields["deltas"] = [_delta_head(delta) | _delta_rest(delta) for delta in message.deltas]
    return fields


def _delta_head(delta):
    head = {"replica": delta.replica, "after": delta.after, "through": delta.through}
    if delta.requires:
        head["requires"] = delta.requires
    if delta.heir:
        head["heir"] = delta.heir
    return head


def _delta_rest(delta):
    rest = {"totals": delta.totals}
    if delta.keys:
        rest["keys"] = delta.keys
    if delta.absorbed:
        rest["absorbed"] = delta.absorbed
    return rest


def _parts(message):
    """Yield what the lines of a long message have, after the first."""
    for (name, *inner), entries in _collections(message):
        for piece in _pieces(entries.items() if type(entries) is dict else entries):
            piece = dict(piece) if type(entries) is dict else piece
            yield {name: {inner[0]: piece} if inner else piece}
    for delta in message.deltas:
        yield {"delta": _delta_head(delta)}
        for piece in _pieces(delta.absorbed.items()):
            yield {"absorbed": dict(piece)}
        for piece in _pieces(delta.totals.items()):
            yield {"totals": dict(piece)}
        for piece in _pieces(delta.keys):
            yield {"keys": piece}


def _pieces(entries):
    entries = iter(entries)
    return iter(lambda: list(itertools.islice(entries, PIECE)), [])


class Decoder:
    """Makes a Message of its lines, fed to it one by one.

    Raises ValueError if any part of it is not as it must be.
    """

    def __init__(self):
        self._fields = None  # of the first line, and what was added to them
        self._deltas = []
        self._ended = False

    @property
    def is_long(self):
        """Whether the lines so far say that others follow."""
        return self._fields is not None and not self._ended

    def feed(self, line):
        try:
            if self._fields is None:
                self._begin(json.loads(line))
            else:
                self._add(json.loads(line))
        except (TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(f"not a gossip message: {error}") from None

    def head(self):
        """Return the Message so far, which has no deltas: all that the first line says."""
        return self._message([])

    def finish(self):
        """Return the Message, once all lines were fed."""
        require(self._ended, "an end before the end")
        deltas = [delta.finish() for delta in self._deltas]
        return self._message(deltas)

    def _begin(self, fields):
        require(type(fields) is dict, "a line")
        self._fields, self._ended = fields, not fields.get("lines")
        for delta in _list(fields.pop("deltas", [])):
            self._begin_delta(delta)

    def _add(self, fields):
        require(not self._ended, "a line after the end")
        self._ended = bool(fields.get("end"))
        if "view" in fields:
            view = self._fields.setdefault("view", {"peers": [], "left": []})
            for name in ("peers", "left"):
                view[name] += _list(fields["view"].get(name, []))
        for name in ("applied", "recent", "confirms", "refused"):
            if name in fields:
                self._fields.setdefault(name, {}).update(fields[name])
        if "delta" in fields:
            self._begin_delta(fields["delta"])
        if "totals" in fields:
            self._deltas[-1].add_totals(fields["totals"])
        if "keys" in fields:
            self._deltas[-1].add_keys(_list(fields["keys"]))
        if "absorbed" in fields:
            self._deltas[-1].add_absorbed(fields["absorbed"])

    def _begin_delta(self, fields):
        replica, after, through = fields["replica"], fields["after"], fields["through"]
        delta = GrowingDelta(replica, after, through, fields.get("requires", ()), fields.get("heir"))
        delta.add_absorbed(fields.get("absorbed", {}))
        delta.add_totals(fields.get("totals", {}))
        delta.add_keys(_list(fields.get("keys", [])))
        self._deltas.append(delta)

    def _message(self, deltas):
        fields = self._fields
        try:
            v = fields.get("v", 0)
            require(is_int(v, 0, NUMBER_MAX), "a version")
            sender, view = _sender(fields["from"], v), _view(fields.get("view", {"peers": [], "left": []}))
            applied, hash, confirms, to = map(fields.get, ("applied", "hash", "confirms", "to"))
            refused, number, clock = fields.get("refused", {}), fields.get("n"), fields.get("clock")
            rest, recent, wants = fields.get("rest"), fields.get("recent"), fields.get("wants", True)
            require(rest is None or (_HASH.match(rest) and recent is not None), "a summary")
            summary = None if rest is None else Summary(int(rest, 16), recent)
            for vector in (applied, recent, confirms):
                for replica, sequence in vector.items() if vector is not None else ():
                    require(REPLICA.match(replica) and is_int(sequence, 0, SEQUENCE_MAX), "a vector")
            require((hash is None or type(hash) is str) and type(wants) is bool, "a hash, or what it wants")
            require(all(REPLICA.match(replica) and _WORD.match(why) for replica, why in refused.items()), "a refusal")
            require(to is None or REPLICA.match(to), "whom it is for")
            require(number is None or is_int(number, 0, NUMBER_MAX), "a number")
            require(clock is None or (type(clock) in (int, float) and 0 <= clock < CLOCK_MAX_S), "a clock")
        except (TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(f"not a gossip message: {error}") from None
        return Message(sender, view, applied, summary, confirms, deltas, refused, to, number, clock, hash, wants)


def decode(lines):
    """Return the Message of its lines; ValueError if any part of it is not as it must be."""
    decoder = Decoder()
    for line in lines:
        decoder.feed(line)
    return decoder.finish()


def _list(value):
    require(type(value) is list, "a list")
    return value


def _sender(fields, v):
    id, address, beat, leaving = (fields[name] for name in ("id", "address", "beat", "leaving"))
    version, ready = fields.get("version"), fields.get("ready", False)
    require(REPLICA.match(id) and is_int(beat, 0, BEAT_MAX), "its sender")
    require(type(leaving) is type(ready) is bool, "its sender")
    require(version is None or _WORD.match(version), "its program's version")
    wall = fields.get("wall")
    require(wall is None or (type(wall) in (int, float) and abs(wall) < CLOCK_MAX_S), "its wall clock")
    return Sender(id, None if address is None else parse_address(address), beat, leaving, version, ready, v, wall)


def _view(fields):
    peers = [(id, parse_address(address), beat) for id, address, beat, *_ in _list(fields["peers"])]
    require(all(REPLICA.match(id) and is_int(beat, 0, BEAT_MAX) for id, _, beat in peers), "its view")
    # A node before 1.1 says the id alone, and means for ever.
    left = [(item[0], item[1]) if type(item) is list else (item, BEAT_MAX) for item in _list(fields["left"])]
    require(all(REPLICA.match(id) and is_int(beat, 0, BEAT_MAX) for id, beat in left), "its view")
    return View(peers, left)

"""Messages between nodes: their shape, their JSON, what of it is believed, and their signatures.

Nodes of different versions understand each other: a message says in `v` what its sender knows, and
whatever a receiver does not know of it, it ignores: further fields of any object, further items of
any entry.  A field without which a receiver would hold something wrong must not be sent to one
whose messages have a `v` that is too small for it.
"""

import hashlib
import hmac
import itertools
import json
import re
from collections import namedtuple

from counter.addresses import parse_address
from counter.ids import AMOUNT_MAX, NAME, REPLICA, SEQUENCE_MAX
from counter.state import Delta

VERSION = 1  # of what a message may say
PATH = "/internal/gossip"
SIGNATURE = "Counter-Signature"  # the header of a request, and of its answer
# The header of a request whose body has more than BODY_UNPROVEN bytes: a receiver has to read, and
# keep, a whole body to find out whether it was signed, and nobody else is to make it do so.
LENGTH_SIGNATURE = "Counter-Length-Signature"
BODY_UNPROVEN = 64 * 1024
BODY_MAX = 256 * 2**20  # bytes of a message; a single replica's delta with a million keys needs them
PIECE = 2000  # entries encoded at a time, in 2 ms; 100,000 at once stopped all threads for 80 ms
BEAT_MAX = NUMBER_MAX = 2**53
AGE_MAX_S = 1e9
_DIGEST = re.compile("[0-9a-f]{32}\\Z")
_WORD = re.compile("[!-~]{1,64}\\Z")

# address: None while it is unknown; version: that of its program, None from nodes that do not say it;
# ready: clients may rely on what it counts
Sender = namedtuple("Sender", "id address beat leaving version ready", defaults=(None, False))
View = namedtuple("View", "peers left")  # peers: [(id, address, beat)], left: [(id, its last beat)]
# A request or its answer.  `applied` is the complete vector of the sender; where there is a
# `hash`, that alone travels for it; a mere push has neither, and no view.  Two parts answer
# deltas: `confirms` has the sequences through which their replicas are held now, and
# `refused` is {replica: why}, GAP or NEEDS.  A request is for the process with the id `to`, and has a
# greater `number` with every request of its sender.  In an answer a number means that the request was not
# taken, as it was for another process, or is not new: the next is to have a greater number.  `v` is 0 from
# nodes before 1.1.
Message = namedtuple(
    "Message", "sender view applied hash confirms deltas refused to number v", defaults=({}, None, None, VERSION)
)


class Signer:
    """Proves that a message comes from a node of this cluster, and as it was sent.

    With a secret, which may be empty, only its holders can make one; the cluster's name keeps
    apart clusters that reach each other by mistake.  Source: RFC 2104 (HMAC).
    """

    def __init__(self, secret, cluster):
        self._key = hmac.digest(secret, f"counter cluster {cluster}".encode(), "sha256")

    def request(self, body):
        """Return the signature of a request, as text."""
        return self._sign(b"POST", PATH.encode(), body)

    def length(self, request_signature, length):
        """Return the signature of the length in bytes of a request's body, given the request's own signature."""
        return self._sign(b"LENGTH", request_signature.encode(), str(length).encode())

    def answer(self, request_signature, body):
        """Return the signature of the answer to the request with that signature."""
        return self._sign(b"ANSWER", request_signature.encode(), body)

    def _sign(self, *parts):
        return hmac.digest(self._key, b"\n".join(parts), "sha256").hex()


def same_signature(given, right):
    """Return whether two signatures are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), right.encode())


def vector_hash(vector):
    """Return a hash on which two nodes agree exactly if their vectors are equal."""
    return hashlib.sha256(json.dumps(sorted(vector.items())).encode()).hexdigest()[:32]


def lacks(vector, other):
    """Return whether a node that holds `vector` lacks something that `other` shows."""
    # Most often they are equal, which is found out many times faster.
    return vector != other and any(vector.get(replica, 0) < sequence for replica, sequence in other.items())


def encode(message):
    """Return a Message as the bytes of its JSON."""
    sender, view, applied, hash, confirms, deltas, refused, to, number, v = message
    fields = {"v": v, "from": sender._asdict()}
    if to is not None:
        fields["to"] = to
    if number is not None:
        fields["n"] = number
    if hash is not None:
        fields.update(view=view._asdict(), hash=hash)
    elif applied is not None:
        fields.update(view=view._asdict(), applied=applied)
    if confirms is not None:
        fields["confirms"] = confirms
    if refused:
        fields["refused"] = refused
    if sum(len(delta.totals) + len(delta.keys) for delta in deltas) > PIECE:
        return f'{_json(fields)[:-1]},"deltas":[{",".join(map(_encoded_delta, deltas))}]}}'.encode()
    if deltas:
        fields["deltas"] = [{name: value for name, value in delta._asdict().items() if value != ()} for delta in deltas]
    return _json(fields).encode()


def _json(value):
    return json.dumps(value, separators=(",", ":"))


def _encoded_delta(delta):
    """Return the JSON of a delta, written in pieces: no other thread runs during a call of json."""
    fields = {name: value for name, value in delta._asdict().items() if value != () and name not in ("totals", "keys")}
    totals = ",".join(_json(dict(piece))[1:-1] for piece in _pieces(delta.totals.items()))
    keys = ",".join(_json(piece)[1:-1] for piece in _pieces(delta.keys))
    return f'{_json(fields)[:-1]},"totals":{{{totals}}},"keys":[{keys}]}}'


def _pieces(entries):
    entries = iter(entries)
    return iter(lambda: list(itertools.islice(entries, PIECE)), [])


def decode(body):
    """Return the Message of some bytes; ValueError if any part of it is not as it must be."""
    try:
        fields = json.loads(body)
        sender = _known(Sender, fields["from"])
        view = _known(View, fields["view"]) if "view" in fields else View([], [])
        deltas = [_known(Delta, delta) for delta in _list(fields.get("deltas", []))]
        vectors = map(fields.get, ("applied", "hash", "confirms"))
        to, number, v = fields.get("to"), fields.get("n"), fields.get("v", 0)
        return _checked(Message(sender, view, *vectors, deltas, fields.get("refused", {}), to, number, v))
    except (TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(f"not a gossip message: {error}") from None


def _known(kind, fields):
    """Return a namedtuple of that kind from a JSON object, which may have further fields."""
    return kind(**{name: fields[name] for name in kind._fields if name in fields})


def _require(condition, what):
    if not condition:
        raise ValueError(f"not a gossip message: {what}")


def _list(value):
    _require(type(value) is list, "a list")
    return value


def _is_int(value, least, most):
    return type(value) is int and least <= value <= most


def _checked(message):
    """Return the message with its parts in their types, once all they claim is possible."""
    sender, view, applied, hash, confirms, deltas, refused, to, number, v = message
    _require(to is None or REPLICA.match(to), "whom it is for")
    _require(number is None or _is_int(number, 0, NUMBER_MAX), "a number")
    _require(_is_int(v, 0, SEQUENCE_MAX), "a version")
    _require(REPLICA.match(sender.id) and type(sender.leaving) is type(sender.ready) is bool, "its sender")
    _require(_is_int(sender.beat, 0, BEAT_MAX), "a beat")
    _require(sender.version is None or _WORD.match(sender.version), "its program's version")
    sender = sender._replace(address=None if sender.address is None else parse_address(sender.address))
    peers = [(id, parse_address(address), beat) for id, address, beat, *_ in _list(view.peers)]
    _require(all(REPLICA.match(id) and _is_int(beat, 0, BEAT_MAX) for id, _, beat in peers), "its view")
    # A node before 1.1 says the id alone, and means for ever.
    left = [(item[0], item[1]) if type(item) is list else (item, BEAT_MAX) for item in _list(view.left)]
    _require(all(REPLICA.match(id) and _is_int(beat, 0, BEAT_MAX) for id, beat in left), "its view")
    for vector in (applied, confirms):
        for replica, sequence in vector.items() if vector is not None else ():
            _require(REPLICA.match(replica) and _is_int(sequence, 0, SEQUENCE_MAX), "a vector")
    _require(hash is None or type(hash) is str, "a hash")
    _require(all(REPLICA.match(replica) and _WORD.match(why) for replica, why in refused.items()), "a refusal")
    deltas = [checked_delta(delta) for delta in deltas]
    return Message(sender, View(peers, left), applied, hash, confirms, deltas, refused, to, number, v)


def checked_delta(delta):
    """Return a delta from elsewhere with its parts in their types; ValueError if it cannot be right.

    What is of another type altogether may also raise TypeError or AttributeError.
    """
    replica, after, through, totals, keys, requires = delta
    _require(REPLICA.match(replica), "a replica")
    _require(_is_int(through, 1, SEQUENCE_MAX) and _is_int(after, 0, through - 1), "a delta's range")
    totals = {name: (entry[0], entry[1]) for name, entry in totals.items()}
    for name, (sequence, total) in totals.items():
        _require(NAME.match(name) and _is_int(sequence, after + 1, through), "an entry")
        _require(_is_int(total, -sequence * AMOUNT_MAX, sequence * AMOUNT_MAX), "a total")
    # Every sequence touched one counter, and the last one cannot have been overtaken.
    sequences = {sequence for sequence, _ in totals.values()}
    _require(len(sequences) == len(totals) and through in sequences, "a delta's entries")
    keys = tuple([(*key[:5], _dots(key[5])) if len(key) > 5 and key[5] else tuple(key[:5]) for key in keys])
    for sequence, digest, name, amount, age_s, *_ in keys:
        _require(_is_int(sequence, after + 1, through) and _DIGEST.match(digest) and name in totals, "a key")
        _require(_is_int(amount, -AMOUNT_MAX, AMOUNT_MAX) and amount != 0, "a key's amount")
        _require(type(age_s) in (int, float) and 0 <= age_s < AGE_MAX_S, "a key's age")
    _require(len({sequence for sequence, *_ in keys}) == len(keys), "a key's sequence")
    return Delta(replica, after, through, totals, keys, _dots(requires))


def _dots(dots):
    dots = tuple([(dot[0], dot[1]) for dot in dots])
    _require(all(REPLICA.match(replica) and _is_int(sequence, 1, SEQUENCE_MAX) for replica, sequence in dots), "a dot")
    return dots

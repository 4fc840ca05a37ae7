"""Batches under one idempotency key: what each of their increments has for a key, and whether one was counted.

The name that comes first by the alphabet has the key itself, and any other name the key, a NUL and the
name; no client can send a NUL.  So each increment of a batch is an ordinary one with a key, and of two
batches under one key, taken by nodes that could not talk, the smaller dot wins item by item, which is
the same batch every time.  A batch of one is the same as a single increment.  Another batch under the
same key, whatever its names are, is found out by the key itself.  Of a windowed counter the name is that
of the series, so a repetition is one also when the window has passed.
"""

from counter.ids import key_digest
from counter.keys import KeyReused
from counter.windows import listed_name


def key_digests(key, names):
    """Return the digests, as integers, under which the increments of these counters are remembered."""
    first = min(names)
    return [_digest(key if name == first else f"{key}\0{name}") for name in names]


def _digest(key):
    return int(key_digest(key), 16)


def repeated(key, amounts, uses, keys, counters):
    """Return the replica and the last sequence of the batch that is repeated by this one, {name as listed: amount}.

    `uses` are the Use of each item's key that a repetition is answered with, or None, of a KeyTable
    `keys`.  Raises KeyReused if the first batch was another.
    """
    for use, item in zip(uses, amounts.items(), strict=True):
        if not use or use.replica != uses[0].replica or (listed_name(counters.names[use.counter]), use.amount) != item:
            raise KeyReused
    replica, first, last = uses[0].replica, min(uses).sequence, max(uses).sequence
    if last - first >= len(uses):
        raise KeyReused  # the first batch had further items between these
    for use in keys.at(replica, first - 1), keys.at(replica, last + 1):
        # At another time it is of an earlier batch under this key.
        if use and use.at == uses[0].at and use.digest == _digest(f"{key}\0{listed_name(counters.names[use.counter])}"):
            raise KeyReused  # … before or after these
    return replica, last

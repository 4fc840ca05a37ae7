"""The names of things: counters, replicas, increments, idempotency keys, cancellations.

A replica is one life of one process.  It numbers what it counts 1, 2, 3, …; the pair (replica,
sequence) is a *dot* and, written as a UUIDv8, the id of the increment.

Source: RFC 9562 section 5.8 for UUIDv8.
"""

import hashlib
import re
import secrets

AMOUNT_MAX = 2**53 - 1  # what a double holds exactly, and so every JSON parser
SEQUENCE_MAX = 2**62 - 1  # the bits a UUIDv8 leaves behind its variant
NAME = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9._:-]{1,128}\Z")  # clients rewrite the paths /. and /..
REPLICA = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}\Z")
_INCREMENT_ID = re.compile(r"([0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3})-([89ab][0-9a-f]{3})-([0-9a-f]{12})\Z")


def new_replica(randbits=secrets.randbits):
    """Return a fresh replica id: the first three groups of a UUIDv8, 60 random bits."""
    return replica_of(randbits(60))


def replica_of(bits):
    """Return the replica id with these 60 bits, an integer."""
    digits = f"{bits:015x}"
    return f"{digits[:8]}-{digits[8:12]}-8{digits[12:]}"


def replica_bits(replica):
    """Return the 60 bits of a replica id as an integer: the inverse of replica_of."""
    return int(replica[:8] + replica[9:13] + replica[15:], 16)


def increment_id(replica, sequence):
    """Return the UUIDv8 of a dot: `rrrrrrrr-rrrr-8rrr-vsss-ssssssssssss`."""
    if sequence < 1 << 48:  # the hot path's: formatting a number is a good part of it
        return f"{replica}-8000-{sequence:012x}"
    high, low = divmod(sequence, 1 << 48)
    return f"{replica}-{0x8000 | high:04x}-{low:012x}"


def parse_increment_id(text):
    """Return the dot (replica, sequence) of an increment id; ValueError if it is none."""
    match = _INCREMENT_ID.match(text.lower())
    sequence = int(match[2] + match[3], 16) & SEQUENCE_MAX if match else 0
    if not sequence:
        raise ValueError(f"{text!r} is not the id of an increment")
    return match[1], sequence


def key_digest(key):
    """Return what is remembered of an idempotency key, any string: 32 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def cancelling_replica(dot):
    """Return the replica id under which every node cancels this dot."""
    digest = hashlib.sha256(increment_id(*dot).encode()).digest()
    return replica_of(int.from_bytes(digest[:8], "big") >> 4)

"""The parts of a counter node, a file per concern; none of them imports from outside this package."""

from counter.deltas import APPLIED, GAP, HELD, NEEDS, Delta
from counter.histories import Ended, TooManyCounters, WindowEnded
from counter.ids import (
    AMOUNT_MAX,
    NAME,
    REPLICA,
    SEQUENCE_MAX,
    cancelling_replica,
    increment_id,
    key_digest,
    new_replica,
    parse_increment_id,
)
from counter.keys import KeyReused, TooManyKeys
from counter.state import Counter

__version__ = "1.1.0.dev0"

__all__ = [
    "AMOUNT_MAX",
    "APPLIED",
    "GAP",
    "HELD",
    "NAME",
    "NEEDS",
    "REPLICA",
    "SEQUENCE_MAX",
    "Counter",
    "Delta",
    "Ended",
    "KeyReused",
    "TooManyCounters",
    "TooManyKeys",
    "WindowEnded",
    "cancelling_replica",
    "increment_id",
    "key_digest",
    "new_replica",
    "parse_increment_id",
]

"""What nodes tell each other of a history: a Delta, and what merging one has found it to be."""

from collections import namedtuple
from types import MappingProxyType

# What `merge` found a delta to be.
APPLIED = "applied"  # some of it was new, and all of it holds now
HELD = "held"  # all of it was held already
GAP = "gap"  # it begins after the end of what is held
NEEDS = "needs"  # it cancels increments that are not both held

# What `replica` did after sequence `after`, as of sequence `through`.
#   totals: {name: (sequence, total)}, the entries touched since `after`
#   keys: the uses of keys it accepted since, in order: (sequence, digest, name, amount, age in seconds),
#         and at the end a tuple of dots if the use renews any
#   requires: ((replica, sequence), …), the dots without which a cancellation must not be merged
#   heir: the replica that may absorb this one, which has ended at `through`; None if it has not
#   absorbed: {replica: (its last sequence, by, at, sequence)}: that came into this history since, at `sequence`;
#         counter/absorption.py says what it means
# Totals and keys may be columns instead, where there are many: counter.streams.Totals, counter.keys.KeyRecords.
Delta = namedtuple(
    "Delta", "replica after through totals keys requires heir absorbed", defaults=((), (), None, MappingProxyType({}))
)

"""What is believed of a delta from elsewhere, from a peer or a file: nothing that cannot be right.

GrowingDelta takes a delta piece by piece, so that none of it has to be kept in another form.
"""

import itertools
import re

from counter.deltas import Delta
from counter.ids import AMOUNT_MAX, REPLICA, SEQUENCE_MAX
from counter.keys import KeyRecords
from counter.streams import LARGE as LARGE_TOTALS
from counter.streams import Totals
from counter.windows import is_counter, is_window

LARGE = 2000  # keys of which more are kept as columns
AGE_MAX_S = 1e9
_DIGEST = re.compile("[0-9a-f]{32}\\Z")


def require(condition, what):
    if not condition:
        raise ValueError(f"impossible: {what}")


def is_int(value, least, most):
    return type(value) is int and least <= value <= most


class GrowingDelta:
    """A delta of which more arrives: first all entries, then all keys; absorbed replicas at any time.

    All raise ValueError if it cannot be right; what is of another type altogether may also raise
    TypeError, AttributeError, IndexError or KeyError.  Further items of an entry are ignored.
    """

    def __init__(self, replica, after, through, requires=(), heir=None):
        require(REPLICA.match(replica), "a replica")
        require(is_int(through, 1, SEQUENCE_MAX) and is_int(after, 0, through - 1), "a delta's range")
        self._replica, self._after, self._through, self._requires = replica, after, through, _dots(requires)
        self._taken = 0  # sequences, at least, by what its entries have counted
        require(heir is None or (REPLICA.match(heir) and heir != replica and not requires), "an heir")
        self._heir, self._absorbed = heir, {}
        self._names = {}  # name of each entry -> the very same: a million keys must not bring a million copies
        self._totals, self._keys = {}, []  # or columns, once they are many

    def add_totals(self, totals):
        """Take further entries, {name: (sequence, total)}."""
        require(not self._keys or not totals, "an entry after a key")
        entries = [(name, (entry[0], entry[1])) for name, entry in totals.items()]
        for name, (sequence, total) in entries:
            require(is_counter(name) and self._names.setdefault(name, name) is name, "a name")
            require(is_int(sequence, self._after + 1, self._through), "a sequence")
            require(is_int(total, -sequence * AMOUNT_MAX, sequence * AMOUNT_MAX), "a total")
            # A sequence counts to one counter, at most so much.
            self._taken += 1 if -AMOUNT_MAX <= total <= AMOUNT_MAX else -(-abs(total) // AMOUNT_MAX)
        require(self._taken <= self._through, "totals for so few increments")
        if type(self._totals) is dict and len(self._totals) + len(entries) > LARGE_TOTALS:
            few, self._totals = self._totals, Totals()
            self._totals.extend(few.items())
        (self._totals.update if type(self._totals) is dict else self._totals.extend)(entries)

    def add_keys(self, keys):
        """Take further keys, as they are in a Delta, in the order of their sequences."""
        records = []
        for key in keys:
            sequence, digest, name, amount, age_s = key[:5]
            if name not in self._names and is_window(name):  # it has ended, so its entry is left out
                self._names[name] = name if is_counter(name) else None
            name = self._names.get(name)
            require(is_int(sequence, self._after + 1, self._through) and _DIGEST.match(digest) and name, "a key")
            require(is_int(amount, -AMOUNT_MAX, AMOUNT_MAX) and amount != 0, "a key's amount")
            require(type(age_s) in (int, float) and 0 <= age_s < AGE_MAX_S, "a key's age")
            renews = (_dots(key[5]),) if len(key) > 5 and key[5] else ()
            records.append((sequence, digest, name, amount, age_s, *renews))
        if type(self._keys) is list and len(self._keys) + len(records) > LARGE:
            few, self._keys = self._keys, KeyRecords()
            self._keys.extend(few)
        self._keys.extend(records)

    def add_absorbed(self, absorbed):
        """Take further absorbed replicas, as they are in a Delta."""
        for replica, fact in absorbed.items():
            final, by, at, sequence = fact[:4]
            require(REPLICA.match(replica) and REPLICA.match(by) and replica != self._replica, "an absorbed replica")
            require(is_int(final, 1, SEQUENCE_MAX) and is_int(at, 1, SEQUENCE_MAX), "an absorption")
            require(is_int(sequence, self._after + 1, self._through) and not self._requires, "an absorption")
            self._absorbed[replica] = final, by, at, sequence

    def finish(self):
        """Return it as a Delta."""
        self._names.clear()
        # Every sequence touched one counter, but for a will, which touched none, and absorptions, which touched
        # many.  The last may be missing: entries of windows that ended are left out.
        absorptions = {sequence for _, _, _, sequence in self._absorbed.values()}
        alone = [sequence for _, (sequence, _) in self._totals.items() if sequence not in absorptions]
        require(len(set(alone)) == len(alone), "a delta's entries")
        if type(self._keys) is list:
            self._keys = tuple(self._keys)
            require(all(one[0] < other[0] for one, other in itertools.pairwise(self._keys)), "the order of keys")
        return Delta(
            self._replica, self._after, self._through, self._totals, self._keys, self._requires, self._heir,
            self._absorbed,
        )  # fmt: skip


def checked_delta(delta):
    """Return a delta from elsewhere with its parts in their types; raises as GrowingDelta."""
    growing = GrowingDelta(delta.replica, delta.after, delta.through, delta.requires, delta.heir)
    growing.add_absorbed(delta.absorbed)
    growing.add_totals(delta.totals)
    growing.add_keys(delta.keys)
    return growing.finish()


def _dots(dots):
    dots = tuple([(dot[0], dot[1]) for dot in dots])
    require(all(REPLICA.match(replica) and is_int(sequence, 1, SEQUENCE_MAX) for replica, sequence in dots), "a dot")
    return dots

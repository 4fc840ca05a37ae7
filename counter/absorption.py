"""Replicas that ended, and whose history is counted in another's: what is left of a process that stopped in order.

A replica that stops writes a *will*: one more dot, which touches no counter and names its *heir*.
It counts nothing after it.  The heir adds the totals of the replica to its own, in one dot of its
own, and so *absorbs* it.  Whoever holds that dot drops what it has of the replica, however much that
was, and keeps a fact of some 60 bytes for ever: the last sequence, and the dot that absorbed it.

So every dot of the replica is counted through its own entries, or through exactly one dot of the
heir; who holds the one that decides it, holds the fact.  Only a replica can know where it ends,
and only one may absorb it, so there is no moment at which two count the same.
"""

from array import array

from counter.ids import replica_bits, replica_of
from counter.streams import Index


def alone(replica, sequence):
    """Return where a dot is held if nothing was absorbed: at its own replica."""
    return ((replica, sequence),)


def is_shown(vector, dots):
    """Return whether a vector has one of some dots."""
    return any(vector.get(replica, 0) >= sequence for replica, sequence in dots)


class Absorptions:
    """The facts about absorbed replicas, 50 to 60 bytes each.  Not for several threads at once.

    A fact is in the history of who absorbed the replica, and moves on with that history when it is
    absorbed in turn.  `inside` is {replica: rows}, of each history its facts by their sequence in it.
    """

    def __init__(self):
        self._ids = array("Q")  # the bits of the replica ids
        # Four numbers each: the last sequence of the replica; who absorbed it, and at which sequence; and
        # the sequence at which the fact came into the history that it is in now.
        self._facts = array("Q")
        self._index = None  # the Index of the ids, once it is needed
        self.inside = {}

    def __len__(self):
        return len(self._ids)

    def _rows(self, replicas):
        if not self._ids:
            return [-1] * len(replicas)
        self._index = self._index or Index(self._ids)
        return self._index.find(list(map(replica_bits, replicas)))

    def get(self, replica):
        """Return (its last sequence, absorbed by, at that sequence) of a replica, or None."""
        (row,) = self._rows([replica])
        if row < 0:
            return None
        final, by, at, _ = self._facts[4 * row : 4 * row + 4]
        return final, replica_of(by), at

    def final(self, replica):
        """Return the last sequence of a replica, 0 if it was not absorbed."""
        (row,) = self._rows([replica])
        return self._facts[4 * row] if row >= 0 else 0

    def successor(self, replica):
        """Return who has absorbed a replica, or who has absorbed that one, and so on; itself if nobody has."""
        return self.carriers(replica, 0)[-1][0]

    def carriers(self, replica, sequence):
        """Return the dots of which each holds this one: itself, that which absorbed its replica, and so on."""
        dots = [(replica, sequence)]
        while len(dots) <= len(self):  # facts that contradict each other must not make it endless
            fact = self.get(dots[-1][0])
            if fact is None or fact[0] < dots[-1][1]:
                break
            dots.append(fact[1:])
        return dots

    def latest(self, replica):
        """Return the sequence at which something last came into the history of a replica; 0 if nothing did."""
        rows = self.inside.get(replica)
        return self._facts[4 * rows[-1] + 3] if rows else 0

    def since(self, replica, after):
        """Return {absorbed: (final, by, at, sequence)}: what came into a history after a sequence."""
        found = {}
        for row in reversed(self.inside.get(replica, ())):
            final, by, at, sequence = self._facts[4 * row : 4 * row + 4]
            if sequence <= after:
                break
            found[replica_of(self._ids[row])] = final, replica_of(by), at, sequence
        return found

    def prepare(self, replica, facts):
        """Make room for facts that come into the history of a replica, {absorbed: (final, by, at, sequence)}.

        Returns what is still to be done, and allocates nothing: (column, indexes, values) as for changes of
        columns, and the new rows of `inside`.  If it raises an exception, undo() has to be called.
        """
        facts = sorted(facts.items(), key=lambda item: item[1][3])
        length, rows = len(self), self._rows([absorbed for absorbed, _ in facts])
        for place, (absorbed, (final, by, at, sequence)) in enumerate(facts):
            if rows[place] < 0:
                rows[place] = len(self)
                self._facts.extend((final, replica_bits(by), at, sequence))
                self._ids.append(replica_bits(absorbed))
        if self._index is not None:
            self._index.add(length)
        inside = self.inside.setdefault(replica, array("I")) + array("I", rows)
        return (self._facts, [4 * row + 3 for row in rows], [fact[3] for _, fact in facts]), inside

    def undo(self, length):
        """Drop the facts from row `length` on, as there was no memory for what goes with them."""
        self._index = None
        del self._ids[length:], self._facts[4 * length :]

"""What is subtracted because a key was counted twice: 60 bytes each, for they stay for ever.

A cancellation is a replica of its own that counted once: minus the amount of the dot it cancels.
Its id is derived from that dot, so that all nodes that find a conflict write the very same.
"""

from array import array

from counter.ids import cancelling_replica, replica_bits, replica_of
from counter.streams import Index

ENDED = 2**32 - 1  # in place of the number of a counter: a window that has ended


class Cancellations:
    """The cancellations held: of each the dot that stays, the dot it cancels, and what that counted."""

    def __init__(self):
        self._ids = array("Q")  # the bits of their replica ids, and so of those in the dots
        self._index = Index(self._ids)
        self._dots = array("Q")  # four numbers each: the dot that stays, and the one that is cancelled
        self._numbers, self._amounts = array("I"), array("q")  # of the counter, and what was counted

    def __len__(self):
        return len(self._ids)

    def __iter__(self):
        """Iterate over the replica ids."""
        return map(replica_of, self._ids)

    def __contains__(self, replica):
        return bool(self._ids) and self._index.find([replica_bits(replica)]) != [-1]

    def add(self, smaller, larger, number, amount):
        """Cancel the dot `larger`, which counted `amount` to the counter with that number; all or nothing.

        A number that is None stands for a window that has ended.
        """
        length = len(self)
        (stays, sequence), (cancelled, cancelled_sequence) = smaller, larger
        try:
            self._dots.extend((replica_bits(stays), sequence, replica_bits(cancelled), cancelled_sequence))
            self._numbers.append(ENDED if number is None else number)
            self._amounts.append(amount)
            self._ids.append(replica_bits(cancelling_replica(larger)))
            self._index.add(length)
        except BaseException:
            self._truncate(length)
            raise

    def end(self, numbers):
        """Take note that counters are gone, given a set of their numbers: windows that ended."""
        if not numbers.isdisjoint(self._numbers):
            for row, number in enumerate(self._numbers):
                if number in numbers:
                    self._numbers[row] = ENDED

    def _truncate(self, length):
        for column, width in ((self._ids, 1), (self._amounts, 1), (self._numbers, 1), (self._dots, 4)):
            del column[width * length :]

    def get(self, replica):
        """Return (smaller dot, larger dot, number of the counter, amount) of a cancellation that is held.

        Of a window that has ended the number is None.
        """
        (row,) = self._index.find([replica_bits(replica)])
        stays, sequence, cancelled, cancelled_sequence = self._dots[4 * row : 4 * row + 4]
        dots = (replica_of(stays), sequence), (replica_of(cancelled), cancelled_sequence)
        number = self._numbers[row]
        return *dots, None if number == ENDED else number, self._amounts[row]

"""Nodes without threads and sockets, for tests: what they decide, and the messages they exchange."""

import itertools
import random

from counter import Counter
from counter.confirmations import Confirmations
from counter.joining import Joining
from counter.links import Links
from counter.wire import Message, Sender, View, decode, encode
from gossip import Gossip
from peers import PeerTable

ME, A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "fabc")
AT_ME, AT_A, AT_B = (f"10.0.0.{number}:80" for number in range(3))
NOBODY = View([], [])
A_SENDS = Sender(A, AT_A, 1, False)


class Half:
    """One node without threads: what Node wires together."""

    def __init__(self, replica=ME, address=AT_ME, push_fanout=8, doubtful_max=2, has_seeds=False):
        rng = random.Random(1)
        self.counter = Counter(replica)
        self.table = PeerTable(replica, address, [], 1.0, 5.0, 8, rng, wall=lambda: 1e9)
        self.confirmations = Confirmations(self.counter.carriers)
        self.links = Links(self.counter, self.confirmations, 0.1, 10.0, doubtful_max, rng)
        self.joining = Joining(has_seeds, 10.0, self.counter.lacks)
        self.gossip = Gossip(self.counter, self.table, self.links, self.confirmations, self.joining, push_fanout)
        self._numbers = itertools.count(1)

    def meet(self, address=AT_A, id=A, applied=None, now=0.0):
        """Have a peer answer a first heartbeat with this vector, once it has been asked who it is."""
        self.gossip.swept([address], [], now)
        link = self.links.take(now)
        request = self.gossip.request(link, now)
        if request.to is None:
            self.gossip.answered(link, request, introduction(id, address), now)
            assert self.links.take(now) is link
            request = self.gossip.request(link, now)
        self.gossip.answered(link, request, answer(applied or {}, id, address), now)
        return link

    def hear(self, message, now=0.0):
        """Receive a message as one that is for this node, and new; return the answer."""
        return self.gossip.receive(message._replace(to=self.counter.replica, number=next(self._numbers)), now)


def answer(applied=None, id=A, address=AT_A, hash=None, confirms=None, deltas=()):
    return Message(Sender(id, address, 1, False, v=1), NOBODY, applied, None, confirms, list(deltas), hash=hash)


def introduction(id=A, address=AT_A, number=0):
    """Return the answer to a message that was for another process, or not new."""
    return answer(None, id, address)._replace(number=number)


def talk(sender, receiver, link, now):
    """Carry one exchange between two halves, after the question who the receiver is, if the sender has to ask.

    Return the bytes of all messages.
    """
    request = sender.gossip.request(link, now)
    if request is None:
        sender.links.released(link)
        return []
    asked = list(encode(request))
    reply = receiver.gossip.receive(decode(asked), now)
    answered = list(encode(reply))
    sender.gossip.answered(link, request, decode(answered), now)
    sizes = [sum(map(len, asked)), sum(map(len, answered))]
    if reply.number is not None:
        assert sender.links.take(now) is link
        return sizes + talk(sender, receiver, link, now)
    return sizes


MAPS = ("applied", "recent", "confirms", "refused", "totals")  # fields that are objects with any names


def with_more(value, name=None):
    """Return a JSON value with a field more in every object and an item more in every entry, as of a later version."""
    if isinstance(value, dict):
        value = {inner: with_more(part, inner if name not in MAPS else None) for inner, part in value.items()}
        return value if name in MAPS else {"before": [{}], **value, "later": {"x": 1}}
    if isinstance(value, list) and value and not isinstance(value[0], list | dict):
        is_list = all(isinstance(item, str) for item in value)  # of ids
        return value if is_list else [*value, None, "later"]
    return list(map(with_more, value)) if isinstance(value, list) else value

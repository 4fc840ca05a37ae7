"""Random schedules of clients that use keys at several nodes, beside an oracle that knows how many requests there were.

    python tests/key_schedules.py [SCHEDULES] [FIRST_SEED]             the rules as they are
    python tests/key_schedules.py SCHEDULES FIRST_SEED --break RULE    one rule broken: one-replica, renewals or ages

The nodes are the real Counter and Clocks.  Their clocks differ, each message takes a while, and what a node
sends may be stuck for longer than a key is kept.  A request is repeated for a while, at any node.  Its key is
used anew once it has certainly expired everywhere; or as soon as it expires at a node that knows all its
uses, and so knows when that is.  In every other schedule the nodes can remember few keys, and drop those first
that are only there to be renewed.
"""

import contextlib
import heapq
import itertools
import random
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from counter import Counter, new_replica
from counter.clocks import Clocks
from counter.keys import KeyTable, TooManyKeys

NAMES, NODES = "abcdefghij", 4
WINDOW_S = 10.0
REPEATED_S = 1.0  # for how long a request is repeated
EXPIRED_S = 14.5  # after which its key is used anew at any node
STUCK_MAX_S, CALM_S = 16.0, 6.0  # how long messages of a node are stuck, and how long after that none is
LASTS_S = 200.0

_known = KeyTable.known


def _are_renewals(one, other):
    return (one.replica, one.sequence) in other.renews or (other.replica, other.sequence) in one.renews


BREAKS = {
    # two dots of one replica are taken for one request
    "one-replica": lambda: mock.patch("counter.keys._differ", _are_renewals),
    # a use does not say what it renews
    "renewals": lambda: mock.patch.object(
        KeyTable, "known", lambda table, digest, now: (_known(table, digest, now)[0], ())
    ),
    # ages leave out the time that a message waited
    "ages": lambda: mock.patch.object(Clocks, "cut_at", lambda clocks, peer, clock, now, asked_at=None: now),
}

# The latest with a key: when it was first sent, the dots that it was counted as, whether it is repeated at any node.
Request = namedtuple("Request", "at dots repeated")


class Node:
    def __init__(self, rng, keys_max):
        self.counter = Counter(new_replica(rng.getrandbits), key_window_s=WINDOW_S, keys_max=keys_max)
        self.clocks, self.ahead_s = Clocks(), rng.uniform(0, 1000)
        self.stuck_until = 0.0  # what it sends sets off then

    def deltas_for(self, other, now):
        """Return what another node lacks, as it is on its way: the keys of now."""
        deltas = self.counter.deltas(other.counter.vector(), float("inf"), now + self.ahead_s)
        return [delta._replace(keys=tuple(delta.keys)) for delta in deltas]

    def receive(self, sender, cut_at, deltas, now):
        cut_at = self.clocks.cut_at(sender, cut_at, now + self.ahead_s)
        for delta in deltas:
            self.counter.merge(delta, cut_at)
        self.counter.expire(now + self.ahead_s)


class Schedule:
    """One random schedule; run() returns what is wrong in the end, or None."""

    def __init__(self, seed):
        self.rng, self.now, self._events, self._tie = random.Random(seed), 0.0, [], itertools.count()
        self.crowded = seed % 2 == 1
        self.hop_s = (0.7, 1.0) if self.crowded else (0.1, 1.0)
        self.nodes = [Node(self.rng, 6 if self.crowded else 1000) for _ in range(NODES)]
        self.latest, self.number = {}, dict.fromkeys(NAMES, 0)  # name -> Request; name -> how many there were
        self.repeated = self.taken_twice = self.used_at_once = self.refused = 0

    def at(self, time, action, *arguments):
        heapq.heappush(self._events, (time, next(self._tie), action, arguments))

    def run(self):
        for one, other in itertools.permutations(self.nodes, 2):  # clocks are compared
            self.send(one, other, self.hop_s[0])
        for action in (self.gossip, self.get_stuck, self.go_on):
            self.at(2.0, action)
        while self._events:
            self.now, _, action, arguments = heapq.heappop(self._events)
            if self.now < LASTS_S or action == self.arrive:
                action(*arguments)
        for _ in range(3):
            for one, other in itertools.permutations(self.nodes, 2):
                other.receive(one.counter.replica, self.now + one.ahead_s, one.deltas_for(other, self.now), self.now)
        counted = [{name: node.counter.value(name) for name in NAMES} for node in self.nodes]
        return next((f"{values} of {self.number}" for values in counted if values != self.number), None)

    # The nodes.

    def gossip(self):
        self.send(*self.rng.sample(self.nodes, 2), self.rng.uniform(*self.hop_s))
        self.at(self.now + self.rng.expovariate(8), self.gossip)

    def send(self, one, other, takes_s):
        message = one.counter.replica, self.now + one.ahead_s, one.deltas_for(other, self.now)
        self.at(max(self.now, one.stuck_until) + takes_s, self.arrive, other, message)

    def arrive(self, node, message):
        node.receive(*message, self.now)

    def get_stuck(self):
        node = self.rng.choice(self.nodes)
        node.stuck_until = self.now + self.rng.uniform(0, STUCK_MAX_S)
        self.at(node.stuck_until + CALM_S, self.get_stuck)

    # The clients.

    def go_on(self):
        self.request(self.rng.choice(self.nodes))
        self.at(self.now + self.rng.expovariate(4), self.go_on)

    def request(self, node):
        """Send a request to a node, with any key that may be used now: for the first time, or again."""
        name = self.rng.choice(NAMES)
        latest = self.latest.get(name)
        age_s = self.now - latest.at if latest else EXPIRED_S
        if age_s >= EXPIRED_S:
            if dot := self.count(name, node):
                self.began(name, dot, True)
        elif latest.repeated and age_s <= REPEATED_S:
            self.repeated += 1
            if dot := self.count(name, node):
                latest.dots.append(dot)
                self.taken_twice += 1

    def began(self, name, dot, repeated):
        self.number[name] += 1
        self.latest[name] = request = Request(self.now, [dot], repeated)
        if self.rng.random() < 0.7:
            self.at(self.now + WINDOW_S + self.rng.uniform(0, 2 * self.hop_s[0]), self.use_at_once, name, request)

    def use_at_once(self, name, request):
        """Use a key anew, if it has expired, at a node that knows all its uses; where keys are few, that took it."""
        takers = {replica for replica, _ in request.dots}
        knowing = [
            node
            for node in self.nodes
            if all(node.counter.holds(*dot) for dot in request.dots)
            and (not self.crowded or takers == {node.counter.replica})
        ]
        if not knowing:
            return
        node = self.rng.choice(knowing)
        if self.crowded:
            self.request(node)  # so that there may be no room for what has expired
        if self.latest[name] is request and (dot := self.count(name, node)):
            self.began(name, dot, False)
            self.used_at_once += 1

    def count(self, name, node):
        """Return the dot that a request is counted as; None if it is not, as it came before or there is no room."""
        try:
            *dot, _, came_before = node.counter.increment_once(f"key of {name}", name, 1, self.now + node.ahead_s)
        except TooManyKeys:
            self.refused += 1
            return None
        return None if came_before else tuple(dot)


def main(arguments):
    rule = arguments.pop() if "--break" in arguments else None
    schedules, first = int(arguments[0]) if arguments else 100, int(arguments[1]) if len(arguments) > 1 else 0
    with BREAKS[rule]() if rule else contextlib.nullcontext():
        wrong = {seed: found for seed in range(first, first + schedules) if (found := Schedule(seed).run())}
    print(f"{len(wrong)} of {schedules} schedules ended with wrong counts: {list(wrong)[:10]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

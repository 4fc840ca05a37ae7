"""A cluster in one thread: the real Counter, PeerTable and Gossip over a bad network.

Time, delays, losses and crashes all come from one seeded generator, so a schedule that fails can
be run again by its seed.  The tests run it with a handful of nodes, benchmarks/simulate.py with a
thousand.
"""

import heapq
import itertools
import random
from collections import namedtuple

from counter import Counter, cancelling_replica, new_replica
from counter.confirmations import Confirmations
from counter.joining import Joining
from counter.links import Links
from counter.wire import decode, encode
from gossip import Gossip
from peers import PeerTable

INTERVAL_S, TIMEOUT_S, JOIN_TIMEOUT_S = 1.0, 5.0, 10.0  # the defaults of the command line
READ_TIMEOUT_S = 1.0
EPOCH_S = 1_765_843_200.0  # what right wall clocks show at the start: 2025-12-16T00:00:00Z
# An increment.  `key` is its own; within a batch it is (the batch's key, name).  A single one ends its batch.
Entry = namedtuple("Entry", "name amount key ends_batch")

SAMPLE = 397  # one message in so many is encoded for its size; prime, so that it stays out of step


class SimulatedNode:
    """One process life: what Node wires together, without threads and sockets."""

    def __init__(self, network, address, seeds):
        rng = network.rng
        self.network, self.address = network, address
        self.alive, self.paused_until = True, 0.0
        self.wakes_at = float("inf")  # for the link that becomes due next
        self.clock_ahead_s = rng.uniform(0, network.clocks_differ_s) if network.clocks_differ_s else 0.0
        self.clock_error_s = 0.0  # of its wall clock
        self.counter = Counter(new_replica(rng.getrandbits), key_window_s=network.key_window_s, wall=self._wall)
        self.table = PeerTable(
            self.counter.replica, address, seeds, INTERVAL_S, TIMEOUT_S, fanout=8, rng=rng, wall=self._wall
        )
        confirmations = Confirmations(self.counter.carriers)
        self.links = Links(self.counter, confirmations, 0.1, 10.0, rng=rng)
        self.joining = Joining(bool(seeds), JOIN_TIMEOUT_S, self.counter.lacks)
        self.gossip = Gossip(self.counter, self.table, self.links, confirmations, self.joining, push_fanout=8)
        network.at(network.now, self, self.sweep)

    @property
    def now(self):
        """What its clock shows."""
        return self.network.now + self.clock_ahead_s

    def _wall(self):
        return EPOCH_S + self.network.now + self.clock_error_s

    def increment(self, name, amount, key=None):
        increment(self.counter, self.network.log, name, amount, key, self.now)
        self.network.at(self.network.now, self, lambda: None)  # it sends after whatever it does

    def increment_many(self, amounts, key=None):
        increment_many(self.counter, self.network.log, amounts, key, self.now)
        self.network.at(self.network.now, self, lambda: None)

    def sweep(self):
        now = self.now
        sweep = self.table.sweep(now)
        for change in sweep.changes:
            self.network.note(self, change)
        self.gossip.swept(sweep.contact, sweep.seeds, now)
        self.network.at(self.network.now + INTERVAL_S, self, self.sweep)

    def send(self):
        """Send all that is due, as the workers would."""
        now = self.now
        while link := self.links.take(now):
            if link.is_seed:
                self.links.released(link)
                found = self.network.names.get(link.address, [link.address])
                self.links.send_heartbeats(self.table.resolved(link.address, found), [], now)
            elif request := self.gossip.request(link, now):
                self.network.exchange(self, link, request)
            else:
                self.links.released(link)
        if (due := self.links.next_due(now)) < self.wakes_at:
            self.wakes_at = due
            # A rounded difference must not wake it a moment too soon, or it would do so for ever.
            self.network.at(due - self.clock_ahead_s * (1 - 1e-9), self, self.wake)

    def wake(self):
        self.wakes_at = float("inf")


class Network:
    """Carries messages between nodes: late, out of order, twice or not at all.

    With `as_json` they travel as bytes, as they do between real nodes.  Without, the receiver gets
    the very Message, of which nobody changes any part: that is many times faster, and only one
    message in SAMPLE is encoded, for its size.
    """

    key_window_s = 3600.0  # of all nodes
    clocks_differ_s = 0.0  # by so much at most

    def __init__(self, seed, loss=0.1, repeat=0.1, delay_s=0.05, as_json=True):
        self.rng = random.Random(seed)
        self.loss, self.repeat, self.delay_s, self.as_json = loss, repeat, delay_s, as_json
        self.now = 0.0
        self.nodes = {}  # address -> SimulatedNode
        self.names = {}  # name of a seed -> the addresses it resolves to; without, it is one itself
        self.cut = set()  # pairs of addresses between which nothing passes
        self.log = {}  # (replica, sequence) -> Entry: all increments there ever were
        self.messages = self.bytes = 0  # sent so far; the bytes of the JSON alone, estimated
        self.false_removals = 0  # how often a live node within reach was taken for lost
        self._events, self._tie = [], itertools.count()

    def start(self, address, seeds=()):
        self.nodes[address] = SimulatedNode(self, address, seeds)
        return self.nodes[address]

    def crash(self, address):
        self.nodes[address].alive = False

    def stop(self, address, within_s=2.0):
        """Stop a node in order: it ends, says that it leaves, and is gone a while later, whoever has heard of it."""
        node = self.nodes[address]
        node.gossip.leaving.end()
        node.table.leave()
        node.links.send_heartbeats([address for _, address in node.table.active()], [], self.now)
        self.at(self.now, node, lambda: None)
        self.at(self.now + within_s, node, lambda: self.crash(address))

    def split(self, *groups):
        """Cut all links between nodes of different groups."""
        self.cut = {(a, b) for one, other in itertools.permutations(groups, 2) for a in one for b in other}

    def note(self, node, change):
        """Take note of a change that a sweep of a node found."""
        if change.what == "lost" and (node.address, change.address) not in self.cut:
            other = self.nodes.get(change.address)
            self.false_removals += bool(other and other.alive and other.counter.replica == change.id)

    def at(self, time, node, action):
        """Let a node act at that time; return the event, whose last part is None once it is over or called off."""
        event = [time, next(self._tie), node, action]
        heapq.heappush(self._events, event)
        return event

    def run(self, seconds):
        """Let that much time pass."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            event = heapq.heappop(self._events)
            time, _, node, action = event
            self.now = max(self.now, time)
            if action is None or not node.alive:
                continue
            if self.now < node.paused_until:
                event[:2] = node.paused_until, next(self._tie)
                heapq.heappush(self._events, event)
                continue
            event[-1] = None
            action()
            node.send()
        self.now = end

    def run_until(self, condition, seconds):
        """Return whether the condition came true within that time."""
        deadline = self.now + seconds
        while not condition() and self.now < deadline:
            self.run(0.1)
        return condition()

    def exchange(self, sender, link, request):
        """Carry a request and its answer; whatever is lost ends in a failure at the sender."""
        sent = self._send(request)
        timeout = self.at(
            self.now + READ_TIMEOUT_S, sender, lambda: sender.links.failed(link, OSError("lost"), sender.now)
        )

        def answered(answer):
            if timeout[-1] is not None:
                timeout[-1] = None
                try:
                    sender.gossip.answered(link, request, self._receive(answer), sender.now)
                except ValueError as error:
                    sender.links.failed(link, error, sender.now)

        def arrive(receiver):
            answer = self._send(receiver.gossip.receive(self._receive(sent), receiver.now))
            for delay_s in self._deliveries(receiver.address, sender.address):
                self.at(self.now + delay_s, sender, lambda: answered(answer))

        deliveries, receiver = self._deliveries(sender.address, link.address), self.nodes.get(link.address)
        for delay_s in deliveries if receiver else ():
            self.at(self.now + delay_s, receiver, lambda: arrive(receiver))

    def _send(self, message):
        """Return what travels of a message, and count it."""
        self.messages += 1
        if self.as_json:
            lines = list(encode(message))
            self.bytes += sum(map(len, lines))
            return lines
        if self.messages % SAMPLE == 0:
            self.bytes += SAMPLE * sum(map(len, encode(message)))
        return message if message.summary is None else message._replace(applied=None)

    def _receive(self, sent):
        return decode(sent) if self.as_json else sent

    def _deliveries(self, sender, receiver):
        """Return the delays after which a message arrives: none, one, or two if it is repeated."""
        if (sender, receiver) in self.cut or self.rng.random() < self.loss:
            return []
        copies = 2 if self.rng.random() < self.repeat else 1
        return [self.delay(sender, receiver) for _ in range(copies)]

    def delay(self, sender, receiver):
        """Return how long the next message takes on its way."""
        return self.rng.expovariate(1 / self.delay_s)

    def alive(self):
        return [node for node in self.nodes.values() if node.alive]

    def converged(self):
        """Return whether all nodes hold the same, and know of each other."""
        nodes = self.alive()
        return all(node.counter.vector() == nodes[0].counter.vector() for node in nodes) and all(
            len(node.table.active()) == len(nodes) - 1 for node in nodes
        )

    def check(self):
        """Assert at every node that it holds exact prefixes, and values that follow from them."""
        for node in self.alive():
            check_prefixes(node.counter, self.log)


def increment(counter, log, name, amount, key, now):
    """Increment, with an idempotency key or with None, and write it into the log."""
    if key is None:
        *dot, _ = counter.increment(name, amount)
    else:
        *dot, _, _ = counter.increment_once(key, name, amount, now)
    log.setdefault(tuple(dot), Entry(name, amount, key, True))


def increment_many(counter, log, amounts, key, now):
    """Increment by a batch, {name: amount}, with an idempotency key or with None, and write it into the log."""
    if key is None:
        replica, last, _ = counter.increment_many(amounts)
    else:
        replica, last, _, replayed = counter.increment_many_once(key, amounts, now)
        if replayed:
            return
    for sequence, (name, amount) in enumerate(amounts.items(), last - len(amounts) + 1):
        log[replica, sequence] = Entry(name, amount, key and (key, name), sequence == last)


def check_prefixes(counter, log):
    """Assert that a counter is right, given all increments there ever were.

    It holds of each replica exactly what that did up to its sequence, which is never inside a batch, with
    what it absorbed; beyond that it holds cancellations, just those of what was counted twice; and so it
    counts every key once.
    """
    vector = counter.vector()
    held = {delta.replica: delta for delta in counter.deltas({}, float("inf"), 0)}
    facts = {other: fact for delta in held.values() for other, fact in delta.absorbed.items()}
    assert all(log[dot].ends_batch for dot in vector.items() if dot in log)
    dots = sorted((dot, entry) for dot, entry in log.items() if counter.holds(*dot))
    changes, values, keys, cancelled = {}, {}, set(), {}
    for (replica, sequence), (name, amount, key, _) in dots:
        changes.setdefault(replica, []).append((sequence, {name: amount}))
        if key is not None and key in keys:
            cancelled[cancelling_replica((replica, sequence))] = {name: (1, -amount)}
        else:
            keys.add(key)
            values[name] = values.get(name, 0) + amount
    totals = {
        replica: _totals(replica, changes, facts) for replica in changes.keys() | held.keys() if replica not in facts
    }
    assert {replica: delta.totals for replica, delta in held.items()} == totals | cancelled
    assert all(vector[replica] == 1 for replica in cancelled)
    assert all(counter.value(name) == values.get(name, 0) for name in "abcdef")


def _totals(replica, changes, facts):
    """Return what a replica counted, {name: (sequence, total)}, of its own changes and those of whom it absorbed."""
    all_changes = list(changes.get(replica, []))
    for other, (_, by, at, _) in facts.items():
        if by == replica:
            absorbed = _totals(other, changes, facts)
            all_changes.append((at, {name: total for name, (_, total) in absorbed.items()}))
    totals = {}
    for sequence, amounts in sorted(all_changes, key=lambda change: change[0]):
        for name, amount in amounts.items():
            totals[name] = sequence, totals.get(name, (0, 0))[1] + amount
    return totals

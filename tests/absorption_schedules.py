"""Random schedules of nodes that stop, crash and start from files of any age, on the real Counter.

    python tests/absorption_schedules.py [SCHEDULES] [FIRST_SEED]             the rules as they are
    python tests/absorption_schedules.py SCHEDULES FIRST_SEED --break RULE    one rule broken (--breaks lists them)

Nodes count, with keys and without, stop in order or crash, and absorb each other.  Each has a file that lags
behind its memory; files are copied, and processes start empty, from their own file, from an old backup, from
another node's file, two from one file at once.  Messages are lost, repeated, reordered, and arrive after
their sender and receiver were replaced.  Every node is exact at any time for the dots that it holds.
After all has healed, and again after every old file and every late message was merged, all nodes hold the
same, and of each replica an exact prefix of its history.

In half of the schedules keys are forgotten, and all that ended is absorbed in the end.  In the others
they never are, so that every key counts exactly once.
"""

import contextlib
import random
import sys
from collections import Counter as Tally
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from counter import Counter, cancelling_replica, new_replica
from counter.absorption import Absorptions
from counter.datafile import Reader
from counter.datawriter import Writer
from counter.histories import Histories

NAMES = "abcdef"
NODES = 4
FOREVER_S = 1e8
BREAKS = {
    "resume": "a restart goes on under the replica id of its file",
    "no-will": "a dead replica is absorbed without its will, as far as it is known (by one node only)",
    "anyone": "anybody who holds a replica to its end absorbs it, not its heir alone",
    "goes-on": "a replica counts on after its will",
    "not-inherited": "who absorbs does not take over what the absorbed had absorbed",
    "forgets": "what was absorbed is forgotten, so that late deltas of it are taken anew",
    "keys-dropped": "a replica is absorbed while keys of it are remembered",
    "torn": "a commit is not atomic: some entries miss, the sequence is written",
    "kept": "what is absorbed elsewhere goes on being counted here",
}


class Wrong(AssertionError):
    pass


def require(condition, what):
    if not condition:
        raise Wrong(what)


class Schedule:
    """One random schedule; `broken` is a rule of BREAKS, or None.

    A file is a counter that does not count, or what `new_file()` returns: a File, for example.
    """

    def __init__(self, seed, steps=900, broken=None, new_file=None):
        self.rng, self.steps, self.broken = random.Random(seed), steps, broken
        self.new_file = new_file or self.new
        self.forgets_keys = seed % 2 == 1
        self.window_s = 40.0 if self.forgets_keys else FOREVER_S
        self.kill, self.term, self.all_at_once = ((0.015, 0.02, 0.005), (0.003, 0.02, 0.001), (0.001, 0.01, 0))[
            seed % 3
        ]
        self.now = 1000.0
        self.nodes = [self.new() for _ in range(NODES)]
        self.files, self.backups = [self.new_file() for _ in range(NODES)], []
        self.owners = {}  # id() of a file -> replica that it was last used by
        self.flying = []  # (receiver, Delta)
        self.log = {}  # dot -> (name, amount, key), or {name: total} of an absorption, or None of a will
        self.payloads, self.dead, self.ended = {}, [], set()
        self.stats = Tally()

    def new(self, replica=None):
        return Counter(replica or new_replica(self.rng.getrandbits), key_window_s=self.window_s)

    def run(self):
        """Run it; Wrong if a count or anything else is not as it must be."""
        with broken_rule(self.broken):
            for step in range(self.steps):
                self.now += self.rng.random()
                self.step()
                if step % 20 == 0:
                    for node in self.nodes:
                        self.check_values(node, f"step {step}")
            self.heal()
            self.check_all("healed")
            for file in self.backups + self.files:
                self.merge_all(self.rng.choice(self.nodes), file)
            self.rng.shuffle(self.flying)
            for receiver, delta in self.flying:
                self.nodes[receiver].merge(delta, self.now)
            self.heal()
            self.check_all("healed again after old files and late messages")
        left = [replica for replica in self.nodes[0].vector() if replica not in self.cancellations()]
        self.stats.update(replicas_left=len(left), cancellations=len(self.cancellations()))
        return self.stats

    def step(self):
        dice, index = self.rng.random(), self.rng.randrange(NODES)
        node = self.nodes[index]
        if dice < 0.28:
            self.count(node)
        elif dice < 0.50:
            self.send(*self.rng.sample(range(NODES), 2))
        elif dice < 0.85:
            self.rng.shuffle(self.flying)
            for _ in range(min(6, len(self.flying))):
                receiver, delta = self.flying.pop()
                self.nodes[receiver].merge(delta, self.now)
            del self.flying[400:]
        elif dice < 0.91:
            self.store(index)
        elif dice < 0.925:
            self.backups = [*self.backups, self.copied(self.files[index])][-8:]
        elif dice < 0.96:
            node.expire(self.now)
            self.absorb(node)
        elif dice < 0.96 + self.kill:
            self.restart(index)
        elif dice < 0.96 + self.kill + self.term:
            if node.sequence:
                self.stop(index)
            self.restart(index)
        elif dice > 1 - self.all_at_once:
            for other in range(NODES):
                self.restart(other)

    # What nodes do.

    def count(self, node):
        name, amount, key = self.rng.choice(NAMES), self.rng.choice((-3, -1, 1, 2, 5)), None
        if self.rng.random() < 0.3 and (self.forgets_keys or node.replica[0] < "8"):
            key = self.rng.randrange(30), int(self.now / 200)
            name, amount = self.payloads.setdefault(key, (name, amount))
            *dot, _, _ = node.increment_once(repr(key), name, amount, self.now)
        else:
            *dot, _ = node.increment(name, amount)
        self.log.setdefault(tuple(dot), (name, amount, key))

    def send(self, sender, receiver, after=None):
        """Put what one node has on its way to another, perhaps in several copies, cut anywhere."""
        vector, known = self.nodes[sender].vector(), self.nodes[receiver].vector()
        for replica, held in vector.items():
            right = min(known.get(replica, 0), held - 1)
            cut = self.rng.choice((right, right, 0, self.rng.randrange(held))) if after is None else right
            delta = self.nodes[sender].delta(replica, cut, self.now)
            delta = delta._replace(keys=tuple(delta.keys))
            self.flying.extend([(receiver, delta)] * self.rng.choice((0, 1, 1, 1, 2)))

    def stop(self, index):
        """Stop a node in order: its will, which some of the others and perhaps its file get."""
        node, others = self.nodes[index], [other for other in range(NODES) if other != index]
        heir = self.nodes[self.rng.choice(others)].replica
        if self.dead and self.rng.random() < 0.1:
            heir = self.rng.choice(self.dead)
        if heir == node.replica:
            return
        self.stats["wills"] += 1
        if self.broken == "goes-on":
            delta = node.delta(node.replica, 0, self.now)
            will = delta._replace(through=delta.through + 1, heir=heir)
            self.flying.extend((other, will) for other in others if self.rng.random() < 0.7)
            for _ in range(3):
                self.count(node)
        else:
            require(node.end(heir), "no will")
            self.log[node.replica, node.sequence] = None
        for other in others:
            if self.rng.random() < 0.7:
                self.send(index, other, after=True)
        if self.rng.random() < 0.7:
            self.store(index)

    def restart(self, index):
        self.stats["restarts"] += 1
        self.dead.append(self.nodes[index].replica)
        dice, files = self.rng.random(), self.files
        if dice < 0.2:
            files[index] = self.new_file()  # the file is lost
        elif dice < 0.35 and self.backups:
            files[index] = self.copied(self.rng.choice(self.backups))  # an old one, or another node's
            self.stats["backups_used"] += 1
        elif dice < 0.4:
            files[index] = files[self.rng.randrange(NODES)]  # two processes write to one file
        owner = self.owners.get(id(files[index])) if self.broken == "resume" else None
        self.nodes[index] = self.new(owner)
        self.merge_all(self.nodes[index], files[index])
        self.owners[id(files[index])] = self.nodes[index].replica

    def store(self, index):
        """Commit: a transaction has whole deltas, as many as it may."""
        node, file = self.nodes[index], self.files[index]
        deltas = node.deltas(file.vector(), float("inf"), self.now)
        for delta in deltas[: self.rng.randint(1, len(deltas))] if deltas else ():
            if self.broken == "torn" and len(delta.totals) > 1 and self.rng.random() < 0.1:
                delta = delta._replace(totals=dict(list(delta.totals.items())[1:]))
            file.merge(delta, self.now)

    def copied(self, file):
        copy = self.new_file()
        self.merge_all(copy, file)
        return copy

    def merge_all(self, counter, file):
        """Merge what a file holds, as a start from it does."""
        for delta in file.deltas({}, float("inf"), self.now):
            counter.merge(delta, self.now)

    def absorb(self, node):
        """Have a node absorb all that it may."""
        heirs = node._histories.heirs
        if self.broken == "no-will":
            for replica in node.vector():
                gone = replica in self.dead and replica not in self.ended and replica not in self.cancellations()
                if gone and self.rng.random() < 0.2:
                    self.ended.add(replica)
                    heirs.setdefault(replica, node.replica)
        for replica in list(heirs):
            totals = {name: total for name, (_, total) in node.delta(replica, 0, self.now).totals.items()}
            if node.absorb(kept=heirs.keys() - {replica}):
                self.log[node.replica, node.sequence] = totals
                self.stats["absorbed"] += 1

    def heal(self):
        """Everybody hears of everything, and the keys that ever come of age do so."""
        for _ in range(6):
            self.exchange()
            if self.forgets_keys:
                self.now += self.window_s
            for node in self.nodes:
                node.expire(self.now)
                self.absorb(node)
        for _ in range(3):
            self.exchange()

    def exchange(self):
        for sender in self.nodes:
            for receiver in self.nodes:
                for delta in sender.deltas(receiver.vector(), float("inf"), self.now):
                    receiver.merge(delta, self.now)

    # What must come out.

    def cancellations(self):
        """Return {replica: dot} of the cancellations there can be."""
        return {cancelling_replica(dot): dot for dot, what in self.log.items() if type(what) is tuple and what[2]}

    def check_values(self, node, when):
        """Assert that a node is exact for the dots it holds, without what was cancelled, each key once."""
        held = {dot: what for dot, what in sorted(self.log.items()) if type(what) is tuple and node.holds(*dot)}
        seen, sums, cancelled = set(), dict.fromkeys(NAMES, 0), {cancelling_replica(dot): dot for dot in held}
        cancelled = {dot for replica, dot in cancelled.items() if replica in node.vector()}
        for dot, (name, amount, key) in held.items():
            if key is None or not (dot in cancelled if self.forgets_keys else key in seen):
                sums[name] += amount
            require(dot not in cancelled or key in seen, f"{when}: cancelled without need: {dot}")
            seen.add(key)
        got = {name: node.value(name) for name in NAMES}
        require(got == sums, f"{when}: {got} is not {sums}")

    def check_all(self, when):
        first, *others = self.nodes
        known = self.known(first)
        for node in self.nodes:
            self.check_values(node, when)
        for node in others:
            require(node.vector() == first.vector(), f"{when}: vectors differ")
            require(self.known(node) == known, f"{when}: equal vectors, different states")
        histories = {}
        for (replica, sequence), what in sorted(self.log.items()):
            if sequence <= first.vector().get(replica, 0):
                history = histories.setdefault(replica, {})
                for name, amount in what.items() if type(what) is dict else [what[:2]] if what else ():
                    history[name] = sequence, history.get(name, (0, 0))[1] + amount
        for replica, (totals, _, absorbed) in known.items():
            if replica not in self.cancellations():
                require(totals == histories[replica], f"{when}: no exact prefix")
            for other, (final, *_) in absorbed.items():
                require(first.holds(other, final) and other not in known, f"{when}: absorbed, and not held")
                require(not first.lacks(first.vector(), {other: final}), f"{when}: absorbed, and lacked")
        if self.forgets_keys:
            can = [
                replica for replica, heir in first._histories.heirs.items() if heir in [n.replica for n in self.nodes]
            ]
            require(not can, f"{when}: not absorbed by its heir")

    def known(self, node):
        return {
            delta.replica: (dict(delta.totals), delta.heir, dict(delta.absorbed))
            for delta in node.deltas({}, float("inf"), self.now)
        }


class File:
    """A data file, used as a counter that does not count."""

    def __init__(self, path):
        self._path, self._writer = path, Writer(path, "counter", fsync=False)

    def vector(self):
        return self._writer.vector

    def merge(self, delta, now):
        self._writer.save([delta], now)

    def deltas(self, known, size_max, now):
        with Reader(self._path) as reader:
            return list(reader.deltas(now))

    def close(self):
        self._writer.close()


@contextlib.contextmanager
def broken_rule(rule):
    """Break a rule in the code, if it is one of the code and not of how it is used."""
    absorb, values_without = Histories.absorb, Histories._values_without

    def ends_and(counter, replica, anyone):
        histories = counter._histories
        is_heir = histories.absorptions.successor(histories.heirs[replica]) == counter.replica
        return not histories.ended and replica != counter.replica and (is_heir or anyone)

    def absorb_alone(histories, replica):
        with mock.patch.object(Absorptions, "since", lambda *_: {}):
            return absorb(histories, replica)

    patches = {
        "anyone": (Counter, "_may_absorb_locked", lambda counter, replica: ends_and(counter, replica, True)),
        "not-inherited": (Histories, "absorb", absorb_alone),
        "forgets": (Counter, "_is_over_locked", lambda *_: False),
        "keys-dropped": (Counter, "_may_absorb_locked", lambda counter, replica: ends_and(counter, replica, False)),
        "kept": (Histories, "_values_without", lambda histories, _: values_without(histories, {})),
    }
    with mock.patch.object(*patches[rule]) if rule in patches else contextlib.nullcontext():
        yield


def try_many(seeds, broken=None, **options):
    """Run many schedules; return (what was wrong with those that failed, {what was done: how often})."""
    wrong, sums = [], Tally()
    for seed in seeds:
        try:
            sums += Schedule(seed, broken=broken, **options).run()
        except (Wrong, KeyError, ValueError) as error:
            wrong.append(f"seed {seed}: {error!r}")
    return wrong, sums


def main(arguments):
    broken = None
    if "--breaks" in arguments:
        for rule, what in BREAKS.items():
            print(f"{rule:16} {what}")
        return 0
    if "--break" in arguments:
        place = arguments.index("--break")
        broken = arguments[place + 1]
        del arguments[place : place + 2]
    number, first = [*map(int, arguments), 100, 0][:2] if len(arguments) != 1 else (int(arguments[0]), 0)
    wrong, sums = try_many(range(first, first + number), broken)
    print(*(line[:300] for line in wrong[:3]), sep="\n")
    print(f"{number} schedules from seed {first}, broken: {broken}: {len(wrong)} wrong; {dict(sums)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whole clusters on a virtual clock, over thousands of random schedules."""

import json
import random

import pytest
from coverage import Coverage
from halves import with_more
from simulation import EPOCH_S, TIMEOUT_S, Network, check_prefixes, increment, increment_many

from counter import Counter, new_replica, vectors
from counter.windows import GRACE_S, end_of
from counter.wire import decode

ADDRESSES = [f"10.0.0.{number}:8080" for number in range(1, 6)]


@pytest.fixture(autouse=True)
def untraced():
    """Run without coverage: that takes three times as long here, and unit tests run the same lines."""
    coverage = Coverage.current()
    if coverage:
        coverage.stop()
    yield
    if coverage:
        coverage.start()


def an_amount(rng):
    return rng.choice("abcdef"), rng.choice((-3, -1, 1, 2, 5))


def some_amounts(rng):
    return {name: rng.choice((-3, -1, 1, 2, 5)) for name in rng.sample("abcdef", rng.randint(1, 5))}


def payload(rng, payloads, key, draw):
    """Return what to count: of a key always the same, else what is drawn."""
    drawn = draw(rng)
    return drawn if key is None else payloads.setdefault(key, drawn)


@pytest.mark.parametrize("block", range(10))
def test_any_order_of_deltas_leads_to_the_same_exact_counts(block):
    """Deltas lost, repeated, late, or cut too far back or ahead, crashes, one key at several nodes:
    at every moment every node holds exact prefixes and counts of what it holds each key once."""
    for seed in range(block * 12, block * 12 + 12):
        rng = random.Random(seed)
        counters = [Counter(new_replica(rng.getrandbits)) for _ in range(5)]
        flying, log, payloads = [], {}, {}
        for _ in range(250):
            dice = rng.random()
            if dice < 0.4:
                counter, key = rng.choice(counters), rng.choice((None, None, None, "key-", "batch-"))
                if key:
                    key += str(rng.randrange(20))
                if (key is None and rng.random() < 0.2) or (key and key.startswith("batch")):
                    increment_many(counter, log, payload(rng, payloads, key, some_amounts), key, 0)
                else:
                    increment(counter, log, *payload(rng, payloads, key, an_amount), key, 0)
            elif dice < 0.7:
                sender, receiver = rng.sample(counters, 2)
                for replica, held in sender.vector().items():
                    after = rng.choice((receiver.vector().get(replica, 0), 0, rng.randint(0, held)))
                    if delta := sender.delta(replica, after, 0):
                        flying += [(receiver, delta)] * rng.choice((0, 1, 1, 2))
            elif dice < 0.99:
                rng.shuffle(flying)
                for receiver, delta in flying[:3]:
                    receiver.merge(delta, 0)
                    check_prefixes(receiver, log)
                del flying[:3]
            else:
                counters[rng.randrange(5)] = Counter(new_replica(rng.getrandbits))
        for size_max in (1, 10**6, 10**6, 10**6):
            for sender in counters:
                for receiver in counters:
                    for delta in sender.deltas(receiver.vector(), size_max, 0):
                        receiver.merge(delta, 0)
                    check_prefixes(receiver, log)
        assert all(counter.vector() == counters[0].vector() for counter in counters), seed


@pytest.mark.parametrize("seed", range(25))
def test_all_nodes_agree_whatever_the_network_did(seed):
    """Once the network is whole again, all nodes hold each increment that any live node holds."""
    network = Network(seed)
    for address in ADDRESSES:
        network.start(address, seeds=network.rng.sample(ADDRESSES, 2))
    run_at_random(network)


def a_past(rng, log, replicas):
    """Return counters of nodes that are gone, which heard of some of what the others counted, one key at several."""
    counters = [Counter(new_replica(rng.getrandbits)) for _ in range(replicas)]
    for number in range(3 * replicas):
        one, other = rng.sample(counters, 2)
        increment(one, log, "a", 2, f"past-{number % replicas}", 0)
        increment(one, log, rng.choice("abcdef"), 5, None, 0)
        for delta in one.deltas(other.vector(), 300, 0):
            other.merge(delta, 0)
    return counters


@pytest.mark.parametrize("seed", range(16))
def test_nodes_whose_settled_vectors_differ_agree_whatever_the_network_did(seed, monkeypatch):
    """What each holds of long ago differs, and settles early or late; some nodes may be of an older version."""
    network = Network(seed)
    rng = network.rng
    monkeypatch.setattr(vectors, "SETTLING_S", rng.choice((0.0, 1.0, 5.0)))
    monkeypatch.setattr(vectors, "CROWD", rng.choice((1, 6, 256)))
    past, old = a_past(rng, network.log, 20), rng.choice((0, 0, 1, 3))
    for address in ADDRESSES:
        node = network.start(address, seeds=rng.sample(ADDRESSES, 2))
        for counter in rng.sample(past, 5):
            for delta in counter.deltas(node.counter.vector(), rng.choice((200, 10**6)), 0):
                node.counter.merge(delta, 0)
        if rng.random() < 0.7:
            node.counter.was_loaded(0)
        if address in ADDRESSES[:old]:
            as_of_version_1(node)
    run_at_random(network)
    if not old and len(network.alive()[0].counter.vector()) > 20:
        sent = network.messages, network.bytes
        network.run(20)
        assert (network.bytes - sent[1]) / (network.messages - sent[0]) < 23 * 20 + 700


def as_of_version_1(node):
    """Have a node send and understand what version 1 of messages has, which is no summary."""
    sender, receive = node.table._own.sender, node.gossip.receive
    node.table._own.sender = lambda wall: sender(wall)._replace(v=1)
    node.table.v_of = lambda id: 1

    def receiving(message, *rest):
        assert message.summary is None
        return receive(message, *rest)

    node.gossip.receive = receiving


def run_at_random(network):
    """Count, crash, pause, restart and split at random; assert that all agree once the network is whole."""
    rng, payloads = network.rng, {}
    for _ in range(12):
        dice = rng.random()
        if dice < 0.2:
            shuffled = rng.sample(ADDRESSES, 5)
            network.split(shuffled[:2], shuffled[2:])
        elif dice < 0.35:
            network.cut = set()
        elif dice < 0.5:
            victim = rng.choice(network.alive())
            network.crash(victim.address)
            network.start(victim.address, seeds=rng.sample(ADDRESSES, 2))
        elif dice < 0.6:
            rng.choice(network.alive()).paused_until = network.now + rng.uniform(0, 2 * TIMEOUT_S)
        for _ in range(rng.randrange(30)):
            key = f"key-{rng.randrange(20)}" if rng.random() < 0.2 else None
            rng.choice(network.alive()).increment(*payload(rng, payloads, key, an_amount), key)
            if rng.random() < 0.2:
                key = rng.choice((None, f"batch-{rng.randrange(20)}"))
                rng.choice(network.alive()).increment_many(payload(rng, payloads, key, some_amounts), key)
            network.run(rng.expovariate(20))
        network.run(rng.uniform(0, 2))
        network.check()
    network.cut = set()
    network.loss = 0
    assert network.run_until(network.converged, 60), [node.table.snapshot(network.now) for node in network.alive()]
    network.check()


class SlowNetwork(Network):
    """Some of its messages take longer than a key is kept, and the clocks of its nodes differ."""

    key_window_s, clocks_differ_s = 10.0, 1000.0

    def delay(self, sender, receiver):
        return self.rng.uniform(0, 12.0) if self.rng.random() < 0.05 else super().delay(sender, receiver)


class Requests:
    """Clients that use few keys again and again, and the oracle that knows how many requests they made.

    A request is repeated, at any node, for less than half a window, and the next one with its key comes when
    its key has certainly expired.
    """

    REPEATED_S, EXPIRED_S = 4.0, 16.0

    def __init__(self, network):
        self.network, self.rng = network, network.rng
        self.began_at = {}  # name -> when the latest request with its key was first sent
        self.number = dict.fromkeys("abcdef", 0)  # of each name the requests so far
        self.replays = self.taken_twice = 0

    def send(self):
        """Send one request to a node that goes on, for the first time or again."""
        now, name = self.network.now, self.rng.choice(list(self.number))
        age_s = now - self.began_at.get(name, -1000.0)
        if self.REPEATED_S < age_s < self.EXPIRED_S:
            return
        if is_new := age_s >= self.EXPIRED_S:
            self.began_at[name] = now
            self.number[name] += 1
        node = self.rng.choice([node for node in self.network.alive() if node.paused_until <= now])
        before = node.counter.sequence
        node.increment(name, 1, f"key of {name}")
        self.replays += before == node.counter.sequence
        self.taken_twice += before < node.counter.sequence and not is_new


def play(seed, pause_s, calm_s):
    """Let clients count while nodes pause, one at a time, and some time apart; return the Requests and the nodes."""
    network = SlowNetwork(seed)
    for address in ADDRESSES:
        network.start(address, seeds=ADDRESSES[:1])
    assert network.run_until(network.converged, 60)
    requests, pause_at = Requests(network), 0.0
    while network.now < 300:
        if network.now >= pause_at:
            node, lasts_s = network.rng.choice(network.alive()), network.rng.uniform(0, pause_s)
            node.paused_until = network.now + lasts_s
            pause_at = network.now + lasts_s + calm_s
        requests.send()
        network.run(network.rng.expovariate(4))
    network.loss = 0
    network.run(30)
    assert network.run_until(network.converged, 60)
    return requests, network.alive()


@pytest.mark.parametrize("seed", range(100, 104))
def test_each_request_with_a_key_counts_once(seed):
    """Though it comes to several nodes, messages and pauses outlast the key, and the key comes anew."""
    requests, nodes = play(seed, pause_s=12.0, calm_s=10.0)
    assert min(requests.number.values()) > 10
    assert requests.replays > 100
    assert requests.taken_twice > 4
    for node in nodes:
        assert {name: node.counter.value(name) for name in requests.number} == requests.number


@pytest.mark.parametrize("seed", range(3))
def test_a_partition_of_any_length_heals_by_itself(seed):
    """Both sides drop each other, and still find each other and agree after the cut is mended."""
    network = Network(seed, loss=0.02)
    for number, address in enumerate(ADDRESSES):
        network.start(address, seeds=ADDRESSES[number - 1 : number])
    assert network.run_until(network.converged, 20)
    network.split(ADDRESSES[:2], ADDRESSES[2:])
    for node in network.alive():
        node.increment("a", 1)
    network.run(150)
    assert [len(node.table.active()) for node in network.alive()] == [1, 1, 2, 2, 2]
    assert [node.counter.value("a") for node in network.alive()] == [2, 2, 3, 3, 3]
    network.cut = set()
    assert network.run_until(network.converged, 20)
    assert {node.counter.value("a") for node in network.alive()} == {5}


@pytest.mark.parametrize("seed", range(2))
def test_windows_end_everywhere_whatever_the_network_and_the_clocks_do(seed):
    """Partitions last over the end of windows, clocks differ by up to 20 s and are set there:
    what lives is exact at all nodes once they can talk, and what has ended is nowhere, however late messages are."""
    network = Network(seed, loss=0.05)
    rng, counted = network.rng, {}
    for address in ADDRESSES:
        network.start(address, seeds=ADDRESSES[:2])

    def ended():
        return max(node.counter.horizon for node in network.alive())

    def check():
        for node in network.alive():
            assert all(end_of(name) > node.counter.horizon for name in node.counter._counters.numbers), seed

    for step in range(20):
        if step % 5 == 1:
            network.split(ADDRESSES[:2], ADDRESSES[2:])  # for up to a minute, where windows end after half of one
        elif step % 5 == 4:
            network.cut = set()
        for _ in range(rng.randrange(20)):
            node, series = rng.choice(network.alive()), rng.choice(("a@5s:5", "b@10s:1", "c@30s:1"))
            width_s, amount = {"a": 5, "b": 10, "c": 30}[series[0]], rng.choice((1, 2, -1))
            *dot, _ = node.counter.increment(series, amount)
            window = f"{series}/{int((EPOCH_S + network.now + node.clock_error_s) // width_s)}"
            counted.setdefault(window, []).append((dot, amount))
            network.at(network.now, node, lambda: None)
            network.run(rng.expovariate(10))
        rng.choice(network.alive()).clock_error_s = rng.uniform(-20, 20)
        network.run(rng.uniform(2, 18))
        check()
    network.cut, network.loss = set(), 0
    assert network.run_until(network.converged, 60)
    check()
    living = {window: amounts for window, amounts in counted.items() if end_of(window) > ended()}
    assert living
    for node in network.alive():
        for window, amounts in living.items():
            assert node.counter._counters.get(window) == sum(amount for _, amount in amounts), (seed, window)
    network.run(2 * 30 + GRACE_S + 41)
    assert [node.counter.held_windows for node in network.alive()] == [0] * 5
    assert [node.counter.sizes()[0] for node in network.alive()] == [0] * 5
    assert network.converged()
    network.crash(ADDRESSES[0])
    restarted = network.start(ADDRESSES[0], seeds=ADDRESSES)
    assert network.run_until(network.converged, 30)
    assert restarted.counter.held_windows == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_halves_that_never_met_find_each_other_through_a_name_they_share(restarted):
    """Whether they started cut off from each other, or all of one half came back at new addresses meanwhile."""
    network = Network(1, loss=0, repeat=0)
    one, other, later = ADDRESSES[:2], ADDRESSES[2:4], ["10.0.0.8:8080", "10.0.0.9:8080"]
    network.names["nodes:8080"] = one + other
    if not restarted:
        network.split(one, other)
    for address in one + other:
        network.start(address, seeds=["nodes:8080"])
    network.run(20)
    if restarted:
        network.split(one + later, other)
        network.run(20)
        for old, new in zip(one, later, strict=True):
            network.crash(old)
            network.start(new, seeds=["nodes:8080"])
            network.names["nodes:8080"] = [node.address for node in network.alive()]
            network.run(20)
    for node in network.alive():
        node.increment("a", 1)
    network.run(20)
    assert [node.counter.value("a") for node in network.alive()] == [2] * 4
    network.cut = set()
    assert network.run_until(network.converged, 40)
    assert [node.counter.value("a") for node in network.alive()] == [4] * 4


@pytest.mark.parametrize("seed", range(8))
def test_no_node_is_ready_before_it_holds_what_was_counted(seed):
    """Nodes start together, empty; one that has counted is reached late, or by one of them only."""
    network = Network(seed, loss=0.2)
    holder, *others = ADDRESSES
    network.start(holder)
    for _ in range(20):
        network.nodes[holder].increment("a", 1)
    near = others[:1] if seed % 2 else []
    network.split([holder, *near], [address for address in others if address not in near])
    if near:
        network.cut = {pair for pair in network.cut if holder in pair}
    for address in others:
        network.run(network.rng.uniform(0, 0.5))
        network.start(address, seeds=ADDRESSES)
    ready_at = {}
    for step in range(400):
        if step == (200 if near else 15):
            network.cut = set()
        network.run(0.1)
        for node in network.alive():
            if node.joining.ready:
                ready_at.setdefault(node.address, network.now)
                assert node.counter.value("a") == 20
    assert len(ready_at) == 5
    assert not near or max(ready_at.values()) < 20  # the others got it from the near one


@pytest.mark.parametrize(("size", "seed"), [*((5, seed) for seed in range(6)), (40, 1)])
def test_nodes_that_all_start_together_are_all_ready_in_the_end(size, seed):
    """Also where some crash in the middle of it, and come back."""
    network = Network(seed, as_json=size < 10)
    addresses = [f"10.0.2.{number}:8080" for number in range(size)]

    def start(address):
        network.start(address, seeds=[addresses[0], network.rng.choice(addresses)])

    for address in addresses:
        start(address)
        network.run(0.5 / size)
    assert not any(node.joining.ready for node in network.alive())
    for _ in range(3):
        victim = network.rng.choice(network.alive())
        victim.increment("a", 1)
        network.run(network.rng.uniform(0, 2))
        network.crash(victim.address)
        start(victim.address)
    assert network.run_until(lambda: all(node.joining.ready for node in network.alive()), 40), [
        node.joining.waits_for for node in network.alive()
    ]


def test_what_a_dead_node_told_one_peer_reaches_all():
    """Increments known to a single survivor spread from it, though it did not accept them."""
    network = Network(1, loss=0, repeat=0)
    for address in ADDRESSES:
        network.start(address, seeds=ADDRESSES[:1])
    assert network.run_until(network.converged, 20)
    first, second, *others = ADDRESSES
    network.split([first, second], others)
    network.nodes[first].increment("a", 5)
    assert network.run_until(lambda: network.nodes[second].counter.value("a") == 5, 1)
    network.crash(first)
    network.cut = set()
    network.run(5)
    assert {node.counter.value("a") for node in network.alive()} == {5}


def test_a_dead_node_leaves_every_list_and_stays_away():
    """No rumour brings back a node that has crashed."""
    network = Network(2)
    for address in ADDRESSES:
        network.start(address, seeds=ADDRESSES[:1])
    assert network.run_until(network.converged, 20)
    network.crash(ADDRESSES[4])
    network.run(3 * TIMEOUT_S)
    for _ in range(100):
        network.run(1)
        assert all(ADDRESSES[4] not in dict(map(reversed, node.table.active())) for node in network.alive())


def test_an_idle_cluster_keeps_quiet():
    """Without increments each node sends one heartbeat to each peer per interval, and nothing else."""
    network = Network(3, loss=0, repeat=0, delay_s=0.01)
    for address in ADDRESSES:
        network.start(address, seeds=ADDRESSES[:1])
    network.run(20)
    sent, exchange = [], network.exchange
    network.exchange = lambda *arguments: (sent.append(arguments), exchange(*arguments))
    network.run(10)
    assert 5 * 4 * 9 <= len(sent) <= 5 * 4 * 11


def test_increments_under_way_are_batched():
    """However many increments there are, messages stay paced, and nothing is left over."""
    network = Network(4, loss=0, repeat=0, delay_s=0.001)
    for address in ADDRESSES[:3]:
        network.start(address, seeds=ADDRESSES[:1])
    assert network.run_until(network.converged, 20)
    sent, exchange = [], network.exchange
    network.exchange = lambda *arguments: (sent.append(arguments), exchange(*arguments))
    for _ in range(2000):
        network.nodes[ADDRESSES[0]].increment("a", 1)
        network.run(0.0005)
    assert len(sent) < 300
    network.run(0.1)
    assert {node.counter.value("a") for node in network.alive()} == {2000}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_cluster_beyond_the_fanout_keeps_its_promises(seed):
    """Of 60 nodes all find all through one seed, count what one counts, and drop none but the dead one."""
    network = Network(seed, loss=0.05, repeat=0.05, delay_s=0.02, as_json=False)
    addresses = [f"10.0.1.{number}:8080" for number in range(60)]
    for address in addresses:
        network.start(address, seeds=addresses[:1])
    assert network.run_until(network.converged, 15)
    before = network.messages
    network.run(5)
    assert network.messages - before <= (2 * 8 + 2) * 60 * 5
    network.nodes[addresses[-1]].increment("a", 3)
    assert network.run_until(lambda: all(node.counter.value("a") == 3 for node in network.alive()), 6)
    network.crash(addresses[-1])
    assert network.run_until(network.converged, 12)
    assert network.false_removals == 0


def test_messages_as_objects_lead_to_what_messages_as_json_lead_to():
    """Or the simulation would show what real nodes do not do."""
    ends = []
    for as_json in (True, False):
        network = Network(5, as_json=as_json)
        for address in ADDRESSES:
            network.start(address, seeds=ADDRESSES[:1]).increment("a", 1)
        network.run(15)
        vectors = [node.counter.vector() for node in network.alive()]
        ends.append((network.messages, vectors, [sorted(node.table.active()) for node in network.alive()]))
    assert ends[0] == ends[1]


def test_nodes_of_a_later_version_in_a_cluster_change_nothing():
    """What they add to every message is ignored by those who do not know it."""

    class NewerNetwork(Network):
        def _receive(self, sent):
            return super()._receive([json.dumps(with_more(json.loads(line))).encode() for line in sent])

    ends = []
    for kind in (Network, NewerNetwork):
        network = kind(6)
        for address in ADDRESSES:
            network.start(address, seeds=ADDRESSES[:1]).increment("x", 1, "key")
        network.run(15)
        vectors = [node.counter.vector() for node in network.alive()]
        ends.append((network.messages, vectors, [sorted(node.table.active()) for node in network.alive()]))
    assert ends[0] == ends[1]
    assert {node.counter.value("x") for node in network.alive()} == {1}


@pytest.mark.parametrize("restarted", [False, True])
def test_recorded_messages_are_worth_nothing(restarted):
    """Neither at the nodes that they were sent to, nor at those that were started anew at their addresses."""
    network = Network(7, loss=0, repeat=0)
    recorded, send = [], network._send
    network._send = lambda message: recorded.append(send(message)) or recorded[-1]
    for address in ADDRESSES:
        network.start(address, seeds=ADDRESSES)
    for _ in range(20):
        for node in network.alive():
            node.increment("a", 1)
        network.run(0.3)
    if restarted:
        for address in ADDRESSES:
            network.crash(address)
            network.start(address, seeds=ADDRESSES)
    del network._send
    assert network.run_until(network.converged, 20)
    network.run(1)  # what was on its way has arrived
    before = [(node.counter.vector(), node.table.snapshot(network.now)) for node in network.alive()]
    for node in network.alive():
        for lines in recorded:
            assert node.gossip.receive(decode(lines), network.now).number is not None
    assert before == [(node.counter.vector(), node.table.snapshot(network.now)) for node in network.alive()]
    assert {node.counter.value("a") for node in network.alive()} == {0 if restarted else 100}


@pytest.mark.parametrize("seed", range(12))
def test_nodes_that_stop_in_order_leave_nothing(seed):
    """Neither entries nor a place in the vector, over a network that loses and repeats; crashes leave both."""
    network = Network(seed)
    rng, addresses, crashed = network.rng, ADDRESSES[:4], set()
    for address in addresses:
        network.start(address, seeds=ADDRESSES[:2])
    network.run(5)
    for _ in range(12):
        for _ in range(rng.randrange(20)):
            rng.choice(network.alive()).increment(*an_amount(rng))
            network.run(rng.expovariate(20))
        victim = network.nodes[rng.choice(addresses)]
        if rng.random() < 0.2:
            network.crash(victim.address)
            crashed.add(victim.counter.replica)
        else:
            network.stop(victim.address)
            network.run(2)
        network.check()
        network.start(victim.address, seeds=ADDRESSES[:2])
        network.run(rng.uniform(2, 8))
        network.check()
    network.loss = 0
    living = {node.counter.replica for node in network.alive()}

    def is_clean():
        return network.converged() and network.alive()[0].counter.vector().keys() <= living | crashed

    # A heir that crashed with a will to keep leaves what it had to absorb: as if that had crashed as well.
    network.run_until(is_clean, 60)
    assert network.run_until(network.converged, 60)
    network.check()
    counter = network.alive()[0].counter
    left = counter.vector().keys() - living - crashed
    assert all(counter.delta(replica, 0, 0).heir in crashed for replica in left)

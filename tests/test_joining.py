"""When a node is ready, and what it waits for until then."""

import random

import pytest
from halves import AT_A, AT_B, AT_ME, ME, A, B, C, Half
from simulation import Network

from counter import Counter, Delta
from counter.confirmations import STALLED_S
from counter.joining import PATIENCE_S, Givers, Joining

TIMEOUT_S = 10.0
AT_C = "10.0.0.3:80"
SEED = "10.0.0.9:80"


@pytest.fixture
def joining():
    """A node with seeds that has just started."""
    joining = Joining(True, TIMEOUT_S)
    look(joining, 0.0)
    return joining


def look(joining, now, mine=(), present=(), refusals=()):
    joining.look(now, ME, dict(mine), list(present), dict(refusals))
    return joining.ready


def test_a_node_without_seeds_is_ready_at_once():
    assert Joining(False, TIMEOUT_S).ready


def test_vectors_are_compared_without_its_lock():
    """Comparing may take the lock of the counter, and no two locks are held together."""
    held = []

    def lacks(_mine, _vector):
        held.append(joining._lock.locked())
        return True

    joining = Joining(True, TIMEOUT_S, lacks)
    joining.heard(A, True, {A: 1}, {})
    look(joining, 1.0)
    assert held == [False, False]


def test_a_node_is_ready_once_it_has_caught_up_with_a_peer_that_is_ready(joining):
    joining.heard(A, True, {B: 5}, {})
    assert not joining.ready
    joining.heard(A, True, {B: 7}, {B: 5})  # what was counted since does not matter
    assert joining.ready


def test_it_may_get_from_others_what_that_peer_holds(joining):
    joining.heard(A, True, {B: 5}, {})
    assert look(joining, 1.0, {B: 5})


def test_peers_that_are_not_ready_make_nobody_ready_before_the_join_timeout(joining):
    """A third may hold the counts."""
    joining.heard(A, False, {}, {})
    assert not look(joining, TIMEOUT_S - 0.1)
    assert look(joining, TIMEOUT_S)


def test_what_a_peer_held_before_it_was_ready_is_not_what_counts(joining):
    joining.heard(A, False, {}, {})
    joining.heard(A, True, {B: 5}, {})
    assert not look(joining, TIMEOUT_S)
    assert look(joining, TIMEOUT_S + 1, {B: 5})


@pytest.mark.parametrize("present", [[A], []])
def test_a_peer_that_holds_more_is_waited_for_also_when_it_is_lost(joining, present, caplog):
    joining.heard(A, True, {B: 5}, {})
    assert not any(look(joining, float(now), {B: 4}, present) for now in range(100))
    assert joining.waits_for == f"increments that peer {A} holds, or held"
    assert caplog.messages == [f"not ready: this node waits for {joining.waits_for}"]


def test_a_peer_that_has_yet_to_say_what_it_holds_is_waited_for_as_long_as_somebody_hears_it(joining):
    joining.heard(A, False, {}, {})
    assert not look(joining, 50.0, present=[A, C])
    assert joining.waits_for == f"peer {C} to say what it holds"
    assert look(joining, 60.0, present=[A])


def test_a_seed_that_refuses_is_not_one_that_is_absent(joining, caplog):
    assert not look(joining, 50.0, refusals={SEED: "answered 401"})
    assert caplog.messages == [f"not ready: this node waits for a seed that refuses it: {SEED}: answered 401"]
    joining.heard(A, True, {}, {})
    assert joining.ready  # it has caught up with another


@pytest.mark.parametrize(("mine", "level"), [({}, "WARNING"), ({ME: 1}, "WARNING"), ({A: 1}, "INFO")])
def test_to_be_ready_alone_without_counts_is_a_warning(joining, caplog, mine, level):
    """The counts may be where nobody has answered, whatever was counted here since the start."""
    caplog.set_level("INFO")
    assert look(joining, TIMEOUT_S, mine)
    assert [record.levelname for record in caplog.records] == [level]


def test_ready_is_for_ever(joining):
    assert look(joining, TIMEOUT_S)
    joining.heard(A, True, {B: 5}, {})
    assert look(joining, TIMEOUT_S + 1, {}, [C], {SEED: "answered 401"})


def test_what_was_absorbed_meanwhile_is_reached():
    counter = Counter(B)
    counter.merge(Delta(A, 0, 5, {"x": (4, 1)}, heir=B), 0)
    joining = Joining(True, TIMEOUT_S, counter.lacks)
    joining.heard(C, True, {A: 5}, {})
    assert not joining.ready
    counter.absorb()
    joining.heard(C, True, {A: 5}, counter.vector())
    assert joining.ready


# From whom it takes what it lacks.


def test_one_gives_at_a_time():
    givers = Givers()
    assert givers.take(AT_A, A, 0.0)
    assert givers.take(AT_A, A, 1.0)
    assert not givers.take(AT_B, B, 1.0)
    assert not givers.take(AT_B, A, 1.0)  # another address of the same peer
    assert givers.compared(AT_B, B, lacks=True) == []
    assert givers.compared(AT_A, A, lacks=True) == []  # it goes on
    assert givers.compared(AT_A, A, lacks=False) == [AT_B]
    assert givers.take(AT_B, B, 1.0)
    assert givers.compared(AT_B, B, lacks=False) == []


def test_one_that_fails_gives_no_more():
    givers = Givers()
    givers.take(AT_A, A, 0.0)
    givers.compared(AT_B, B, lacks=True)
    assert givers.end(lambda _: False) == []
    assert givers.end([AT_A].__contains__) == [AT_B]
    assert givers.take(AT_B, B, 1.0)


def test_a_further_one_gives_where_nothing_gets_on():
    givers = Givers()
    givers.take(AT_A, A, 0.0)
    givers.progress(A, 5.0)
    givers.progress(B, 20.0)
    assert not givers.take(AT_B, B, 5.0 + STALLED_S - 0.1)
    assert givers.take(AT_B, B, 5.0 + STALLED_S)
    assert not givers.take(AT_C, C, 5.0 + STALLED_S)
    assert givers.take(AT_A, A, 5.0 + STALLED_S)


def test_one_that_is_slow_is_not_waited_for_without_end():
    givers = Givers()
    givers.take(AT_A, A, 0.0)
    for now in range(0, 10_000, 10):
        givers.progress(A, float(now))
        if givers.take(AT_B, B, float(now)):
            break
    assert now == PATIENCE_S


def holder(replica, address):
    """Return a node that is ready and holds 3,000 entries, of which each of two nodes counted a half."""
    half = Half(replica, address)
    other = B if replica == A else A
    half.counter.merge(Delta(other, 0, 1500, {f"{other}-{n}": (n, 1) for n in range(1, 1501)}), 0)
    half.counter.increment_many({f"{replica}-{n}": 1 for n in range(1, 1501)})
    return half


class Join:
    """A node that joins through some addresses, in steps: requests are sent, and then answered."""

    def __init__(self, nodes, now=0.0):
        """`nodes` is {address: the Half that answers there}."""
        self.node, self.nodes, self.asked, self.entries = Half(has_seeds=True), nodes, [], 0
        self.node.gossip.swept(list(nodes), [], now)
        self.send(now)
        for asked in list(self.asked):  # who is there
            self.answer(asked, now)
        self.send(now)

    def send(self, now):
        while link := self.node.links.take(now):
            self.asked.append((link, self.node.gossip.request(link, now)))

    def receive(self, asked, now):
        link, request = asked
        reply = self.nodes[link.address].gossip.receive(request, now)
        self.entries += sum(len(delta.totals) for delta in reply.deltas)
        return reply

    def answer(self, asked, now):
        self.asked.remove(asked)
        self.node.gossip.answered(*asked, self.receive(asked, now), now)

    def fail(self, asked, now):
        self.asked.remove(asked)
        self.node.links.failed(asked[0], OSError("reset"), now)

    def run(self, now):
        """Answer all that is asked."""
        self.send(now)
        while self.asked:
            self.answer(self.asked[0], now)
            self.send(now)

    def asked_to_give(self):
        return [asked for asked in self.asked if asked[1].wants]

    def others(self):
        return [asked for asked in self.asked if not asked[1].wants]


def test_a_node_that_joins_takes_what_it_lacks_from_one_peer():
    join = Join({AT_A: holder(A, AT_A), AT_B: holder(B, AT_B)})
    (giving,), (other,) = join.asked_to_give(), join.others()
    join.answer(other, 0.1)
    join.send(0.5)
    assert join.asked == [giving]  # the other is not asked again before this one has given
    assert not join.node.joining.ready
    join.run(1.0)
    assert join.entries == 3000
    assert join.node.joining.ready


def test_two_addresses_of_a_peer_give_once():
    at_a = holder(A, AT_A)
    join = Join({AT_A: at_a, AT_B: at_a})
    join.run(1.0)
    assert join.entries == 3000
    assert join.node.counter.vector() == at_a.counter.vector()


def test_another_gives_if_the_first_fails():
    join = Join({AT_A: holder(A, AT_A), AT_B: holder(B, AT_B)})
    (giving,), (other,) = join.asked_to_give(), join.others()
    join.receive(giving, 0.1)
    join.answer(other, 0.1)
    join.fail(giving, 5.0)
    join.node.gossip.swept([], [], 5.0)
    join.run(5.0)
    assert join.entries == 6000
    assert join.node.joining.ready


def test_one_that_fails_all_the_time_does_not_keep_others_from_giving():
    join = Join({AT_A: holder(A, AT_A), AT_B: holder(B, AT_B)})
    (giving,) = join.asked_to_give()
    for now in (1.0, 2.0):
        join.fail(giving, now)
        join.node.gossip.swept([giving[0].address], [], now)
        join.send(now)
        (giving,) = [asked for asked in join.asked if asked[0] is giving[0]]
        assert not giving[1].wants
    (other,) = [asked for asked in join.asked if asked is not giving]
    join.answer(other, 2.1)
    join.send(2.1)
    assert [asked[0] for asked in join.asked_to_give()] == [other[0]]


def test_nobody_sends_to_a_node_by_itself_what_it_is_given():
    """Neither the one that gives it, in its answer, nor another; and again once it is over."""
    peers = {AT_A: holder(A, AT_A), AT_B: holder(B, AT_B)}
    join = Join(peers)
    (giving,), (other,) = join.asked_to_give(), join.others()
    reply = join.receive(giving, 0.1)
    join.answer(other, 0.1)
    for peer in peers.values():
        peer.counter.increment("later")
        peer.gossip.swept([AT_ME], [], 0.2)
    sent = 0
    for step in range(2, 102):  # ten seconds
        for peer in peers.values():
            while link := peer.links.take(step / 10):
                request = peer.gossip.request(link, step / 10)
                assert not request.deltas
                peer.gossip.answered(link, request, join.node.gossip.receive(request, step / 10), step / 10)
                sent += 1
    assert 10 <= sent <= 24  # they ask now and then whether it is over
    join.node.gossip.answered(*giving, reply, 11.0)
    join.asked.remove(giving)
    for now in (11.1, 11.2, 11.3):
        join.run(now)
    assert join.entries <= 3002
    assert join.node.counter.vector() == {A: 1501, B: 1501}
    for peer in peers.values():
        peer.counter.increment("later")
        assert peer.links.take(12.0).address == AT_ME


def test_a_peer_that_cannot_be_asked_gives_by_itself():
    node, peer = Half(has_seeds=True), holder(A, AT_A)
    node.gossip.swept([AT_A], [], 0.0)
    node.links.failed(node.links.take(0.0), OSError("no route"), 0.0)
    for now in (1.0, 2.0, 3.0):
        peer.gossip.swept([AT_ME], [], now)
        while link := peer.links.take(now):
            request = peer.gossip.request(link, now)
            peer.gossip.answered(link, request, node.gossip.receive(request, now), now)
    assert node.counter.vector() == peer.counter.vector()
    assert node.joining.ready


@pytest.mark.parametrize("seed", range(10))
def test_what_many_hold_crosses_to_a_node_that_joins_once(seed):
    """Of a cluster whose nodes it all asks at the same time, and which all hear of it."""
    network = Network(seed, loss=0, repeat=0, as_json=False)
    addresses = [f"10.0.0.{number}:8080" for number in range(1, 6)]
    for address in addresses:
        network.start(address, seeds=addresses[:1])
    assert network.run_until(network.converged, 20)
    for node in network.alive():
        for number in range(1500):
            node.counter.increment(f"counter-{number}")
        network.at(network.now, node, lambda: None)
    assert network.run_until(lambda: network.converged() and all(n.joining.ready for n in network.alive()), 20)
    joiner = network.start("10.0.0.9:8080", seeds=addresses)
    came, merge = [], joiner.counter.merge
    joiner.counter.merge = lambda delta, now: came.append((delta.replica, delta.after)) or merge(delta, now)
    assert network.run_until(lambda: joiner.joining.ready, 20)
    network.run(5)
    assert sorted(came) == sorted((node.counter.replica, 0) for node in network.alive() if node is not joiner)


class Unfair(Network):
    """A network in which some nodes cannot dial others, which may well dial them."""

    def __init__(self, seed):
        super().__init__(seed, loss=0.1 * (seed % 2), as_json=False)
        self.undialable = set()  # pairs of addresses

    def exchange(self, sender, link, request):
        if (sender.address, link.address) not in self.undialable:
            super().exchange(sender, link, request)
        else:
            self.at(self.now + 1, sender, lambda: sender.links.failed(link, OSError("no route"), sender.now))


def misbehave(network, node, how, joiner, rng):
    """Have a node fail in some way when it is to give a joiner what it holds."""
    gossip, receive, request = node.gossip, node.gossip.receive, node.gossip.request

    def lies(message, now):  # it shows what it never gives
        return receive(message, now)._replace(deltas=[])

    def tells(link, now):
        message = request(link, now)
        return message if message is None or link.address != joiner else message._replace(deltas=[])

    def breaks(message, now):  # what is long never arrives whole
        answer = receive(message, now)
        return answer._replace(applied=None, summary=None) if answer.deltas else answer

    at = network.now + rng.expovariate(0.5)
    if how == "lies":
        gossip.receive, gossip.request = lies, tells
    elif how == "breaks":
        gossip.receive = breaks
    elif how == "cannot be dialled":
        network.undialable.add((joiner, node.address))
    elif how == "is cut off":
        network.at(at, node, lambda: network.split([node.address], [*{*network.nodes, joiner} - {node.address}]))
    elif how == "stalls":
        node.paused_until = network.now + rng.uniform(1, 100)
    elif how == "crashes":
        network.at(at, node, lambda: network.crash(node.address))
    elif how == "leaves":
        network.at(at, node, lambda: network.stop(node.address))


WRONG = ("lies", "breaks", "cannot be dialled", "is cut off", "stalls", "crashes", "leaves")


def join_among(wrong, seed, monkeypatch):
    """Have a node join a cluster with a node for each entry of `wrong`, which does that, and one more.

    Return (how long it took, how many histories it got, and how many there are).
    """
    monkeypatch.setattr("counter.confirmations.SHORT", 2)
    monkeypatch.setattr("gossip.DELTAS_MAX", 100)  # so what they hold takes several messages
    rng, network = random.Random(seed), Unfair(seed)
    addresses, joiner = [f"10.0.0.{number}:8080" for number in range(len(wrong) + 1)], "10.0.1.1:8080"
    for address in addresses:
        network.start(address, seeds=[addresses[0], joiner])
    assert network.run_until(network.converged, 60)
    nodes = network.alive()
    for node in nodes:
        for number in range(5):
            node.increment(f"{'x' * 50}{number}", 1)
    assert network.run_until(lambda: network.converged() and all(node.joining.ready for node in nodes), 60)
    for node, how in zip(nodes[1:], wrong, strict=True):
        misbehave(network, node, how, joiner, rng)
    began, node = network.now, network.start(joiner, seeds=addresses)
    came, merge = [], node.counter.merge
    node.counter.merge = lambda delta, now: came.append(delta.replica) or merge(delta, now)
    held = {node.counter.replica: node.counter.sequence for node in nodes}
    assert network.run_until(lambda: node.joining.ready, 200), (wrong, seed)
    took_s = network.now - began
    assert network.run_until(lambda: not node.counter.lacks(node.counter.vector(), held), 60), (wrong, seed)
    return took_s, len(came), len(nodes)


@pytest.mark.parametrize("how", WRONG)
def test_a_node_joins_whatever_all_but_one_do_wrong(how, monkeypatch):
    for seed in range(4):
        join_among([how] * 4, seed, monkeypatch)


@pytest.mark.parametrize("block", range(3))
def test_a_node_joins_whatever_those_do_that_are_to_give(block, monkeypatch):
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        join_among(rng.choices(WRONG, k=rng.randint(1, 6)), seed, monkeypatch)

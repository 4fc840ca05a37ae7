"""Fresh reads: they include whatever any node had acknowledged when they began, or say that they do not."""

import random
import threading
import time

import pytest
from clients import problem
from conftest import PATIENT, wait_until
from faults import BadNetwork
from halves import AT_A, AT_B, A, B, C, Half, answer, talk
from simulation import Network

from counter import Delta
from counter.wire import View

AT_C = "10.0.0.3:80"


def met(*ids):
    """Return a node that has met these peers, and a link for each."""
    node = Half()
    return node, [node.meet({A: AT_A, B: AT_B}[id], id) for id in ids]


def compare(node, peer, now):
    """Have the link that is due next carry a comparison to another node."""
    link = node.links.take(now)
    talk(node, peer, link, now)


def test_a_node_alone_reads_fresh_at_once():
    read = Half().gossip.freshness.begin(1.0)
    assert (read.over.is_set(), read.fresh, read.nodes) == (True, True, 1)


def test_a_read_is_fresh_once_all_peers_have_shown_what_they_hold():
    node, _ = met(A, B)
    others = {AT_A: Half(A, AT_A), AT_B: Half(B, AT_B)}
    for other in others.values():
        other.counter.increment("x")
    read = node.gossip.freshness.begin(1.0)
    for _ in others:
        assert not read.over.is_set()
        link = node.links.take(1.0)
        talk(node, others[link.address], link, 1.0)
    assert (read.over.is_set(), read.fresh, read.nodes) == (True, True, 3)
    assert node.counter.value("x") == 2


def test_a_comparison_that_was_sent_before_a_read_began_does_not_count():
    """What the peer counted after it answered, and before the read began, would be missing."""
    node, _ = met(A)
    peer = Half(A, AT_A)
    before = node.gossip.freshness.begin(1.0)
    link = node.links.take(1.0)
    read = node.gossip.freshness.begin(1.5)
    talk(node, peer, link, 2.0)
    assert (before.fresh, read.fresh) == (True, False)
    compare(node, peer, 2.0)
    assert read.fresh


def test_reads_that_wait_share_the_next_comparison():
    node, _ = met(A)
    peer = Half(A, AT_A)
    freshness = node.gossip.freshness
    first = freshness.begin(1.0)
    link = node.links.take(1.0)
    reads = [freshness.begin(1.0 + number / 1000) for number in range(1, 500)]
    talk(node, peer, link, 1.6)
    assert first.fresh
    assert not any(read.over.is_set() for read in reads)
    compare(node, peer, 1.6)
    assert all(read.fresh for read in reads)
    assert node.links.take(2.0) is None


def test_a_comparison_that_left_something_out_does_not_count():
    """A message has a bounded size, so an answer may bring only a part of what the peer showed."""
    node, _ = met(A)
    peer = Half(A, AT_A)
    for number in range(40):
        totals = {f"{'x' * 100}-{n}": (n, 1) for n in range(1, 501)}
        peer.counter.merge(Delta(f"{number:08x}-1111-8111", 0, 500, totals), 0)
    read, rounds = node.gossip.freshness.begin(1.0), 0
    while not read.fresh:
        rounds += 1
        assert node.counter.vector() != peer.counter.vector()
        compare(node, peer, 1.0 + rounds)
    assert rounds > 1
    assert node.counter.vector() == peer.counter.vector()


def test_a_peer_that_an_answer_shows_is_asked_as_well():
    """It may have counted something before the read began."""
    node, (link,) = met(A)
    read = node.gossip.freshness.begin(1.0)
    assert node.links.take(1.0) is link
    shown = answer({})._replace(view=View([(C, AT_C, 1)], []))
    node.gossip.answered(link, node.gossip.request(link, 1.0), shown, 1.0)
    assert not read.over.is_set()
    peer = Half(C, AT_C)
    peer.counter.increment("x")
    compare(node, peer, 1.1)
    assert (read.fresh, node.counter.value("x")) == (True, 1)


def test_in_a_large_cluster_as_well_a_peer_that_an_answer_shows_is_asked():
    """There a node does not contact each that it hears of."""
    node = Half()
    peers = {f"10.0.1.{number}:80": Half(f"{number:08x}-0000-8000", f"10.0.1.{number}:80") for number in range(9)}
    for address, peer in peers.items():
        node.meet(address, peer.counter.replica)
    read = node.gossip.freshness.begin(1.0)
    link = node.links.take(1.0)
    shown = answer({}, link.peer, link.address)._replace(view=View([(C, AT_C, 1)], []))
    node.gossip.answered(link, node.gossip.request(link, 1.0), shown, 1.0)
    peers[AT_C] = Half(C, AT_C)
    peers[AT_C].counter.increment("x")
    for _ in range(9):
        assert not read.fresh
        link = node.links.take(1.1)
        talk(node, peers[link.address], link, 1.1)
    assert (read.fresh, read.nodes, node.counter.value("x")) == (True, 11, 1)


def test_a_peer_that_is_lost_ends_a_read_unless_that_does_without():
    node, (link, _) = met(A, B)
    node.table.progress(B, 10.0)
    strict, lenient = (node.gossip.freshness.begin(4.0, without_lost) for without_lost in (False, True))
    sweep = node.table.sweep(5.5)
    assert [change.id for change in sweep.changes] == [A]
    node.gossip.swept([], [], 5.5)
    assert (strict.over.is_set(), strict.fresh, strict.lost) == (True, False, [AT_A])
    assert not lenient.over.is_set()
    node.links.failed(link, OSError(), 5.5)
    assert node.gossip.freshness.begin(5.5).lost == [AT_A]
    while not lenient.over.is_set():
        compare(node, Half(B, AT_B), 5.5)
    assert (lenient.fresh, lenient.nodes) == (True, 2)


def test_a_peer_that_is_known_from_gossip_alone_is_lost_as_well():
    """It was heard of just before it was beyond a partition, where it may be counting."""
    node, (link,) = met(A)
    shown = answer({})._replace(view=View([(C, AT_C, 1)], []))
    node.gossip.swept([AT_A], [], 1.0)
    assert node.links.take(1.0) is link
    node.gossip.answered(link, node.gossip.request(link, 1.0), shown, 1.0)
    node.table.progress(A, 20.0)
    node.gossip.swept(*node.table.sweep(20.0)[:2], 20.0)
    read = node.gossip.freshness.begin(20.0)
    assert (read.over.is_set(), read.fresh, read.lost) == (True, False, [AT_C])


def test_a_read_whose_time_is_up_says_who_did_not_answer():
    node, (link, _) = met(A, B)
    read = node.gossip.freshness.begin(1.0)
    taken = node.links.take(1.0), node.links.take(1.0)
    assert link in taken
    talk(node, Half(A, AT_A), link, 1.0)
    node.gossip.freshness.finish(read)
    assert (read.fresh, read.missing) == (False, [AT_B])
    assert not node.gossip.freshness._reads


def test_waiting_ends_when_the_node_stops():
    node, _ = met(A)
    reads = []
    threads = [
        threading.Thread(target=lambda: reads.append(node.gossip.freshness.wait(30, lambda: 1.0))) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(node.gossip.freshness._reads) == 20)
    node.gossip.stop_waiting()
    for thread in threads:
        thread.join(10)
    assert [read.fresh for read in reads] == [False] * 20
    assert node.gossip.freshness.begin(2.0).over.is_set()


@pytest.mark.parametrize("block", range(4))
def test_no_fresh_read_is_stale_whatever_the_network_does(block):
    """Messages lost, late and repeated, partitions, a node that joins: what any node counted is in it, once it has
    met another one."""
    over = fresh = 0
    # In schedule 44 the one that joins is cut off just after another has heard of it.
    for seed in [*range(block * 5, block * 5 + 5), *([44] if block == 3 else [])]:
        rng, network = random.Random(seed), Network(seed)
        addresses = [f"10.0.0.{number}:8080" for number in range(1, 6)]
        nodes = [network.start(address, addresses[:1]) for address in addresses[:4]]
        assert network.run_until(network.converged, 60), seed
        reads = []
        for step in range(120):
            dice, node = rng.random(), rng.choice([node for node in nodes if node.table.active()])
            if dice < 0.5:
                node.increment(rng.choice("abcdef"), 1)
            elif dice < 0.8:
                node = rng.choice(nodes[:4])  # the other may have met only those of its side of a partition
                acknowledged = {other.counter.replica: other.counter.sequence for other in nodes}
                reads.append((node, node.gossip.freshness.begin(network.now), acknowledged))
                network.at(network.now, node, lambda: None)
            elif dice < 0.82:
                cut_off = rng.sample(addresses, rng.randint(1, 2))
                network.split(cut_off, [address for address in addresses if address not in cut_off])
            elif dice < 0.83:
                network.split()
            elif step > 60 and len(nodes) < 5:
                nodes.append(network.start(addresses[4], addresses[:1]))
            network.run(rng.uniform(0, 0.5))
            for reader, read, acknowledged in [entry for entry in reads if entry[1].over.is_set()]:
                over, fresh = over + 1, fresh + read.fresh
                held = reader.counter.vector()
                lacks = [id for id, sequence in acknowledged.items() if held.get(id, 0) < sequence]
                assert not read.fresh or not lacks, (seed, step)
            reads = [entry for entry in reads if not entry[1].over.is_set()]
    assert fresh > 30
    assert over > fresh  # of some it was known that they cannot be


# Over HTTP, at real nodes.


@pytest.mark.parametrize(
    "query", ["fresh=yes", "fresh=", "fresh=true&timeout=61", "fresh=true&fresh=true", "timeout=1"]
)
def test_a_bad_query_is_refused(start_local, connect, query):
    problem(connect(start_local()).ask("GET", f"/count?{query}"), 400)


def test_fresh_does_not_go_with_after(start_local, connect):
    client = connect(start_local())
    id = client.ask("POST", "/increment").json()["id"]
    assert "not both" in problem(client.ask("GET", f"/count?fresh=true&after={id}"), 400)
    assert client.ask("GET", f"/count?fresh=false&after={id}&timeout=1").json() == {"name": "default", "count": 1}


def test_a_node_that_does_not_know_its_peers_yet_reads_nothing_fresh(start_local, connect):
    node = start_local("--peers", "127.0.0.1:1", "--join-timeout", "30")
    assert "not ready" in problem(connect(node).ask("GET", "/count?fresh=true"), 503)


def test_a_fresh_read_at_any_node_has_what_was_just_counted_at_any(start_cluster):
    """Under load at all of them."""
    nodes, rng, stop = start_cluster(5, *PATIENT), random.Random(7), threading.Event()

    def load():
        while not stop.is_set():
            rng.choice(nodes).increment("/increment/load")

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 101):
            rng.choice(nodes).increment("/increment/x")
            answer = rng.choice(nodes).get("/count/x?fresh=true&timeout=30")
            assert answer == {"name": "x", "count": number, "nodes": 5}
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_many_clients_read_fresh_together(start_cluster):
    """Each sees its own increment at another node, and the nodes need far fewer messages than a round per read."""
    first, second = start_cluster(2, *PATIENT)
    wrong, reads, clients = [], 20, 40

    def messages():
        lines = second.ask("GET", "/metrics").body.decode().splitlines()
        return float(next(line for line in lines if line.startswith("counter_gossip_messages_sent_total ")).split()[1])

    def use(name):
        for number in range(1, reads + 1):
            first.increment(f"/increment/{name}")
            count = second.get(f"/count/{name}?fresh=true&timeout=30")["count"]
            if count != number:
                wrong.append((name, number, count))

    before = messages()
    threads = [threading.Thread(target=use, args=(f"c{number}",)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert messages() - before < reads * clients / 2


def test_in_a_partition_a_fresh_read_is_refused_and_one_of_the_active_nodes_is_not():
    """With 504: first as the peer does not answer in time, then at once as it is lost.  Healed, it works again."""
    network = BadNetwork(3)
    try:
        for position in range(3):
            network.start(position)
        nodes = network.nodes
        wait_until(lambda: all(len(node.peers()) == 2 for node in nodes))
        wait_until(lambda: nodes[0].ask("GET", "/readyz").status == 200)
        assert nodes[0].get("/count?fresh=true") == {"name": "default", "count": 0, "nodes": 3}
        network.split([0, 1], [2])
        nodes[2].increment()
        cut_off = network.proxies[2].address
        answer = nodes[0].ask("GET", "/count?fresh=true&timeout=0.3")
        assert (answer.status, cut_off in answer.json()["detail"]) == (504, True)
        wait_until(lambda: nodes[0].peers("lost") == {cut_off})
        began = time.monotonic()
        answer = nodes[0].ask("GET", "/count?fresh=true&timeout=60")
        assert time.monotonic() - began < 30  # it does not wait for what cannot come
        assert (answer.status, "fresh=active" in answer.json()["detail"]) == (504, True)
        assert cut_off in answer.json()["detail"]
        assert nodes[0].get("/count?fresh=active") == {"name": "default", "count": 0, "nodes": 2}
        network.heal()
        wait_until(lambda: nodes[0].ask("GET", "/count?fresh=true").status == 200)
        assert nodes[0].get("/count?fresh=true") == {"name": "default", "count": 1, "nodes": 3}
    finally:
        network.close()

"""Nodes as real processes on loopback: joining, dying, stopping, and finding each other again."""

import contextlib
import http.client
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PROJECT, Answer, free_port, wait_until

from counter.serving import clients_within

NO_LATE_RETRY = ("--retry-backoff-max", "0.1")  # seconds; a lost peer is found by probing it, or not at all


def own_id(node):
    return node.get("/peers")["self"]["id"]


def listed(node):
    """Return {id: address} of all peers a node lists, active or lost."""
    return {peer["id"]: peer["address"] for peer in node.get("/peers")["peers"]}


def increment_times(node, times):
    for _ in range(times):
        node.increment()


def all_count(total, *nodes):
    """Wait until those nodes hold that count, and none has anything left to tell an active peer."""

    def settled():
        peers = [peer for node in nodes for peer in node.get("/peers")["peers"] if peer["state"] == "active"]
        return not any(peer["unconfirmed"] for peer in peers) and {node.count() for node in nodes} == {total}

    wait_until(settled)
    return True


def all_know_each_other(*nodes):
    """Wait until each of those nodes lists exactly the others, as active."""
    ids = {own_id(node): node.address for node in nodes}

    def complete():
        return all(
            listed(node).items() == ids.items() - {(own_id(node), node.address)} and not node.peers("lost")
            for node in nodes
        )

    wait_until(complete)
    return True


def wait_until_lost(lost, *nodes):
    wait_until(lambda: all(lost.address in node.peers("lost") - node.peers() for node in nodes))


def readiness(node):
    answer = node.ask("GET", "/readyz")
    return answer.status, answer.json().get("alone")


class Wire(socketserver.ThreadingTCPServer):
    """A way over TCP to the port `target`, which can be cut; cut, it breaks every connection."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), None)
        self.address, self.target, self.whole, self.open = f"127.0.0.1:{self.server_address[1]}", None, True, set()

    def finish_request(self, near, _address):
        if self.whole and self.target:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as far:
                back = threading.Thread(target=self._carry, args=(far, near))
                back.start()
                self._carry(near, far)
                back.join()

    def _carry(self, source, sink):
        self.open.add(source)
        with contextlib.suppress(OSError):  # cut, or one side hung up
            while self.whole and (received := source.recv(65536)):
                sink.sendall(received)
        self.open.discard(source)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.whole = False
        for sock in list(self.open):
            with contextlib.suppress(OSError):  # it has just been closed
                sock.shutdown(socket.SHUT_RDWR)

    def mend(self):
        self.whole = True


@pytest.fixture
def wire():
    """Make a Wire with each call."""
    with contextlib.ExitStack() as stack:

        def new_wire():
            wire = stack.enter_context(Wire())  # whose exit waits for its threads
            thread = threading.Thread(target=wire.serve_forever, args=(0.01,))
            thread.start()
            for undo in (thread.join, wire.shutdown, wire.cut):
                stack.callback(undo)
            return wire

        yield new_wire


# Joining.


def test_nodes_joined_in_a_chain_all_count_concurrent_increments_exactly(start_cluster):
    """What 12 threads count at three nodes, each of which joined through the one before, is exact at all three."""
    nodes = start_cluster(3)
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda number: nodes[number % 3].increment(), range(360)))
    assert len({answer["id"] for answer in answers}) == 360
    assert all_count(360, *nodes)


def test_a_seed_may_start_after_the_node_that_names_it(start_node):
    """A node whose seed is down counts meanwhile, and joins once the seed is up."""
    port = free_port()
    early = start_node("--peers", f"127.0.0.1:{port}")
    early.increment()
    wait_until(lambda: "no answer yet" in early.stderr())
    seed = start_node(port=port)
    seed.increment()
    assert all_count(2, early, seed)
    assert all_know_each_other(early, seed)


def test_a_late_joiner_holds_everything_once_it_is_ready(start_cluster, start_node):
    """A node is not ready before it holds what was counted before it came, whichever node counted it."""
    nodes = start_cluster(2)
    for node in nodes:
        increment_times(node, 10)
        node.increment("/increment/other?amount=-7")
    all_count(20, *nodes)
    late = start_node(peers=nodes[:1])
    wait_until(lambda: late.ask("GET", "/readyz").status == 200)
    assert (late.count(), late.count("other")) == (20, -14)
    assert all_know_each_other(*nodes, late)


def test_several_spellings_of_a_seed_are_one_peer(start_node):
    """Seeds that turn out to be the same node count as one peer, and a node's own address as none."""
    seed, port = start_node(), free_port()
    spellings = [f"{host}:{port}" for port in (seed.port, port) for host in ("localhost", "127.0.0.1")]
    node = start_node("--peers", ",".join(spellings), port=port)
    all_know_each_other(seed, node)
    third = start_node(peers=[node])
    assert all_know_each_other(seed, node, third)


def test_a_seed_may_be_a_load_balancer(wire, start_node):
    """That led a node to itself first, and leads to another later."""
    balancer = wire()
    node = start_node(peers=[balancer])
    balancer.target = node.port
    wait_until(lambda: "counter_gossip_received_bytes_total 0\n" not in node.ask("GET", "/metrics").body.decode())
    other = start_node()
    balancer.target = other.port
    all_know_each_other(node, other)


def test_a_seed_may_be_a_name(start_node):
    """A seed given by name is looked up, and listed under the address it advertises."""
    seed = start_node()
    node = start_node("--peers", f"LocalHost:{seed.port}")
    assert all_know_each_other(seed, node)


def test_a_cluster_over_ipv6(start_node):
    """Nodes that listen on ::1 join and count like any others."""

    def start(*arguments):
        node = start_node("--host", "::1", *arguments)
        node.address = f"[::1]:{node.port}"

        def ask(method, path):
            with contextlib.closing(http.client.HTTPConnection("::1", node.port, timeout=10)) as connection:
                connection.request(method, path)
                return Answer(connection.getresponse())

        node.ask = ask
        return node

    seed = start()
    node = start("--peers", f"[0::1]:{seed.port}")
    assert all_know_each_other(seed, node)
    seed.increment()
    node.increment()
    assert all_count(2, seed, node)


def test_a_wildcard_listener_finds_out_its_address(start_node):
    """Nodes that listen on 0.0.0.0 tell the address they have towards their first peer, whoever dials first."""
    dialled = start_node("--host", "0.0.0.0", "--insecure")
    assert dialled.get("/peers")["self"]["address"] is None
    dialling = start_node("--host", "0.0.0.0", "--insecure", peers=[dialled])
    assert all_know_each_other(dialled, dialling)
    for node in (dialled, dialling):
        assert node.get("/peers")["self"]["address"] == node.address


def test_a_node_that_nobody_can_dial_takes_part(start_node):
    """A node whose advertised address nobody answers at sends and gets everything through its own requests."""
    seed = start_node()
    node = start_node("--advertise", f"127.0.0.1:{free_port()}", peers=[seed])
    seed.increment()
    node.increment()
    wait_until(lambda: seed.count() == node.count() == 2)
    assert list(listed(seed)) == [own_id(node)]
    seed.increment()
    wait_until(lambda: node.count() == 3)


def test_a_node_that_advertises_the_address_of_another_says_so(start_cluster, start_node):
    """Neither would dial the other, so an operator has to know."""
    first, second = start_cluster(2)
    third = start_node("--advertise", first.address, peers=[second])
    wait_until(
        lambda: f"peer advertises this node's address: addr={first.address} id={own_id(first)}" in third.stderr()
    )


def test_a_proxy_in_the_environment_is_not_used_between_nodes(start_cluster, monkeypatch):
    """Nodes reach each other directly, whatever proxy the environment names."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    nodes = start_cluster(2)
    nodes[0].increment()
    assert all_count(1, *nodes)


# Readiness.


def test_a_node_without_seeds_is_ready_alone(start_node):
    """A node that names no seeds is ready at once, one that names only itself in the end; both are alone."""
    port = free_port()
    assert readiness(start_node()) == (200, True)
    itself = start_node("--peers", f"localhost:{port}", "--join-timeout", "0.1", port=port)
    wait_until(lambda: readiness(itself) == (200, True))


def test_a_joining_node_is_ready_once_a_seed_has_answered(start_node):
    """A node with seeds is unready until one has answered, and then ready and not alone."""
    port = free_port()
    node = start_node("--peers", f"127.0.0.1:{port}", "--join-timeout", "600")
    answer = node.ask("GET", "/readyz")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    start_node(port=port)
    wait_until(lambda: readiness(node) == (200, False))


def test_a_node_whose_seeds_stay_silent_is_ready_alone_in_the_end(start_node):
    """After --join-timeout without an answer from any seed a node is ready, alone."""
    node = start_node("--peers", f"127.0.0.1:{free_port()}", "--join-timeout", "0.1")
    wait_until(lambda: readiness(node) == (200, True))


def test_a_node_that_its_seed_refuses_is_not_ready_and_says_why(start_node, tmp_path):
    """It has another secret, and would else count from 0 beside a cluster that is there."""
    secrets = []
    for name in ("old", "new"):
        secrets.append(tmp_path / name)
        secrets[-1].write_text(name * 20)
        secrets[-1].chmod(0o600)
    seed = start_node("--secret-file", secrets[0])
    seed.increment()
    node = start_node("--secret-file", secrets[1], "--join-timeout", "0.2", peers=[seed])
    wait_until(lambda: f"not ready: this node waits for a seed that refuses it: {seed.address}" in node.stderr())
    answer = node.ask("GET", "/readyz")
    assert (answer.status, seed.address in answer.json()["detail"]) == (503, True)


def test_empty_nodes_do_not_make_each_other_ready(start_node, tmp_path):
    """A third that is yet to be found may hold the counts; once it has given them those, they are."""
    holds_one = ("--data", tmp_path / "counter.db")
    before = start_node(*holds_one)
    before.increment("/increment?durable=true")
    before.stop()
    ports = [free_port() for _ in range(3)]
    seeds = ",".join(f"127.0.0.1:{port}" for port in ports)
    nodes = [start_node("--join-timeout", "600", "--peers", seeds, port=port) for port in ports[:2]]
    all_know_each_other(*nodes)
    assert [readiness(node) for node in nodes] == [(503, None)] * 2
    start_node(*holds_one, port=ports[2])
    wait_until(lambda: [readiness(node) for node in nodes] == [(200, False)] * 2)
    assert [node.count() for node in nodes] == [1, 1]


# Dying.


def test_a_killed_node_is_lost_and_its_increments_are_not(start_cluster):
    """A killed node becomes a lost peer; what it had passed on stays counted, and counting goes on."""
    killed, *others = start_cluster(3)
    increment_times(killed, 10)
    all_count(10, killed, *others)
    killed.kill()
    wait_until_lost(killed, *others)
    increment_times(others[0], 5)
    assert all_count(15, *others)


@pytest.mark.parametrize("when", ["at once", "once it is lost"])
def test_a_killed_node_that_starts_again_is_a_new_peer_at_the_old_address(start_node, when):
    """Found by the others without seeds of its own, it replaces its old id and gets back the full count."""
    killed = start_node(*NO_LATE_RETRY, port=free_port())
    others = [start_node(*NO_LATE_RETRY, peers=[killed]) for _ in range(2)]
    all_know_each_other(killed, *others)
    old_id = own_id(killed)
    increment_times(killed, 10)
    all_count(10, killed, *others)
    killed.kill()
    if when == "once it is lost":
        wait_until_lost(killed, *others)
    again = start_node(port=killed.port)
    again.increment()
    assert all_know_each_other(again, *others)
    assert old_id not in listed(again).keys() | listed(others[0]).keys() | {own_id(again)}
    assert all_count(11, again, *others)


def test_what_a_dead_node_told_one_peer_reaches_all(start_cluster, start_node):
    """Increments whose node told only one peer before it was killed come to others through that peer."""
    killed, heir = start_cluster(2)
    increment_times(killed, 10)
    wait_until(lambda: heir.count() == 10)
    killed.kill()
    late = start_node(peers=[heir])
    assert all_count(10, late)
    wait_until_lost(killed, heir)
    assert all_count(10, heir, late)


# Silence and partitions.


def test_a_stopped_node_is_lost_and_comes_back_by_itself(start_cluster):
    """A node stopped for longer than the peer timeout is lost, and active again once it goes on, accusing nobody."""
    stopped, *others = nodes = start_cluster(3)
    stopped.increment()
    all_count(1, *nodes)
    ids = set(map(own_id, nodes))
    stopped.send_signal(signal.SIGSTOP)
    wait_until_lost(stopped, *others)
    for node in others:
        node.increment()
    stopped.send_signal(signal.SIGCONT)
    assert all_know_each_other(*nodes)
    assert all_count(3, *nodes)
    assert set(map(own_id, nodes)) == ids
    assert "peer lost" in others[0].stderr()
    assert "peer lost" not in stopped.stderr()


def test_a_partition_heals_by_itself(wire, start_node):
    """Two nodes cut off from each other, neither the other's seed, go on counting, and agree once the way is mended."""
    seed, wires, nodes = start_node(), [wire(), wire()], []
    for way in wires:
        nodes.append(start_node("--advertise", way.address, *NO_LATE_RETRY, peers=[seed]))
        nodes[-1].address, way.target = way.address, nodes[-1].port
    all_know_each_other(seed, *nodes)
    seed.stop()
    all_know_each_other(*nodes)
    for way in wires:
        way.cut()
    wait_until_lost(nodes[0], nodes[1])
    wait_until_lost(nodes[1], nodes[0])
    increment_times(nodes[0], 3)
    increment_times(nodes[1], 4)
    assert [node.count() for node in nodes] == [3, 4]
    for way in wires:
        way.mend()
    assert all_know_each_other(*nodes)
    assert all_count(7, *nodes)


# Starting and stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_asked_to_stop_hands_over_and_leaves(start_cluster, number):
    """When a node has exited, the others hold all it counted, and list it no more, not even as lost."""
    leaver, *others = start_cluster(3)
    increment_times(leaver, 50)
    leaver.send_signal(number)
    assert leaver.process.wait(15) == 0
    assert [node.count() for node in others] == [50, 50]
    assert [leaver.address in listed(node).values() for node in others] == [False, False]
    assert all_know_each_other(*others)


def test_nodes_asked_to_stop_together_do_not_wait_for_each_other(start_cluster):
    """Where nothing is left to hand over, a node does not wait for the goodbye of one that has ended itself."""
    nodes = start_cluster(3, "--drain-timeout", "600")
    nodes[0].increment()
    all_count(1, *nodes)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    assert [node.process.wait(15) for node in nodes] == [0, 0, 0]


def test_a_node_asked_to_stop_waits_for_a_lost_peer_that_lacks_something(wire, start_node):
    """Until --drain-timeout a node that stops goes on trying to hand over, also to a peer it has lost meanwhile."""
    wires, nodes = [wire(), wire()], []
    for way in wires:
        nodes.append(start_node("--advertise", way.address, "--drain-timeout", "600", *NO_LATE_RETRY, peers=nodes))
        nodes[-1].address, way.target = way.address, nodes[-1].port
    all_know_each_other(*nodes)
    for way in wires:
        way.cut()
    node, peer = nodes
    node.increment()
    node.send_signal(signal.SIGTERM)
    wait_until_lost(node, peer)
    wait_until(lambda: "peer lost" in node.stderr())
    for way in wires:
        way.mend()
    assert node.process.wait(15) == 0
    assert peer.count() == 1


def test_a_node_that_stops_says_what_goes_with_it(start_cluster):
    """How many increments none of its peers is known to hold, all of which are lost; and as the last one, all."""
    node, killed = start_cluster(2, "--drain-timeout", "0.5")
    increment_times(node, 2)
    all_count(2, node, killed)
    killed.kill()
    wait_until_lost(killed, node)
    increment_times(node, 3)
    assert node.stop() == 0
    assert (
        "WARNING counter.server: stopping: increments go that no peer is known to hold: increments=3" in node.stderr()
    )
    (last,) = start_cluster(1)
    last.increment("/increment/other")
    last.increment()
    assert last.stop() == 0
    assert "WARNING counter.server: stopping: the last node, its counts go: counters=2 increments=2\n" in last.stderr()


def test_a_second_signal_ends_a_node_that_still_hands_over(start_cluster):
    """One that waits for a hanging peer while stopping is alive, not ready, and ends at once when told again."""
    node, hanging = start_cluster(2, "--drain-timeout", "600", "--peer-timeout", "600")
    hanging.send_signal(signal.SIGSTOP)
    node.increment()
    node.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping: signal=SIGTERM" in node.stderr())
    wait_until(lambda: node.ask("GET", "/readyz").status == 503)
    assert node.ask("GET", "/healthz").status == 200
    assert node.process.poll() is None
    node.send_signal(signal.SIGINT)
    assert node.process.wait(15) == -signal.SIGINT
    hanging.kill()


def test_a_port_in_use_is_one_line_and_status_1(start_node):
    """A node that cannot listen says so in one line that names the port, and exits with status 1."""
    port = str(start_node().port)
    command = [sys.executable, "counter_server.py", "--port", port]
    ended = subprocess.run(command, check=False, cwd=PROJECT, capture_output=True, text=True, timeout=15)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert port in ended.stderr


@pytest.mark.parametrize("limit", ["-S -n 100", "-n 400", "-n 96"])
def test_as_many_clients_are_served_as_there_may_be_open_files(start_node, limit):
    """The soft limit is raised; where the hard one is too low the node says so, and can still be watched."""
    node = start_node("--max-connections", 300, limit=limit)
    served = 300 if limit.startswith("-S") else clients_within(int(limit.split()[-1]))
    assert ("fewer clients are served" in node.stderr()) == (served < 300)
    assert served >= 50
    with contextlib.ExitStack() as stack:
        for _ in range(served):
            client = http.client.HTTPConnection("127.0.0.1", node.port, timeout=10)
            stack.enter_context(contextlib.closing(client)).request("GET", "/count")
            assert Answer(client.getresponse()).status == 200
        silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(100)]
        for connection in silent:
            stack.enter_context(connection)
        assert node.ask("GET", "/healthz").status == 200
        assert f'counter_connections{{kind="client"}} {served}' in node.ask("GET", "/metrics").body.decode()
        assert "no connection can be accepted" not in node.stderr()


def test_keys_that_expired_while_a_node_was_stopped_count_again(start_cluster):
    """The node hears late of their first uses, and must not take them and the second ones for the same requests."""
    a, b, stopped = start_cluster(3, "--idempotency-window", "1")
    stopped.send_signal(signal.SIGSTOP)
    keys = [{"Idempotency-Key": f"key-{number}"} for number in range(5)]
    for key in keys:
        a.increment(headers=key)
    for key in keys:
        wait_until(lambda key=key: "Idempotent-Replayed" not in a.ask("POST", "/increment", headers=key).headers)
    stopped.send_signal(signal.SIGCONT)
    all_count(10, a, b, stopped)


def test_no_warning_from_start_to_stop(start_cluster, monkeypatch):
    """In Python's development mode, with warnings as errors, nodes start, count and stop without any."""
    monkeypatch.setenv("PYTHONDEVMODE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    nodes = start_cluster(2)
    increment_times(nodes[0], 10)
    all_count(10, *nodes)
    for node in nodes:
        assert node.ask("GET", "/nowhere").status == 404
        assert node.stop() == 0
        assert "Warning" not in node.stderr()

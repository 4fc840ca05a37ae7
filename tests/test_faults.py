"""Real nodes over a bad network: keys, replays, corruption, floods, restarts under load."""

import contextlib
import http.client
import os
import random
import re
import socket
import threading

import chaos
import pytest
import rotations
from conftest import require_tools, wait_until
from faults import BadNetwork


@pytest.fixture
def bad_network():
    """Make BadNetworks by calling it as such; afterwards they and their nodes end."""
    networks = []

    def make(size, seed=0):
        networks.append(BadNetwork(size, seed))
        return networks[-1]

    yield make
    for network in networks:
        network.close()


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("open sesame, thirty-two bytes of it\n")
    path.chmod(0o600)
    return path


def start_all(network, *arguments):
    for position in range(len(network.nodes)):
        network.start(position, *arguments)
    wait_until(lambda: all(len(node.peers()) == len(network.nodes) - 1 for node in network.nodes))
    return network.nodes


def in_threads(number, work):
    """Call work(0), work(1), … at once in as many threads; raise what one of them raised."""
    errors = []

    def call(argument):
        try:
            work(argument)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(argument,)) for argument in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_all_nodes_agree_on_an_acceptable_value_after_any_fault():
    """Nodes paused, killed and restarted, links cut, slow, repeating and corrupting: the count is right."""
    assert chaos.run(seed=int.from_bytes(os.urandom(4), "big"), seconds=6)


def test_a_key_counts_once_though_clients_retry_at_nodes_that_cannot_talk(bad_network):
    """Clients that hear nothing retry at other nodes, across changing cuts; each key counts once."""
    network = bad_network(3)
    nodes = start_all(network)
    keys = [f"key-{number}" for number in range(240)]

    def work(client):
        rng = random.Random(client)
        for number, key in enumerate(keys[client::4]):
            if client == 0 and number % 15 == 0:
                alone = rng.randrange(3)
                network.split([alone], [position for position in range(3) if position != alone])
            for node in rng.sample(nodes, rng.randint(1, 3)):
                answer = node.ask("POST", "/increment", headers={"Idempotency-Key": key})
                assert answer.status == 200

    in_threads(4, work)
    network.heal()
    wait_until(lambda: {node.count() for node in nodes} == {len(keys)}, 30)
    for key in keys[::20]:
        answers = [node.ask("POST", "/increment", headers={"Idempotency-Key": key}) for node in nodes]
        assert {answer.headers["Idempotent-Replayed"] for answer in answers} == {"true"}
        assert len({answer.json()["id"] for answer in answers}) == 1
    assert {node.count() for node in nodes} == {len(keys)}


def test_what_a_killed_node_told_a_single_other_reaches_the_rest(bad_network):
    """The last increments of a node that was killed spread from the only peer it had reached."""
    network = bad_network(3)
    first, second, third = start_all(network)
    network.split([0, 1], [2])
    for _ in range(20):
        first.increment()
    wait_until(lambda: second.count() == 20)
    assert third.count() == 0
    first.kill()
    network.heal()
    wait_until(lambda: third.count() == 20)


def replay(node, recorded):
    """Send messages again that were recorded on their way; return the statuses of the answers."""
    statuses = set()
    with contextlib.closing(node.connection(timeout_s=10)) as connection:
        for signature, body in recorded:
            connection.request("POST", "/internal/gossip", body, {"Counter-Signature": signature})
            response = connection.getresponse()
            response.read()
            statuses.add(response.status)
    return statuses


def test_recorded_messages_count_nothing_and_damaged_ones_are_refused(bad_network):
    """Whoever records messages can neither count again with them, nor alter one."""
    network = bad_network(2)
    first, second = start_all(network)
    network.recording = True
    for _ in range(29):
        first.increment("/increment/x?amount=7")
    counted = 29 * 7

    def is_pushed():
        """Count; return whether something was pushed: to a node that has just joined it may go in answers at first."""
        nonlocal counted
        counted = first.increment("/increment/x?amount=7")["count"]
        return any(b'"deltas"' in body for _, body in network.recorded)

    wait_until(is_pushed)
    wait_until(lambda: second.count("x") == counted)
    network.recording = False
    signature, body = max(network.recorded, key=lambda message: b'"deltas"' in message[1])
    recorded = list(network.recorded)
    assert replay(second, recorded * (200 // len(recorded) + 1)) == {200}
    for position in range(0, len(body), 3):
        damaged = bytearray(body)
        damaged[position] ^= 1
        assert replay(second, [(signature, bytes(damaged))]) == {401}
    assert replay(second, [("", body), ("ä", body), (signature, body[:-1])]) == {401}
    assert (first.count("x"), second.count("x")) == (counted, counted)


def test_recorded_messages_are_worth_nothing_anywhere(bad_network, start_node, secret_file):
    """Neither after all nodes were restarted, nor in another cluster of that name and secret; nor are
    those who send them served as peers."""
    network = bad_network(3)
    nodes = start_all(network, "--secret-file", secret_file)
    network.recording = True
    for number in range(30):
        nodes[number % 3].increment("/increment/x?amount=57")
        wait_until(lambda number=number: nodes[(number + 1) % 3].count("x") == 57 * (number + 1))
    wait_until(lambda: {node.count("x") for node in nodes} == {1710})
    network.recording = False
    for node in nodes:
        node.kill()
    nodes = start_all(network, "--secret-file", secret_file)
    other = start_node("--secret-file", secret_file)
    nodes[0].increment("/increment/x?amount=5")
    wait_until(lambda: {node.count("x") for node in nodes} == {5})
    known = [node.peers() | node.peers("lost") for node in [*nodes, other]]
    for node in [*nodes, other]:
        assert replay(node, network.recorded) == {200}
    assert [node.count("x") for node in [*nodes, other]] == [5, 5, 5, 0]
    assert [node.peers() | node.peers("lost") for node in [*nodes, other]] == known
    assert 'counter_connections{kind="peer"} 0' in other.ask("GET", "/metrics").body.decode()


def test_clients_that_dribble_or_send_nonsense_disturb_nobody(start_node):
    """While hundreds of bad connections come and go, each good request is answered, and no thread is left."""
    node = start_node()
    threads = number_of_threads(node)
    dribbling = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(200)]
    over = threading.Event()

    def dribble():
        while not over.wait(0.2):
            for connection in dribbling:
                with contextlib.suppress(OSError):  # a node that speaks TLS has hung up
                    connection.send(b"x")

    def work(client):
        rng = random.Random(client)
        for _ in range(100):
            if client % 2:
                node.increment()
                continue
            with socket.create_connection(("127.0.0.1", node.port)) as connection:
                nonsense = rng.randbytes(rng.randrange(200)) + rng.choice((b"", b"\r\n\r\n"))
                connection.sendall(rng.choice((b"POST /increment HTTP/1.1\r\n", b"")) + nonsense)
                if rng.random() < 0.5:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # resets

    dribbler = threading.Thread(target=dribble)
    dribbler.start()
    in_threads(6, work)
    over.set()
    dribbler.join()
    for connection in dribbling:
        connection.close()
    assert node.count() == 300
    wait_until(lambda: number_of_threads(node) <= threads)


def number_of_threads(node):
    return len(os.listdir(f"/proc/{node.process.pid}/task"))


def test_peers_are_served_while_clients_take_every_connection(start_node):
    """A node whose connections are all taken still hears of every increment."""
    first = start_node("--max-connections", 5)
    taken = [first.connection(timeout_s=10) for _ in range(5)]
    for client in taken:
        client.request("GET", "/count")
        assert client.getresponse().read()
    second = start_node(peers=[first])
    second.increment()
    wait_until(lambda: second.peers() == {first.address})
    third = start_node(peers=[second])
    wait_until(lambda: third.peers() == {first.address, second.address})
    first.kill()
    for connection in taken:
        connection.close()
    assert third.count() == 1


class Load:
    """Clients that increment at all nodes of a list, whatever is in it at that moment, and note the answers."""

    def __init__(self, nodes):
        self.nodes, self.over = nodes, threading.Event()
        self.acknowledged, self.uncertain = [], []
        self.clients = [threading.Thread(target=self.increment, args=(number % len(nodes),)) for number in range(6)]

    def __enter__(self):
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for client in self.clients:
            client.join()

    def increment(self, position):
        while not self.over.is_set():
            try:
                status = self.nodes[position].ask("POST", "/increment").status
            except ConnectionRefusedError:
                status = 503
            except (OSError, http.client.HTTPException):
                self.uncertain.append(1)
                continue
            if status == 200:
                self.acknowledged.append(1)
            else:
                assert status == 503
                self.over.wait(0.01)

    def check(self):
        """Check that in the end all nodes show just what was answered."""
        wait_until(lambda: len({node.count() for node in self.nodes}) == 1)
        least = len(self.acknowledged)
        assert least > 0
        assert least <= self.nodes[0].count() <= least + len(self.uncertain)


def roll(nodes, start):
    """Stop each node of a list in turn, and start its successor at its port."""
    for position, node in enumerate(nodes):
        others = [other for other in nodes if other is not node]
        assert node.stop() == 0
        nodes[position] = start(port=node.port, peers=others)
        wait_until(lambda: all(len(node.peers()) == len(nodes) - 1 for node in nodes))


def test_no_acknowledged_increment_is_lost_in_a_rolling_restart(start_cluster, start_node):
    """Each node is stopped and started in turn under load; whatever was answered is counted."""
    with Load(start_cluster(3)) as load:
        roll(load.nodes, start_node)
    load.check()


def test_all_that_is_secret_is_replaced_while_all_nodes_run(tmp_path):
    """Certificates, their CA, secrets and tokens, under load: no request fails, and no node is lost."""
    require_tools("openssl")
    assert rotations.run(tmp_path, 2)


def test_nodes_with_the_same_secret_form_a_cluster(start_cluster, secret_file):
    """The secret signs what passes between nodes, and clients need none."""
    first, second = start_cluster(2, "--secret-file", secret_file)
    first.increment()
    wait_until(lambda: second.count() == 1)


@pytest.mark.parametrize(
    ("of_the_first", "of_the_other"),
    [("", "--cluster other"), ("", "--secret-file SECRET"),
     ("--secret-file SECRET --cluster a", "--secret-file SECRET --cluster b")],
)  # fmt: skip
def test_nodes_of_another_cluster_or_secret_are_not_talked_to(start_node, secret_file, of_the_first, of_the_other):
    """Both say why in their logs, once, and neither takes over anything."""
    first, other = (given.replace("SECRET", str(secret_file)).split() for given in (of_the_first, of_the_other))
    first = start_node(*first)
    other = start_node(*other, peers=[first])
    other.increment()
    wait_until(lambda: "the signature is wrong" in other.stderr() and "messages refused" in first.stderr())
    assert (first.count(), first.peers(), other.peers()) == (0, set(), set())

    def refused():
        metrics = first.ask("GET", "/metrics").body.decode()
        return int(re.search(r"^counter_gossip_messages_refused_total (\d+)$", metrics, re.MULTILINE)[1])

    wait_until(lambda: refused() >= 3)
    line = "messages refused: host=127.0.0.1 reason=the signature is wrong: another --cluster or --secret-file?"
    assert first.stderr().count("messages refused") == first.stderr().count(line) == 1


def test_a_page_of_another_site_cannot_increment(start_node):
    """Browsers say where a request comes from; only allowed origins may post, and read the answer."""
    node = start_node("--cors-origin", "https://good.example")
    assert node.ask("POST", "/increment", headers={"Origin": "https://bad.example"}).status == 403
    assert node.ask("POST", "/increment", headers={"Origin": "null"}).status == 403
    assert node.ask("POST", "/increment", headers={"Sec-Fetch-Site": "cross-site"}).status == 403
    assert node.ask("POST", "/increment", headers={"Sec-Fetch-Site": "same-origin"}).status == 200
    assert node.ask("POST", "/increment", headers={"Origin": f"http://{node.address}"}).status == 200
    good = {"Origin": "https://good.example", "Sec-Fetch-Site": "cross-site"}
    answer = node.ask("POST", "/increment", headers=good)
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://good.example")
    answer = node.ask("POST", "/increment?amount=x", headers=good)
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (400, "https://good.example")
    answer = node.ask("OPTIONS", "/increment", headers=good | {"Access-Control-Request-Method": "POST"})
    assert answer.status == 204
    assert "Idempotency-Key" in answer.headers["Access-Control-Allow-Headers"]
    assert (
        node.ask("GET", "/count", headers={"Origin": "https://bad.example"}).headers["Access-Control-Allow-Origin"]
        is None
    )
    assert node.count() == 3

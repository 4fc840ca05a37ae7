"""Random increments at a real cluster while its nodes and links fail, and the checker of the counts.

python tests/chaos.py --runs 10 --seconds 20
"""

import argparse
import http.client
import random
import signal
import threading
import time

from conftest import wait_until
from faults import BadNetwork

SIZE, CLIENTS, ACKS = 5, 10, 3
TIMEOUT_S = 1.5  # the --peer-timeout of the nodes
ARGUMENTS = ("--retry-backoff-max", "1")


class Client(threading.Thread):
    """Increments and decrements at random nodes, and notes what it knows of the outcome."""

    def __init__(self, network, seed, over):
        super().__init__(name=f"client-{seed}")
        self.network, self.rng, self.over = network, random.Random(seed), over
        self.acknowledged = []  # (increment id, amount, number of nodes that hold it, or 1)
        self.uncertain = []  # amounts

    def run(self):
        while not self.over.wait(self.rng.uniform(0, 0.02)):
            amount = self.rng.choice((-3, -1, 1, 2, 10))
            acks = self.rng.choice((1, ACKS))
            node = self.rng.choice(self.network.nodes)
            try:
                answer = node.ask("POST", f"/increment?amount={amount}&acks={acks}&timeout=0.5", timeout_s=1.5)
            except ConnectionRefusedError:
                continue  # it cannot have been counted
            except (OSError, http.client.HTTPException):
                self.uncertain.append(amount)
                continue
            assert answer.status in (200, 202, 503), answer.body
            if answer.status != 503:
                self.acknowledged.append((answer.json()["id"], amount, answer.json()["acks"]))


def possible_sums(least, amounts):
    """Return all values of `least` plus any subset of some amounts."""
    sums = {least}
    for amount in amounts:
        sums |= {total + amount for total in sums}
    return sums


def disturb(network, rng, killed):
    """Do one bad thing to the cluster, and mend it after a while."""
    position = rng.randrange(SIZE)
    node, dice = network.nodes[position], rng.random()
    if dice < 0.25:
        node.send_signal(signal.SIGSTOP)
        network.over.wait(rng.uniform(0.2, 2 * TIMEOUT_S))
        node.send_signal(signal.SIGCONT)
    elif dice < 0.5:
        killed.add(node.get("/peers")["self"]["id"])
        node.kill()
        network.over.wait(rng.uniform(0, 2 * TIMEOUT_S))
        network.start(position, *ARGUMENTS)
    elif dice < 0.6:
        assert node.stop() == 0
        network.start(position, *ARGUMENTS)
    else:
        shuffled = rng.sample(range(SIZE), SIZE)
        network.split(shuffled[:2], shuffled[2:])
        network.over.wait(rng.uniform(0.5, 2.5 * TIMEOUT_S))
        network.heal()
    network.over.wait(rng.uniform(0, 0.5))


def run(seed, seconds):
    """Disturb a cluster under load; AssertionError if its nodes end up wrong.  Returns a summary."""
    rng, over, killed = random.Random(seed), threading.Event(), set()
    network = BadNetwork(SIZE, seed)
    network.delay_s, network.repeat, network.corrupt = 0.005, 0.05, 0.02
    clients = [Client(network, seed * 1000 + number, over) for number in range(CLIENTS)]
    try:
        for position in range(SIZE):
            network.start(position, *ARGUMENTS)
        for client in clients:
            client.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            disturb(network, rng, killed)
        over.set()
        for client in clients:
            client.join()
        network.corrupt = 0.0
        wait_until(lambda: all(len(node.peers()) == SIZE - 1 for node in network.nodes), 30)
        wait_until(lambda: len({node.count() for node in network.nodes}) == 1, 30)
        value = network.nodes[0].count()
        acknowledged = [entry for client in clients for entry in client.acknowledged]
        # What a killed node held alone died with it, unless it had reached somebody in time.
        lost = [amount for id, amount, acks in acknowledged if acks < ACKS and id[:18] in killed]
        certain = sum(amount for id, amount, acks in acknowledged if acks >= ACKS or id[:18] not in killed)
        uncertain = lost + [amount for client in clients for amount in client.uncertain]
        assert value in possible_sums(certain, uncertain), (value, certain, sorted(uncertain))
        return f"value={value} acknowledged={len(acknowledged)} uncertain={len(uncertain)} killed={len(killed)}"
    finally:
        over.set()
        network.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.runs):
        print(f"run {seed}: {run(seed, options.seconds)}", flush=True)

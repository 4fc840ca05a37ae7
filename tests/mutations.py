"""Sends a node mutated requests and messages, and looks what that leaves behind.

python tests/mutations.py --requests 200000 --messages 50000 --tls

A mutated request may count, and then is answered with the id of what it counted; so the ids in the answers say
what the counts must be.  Of the messages some are changed before they are signed, and some after.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from authority import Authority
from clients import request
from conftest import NodeProcess, wait_until

from counter import new_replica, parse_increment_id
from counter.signing import HEADER, PATH, Signer, seal

WORKERS = 2
ANSWER_S = 0.005  # until a request is taken for one that is not complete
REQUESTS = [
    request("GET", "/count/visits"),
    request("POST", "/increment/visits?amount=5", "Idempotency-Key: key-{}"),
    request("POST", "/increment/clicks", body=b'{"amount": 3}'),
    request("POST", "/increment"),
    request("POST", "/increments", "Idempotency-Key: batch-{}", body=b'{"visits": 2, "clicks": -1}'),
    request("GET", "/counts?prefix=v&limit=10"),
    request("GET", "/increments/00000000-0000-8000-8000-000000000001"),
    request("GET", "/metrics"),
    request("GET", "/peers", "Connection: keep-alive", "Origin: http://localhost", "Sec-Fetch-Site: same-origin"),
    request("OPTIONS", "/increment", "Origin: http://evil.example", "Access-Control-Request-Method: POST"),
]
VALUES = [None, True, False, -1, 0, 1, 2, 2**53, 2**62 - 1, 2**70, 1.5, 1e300, "", "x", "a" * 200, "\0", [], {}, [[]]]
PIECES = [
    b"\r\n",
    b"\0",
    b" ",
    b"%00",
    b"%",
    b"\xff",
    b":",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
]


def mutated(rng, data):
    """Return some bytes with a few of them changed, left out, repeated or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 1, 1, 3))):
        at, dice = rng.randrange(len(data) + 1), rng.randrange(5)
        if dice == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif dice == 1:
            del data[at : at + rng.choice((1, 1, 5, 50))]
        elif dice == 2:
            data[at:at] = rng.choice(PIECES)
        elif dice == 3:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.randrange(30)]
        else:
            data[at:at] = rng.choice((b"9", b"-", b"A", b"/", b"?", b"&amount=7"))
    return bytes(data)


def mutated_json(rng, value):
    """Return a copy of a JSON value with something in it replaced, left out or repeated."""
    value = copy.deepcopy(value)
    parent = value
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
            continue
        dice = rng.random()
        if dice < 0.6:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif dice < 0.8:
            del parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[rng.choice(("x", "visits ", "totals", "v"))] = parent[key]
        return value


class Caller:
    """A client of a node that survives what the node does with nonsense."""

    context = None  # with which it connects, where the node speaks TLS

    def __init__(self, port):
        self.port, self.sock, self.arrived = port, None, b""
        self.statuses, self.counted, self.cut = {}, {}, 0  # sequence -> {name: count}; connections without their end

    def connect(self):
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = self.context.wrap_socket(sock, server_hostname="127.0.0.1") if self.context else sock
        self.arrived = b""

    def send(self, data):
        """Send a request, and take in whatever answers it."""
        if self.sock is None:
            self.connect()
        try:
            self.sock.settimeout(ANSWER_S)
            self.sock.sendall(data)
            if not self.ends_with_answer():
                return
        except TimeoutError:  # it is not complete
            pass
        except OSError:
            self.cut += 1
        self.hang_up()

    def hang_up(self):
        """Say that nothing more comes, and read what is still said."""
        try:
            self.sock.settimeout(10)
            socket.socket.shutdown(self.sock, socket.SHUT_WR)  # that of an SSLSocket would end the reading as well
            while not self.ends_with_answer():
                pass
        except OSError:
            self.cut += 1
        self.sock.close()
        self.sock = None

    def ends_with_answer(self):
        """Read an answer, if there is one; return whether it was the last."""
        while True:
            head, blank, rest = self.arrived.partition(b"\r\n\r\n")
            size = size_of(head, rest)
            if blank and size is not None and len(rest) >= size:
                break
            received = self.sock.recv(2**16)
            if not received:
                return True
            self.arrived += received
        self.arrived = rest[size:]
        self.note(int(head.split()[1]), rest[:size])
        return b"\r\nConnection: close" in head

    def note(self, status, body):
        assert status != 500, body
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200 and body.startswith(b'{"id"'):
            fields = json.loads(body)
            if "applied" not in fields:
                counts = fields.get("counts") or {fields["name"]: fields["count"]}
                self.counted[parse_increment_id(fields["id"])] = counts


def size_of(head, rest):
    """Return how many bytes an answer has after its head; None if that cannot be said yet."""
    if b"\r\nTransfer-Encoding: chunked" in head:
        end = (b"\r\n" + rest).find(b"\r\n0\r\n\r\n")
        return None if end < 0 else end + 5
    length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
    return int(length[1]) if length else 0


def send_requests(port, seed, number, until):
    rng, caller = random.Random(seed), Caller(port)
    for serial in range(number):
        if time.monotonic() > until:
            break
        caller.send(mutated(rng, rng.choice(REQUESTS).replace(b"{}", f"{seed}-{serial}".replace(" ", "-").encode())))
    return serial + 1, caller.statuses, caller.counted, caller.cut


def a_message(rng, replicas, to, number):
    """Return a message of a node that nobody can dial, about what it has counted."""
    replica = rng.choice(replicas)
    totals = {f"m{rng.randrange(20)}-{index}": [index + 1, rng.randrange(1, 100)] for index in range(3)}
    key = [3, f"{rng.getrandbits(128):032x}", list(totals)[-1], 1, 0.5]
    delta = {"replica": replica, "after": 0, "through": 3, "totals": totals, "keys": [key]}
    sender = {"id": replica, "address": None, "beat": number, "leaving": False, "version": "1", "ready": True}
    view = {"peers": [], "left": [[rng.choice(replicas), 1]]}
    message = {"v": 1, "from": sender, "to": to, "n": number, "clock": 1.0, "view": view, "deltas": [delta]}
    return message | rng.choice(({}, {"hash": "0" * 32}, {"applied": {replica: 3}}, {"confirms": {replica: 3}}))


def send_messages(port, seed, number, until, to):
    rng, caller, signer = random.Random(seed), Caller(port), Signer((), "counter")
    replicas = [new_replica(rng.getrandbits) for _ in range(100)]
    for serial in range(number):
        if time.monotonic() > until:
            break
        message, dice = a_message(rng, replicas, to, serial + 1), rng.random()
        lines = [json.dumps(mutated_json(rng, message) if dice < 0.7 else message).encode()]
        if dice < 0.1:
            lines += [json.dumps(mutated_json(rng, {"totals": {"m": [1, 1]}})).encode(), b'{"end":true}']
        signature, pieces = seal(signer.request(), lines)
        body = b"".join(pieces)
        if dice > 0.9:
            body = mutated(rng, body)
        caller.send(request("POST", PATH, f"{HEADER}: {signature}", body=body))
    return serial + 1, caller.statuses, caller.counted, caller.cut


def in_workers(function, arguments):
    """Call a function in a process for each of some arguments; return the sums of what it returns."""
    sent, statuses, counted, cut = 0, {}, {}, 0
    with multiprocessing.get_context("fork").Pool(len(arguments)) as pool:
        for number, some, dots, some_cut in pool.starmap(function, arguments):
            for status, times in some.items():
                statuses[status] = statuses.get(status, 0) + times
            sent, counted, cut = sent + number, counted | dots, cut + some_cut
    return sent, dict(sorted(statuses.items())), counted, cut


def resources(node):
    """Return (KiB of memory, threads, descriptors) of a node."""
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    memory, threads = (int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) for name in ("VmRSS", "Threads"))
    return memory, threads, len(os.listdir(f"/proc/{node.process.pid}/fd"))


def settled(node):
    """Wait until no connection but the one that asks is open; return the resources then."""
    wait_until(lambda: sum(map(int, re.findall(r"^counter_connections\{.*\} (\d+)", metrics(node), re.MULTILINE))) <= 1)
    time.sleep(11)  # threads end after 10 s without work
    return resources(node)


def metrics(node):
    return node.ask("GET", "/metrics").body.decode()


def held(node, what):
    """Return how many counters, or idempotency keys, a node holds."""
    return int(re.search(rf"^counter_{what} (\d+)$", metrics(node), re.MULTILINE)[1])


def check_counts(node, counted):
    """Check that the node counted just what was answered; return how many increments that is."""
    accepted, latest = set(), {}  # sequences; name -> (sequence, count)
    for (_, sequence), counts in counted.items():
        accepted |= set(range(sequence - len(counts) + 1, sequence + 1))
        for name, count in counts.items():
            latest[name] = max(latest.get(name, (0, 0)), (sequence, count))
    assert accepted == set(range(1, len(accepted) + 1)), "an increment was counted and not answered"
    wrong = {name: (count, node.count(name)) for name, (_, count) in latest.items() if node.count(name) != count}
    assert not wrong, wrong
    return len(accepted)


def run(requests, messages, seed=1, tls=False, seconds=math.inf):
    """Send so many of each, for so long at most; AssertionError if anything is wrong then.  Yields lines about it."""
    with tempfile.TemporaryDirectory() as folder:
        if tls:
            NodeProcess.speak_tls(Authority(Path(folder)))
        node = NodeProcess("--max-counters", "1000000")
        try:
            yield from attack(node, requests, messages, seed, seconds)
        finally:
            node.end()


def attack(node, requests, messages, seed, seconds):
    id, counted, Caller.context = node.get("/peers")["self"]["id"], {}, node.tls
    kinds = [
        ("to warm up", send_requests, 4000, ()),  # what a node keeps, it keeps then
        ("requests", send_requests, requests, ()),
        ("messages", send_messages, messages, (id,)),
    ]
    for what, send, number, further in kinds:
        began = time.monotonic()
        seeds = [f"{seed} {what} {worker}" for worker in range(WORKERS)]
        work = [(node.port, one, number // WORKERS, began + seconds, *further) for one in seeds]
        sent, statuses, dots, cut = in_workers(send, work)
        took_s, counted = time.monotonic() - began, counted | dots
        memory, threads, descriptors = settled(node)
        counters, keys = (held(node, what) for what in ("counters", "idempotency_keys"))  # they may take memory
        yield (
            f"{what}: sent={sent} seconds={took_s:.0f} statuses={statuses} cut={cut}"
            f" memory_kib={memory} threads={threads} descriptors={descriptors} counters={counters} keys={keys}"
        )
    yield f"increments={check_counts(node, counted)}, all of them answered, and no others"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each kind, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    for line in run(options.requests, options.messages, options.seed, options.tls, options.seconds):
        print(line, flush=True)

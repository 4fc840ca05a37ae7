#!/usr/bin/env python3
"""A node of the distributed counter: its parts, put together; start and stop.

    python counter_server.py --port 8080 --peers localhost:8081

Threads: `accept` takes connections, `poller` serves them all, `slow-N`, `peers-N` and `waits-N` run
what takes longer, `heartbeat` sweeps the peer table, `retry-worker-N` send to peers, `store` writes the
data file (--data); the main thread waits for a signal.
"""

import importlib.util
import shlex
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while the imports run
    for package in ("requests", "urllib3"):
        if importlib.util.find_spec(package) is None:
            install = "python3 -m venv .venv && .venv/bin/pip install -q requests"
            again = f"{install} && .venv/bin/python {shlex.join(sys.argv)}"
            sys.exit(f"counter_server.py: {package} is not installed; run {again}")

import ipaddress
import logging
import time
from dataclasses import replace

import urllib3

from api import Api
from counter import Counter, logs, new_replica, process
from counter.addresses import join_address
from counter.backup import export_command, import_command
from counter.config import parse_arguments
from counter.confirmations import Confirmations
from counter.datafile import DataFileError
from counter.joining import Joining
from counter.links import DOUBTFUL_MAX, Links
from counter.private import read_secret_file
from counter.serving import Server, provide_descriptors
from counter.signing import Signer
from counter.status import Status
from counter.store import Store
from counter.tokens import Tokens, read_token_file
from gossip import Gossip
from peers import Heartbeat, PeerTable
from replication import Replicator

log = logging.getLogger("counter.server")

URLLIB3_LEAST = (2, 2)
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
STOP_S = 2.0  # for each kind of threads to end when the node stops
COMMANDS = {"export": export_command, "import": import_command}
SAVE_S = 5.0  # for the last of it to get into the data file


class Node:
    """One member of the cluster: its parts, put together, started and stopped.

    Raises DataFileError if its data file cannot be used, OSError if it cannot listen, and
    UnicodeError if its host cannot be a name.
    """

    def __init__(self, config):
        self.config = config
        self.counter = Counter(
            new_replica(), config.max_counters, config.max_idempotency_keys, config.idempotency_window
        )
        self.signer = Signer(config.secrets, config.cluster)
        self.tokens = Tokens(config.tokens) if config.token_file else None
        self.certificates = config.certificates
        self._files = list(self._files_of(config))  # (flag, path, reads it again): what SIGHUP is for
        self.store = self._open_store() if config.data else None
        try:
            self.server = Server(config)
        except (OSError, UnicodeError):
            if self.store:
                self.store.stop(0)
            raise
        host, self.port = self.server.server_address[:2]
        wildcard = ipaddress.ip_address(host).is_unspecified
        self.address = config.advertise or (None if wildcard else join_address(host, self.port))
        self.table = PeerTable(
            self.counter.replica,
            self.address,
            config.peers,
            config.heartbeat_interval,
            config.peer_timeout,
            config.fanout,
        )
        confirmations = Confirmations(self.counter.carriers)
        links = Links(self.counter, confirmations, config.retry_backoff, config.retry_backoff_max)
        self.joining = Joining(bool(config.peers), config.join_timeout, self.counter.lacks)
        self.gossip = Gossip(self.counter, self.table, links, confirmations, self.joining, config.fanout)
        workers = config.retry_workers + DOUBTFUL_MAX
        self.replicator = Replicator(
            self.gossip, links, self.table, self.signer, self.port, workers, config.peer_timeout, self.certificates
        )
        self.heartbeat = Heartbeat(self.table, config.heartbeat_interval, self._swept)
        parts = self.counter, self.table, self.gossip
        limits = {
            "counters": config.max_counters,
            "idempotency_keys": config.max_idempotency_keys,
            "connections": config.max_connections,
            "waiting_requests": config.max_waiting,
        }
        status = Status(*parts, self.replicator.traffic, self.server, self.store, limits, self.readiness)
        self.api = Api(config, *parts, self.replicator, self.server, self.store, self.tokens, status)

    def _files_of(self, config):
        if config.secret_file:
            yield "--secret-file", config.secret_file, lambda: self.signer.replace(read_secret_file(config.secret_file))
        if config.token_file:
            yield "--token-file", config.token_file, lambda: self.tokens.replace(read_token_file(config.token_file))
        if config.certificates:
            yield "--tls-cert", config.certificates.cert, config.certificates.read_again

    def _open_store(self):
        """Return the store, with everything that is in its file in the counter."""
        config, began = self.config, time.monotonic()
        store = Store(config.data, self.counter, config.cluster, config.fsync == "always", config.idempotency_window)
        store.open()
        replicas, (counters, keys) = len(self.counter.vector()), self.counter.sizes()
        log.info(
            "loaded: file=%s counters=%d replicas=%d keys=%d seconds=%.2f",
            config.data, counters, replicas, keys, time.monotonic() - began,
        )  # fmt: skip
        return store

    def start(self):
        if self.store:
            self.store.start()
        self.server.start(self.api)
        self.replicator.start()
        self.heartbeat.start()

    @property
    def has_files(self):
        """Whether there is anything for read_files_again() to read."""
        return bool(self._files)

    def read_files_again(self):
        """Take what the files of the command line hold now; one that is not good is logged, and changes nothing."""
        for flag, path, read_again in self._files:
            try:
                read_again()
            except ValueError as error:
                log.warning("not read again, what it held before stays: flag=%s error=%s", flag, error)
            else:
                log.info("read again: flag=%s file=%s", flag, path)

    def _swept(self, addresses, seeds):
        """Do what there is to do once an interval."""
        self.replicator.contact(addresses, seeds)
        if self.certificates:
            self.certificates.watch()

    def stop(self):
        """Answer what is in flight, hand everything to the peers, say leave, end all threads, save the rest.

        Returns whether everything is in the data file, if there is one.
        """
        self.server.stop_serving_clients(self._stop_waiting)
        peers, accepted = self.table.active(), self.counter.accepted
        self.gossip.leaving.end()
        handover = self.gossip.leaving.drain(time.monotonic, self.config.drain_timeout)
        self._report(handover)
        ended = [self.heartbeat.stop(STOP_S), self.replicator.stop(STOP_S), self.server.stop()]
        if not all(ended):
            log.warning("stopping: some threads still run")
        held_by = sum(id in handover.holders for id, _ in peers)
        saved = self.store is None or self.store.stop(SAVE_S)  # last: until now peers may have brought news
        if not saved:
            status = self.store.status()
            log.warning("stopping: not everything is in the data file, lag_increments=%d error=%s",
                        status.lag_increments, status.error)  # fmt: skip
        log.info("stopped: accepted=%d held_by=%d peers=%d", accepted, held_by, len(peers))
        return saved

    def _report(self, handover):
        counters, others = self.counter.sizes()[0], self.table.snapshot(time.monotonic())
        left_over = handover.left_over
        if left_over and not self.store:
            if others:
                log.warning("stopping: increments go that no peer is known to hold: increments=%d", left_over)
            else:
                log.warning("stopping: the last node, its counts go: counters=%d increments=%d", counters, left_over)
        elif not handover.complete:
            log.warning("stopping: not all peers confirmed everything within --drain-timeout")

    def _stop_waiting(self):
        self.counter.stop_waiting()
        self.gossip.stop_waiting()
        if self.store:
            self.store.stop_waiting()

    def readiness(self):
        """Return (ready, alone, what this node waits for): alone is who has never heard of another node."""
        return self.joining.ready, not self.table.has_heard_of_peers, self.joining.waits_for


def main(arguments=None):
    """Run a node until SIGINT or SIGTERM, or a command; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    config = parse_arguments(arguments)
    if tuple(map(int, urllib3.__version__.split(".")[:2])) < URLLIB3_LEAST:  # all sending would fail
        print(
            f"counter_server.py: urllib3 {urllib3.__version__} is too old; pip install -U requests urllib3",
            file=sys.stderr,
        )
        return 1
    logs.set_up(config.log_level, config.log_format)
    process.share_one_heap()  # before there are other threads
    clients_max = provide_descriptors(config.max_connections)
    if clients_max < config.max_connections:
        log.warning(
            "fewer clients are served: the limit of open files is too low for --max-connections, max=%d", clients_max
        )
        config = replace(config, max_connections=clients_max)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler prints a traceback
    # Blocked here and so in every thread to come, a signal waits for sigwait(), whatever runs.
    # With handlers instead the kernel may pick any thread, and the main thread may sleep on.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | {signal.SIGHUP})
    try:
        node = Node(config)
    except DataFileError as error:
        print(f"counter_server.py: {error}", file=sys.stderr)
        return error.status
    except (OSError, UnicodeError) as error:
        print(f"counter_server.py: cannot listen on {config.host} port {config.port}: {error}", file=sys.stderr)
        return 1
    node.start()
    log.info("listening: addr=%s id=%s", join_address(node.server.server_address[0], node.port), node.counter.replica)
    number = _wait_for_stop(node)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a second one ends the process at once
    log.info("stopping: signal=%s", signal.Signals(number).name)
    return 0 if node.stop() else 1


def _wait_for_stop(node):
    """Read the node's files again at each SIGHUP; return the number of the signal to stop at.

    To a node without such files SIGHUP means what it always did: its terminal is gone, unless nohup ignores it.
    """
    hangs_up = node.has_files or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    signals = STOP_SIGNALS | {signal.SIGHUP} if hangs_up else STOP_SIGNALS
    while (number := signal.sigwait(signals)) == signal.SIGHUP and node.has_files:
        node.read_files_again()
    return number


if __name__ == "__main__":
    sys.exit(main())

"""The server: listens, accepts, and stops in order.

    accept thread ─▶ Server.process_request ─▶ Poller, which serves all connections
                                                 └─▶ lanes: threads for actions that take long

The api decides what requests mean and how long a body may be.  With `api.body_sink(head)` it may
take a body piece by piece: that object is fed as the body arrives, and stands for it in the action.
An action returns the bytes of a response, or an iterable of pieces, the first of which has the
whole head; its attribute `pace` says in which thread to call it.  Here peers are known only as
those who are served, like `api.vital_paths`, when clients no longer are.
"""

import logging
import resource
import socket
import socketserver
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer

from counter import metrics
from counter.lanes import PEERS, SLOW, WAITS, Lane
from counter.places import CLIENT, GUEST, PEER, Places, guests_for
from counter.poller import Complaints, Poller
from counter.tls import TlsConnection
from counter.transport import UNSENT_LIMIT

log = logging.getLogger("counter.serving")

BACKLOG = 1024  # the stdlib's 5 resets connections under load
# File descriptors for all else: connections from peers and to them, and a few files.
DESCRIPTORS_BESIDE = 256
SLOW_THREADS, PEER_THREADS = 2, 4  # they compute, so more of them would not be faster
ACCEPT_PAUSE_S = 0.1  # before accepting again after that failed
STOP_S = 2.0  # for requests in flight when the server stops


def provide_descriptors(clients_max):
    """Let this process open as many files as it may; return how many clients, at most that many, it can serve then.

    The soft limit is low for the sake of programs that use select(), which nothing here does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return clients_max
    wanted = clients_max + guests_for(clients_max) + DESCRIPTORS_BESIDE
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    while raised > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):  # macOS allows less than it says
            raised = (raised + soft) // 2
    if soft >= wanted:
        return clients_max
    return clients_within(soft)


def clients_within(descriptors):
    """Return how many clients can be served with so many open files, most of which are for them."""
    left = descriptors - min(DESCRIPTORS_BESIDE, descriptors // 4)
    return max(1, left - guests_for(left * 10 // 11))


class Server(ThreadingHTTPServer):
    """Accepts connections and has a Poller serve them.  Raises OSError if it cannot listen."""

    request_queue_size = BACKLOG
    allow_reuse_port = False  # or two nodes could take the same port

    def __init__(self, config):
        self.stopping = False
        self.requests = metrics.Requests()
        self._config = config
        self._complain = Complaints()
        self._poller = None  # from start() on
        self._lanes = {
            SLOW: Lane("slow", SLOW_THREADS, self.requests),
            PEERS: Lane("peers", PEER_THREADS, self.requests),
            WAITS: Lane("waits", config.max_waiting, self.requests, queues=False),
        }
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, None)  # connections go to the poller: see process_request

    def server_bind(self):
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option in UNSENT_LIMIT:  # connections inherit it
            self.socket.setsockopt(*option)
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look up the host's name as well

    def start(self, api):
        """Serve what `api` answers."""
        places = Places(self._config.max_connections, api.peers_max)
        parts = api, places, self._lanes, self.requests, self._complain
        certificates = self._config.certificates
        self._poller = Poller(*parts, partial(TlsConnection, certificates)) if certificates else Poller(*parts)
        for pace in (SLOW, PEERS):
            self._lanes[pace].start()
        self._poller.start()
        self._thread.start()

    def stop_serving_clients(self, release_waiting):
        """Let the requests of clients that are in flight be answered; from then on serve peers only.

        `release_waiting` lets those go who wait in an action.
        """
        self.stopping = True
        self._poller.end({CLIENT}, STOP_S, release_waiting)

    def stop(self):
        """Stop listening, end all threads, and return whether they did end."""
        if not self._stopped.is_set():
            self._stopped.set()
            self.shutdown()
            self._thread.join()
            self._accept_waiting()
            self.server_close()
        ended = [self._poller.end({CLIENT, GUEST, PEER}, STOP_S)]
        ended += [self._poller.stop(STOP_S), *(lane.stop(STOP_S) for lane in self._lanes.values())]
        return all(ended)

    def connections(self):
        """Return {kind: number of open connections}."""
        return self._poller.numbers()

    def waiting(self):
        """Return how many requests wait for something that others do."""
        return self._lanes[WAITS].busy

    def watchers(self):
        """Return to how many connections a stream goes."""
        return len(self._poller.streams)

    def recognise_peer(self, connection):
        """Take note that a connection is a peer's; to be called by an action on that connection."""
        connection.is_peer = True

    # The accept thread.

    def _accept(self):
        while not self._stopped.is_set():
            try:
                self.serve_forever(0.2)
            except MemoryError:
                self._complain("no memory to accept connections")
                self._stopped.wait(ACCEPT_PAUSE_S)

    def get_request(self):
        try:
            return super().get_request()
        except (ConnectionError, BlockingIOError):  # hung up before it was accepted; see _accept_waiting()
            raise
        except OSError as error:
            # Most likely no file descriptor is left; a busy loop would not free any.
            self._complain("no connection can be accepted: error=%s", error)
            self._poller.relieve()
            self._stopped.wait(ACCEPT_PAUSE_S)
            raise

    def process_request(self, sock, _address):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poller.add(sock)

    def handle_error(self, _sock, _address):
        """Go on after process_request() failed, for lack of memory or because the client has hung up."""
        self._complain("a connection could not be served: error=%r", sys.exc_info()[1])

    def _accept_waiting(self):
        """Accept what has connected already: closing the listener would reset it."""
        self.socket.setblocking(False)
        while True:
            try:
                self.process_request(*self.get_request())
            except ConnectionError:
                continue
            except OSError:  # none waits any more
                return

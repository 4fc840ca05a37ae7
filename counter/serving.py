"""Serving HTTP: a thread per connection, a bounded number of them, and what each does.

    accept thread ─▶ Server.process_request ─▶ connection-N thread ─▶ Connection
                                                     RequestReader ─▶ api.action(head)
                                                     action(body, connection) ─▶ _send(response)

The api decides what requests mean and how long a body may be.  With `api.body_sink(head)` it may
take a body piece by piece: that object is fed as the body arrives, and stands for it in the action.
An action returns the bytes of a response, or an iterable of pieces, the first of which has the
whole head.  This file knows of peers only that they are served, like `api.vital_paths`, when
clients no longer are.
"""

import contextlib
import ipaddress
import itertools
import logging
import math
import random
import resource
import socket
import socketserver
import struct
import threading
import time
from http.server import ThreadingHTTPServer

from counter import http1, metrics
from counter.http1 import Refused, unavailable

log = logging.getLogger("counter.serving")

BACKLOG = 1024  # the stdlib's 5 resets connections under load
RECEIVE_SIZE = 65536
HEAD_TIMEOUT_S = 10.0  # for a whole head, however slowly it trickles in
BODY_TIMEOUT_S = 30.0  # for a whole body that is collected here
PROGRESS_TIMEOUT_S = 10.0  # between two parts of a body that goes to a sink of the api
IDLE_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 30.0
CLIENT, PEER, RESERVED = "client", "peer", "reserved"  # kinds of connections
RESERVE_MAX = 64  # connections read beyond --max-connections, to find the peers among them
RESERVE_TIMEOUT_S = 2.0  # for each part of the request by which such a connection shows to be a peer's
# File descriptors for all else: connections in reserve, from peers and to them, and a few files.
DESCRIPTORS_BESIDE = 256
ROOM = 0.9  # of --max-connections: with fewer there is room again, which is logged
LINGER_S = 1.0  # for a client to read the last response
STOP_S = 2.0  # for requests in flight when the server stops
COMPLAINT_INTERVAL_S = 60.0  # between two lines in the log that say the same
STOPPING = "this node is stopping; try another"


class Connection:
    """One connection of a client or a peer, served by a thread of its own."""

    def __init__(self, sock, server, kind):
        self.request, self.server, self.kind = sock, server, kind
        self._reader = http1.RequestReader()
        self._received = None  # what was read latest, if a request may be all of it
        self._receive_timeout_s = None  # as it is set on the socket
        self._route = metrics.OTHER  # of the latest request
        self._tally = server.requests.open()
        self._untimed = random.randrange(metrics.TIMED_ONE_IN)  # repeated requests until one is timed

    def local_host(self):
        """Return the address of this machine that the connection came to."""
        host = ipaddress.ip_address(self.request.getsockname()[0])
        return str(getattr(host, "ipv4_mapped", None) or host)

    def serve(self):
        """Serve requests until the connection ends."""
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_TIMEOUT_S))
            self._serve()
        except OSError:  # the client hung up, or is too slow
            pass
        except Exception:  # a bug; it costs this connection only
            log.exception("serving a request failed")
            response = Refused(500, "this node failed to serve the request; see its log").response()
            self._tally.of(self._route).count(response, 0.0)
            with contextlib.suppress(OSError):
                self._close_with(response)
        finally:
            self.server.requests.close(self._tally)

    def _serve(self):
        while self._wait_for_request():
            received = self._received
            response, further, keep_alive, action = self._answer_next()
            tally = self._tally.of(self._route)
            tally.count(response, time.perf_counter() - self._began)
            if not keep_alive or self._is_to_end():
                self._close_with(response, further)
                return
            self._send(response, further)
            if action:
                self._serve_repeated(received, action, tally)

    def _wait_for_request(self):
        """Wait until some of the next request is there; return whether it comes."""
        deadline = time.monotonic() + (RESERVE_TIMEOUT_S if self.kind == RESERVED else IDLE_TIMEOUT_S)
        while self._reader.waits_for_request:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._receive(left_s):
                return False
        return True

    def _serve_repeated(self, request, action, tally):
        """Answer a request without a body for as long as the client sends just these bytes again.

        Most clients do: their head is always the same.  This is the hot path, so where to count a
        status is looked up when it changes only, and only some of the requests are timed.
        """
        untimed, status = self._untimed, None
        self._set_receive_timeout(IDLE_TIMEOUT_S)
        receive, send = self.request.recv, self.request.sendall
        while True:
            received = receive(RECEIVE_SIZE)
            if received != request or self._is_to_end():
                self._received, self._untimed = received, untimed
                self._reader.feed(received)
                return
            began = None if untimed else time.perf_counter()
            try:
                response, further = http1.opened(action(b"", self))
            except Refused as refused:
                response, further = refused.response(), ()
            if response[9:12] != status:
                status, number = response[9:12], tally.number(response)
            number[0] += 1
            untimed -= 1
            if began:
                tally.observe(time.perf_counter() - began, metrics.TIMED_ONE_IN)
                untimed = metrics.TIMED_ONE_IN - 1
            send(response)
            if further:
                self._send_further(further)

    def _send(self, response, further):
        self.request.sendall(response)
        self._send_further(further)

    def _send_further(self, pieces):
        """Send the rest of a response; if the api fails to make it, the client must see that it is not whole."""
        pieces = iter(pieces)
        while True:
            try:
                piece = next(pieces)
            except StopIteration:
                return
            except Exception:  # a bug; it costs this connection only
                log.exception("making a response failed after its head was sent")
                raise ConnectionAbortedError from None
            self.request.sendall(piece)

    def _is_to_end(self):
        return self.kind == RESERVED or (self.server.stopping and self.kind != PEER)

    def _answer_next(self):
        """Read a request; return (response, its further pieces, keep alive, action).

        The action is None where calling it again is not all it takes to answer the same bytes.
        """
        head, body, action, further = None, None, None, ()
        self._route, self._began = metrics.OTHER, time.perf_counter()
        received = self._received
        try:
            head = self._read_head()
            self._route = self.server.api.route_of(head.path)
            if self.kind == RESERVED and head.path not in self.server.api.vital_paths:
                raise unavailable(STOPPING if self.server.stopping else "all connections are taken; try again later")
            body = self._read_body(head)
            self._began = time.perf_counter()  # what came before was the client's time
            action = self.server.api.action(head)
            (response, further), close = http1.opened(action(body, self)), False
        except Refused as refused:
            unread = head is not None and head.length and body is None  # what is left of the body is no request
            response, close, action = refused.response(), refused.close or unread, None
        if head is None:
            return response, (), False, None
        if head.method == "HEAD":
            response, further = http1.without_body(response), ()
        if head.is_http10 and head.keep_alive and not close and not self._is_to_end():
            response = http1.with_header(response, b"Connection: keep-alive")
        repeats = received is not None and received is self._received and not self._reader.buffered and body == b""
        repeats = repeats and head.method != "HEAD" and not head.is_http10
        self._received = None
        return response, further, head.keep_alive and not close, action if repeats else None

    def _read_head(self):
        """Return the Head of the next request."""
        deadline = time.monotonic() + (RESERVE_TIMEOUT_S if self.kind == RESERVED else HEAD_TIMEOUT_S)
        while (head := self._reader.next()) is None:
            self._receive_by(deadline, "the head of the request took too long")
        return head

    def _read_body(self, head):
        """Return the body of a request, or the object of the api's that took it."""
        size_max = self.server.api.body_max(head)
        if head.length > size_max:
            raise Refused(413, f"the body may have at most {size_max} bytes", close=True)
        sink = self.server.api.body_sink(head)
        if head.expects_continue and self._reader.buffered < head.length:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        timeout_s = BODY_TIMEOUT_S if sink is None else PROGRESS_TIMEOUT_S
        timeout_s = RESERVE_TIMEOUT_S if self.kind == RESERVED else timeout_s
        deadline = time.monotonic() + timeout_s
        chunks = []
        while (piece := self._reader.next()) != b"":
            if piece is None:
                self._receive_by(deadline, "the body of the request took too long")
            elif sink is None:
                chunks.append(piece)
            else:
                sink.feed(piece)
                deadline = time.monotonic() + timeout_s
        return b"".join(chunks) if sink is None else sink

    def _receive_by(self, deadline, complaint):
        """Read some more of a request that has begun; Refused if it is not there by the deadline."""
        left_s = deadline - time.monotonic()
        try:
            if left_s <= 0:  # some may always be there, of what trickles in without end
                raise BlockingIOError
            if not self._receive(left_s):
                if self.server.stopping:  # and so it is this node that receives no more
                    raise unavailable(STOPPING, close=True)
                raise ConnectionAbortedError  # hung up half way: there is nobody to answer
        except BlockingIOError:
            raise Refused(408, complaint, close=True) from None

    def _receive(self, timeout_s):
        """Read some more; return whether there was any.  BlockingIOError if none came in time."""
        self._set_receive_timeout(timeout_s)
        received = self.request.recv(RECEIVE_SIZE)
        self._received = None if self._reader.buffered else received
        self._reader.feed(received)
        return bool(received)

    def _set_receive_timeout(self, timeout_s):
        if timeout_s != self._receive_timeout_s:
            # In the kernel: with socket.settimeout() every recv() would cost a poll() as well.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s))
            self._receive_timeout_s = timeout_s

    def _close_with(self, response, further=()):
        """Send the last response, and give the client the time to read it.

        Closing with bytes of the client unread would reset the connection, and the response
        could be lost (RFC 9112 section 9.6).
        """
        self._send(http1.with_header(response, b"Connection: close"), further)
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_S
        while (left_s := deadline - time.monotonic()) > 0:
            self._set_receive_timeout(left_s)
            if not self.request.recv(RECEIVE_SIZE):
                return


def provide_descriptors(clients_max):
    """Let this process open as many files as it may; return how many clients, at most that many, it can serve then.

    The soft limit is low for the sake of programs that use select(), which nothing here does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return clients_max
    raised = clients_max + DESCRIPTORS_BESIDE if hard == resource.RLIM_INFINITY else hard
    while raised > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):  # macOS allows less than it says
            raised //= 2
    return min(clients_max, max(1, soft - DESCRIPTORS_BESIDE))


def _timeval(seconds):
    return struct.pack("@ll", *divmod(max(1, int(seconds * 1e6)), 1_000_000))  # 0 would be for ever


class Server(ThreadingHTTPServer):
    """Accepts connections, each served by a thread, at most --max-connections of clients.

    Some more are kept in reserve until they show whether they are a peer's: a flood of clients
    must not cut a node off from the cluster.  Raises OSError if it cannot listen.
    """

    request_queue_size = BACKLOG
    allow_reuse_port = False  # or two nodes could take the same port

    def __init__(self, config):
        self.api = None  # what requests mean, from start() on
        self.stopping = False
        self.requests = metrics.Requests()
        # Guards the four below.  Held for dictionary work only, never together with another.
        # Who waits on it waits for the end of a connection.
        self._changed = threading.Condition()
        self._open = {}  # thread -> (socket, kind of the connection it serves)
        self._numbers = {CLIENT: 0, PEER: 0, RESERVED: 0}  # of open connections
        self._full = False  # clients are sent away, which was logged
        self._clients_max = config.max_connections  # or fewer, once there was no thread for as many
        # Used by the accepting thread alone, both of them.
        self._serial = itertools.count(1)
        self._complain_at = -math.inf  # when to say next that connections cannot be served
        self._thread = threading.Thread(target=self.serve_forever, args=(0.2,), name="accept", daemon=True)
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, None)  # requests are not handled one by one: see process_request

    def server_bind(self):
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look up the host's name as well

    def start(self, api):
        """Accept connections from now on, and let `api` answer their requests."""
        self.api = api
        self._thread.start()

    def stop_serving_clients(self, release_waiting):
        """Let the requests of clients that are in flight be answered; from then on serve peers only.

        `release_waiting` lets those go who wait in an action.
        """
        self.stopping = True
        release_waiting()
        self._end_connections(CLIENT)

    def stop(self):
        """Stop listening, end all threads, and return whether they did end."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        return self._end_connections(CLIENT, RESERVED, PEER)

    def _end_connections(self, *kinds):
        """Have connections end after the request they are in; return whether they did in time."""
        with self._changed:
            for sock, kind in self._open.values():
                if kind in kinds:
                    with contextlib.suppress(OSError):  # it has just been closed
                        sock.shutdown(socket.SHUT_RD)  # what was received can still be read
            return self._changed.wait_for(lambda: not any(self._numbers[kind] for kind in kinds), STOP_S)

    def get_request(self):
        try:
            return super().get_request()
        except ConnectionError:  # hung up before it was accepted
            raise
        except OSError as error:
            # Most likely no file descriptor is left; a busy loop would not free any.
            self._complain("no connection can be accepted: error=%s", error)
            with self._changed:
                self._changed.wait(0.1)
            raise

    def _complain(self, message, *values):
        """Log that connections cannot be served, unless that was said a short while ago."""
        if time.monotonic() >= self._complain_at:
            self._complain_at = time.monotonic() + COMPLAINT_INTERVAL_S
            log.warning(message, *values)

    def _make_room(self):
        """Serve fewer clients from now on, so that there are threads for the connections in reserve."""
        with self._changed:
            if self._numbers[CLIENT] > self._clients_max:
                return  # those told to go are still going
            self._clients_max = max(1, self._numbers[CLIENT] - RESERVE_MAX)
            clients = [sock for sock, kind in self._open.values() if kind == CLIENT]
            for sock in clients[self._clients_max :]:
                with contextlib.suppress(OSError):  # it has just been closed
                    sock.shutdown(socket.SHUT_RD)

    def process_request(self, sock, _address):
        kind = self._admit()
        if kind is None:
            self.shutdown_request(sock)
            return
        name = f"connection-{next(self._serial)}"
        thread = threading.Thread(target=self._serve, args=(sock, kind), name=name, daemon=True)
        with self._changed:
            self._open[thread] = (sock, kind)
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            self._end(thread)
            self.shutdown_request(sock)
            self._make_room()
            self._complain("no thread could be started: clients served from now on, max=%d", self._clients_max)

    def _admit(self):
        """Return the kind of a new connection, counted from now on; None if there is no place."""
        with self._changed:
            if not self._changed.wait_for(self._free_locked, RESERVE_TIMEOUT_S):
                return None
            kind = self._free_locked()
            self._numbers[kind] += 1
            fills = kind == RESERVED and not self._full and not self.stopping
            self._full = self._full or fills
        if fills:
            log.warning("clients are sent away: all of --max-connections are taken, max=%d", self._clients_max)
        return kind

    def _free_locked(self):
        """Return a kind of which there may be one connection more; None if there is none."""
        if self._numbers[CLIENT] < self._clients_max and not self.stopping:
            return CLIENT
        return RESERVED if self._numbers[RESERVED] < RESERVE_MAX else None

    def _serve(self, sock, kind):
        try:
            Connection(sock, self, kind).serve()
        finally:
            self.shutdown_request(sock)
            self._end(threading.current_thread())

    def _end(self, thread):
        with self._changed:
            _, kind = self._open.pop(thread)
            self._numbers[kind] -= 1
            self._changed.notify_all()
            empties = self._full and self._numbers[CLIENT] < ROOM * self._clients_max
            self._full = self._full and not empties
        if empties:
            log.info("clients are served again: there is room below --max-connections")

    def connections(self):
        """Return {kind: number of open connections}."""
        with self._changed:
            return dict(self._numbers)

    def recognise_peer(self, connection):
        """Take note that the connection of the current thread is a peer's, not a client's."""
        if connection.kind == PEER:
            return
        connection.kind = PEER
        with self._changed:
            sock, kind = self._open[threading.current_thread()]
            self._open[threading.current_thread()] = (sock, PEER)
            self._numbers[kind] -= 1
            self._numbers[PEER] += 1
            self._changed.notify_all()

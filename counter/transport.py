"""Messages over a connection that stays open: what the sending threads need of HTTP.

A requests session per peer, sent through by its own adapter: a request to a peer needs none of
requests' redirects, cookies and hooks, nor a look into the environment, and they took two thirds of
the time.  urllib3's Retry makes the quick second try of a connection.

Every operation of the socket ends by the session's deadline.  A timeout of a socket does not do
that: it begins anew with every byte that trickles in.
"""

import math
import socket
import ssl
import time

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from counter.addresses import split_address

UNSENT_MAX = 64 * 1024  # bytes that the kernel keeps; or what a slow link has yet to carry would look as sent
UNSENT_LIMIT = (
    [(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_MAX)] if hasattr(socket, "TCP_NOTSENT_LOWAT") else []
)
READ_SIZE = 64 * 1024

# Merging is idempotent, so a POST may be repeated.  Long waits are the scheduler's, within
# stop()'s reach, so a read timeout is not tried again here and Retry-After is not slept for.
QUICK_TRIES = urllib3.util.Retry(
    connect=1, read=0, redirect=0, status=0, other=0,
    backoff_factor=0.05, allowed_methods={"POST"}, respect_retry_after_header=False,
)  # fmt: skip
FAILURES = (OSError, urllib3.exceptions.HTTPError)  # of which all requests ends badly that do; requests' are OSErrors


class Session:
    """One peer's address, and at most one connection to it.  For one thread at a time.

    `deadline` is when everything under way ends, in time.monotonic(); set it before each request, and
    later as the exchange gets on.
    """

    scheme = "http"

    def __init__(self, address, path):
        self.deadline = math.inf
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between nodes, whatever the environment says
        self._session.headers = {"Content-Type": "application/json"}
        url = f"{self.scheme}://{address}{path}"
        self._session.mount(url, _Adapter(self, *split_address(address)))
        self._prepared = self._session.prepare_request(requests.Request("POST", url))

    def post(self, body, headers, connect_timeout_s):
        """Send a request; return the urllib3 response, its body unread.

        `body` is bytes, or an iterable of bytes with the Content-Length among the headers.  Raises one of
        FAILURES.
        """
        self._prepared.body = body
        self._prepared.headers.update(headers)
        adapter = self._session.get_adapter(self._prepared.url)
        try:
            return adapter.send(self._prepared, stream=True, timeout=(connect_timeout_s, None))
        except requests.exceptions.ReadTimeout:
            raise TimeoutError("no answer in time") from None

    def read(self, response):
        """Yield the body of a response as it arrives; then the connection is free again."""
        try:
            while data := response.read1(READ_SIZE):
                yield data
        except urllib3.exceptions.ReadTimeoutError:
            raise TimeoutError("no whole answer in time") from None
        finally:
            response.close()  # what was not read to its end cannot be followed by another
            response.release_conn()

    def new_pool(self, host, port):
        """Return what makes its connections."""
        return _Pool(host, port, maxsize=1)

    def limit(self, sock):
        """Let the next operation of a socket end by the deadline."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left_s if left_s < math.inf else None)

    def close(self):
        self._session.close()


class TlsSession(Session):
    """A Session over TLS.

    `certificates` are those for each new connection; `name_of(address)` is the host that the peer's has to be for.
    """

    scheme = "https"

    def __init__(self, address, path, certificates, name_of):
        super().__init__(address, path)
        self._address, self._certificates, self._name_of = address, certificates, name_of

    def new_pool(self, host, port):
        return _TlsPool(host, port, maxsize=1)

    def begin(self, connection):
        """Give a connection what its handshake needs."""
        context = self._certificates.client
        context.sslsocket_class = _TlsSocket
        connection.ssl_context, connection.server_hostname = context, self._name_of(self._address).strip("[]")


class _Adapter(HTTPAdapter):
    """Sends to one address, without what requests does around that."""

    def __init__(self, session, host, port):
        super().__init__(max_retries=QUICK_TRIES, pool_connections=1, pool_maxsize=1)
        self._pool = session.new_pool(host.strip("[]"), port)
        self._pool.session = session

    def get_connection_with_tls_context(self, request, verify, proxies=None, cert=None):
        return self._pool

    def request_url(self, request, proxies):
        return request.path_url

    def build_response(self, req, resp):
        return resp

    def close(self):
        super().close()
        self._pool.close()


class _InOnePiece:
    """What sends the head of a request and the beginning of its body at once: the peer wakes up once for both."""

    _is_head, _head = False, b""

    def endheaders(self, *arguments, **options):
        self._is_head = True
        super().endheaders(*arguments, **options)

    def send(self, data):
        if self._is_head:  # a message always has a body
            self._is_head, self._head = False, data
            return
        head, self._head = self._head, b""
        super().send(head + data if head else data)


class _Connection(_InOnePiece, HTTPConnection):
    default_socket_options = (*HTTPConnection.default_socket_options, *UNSENT_LIMIT)
    session = None  # set by its pool, as there is no other way into it

    def _new_conn(self):
        return _Socket(super()._new_conn(), self.session)


class _TlsConnection(_InOnePiece, HTTPSConnection):
    default_socket_options = _Connection.default_socket_options
    session = None

    def _new_conn(self):
        sock = super()._new_conn()
        self.session.limit(sock)  # for the handshake
        return sock

    def connect(self):
        self.session.begin(self)
        super().connect()
        self.sock.owner = self.session


class _OfSession:
    """What makes the connections of a pool known to its session."""

    session = None

    def _new_conn(self):
        connection = super()._new_conn()
        connection.session = self.session
        return connection


class _Pool(_OfSession, HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(_OfSession, HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Socket(socket.socket):
    """A socket whose sending and receiving ends by the deadline of its session."""

    def __init__(self, connected, session):
        super().__init__(connected.family, connected.type, connected.proto, fileno=connected.detach())
        self._session = session

    def recv_into(self, *arguments):
        self._session.limit(self)
        return super().recv_into(*arguments)

    def sendall(self, *arguments):
        self._session.limit(self)
        return super().sendall(*arguments)


class _TlsSocket(ssl.SSLSocket):
    """The same over TLS: here a timeout holds for all of an operation, and what is long is sent in several."""

    owner = None  # its session

    def recv_into(self, *arguments):
        self.owner.limit(self)
        return super().recv_into(*arguments)

    def send(self, *arguments):
        self.owner.limit(self)
        return super().send(*arguments)

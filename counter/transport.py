"""Messages over a connection that stays open: what the sending threads need of HTTP.

A requests session per peer, sent through by its own adapter: a request to a peer needs none of
requests' redirects, cookies and hooks, nor a look into the environment, and they took two thirds of
the time.  urllib3's Retry makes the quick second try of a connection.

Every operation of the socket ends by the session's deadline.  A timeout of a socket does not do
that: it begins anew with every byte that trickles in.
"""

import math
import socket
import time

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

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

    def __init__(self, address, path):
        self.deadline = math.inf
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between nodes, whatever the environment says
        self._session.headers = {"Content-Type": "application/json"}
        self._session.mount("http://", _Adapter(self, *split_address(address)))
        self._prepared = self._session.prepare_request(requests.Request("POST", f"http://{address}{path}"))

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

    def close(self):
        self._session.close()


class _Adapter(HTTPAdapter):
    """Sends to one address, without what requests does around that."""

    def __init__(self, session, host, port):
        super().__init__(max_retries=QUICK_TRIES, pool_connections=1, pool_maxsize=1)
        self._pool = _Pool(host.strip("[]"), port, maxsize=1)
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


class _Connection(HTTPConnection):
    default_socket_options = (*HTTPConnection.default_socket_options, *UNSENT_LIMIT)
    session = None  # set by its pool, as there is no other way into it

    def _new_conn(self):
        return _Socket(super()._new_conn(), self.session)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection
    session = None

    def _new_conn(self):
        connection = super()._new_conn()
        connection.session = self.session
        return connection


class _Socket(socket.socket):
    """A socket whose sending and receiving ends by the deadline of its session."""

    def __init__(self, connected, session):
        super().__init__(connected.family, connected.type, connected.proto, fileno=connected.detach())
        self._session = session

    def recv_into(self, *arguments):
        self._limit()
        return super().recv_into(*arguments)

    def sendall(self, *arguments):
        self._limit()
        return super().sendall(*arguments)

    def _limit(self):
        left_s = self._session.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left_s if left_s < math.inf else None)

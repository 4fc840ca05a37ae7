"""Connections over TLS: a socket that encrypts, and what a connection does besides.

    socket ── bytes of TLS ──▶ TlsSocket.recv() ──▶ Connection
           ◀───────────────── TlsSocket.send() ◀──

OpenSSL reads from and writes to memory here, and only this file moves bytes between that and the socket.
So nothing waits for the other side, and nothing that a connection sends can go out as it is.
"""

import contextlib
import socket
import ssl

from counter.connections import IDLE_TIMEOUT_S, LINGER_S, LINGERING, RECEIVING, SENDING, Connection
from counter.http1 import Refused, with_header

HANDSHAKE_TIMEOUT_S = 10.0
HANDSHAKE_SIZE = 16 * 1024  # bytes received at once before a connection is encrypted
SEND_SIZE = 64 * 1024  # bytes encrypted at once
UNSENT_MAX = 256 * 1024  # bytes of TLS itself that may wait while the other side does not read

_HANDSHAKE = 0x16  # the first byte of a client that speaks TLS
_SPEAKS_TLS = Refused(400, "this port speaks TLS, not plain HTTP; use https://")


class NoTls(OSError):
    """The other side speaks something else."""


class TlsSocket:
    """The server's side of TLS over a socket that does not block.  For one thread at a time.

    As with a socket, BlockingIOError says that nothing can be received, or sent, at the moment, and any other
    OSError that it has failed.
    """

    def __init__(self, sock, context):
        self._sock = sock
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=True)
        self._unsent = memoryview(b"")  # of what has left OpenSSL
        self._taken = 0  # bytes that are encrypted, and not yet all sent: those that send() gets next
        self._has_begun = self._is_over = False
        self.holds_more = False  # recv() may have something without the socket having anything

    def fileno(self):
        return self._sock.fileno()

    def getsockname(self):
        return self._sock.getsockname()

    def getpeername(self):
        return self._sock.getpeername()

    @property
    def has_certificate(self):
        """Whether the other side has shown a certificate, which then is a good one."""
        return self._tls.getpeercert(binary_form=True) is not None

    @property
    def waits_to_send(self):
        """Whether bytes of TLS are still to be sent."""
        return bool(self._unsent or self._leaving.pending)

    def do_handshake(self):
        """Go on with the handshake; return once it is done.  NoTls if the other side speaks something else."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._flush()  # OpenSSL tells the other side why
                raise
            else:
                self._flush_if_possible()
                self.holds_more = bool(self._arrived.pending)
                return
            if not self._fill(HANDSHAKE_SIZE):
                raise ConnectionResetError("hung up before it was encrypted")

    def recv(self, size):
        """Return bytes that have arrived, some `size` at most; none after the last."""
        if self._is_over:
            return self._sock.recv(size)  # only to see it end: see shutdown()
        if not self.holds_more and not self._fill(size):
            return b""
        try:
            data = self._tls.read(size)
            self.holds_more = bool(self._arrived.pending or self._tls.pending())
            if self.holds_more and data:
                data = self._read_on(data, size)
        except ssl.SSLWantReadError:
            self.holds_more = False
            raise BlockingIOError from None
        finally:
            if self._leaving.pending:
                self._flush_if_possible()
        return data

    def _read_on(self, data, size):
        """Return these bytes and what else was received with them: TLS hands out 16 KiB at a time."""
        pieces, missing = [data], size - len(data)
        try:
            while missing > 0 and (data := self._tls.read(missing)):
                pieces.append(data)
                missing -= len(data)
        except ssl.SSLWantReadError:
            self.holds_more = False
        return b"".join(pieces)

    def _fill(self, size):
        """Receive something for OpenSSL to read; return whether the other side has not hung up."""
        received = self._sock.recv(size)
        if not self._has_begun and received:
            if received[0] != _HANDSHAKE:
                raise NoTls
            self._has_begun = True
        self._arrived.write(received)
        return bool(received)

    def send(self, data):
        """Encrypt and send the beginning of some bytes; return how many that was.

        After a BlockingIOError they are encrypted, and the next bytes to be sent must be the same ones.
        """
        if not self._taken:
            data = memoryview(data)[:SEND_SIZE]
            while self._taken < len(data):
                self._taken += self._tls.write(data[self._taken :])
        self._flush()
        taken, self._taken = self._taken, 0
        return taken

    def _flush(self):
        while True:
            if not self._unsent:
                if not self._leaving.pending:
                    return
                self._unsent = memoryview(self._leaving.read())
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def _flush_if_possible(self):
        """Send what OpenSSL says of itself; what cannot be sent now goes with what is sent next."""
        try:
            self._flush()
        except BlockingIOError:
            if self._leaving.pending > UNSENT_MAX:
                raise ConnectionAbortedError("it sends and does not read") from None

    def refuse(self, answer):
        """Answer as it is somebody who does not speak TLS, from whom nothing was taken."""
        self._is_over = True
        self._sock.send(answer)
        self._sock.shutdown(socket.SHUT_WR)

    def shutdown(self, how):
        """Say that nothing more is sent; what still arrives is not decrypted."""
        self._say_goodbye()
        self._sock.shutdown(how)

    def close(self):
        with contextlib.suppress(OSError):
            self._say_goodbye()
        self._sock.close()

    def _say_goodbye(self):
        if self._is_over or not self._has_begun:
            return
        self._is_over = True
        with contextlib.suppress(ssl.SSLError):  # it would go on to wait for the other side's
            self._tls.unwrap()
        with contextlib.suppress(BlockingIOError):
            self._flush()


class TlsConnection(Connection):
    """A connection that begins with a TLS handshake, for which it has HANDSHAKE_TIMEOUT_S."""

    def __init__(self, certificates, sock, poller, now):
        super().__init__(TlsSocket(sock, certificates.server), poller, now)
        self.deadline = now + HANDSHAKE_TIMEOUT_S
        self._asks_peers = certificates.asks_peers
        self._is_secured = False
        self._remote_host = super().remote_host()  # now: where a handshake fails, it soon has hung up

    @property
    def holds_more(self):
        return self.sock.holds_more

    def remote_host(self):
        return self._remote_host

    def _begin(self, head, now):
        is_stranger = self._asks_peers and not self.sock.has_certificate
        if is_stranger and head.path in self._poller.api.peer_paths:
            self._poller.complain("messages without a certificate are refused: host=%s", self.remote_host())
            raise Refused(403, "only a node with a certificate of --tls-ca may send messages", close=True)
        super()._begin(head, now)

    # What the poller calls.

    def receive(self, now):
        if self._is_secured or self._shake_hands(now):
            super().receive(now)
            self._drain(now)

    def send_more(self, now):
        if self._is_secured or self._shake_hands(now):
            super().send_more(now)
            self._drain(now)

    def take_back(self, now):
        super().take_back(now)
        self._drain(now)

    def _drain(self, now):
        """Take what was received and is not yet read: of that the selector knows nothing."""
        while self.state is RECEIVING and self.holds_more:
            super().receive(now)

    def _shake_hands(self, now):
        """Go on with the handshake; return whether it is done."""
        self.state = RECEIVING
        try:
            self.sock.do_handshake()
        except BlockingIOError:
            if self.sock.waits_to_send:
                self.state = SENDING
            return False
        except NoTls:
            self._poller.complain("plain HTTP came to this port, which speaks TLS: host=%s", self.remote_host())
            self.sock.refuse(with_header(_SPEAKS_TLS.response(), b"Connection: close"))
            self.state = LINGERING
            self._due(now + LINGER_S)
            return False
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason
            self._poller.complain("a TLS handshake failed: host=%s reason=%s", self.remote_host(), reason)
            raise
        self._is_secured, self.deadline = True, now + IDLE_TIMEOUT_S
        return True

"""The certificates of a node, and what TLS does with them: for those who connect to it, and where it connects.

Files of certificates are replaced while a node runs, often by another program.  Whatever connects next gets
what is in them then; connections that are open go on as they are.
"""

import logging
import os
import ssl
from collections import namedtuple

from counter.private import read_private_file

log = logging.getLogger("counter.server")

FLAGS = ("--tls-cert", "--tls-key", "--tls-ca")
FIRST_VERSION = ssl.TLSVersion.TLSv1_2

# The contexts that connections begin with, and by what the files were known when they were read.
_Read = namedtuple("_Read", "stamps server client")


class Certificates:
    """The files of --tls-cert, --tls-key and --tls-ca.  Threads may call anything at any time.

    Raises ValueError, in words for an operator, if they are not good.
    """

    def __init__(self, cert, key, ca=None, clients_need_one=False):
        """`ca` is who signs the certificates of peers, a file, or None: whom this system trusts."""
        self.cert, self._paths, self._clients_need_one = cert, (cert, key, ca), clients_need_one
        self.asks_peers = ca is not None  # a peer has to show a certificate
        self._read = self._seen = None
        self.read_again()

    @property
    def server(self):
        """The ssl.SSLContext for those who connect to this node."""
        return self._read.server

    @property
    def client(self):
        """The ssl.SSLContext for connections to peers; it verifies the names in their certificates."""
        return self._read.client

    def read_again(self):
        """Take what the files hold now; ValueError if they are not good, and then nothing has changed."""
        stamps = self._stamps()  # first: what changes while the files are read is read once more
        self._seen = stamps
        self._read = _Read(stamps, self._server_context(), self._client_context())

    def watch(self):
        """Read the files again if they have changed; to be called now and then.

        Whoever replaces them may take a while, so they are read once they have stayed the same from one
        call to the next.
        """
        stamps = self._stamps()
        changed, self._seen = stamps != self._seen, stamps
        if changed or stamps == self._read.stamps:
            return
        try:
            self.read_again()
        except ValueError as error:
            log.warning("not read again, what it held before stays: flag=--tls-cert error=%s", error)
            self._read = self._read._replace(stamps=stamps)  # so it is said once
        else:
            log.info("read again: flag=--tls-cert file=%s", self.cert)

    def _stamps(self):
        return tuple(_stamp(path) for path in self._paths)

    def _server_context(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        if self.asks_peers:
            context.verify_mode = ssl.CERT_REQUIRED if self._clients_need_one else ssl.CERT_OPTIONAL
        return context

    def _client_context(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._load(context)
        if not self.asks_peers:
            context.load_default_certs()
        return context

    def _load(self, context):
        context.minimum_version = FIRST_VERSION
        cert, key, ca = self._paths
        read_private_file(key)  # it is not to be readable by others
        try:
            context.load_cert_chain(cert, key, _refuse_password)
        except FileNotFoundError:
            raise ValueError(f"{cert} is not there") from None
        except OSError as error:
            raise ValueError(f"{cert} and {key} are not a certificate and its key in PEM: {_reason(error)}") from None
        if ca is None:
            return
        try:
            context.load_verify_locations(ca)
        except OSError as error:
            raise ValueError(f"{ca} has no certificates in PEM: {_reason(error)}") from None


def _refuse_password():
    raise ValueError("the key has a password, and nobody is there to type it; remove it: openssl pkey -in KEY -out KEY")


def _reason(error):
    return error.strerror if error.errno and not isinstance(error, ssl.SSLError) else error.reason or "no PEM"


def _stamp(path):
    """Return by what a changed file is known; None if it cannot be said."""
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size

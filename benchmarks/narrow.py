"""A narrow link between two processes: a TCP proxy that passes so many bytes a second each way, and no more."""

import contextlib
import socket
import threading
import time

CHUNK = 2048
BUFFER = 16 * 1024  # of the kernel at each end: what is on the link, rather than still at its sender


class Direction:
    """One direction of a link, shared by all connections over it: chunks pass one after another."""

    def __init__(self, bytes_per_s):
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()  # guards the next two
        self._free_at = 0.0  # when the next chunk may pass
        self.passed = 0  # bytes

    def pass_s(self, size):
        """Return for how many seconds a chunk of so many bytes has to wait."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + size / self._bytes_per_s
            self.passed += size
            return self._free_at - now


class NarrowEnd:
    """A port of loopback that stands for a node at the other end of a link; its `port` is to be set once it is known.

    `there` and `back` are the Directions.
    """

    def __init__(self, there, back):
        self.port, self._there, self._back = None, there, back
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)  # connections inherit it
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="narrow-accept", daemon=True).start()

    def close(self):
        self._over.set()
        self._listener.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _accept(self):
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), name="narrow", daemon=True).start()

    def _serve(self, near):
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        with near, far, contextlib.suppress(OSError):
            far.connect(("127.0.0.1", self.port))
            back = threading.Thread(target=self._carry, args=(far, near, self._back), name="narrow-back", daemon=True)
            back.start()
            self._carry(near, far, self._there)
            back.join()

    def _carry(self, source, target, direction):
        """Pass on what arrives, until either side hangs up."""
        target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while (data := source.recv(CHUNK)) and not self._over.wait(direction.pass_s(len(data))):
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

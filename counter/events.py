"""Which sockets can be received from, or sent to: a selector for what is asked with every request.

`selectors` makes objects of every event, which takes a part of the time that a small request does.  So where
there is epoll, it is asked directly.
"""

import contextlib
import select
import selectors
import socket

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
LOOKS = 40  # before it sleeps: together some 15 µs, in which a quick client has sent its next request
REST = 64  # waits without any such looks, after they were in vain
FOUND_MAX = 32  # sockets at a time: the first to be answered waits for the last


class _Events:
    """Waits for sockets.  For one thread.

    A client that sends its next request as soon as it has the answer is looked out for before sleeping:
    to fall asleep and to be woken would take half as long again as its request.  Who serves a client that
    takes its time loses next to nothing, as looks in vain are followed by a rest.
    """

    def __init__(self):
        self._rest = 0  # waits until it looks out again
        self._was_one = False  # the last wait found one socket: with several, there is always another

    def wait(self, timeout_s):
        """Return what was registered with the sockets that can go on, once there are any or the time is up."""
        found = self._look_out() if self._was_one and timeout_s > 0 else None
        found = found or self._poll(max(0, timeout_s))
        self._was_one = len(found) == 1
        return found

    def _look_out(self):
        if self._rest:
            self._rest -= 1
            return None
        for _ in range(LOOKS):
            if found := self._poll(0):
                return found
        self._rest = REST
        return None


class ByEpoll(_Events):
    def __init__(self):
        super().__init__()
        self._epoll = select.epoll()
        self._masks = {READ: select.EPOLLIN, WRITE: select.EPOLLOUT}
        self._registered = {}  # descriptor -> what was registered with it

    def register(self, sock, events, data):
        """Have wait() return `data` when a socket can be received from, or sent to."""
        self._registered[sock.fileno()] = data  # first, or for lack of memory there might be a socket without
        self._epoll.register(sock.fileno(), self._masks[events])

    def modify(self, sock, events):
        """Wait for something else of a registered socket."""
        self._epoll.modify(sock.fileno(), self._masks[events])

    def unregister(self, sock):
        """Forget a socket; to be called before it is closed."""
        with contextlib.suppress(OSError):
            self._epoll.unregister(sock.fileno())
        del self._registered[sock.fileno()]

    def _poll(self, timeout_s):
        registered = self._registered
        return [registered[descriptor] for descriptor, _ in self._epoll.poll(timeout_s, FOUND_MAX)]

    def close(self):
        self._epoll.close()


class BySelector(_Events):
    """The same, where there is no epoll."""

    def __init__(self):
        super().__init__()
        self._selector = selectors.DefaultSelector()

    def register(self, sock, events, data):
        self._selector.register(sock, events, data)

    def modify(self, sock, events):
        self._selector.modify(sock, events, self._selector.get_key(sock).data)

    def unregister(self, sock):
        self._selector.unregister(sock)

    def _poll(self, timeout_s):
        return [key.data for key, _ in self._selector.select(timeout_s)]

    def close(self):
        self._selector.close()


Events = ByEpoll if hasattr(select, "epoll") else BySelector


class Waker:
    """Ends the wait of a thread for Events from other threads; wait() returns None among the others then.

    That thread says in `is_asleep` that it waits, before it looks for the last time whether it has to.
    """

    def __init__(self, events):
        self.is_asleep = False
        self._woken, self._waker = socket.socketpair()
        for sock in (self._woken, self._waker):
            sock.setblocking(False)
        events.register(self._woken, READ, None)

    def wake(self):
        if self.is_asleep:
            self.is_asleep = False
            with contextlib.suppress(BlockingIOError):  # so many that it will wake
                self._waker.send(b"\0")

    def clear(self):
        """Take note that it has woken up."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)

    def close(self):
        self._woken.close()
        self._waker.close()

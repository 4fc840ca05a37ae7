"""When to send to which address: heartbeats, pushes, pacing, backoff, and sends that may hang.

Pure: it knows no socket, and what depends on time takes `now`.  Nothing is scheduled per
increment: **a push is due as long as the peer has confirmed less than this node has counted.**

A send holds a thread until it ends.  Sends that may last until their timeout are limited in number, and
the other threads serve the links that work, so addresses that do not answer delay no live peer.
"""

import logging
import random
import threading

log = logging.getLogger("counter.replication")

NEVER = float("inf")
WANTS_AGAIN_S = 1.0  # after which a peer that wants nothing now is asked whether it does
PACING_S = 0.01  # between two pushes to one peer, times the number of push links
STREAM = 10  # increments in one push that show that many are being counted: the next ones come less often
STREAM_PACING_S = 0.05  # at most, then: so that increments reach all nodes within 100 ms
SLOW_S = 1.0  # a send that takes longer may well take until its timeout
DOUBTFUL_MAX = 8  # sends at a time that may, each in a thread that others need not wait for
FAILURE_S, FAILURES_MAX = 1.0, 10  # how much later, of those, one is tried for each failure
LINK_IDLE_S = 60.0  # a link not used for so long is closed


def backoff_s(failures, base_s, max_s, rng=random):
    """Return the seconds to wait after `failures` (1 or more) failed sends in a row: full jitter.

    Source: Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015).
    """
    return rng.uniform(0, min(max_s, base_s * 2 ** min(failures - 1, 30)))


def cause(error):
    """Return what lies behind an exception of requests, without its wrappings and the names of their classes."""
    wrapped = (getattr(error, "reason", None), *error.args, error.__cause__)
    inner = next((part for part in wrapped if isinstance(part, Exception)), None)
    return error if inner is None else cause(inner)


class PeerRefuses(ValueError):
    """A node answers, but refuses this one: it has another secret, for example, or is of another cluster."""


class Link:
    """What is known of sending to one address.  Its `session` belongs to the worker that has it in flight."""

    def __init__(self, address, is_seed=False):
        self.address, self.is_seed = address, is_seed  # a seed is a name to resolve first
        self.compare_at = NEVER  # when to compare vectors next, or to resolve the name
        self.in_flight = False
        self.compares = True  # the message in flight compares vectors, and does not only push
        self.last_sent_at = -NEVER
        self.pushed_at = -NEVER  # when increments were last pushed, and nothing else was sent
        self.pacing_s = 0.0  # from then to the next push, at least
        self.failures = 0  # sends in a row that got no good answer; the first was logged
        self.refusal = None  # why a node there refuses this one, until it gives a good answer
        self.retry_at = -NEVER  # no push before that; NEVER: until a heartbeat is answered
        self.peer = None  # the replica id that answered last
        self.left = None  # the one that said that it leaves, after it had answered
        self.has_called = False  # a peer that says it is there has sent something by itself
        # Whose entries the next comparison lists beside the recent ones, as they differ; None: all entries.
        self.listed = ()
        self.introduced = False  # the latest answer only said who answers here, so the next must say more
        self.session = None  # the connection over which messages are sent, once there was one

    def is_doubtful(self, now):
        """Return whether a send may well take until its timeout, as one under way already seems to."""
        slow = self.in_flight and now - self.last_sent_at > SLOW_S
        return self.failures > 0 or self.peer is None or slow  # a seed is a name: no id ever answers under it


class Links:
    """The links of a node, and which of them is due.  Threads may call anything at any time.

    `counter` says what this node has counted, `confirmations` what each peer has confirmed of it.
    At most `doubtful_max` sends start at a time that may take until their timeout.
    """

    def __init__(self, counter, confirmations, backoff_s, backoff_max_s, doubtful_max=DOUBTFUL_MAX, rng=random):
        self._counter, self._confirmations, self._rng = counter, confirmations, rng
        self._backoff_s, self._backoff_max_s, self._doubtful_max = backoff_s, backoff_max_s, doubtful_max
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._due_changed = threading.Condition(self._lock)  # one worker waits on it until a link becomes due by itself
        self._idle = threading.Condition(self._lock)  # the others wait on it until there is something to look for
        self._watched = False  # a worker waits on _due_changed
        self._links = {}  # address -> Link
        self._seeds = {}  # name -> Link
        self._scheduled = {}  # the links with a time at which to compare, as an ordered set
        self._in_flight = {}  # the links that a message is on its way over, as an ordered set
        self._push_links = {}  # the links that increments are pushed to at once, as an ordered set
        self._closed = False
        # An increment now would make a push due for which no worker looks by itself.  It is read without
        # the lock, once per increment.
        self.asleep = False

    # What makes a link due.

    def wake(self):
        """Have a worker look for due links after an increment, if none would by itself."""
        if self.asleep:
            with self._lock:
                self.asleep = False
                self._have_look_locked()

    def hurry(self):
        """Have a worker look for due links, as somebody waits for a push."""
        with self._lock:
            self._have_look_locked()

    def compare_soon(self, addresses, now):
        """Compare vectors with those addresses, as soon as they do not back off."""
        with self._lock:
            for address in addresses:
                link = self._link_locked(address)
                self._schedule_locked(link, max(now, link.retry_at))

    def send_heartbeats(self, addresses, seeds, now):
        """Send a heartbeat to those addresses now, and resolve the names of those seeds."""
        with self._lock:
            for address in addresses:
                self._schedule_locked(self._link_locked(address), now)
            for name in seeds:
                self._schedule_locked(self._seeds.setdefault(name, Link(name, is_seed=True)), now)

    def push_addresses(self):
        """Return the addresses that increments are pushed to at once."""
        with self._lock:
            return [link.address for link in self._push_links]

    def push_peers(self):
        """Return the ids that answered last at those addresses."""
        with self._lock:
            return {link.peer for link in self._push_links}

    def push_to(self, addresses, now):
        """Push increments to those addresses from now on, and close the links that are not used any more."""
        with self._lock:
            self._push_links = {self._link_locked(address): None for address in addresses}
            # In a large cluster most peers are contacted rarely: a connection kept for each would
            # grow with the square of the cluster.
            for link in list(self._links.values()):
                used = link in self._push_links or link in self._scheduled or link.in_flight or link.refusal
                if not used and now - link.last_sent_at > LINK_IDLE_S:
                    del self._links[link.address]
            self._have_look_locked()  # the new ones may lack something

    def heard_from(self, address):
        """Record that the peer at an address has sent a heartbeat: it can probably be reached again."""
        with self._lock:
            link = self._link_locked(address)
            link.retry_at, link.has_called = -NEVER, True
            self._have_look_locked()

    def left(self, peers):
        """Record that these replica ids have said that they leave: that they do not answer is no trouble."""
        with self._lock:
            for link in self._links.values():
                if link.peer in peers:
                    link.left = link.peer

    def refusals(self, addresses):
        """Return {address: why} of those of some addresses where a node refuses this one."""
        with self._lock:
            links = [self._links[address] for address in addresses if address in self._links]
            return {link.address: link.refusal for link in links if link.refusal}

    def is_failing(self, address):
        """Return whether the last send to an address got no good answer."""
        with self._lock:
            link = self._links.get(address)
            return link is not None and link.failures > 0

    def _link_locked(self, address):
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = Link(address)
        return link

    def _schedule_locked(self, link, at):
        if at < link.compare_at:
            link.compare_at = at
            self._scheduled[link] = None
            self._have_look_locked()

    def _unschedule_locked(self, link):
        link.compare_at = NEVER
        self._scheduled.pop(link, None)

    def _due_links_locked(self):
        """Yield (when to send over it, link) for all links that are free and have something to send."""
        own, vectors, push_links = self._counter.sequence, self._confirmations.vectors, self._push_links
        replica, pacing_s = self._counter.replica, self._pacing_s_locked()
        is_awaited = self._confirmations.awaited
        for link in self._scheduled:
            if not link.in_flight and link not in push_links:
                yield link.compare_at, link
        for link in push_links:
            if not link.in_flight:
                at = link.compare_at
                if own and vectors.get(link.peer, _NOTHING).get(replica, 0) < own:
                    # A heartbeat does not delay the push after it, or every second some increments would come late.
                    # Nor does pacing beyond its least delay clients who wait for acks.
                    paced = pacing_s if is_awaited else max(pacing_s, link.pacing_s)
                    sent_until = self._confirmations.sent_until(link.peer, replica)
                    at = min(at, max(link.pushed_at + paced, link.retry_at, sent_until))
                if at < NEVER:
                    yield at, link

    def _is_quiet_locked(self):
        """Return whether there is a peer to which the next increment would make a push due."""
        replica, own, vectors = self._counter.replica, self._counter.sequence, self._confirmations.vectors
        return any(
            not link.in_flight and vectors.get(link.peer, _NOTHING).get(replica, 0) >= own for link in self._push_links
        )

    def _pacing_s_locked(self):
        """Return the least time between two pushes to a peer: the more peers, the longer, at the same cost."""
        return PACING_S * len(self._push_links)

    # A send, from its being due to its end.

    def take(self, now):
        """Return a link that is due, now in flight, or None."""
        with self._lock:
            return self._look_locked(now)[0]

    def next_due(self, now):
        """Return when the next link becomes due after `now`; NEVER if none does by itself."""
        with self._lock:
            return min((at for at, _ in self._due_links_locked() if at > now), default=NEVER)

    def next_link(self, clock):
        """Wait until a link is due and return it, now in flight; None once closed.

        One worker waits until the next link becomes due, if one does by itself; the others wait to be told
        to look.  Otherwise all of them would wake up for each link.
        """
        with self._lock:
            while not self._closed:
                if self._watched:
                    self._idle.wait()
                    continue
                self.asleep = True  # before it looks: from here on an increment wakes it
                now = clock()
                link, due_at = self._look_locked(now)
                self.asleep = self._is_quiet_locked()
                if link:
                    if due_at < NEVER:
                        self._idle.notify()  # to wait for that, or to send it
                    return link
                self._watched = True
                self._due_changed.wait(None if due_at == NEVER else due_at - now)
                self._watched = False
        return None

    def _have_look_locked(self):
        """Have a worker look for due links, if one waits."""
        (self._due_changed if self._watched else self._idle).notify()

    def close(self):
        """Wake all workers that wait for a link and refuse new waits; called when the node stops."""
        with self._lock:
            self._closed = True
            self._due_changed.notify_all()
            self._idle.notify_all()

    def _look_locked(self, now):
        """Return (a link that is due, now in flight, or None; when the next is due by itself)."""
        due, next_at = [], NEVER
        for at, link in self._due_links_locked():
            if at <= now:
                due.append((at, link))
            else:
                next_at = min(next_at, at)
        if not due:
            return None, next_at
        if len(due) > 1:  # only one is taken
            next_at = now
        working = [(at, link) for at, link in due if not link.is_doubtful(now)]
        if working:
            _, link = min(working, key=lambda entry: entry[0])
        elif sum(link.is_doubtful(now) for link in self._in_flight) < self._doubtful_max:
            # A peer that failed once comes before those that fail all the time, but these get their turn too.
            _, link = min(due, key=lambda entry: entry[0] + FAILURE_S * min(entry[1].failures, FAILURES_MAX))
        else:  # the end of another send notifies the worker that waits
            return None, next_at
        link.in_flight, link.last_sent_at = True, now
        self._in_flight[link] = None
        link.compares = link.compare_at <= now or link.failures > 0 or link.peer not in self._confirmations.vectors
        if link.compare_at <= now:
            self._unschedule_locked(link)
        if not link.compares:
            link.pushed_at, link.pacing_s = now, self._next_pacing_s_locked(link)
        return link, next_at

    def _next_pacing_s_locked(self, link):
        """Return how long the push after the one over this link has to wait: longer while increments stream."""
        confirmed = self._confirmations.vectors.get(link.peer, _NOTHING).get(self._counter.replica, 0)
        if self._counter.sequence - confirmed < STREAM:
            return 0.0
        return min(STREAM_PACING_S, 2 * max(link.pacing_s, self._pacing_s_locked()))

    def answered(self, link, peer, again=False, push_at=-NEVER, now=0.0):
        """Record that `peer`, a replica id, gave a good answer; the link is free again.

        With `again`, compare vectors once more, soon.  Push nothing before `push_at`; if that is NEVER,
        before a heartbeat is answered.
        """
        with self._lock:
            recovered, link.failures, link.refusal = link.failures > 0, 0, None
            link.retry_at = push_at
            link.peer = peer
            self._release_locked(link)
            if again:
                self._schedule_locked(link, max(now, link.last_sent_at + self._pacing_s_locked()))
        if recovered:
            log.info("recovered: addr=%s", link.address)

    def introduced(self, link, peer, now):
        """Record that `peer` answers at that address; what was to be sent is due at once.

        Return False if that was so before as well; the link is not free then.
        """
        with self._lock:
            link.peer = peer
            if link.introduced:
                return False
            self._release_locked(link)
            link.introduced = True
            self._schedule_locked(link, now)
            return True

    def failed(self, link, error, now):
        """Record that a send got no good answer; the link is free again."""
        with self._lock:
            link.failures += 1
            first = link.failures == 1
            if isinstance(error, PeerRefuses):
                link.refusal = str(error)
            link.retry_at = now + backoff_s(link.failures, self._backoff_s, self._backoff_max_s, self._rng)
            self._unschedule_locked(link)
            if link in self._push_links:  # other links are retried by sweeps only
                self._schedule_locked(link, link.retry_at)
            self._release_locked(link)
        level, what = logging.WARNING, "retrying"
        if isinstance(error, OSError) and not link.has_called and link.peer is None:  # it may not have started yet
            level, what = logging.INFO, "no answer yet"
        elif isinstance(error, OSError) and link.peer is not None and link.left == link.peer:
            level, what = logging.INFO, "no answer since it left"
        # A peer that stays down is logged once, not per try.
        log.log(level if first else logging.DEBUG, "%s: addr=%s error=%s", what, link.address, cause(error))

    def released(self, link):
        """Record that there was nothing to send, or that a seed was resolved; the link is free again."""
        self.answered(link, link.peer)

    def _release_locked(self, link):
        link.in_flight = link.introduced = False
        self._in_flight.pop(link, None)
        # This link may be due again, or another may have waited for a worker.  The one that calls this looks next.
        self._due_changed.notify()


_NOTHING = {}  # the vector of a peer that has confirmed nothing yet

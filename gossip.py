"""What to send to whom, and what to make of what they send.

Pure: it knows neither sockets nor threads, and what depends on time takes `now`.
"""

import logging
import random
import threading

from counter.binding import Numbers
from counter.roster import LOST
from counter.state import APPLIED, GAP, NEEDS, SEQUENCE_MAX
from counter.wire import Message, View, lacks, vector_hash
from peers import NEVER, log_changes

log = logging.getLogger("counter.replication")

DELTAS_MAX = 2**20  # bytes of deltas in a message of several replicas, roughly
VECTOR_SHORT = 16  # replicas; a longer vector is compared by its hash first
PACING_S = 0.01  # between two pushes to one peer, times the peers pushed to
SLOW_S = 1.0  # a send that takes longer may well take until its timeout
DOUBTFUL_MAX = 8  # sends at a time that may, each in a thread that others need not wait for
FAILURE_S, FAILURES_MAX = 1.0, 10  # how much later, of those, one is tried for each failure
LINK_IDLE_S = 60.0  # a link not used for so long is closed
NO_VIEW = View([], [])  # what a mere push shows


def backoff_s(failures, base_s, max_s, rng=random):
    """Return the seconds to wait after `failures` (1 or more) failed sends in a row: full jitter.

    Source: Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015).
    """
    return rng.uniform(0, min(max_s, base_s * 2 ** min(failures - 1, 30)))


def _cause(error):
    """Return what lies behind an exception of requests, without its wrappings."""
    wrapped = (getattr(error, "reason", None), *error.args)
    inner = next((part for part in wrapped if isinstance(part, Exception)), None)
    return error if inner is None else _cause(inner)


class _Link:
    """What is known of sending to one address.  Its `session` belongs to the worker that has it in flight."""

    def __init__(self, address, is_seed=False, agreed=False):
        self.address, self.is_seed = address, is_seed  # a seed is a name to resolve first
        self.compare_at = NEVER  # when to compare vectors next, or to look up the name
        self.in_flight = False
        self.compare = True  # the message in flight compares vectors, and does not only push
        self.started = -NEVER  # when it was last sent to
        self.pushed = -NEVER  # when increments were last pushed to it, and nothing else
        self.failures = 0  # sends in a row that got no good answer; the first was logged
        self.retry_at = -NEVER  # before that only heartbeats are sent; NEVER: until one is answered
        self.peer = None  # the replica id that answered last
        self.confirmed = None  # the vector it last confirmed, never changed in place; None: unknown
        self.agreed = agreed  # the vectors were equal when they were last compared, or most likely are
        self.introduced = False  # the latest answer only said who answers here, so the next must say more
        self.told_leaving = False  # it has answered a message that said this node is leaving
        self.session = None  # with `prepared`, the request that is sent over it with ever new bodies
        self.prepared = None

    def is_doubtful(self, now):
        """Return whether a send may well take until its timeout, as one under way already seems to."""
        slow = self.in_flight and now - self.started > SLOW_S
        return self.failures > 0 or self.peer is None or slow  # a seed is a name: no id ever answers under it

    def holds(self, replica, sequence):
        """Return whether the peer is known to hold a dot; its own it holds anyway."""
        return self.peer == replica or (self.confirmed is not None and self.confirmed.get(replica, 0) >= sequence)


class Gossip:
    """Who is to be sent what, and what to make of what they send.

    Threads may call anything at any time.  `pushed_to` active peers at most get increments at
    once; at most `doubtful_max` sends start at a time that may take until their timeout.
    """

    def __init__(
        self, counter, table, retry_backoff_s, retry_backoff_max_s, pushed_to, doubtful_max=DOUBTFUL_MAX, rng=random
    ):
        self._counter, self._table, self._rng = counter, table, rng
        self._backoff_s, self._backoff_max_s = retry_backoff_s, retry_backoff_max_s
        self._pushed_to, self._doubtful_max = pushed_to, doubtful_max
        # Guards everything below.  Held for dictionary work only, never together with another.
        self._lock = threading.Lock()
        self._due = threading.Condition(self._lock)  # one worker waits on it for a link to become due
        self._idle = threading.Condition(self._lock)  # the others wait on it to take that one's place
        self._watched = False  # a worker waits on _due
        self._confirming = threading.Condition(self._lock)  # drain() waits on it for answers
        self._awaited = {}  # threading.Event -> (replica, sequence): who waits for acks of that dot
        self._links = {}  # address -> _Link
        self._seed_links = {}  # name -> _Link
        self._scheduled = {}  # the links with a time at which to compare, as an ordered set
        self._in_flight = {}  # the links that a message is on its way over, as an ordered set
        self._pushed = {}  # the links that increments are pushed to at once, as an ordered set
        self._agreed = False  # the vectors of this node and another were equal at the last comparison
        self._number = 0  # of the latest request
        self._numbers = Numbers()  # of the requests that came; it has a lock of its own
        self._hashed = (None, None)  # a vector and its hash, the last one that was needed
        # A worker waits, and an increment now would make a push due that it does not wait for.  Whoever
        # counts reads this without the lock.
        self.asleep = False
        self._caught_up = False  # everything that some peer held was held here, at least once
        self._impatient = False  # nobody is to wait for acks any more
        self._closed = False

    @property
    def caught_up(self):
        return self._caught_up

    # What makes a link due.

    def wake(self):
        """Have a worker look what is due after an increment, where none would by itself."""
        if self.asleep:
            with self._lock:
                self.asleep = False
                self._due.notify()

    def contact(self, addresses, now):
        """Compare vectors with those addresses, as soon as they do not back off."""
        with self._lock:
            for address in addresses:
                link = self._link_locked(address)
                self._schedule_locked(link, max(now, link.retry_at))

    def swept(self, addresses, seeds, now):
        """Send a heartbeat to those addresses now, and resolve the names of those seeds."""
        with self._lock:
            for address in addresses:
                self._schedule_locked(self._link_locked(address), now)
            for name in seeds:
                self._schedule_locked(self._seed_links.setdefault(name, _Link(name, is_seed=True)), now)
        self._follow_membership(now)
        self._counter.expire(now)

    def _follow_membership(self, now):
        """Choose whom to push to, and close the links that are not used any more."""
        with self._lock:
            kept = [link.address for link in self._pushed]
        chosen = dict.fromkeys(self._table.choose(kept, self._pushed_to))
        with self._lock:
            self._pushed = {self._link_locked(address): None for address in chosen}
            # In a large cluster most peers are contacted rarely: a connection and a vector kept
            # for each would grow with the square of the cluster.
            for link in list(self._links.values()):
                used = link in self._pushed or link in self._scheduled or link.in_flight
                if not used and now - link.started > LINK_IDLE_S:
                    del self._links[link.address]
            self._due.notify()  # those who are new may lack something
            self._confirming.notify_all()  # nobody is to wait for a peer that is gone

    def _link_locked(self, address):
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = _Link(address, agreed=self._agreed)
        return link

    def _schedule_locked(self, link, at):
        if at < link.compare_at:
            link.compare_at = at
            self._scheduled[link] = None
            self._due.notify()

    def _unschedule_locked(self, link):
        link.compare_at = NEVER
        self._scheduled.pop(link, None)

    def _dues_locked(self):
        """Yield (when to send over it, link) for all links that are free and have something to send."""
        replica, own, pushed = self._counter.replica, self._counter.sequence, self._pushed
        pacing_s = self._pacing_s_locked()
        for link in self._scheduled:
            if not link.in_flight and link not in pushed:
                yield link.compare_at, link
        for link in pushed:
            if not link.in_flight:
                at = link.compare_at
                if own and (not link.confirmed or link.confirmed.get(replica, 0) < own):
                    # A heartbeat does not delay the push after it, or every second some increments would come late.
                    at = min(at, max(link.pushed + pacing_s, link.retry_at))
                if at < NEVER:
                    yield at, link

    def _is_quiet_locked(self):
        """Return whether there is a peer to which the next increment would make a push due."""
        replica, own = self._counter.replica, self._counter.sequence
        return any(not link.in_flight and (link.confirmed or {}).get(replica, 0) >= own for link in self._pushed)

    def _pacing_s_locked(self):
        """Return the least time between two pushes to a peer: the more peers, the longer, at the same cost."""
        return PACING_S * len(self._pushed)

    # A send, from its being due to its end.

    def take(self, now):
        """Return a link that is due, now in flight, or None."""
        with self._lock:
            return self._look_locked(now)[0]

    def next_due(self, now):
        """Return when the next link becomes due after `now`; NEVER if none does by itself."""
        with self._lock:
            return min((at for at, _ in self._dues_locked() if at > now), default=NEVER)

    def next_link(self, clock):
        """Wait until a link is due and return it, now in flight; None once closed.

        One worker waits for the time at which the next link becomes due, all others to take its
        place once it has a link: or all would wake up at that time.
        """
        with self._lock:
            while not self._closed:
                if self._watched:
                    self._idle.wait()
                    continue
                self.asleep = True  # before it looks: from here on an increment wakes it
                now = clock()
                link, due_at = self._look_locked(now)
                self.asleep = link is None and self._is_quiet_locked()
                if link:
                    self._idle.notify()
                    return link
                self._watched = True
                self._due.wait(None if due_at == NEVER else due_at - now)
                self._watched = False
        return None

    def close(self):
        """Let everyone go who waits for a link, now and from now on."""
        with self._lock:
            self._closed = True
            self._due.notify_all()
            self._idle.notify_all()

    def _look_locked(self, now):
        """Return (a link that is due, now in flight, or None; when the next becomes due)."""
        due, next_at = [], NEVER
        for at, link in self._dues_locked():
            if at <= now:
                due.append((at, link))
            else:
                next_at = min(next_at, at)
        if not due:
            return None, next_at
        working = [(at, link) for at, link in due if not link.is_doubtful(now)]
        if working:
            _, link = min(working, key=lambda entry: entry[0])
        elif sum(link.is_doubtful(now) for link in self._in_flight) < self._doubtful_max:
            # A peer that failed once comes before all the dead, but they have their turn as well.
            _, link = min(due, key=lambda entry: entry[0] + FAILURE_S * min(entry[1].failures, FAILURES_MAX))
        else:  # one that has to wait is taken at the end of another send
            return None, next_at
        link.in_flight, link.started = True, now
        self._in_flight[link] = None
        link.compare = link.compare_at <= now
        if link.compare:
            self._unschedule_locked(link)
        else:
            link.pushed = now
        return link, next_at

    def request(self, link, now):
        """Return the Message to send over a link in flight; None if there is nothing to say."""
        vector, replica = self._counter.vector(), self._counter.replica
        to = link.peer or self._table.id_at(link.address)
        with self._lock:
            self._number += 1
            number = self._number
            known, agreed = link.confirmed, link.agreed
            failing = link.failures > 0
            compare = link.compare or failing or known is None
        if to is None:  # it is asked who it is, and told nothing else
            return Message(self._table.sender(), NO_VIEW, None, None, None, [], number=number)
        if compare:
            sender, view = self._table.describe()
            # After a failure it is enough to find out what the peer holds: it may have arrived.
            deltas = self._counter.deltas(known, DELTAS_MAX, now) if known is not None and not failing else []
            hash = self._hash(vector) if agreed and len(vector) > VECTOR_SHORT else None
            return Message(sender, view, vector, hash, None, deltas, to=to, number=number)
        delta = self._counter.delta(replica, known.get(replica, 0), now)
        if not delta:
            return None
        return Message(self._table.sender(), NO_VIEW, None, None, None, [delta], to=to, number=number)

    def _hash(self, vector):
        """Return the hash of a vector of this node; most often that of the last time."""
        known, hash = self._hashed
        if known is not vector:
            hash = vector_hash(vector)
            self._hashed = (vector, hash)  # vectors are never changed in place
        return hash

    def answered(self, link, request, answer, now):
        """Take in the answer to a request that was sent over a link; the link is free again.

        Raises ValueError if it does not answer the request, and then the link is not free yet.
        """
        if answer.number is not None:
            self._introduced(link, answer, now)
            return
        if request.to is None:
            raise ValueError("the answer to who is there does not say it")
        if request.applied is not None and answer.applied is None and answer.hash is None:
            raise ValueError("the answer to a heartbeat lacks a vector")
        contact, changes = self._table.heard(answer.sender, answer.view, now, answered_at=link.address)
        merged = APPLIED in self._merge(answer, now).values()
        mine, replica = self._counter.vector(), self._counter.replica
        with self._lock:
            link.told_leaving = request.sender.leaving
            before = link.confirmed if link.peer == answer.sender.id else None
            link.peer = answer.sender.id
            link.confirmed = self._confirmed(before, request, answer)
            self._wake_locked(before, link.confirmed)
            if request.applied is not None:
                self._agreed = link.agreed = link.confirmed == request.applied
                self._caught_up = self._caught_up or (link.peer != replica and not lacks(mine, link.confirmed))
            recovered, link.failures, link.retry_at = link.failures > 0, 0, -NEVER
            self._release_locked(link)
            if link.peer != replica:
                progressed = merged or link.confirmed != before or request.hash is not None
                self._follow_up_locked(link, request, answer, before, mine, progressed, now)
            self._confirming.notify_all()
        if recovered:
            log.info("recovered: addr=%s", link.address)
        self._membership_changed(contact, changes, now)

    def _introduced(self, link, answer, now):
        """Take note of who answers at an address: a request was for another process, or its number was not new."""
        contact, changes = self._table.heard(answer.sender, NO_VIEW, now, answered_at=link.address)
        with self._lock:
            self._number = max(self._number, answer.number)
            if link.peer != answer.sender.id:
                link.peer, link.confirmed = answer.sender.id, None
            again = link.introduced
            if not again:
                self._release_locked(link)
                link.introduced = True
                self._schedule_locked(link, now)
        self._membership_changed(contact, changes, now)
        if again:
            raise ValueError("it takes nothing that is addressed to it")

    @staticmethod
    def _confirmed(before, request, answer):
        """Return the vector that an answer confirms: it replaces what was known before."""
        if answer.hash is not None:
            return request.applied  # it holds just that
        if answer.applied is not None:
            return answer.applied
        return before if before is None else {**before, **(answer.confirms or {})}

    def _follow_up_locked(self, link, request, answer, before, mine, progressed, now):
        """Compare vectors again where an answer showed that one side still lacks something."""
        own, confirmed, compared = request.sender.id, link.confirmed, request.applied is not None
        sent = max((delta.through for delta in request.deltas if delta.replica == own), default=0)
        if confirmed is None or (answer.refused and not compared):
            again = True
        elif confirmed.get(own, 0) < sent:  # it did not take what this node counted
            again = not compared
            if compared and before.get(own, 0) == confirmed.get(own, 0):
                link.retry_at = NEVER  # nor will it: further pushes wait for the next heartbeat
        else:
            # Compared with what was held as the request was cut: of what arrived since, its
            # own node tells the peer.  Without progress the next heartbeat is soon enough.
            again = compared and progressed and (lacks(mine, confirmed) or lacks(confirmed, request.applied))
        if again:
            self._schedule_locked(link, max(now, link.started + self._pacing_s_locked()))

    def failed(self, link, error, now):
        """Take note that a send came to nothing; the link is free again."""
        with self._lock:
            link.failures += 1
            first = link.failures == 1
            link.retry_at = now + backoff_s(link.failures, self._backoff_s, self._backoff_max_s, self._rng)
            self._unschedule_locked(link)
            if link in self._pushed:  # others are tried again by the sweeps alone
                self._schedule_locked(link, link.retry_at)
            self._release_locked(link)
        # A peer that stays down is one line, not one per try.  One that never answered may not have started yet.
        starting = link.peer is None and isinstance(error, OSError)
        level = logging.DEBUG if not first else logging.INFO if starting else logging.WARNING
        what = "no answer yet" if starting else "retrying"
        log.log(level, "%s: addr=%s error=%s", what, link.address, _cause(error))

    def released(self, link):
        """Take note that there was nothing to send, or that a seed was looked up; the link is free again."""
        with self._lock:
            recovered, link.failures = link.failures > 0, 0
            self._release_locked(link)
        if recovered:
            log.info("recovered: addr=%s", link.address)

    def _release_locked(self, link):
        link.in_flight = link.introduced = False
        self._in_flight.pop(link, None)
        self._due.notify()  # it may be due again, and another may have waited for its end

    # What others send.

    def receive(self, message, now, reached_at=None):
        """Take in what a peer sent by itself; return the answer to it, a Message.

        `reached_at` is the address of this node that it came to, if it is not known yet which to tell
        peers.  A message for another process, or with a number that came before, may be a recording:
        it is answered with who this is, and changes nothing.
        """
        id, replica = message.sender.id, self._counter.replica
        if message.to != replica or message.number is None or not self._numbers.take(id, message.number):
            return Message(self._table.sender(), NO_VIEW, None, None, None, [], number=self._numbers.latest(id))
        if reached_at and id != replica:
            self._table.advertise(reached_at)
        contact, changes = self._table.heard(message.sender, message.view, now)
        results = self._merge(message, now)
        mine = self._counter.vector()
        with self._lock:
            link = self._links.get(message.sender.address)
            if link and (message.applied is not None or message.hash is not None):
                link.retry_at = -NEVER  # whoever sends heartbeats can be reached again, most likely
            if message.applied is not None and id != replica:
                self._caught_up = self._caught_up or not lacks(mine, message.applied)
                if link and link.peer == id:
                    self._wake_locked(link.confirmed, message.applied)
                    link.confirmed = message.applied
                    self._confirming.notify_all()
        self._membership_changed(contact, changes, now)
        compares = message.applied is not None or message.hash is not None
        sender, view = self._table.describe() if compares else (self._table.sender(), NO_VIEW)
        confirms = {delta.replica: mine.get(delta.replica, 0) for delta in message.deltas} or None
        refused = {replica: result for replica, result in results.items() if result in (GAP, NEEDS)}
        if message.applied is not None:
            # What it counts itself it knows best.
            known = {**message.applied, id: SEQUENCE_MAX}
            deltas, agreed = self._counter.deltas(known, DELTAS_MAX, now), message.applied == mine
        elif message.hash is not None:
            deltas, agreed = [], message.hash == self._hash(mine)
        else:
            return Message(sender, view, None, None, confirms, [], refused)
        hash = self._hash(mine) if agreed and len(mine) > VECTOR_SHORT else None
        return Message(sender, view, mine, hash, confirms, deltas, refused)

    def _wake_locked(self, before, confirmed):
        """Wake those who wait for acks of a dot that a peer has confirmed just now; both are vectors or None.

        Nobody else: hundreds may wait, and hundreds of answers arrive in a second.
        """
        before, confirmed = before or {}, confirmed or {}
        for event, (replica, sequence) in self._awaited.items():
            if before.get(replica, 0) < sequence <= confirmed.get(replica, 0):
                event.set()

    def _wake_all_locked(self):
        for event in self._awaited:
            event.set()

    def _merge(self, message, now):
        """Merge the deltas of a message; return what each was found to be, by its replica."""
        results = {delta.replica: self._counter.merge(delta, now) for delta in message.deltas}
        if any(self._counter.renew_if_cloned(known) for known in (message.applied, message.confirms) if known):
            log.error("replica id used twice, was this machine cloned? new id=%s", self._counter.replica)
            self._table.rename(self._counter.replica)
        return results

    def _membership_changed(self, contact, changes, now):
        if contact:
            self.contact(contact, now)
        if changes:
            log_changes(changes, len(self._table.active()))
            with self._lock:
                self._wake_all_locked()  # a peer that is back counts again
                self._confirming.notify_all()  # nobody is to wait for a peer that is gone
                gone = {change.address for change in changes if change.what in ("left", "restarted")}
                full = len(self._pushed) == self._pushed_to and all(link.address not in gone for link in self._pushed)
            if not full:  # or the cost of N changes would grow with the square of N
                self._follow_membership(now)

    # What others ask.

    def unconfirmed(self):
        """Return {address: number of increments it has yet to confirm}, of all that have confirmed any.

        Those that this node has to see to: its own, and those of nodes that are gone.  What active
        nodes count they push themselves; that it arrived this node hears later, from a heartbeat.
        """
        mine, active = self._counter.vector(), {id for id, _ in self._table.active()}
        owed = [(replica, sequence) for replica, sequence in mine.items() if replica not in active]
        with self._lock:
            links = [(link.address, link.peer, link.confirmed) for link in self._links.values()]
        return {
            address: sum(max(0, sequence - confirmed.get(replica, 0)) for replica, sequence in owed if replica != peer)
            for address, peer, confirmed in links
            if confirmed is not None
        }

    def wait_for_acks(self, replica, sequence, wanted, clock, timeout_s):
        """Wait until that many nodes, this one included, hold a dot; return how many do."""
        deadline, event = clock() + timeout_s, threading.Event()
        with self._lock:
            self._awaited[event] = (replica, sequence)
        try:
            while True:
                event.clear()
                active = {id for id, _ in self._table.active()}
                with self._lock:
                    holders = {link.peer for link in self._links.values() if link.holds(replica, sequence)}
                    impatient = self._impatient
                reached = 1 + len(holders & active)
                if reached >= wanted or impatient or not event.wait(deadline - clock()):
                    return reached
        finally:
            with self._lock:
                del self._awaited[event]

    def stop_waiting(self):
        """Let everyone go who waits for acks, now and from now on: the node is stopping."""
        with self._lock:
            self._impatient = True
            self._wake_all_locked()

    def drain(self, clock, timeout_s):
        """Tell all active peers everything and that this node leaves; return whether all confirmed."""
        self._table.leave()
        mine = self._counter.vector()  # what peers tell it from now on they hold anyway
        told = dict(self._table.active())
        self.swept(told.values(), [], clock())
        deadline = clock() + timeout_s
        while True:
            # Some may leave as well, or turn out to have restarted, and then their successors are told.
            # Of those that are lost meanwhile, who lacks nothing is let go.
            new = dict(self._table.active()).items() - told.items()
            if new:
                told.update(new)
                self.contact([address for _, address in new], clock())
            states = {peer.id: peer.state for peer in self._table.snapshot(clock()) if peer.id in told}
            with self._lock:
                links = [(self._link_locked(told[id]), state == LOST) for id, state in states.items()]
                if all((link.told_leaving or lost) and not lacks(link.confirmed or {}, mine) for link, lost in links):
                    return True
                if not self._confirming.wait(deadline - clock()):
                    return False

"""What to send to whom, and what to make of what they send.

Pure: it knows neither sockets nor threads, and what depends on time takes `now`.
"""

import logging
import threading

from counter.binding import Numbers
from counter.clocks import Clocks
from counter.confirmations import NOTHING_HELD, is_long
from counter.deltas import APPLIED, GAP, NEEDS
from counter.freshness import Freshness
from counter.ids import SEQUENCE_MAX
from counter.leaving import Leaving, all_absorb
from counter.links import LINK_IDLE_S, NEVER, WANTS_AGAIN_S
from counter.past import Past
from counter.roster import LOST
from counter.vectors import Vector
from counter.wire import ABSORBING, Message, View
from peers import log_changes

log = logging.getLogger("counter.replication")

DELTAS_MAX = 2**18  # bytes of deltas in a message of several replicas, roughly
SUMMARIES_SINCE = 2  # the wire.VERSION of nodes that understand the summary of a vector
NO_VIEW = View([], [])  # what a mere push shows


class Gossip:
    """What to send to whom, and what to make of what they send.

    Threads may call anything at any time.  At most `push_fanout` active peers get increments at once.
    """

    def __init__(self, counter, table, links, confirmations, joining, push_fanout):
        self._counter, self._table, self._links = counter, table, links
        self._confirmations, self._joining = confirmations, joining
        self._push_fanout = push_fanout
        self.freshness = Freshness(table, links)
        self.leaving = Leaving(counter, table, links, confirmations)
        # Guards the number.  Never held together with another.
        self._lock = threading.Lock()
        self._number = 0  # of the latest request
        self._numbers = Numbers()  # of the requests that came
        self._clocks = Clocks()
        self.past = Past(counter, table)
        self._say_if_ready()

    def swept(self, addresses, seeds, now):
        """Do what a sweep asks for: send heartbeats to those addresses, and resolve the names of those seeds."""
        self._links.send_heartbeats(addresses, seeds, now)
        self._follow_membership(now)
        self.freshness.look(now)  # the sweep may have found peers to be lost
        self._counter.expire(now)
        self.past.look(now)
        self._absorb()
        if not self._joining.ready:
            self._links.compare_soon(self._joining.givers.end(self._links.is_failing), now)
            refusals = self._links.refusals(self._table.seed_addresses())
            own, mine = self._counter.replica, self._counter.vector()
            self._joining.look(now, own, mine, self._table.present(), refusals)
            self._say_if_ready()

    def _absorb(self):
        """Absorb a replica that has ended and is gone, if it made this node its heir."""
        if all_absorb(self._table) and (absorbed := self._counter.absorb(kept=self._table.present())):
            log.info("absorbed: id=%s", absorbed)

    def _say_if_ready(self):
        if self._joining.ready:
            self._table.become_ready()

    def _follow_membership(self, now):
        """Choose the push links, and drop links and vectors that are not used any more."""
        chosen = self._table.choose(self._links.push_addresses(), self._push_fanout)
        self._links.push_to(chosen, now)
        lost = {peer.id for peer in self._table.snapshot(now) if peer.state == LOST}
        self._confirmations.forget_idle(now - LINK_IDLE_S, lost | self._links.push_peers())

    def _heard_vector(self, sender, address, vector, mine, now):
        if not self._joining.ready:
            self._joining.heard(sender.id, sender.ready, vector, mine)
            self._say_if_ready()
            lacks = self._counter.lacks(mine, vector)
            self._links.compare_soon(self._joining.givers.compared(address, sender.id, lacks), now)

    # A message to another node, and its answer.

    def request(self, link, now):
        """Return the Message to send over a link in flight; None if there is nothing to say."""
        vector, replica = self._counter.vector(), self._counter.replica
        to = link.peer or self._table.id_at(link.address)
        known = self._confirmations.to_send_from(to, now)
        with self._lock:
            self._number += 1
            number = self._number
        if to is None:  # it is asked who it is, and told nothing else
            return Message(self._table.sender(), NO_VIEW, None, None, None, [], number=number, clock=now)
        if link.compares or known is None or self._withholds(self._table.v_of(to), known):
            sender, view = self._table.describe()
            # After a failure it is enough to find out what the peer holds: it may have arrived.
            deltas = self._deltas(self._table.v_of(to), known, now) if known is not None and not link.failures else []
            deltas = self._confirmations.requested(to, deltas, now)
            summary = _summary(vector, known, link.listed) if self._table.v_of(to) >= SUMMARIES_SINCE else None
            wants = self._wants(to, vector) or (not link.failures and self._joining.givers.take(link.address, to, now))
            return Message(sender, view, vector, summary, None, deltas, to=to, number=number, clock=now, wants=wants)
        delta = self._counter.delta(replica, known.get(replica, 0), now)
        deltas = self._confirmations.requested(to, [delta], now) if delta else []
        if not deltas:
            return None
        return Message(self._table.sender(), NO_VIEW, None, None, None, deltas, to=to, number=number, clock=now)

    def _wants(self, peer, mine):
        """Return whether a peer may send what it holds, whoever else does; `mine` is the vector of this node."""
        shown = self._confirmations.vectors.get(peer)
        return self._joining.ready or (shown is not None and not self._counter.lacks(mine, shown))

    def _deltas(self, v, known, now):
        """Return what a peer lacks that holds the vector `known`, as far as one with a version `v` understands it."""
        return self._counter.deltas(known, DELTAS_MAX, now, with_endings=v >= ABSORBING)

    def _withholds(self, v, known):
        """Return whether what this node counted itself has to wait until a peer, now of version `v`, is a newer one.

        A peer that ignores what was absorbed would count it twice.
        """
        own = self._counter.replica
        return v < ABSORBING and self._counter.has_endings(own, known.get(own, 0))

    def answered(self, link, request, answer, now):
        """Take in the answer to a request that was sent over a link, and free the link.

        Raises ValueError if it does not answer the request.  If anything is raised, the link is still to be freed.
        """
        cut_at = self._clocks.cut_at(answer.sender.id, answer.clock, now, request.clock)
        if answer.number is not None:
            self._introduced(link, answer, now)
            return
        if request.to is None:
            raise ValueError("the answer to who is there does not say it")
        if request.applied is not None and not answer.compares:
            raise ValueError("the answer to a heartbeat lacks a vector")
        peer, own = answer.sender.id, self._counter.replica
        contact, changes = self._table.heard(answer.sender, answer.view, now, answered_at=link.address)
        self._compare_clocks(request, answer, now)
        merged = APPLIED in self._merge(answer, cut_at).values()
        mine = self._counter.vector()
        shown = request.applied if answer.hash is not None else _shown(answer, request.applied)
        if answer.summary is not None:
            link.listed = _to_list(request, shown, mine)
        before = self._confirmations.vectors.get(peer)
        confirmed = before if shown is None else shown
        if confirmed is not None and answer.confirms:  # beside a vector, they say what was absorbed there
            confirmed = confirmed.updated(answer.confirms)
        self._confirmations.confirm(peer, confirmed if answer.wants else None, now)
        if request.sender.leaving:
            self._confirmations.knows_of_leaving(peer)
        again, push_at = False, -NEVER
        if peer != own and request.applied is None:
            again = _was_not_taken(request, answer, confirmed)
        elif peer != own:
            if shown is not None:
                self._heard_vector(answer.sender, link.address, shown, mine, now)
                if not self._counter.lacks(mine, shown):
                    self.freshness.compared(peer, link.last_sent_at, now)
            again, push_at = self._follow_up(request, answer, before, shown, confirmed, mine, merged)
            if not answer.wants:
                again, push_at = again and merged, now + WANTS_AGAIN_S
        self._membership_changed(contact, changes, now)
        self._links.answered(link, peer, again, push_at, now)  # the last thing: from here on it may be another thread's

    def _introduced(self, link, answer, now):
        """Take note of who answers at an address: a request was for another process, or its number was not new."""
        contact, changes = self._table.heard(answer.sender, NO_VIEW, now, answered_at=link.address, took=False)
        with self._lock:
            self._number = max(self._number, answer.number)
        self._membership_changed(contact, changes, now)
        if not self._links.introduced(link, answer.sender.id, now):
            raise ValueError("it takes nothing that is addressed to it")

    def _compare_clocks(self, request, answer, now):
        skew_s = self._table.compare_clocks(request.sender, answer.sender, now - request.clock)
        if skew_s is not None:
            log.warning("wall clocks differ: addr=%s skew_s=%+.1f", answer.sender.address, skew_s)

    def _follow_up(self, request, answer, before, shown, confirmed, mine, merged):
        """Return whether to compare vectors once more, and when to push again."""
        own, lacks = request.sender.id, self._counter.lacks
        if shown is None:
            return True, -NEVER
        if shown.get(own) < _sent(request) or self._withholds(answer.sender.v, shown):
            # It did not take what this node counted, nor will it unless that changes.
            return False, NEVER if (before or NOTHING_HELD).get(own) == shown.get(own) else -NEVER
        # The peer could make sense of a summary only if it listed all that differs.
        understood = request.summary is None or request.applied.differing(shown) <= request.summary.recent.keys()
        if not (merged or before is None or confirmed != before or not understood):  # the next heartbeat is soon enough
            return False, -NEVER
        # Compared with what was held as the request was cut: of what arrived since, its own node tells
        # the peer.  What came in a long answer the peer sends on from only once it knows that it arrived.
        news = request.wants and lacks(mine, shown)
        return is_long(answer.deltas) or news or lacks(confirmed, request.applied), -NEVER

    # What others send.

    def receive(self, message, now, reached_at=None):
        """Take in what a peer sent by itself; return the answer to it, a Message.

        `reached_at` is the address of this node that it came to, if it is not known yet which to tell
        peers.  A message for another process, or with a number that came before, may be a recording:
        it is answered with who this is, and changes nothing.
        """
        id, replica = message.sender.id, self._counter.replica
        cut_at = self._clocks.cut_at(id, message.clock, now)
        if not self._is_for_this(message) or not self._numbers.take(id, message.number):
            return Message(
                self._table.sender(), NO_VIEW, None, None, None, [], number=self._numbers.latest(id), clock=now
            )
        if reached_at and id != replica:
            self._table.advertise(reached_at)
        contact, changes = self._table.heard(message.sender, message.view, now)
        results = self._merge(message, cut_at)
        mine = self._counter.vector()
        compares, shown, deltas = message.compares, _shown(message, mine), []
        if shown is not None:
            # What it counts itself it knows best.
            held = self._with_absorbed(id, shown, mine)
            known = self._confirmations.to_send_from(id, now, held).updated({id: SEQUENCE_MAX})
            deltas = self._deltas(message.sender.v, known, now) if message.wants else []
            if id != replica:
                # Unless it is known what a peer holds, nothing is sent to it.
                deltas = self._confirmations.confirm(id, held if message.wants else None, now, answered=deltas)
                self._heard_vector(message.sender, message.sender.address, shown, mine, now)
        if compares and message.sender.address:
            self._links.heard_from(message.sender.address)
        self._membership_changed(contact, changes, now)
        sender, view = self._table.describe() if compares else (self._table.sender(), NO_VIEW)
        confirms = {delta.replica: mine.get(delta.replica, 0) for delta in message.deltas}
        # What was absorbed here is in no vector, and its entries are not to be sent.
        beyond = shown.beyond(mine) if shown is not None else ()
        confirms = {**confirms, **self._counter.absorbed([*confirms, *(replica for replica, _, _ in beyond)])} or None
        refused = {replica: result for replica, result in results.items() if result in (GAP, NEEDS)}
        if not compares:
            return Message(sender, view, None, None, confirms, [], refused, clock=now)
        if sender.leaving:
            sender = self.leaving.sender(message.sender, sender, shown is None or deltas or not message.wants)
        summary = None
        if message.summary is not None:
            summary = _summary(mine, shown, message.summary.recent if shown is None else mine.differing(shown))
        address = message.sender.address
        wants = self._wants(id, mine) or not address or self._links.is_failing(address)  # else it is asked
        return Message(sender, view, mine, summary, confirms, deltas, refused, clock=now, wants=wants)

    def _with_absorbed(self, peer, shown, mine):
        """Return the vector that a peer shows, with what it held before: it has absorbed what is not in it any more.

        What was absorbed is left out where that is known here.
        """
        before = self._confirmations.vectors.get(peer, NOTHING_HELD)
        gone = {replica: held for replica, held, now in before.beyond(shown) if not now and mine.get(replica)}
        return shown.updated(gone) if gone else shown

    def _is_for_this(self, message):
        return message.to == self._counter.replica and message.number is not None

    def expects(self, message):
        """Return whether a message is for this process, and new; to receive it may still turn out otherwise."""
        return self._is_for_this(message) and self._numbers.is_new(message.sender.id, message.number)

    def progress(self, id, now):
        """Take note that bytes of a long message pass from or to a peer."""
        self._table.progress(id, now)
        self._confirmations.progress(id, now)
        self._joining.givers.progress(id, now)

    def _merge(self, message, cut_at):
        """Merge the deltas of a message; return what each was found to be, by its replica."""
        before = self._counter.replica
        results = {delta.replica: self._counter.merge(delta, cut_at) for delta in message.deltas}
        if any(map(self._counter.renew_if_cloned, _entries(message))) or self._counter.replica != before:
            log.error("replica id used twice, was this machine cloned? new id=%s", self._counter.replica)
            self._table.rename(self._counter.replica)
        return results

    def _membership_changed(self, contact, changes, now):
        if contact:
            self._links.compare_soon(contact, now)
        if changes:
            self.freshness.look(now)
            log_changes(changes, len(self._table.active()))
            self._confirmations.membership_changed()
            self._links.left({change.id for change in changes if change.what == "left"})
            gone = {change.address for change in changes if change.what in ("left", "restarted")}
            pushed = self._links.push_addresses()
            if len(pushed) < self._push_fanout or not gone.isdisjoint(pushed):
                self._follow_membership(now)  # else the cost of N changes would grow with the square of N

    # What others ask.

    def unconfirmed(self):
        """Return {id of a peer: number of increments it has yet to confirm}, of all that have confirmed any.

        Only increments that this node has to deliver are included: its own, and those of nodes that are
        gone.  Active nodes push their own; this node learns from a heartbeat, later, that they arrived.
        """
        return self._confirmations.unconfirmed(self._counter.vector(), {id for id, _ in self._table.active()})

    def wait_for_acks(self, replica, sequence, wanted, timeout_s):
        """Wait until that many nodes, this one included, hold a dot; return how many do."""

        def reached():
            return 1 + len(self._confirmations.holders(replica, sequence) & {id for id, _ in self._table.active()})

        def is_over():
            self._links.hurry()
            return reached() >= wanted

        self._confirmations.wait(is_over, timeout_s, (replica, sequence))
        return reached()

    def stop_waiting(self):
        """Wake all who wait for acks or to read, and refuse new waits; called when the node stops."""
        self._confirmations.stop_waiting()
        self.freshness.stop()


def _summary(vector, known, listed):
    """Return the summary of a vector for a peer that is known to hold the vector `known`, or None.

    It has the entries of the replicas `listed`, or of all if that is None; but none if the peer holds the same.
    """
    if listed is None:
        return vector.listing()
    return vector.digest() if known == vector else vector.summary(listed)


def _shown(message, reference):
    """Return the vector that a message shows, None if it does not; a summary is completed by the vector `reference`."""
    if message.summary is not None:
        return None if reference is None else reference.completed(message.summary)
    return None if message.applied is None else Vector.of(message.applied)


def _entries(message):
    """Return what a message says outright of what its sender holds, as mappings {replica: sequence}."""
    found = message.applied, message.confirms, message.summary and message.summary.recent
    return [entries for entries in found if entries]


def _to_list(request, shown, mine):
    """Return the replicas that the next request lists beside those that changed lately; None for all there are.

    `shown` is the vector in the answer, None if it differs in more than its summary lists; `mine` is that here now.
    """
    if shown is not None:
        return mine.differing(shown)
    if not request.summary or not request.summary.rest:
        raise ValueError("the summary in the answer is not of a vector")  # it follows from the request, which has all
    return None


def _sent(request):
    """Return the sequence through which a request has what its sender counted; 0 if it has nothing of it."""
    return max((delta.through for delta in request.deltas if delta.replica == request.sender.id), default=0)


def _was_not_taken(request, answer, confirmed):
    """Return whether to compare vectors after a push, given the vector confirmed by now."""
    return confirmed is None or bool(answer.refused) or confirmed.get(request.sender.id) < _sent(request)

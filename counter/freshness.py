"""Fresh reads: those that include everything that any node had acknowledged when they began.

    begin() ── asks all peers to compare vectors ──▶ compared() for each that answered ──▶ the read is over

A read is *fresh* once this node has compared vectors with every peer since the read began, and holds
what they showed.  One comparison serves all reads that began before it was sent, so a thousand reads
that wait cost no more messages than one.

Pure: it knows no socket, and what depends on time takes `now`.
"""

import threading

NEVER = float("inf")


class Read:
    """A read that waits to be fresh.  It belongs to Freshness until `over`, a threading.Event, is set."""

    __slots__ = ("began", "fresh", "lost", "missing", "nodes", "over", "without_lost")

    def __init__(self, began, without_lost):
        self.began, self.without_lost = began, without_lost
        self.over = threading.Event()
        self.fresh = False
        self.nodes = 0  # how many nodes a fresh read includes, this one as well
        self.lost = ()  # addresses of the peers for which it cannot become fresh
        self.missing = ()  # addresses of the peers that had not answered when it finished

    def ends(self, through, lost, present):
        """Return whether it is over now that all peers were compared with since the time `through`."""
        if lost and not self.without_lost:
            self.lost = lost
        elif self.began <= through:
            self.fresh, self.nodes = True, 1 + len(present)
        else:
            return False
        return True


class Freshness:
    """The reads of a node that wait to be fresh.  Threads may call anything at any time.

    `table` says which peers there are, `links` has vectors compared with them.
    """

    def __init__(self, table, links):
        self._table, self._links = table, links
        # Guards everything below.  Held for work in memory only, never together with another.
        self._lock = threading.Lock()
        self._compared_at = {}  # id of a peer -> when the latest comparison was sent of which all is held now
        self._known = frozenset()  # ids of the peers at the last look
        self._reads = {}  # the reads that wait, as an ordered set
        self._stopping = False

    def wait(self, timeout_s, clock, without_lost=False):
        """Return a Read that began now and is over, or has waited for that long."""
        read = self.begin(clock(), without_lost)
        read.over.wait(timeout_s)
        self.finish(read)
        return read

    def begin(self, now, without_lost=False):
        """Return a Read that begins now; finish() is to be called for it.

        It is over once it is fresh; or, unless it is `without_lost`, once a peer is lost, as nobody knows
        what that peer counts.
        """
        read = Read(now, without_lost)
        with self._lock:
            self._reads[read] = None
        self._look(now, asks_all=True)
        if self._stopping:
            read.over.set()
        return read

    def finish(self, read):
        """Stop caring for a read, and tell it which peers it lacks."""
        with self._lock:
            self._reads.pop(read, None)
            compared_at = dict(self._compared_at)
        present = {} if read.fresh else self._table.others()[0]
        read.missing = [address for id, address in present.items() if compared_at.get(id, -NEVER) < read.began]

    def compared(self, peer, sent_at, now):
        """Record that this node holds all that a peer held when it answered a comparison, sent at that time."""
        with self._lock:
            self._compared_at[peer] = sent_at
        self.look(now)

    def look(self, now):
        """Let those reads end that can; to be called when the peers may have changed."""
        if self._reads:
            self._look(now)

    def _look(self, now, asks_all=False):
        with self._lock:
            # Copied first: a peer that a comparison has shown is in the table before that is recorded here.
            compared_at = dict(self._compared_at)
        present, lost = self._table.others()
        through = min((compared_at.get(id, -NEVER) for id in present), default=NEVER)
        with self._lock:
            asked = [address for id, address in present.items() if asks_all or id not in self._known]
            self._known = frozenset(present)
            for id in compared_at.keys() - present.keys():
                self._compared_at.pop(id, None)
            ended = [read for read in self._reads if read.ends(through, lost, present)]
            for read in ended:
                del self._reads[read]
        for read in ended:
            read.over.set()
        self._links.compare_soon(asked, now)

    def stop(self):
        """Let all reads end, and those to come at once; called when the node stops."""
        with self._lock:
            self._stopping = True
            reads = list(self._reads)
        for read in reads:
            read.over.set()

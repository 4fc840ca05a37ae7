"""When to try addresses again that do not answer: peers that are not active, and seeds.

Pure, and not locked: they belong to a PeerTable.
"""

PROBE_INTERVAL_MAX_S = 10.0
RESOLVE_INTERVAL_S = 30.0  # how often to resolve a seed again through which an active peer was found


class Probe:
    """When to probe an inactive peer or seed next; the interval grows to 10 s."""

    __slots__ = ("_tries", "due_at")  # one per peer, so keep it small

    def __init__(self):
        self.due_at, self._tries = 0.0, 0

    def reset(self):
        self.due_at, self._tries = 0.0, 0

    def take(self, now, interval_s, rng):
        """Return whether a probe is due; if so, schedule the next one."""
        if now < self.due_at:
            return False
        wait_s = min(PROBE_INTERVAL_MAX_S, interval_s * 1.5 ** min(self._tries, 30))
        self._tries += 1
        self.due_at = now + wait_s * rng.uniform(0.8, 1.0)  # nodes that lost each other probe out of step
        return True


class _Seed:
    def __init__(self, name):
        self.name = name
        self.addresses = ()  # what the name last resolved to
        self.resolved_at = float("-inf")  # when resolving it was last due
        self.probe = Probe()


class Seeds:
    """The seeds of a node: the names, or addresses, through which it joins the cluster."""

    def __init__(self, names):
        self._seeds = {name: _Seed(name) for name in names}

    def resolved(self, name, addresses):
        """Record what the name of a seed resolves to."""
        if name in self._seeds:
            self._seeds[name].addresses = tuple(addresses)

    def addresses(self):
        """Return all that the names of the seeds last resolved to."""
        return [address for seed in self._seeds.values() for address in seed.addresses]

    def due(self, now, interval_s, rng, is_found, eager):
        """Return the names to resolve now; every time where `eager`.

        `is_found(addresses)` is whether an active peer answered at one of them.  Such a seed is
        resolved again from time to time: its name may lead to other nodes as well, which this node
        has never met because they started beyond a partition.
        """
        due = []
        for seed in self._seeds.values():
            if is_found(seed.addresses):
                seed.probe.reset()
                is_due = now - seed.resolved_at >= RESOLVE_INTERVAL_S
            elif eager:
                is_due = True
            else:
                is_due = seed.probe.take(now, interval_s, rng)
            if is_due:
                seed.resolved_at = now
                due.append(seed.name)
        return due

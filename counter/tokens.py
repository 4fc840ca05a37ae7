"""What a client may do: the tokens it can show, and the limits of each.

    read TOKEN                                                    all GETs
    write TOKEN [PREFIX] [counters=N] [rate=N/s] [client=NAME]    those, and increments

These are the lines of a token file.  A client sends `Authorization: Bearer TOKEN`, and gets an Access,
which holds until a file without that line is read.  Source: RFC 6750.
"""

import contextlib
import hashlib
import math
import re
import threading
import time
from collections import namedtuple

from counter.http1 import Refused
from counter.private import read_private_file

READ, WRITE = "read", "write"
SHORT = 16  # characters; a shorter token might be guessed

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,512}=*\Z")
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)\Z", re.IGNORECASE)
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_OPTION = re.compile(
    r"(?:counters=(?P<counters>[1-9][0-9]{0,6})|rate=(?P<rate>[1-9][0-9]{0,6})/s|client=(?P<client>[A-Za-z0-9._-]{1,64}))\Z"
)

# A line of a token file.  `digest` is the token's, `client` whose keys and limits these are; `counters`
# is how many different ones it may increment, `rate` how many increments a second; None: without a limit.
Grant = namedtuple("Grant", "digest role prefix counters rate client")


def read_token_file(path):
    """Return the Grants of a file, and warnings about them; ValueError, in words for an operator, if it is not good."""
    try:
        lines = read_private_file(path).decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
    grants = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            grant = _grant(words)
            if grant.digest in grants:
                raise ValueError("this token is there twice")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        grants[grant.digest] = grant
    if not grants:
        raise ValueError(f"{path} has no tokens; write lines such as: read TOKEN")
    return tuple(grants.values())


def _grant(words):
    role, token, *options = words if len(words) > 1 else (*words, "")
    if role not in (READ, WRITE):
        raise ValueError(f"a line begins with {READ} or {WRITE}")
    if not _TOKEN.match(token):
        raise ValueError(f"after {role} comes a token: 1 to 512 of A-Z a-z 0-9 . _ ~ + / -")
    digest, prefix = hashlib.sha256(token.encode()).digest(), ""
    if options and _PREFIX.match(options[0]):
        prefix, *options = options
    given = {}
    for option in options:
        match = _OPTION.match(option)
        if not match or match.lastgroup in given:
            raise ValueError(f"{option!r} is not PREFIX, counters=N, rate=N/s or client=NAME, or comes twice")
        given[match.lastgroup] = match[match.lastgroup]
    if role == READ and (prefix or given):
        raise ValueError(f"a token to {READ} has no limits")
    counters, rate = (int(given[name]) if name in given else None for name in ("counters", "rate"))
    return Grant(digest, role, prefix, counters, rate, given.get("client", digest.hex()))


class Tokens:
    """The tokens that are good now.  Threads may call anything."""

    def __init__(self, grants, clock=time.monotonic):
        self._clock = clock
        self._usages = {}  # client -> _Usage, of the present grants; used by replace() alone
        self._accesses = {}  # digest -> Access; replaced as a whole
        self.replace(grants)

    def replace(self, grants):
        """Take other grants.  An Access whose grant is not among them is no longer valid."""
        before = self._accesses
        self._usages = {grant.client: self._usages.get(grant.client) or _Usage() for grant in grants}
        self._accesses = {
            grant.digest: access
            if (access := before.get(grant.digest)) and access.grant == grant
            else Access(grant, self._usages[grant.client], self._clock)
            for grant in grants
        }
        for digest, access in before.items():
            access.valid = self._accesses.get(digest) is access

    def access(self, head):
        """Return the Access of a request by its head; Refused with 401 if it shows no good token."""
        given = head.headers.get("authorization")
        if given is None:
            raise _unauthorized("this node asks for a token: send the header Authorization: Bearer TOKEN")
        match = _BEARER.match(given)
        # What is compared are digests, so the time it takes tells nothing about a token.
        access = match and self._accesses.get(hashlib.sha256(match[1].encode()).digest())
        if not access:
            raise _unauthorized(
                "this token is not, or no longer, in the token file of this node", ', error="invalid_token"'
            )
        return access


def _unauthorized(detail, error=""):
    return Refused(401, detail, [("WWW-Authenticate", f'Bearer realm="counter"{error}')])


class Access:
    """What the holder of a token may do; not `valid` once the token file has another line for it, or none."""

    def __init__(self, grant, usage, clock):
        self.grant, self.valid = grant, True
        self._usage, self._clock = usage, clock

    def limited(self, counter):
        """Return the counter as this client may increment it; Refused if it may not."""
        if self.grant.role == READ:
            raise Refused(403, "this token may only read")
        return LimitedCounter(counter, self.grant, self._usage, self._clock)


class LimitedCounter:
    """A Counter for one client: within its limits, and with idempotency keys of its own.

    The methods are those of Counter, and raise Refused besides.
    """

    def __init__(self, counter, grant, usage, clock):
        self._counter, self._grant, self._usage, self._clock = counter, grant, usage, clock

    def increment(self, name, amount=1):
        with self._usage.charged((name,), self._grant, self._clock()):
            return self._counter.increment(name, amount)

    def increment_once(self, key, name, amount, now):
        with self._usage.charged((name,), self._grant, self._clock()):
            return self._counter.increment_once(self._own(key), name, amount, now)

    def increment_many(self, amounts):
        with self._usage.charged(amounts, self._grant, self._clock()):
            return self._counter.increment_many(amounts)

    def increment_many_once(self, key, amounts, now):
        with self._usage.charged(amounts, self._grant, self._clock()):
            return self._counter.increment_many_once(self._own(key), amounts, now)

    def _own(self, key):
        # No client can send a NUL, so keys of two clients are never the same.
        return f"{self._grant.client}\0\0{key}"


class _Usage:
    """What a client has used of its limits at this node, whatever its tokens were."""

    def __init__(self):
        self._lock = threading.Lock()  # guards all below
        self._names = set()  # of the counters it incremented, while it has a limit of them
        # Increments that it may do at once: what it left unused of its rate, at most a second's, at that time.
        self._room, self._counted_at = 0.0, -math.inf

    @contextlib.contextmanager
    def charged(self, names, grant, now):
        """Charge increments of these counters to the limits of a grant; Refused if there is no room."""
        if not all(name.startswith(grant.prefix) for name in names):
            raise Refused(403, f"this token may increment only counters whose names begin with {grant.prefix}")
        with self._lock:
            new = self._new_names_locked(names, grant.counters)
            self._spend_locked(len(names), grant.rate, now)
            self._names |= new
        try:
            yield
        except Exception:  # nothing was counted
            with self._lock:
                self._names -= new
            raise

    def _new_names_locked(self, names, counters_max):
        if counters_max is None:
            return set()
        new = set(names) - self._names
        if new and len(self._names) + len(new) > counters_max:
            raise Refused(403, f"this token may increment {counters_max} counters at this node; increment one of those")
        return new

    def _spend_locked(self, increments, rate, now):
        """Take room for some increments; a batch may take more than there is, which the next ones wait for."""
        if rate is None:
            return
        room = min(rate, self._room + (now - self._counted_at) * rate)
        if room < 1:
            wait_s = math.ceil((1 - room) / rate)
            raise Refused(429, f"this token may count {rate} increments a second", [("Retry-After", str(wait_s))])
        self._room, self._counted_at = room - increments, now

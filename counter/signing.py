"""Proof that a message comes from a node of this cluster, and as it was sent.

Whatever is sent is lines.  The signature of the first stands in a header, each further line begins
with its own, and each covers the one before it:

    Counter-Signature: 5d41…       over the request line, or the signature of the request that is answered
    {"v":1,…}                      the first line
    7c21… {"totals":{…}}           over 5d41… and the rest of this line

So of all that arrives no more than one line is kept, and nothing read, that is not yet proven; and
no line can be left out, moved, or put into another message.  Source: RFC 2104 (HMAC).
"""

import hmac

LINE_MAX = 64 * 1024  # bytes of a line, with its signature
PATH = "/internal/gossip"
HEADER = "Counter-Signature"  # of a request, and of its answer


class WrongSignature(Exception):
    """A message does not come from a node of this cluster, or not as it was sent."""


class Signer:
    """The keys of a node.

    `secrets` are bytes; the first signs, all are accepted, so that one can take the place of another
    node by node.  Without any all who know the cluster's name belong to it.  That name keeps apart
    clusters that reach each other by mistake.
    """

    def __init__(self, secrets, cluster):
        self._name = f"counter cluster {cluster}".encode()
        self.replace(secrets)

    def replace(self, secrets):
        """Take other secrets, from the next message on.  Any thread may call it."""
        self._keys = [hmac.digest(secret, self._name, "sha256") for secret in secrets or (b"",)]

    def request(self):
        """Return the Chain of a request, to be signed or to be proven."""
        return Chain(self._keys, b"POST\n" + PATH.encode())


class Chain:
    """The signatures of the lines of one message, one after another."""

    def __init__(self, keys, before):
        self._keys, self._before, self._first = keys, before, None

    def sign(self, line):
        """Return the signature of the next line."""
        self._before = _signature(self._keys[0], self._before, line)
        self._first = self._first or self._before
        return self._before

    def prove(self, signature, line):
        """Check the signature of the next line, both bytes; raises WrongSignature."""
        for key in self._keys:
            right = _signature(key, self._before, line)
            if hmac.compare_digest(signature, right):
                self._keys, self._before = [key], right
                self._first = self._first or right
                return
        raise WrongSignature

    def answer(self):
        """Return the Chain of the answer to this request: it has the same key, and is for this request alone."""
        return Chain(self._keys[:1], b"ANSWER\n" + self._first)


def _signature(key, before, line):
    return hmac.digest(key, before + b"\n" + line, "sha256").hex().encode()


def seal(chain, lines):
    """Return (signature, pieces): the header that goes with a body of these lines, and that body, bytes."""
    lines = iter(lines)
    first = next(lines)
    return chain.sign(first).decode(), _sealed(chain, first, lines)


def _sealed(chain, first, lines):
    yield first
    for line in lines:
        yield b"\n%b %b" % (chain.sign(line), line)


def sealed_size(lines):
    """Return how many bytes such a body has."""
    return sum(len(line) + 66 for line in lines) - 66


class Opener:
    """Takes the bytes of a body as they arrive, and hands on its lines once they are proven."""

    def __init__(self, chain, signature):
        """`signature` is the text of the header."""
        self._chain, self._signature = chain, signature.encode()
        self._rest = b""  # of a line that is not yet whole

    def feed(self, data):
        """Return the lines that have become whole; raises WrongSignature."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_MAX:
            raise WrongSignature
        return [self._proven(line) for line in lines]

    def finish(self):
        """Return the last line, once the body is whole; raises WrongSignature."""
        return self._proven(self._rest)

    def _proven(self, line):
        signature, self._signature = self._signature, None
        if signature is None:
            signature, _, line = line.partition(b" ")
        self._chain.prove(signature, line)
        return line

"""HTTP/1.1 messages as bytes: taking requests apart, writing responses.

Pure: no socket, and no time but the date of a response.  Strict where leniency is dangerous:
whatever two programs in a row might read differently is refused (RFC 9112 section 11.2, request
smuggling).  Parsing is a function of the bytes alone, so the parse of a head can be used again.
"""

import json
import re
import time
from collections import namedtuple
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

LINE_MAX = 8 * 1024  # bytes of a request line
HEAD_MAX = 32 * 1024  # bytes of a head
HEAD_LINES_MAX = 100
NAMED_MAX = 40  # characters of a client's own that a refusal repeats

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\x20-\x7e\x80-\xff\t]*)")
_HOST = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_ABSOLUTE = re.compile(r"\Ahttps?://[^/?#]*", re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Of these one line is allowed: two could be read differently by the next program.
_SINGLE = {
    "host",
    "content-length",
    "transfer-encoding",
    "idempotency-key",
    "origin",
    "sec-fetch-site",
    "authorization",
}

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

SPEAKS_PLAIN = "this port speaks plain HTTP, not TLS; use http://"
_TLS_HELLO = 0x16  # the first byte of a client that speaks TLS: a record of its handshake

# `path` and `query` are still percent-encoded; `headers` is {lower-case name: value}.
Head = namedtuple("Head", "method path query headers length keep_alive is_http10 expects_continue")


class Refused(Exception):
    """A request this node will not serve, answered as an RFC 9457 problem; `detail` says what to do.

    After `close` the connection cannot be trusted to be at the start of a request.
    """

    def __init__(self, status, detail, headers=(), close=False):
        super().__init__(detail)
        self.status, self.detail, self.headers, self.close = status, detail, headers, close

    def response(self):
        title = HTTPStatus(self.status).phrase
        problem = {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail}
        body = json.dumps(problem) + "\n"
        return response(self.status, body.encode(), "application/problem+json", self.headers)


def unavailable(detail, close=False):
    """Return the 503 for a request that a later try or another node may serve."""
    return Refused(503, detail, [("Retry-After", "1")], close)


class RequestReader:
    """Takes the requests on one connection apart, however their bytes arrive.

    Feed it what was received.  For each request, next() returns its Head, then the pieces of its
    body as they have arrived, then b""; None asks for more bytes.  It raises Refused for what is
    not clean HTTP, and must not be used after that: nobody knows where the next request begins.
    """

    __slots__ = ("_buffer", "_missing", "_searched")

    def __init__(self):
        self._buffer = b""
        self._searched = 0  # bytes of the buffer in which a head does not end
        self._missing = None  # bytes of the body yet to come; None before and within a head

    def feed(self, data):
        self._buffer += data

    @property
    def waits_for_request(self):
        """Whether all that has arrived was returned by next(), or was an empty line."""
        return self._missing is None and not self._buffer

    @property
    def buffered(self):
        """How many bytes have arrived that were not returned by next()."""
        return len(self._buffer)

    def next(self):
        if self._missing is None:
            return self._next_head()
        if not self._missing:
            self._missing = None
            return b""
        piece = self._buffer[: self._missing]
        self._buffer = self._buffer[len(piece) :]
        self._missing -= len(piece)
        return piece or None

    def _next_head(self):
        while self._buffer.startswith(b"\r\n"):  # some clients end a body with one; RFC 9112 section 2.2
            self._buffer = self._buffer[2:]
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n", self._searched)
        if end < 0:
            self._refuse_hopeless_head()
            self._searched = max(0, len(buffer) - 3)
            return None
        self._searched = 0
        head = parse_head(buffer[:end])
        self._buffer, self._missing = buffer[end + 4 :], head.length
        return head

    def _refuse_hopeless_head(self):
        """Refuse what arrived of a head if the rest cannot make it good."""
        buffer = self._buffer
        if buffer and buffer[0] == _TLS_HELLO:
            raise Refused(400, SPEAKS_PLAIN, close=True)
        # Up to 3 bytes of the end of the head, or 1 of the line's, may be among them.
        if len(buffer) > HEAD_MAX + 3 or (len(buffer) > LINE_MAX + 1 and b"\r\n" not in buffer):
            parse_head(buffer)


def parse_head(head):
    """Return the Head of a request from its bytes, without the empty line; Refused if it is not good."""
    lines = head.split(b"\r\n")
    if len(lines[0]) > LINE_MAX:
        raise Refused(414, f"the request line is longer than {LINE_MAX} bytes", close=True)
    if len(head) > HEAD_MAX or len(lines) - 1 > HEAD_LINES_MAX:
        raise Refused(431, f"send at most {HEAD_MAX} bytes and {HEAD_LINES_MAX} lines of headers", close=True)
    match = _REQUEST_LINE.fullmatch(lines[0])
    if not match:
        raise Refused(400, "malformed request line; send METHOD /PATH HTTP/1.1, ended by CR LF", close=True)
    method, target, major, minor = match.groups()
    if major != b"1":
        raise Refused(505, "this server speaks HTTP/1.1 and HTTP/1.0", close=True)
    headers = _parse_headers(lines[1:])
    if minor != b"0" and "host" not in headers:
        raise Refused(400, "an HTTP/1.1 request needs a Host header", close=True)
    if not _HOST.fullmatch(headers.get("host", "")):
        raise Refused(400, "the Host header is no HOST or HOST:PORT", close=True)
    path, _, query = _ABSOLUTE.sub("", target.decode(), count=1).partition("?")
    length = _content_length(headers)
    expects_continue = minor != b"0" and _expects_continue(headers)  # HTTP/1.0 knows no such thing
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    keep_alive = "close" not in options and (minor != b"0" or "keep-alive" in options)
    return Head(method.decode(), path, query, headers, length, keep_alive, minor == b"0", expects_continue)


def _parse_headers(lines):
    headers = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if not match:
            raise Refused(400, "malformed header line; send NAME: VALUE, ended by CR LF", close=True)
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        if name in headers:
            if name in _SINGLE:
                raise Refused(400, f"send the header {name} only once", close=True)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _content_length(headers):
    text = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise Refused(400, "Content-Length must be one decimal number", close=True)
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise Refused(400, "send Content-Length or Transfer-Encoding, not both", close=True)
        raise Refused(501, "Transfer-Encoding is not served; send a Content-Length", close=True)
    return int(text)


def _expects_continue(headers):
    expected = headers.get("expect", "100-continue").lower()
    if expected != "100-continue":
        raise Refused(417, "the only expectation met here is 100-continue", close=True)
    return "expect" in headers


def decode_component(text):
    """Return a percent-decoded part of a path or query; Refused if it is no UTF-8 or badly escaped."""
    if _BAD_ESCAPE.search(text):
        raise Refused(400, "malformed percent-encoding in the request's target")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise Refused(400, "percent-encoding in the request's target must be UTF-8") from None


def parse_query(query, allowed):
    """Return {name: value} of a query string; Refused if a name is not allowed or comes twice."""
    parameters = {}
    for part in query.split("&") if query else ():
        name, _, value = part.replace("+", " ").partition("=")
        name = decode_component(name)
        if name not in allowed:
            shown = name if len(name) <= NAMED_MAX else f"{name[:NAMED_MAX]}…"
            raise Refused(400, f"unknown query parameter {shown}; known here: {', '.join(allowed) or 'none'}")
        if name in parameters:
            raise Refused(400, f"the query parameter {name} was sent more than once")
        parameters[name] = decode_component(value)
    return parameters


def response(status, body, content_type="application/json", headers=()):
    """Return a whole response; `body` is bytes, `headers` are (name, value) pairs."""
    if status != 204:
        headers = [*headers, ("Content-Type", content_type), ("Content-Length", len(body))]
    return _head(status, headers) + body


def chunked(status, pieces, content_type="application/json", headers=()):
    """Yield the pieces of a response whose length is not known yet; `pieces` are of its body, as bytes.

    HTTP/1.0 cannot read it.  Source: RFC 9112 section 7.1.
    """
    yield _head(status, [*headers, ("Content-Type", content_type), ("Transfer-Encoding", "chunked")])
    for piece in pieces:
        if piece:  # an empty chunk would end the body
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def unending(content_type, headers=()):
    """Return the head of a response that goes on until the connection ends."""
    return _head(200, [*headers, ("Content-Type", content_type)])


def _head(status, headers):
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {_date()}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode()


def ok(body):
    """Return the response 200 with a JSON text, which is ASCII.  This is the hot path's."""
    return (
        f"HTTP/1.1 200 OK\r\nDate: {_date()}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def ok_json(fields):
    """Return the response 200 with a value as JSON."""
    return ok(json.dumps(fields) + "\n")


def opened(response):
    """Return the first piece of a response, which has its head, and what comes after it."""
    if type(response) is bytes:
        return response, ()
    if type(response) is tuple:
        return response
    pieces = iter(response)
    return next(pieces), pieces


def with_header(response, line):
    """Return a response with one more header line."""
    head, end, body = response.partition(b"\r\n\r\n")
    return b"%b\r\n%b%b%b" % (head, line, end, body)


def without_body(response):
    """Return a response as it answers HEAD: its Content-Length stays."""
    return response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


_dated = (0.0, "")  # until when it is right, and the text; replaced as a whole: threads may read it at any time


def _date():
    global _dated
    until, text = _dated
    now = time.time()
    if not until - 1 <= now < until:
        text = formatdate(now, usegmt=True)
        _dated = (int(now) + 1, text)
    return text

"""HTTP/1.1 messages as bytes: which heads are read and how, which are refused, what is written."""

import json
import random
from http import HTTPStatus
from types import SimpleNamespace

import pytest

from counter import http1
from counter.http1 import (
    HEAD_LINES_MAX,
    HEAD_MAX,
    LINE_MAX,
    Head,
    Refused,
    RequestReader,
    decode_component,
    parse_head,
    parse_query,
)


def head(*headers, line=b"GET /count HTTP/1.1"):
    return b"\r\n".join([line, b"Host: localhost", *headers])


def refusal(function, *arguments):
    with pytest.raises(Refused) as caught:
        function(*arguments)
    assert caught.value.detail
    return caught.value


def test_a_head_is_taken_apart():
    """A head says its method, its target still encoded, its headers and what follows from them."""
    raw = head(b"Content-Length: 12", b"Expect: 100-continue", line=b"POST /increment/a%2Eb?amount=%31&x HTTP/1.1")
    headers = {"host": "localhost", "content-length": "12", "expect": "100-continue"}
    assert parse_head(raw) == Head("POST", "/increment/a%2Eb", "amount=%31&x", headers, 12, True, False, True)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/count?after=1", "/count", "after=1"),
        (b"/count?", "/count", ""),
        (b"/a?b?c", "/a", "b?c"),
        (b"*", "*", ""),
        (b"http://localhost:8080/count/x?y=z", "/count/x", "y=z"),
        (b"HTTPS://[::1]:80/count", "/count", ""),
        (b"http://localhost?q", "", "q"),
        (b"/count?from=http://other/place", "/count", "from=http://other/place"),
        (b"/count/http://other", "/count/http://other", ""),
        (b"/counthttp://other/place", "/counthttp://other/place", ""),
    ],
)
def test_a_target_is_a_path_and_a_query(target, path, query):
    """Only at the start of a target a scheme and a host may stand, and they are left out."""
    parsed = parse_head(head(line=b"GET " + target + b" HTTP/1.1"))
    assert (parsed.path, parsed.query) == (path, query)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"X:1", "1"),
        (b"x: \t 1\t ", "1"),
        (b"X:", ""),
        (b"X: \t", ""),
        (b"X: a \t b", "a \t b"),
        (b"X: caf\xe9", "caf\xe9"),
        (b"X: a: b", "a: b"),
        (b"X: a\r\nx: b", "a, b"),
    ],
)
def test_a_header_is_a_name_in_any_case_and_a_trimmed_value(line, value):
    """The values of repeated lines are joined by commas."""
    assert parse_head(head(line)).headers == {"host": "localhost", "x": value}


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("first", "last", "good"), [(b"a", b"b", True), (b"a", b"\0", False), (b"", b"\0", False)])
def test_a_long_run_of_blanks_in_a_header_holds_nobody_up(first, last, good):
    """Reading a header takes time in proportion to its length, so ten of the longest are soon read."""
    raw = head(b"X:" + first + b" " * (HEAD_MAX - 100) + last)
    for _ in range(10):
        if good:
            assert len(parse_head(raw).headers["x"]) == HEAD_MAX - 98
        else:
            assert refusal(parse_head, raw).status == 400


@pytest.mark.parametrize(
    ("version", "headers", "keep_alive"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"Connection: close"], False),
        (b"1.1", [b"Connection: foo, CLOSE ,bar"], False),
        (b"1.1", [b"Connection: foo", b"Connection: close"], False),
        (b"1.1", [b"Connection: closed"], True),
        (b"1.2", [], True),
        (b"1.0", [], False),
        (b"1.0", [b"Connection: Keep-Alive"], True),
        (b"1.0", [b"Connection: keep-alive, close"], False),
    ],
)
def test_whether_a_connection_stays_open(version, headers, keep_alive):
    """HTTP/1.1 stays unless told to close, HTTP/1.0 closes unless told to stay, and close always wins."""
    parsed = parse_head(head(*headers, line=b"GET / HTTP/" + version))
    assert parsed.keep_alive is keep_alive
    assert parsed.is_http10 is (version == b"1.0")


@pytest.mark.parametrize(
    ("line", "headers", "expects"),
    [
        (b"POST / HTTP/1.1", [], False),
        (b"POST / HTTP/1.1", [b"Expect: 100-Continue"], True),
        (b"POST / HTTP/1.0", [b"Expect: 100-continue"], False),
    ],
)
def test_who_expects_100_continue(line, headers, expects):
    """The expectation counts in any case of letters, but not in HTTP/1.0, which knows no such answer."""
    assert parse_head(head(*headers, line=line)).expects_continue is expects


def test_http_1_0_needs_no_host():
    """A head of HTTP/1.0 may be its request line alone."""
    assert parse_head(b"GET /count HTTP/1.0") == Head("GET", "/count", "", {}, 0, False, True, False)


@pytest.mark.parametrize(("text", "length"), [(b"0", 0), (b"65536", 65536), (b"007", 7), (b"9" * 18, 10**18 - 1)])
def test_content_length_is_one_decimal_number(text, length):
    """Up to 18 digits are read as they are."""
    assert parse_head(head(b"Content-Length: " + text)).length == length


@pytest.mark.parametrize(
    "text", [b"", b"-1", b"+1", b"1.0", b"0x1", b"1_0", b"1 1", b"1, 1", b"\xb2", b"9" * 19, b"1;a"]
)
def test_any_other_content_length_is_refused(text):
    """What another program could read differently is 400, and the connection closes."""
    refused = refusal(parse_head, head(b"Content-Length: " + text))
    assert (refused.status, refused.close) == (400, True)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"", 400),
        (b"GET", 400),
        (b"GET /", 400),
        (b"GET / HTTP/1", 400),
        (b"GET / HTTP/11.1", 400),
        (b"GET / http/1.1", 400),
        (b"GET  / HTTP/1.1", 400),
        (b" GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET\t/ HTTP/1.1", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"GET /caf\xe9 HTTP/1.1", 400),
        (b"GET /\0 HTTP/1.1", 400),
        (b"G(T / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/0.9", 505),
    ],
)
def test_a_bad_request_line_is_refused(line, status):
    """Anything but METHOD, one space, a visible target, one space and the version closes the connection."""
    refused = refusal(parse_head, head(line=line))
    assert (refused.status, refused.close) == (status, True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([b"Host : x"], 400),
        ([b"X : 1"], 400),
        ([b"X\t: 1"], 400),
        ([b": 1"], 400),
        ([b"no colon"], 400),
        ([b"X(: 1"], 400),
        ([b"X\xe9: 1"], 400),
        ([b"X: 1", b" folded"], 400),
        ([b"X: 1", b"\tfolded: 1"], 400),
        ([b" X: 1"], 400),
        ([b"X: \0"], 400),
        ([b"X: \x7f"], 400),
        ([b"X: \x1b[0m"], 400),
        ([b"X: a\nY: b"], 400),
        ([b"X: a\rY: b"], 400),
        ([b"X: a\n"], 400),
        ([b"Host: localhost"], 400),
        ([b"Content-Length: 1", b"content-length: 1"], 400),
        ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], 400),
        ([b"Transfer-Encoding: chunked", b"Content-Length: 1"], 400),
        ([b"Transfer-Encoding: chunked"], 501),
        ([b"Transfer-Encoding: identity"], 501),
        ([b"Expect: more"], 417),
    ],
)
def test_bad_headers_are_refused(headers, status):
    """Whatever two programs might read differently closes the connection."""
    refused = refusal(parse_head, head(*headers))
    assert (refused.status, refused.close) == (status, True)


def test_http_1_1_needs_a_host():
    """Without Host the answer is 400 and says so."""
    refused = refusal(parse_head, b"GET /count HTTP/1.1\r\nAccept: */*")
    assert (refused.status, refused.close) == (400, True)
    assert "Host" in refused.detail


def test_a_request_line_has_at_most_its_limit():
    """The longest request line is read, and one byte more is 414."""
    line = b"GET /" + b"x" * (LINE_MAX - len("GET / HTTP/1.1")) + b" HTTP/1.1"
    assert len(parse_head(head(line=line)).path) > LINE_MAX - 20
    refused = refusal(parse_head, head(line=b"X" + line))
    assert (refused.status, refused.close) == (414, True)


def test_a_head_has_at_most_its_limit_of_bytes():
    """The longest head is read, and one byte more is 431."""
    raw = head(b"X: ")
    raw += b"x" * (HEAD_MAX - len(raw))
    assert len(parse_head(raw).headers["x"]) > HEAD_MAX - 100
    refused = refusal(parse_head, raw + b"x")
    assert (refused.status, refused.close) == (431, True)


def test_a_head_has_at_most_its_limit_of_lines():
    """The most header lines are read, and one more is 431."""
    lines = [b"X%d: 1" % number for number in range(HEAD_LINES_MAX - 1)]
    assert len(parse_head(head(*lines)).headers) == HEAD_LINES_MAX
    refused = refusal(parse_head, head(*lines, b"Y: 1"))
    assert (refused.status, refused.close) == (431, True)


def test_whatever_comes_is_read_or_refused():
    """Bytes damaged at random raise nothing but Refused, which always closes."""
    rng = random.Random(1)
    good = head(b"Content-Length: 3", b"Connection: close", line=b"POST /increment?amount=5 HTTP/1.1")
    outcomes = set()
    for _ in range(3000):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 2)] = rng.choice([b"", b"\r", b"\n", b" ", b":", b"\xff", rng.randbytes(1)])
        try:
            outcomes.add(type(parse_head(bytes(raw))))
        except Refused as refused:
            assert refused.close
            outcomes.add(refused.status)
    assert outcomes >= {Head, 400}


# Taking requests apart.


def read_all(reader, *pieces):
    """Feed a reader piece by piece; return [(path, body)] of the requests that are complete."""
    requests = []
    for piece in pieces:
        reader.feed(piece)
        while (event := reader.next()) is not None:
            if isinstance(event, Head):
                requests.append([event.path, b"", False])
            else:
                requests[-1][1] += event
                requests[-1][2] = event == b""
    assert all(complete for _, _, complete in requests[:-1])
    return [(path, body) for path, body, complete in requests if complete]


def post(path, body=b"", *headers):
    line = b"POST " + path + b" HTTP/1.1"
    return head(*headers, b"Content-Length: %d" % len(body), line=line) + b"\r\n\r\n" + body


def test_a_request_is_its_head_then_its_body_then_an_empty_piece():
    """None in between says that more bytes are needed."""
    reader = RequestReader()
    assert reader.next() is None
    for byte in post(b"/a", b"xyz")[:-3]:
        assert reader.next() is None
        reader.feed(bytes([byte]))
    assert reader.next().path == "/a"
    assert reader.next() is None
    reader.feed(b"xy")
    assert (reader.next(), reader.next()) == (b"xy", None)
    reader.feed(b"z")
    assert [reader.next() for _ in range(3)] == [b"z", b"", None]


STREAMS = [
    [post(b"/a")],
    [post(b"/a"), post(b"/b"), post(b"/c")],
    [post(b"/a", b"x"), post(b"/b", b"\r\n\r\n"), post(b"/c", b"POST / HTTP/1.1\r\n\r\n")],
    [b"\r\n", post(b"/a", b"x"), b"\r\n\r\n", post(b"/b"), b"\r\n", post(b"/c", b"\r\n"), b"\r\n"],
    [head() + b"\r\n\r\n", b"GET /old HTTP/1.0\r\n\r\n"],
]


@pytest.mark.parametrize("stream", STREAMS, ids=range(len(STREAMS)))
def test_requests_are_the_same_however_their_bytes_arrive(stream):
    """All at once, byte by byte, or cut at any two places."""
    raw = b"".join(stream)
    whole = read_all(RequestReader(), raw)
    assert len(whole) == sum(piece.strip() != b"" for piece in stream)
    assert read_all(RequestReader(), *[raw[at : at + 1] for at in range(len(raw))]) == whole
    for first in range(len(raw)):
        for second in range(first, len(raw), 7):
            assert read_all(RequestReader(), raw[:first], raw[first:second], raw[second:]) == whole


def test_a_long_body_comes_as_it_arrives():
    """No piece is kept until the rest is there, and what follows the body is the next request."""
    reader = RequestReader()
    reader.feed(post(b"/a", b"x" * 100_000)[:-99_000])
    assert (reader.next().length, reader.next(), reader.buffered) == (100_000, b"x" * 1000, 0)
    for _ in range(98):
        reader.feed(b"x" * 1000)
        assert reader.next() == b"x" * 1000
    reader.feed(b"x" * 1000 + post(b"/b"))
    assert (reader.next(), reader.next(), reader.next().path) == (b"x" * 1000, b"", "/b")


def test_a_reader_says_whether_a_request_has_begun():
    """Empty lines are not the beginning of one; any other byte is, until the body has ended."""
    reader = RequestReader()
    seen = []
    for byte in b"\r\n\r\n" + post(b"/a", b"x"):
        seen.append(reader.waits_for_request)
        reader.feed(bytes([byte]))
        while reader.next() is not None:
            pass
    length = len(seen)
    assert seen == [True, False, True, False, True] + [False] * (length - 5)  # a CR may be that of an empty line
    assert reader.waits_for_request


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /" + b"x" * LINE_MAX, 414),
        (head(b"X: " + b"x" * HEAD_MAX), 431),
        (b"\x16\x03\x01\x02", 400),
        (b"\r\n\x16", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
    ],
)
def test_what_cannot_become_a_request_is_refused_before_its_end(raw, status):
    """Too long a line or head, and the hello of TLS, which is recognised by its first byte."""
    reader = RequestReader()
    reader.feed(raw)
    refused = refusal(reader.next)
    assert (refused.status, refused.close) == (status, True)


def test_a_tls_hello_is_told_what_this_port_speaks():
    """curl https://… on the plain port must not have to wait for a head that never ends."""
    reader = RequestReader()
    reader.feed(b"\x16\x03\x01")
    assert "TLS" in refusal(reader.next).detail


def test_the_largest_head_may_be_cut_anywhere():
    """A line or a head that just keeps its limit is no longer for an end that comes in two pieces."""
    line = b"GET /" + b"x" * (LINE_MAX - len("GET / HTTP/1.1")) + b" HTTP/1.1"
    longest = head(b"X: " + b"x" * (HEAD_MAX - len(head(b"X: "))))
    for cut in range(5):
        for start, end in ((line, b"\r\nHost: a\r\n\r\n"), (longest, b"\r\n\r\n")):
            assert len(read_all(RequestReader(), start + end[:cut], end[cut:])) == 1


# Parts of a target.


@pytest.mark.parametrize(
    ("text", "decoded"),
    [("", ""), ("a+b", "a+b"), ("%61%2f%2E", "a/."), ("%C3%A9", "é"), ("%00", "\0"), ("%2561", "%61")],
)
def test_a_part_of_a_target_is_decoded_once(text, decoded):
    """Percent-encoding in either case stands for UTF-8, and a plus for itself."""
    assert decode_component(text) == decoded


@pytest.mark.parametrize("text", ["%", "a%", "%4", "%zz", "%%41", "%FF", "%C3", "%ED%A0%80", "%C0%80"])
def test_bad_percent_encoding_is_refused(text):
    """Half an escape, or bytes that are no UTF-8, are 400, and the connection stays usable."""
    refused = refusal(decode_component, text)
    assert (refused.status, refused.close) == (400, False)


@pytest.mark.parametrize(
    ("query", "parameters"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("b=2&a=1", {"a": "1", "b": "2"}),
        ("a", {"a": ""}),
        ("a=", {"a": ""}),
        ("a=b=c", {"a": "b=c"}),
        ("%61=%26+%2B", {"a": "& +"}),
    ],
)
def test_a_query_is_names_and_values(query, parameters):
    """Both are decoded, and a plus is a space."""
    assert parse_query(query, ("a", "b")) == parameters


@pytest.mark.parametrize("query", ["c=1", "A=1", "a=1&a=1", "a=1&%61=2", "a=1&", "&a=1", "=1", "a=%", "%ff=1", "a;b"])
def test_a_bad_query_is_refused(query):
    """A name that is unknown, empty or there twice is 400, as is bad encoding."""
    refused = refusal(parse_query, query, ("a", "b"))
    assert (refused.status, refused.close) == (400, False)


# Responses.


@pytest.fixture
def in_1994(monkeypatch):
    """Stop the clock at the date of the example in RFC 9110."""
    monkeypatch.setattr(http1, "time", SimpleNamespace(time=lambda: 784111777.9))


DATE = b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"


def test_a_response_is_whole(in_1994):
    """Status line, date, given headers, type, length, empty line and body come as one piece of bytes."""
    assert http1.response(404, b"gone", "text/plain", [("Allow", "GET"), ("Retry-After", "1")]) == (
        b"HTTP/1.1 404 Not Found\r\n" + DATE + b"Allow: GET\r\nRetry-After: 1\r\n"
        b"Content-Type: text/plain\r\nContent-Length: 4\r\n\r\ngone"
    )


def test_204_has_neither_type_nor_length(in_1994):
    """A response without content does not describe any."""
    assert http1.response(204, b"") == b"HTTP/1.1 204 No Content\r\n" + DATE + b"\r\n"


def test_a_response_may_be_of_unknown_length(in_1994):
    """Its pieces are chunks, none of which is empty but the last; the head is a piece of its own."""
    assert list(http1.chunked(200, iter([b"a" * 20, b"", b"b"]), "text/plain", [("X", "1")])) == [
        b"HTTP/1.1 200 OK\r\n" + DATE + b"X: 1\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"14\r\n" + b"a" * 20 + b"\r\n",
        b"1\r\nb\r\n",
        b"0\r\n\r\n",
    ]


def test_a_response_in_pieces_is_opened():
    """Its first piece has the head; bytes have no further pieces."""
    assert http1.opened(b"whole") == (b"whole", ())
    first, further = http1.opened(iter([b"first", b"second", b"third"]))
    assert (first, list(further)) == (b"first", [b"second", b"third"])


def test_the_fast_way_to_200_says_the_same_as_the_general_one(in_1994):
    """ok() is response() for a JSON text."""
    assert http1.ok('{"count": 1}\n') == http1.response(200, b'{"count": 1}\n')


def test_the_date_follows_the_clock(monkeypatch):
    """Within a second the date stays, and with the next second it changes."""
    times = iter([784111777, 784111777.9, 784111778])
    monkeypatch.setattr(http1, "time", SimpleNamespace(time=lambda: next(times)))
    dates = [http1.ok("").split(b"\r\n")[1] for _ in range(3)]
    assert [date[-12:] for date in dates] == [b"08:49:37 GMT", b"08:49:37 GMT", b"08:49:38 GMT"]


def test_a_header_can_be_added():
    """The line goes to the end of the head, and the body stays, whatever is in it."""
    assert http1.with_header(b"HTTP/1.1 200 OK\r\nA: 1\r\n\r\nx\r\n\r\ny", b"B: 2") == (
        b"HTTP/1.1 200 OK\r\nA: 1\r\nB: 2\r\n\r\nx\r\n\r\ny"
    )


def test_a_body_can_be_left_out(in_1994):
    """What answers HEAD is the head, with the length that the body has."""
    whole = http1.response(200, b"x\r\n\r\ny")
    assert http1.without_body(whole) == whole.removesuffix(b"x\r\n\r\ny")
    assert b"Content-Length: 6\r\n\r\n" in http1.without_body(whole)


@pytest.mark.parametrize("status", [400, 404, 405, 408, 413, 414, 417, 431, 500, 501, 503, 504, 505])
def test_a_refusal_is_a_problem(status):
    """Every status has the RFC 9457 fields, its type of content and its own headers."""
    raw = Refused(status, 'say "please", é', [("Retry-After", "1")]).response()
    start, _, body = raw.partition(b"\r\n\r\n")
    title = HTTPStatus(status).phrase
    assert start.startswith(f"HTTP/1.1 {status} {title}\r\n".encode())
    assert b"\r\nRetry-After: 1\r\n" in start
    assert b"\r\nContent-Type: application/problem+json\r\n" in start
    assert start.endswith(b"\r\nContent-Length: %d" % len(body))
    assert json.loads(body) == {"type": "about:blank", "title": title, "status": status, "detail": 'say "please", é'}
    assert body.endswith(b"}\n")

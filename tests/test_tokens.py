"""Tokens of clients: the file they are in, what each allows, and when it ends."""

import json
import os
import signal

import pytest
from clients import problem
from conftest import wait_until

from counter import Counter, KeyReused, new_replica
from counter.config import parse_arguments
from counter.http1 import Refused, parse_head
from counter.tokens import Tokens, read_token_file

READER, SHOP, ANYTHING = "reader-4711", "shop+/=", "anything.-_~"
FILE = f"""
# who may do what
read {READER}
write {SHOP} shop. counters=2 rate=5/s
\twrite   {ANYTHING}
"""


@pytest.fixture
def write_tokens(tmp_path):
    """Return a function that writes a token file and returns its path."""

    def write(text, mode=0o600):
        path = tmp_path / "tokens"
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def head(token, method="POST", target="/increment"):
    return parse_head(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}".encode())


def bearer(token):
    return f"Authorization: Bearer {token}"


class Clock:
    """Stands still unless it is set."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tokens(write_tokens, clock):
    return Tokens(read_token_file(write_tokens(FILE)), clock)


@pytest.fixture
def counter():
    return Counter(new_replica())


# The file.


def test_a_token_file_says_who_may_do_what(write_tokens):
    """A line a token, with its role and its limits; empty lines and comments say nothing."""
    grants = read_token_file(write_tokens(FILE))
    assert [grant[1:5] for grant in grants] == [
        ("read", "", None, None),
        ("write", "shop.", 2, 5),
        ("write", "", None, None),
    ]
    assert READER not in repr(grants)  # what is kept is a digest


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "no tokens"),
        ("# nothing", "no tokens"),
        ("read", "line 1: after read comes a token"),
        ("READ abc", "line 1: a line begins with"),
        ("abc", "line 1: a line begins with"),
        ("read a\nread b\nread a", "line 3: this token is there twice"),
        ("read a\nwrite a", "line 2: this token is there twice"),
        ("read abc shop.", "line 1: a token to read has no limits"),
        ("read a=b", "line 1: after read comes a token"),
        ("read é", "line 1: after read comes a token"),
        ("write a b c", "'c' is not PREFIX"),
        ("write a p/", "'p/' is not PREFIX"),
        ("write a counters=0", "'counters=0' is not"),
        ("write a counters=5 p.", "'p.' is not PREFIX"),
        ("write a rate=5", "'rate=5' is not"),
        ("write a rate=5/s rate=6/s", "'rate=6/s' is not PREFIX"),
        ("write a rate=5/m", "'rate=5/m' is not"),
        ("write a client=", "'client=' is not"),
    ],
)
def test_a_bad_token_file_is_refused(write_tokens, line, complaint):
    """The error names the file, the line and what is wrong with it, but not a token."""
    path = write_tokens(line)
    with pytest.raises(ValueError, match="tokens") as error:
        read_token_file(path)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o604, 0o666])
def test_a_token_file_that_others_can_use_is_refused(write_tokens, mode):
    """The group included; the error says what to do."""
    path = write_tokens(FILE, mode)
    with pytest.raises(ValueError, match=f"chmod go= {path}"):
        read_token_file(path)


def test_a_file_of_root_may_be_given_to_the_group(write_tokens, monkeypatch):
    """systemd and Kubernetes give a process its secrets that way; to everybody is still too much."""
    path = write_tokens(FILE, 0o440)
    os.chown(path, 0, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 65532)
    assert read_token_file(path)
    path.chmod(0o444)
    with pytest.raises(ValueError, match="open to other users"):
        read_token_file(path)


def test_what_is_no_file_or_no_text_is_refused(write_tokens, tmp_path):
    """The error says why."""
    path = write_tokens("")
    path.write_bytes(b"read \xff\n")
    with pytest.raises(ValueError, match="not text"):
        read_token_file(path)
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ValueError, match="larger than"):
        read_token_file(path)
    with pytest.raises(ValueError, match="No such file"):
        read_token_file(tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "read\n", "write a b c\n"])
def test_a_node_does_not_start_with_a_bad_token_file(write_tokens, text, capsys):
    """One line that names the flag, status 2."""
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--token-file", str(write_tokens(text))])
    assert exit.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("counter_server.py: argument --token-file: ")
    assert complaint.count("\n") == 1


# What a token allows.


def test_each_client_may_do_what_its_token_says(tokens, counter):
    """Only a token to write counts, and only what begins with its prefix."""
    with pytest.raises(Refused) as refused:
        tokens.access(head(READER)).limited(counter)
    assert refused.value.status == 403
    shop = tokens.access(head(SHOP)).limited(counter)
    assert shop.increment("shop.a", 3)[1:] == (1, 3)
    with pytest.raises(Refused, match=r"begin with shop\.") as refused:
        shop.increment("sho", 3)
    assert refused.value.status == 403
    assert tokens.access(head(ANYTHING)).limited(counter).increment("sho", 1)[1:] == (2, 1)


@pytest.mark.parametrize(
    "line",
    ["", "Authorization:", "Authorization: Bearer", f"Authorization: {READER}", f"Authorization: Basic {READER}",
     bearer(READER + "x"), bearer(READER[:-1]), bearer(READER.upper()), bearer(f"{READER}, {READER}"), "X: y"],
)  # fmt: skip
def test_without_a_good_token_nothing_is_allowed(tokens, line):
    """401, with the challenge of RFC 6750."""
    with pytest.raises(Refused) as refused:
        tokens.access(parse_head(f"GET /count HTTP/1.1\r\nHost: x\r\n{line or 'A: b'}".encode()))
    assert refused.value.status == 401
    name, challenge = refused.value.headers[0]
    assert name == "WWW-Authenticate"
    assert challenge.startswith("Bearer ")
    assert ("invalid_token" in challenge) == line.startswith("Authorization")


def test_a_token_counts_no_faster_than_its_rate(tokens, counter, clock):
    """A second's worth may come at once; then 429 says when to try again."""
    shop = tokens.access(head(SHOP)).limited(counter)
    for second in (0, 3600):
        clock.now = 1000.0 + second
        for _ in range(5):
            shop.increment("shop.a")
        for late_s, left in ((0.0, 0), (0.125, 0), (0.25, 1), (0.75, 2)):
            clock.now = 1000.0 + second + late_s
            for _ in range(left):
                shop.increment("shop.a")
            with pytest.raises(Refused) as refused:
                shop.increment("shop.a")
            assert refused.value.status == 429
            assert refused.value.headers == [("Retry-After", "1")]
    assert counter.value("shop.a") == 16


def test_a_token_fills_no_more_counters_than_it_may(tokens, counter, clock):
    """What it has incremented it may go on incrementing, and what was not counted takes no place."""
    shop = tokens.access(head(SHOP)).limited(counter)
    shop.increment("shop.a")
    shop.increment_once("key", "shop.a", 1, 0.0)
    clock.now += 10
    for name in ("shop.b", "shop.c"):
        with pytest.raises(KeyReused):
            shop.increment_once("key", name, 2, 0.0)
    shop.increment("shop.b")
    with pytest.raises(Refused, match="2 counters") as refused:
        shop.increment("shop.c")
    assert refused.value.status == 403
    assert shop.increment("shop.a")[2] == 3
    tokens.access(head(ANYTHING)).limited(counter).increment("shop.c")


def test_keys_of_two_clients_are_never_the_same(tokens, counter):
    """One can neither learn what another counted under a key, nor take the key from it."""
    shop, other = (tokens.access(head(token)).limited(counter) for token in (SHOP, ANYTHING))
    first = shop.increment_once("order-1", "shop.a", 5, 0.0)
    second = other.increment_once("order-1", "private", 7, 0.0)
    assert (first[3], second[3]) == (False, False)
    assert shop.increment_once("order-1", "shop.a", 5, 0.0) == (*first[:3], True)
    assert counter.increment_once("order-1", "x", 1, 0.0)[3] is False  # nor is it one of a node without tokens


# When a token ends.


def test_a_token_that_has_left_the_file_is_worth_nothing(tokens, write_tokens):
    """One whose line has changed is another; all others stay what they are."""
    before = {token: tokens.access(head(token)) for token in (READER, SHOP, ANYTHING)}
    tokens.replace(read_token_file(write_tokens(f"read {READER}\nwrite {SHOP} shop. counters=3 rate=5/s\nread new")))
    assert [access.valid for access in before.values()] == [True, False, False]
    assert tokens.access(head(READER)) is before[READER]
    assert tokens.access(head(SHOP)).grant.counters == 3
    assert tokens.access(head("new")).valid
    with pytest.raises(Refused):
        tokens.access(head(ANYTHING))


def test_a_client_keeps_its_keys_and_limits_from_token_to_token(write_tokens, counter, clock):
    """With client=NAME, a retry under its next token is a retry, and what it used stays used."""
    line = "write {} client=shop counters=1 rate=2/s\n"
    tokens = Tokens(read_token_file(write_tokens(line.format("old"))), clock)
    counted = tokens.access(head("old")).limited(counter).increment_once("order-1", "a", 1, 0.0)
    tokens.replace(read_token_file(write_tokens(line.format("old") + line.format("new"))))
    tokens.replace(read_token_file(write_tokens(line.format("new"))))
    client = tokens.access(head("new")).limited(counter)
    assert client.increment_once("order-1", "a", 1, 0.0) == (*counted[:3], True)
    clock.now += 1
    with pytest.raises(Refused, match="1 counters"):
        client.increment("b")
    client.increment("a")
    client.increment("a")
    with pytest.raises(Refused, match="2 increments"):
        client.increment("a")


# At a node.


@pytest.fixture
def guarded(start_local, write_tokens):
    return start_local("--token-file", str(write_tokens(FILE)), "--cors-origin", "https://page.example")


OPEN = ["/healthz", "/readyz", "/"]
GUARDED = ["/count", "/count/a?after=x", "/counts", "/increments/x", "/peers", "/metrics", "/nothing"]


@pytest.mark.parametrize("path", OPEN)
def test_what_tells_nothing_is_open(guarded, connect, path):
    """Probes, and the page: it has no numbers of its own."""
    assert connect(guarded).ask("GET", path).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT"])
@pytest.mark.parametrize("path", GUARDED)
def test_everything_else_asks_for_a_token(guarded, connect, method, path):
    """Whether or not there is such a path."""
    reply = connect(guarded).ask(method, path)
    assert reply.status == 401
    assert reply.headers["www-authenticate"].startswith("Bearer")


def test_each_role_at_a_node(guarded, connect):
    """A reader reads, a writer counts what it may and reads all; what is refused is not counted."""
    client = connect(guarded)
    problem(client.ask("POST", "/increment/shop.a"), 401)
    problem(client.ask("POST", "/increment/shop.a", bearer(READER)), 403)
    problem(client.ask("POST", "/increment/other", bearer(SHOP)), 403)
    assert client.ask("POST", "/increment/shop.a", bearer(SHOP)).json()["count"] == 1
    for token in (READER, SHOP, ANYTHING):
        assert client.ask("GET", "/counts", bearer(token)).json()["counts"] == {"shop.a": 1}
    for _ in range(4):
        assert client.ask("POST", "/increment/shop.a", bearer(SHOP)).status == 200
    reply = client.ask("POST", "/increment/shop.a", bearer(SHOP))
    problem(reply, 429)
    assert reply.headers["retry-after"] == "1"
    problem(client.ask("GET", "/count", bearer(READER), bearer(READER)), 400)


def test_a_page_of_an_allowed_site_can_show_its_token(guarded, connect):
    """The preflight carries none, and its answer lets the header through; a 401 can be read by the page."""
    client, origin = connect(guarded), "Origin: https://page.example"
    reply = client.ask("OPTIONS", "/increment", origin)
    assert reply.status == 204
    assert "Authorization" in reply.headers["access-control-allow-headers"]
    reply = client.ask("POST", "/increment", origin)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (401, "https://page.example")
    assert client.ask("POST", "/increment", origin, bearer(ANYTHING)).status == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/count"), ("POST", "/increment"), ("GET", "/peers")])
def test_a_connection_kept_alive_loses_what_its_token_loses(guarded, connect, write_tokens, method, path):
    """From the very next request on, though its head is the same; given back, the token is good again."""
    client = connect(guarded)
    grants = read_token_file(write_tokens(FILE))
    for _ in range(2):
        for _ in range(3):
            assert client.ask(method, path, bearer(ANYTHING)).status == 200
        guarded.tokens.replace(grants[:2])
        for _ in range(3):
            problem(client.ask(method, path, bearer(ANYTHING)), 401)
        guarded.tokens.replace(grants)


def test_nodes_need_no_token(start_node, write_tokens):
    """Messages between nodes are not those of clients."""
    path = write_tokens(FILE)
    first = start_node("--token-file", path)
    second = start_node("--token-file", path, peers=[first])
    reading, counting = ({"Authorization": f"Bearer {token}"} for token in (READER, ANYTHING))
    first.increment(headers={**counting, "Idempotency-Key": "order-1"})
    wait_until(lambda: json.loads(second.ask("GET", "/count", headers=reading).body)["count"] == 1)
    again = second.ask("POST", "/increment", headers={**counting, "Idempotency-Key": "order-1"})
    assert (again.json()["count"], again.headers["Idempotent-Replayed"]) == (1, "true")


# SIGHUP.


def test_sighup_reads_the_token_file_again(start_node, write_tokens):
    """A bad file changes nothing, and is one line in the log."""
    path = write_tokens("read first\n")
    node = start_node("--token-file", path)

    def status(token):
        return node.ask("GET", "/count", headers={"Authorization": f"Bearer {token}"}).status

    assert [status("first"), status("second")] == [200, 401]
    write_tokens("read second\n")
    node.send_signal(signal.SIGHUP)
    wait_until(lambda: [status("first"), status("second")] == [401, 200])
    path.chmod(0o644)
    node.send_signal(signal.SIGHUP)
    wait_until(lambda: "not read again" in node.stderr())
    lines = [line for line in node.stderr().splitlines() if "not read again" in line]
    assert len(lines) == 1
    assert "flag=--token-file" in lines[0]
    assert "chmod go=" in lines[0]
    assert [status("first"), status("second")] == [401, 200]
    assert node.stop() == 0


def test_without_files_to_read_sighup_stops_a_node(start_node):
    """It is what a terminal sends when it is closed."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the tests and so the node ignore it
    node = start_node()
    signal.signal(signal.SIGHUP, inherited)
    node.send_signal(signal.SIGHUP)
    assert node.process.wait(15) == 0
    assert "stopping: signal=SIGHUP" in node.stderr()

"""TLS: the socket that encrypts, connections over it, certificates, and nodes that show each other theirs."""

import contextlib
import json
import os
import signal
import socket
import ssl
import threading
import time

import pytest
from authority import Authority
from clients import Client, Watcher, problem, request
from conftest import require_tools, wait_until

from counter import tls
from counter.certificates import Certificates
from counter.config import parse_arguments
from counter.tls import TlsSocket


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    require_tools("openssl")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def node_flags(authority):
    """Flags of a node with a certificate of its own; all have to have one."""
    return (*map(str, authority.issue("node")), "--tls-ca", str(authority.ca))


class TlsClient(Client):
    """A Client over TLS."""

    def __init__(self, node, context):
        super().__init__(node)
        self.stream.close()
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        self.stream = self.socket.makefile("rb")


@pytest.fixture
def secured(start_local, authority, node_flags):
    """A node in this process, and a function that connects to it."""
    node = start_local(*node_flags)
    with contextlib.ExitStack() as stack:

        def connect(name=None):
            return stack.enter_context(contextlib.closing(TlsClient(node, authority.client(name))))

        node.connect = connect
        yield node


# The socket.


class Wire:
    """A TlsSocket and a client of it in memory; what passes between them is noted."""

    def __init__(self, certificates, authority):
        self.sock, self.far = socket.socketpair()
        for sock in (self.sock, self.far):
            sock.setblocking(False)
        self.server = TlsSocket(self.sock, certificates.server)
        self.arrived, self.leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = authority.client()
        self.client = context.wrap_bio(self.arrived, self.leaving, server_hostname="localhost")
        self.sent = b""  # by the server, as it was on the wire

    def carry(self):
        """Carry everything there is from one side to the other."""
        if self.leaving.pending:
            self.far.sendall(self.leaving.read())
        with contextlib.suppress(BlockingIOError):
            while data := self.far.recv(2**20):
                self.sent += data
                self.arrived.write(data)

    def shake_hands(self):
        for side in (self.client, self.server, self.client, self.server):
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                side.do_handshake()
            self.carry()

    def close(self):
        self.server.close()
        self.far.close()


@pytest.fixture
def wire(authority, node_flags):
    flags = dict(zip(node_flags[::2], node_flags[1::2], strict=True))
    certificates = Certificates(flags["--tls-cert"], flags["--tls-key"], flags["--tls-ca"])
    with contextlib.closing(Wire(certificates, authority)) as wire:
        yield wire


def is_tls(data):
    """Return whether these bytes are records of TLS, the last of which may be cut short."""
    while data:
        if data[0] not in (20, 21, 22, 23) or data[1] != 3:
            return False
        data = data[5 + int.from_bytes(data[3:5], "big") :]
    return True


def test_what_is_sent_arrives_and_is_not_to_be_read_on_the_way(wire):
    wire.shake_hands()
    wire.client.write(b"question")
    wire.carry()
    assert wire.server.recv(100) == b"question"
    assert wire.server.send(b"answer") == 6
    wire.carry()
    assert wire.client.read() == b"answer"
    assert is_tls(wire.sent)
    with pytest.raises(BlockingIOError):
        wire.server.recv(100)


def test_what_came_with_the_end_of_the_handshake_is_known(wire):
    """The selector does not tell of it."""
    for side in (wire.client, wire.server):
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            side.do_handshake()
        wire.carry()
    wire.client.do_handshake()
    for number in range(100):
        wire.client.write(b"%02d" % number)
    wire.carry()
    wire.server.do_handshake()
    assert wire.server.holds_more
    assert wire.server.recv(16384) == b"".join(b"%02d" % number for number in range(100))
    assert not wire.server.holds_more


@pytest.mark.parametrize("size", [1, 10, 100, 1000])
def test_records_may_be_received_in_any_parts(wire, size):
    """Whatever is received and not returned is known, and nothing is lost."""
    wire.shake_hands()
    for number in range(100):
        wire.client.write(b"%02d" % number)
    wire.far.sendall(wire.leaving.read())
    received, tries = b"", 0
    while len(received) < 200:
        tries += 1
        with contextlib.suppress(BlockingIOError):
            received += wire.server.recv(size)
        assert tries < 10_000
    assert received == b"".join(b"%02d" % number for number in range(100))


def test_a_large_record_is_received_whole_though_it_comes_in_pieces(wire):
    wire.shake_hands()
    wire.client.write(b"x" * 16384)
    data, received = wire.leaving.read(), b""
    for start in range(0, len(data), 1000):
        wire.far.sendall(data[start : start + 1000])
        with contextlib.suppress(BlockingIOError):
            received += wire.server.recv(2**18)
        assert len(received) in (0, 16384)
    assert received == b"x" * 16384


def test_what_the_socket_does_not_take_is_sent_once_and_in_order(wire):
    """A slow reader: each byte comes out once, however often sending was tried."""
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    wire.shake_hands()
    unsent, arrived, refused = bytes(range(256)) * 4096, b"", 0
    whole = unsent
    while len(arrived) < len(whole):
        try:
            unsent = unsent[wire.server.send(unsent) :] if unsent else unsent
        except BlockingIOError:
            refused += 1
        wire.carry()
        with contextlib.suppress(ssl.SSLWantReadError):
            while data := wire.client.read(2**20):
                arrived += data
    assert arrived == whole
    assert refused > 3
    assert is_tls(wire.sent)


@pytest.mark.parametrize("end", ["shutdown", "close"])
@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_nothing_goes_out_as_it_is_when_a_connection_ends(wire, end, when):
    """An SSLSocket that is shut down sends plain text from then on; this one cannot."""
    if when == "within":
        with contextlib.suppress(ssl.SSLWantReadError):
            wire.client.do_handshake()
        wire.carry()
        with contextlib.suppress(BlockingIOError):
            wire.server.do_handshake()
    elif when == "after":
        wire.shake_hands()
        wire.server.send(b"secret")
    if end == "shutdown":
        wire.server.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            wire.server.send(b"secret")
        with contextlib.suppress(OSError):
            wire.server.recv(100)
    else:
        wire.server.close()
    wire.carry()
    assert is_tls(wire.sent)
    assert b"secret" not in wire.sent
    if when == "after":
        assert wire.client.read() == b"secret"
        assert wire.client.read() == b""  # it was told that this is the end


def test_damaged_bytes_end_a_connection(wire):
    wire.shake_hands()
    wire.client.write(b"question")
    data = bytearray(wire.leaving.read())
    data[-1] ^= 1
    wire.far.sendall(data)
    with pytest.raises(OSError, match=r"(?i)mac"):
        wire.server.recv(100)
    wire.carry()
    assert is_tls(wire.sent)


# Connections.


def test_requests_over_tls(secured):
    """One after another, several at once, and with long bodies and answers."""
    client = secured.connect()
    assert client.ask("POST", "/increment/a?amount=5").json()["count"] == 5
    client.send(b"".join(request("POST", "/increment/a") for _ in range(300)))
    assert [client.read().json()["count"] for _ in range(300)] == list(range(6, 306))
    batch = {f"name-{number:04}-{'x' * 40}": number + 1 for number in range(1000)}
    assert client.ask("POST", "/increments", body=json.dumps(batch).encode()).json()["counts"] == batch
    assert len(client.ask("GET", "/counts?limit=1000").json()["counts"]) == 1000
    assert client.ask("HEAD", "/count/a").body == b""


def test_a_stream_over_tls(secured):
    watcher = Watcher(secured.connect(), "/watch/x")
    for count in range(5):
        assert watcher.next() == count
        secured.counter.increment("x")
    assert watcher.next() == 5
    assert secured.stop()
    assert watcher.client.stream.read() == b""


def test_requests_that_came_with_one_that_waits_are_answered(secured):
    """They are decrypted while a thread answers the first; no event of the socket tells of them."""
    client = secured.connect()
    for _ in range(20):
        client.send(request("POST", "/increment/a?acks=1&timeout=1") + request("GET", "/count/a") * 3)
        counted = client.read().json()["count"]
        assert [client.read().json()["count"] for _ in range(3)] == [counted] * 3


@pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="nothing keeps two records together")
@pytest.mark.parametrize("second", ["/nowhere", "/count/a", "/peers"])
def test_requests_in_records_that_came_together_are_answered_in_order(secured, second):
    """The first is one that came before, so its answer waits for the end of the turn; others do not."""
    client = secured.connect()
    paths = ["/count/a", second] * 2
    alone = [client.ask("GET", path) for path in paths]
    for _ in range(20):
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        for path in paths:
            client.send(request("GET", path))
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        replies = [client.read() for _ in paths]
        assert [reply.status for reply in replies] == [reply.status for reply in alone]
        assert [b'"count"' in reply.body for reply in replies] == [b'"count"' in reply.body for reply in alone]


def test_bytes_one_by_one_are_a_request(secured):
    client = secured.connect()
    for byte in request("POST", "/increment/a"):
        client.send(bytes([byte]))
    assert client.read().json()["count"] == 1


def test_the_last_answer_is_whole_and_its_end_is_said(secured):
    """A client that is not told so could not tell the end of an answer from an attack."""
    client = secured.connect()
    client.socket.suppress_ragged_eofs = False
    reply = client.ask("GET", "/count/a", "Connection: close")
    assert reply.headers["connection"] == "close"
    assert client.is_over()


def test_handshakes_that_do_not_get_on_are_ended_and_hold_no_thread(secured, monkeypatch):
    """Neither silence nor a byte now and then moves the deadline; others are served meanwhile."""
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.5)
    threads = threading.active_count()
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
    hello = hello.read()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(contextlib.closing(Client(secured))) for _ in range(20)]
        over, client = set(), secured.connect()
        for byte in hello[:-1]:
            for one in slow[10:]:
                if one not in over:
                    try:
                        one.send(bytes([byte]))
                    except OSError:
                        over.add(one)
            assert client.ask("GET", "/count").status == 200
            assert threading.active_count() == threads
            if len(over) == 10:
                break
            time.sleep(0.01)
        assert len(over) == 10
        assert all(one.is_over() for one in slow[:10])
    monkeypatch.undo()
    assert secured.connect().ask("GET", "/count").status == 200


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_plain_http_at_a_tls_port_is_told_to_speak_tls(secured, connect, caplog, method):
    """In plain HTTP, as it would understand nothing else; nothing is done, and the log has one line."""
    for _ in range(3):
        client = connect(secured)
        client.send(request(method, "/increment/a"))
        reply = client.read()
        assert "https://" in problem(reply, 400)
        assert client.is_over()
    lines = [record.getMessage() for record in caplog.records if "plain HTTP came" in record.getMessage()]
    assert lines == ["plain HTTP came to this port, which speaks TLS: host=127.0.0.1"]
    assert secured.counter.value("a") == 0


def test_tls_at_a_plain_port_is_told_in_one_line(start_local, authority, caplog):
    node = start_local()
    for _ in range(3):
        with pytest.raises(ssl.SSLError):
            TlsClient(node, authority.client())
    wait_until(lambda: "TLS came" in caplog.text)
    lines = [record.getMessage() for record in caplog.records if "TLS came" in record.getMessage()]
    assert lines == ["TLS came to this port, which speaks plain HTTP: host=127.0.0.1"]


JUNK = [b"\0" * 100, b"\x16" * 20000, b"\x16\x03\x01\x02\x00" + b"\xff" * 512, b"\x80\x2e\x01"]


@pytest.mark.parametrize("junk", JUNK)
def test_nonsense_at_a_tls_port_costs_its_connection_only(secured, connect, junk):
    client = connect(secured)
    with contextlib.suppress(OSError):
        client.send(junk)
        client.socket.shutdown(socket.SHUT_WR)
        client.stream.read()
    assert secured.connect().ask("GET", "/count").status == 200


def test_old_versions_are_refused(node_flags):
    certificates = parse_arguments(node_flags).certificates
    for context in (certificates.server, certificates.client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert certificates.client.check_hostname


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_are_spoken(secured, authority, version):
    context = authority.client()
    context.minimum_version = context.maximum_version = version
    with contextlib.closing(TlsClient(secured, context)) as client:
        assert client.ask("POST", "/increment").status == 200
        assert client.socket.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]


# Who has to show a certificate.


def test_clients_need_a_certificate_if_told_so(start_local, authority, node_flags):
    """Of the CA, that is; with it they are served."""
    node = start_local(*node_flags, "--tls-client-auth", "required")
    with contextlib.closing(TlsClient(node, authority.client("node"))) as client:
        assert client.ask("GET", "/count").status == 200
    with pytest.raises((OSError, EOFError)), contextlib.closing(TlsClient(node, authority.client())) as client:
        client.ask("GET", "/count")


def test_a_certificate_of_another_ca_is_refused(secured, authority, tmp_path):
    """Also where none has to be shown."""
    other = Authority(tmp_path)
    other.issue("stranger")
    context = authority.client()
    context.load_cert_chain(tmp_path / "stranger.crt", tmp_path / "stranger.key")
    with pytest.raises((OSError, EOFError)), contextlib.closing(TlsClient(secured, context)) as client:
        client.ask("GET", "/count")


@pytest.mark.parametrize("size", [2, 2**20])
def test_messages_need_a_certificate(secured, caplog, size):
    """Before any of it is read, and whatever its signature says; with one it is the signature that counts."""
    message = request("POST", "/internal/gossip", "Counter-Signature: 0", f"Content-Length: {size}")
    for _ in range(2):
        stranger = secured.connect()
        stranger.send(message)
        assert "certificate" in problem(stranger.read(), 403)
        assert stranger.is_over()
    assert caplog.text.count("messages without a certificate are refused: host=127.0.0.1") == 1
    peer = secured.connect("node")
    peer.send(message + b"\n" * size)
    problem(peer.read(), 401)


def test_nodes_over_tls_form_a_cluster(start_node, authority, node_flags):
    """What one counts the other has, and long messages pass as well."""
    first = start_node(*node_flags, tls=authority.client())
    first.increment("/increment?amount=3")
    for start in range(0, 3000, 1000):
        batch = {f"name-{number}": 1 for number in range(start, start + 1000)}
        assert first.ask("POST", "/increments", json.dumps(batch)).status == 200
    second = start_node(*node_flags, peers=[first], tls=authority.client())
    wait_until(lambda: second.ask("GET", "/readyz").status == 200)
    assert (second.count(), second.count("name-2999")) == (3, 1)
    second.increment("/increment?acks=2")
    wait_until(lambda: first.count() == 4)


def test_a_peer_with_another_name_in_its_certificate_is_not_talked_to(start_node, authority, node_flags):
    """Its address is 127.0.0.1, for which its certificate is not."""
    other = start_node(
        *map(str, authority.issue("elsewhere", "DNS:elsewhere")), "--tls-ca", authority.ca, tls=authority.client()
    )
    node = start_node(*node_flags, "--join-timeout", "0.2", peers=[other], tls=authority.client())
    wait_until(lambda: "IP address mismatch" in node.stderr())
    assert node.peers() == set()


def test_a_peer_is_known_by_the_name_of_the_seed_that_led_to_it(start_node, authority, node_flags):
    """Its certificate is for that name, and not for the IP address that the name has now."""
    names = (*map(str, authority.issue("named", "DNS:localhost")), "--tls-ca", str(authority.ca))
    context = authority.client()
    context.check_hostname = False  # this test asks 127.0.0.1
    first = start_node(*names, tls=context)
    second = start_node(*names, "--peers", f"localhost:{first.port}", tls=context)
    wait_until(lambda: len(second.peers()) == 1)
    both = f"localhost:{first.port},localhost:{second.port}"
    third = start_node(*names, "--peers", both, tls=context)
    wait_until(lambda: len(third.peers()) == 2)


def test_plain_and_tls_nodes_say_why_they_do_not_talk(start_node, authority, node_flags):
    """Each in a line of its log."""
    secured = start_node(*node_flags, tls=authority.client())
    plain = start_node("--join-timeout", "0.2", peers=[secured])
    wait_until(lambda: "this port speaks TLS" in plain.stderr() and "plain HTTP came" in secured.stderr())
    late = start_node(*node_flags, "--join-timeout", "0.2", peers=[plain], tls=authority.client())
    wait_until(lambda: "TLS came" in plain.stderr() and "SSL" in late.stderr())
    assert plain.peers() == secured.peers() == late.peers() == set()


# The files.


def serial(client):
    return client.socket.getpeercert()["serialNumber"]


def test_certificates_are_read_again_when_they_change(secured, authority):
    """What connects from then on gets the new one; a connection that is open goes on."""
    before = secured.connect()
    authority.issue("node")
    wait_until(lambda: serial(secured.connect()) != serial(before))
    assert before.ask("POST", "/increment").status == 200


def test_sighup_reads_certificates_again(start_node, tmp_path):
    """A pair that does not belong together is one line in the log, and changes nothing."""
    authority = Authority(tmp_path)
    node = start_node(*authority.issue("node"), "--tls-ca", authority.ca, tls=authority.client())
    with contextlib.closing(TlsClient(node, authority.client())) as before:
        authority.issue("node")
        node.send_signal(signal.SIGHUP)
        wait_until(lambda: "read again: flag=--tls-cert" in node.stderr())
        with contextlib.closing(TlsClient(node, authority.client())) as client:
            assert serial(client) != serial(before)
            authority.issue("other")
            os.replace(tmp_path / "other.key", tmp_path / "node.key")
            node.send_signal(signal.SIGHUP)
            wait_until(lambda: "not read again" in node.stderr())
            with contextlib.closing(TlsClient(node, authority.client())) as later:
                assert serial(later) == serial(client)
        assert before.ask("POST", "/increment").status == 200
    wait_until(lambda: node.stderr().count("not read again") >= 1)
    assert node.stop() == 0


def test_files_are_read_once_they_have_stayed_the_same_for_a_while(tmp_path, caplog):
    """Whoever replaces them may take a while; what is bad is said once, and what follows is read."""
    authority = Authority(tmp_path)
    cert, _, key = authority.issue("node")[1:]
    certificates = Certificates(str(cert), str(key), str(authority.ca))
    first, good = certificates.server, cert.read_bytes()
    certificates.watch()
    cert.write_bytes(good[:100])
    certificates.watch()
    assert not caplog.records
    cert.write_bytes(good)
    certificates.watch()
    certificates.watch()
    second = certificates.server
    assert second is not first
    cert.write_bytes(good[:100])
    for _ in range(5):
        certificates.watch()
    assert [record.levelname for record in caplog.records if "not read again" in record.getMessage()] == ["WARNING"]
    assert certificates.server is second
    cert.write_bytes(good)
    for _ in range(2):
        certificates.watch()
    assert certificates.server is not second


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--tls-cert node.crt", "--tls-key"),
        ("--tls-key node.key", "--tls-cert"),
        ("--tls-ca ca.crt", "--tls-cert"),
        ("--tls-cert node.crt --tls-key node.key --tls-client-auth required", "--tls-ca"),
        ("--tls-cert node.crt --tls-key none.key", "none.key"),
        ("--tls-cert none.crt --tls-key node.key", "none.crt"),
        ("--tls-cert node.crt --tls-key ca.key", "not a certificate and its key"),
        ("--tls-cert node.key --tls-key node.key", "not a certificate and its key"),
        ("--tls-cert node.crt --tls-key node.key --tls-ca node.key", "no certificates"),
        ("--tls-cert node.crt --tls-key open.key", "chmod"),
        ("--tls-cert node.crt --tls-key node-locked.key", "password"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_in_one_line(authority, node_flags, capsys, flags, why):
    folder = authority.folder
    (folder / "open.key").write_bytes((folder / "node.key").read_bytes())
    (folder / "open.key").chmod(0o644)
    authority.lock("node")
    given = [str(folder / word) if "." in word else word for word in flags.split()]
    with pytest.raises(SystemExit) as exit:
        parse_arguments(given)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert why in lines[0]


def test_beyond_loopback_a_ca_is_as_good_as_a_secret(authority, node_flags):
    assert parse_arguments([*node_flags, "--host", "0.0.0.0"]).certificates.asks_peers
    with pytest.raises(SystemExit):
        parse_arguments([*node_flags[:4], "--host", "0.0.0.0"])

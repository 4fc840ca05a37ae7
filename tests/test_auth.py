"""Which names a node answers by: a page whose name comes to mean this machine is kept out."""

import socket

import pytest
from clients import gossip_request, problem, request
from conftest import wait_until

from counter import Delta, auth, new_replica
from counter.config import parse_arguments
from counter.http1 import Refused, parse_head


def asked_as(host, method="GET", path="/count"):
    return parse_head(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()[:-4])


def answers(hosts, host):
    try:
        hosts.check(asked_as(host))
    except Refused as refused:
        assert refused.status == 421
        return False
    return True


def hosts(*arguments, listens_at="127.0.0.1"):
    return auth.Hosts(parse_arguments(["--insecure", *arguments]), listens_at)


@pytest.mark.parametrize("listens_at", ["127.0.0.1", "127.1.2.3", "::1"])
@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LocalHost:8080", True),
        ("localhost.:8080", True),
        ("127.0.0.1:8080", True),
        ("10.1.2.3", True),
        ("[::1]:8080", True),
        ("[2001:db8::1]", True),
        ("", True),  # as HTTP/1.1 has it where a target has no authority; no browser sends it
        ("evil.example", False),
        ("evil.example:8080", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example:localhost", False),
        ("localhost:80:80", False),
        ("2130706433", False),
        ("127.1", False),
        ("[::1", False),
        ("[::1]x", False),
        ("[localhost]", False),
        ("user@localhost", False),
        ("localhost,evil.example", False),
    ],
)
def test_on_loopback_a_node_answers_to_names_nobody_can_change(listens_at, host, expected):
    """Addresses, and the names of this machine; a name somebody else owns may lead here, too."""
    if "@" in host:
        with pytest.raises(Refused):
            asked_as(host)
    else:
        assert answers(hosts(listens_at=listens_at), host) is expected


def test_a_node_answers_to_its_own_names(monkeypatch):
    """The name of its machine, in full and short, and the one that its peers are told."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Box1.Example.org")
    own = hosts("--advertise", "counter.internal:8080")
    for host in ("box1", "box1.example.org:8080", "counter.internal"):
        assert answers(own, host)
    assert not answers(own, "box1.example.com")


def test_further_names_are_allowed_one_by_one():
    """Those of --allow-host, in any case; * is all."""
    allowing = hosts("--allow-host", "Counter.Example", "--allow-host", "other.example")
    for host in ("counter.example", "other.example:80", "localhost", "127.0.0.1"):
        assert answers(allowing, host)
    assert not answers(allowing, "third.example")
    assert answers(hosts("--allow-host", "*"), "third.example")


@pytest.mark.parametrize("listens_at", ["0.0.0.0", "::", "10.1.2.3"])
def test_beyond_loopback_a_node_answers_to_any_name_unless_told(listens_at):
    """Others reach it by names it cannot know; with --allow-host by those alone."""
    assert answers(hosts(listens_at=listens_at), "evil.example")
    told = hosts("--allow-host", "counter.example", listens_at=listens_at)
    for host, expected in (("counter.example", True), ("10.1.2.3:8080", True), ("evil.example", False)):
        assert answers(told, host) is expected


@pytest.mark.parametrize("name", ["a b", "http://a", "a:80", "", "a/", "é", "[::1]"])
def test_what_is_no_name_cannot_be_allowed(name, capsys):
    """One line that names the flag."""
    with pytest.raises(SystemExit):
        parse_arguments(["--allow-host", name])
    assert capsys.readouterr().err.startswith("counter_server.py: argument --allow-host: ")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/count"), ("POST", "/increment"), ("GET", "/healthz"), ("GET", "/x"), ("OPTIONS", "*")],
)
def test_another_name_is_421(start_local, connect, method, path):
    """Whatever is asked for; the refusal says what allows it, and the connection goes on."""
    client = connect(start_local())
    client.send(request(method, path).replace(b"Host: localhost", b"Host: evil.example:80"))
    assert "--allow-host evil.example" in problem(client.read(), 421)
    assert client.ask("GET", "/counts").json()["counts"] == {}


def test_a_page_of_another_name_cannot_forge_gossip(start_local, connect):
    """Without a secret anybody can sign a message; one that was sent to another name is 421."""
    node = start_local()
    client = connect(node)
    message = gossip_request(node, Delta(new_replica(), 0, 1, {"forged": (1, 1000)}))
    client.send(message.replace(b"Host: localhost", b"Host: evil.example"))
    problem(client.read(), 421)
    assert client.count("forged") == 0
    client.send(message)
    assert client.read().status == 200
    assert client.count("forged") == 1000


def test_seeds_and_peers_are_reached_by_name(start_node, start_local, connect):
    """A seed's name is looked up, and a peer is asked by what it advertises: both are its own."""
    first = start_node()
    second = start_node("--peers", f"localhost:{first.port}")
    first.increment()
    wait_until(lambda: second.count() == 1)
    node = start_local("--advertise", "counter.internal:8080")
    client = connect(node)
    message = gossip_request(node, Delta(new_replica(), 0, 1, {"named": (1, 5)}))
    client.send(message.replace(b"Host: localhost", b"Host: counter.internal:8080"))
    assert client.read().status == 200
    assert client.count("named") == 5

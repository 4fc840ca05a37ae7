"""GET /openapi.json says what the routes do: each of them, with its parameters, and what it answers."""

import json

import pytest
from clients import NOBODYS_ID, problem
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from counter import openapi

KEY = "Idempotency-Key: described"


def described():
    """Yield each (path as in a table of routes, METHOD, operation)."""
    for path, operations in openapi.DOCUMENT["paths"].items():
        for method, operation in operations.items():
            yield path.replace("{name}", "NAME").replace("{id}", "ID"), method.upper(), operation


def operation_of(method, target):
    """Return the operation of a request that a node answers."""
    path = target.partition("?")[0]
    for template, other, operation in described():
        parent, _, last = template.rpartition("/")
        if method == other and path in (template, f"{parent}/{path.rpartition('/')[2]}" if last.isupper() else ""):
            return operation
    raise LookupError(f"{method} {target}")


def check(reply, method, target):
    """Check that a reply is one of those that are described."""
    found = operation_of(method, target)["responses"][str(reply.status)]
    if "$ref" in found:
        found = openapi.DOCUMENT["components"]["responses"][found["$ref"].rpartition("/")[2]]
    ((media_type, content),) = found["content"].items()
    assert reply.headers["content-type"].partition(";")[0] == media_type
    schema = content["schema"] | {"components": openapi.DOCUMENT["components"]}
    body = reply.json() if media_type.endswith("json") else reply.body.decode()
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(body)


def test_the_document_is_valid(client):
    reply = client.ask("GET", "/openapi.json")
    assert (reply.status, reply.json()) == (200, openapi.DOCUMENT)
    validate(reply.json())


def test_every_route_is_described_and_no_other(node):
    found = {}
    for path, method, _ in described():
        found.setdefault(path, set()).add(method)
    assert found == node.api.public


def test_operations_have_names_of_their_own():
    ids = [operation["operationId"] for _, _, operation in described()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("path", "method", "operation"), list(described()), ids=lambda value: str(value)[:16])
def test_a_route_takes_the_parameters_that_are_described(client, path, method, operation):
    target = path.replace("NAME", "described").replace("ID", NOBODYS_ID)
    detail = problem(client.ask(method, f"{target}?nonsense=1"), 400)
    known = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"]
    assert set(detail.rpartition("known here: ")[2].split(", ")) == set(known or ["none"])


@pytest.mark.parametrize(
    ("method", "target", "headers", "body", "status"),
    [
        ("POST", "/increment", [], b"", 200),
        ("POST", "/increment/described?amount=-5", [], b"", 200),
        ("POST", "/increment/described", [], b'{"amount": 5}', 200),
        ("POST", "/increment/described", [KEY], b"", 200),
        ("POST", "/increment/described?acks=1", [], b"", 200),
        ("POST", "/increment/described?acks=9&timeout=0", [], b"", 202),
        ("POST", "/increment/described?amount=0", [], b"", 400),
        ("POST", "/increment/described?durable=true", [], b"", 400),
        ("POST", "/increment/described?amount=2", [KEY], b"", 422),
        ("POST", "/increment/described", ["Origin: http://other.example"], b"", 403),
        ("POST", "/increment/described", ["Expect: nonsense"], b"", 417),
        ("POST", "/increments", [], b'{"described": 1, "also": -2}', 200),
        ("POST", "/increments?acks=9&timeout=0", [], b'{"described": 1}', 202),
        ("POST", "/increments", [], b"{}", 400),
        ("GET", f"/increments/{NOBODYS_ID}", [], b"", 404),
        ("GET", "/count", [], b"", 200),
        ("GET", "/count/described", [], b"", 200),
        ("GET", f"/count/described?after={NOBODYS_ID}&timeout=0", [], b"", 504),
        ("GET", "/count/described?fresh=true&timeout=1", [], b"", 200),
        ("GET", "/count/described?fresh=active", [], b"", 200),
        ("GET", f"/count/described?after={NOBODYS_ID}&fresh=true", [], b"", 400),
        ("GET", "/counts?limit=1", [], b"", 200),
        ("GET", "/counts?prefix=described&start=d", [], b"", 200),
        ("GET", "/counts?order=value", [], b"", 200),
        ("GET", "/counts?order=value&start=d", [], b"", 400),
        ("GET", "/counts", ["Transfer-Encoding: chunked"], b"", 501),
        ("GET", "/peers", [], b"", 200),
        ("GET", "/healthz", [], b"", 200),
        ("GET", "/readyz", [], b"", 200),
        ("GET", "/metrics", [], b"", 200),
    ],
)
def test_an_answer_is_as_described(client, connect, node, method, target, headers, body, status):
    connect(node).ask("POST", "/increment/described", KEY)
    reply = client.ask(method, target, *headers, body=body)
    assert reply.status == status
    check(reply, method, target)


def test_an_increment_that_is_looked_up_is_as_described(client):
    target = f"/increments/{client.ask('POST', '/increment').json()['id']}"
    check(client.ask("GET", target), "GET", target)


def test_peers_and_a_data_file_are_as_described(start_local, connect, tmp_path):
    one = start_local("--data", str(tmp_path / "counter.db"))
    start_local("--peers", f"127.0.0.1:{one.port}", "--heartbeat-interval", "0.1")
    client = connect(one)
    check(client.ask("POST", "/increment?durable=true&acks=2"), "POST", "/increment")
    peers = client.ask("GET", "/peers")
    assert json.loads(peers.body)["peers"] != []
    check(peers, "GET", "/peers")
    check(client.ask("GET", "/readyz"), "GET", "/readyz")

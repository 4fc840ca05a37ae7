"""GET /openapi.json: the public API for programs, from which clients and tests can be generated.

Source: OpenAPI 3.1.1, https://spec.openapis.org/oas/v3.1.1.html.  A test holds it against the routes.
"""

import json

from counter import __version__
from counter.ids import AMOUNT_MAX
from counter.parameters import ACTIVE, BATCH_MAX, BY_NAME, BY_VALUE, COUNTS_MAX, WAIT_DEFAULT_S, WAIT_MAX_S
from counter.watching import CONTENT_TYPE
from counter.windows import KEEP_MAX

PROBLEM = "application/problem+json"
DESCRIPTION = (
    "One node of a distributed counter without a coordinator.  HEAD works wherever GET does.  Unknown and repeated"
    " query parameters are refused.  An error is a problem of RFC 9457 whose `detail` says what to do."
)
REFUSALS = {
    400: "A malformed value, parameter, body or head",
    401: "The node has a token file, and the request shows no token in it",
    403: "The token does not allow it, or the request comes from a web page of another site",
    404: "The increment has not arrived here, or not yet",
    408: "The head or the body took too long to arrive",
    413: "The body is too large",
    414: "The request line is too long",
    417: "An expectation other than 100-continue",
    421: "The node does not answer by the name in Host",
    422: "The idempotency key came before, with another counter, amount or batch",
    429: "More increments than the token allows",
    431: "The head is too large",
    500: "A bug; the log of the node has it",
    501: "A Transfer-Encoding; send a Content-Length",
    503: "Overloaded, not ready, or stopping: try again, or another node",
    504: "It did not happen within the timeout",
    505: "Neither HTTP/1.1 nor HTTP/1.0",
    507: "This node has no room for another counter",
}
ALWAYS = (400, 408, 413, 414, 417, 421, 431, 500, 501, 503, 505)  # refusals that every request may meet
TOKEN = (401, 403)  # those of a request that needs a token


def schema(name):
    return {"$ref": f"#/components/schemas/{name}"}


def record(required, **optional):
    """Return the schema of an object with these fields."""
    return {"type": "object", "required": list(required), "properties": required | optional}


def header(description, **of):
    return {"description": description, "schema": of}


def in_query(name, description, **of):
    return {"name": name, "in": "query", "description": description, "schema": of}


def in_path(name, description, of):
    return {"name": name, "in": "path", "required": True, "description": description, "schema": of}


def timeout(of):
    return in_query(
        "timeout",
        f"How many seconds to wait for {of}",
        type="number",
        minimum=0,
        maximum=WAIT_MAX_S,
        default=WAIT_DEFAULT_S,
    )


def answer(description, content, media_type="application/json", headers=None):
    found = {"description": description, "content": {media_type: {"schema": content}}}
    return found | ({"headers": headers} if headers else {})


def refusal(status):
    headers = {
        401: {"WWW-Authenticate": header("That it takes a Bearer token", type="string")},
        429: {"Retry-After": header("In how many seconds", type="integer")},
        503: {"Retry-After": header("In how many seconds, where the node knows", type="integer")},
    }
    return answer(REFUSALS[status], schema("Problem"), PROBLEM, headers.get(status))


def operation(id, summary, answers, parameters=(), body=None, refusals=(), is_open=False):
    """Return an operation; `answers` are {status: answer}, `refusals` further statuses of problems."""
    statuses = sorted({*ALWAYS, *refusals, *(() if is_open else TOKEN)})
    responses = {str(status): found for status, found in answers.items()}
    responses |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}
    found = {"operationId": id, "summary": summary, "parameters": list(parameters), "responses": responses}
    if body:
        found["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return found | ({"security": []} if is_open else {})


NAME_IN_PATH = in_path("name", "The counter", schema("Name"))
KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Counts once for that key, at whatever nodes; best a new UUIDv7 for each increment",
    "schema": {"type": "string", "pattern": r"^[\x21-\x7e]{1,257}$"},
}
CONDITIONS = (
    in_query("acks", "Wait until so many nodes hold it, this one included", type="integer", minimum=1, maximum=999_999),
    in_query("durable", "Wait until it is on the disk of this node", type="boolean", default=False),
    timeout("acks and durable"),
)
AMOUNT_IN_QUERY = in_query("amount", "What to count; a negative number decrements", allOf=[schema("Amount")], default=1)
AMOUNT_IN_BODY = record({}, amount=schema("Amount")) | {"additionalProperties": False}
REPLAYED = {"Idempotent-Replayed": header("`true` if the key came before: nothing was counted now", type="string")}


def counted(of):
    """Return the answers to an increment, which may have to be at places before them."""
    return {
        200: answer("Counted", schema(of), headers=REPLAYED),
        202: answer("Counted, but not in time where it was wanted", schema(of), headers=REPLAYED),
    }


def increment(id, summary, *parameters):
    return operation(
        id,
        summary,
        counted("Incremented"),
        (*parameters, AMOUNT_IN_QUERY, *CONDITIONS, KEY),
        AMOUNT_IN_BODY,
        refusals=(422, 429, 507),
    )


def count(id, summary, *parameters):
    after = in_query("after", "Wait until the increment with this id has arrived here", allOf=[schema("Id")])
    fresh = in_query(
        "fresh",
        "Ask all other nodes first, or those that are not lost, so that it includes what they acknowledged before",
        enum=["true", "false", ACTIVE],
        default="false",
    )
    last = in_query(
        "last",
        "Of a windowed counter: also the counts of so many windows, the present one included",
        type="integer",
        minimum=1,
        maximum=KEEP_MAX + 1,
    )
    answers = {200: answer("What it stands at", schema("Count"))}
    wanted = (*parameters, after, fresh, last, timeout("after or fresh"))
    return operation(id, summary, answers, wanted, refusals=(504,))


def watch(id, summary, *parameters):
    description = "Server-sent events, each with a Count: one at once, and one whenever it has changed"
    return operation(id, summary, {200: answer(description, {"type": "string"}, CONTENT_TYPE)}, parameters)


PATHS = {
    "/increment": {"post": increment("incrementDefault", "Count at the counter `default`")},
    "/increment/{name}": {"post": increment("increment", "Count at a counter", NAME_IN_PATH)},
    "/increments": {
        "post": operation(
            "incrementMany",
            "Count at many counters, at all of them or at none",
            counted("Batch"),
            (*CONDITIONS, KEY),
            {
                "type": "object",
                "minProperties": 1,
                "maxProperties": BATCH_MAX,
                "propertyNames": schema("Name"),
                "additionalProperties": schema("Amount"),
            },
            refusals=(422, 429, 507),
        )
    },
    "/increments/{id}": {
        "get": operation(
            "isApplied",
            "Tell whether an increment has arrived here",
            {200: answer("It has", record({"id": schema("Id"), "applied": {"const": True}}))},
            [in_path("id", "The id of the increment", schema("Id"))],
            refusals=(404,),
        )
    },
    "/count": {"get": count("countDefault", "Read the counter `default`")},
    "/count/{name}": {"get": count("count", "Read a counter", NAME_IN_PATH)},
    "/watch": {"get": watch("watchDefault", "Watch the counter `default`")},
    "/watch/{name}": {"get": watch("watch", "Watch a counter", NAME_IN_PATH)},
    "/counts": {
        "get": operation(
            "counts",
            "List counters by name, or the largest first",
            {200: answer("A page of them", schema("Counts"))},
            [
                in_query("prefix", "Only names that begin so", type="string", pattern=r"^[A-Za-z0-9._:@-]{0,144}$"),
                in_query("start", "Go on there: the `next` of the page before, by name", allOf=[schema("Name")]),
                in_query("limit", "How many", type="integer", minimum=1, maximum=COUNTS_MAX, default=100),
                in_query("order", "By name, or by value, the largest first", enum=[BY_NAME, BY_VALUE], default=BY_NAME),
            ],
        )
    },
    "/peers": {"get": operation("peers", "Tell of this node and its peers", {200: answer("They", schema("Peers"))})},
    "/healthz": {
        "get": operation(
            "health",
            "Tell that the process serves",
            {200: answer("It does", record({"status": {"const": "alive"}}))},
            is_open=True,
        )
    },
    "/readyz": {
        "get": operation(
            "readiness",
            "Tell whether this node holds what the cluster has counted",
            {200: answer("It does", schema("Ready"))},
            is_open=True,
        )
    },
    "/metrics": {
        "get": operation(
            "metrics",
            "Everything to watch",
            {200: answer("In the text format of Prometheus", {"type": "string"}, "text/plain")},
        )
    },
    "/openapi.json": {
        "get": operation("openapi", "This document", {200: answer("It", {"type": "object"})}, is_open=True)
    },
}
INTEGER, STRING, NUMBER = {"type": "integer"}, {"type": "string"}, {"type": "number"}
DATE_TIME = {"type": "string", "format": "date-time"}
WHERE = {  # fields of an answer to ?acks and ?durable
    "acks": {"type": "integer", "description": "How many nodes hold it, as far as this one knows"},
    "durable": {"type": "boolean", "description": "Whether it is on the disk of this node"},
}
SCHEMAS = {
    "Name": {
        "type": "string",
        "pattern": r"^[A-Za-z0-9._:-]{1,128}(@[1-9][0-9]{0,7}[smhd](:[1-9][0-9]{0,3})?)?$",
        "not": {"pattern": r"^\.\.?(@|$)"},
        "description": "With @WIDTH or @WIDTH:KEEP a counter of windows so wide, of which so many past ones are kept",
    },
    "Amount": {"type": "integer", "minimum": -AMOUNT_MAX, "maximum": AMOUNT_MAX, "not": {"const": 0}},
    "Id": {"type": "string", "format": "uuid", "description": "A UUIDv8 of its own for every increment"},
    "Incremented": record({"id": schema("Id"), "name": schema("Name"), "count": INTEGER}, **WHERE),
    "Batch": record({"id": schema("Id"), "counts": {"type": "object", "additionalProperties": INTEGER}}, **WHERE),
    "Count": record(
        {"name": schema("Name"), "count": INTEGER},
        nodes={"type": "integer", "minimum": 1, "description": "How many nodes a fresh read includes"},
        window=record({"start": DATE_TIME, "seconds": INTEGER})
        | {"description": "Of a windowed counter: the present window, of which `count` is"},
        total=INTEGER | {"description": "The sum of the last windows"},
        windows={
            "type": "array",
            "items": {"type": "array", "prefixItems": [DATE_TIME, INTEGER]},
            "description": "The start and the count of each of the last windows, oldest first",
        },
    ),
    "Counts": record(
        {
            "counts": {"type": "object", "additionalProperties": INTEGER},
            "next": {"oneOf": [schema("Name"), {"type": "null"}]},
        }
    ),
    "Peers": record(
        {
            "self": record(
                {"id": STRING, "address": STRING, "uptime_s": NUMBER, "version": STRING, "data": schema("Data")}
            ),
            "peers": {"type": "array", "items": schema("Peer")},
        }
    ),
    "Peer": record(
        {
            "id": STRING,
            "address": STRING,
            "state": {"enum": ["active", "lost"]},
            "silent_s": NUMBER,
            "unconfirmed": {"type": ["integer", "null"]},
            "version": {"type": ["string", "null"]},
            "skew_s": {"type": ["number", "null"], "description": "By how much its wall clock is ahead of this node's"},
        }
    ),
    "Data": {
        "oneOf": [
            record(
                {
                    "ok": {"type": "boolean"},
                    "lag_increments": INTEGER,
                    "lag_s": NUMBER,
                    "error": {"type": ["string", "null"]},
                }
            ),
            {"type": "null"},
        ]
    },
    "Ready": record({"status": {"const": "ready"}, "alone": {"type": "boolean"}}, data={"enum": ["ok", "failing"]}),
    "Problem": record({"type": STRING, "title": STRING, "status": INTEGER, "detail": STRING}),
}

DOCUMENT = {
    "openapi": "3.1.1",
    "info": {"title": "counter server", "version": __version__, "description": DESCRIPTION},
    "servers": [{"url": "."}],
    "security": [{}, {"token": []}],
    "paths": PATHS,
    "components": {
        "schemas": SCHEMAS,
        "responses": {str(status): refusal(status) for status in REFUSALS},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    },
}
BODY = (json.dumps(DOCUMENT, indent=1) + "\n").encode()

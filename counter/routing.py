"""From the head of a request to the action that answers it; and without a route, what was most likely meant.

A *route* is a function of (head, the last part of a named path).  It checks everything that the head
says and returns an *action*, a function of (body, connection) that answers the request, and that is
called again when the same head comes again.  What the routes do is the business of the table's owner.
"""

import difflib

from counter import http1, metrics
from counter.http1 import Refused
from counter.ids import NAME
from counter.lanes import QUICK, SLOW

READ, ADD = "GET /count[/NAME] reads a counter", "POST /increment[/NAME] adds to a counter"
LOOK_UP = "GET /increments/ID tells whether an increment has arrived, GET /counts lists counters"
INSTEAD = {
    "/increment": READ,
    "/increments": LOOK_UP,
    "/count": ADD,
    "/counts": ADD,
}  # path -> what a wrong method most likely meant
TRY = "try POST /increment[/NAME], GET /count[/NAME] and GET /peers"
TYPED_MAX = 32  # characters of an unknown path that are compared with known ones
SIMILAR = 0.5  # how much they must have in common: 0 is nothing, 1 is everything


def action(pace=SLOW):
    """Turn a function of (body, connection) into an action.

    It returns the bytes of a response, or an iterable of pieces of which the first has the whole head, or
    such a piece and what comes after it; or it raises Refused.  Its pace decides which thread runs it, see
    counter/lanes.py.  A QUICK one takes microseconds and returns bytes: while it runs, all other connections wait.
    """

    def mark(function):
        function.pace = pace
        return function

    return mark


def refusing(refused):
    """Return the action that raises this Refused."""

    @action(QUICK)
    def refuse(_body, _connection):
        raise refused

    return refuse


def with_headers(inner, lines):
    """Return an action with further header lines, as bytes, in its response, also where it refuses."""

    @action(inner.pace)
    def answer(body, connection):
        try:
            response, further = http1.opened(inner(body, connection))
        except Refused as refused:
            response, further = refused.response(), ()
        response = http1.with_header(response, lines)
        return (response, further) if further else response

    return answer


class Router:
    """A table of routes, {path: {method: route}}; a path that ends in /NAME or /ID stands for every last part.

    GET serves HEAD as well.  The paths in `hidden` are never suggested, and not in `public`, {path: methods}.
    """

    def __init__(self, table, hidden=()):
        named = {path: routes for path, routes in table.items() if path.endswith(("/NAME", "/ID"))}
        self._exact = {path: routes for path, routes in table.items() if path not in named}
        self._named = {path[: path.rindex("/") + 1]: routes for path, routes in named.items()}
        # Up to the last slash -> the path by which requests are counted.
        self._counted = {path[: path.rindex("/") + 1]: path.removesuffix("/NAME") for path in named}
        self._known = {path.strip("/"): path for path in self._exact if path not in hidden}
        self.public = {path: frozenset(routes) for path, routes in table.items() if path not in hidden}

    def path_of(self, path):
        """Return the path, one of few, by which requests to this path are counted: of the table, without /NAME."""
        if path in self._exact:
            return path
        parent, slash, _ = path.rpartition("/")
        return self._counted.get(parent + slash, metrics.OTHER)

    def action(self, head):
        """Return the action that answers a request; Refused if there is none."""
        parent, slash, last = head.path.rpartition("/")
        if head.path in self._exact:
            routes, arguments = self._exact[head.path], ()
        elif parent + slash in self._named:
            routes, arguments = self._named[parent + slash], (last,)
        elif head.path == "*" and head.method == "OPTIONS":
            routes, arguments = {"GET": None, "POST": None}, ()
        else:
            raise Refused(404, f"no such path; {self._nearest(head.path)}")
        route = routes.get("GET" if head.method == "HEAD" else head.method)
        if route:
            return route(head, *arguments)
        allowed = ", ".join([*routes, *(["HEAD"] if "GET" in routes else []), "OPTIONS"])
        if head.method == "OPTIONS":
            return _allowing(allowed)
        instead = INSTEAD.get(self.path_of(head.path))
        advice = f"this path takes {allowed}" + (f"; {instead}" if instead else "")
        raise Refused(405, advice, [("Allow", allowed)])

    def _nearest(self, path):
        """Return what was most likely meant by a path that does not exist."""
        first, _, rest = path.strip("/").partition("/")
        first = first.lower()
        if first in ("decrement", "dec"):
            name = f"/{rest}" if NAME.match(rest) else ""
            return f"POST /increment{name}?amount=-1 decrements"
        if "/" in rest and self._counted.get(f"/{first}/") == f"/{first}":
            return "a counter's name has no slash; use one of . _ : -"
        near = difflib.get_close_matches(first[:TYPED_MAX], self._known, n=1, cutoff=SIMILAR)
        return f"did you mean {self._spelled(self._known[near[0]])}?" if near else TRY

    def _spelled(self, path):
        """Return how a path is used, as in POST /increment[/NAME]."""
        method = next(iter(self._exact[path]))
        return f"{method} {path}" + ("[/NAME]" if self._counted.get(f"{path}/") == path else "")


def _allowing(allowed):
    @action(QUICK)
    def options(_body, _connection):
        return http1.response(204, b"", headers=[("Allow", allowed)])

    return options

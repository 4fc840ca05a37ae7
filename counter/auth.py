"""Which web pages may use a node.

A page of a name that its owner lets lead to this machine counts as a page of the node itself ("DNS
rebinding").  So where only this machine can connect, a node answers only to names that nobody else owns.

A browser sends a POST to any site before it asks whether it may.  So a POST from a page of another
site is refused here, unless --cors-origin allows that site.
"""

import ipaddress
import re
import socket

from counter.addresses import split_address
from counter.http1 import Refused

_HOST = re.compile(r"([^\[\]:]*|\[[0-9a-f:.]+\])(?::[0-9]*)?\Z")


class Hosts:
    """The names by which a node answers, beside those that are IP addresses."""

    def __init__(self, config, listens_at):
        """`listens_at` is the address it listens at: beyond loopback any name will do, unless some were given."""
        given = config.allow_host
        self._any = "*" in given or not (given or ipaddress.ip_address(listens_at).is_loopback)
        own = socket.gethostname().lower()
        self._names = {"", "localhost", own, own.partition(".")[0], *given}
        if config.advertise:
            self._names.add(split_address(config.advertise)[0])

    def check(self, head):
        """Raise Refused if the Host of a request is a name by which this node does not answer."""
        if self._any:
            return
        match = _HOST.match(head.headers.get("host", "").lower())
        name = match[1].removesuffix(".") if match else "?"
        if name not in self._names and not _is_ip(name.strip("[]")):
            raise Refused(421, f"this node does not answer by the name in Host; --allow-host {name[:253]} makes it")


def _is_ip(text):
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


ORIGIN_MAX = 200  # characters of an Origin that a refusal repeats


def cross_origin_headers(head, allowed):
    """Return header lines that let a page of another origin use the answer; None if none are needed.

    `allowed` holds the origins of --cors-origin.  Raises Refused for a POST from a page of any other site.
    """
    origin, site = head.headers.get("origin"), head.headers.get("sec-fetch-site")
    if origin and ("*" in allowed or origin in allowed):
        lines = [
            f"Access-Control-Allow-Origin: {origin}",
            "Vary: Origin",
            "Access-Control-Expose-Headers: Idempotent-Replayed",
        ]
        if head.method == "OPTIONS":
            lines += [
                "Access-Control-Allow-Methods: GET, HEAD, POST",
                "Access-Control-Allow-Headers: Authorization, Content-Type, Idempotency-Key",
                "Access-Control-Max-Age: 600",
            ]
        return "\r\n".join(lines).encode()
    host = head.headers.get("host")
    same = site in ("same-origin", "none") if site else not origin or origin.partition("://")[2] == host
    if head.method == "POST" and not same:
        raise _another_site(origin, host)
    return None


def _another_site(origin, host):
    """Return the refusal of a page's request, with both remedies: it may be the node's own page behind a proxy."""
    named = origin if origin and len(origin) <= ORIGIN_MAX else "ORIGIN"
    return Refused(
        403,
        f"this comes from a page of another site than {host}: if that page is this node's own, behind a proxy,"
        f" let the proxy pass the Host header on; else --cors-origin {named} lets pages of that site in",
    )

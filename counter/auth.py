"""Who may use a node: which web pages of other sites.

A browser sends a POST to any site before it asks whether it may.  So a POST from a page of another
site is refused here, unless --cors-origin allows that site.
"""

from counter.http1 import Refused

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

"""HOST:PORT in its one spelling."""

import functools
import ipaddress
import re

HOST = re.compile(r"[a-z0-9._-]{1,253}\Z")


@functools.lru_cache(4096)  # a large cluster's messages repeat some hundred of them, again and again
def parse_address(text):
    """Return `HOST:PORT` or `[IPv6]:PORT` in its one normal spelling; ValueError if it is neither."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]") and "%" not in host:  # a zone means nothing elsewhere
        return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]:{int(port)}"
    if not HOST.match(host.lower()):
        raise ValueError(f"{text!r} is not HOST:PORT (IPv6 goes in brackets)")
    return f"{host.lower()}:{int(port)}"


def join_address(host, port):
    """Return the address of a host, which may be an IPv6 literal without brackets."""
    return parse_address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def split_address(address):
    """Return (host, port) of an address; an IPv6 host comes without its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)

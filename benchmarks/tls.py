#!/usr/bin/env python3
"""What TLS costs: requests on connections that stay, new connections, and memory, beside plain HTTP.

    python benchmarks/tls.py                     # a minute
    python benchmarks/tls.py --rounds 5 --seconds 4

A node without TLS and one with it are loaded in turn, over 8 connections of wrk.  Printed are medians of
the rounds: requests per second, and the CPU time of the node for each.  Needs Linux, wrk and openssl.
"""

import argparse
import contextlib
import re
import socket
import ssl
import statistics
import subprocess
import tempfile
from pathlib import Path

from load import HOST
from nodes import start_node

CONNECTIONS = 8
IDLE = 500  # connections that are open at once, for the memory of each
LOADS = [  # name, and how wrk is to ask
    ("GET, kept alive", ()),
    ("POST, kept alive", ("-s", "post.lua")),
    ("GET, each on a new connection", ("-H", "Connection: close")),
]


def make_certificate(folder):
    """Return the flags of a node with a certificate of its own."""
    cert, key = folder / "node.crt", folder / "node.key"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *kind, *names, "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return ("--tls-cert", cert, "--tls-key", key)


def load(node, scheme, folder, arguments, seconds):
    """Load a node; return (requests a second, microseconds of CPU for each)."""
    path = "/increment" if arguments[:1] == ("-s",) else "/count"
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}", *arguments, f"{scheme}://{HOST}:{node.port}{path}"]
    before = node.cpu_s()
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    assert "Non-2xx" not in output, output
    requests, rate = (
        int(re.search(r"(\d+) requests in", output)[1]),
        float(re.search(r"Requests/sec: *(\S+)", output)[1]),
    )
    return rate, (node.cpu_s() - before) / requests * 1e6


def memory_each(node, context):
    """Return the KiB that a node keeps for an idle connection."""
    with contextlib.ExitStack() as stack:
        before = node.rss_bytes()
        for _ in range(IDLE):
            sock = stack.enter_context(socket.create_connection((HOST, node.port)))
            if context:
                sock = stack.enter_context(context.wrap_socket(sock, server_hostname=HOST))
            sock.sendall(b"GET /count HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(4096)
        return (node.rss_bytes() - before) / IDLE / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "post.lua").write_text('wrk.method = "POST"\n')
        flags = make_certificate(folder)
        plain, secured = stack.enter_context(start_node()), stack.enter_context(start_node(flags=flags))
        for node in (plain, secured):
            node.wait_listening()
        print(f"{'':32}{'plain: 1/s':>12}{'CPU us':>8}{'TLS: 1/s':>12}{'CPU us':>8}")
        for what, arguments in LOADS:
            found = {"http": [], "https": []}
            for _ in range(options.rounds):
                for scheme, node in (("http", plain), ("https", secured)):
                    found[scheme].append(load(node, scheme, folder, arguments, options.seconds))
            cells = [statistics.median(column) for scheme in found for column in zip(*found[scheme], strict=True)]
            print(f"{what:32}{cells[0]:>12.0f}{cells[1]:>8.0f}{cells[2]:>12.0f}{cells[3]:>8.0f}")
        context = ssl.create_default_context(cafile=flags[1])
        print(f"{'an idle connection, KiB':32}{memory_each(plain, None):>12.1f}{memory_each(secured, context):>20.1f}")


if __name__ == "__main__":
    main()

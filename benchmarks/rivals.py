"""What the counter server is compared with: two small servers, and Redis where it is installed."""

import contextlib
import csv
import json
import shutil
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from load import HOST, PATIENCE_S, Failed, process
from nodes import wait_until

BACKLOG = 1024  # or 500 connections at once would be reset

# HTTP servers.


class PlainHandler(BaseHTTPRequestHandler):
    """A counter as the standard library suggests; without the buffer it would be slower still."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    lock, count = threading.Lock(), 0

    def do_GET(self):
        self._answer(PlainHandler.count)

    def do_POST(self):
        with self.lock:
            PlainHandler.count += 1
            count = PlainHandler.count
        self._answer(count)

    def _answer(self, count):
        body = json.dumps({"name": "default", "count": count}).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve_plainly(listener):
    server = ThreadingHTTPServer(listener.getsockname(), PlainHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()


def serve_fixed_bytes(listener):
    """Do the least that a thread per connection can do: no Python server with such threads is faster here."""
    body = b'{"name": "default", "count": 1}\n'
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def serve(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, contextlib.suppress(OSError):
            while sock.recv(65536):
                sock.sendall(answer)

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@contextlib.contextmanager
def serving(serve):
    """Run one of these servers as a process until the end of `with`, which gets the port."""
    with socket.create_server((HOST, 0), backlog=BACKLOG) as listener, process(serve, listener):
        yield listener.getsockname()[1]


# Redis.


def redis_is_installed():
    return bool(shutil.which("redis-server") and shutil.which("redis-benchmark"))


@contextlib.contextmanager
def start_redis():
    """Run a Redis that keeps nothing on disk until the end of `with`, which gets the port."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:

            def listening():
                with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
                    return True

            wait_until(listening, "Redis listens")
            yield port
        finally:
            server.kill()


def load_redis(port, connections, pipeline, requests):
    """Send so many INCR, `pipeline` of them at a time; return (per second, p99 in ms) as redis-benchmark says."""
    command = ["redis-benchmark", "-h", HOST, "-p", port, "-c", connections, "-P", pipeline, "-n", requests]
    result = subprocess.run(
        [*map(str, command), "-t", "incr", "--csv"], check=True, capture_output=True, text=True, timeout=PATIENCE_S
    )
    for row in csv.DictReader(result.stdout.splitlines()):
        return float(row["rps"]), float(row["p99_latency_ms"])
    raise Failed(f"redis-benchmark: {result.stdout!r:.200}")

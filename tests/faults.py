"""A bad network for real nodes: proxies that cut, delay, repeat and corrupt what passes between them.

Every node advertises the address of its proxy, so all its peers reach it through that.  The proxy
works on whole messages, and knows by their sender which link they travel on.
"""

import json
import random
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import NodeProcess


class BadNetwork:
    """The proxies of a number of nodes, and what they do to the messages."""

    def __init__(self, size, seed=0):
        self.rng = random.Random(seed)
        self.cut = set()  # pairs of positions (from, to) between which nothing passes
        self.delay_s = self.repeat = self.corrupt = 0.0  # at most; and with what probability
        self.recorded = []  # the requests that passed, once `recording`: (signature, body)
        self.recording = False
        self.over = threading.Event()
        self.lives = {}  # replica id -> position
        self.nodes = [None] * size
        self.proxies = [Proxy(self, position) for position in range(size)]

    def start(self, position, *arguments, seeds=None):
        """Start a node behind its proxy; by default it joins through the proxies of all others."""
        seeds = [proxy for proxy in self.proxies if proxy.position != position] if seeds is None else seeds
        if self.nodes[position]:
            self.nodes[position].end()
        node = NodeProcess("--advertise", self.proxies[position].address, *arguments, peers=seeds)
        self.nodes[position] = node
        self.lives[node.get("/peers")["self"]["id"]] = position
        return node

    def split(self, *groups):
        """Cut all links between nodes of different groups, given as lists of positions."""
        self.cut = {(a, b) for one in groups for other in groups if one is not other for a in one for b in other}

    def heal(self):
        self.cut = set()

    def close(self):
        """End the nodes, at the same time, and the proxies, even if a node fails to end."""
        self.over.set()
        nodes = [node for node in self.nodes if node]
        try:
            for node in nodes:
                if node.process.poll() is None:
                    node.process.terminate()
            for node in nodes:
                node.end()
        finally:
            for proxy in self.proxies:
                proxy.close()


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def __init__(self, network, position):
        super().__init__(("127.0.0.1", 0), ProxiedRequest)
        self.network, self.position = network, position
        self.context = proxy_context(NodeProcess.secured[0])
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="proxy")
        self._thread.start()

    def get_request(self):
        """Accept a connection; where nodes speak TLS it does so too, and has to read what it passes on."""
        sock, address = super().get_request()
        if self.context:
            sock = self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, address

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_):
        pass  # a node was killed in the middle of a message


def proxy_context(flags):
    """Return the ssl.SSLContext of a proxy before nodes with these flags; None if they speak plain HTTP."""
    if not flags:
        return None
    cert, key = flags[1], flags[3]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


class ProxiedRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def do_POST(self):
        network, to = self.server.network, self.server.position
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sender = network.lives.get(json.loads(body.partition(b"\n")[0])["from"]["id"])
        if (sender, to) in network.cut or network.nodes[to] is None:
            self.close_connection = True
            return
        network.over.wait(network.rng.uniform(0, network.delay_s))
        copies = 2 if network.rng.random() < network.repeat else 1
        if network.recording:
            network.recorded.append((self.headers["Counter-Signature"], body))
        replies = [self._forward(network.nodes[to], self._damaged(body)) for _ in range(copies)]
        status, headers, answer = replies[0]  # to the second copy a node only answers who it is
        network.over.wait(network.rng.uniform(0, network.delay_s))
        if (to, sender) in network.cut:
            self.close_connection = True
            return
        answer = self._damaged(answer)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("date", "server", "connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))  # an answer in chunks is whole here
        self.end_headers()
        self.wfile.write(answer)

    def _forward(self, node, body):
        connection = node.connection(timeout_s=5)
        try:
            connection.request("POST", self.path, body, {"Counter-Signature": self.headers["Counter-Signature"]})
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _damaged(self, body):
        rng = self.server.network.rng
        if rng.random() >= self.server.network.corrupt or not body:
            return body
        damaged = bytearray(body)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return bytes(damaged)

    def log_message(self, *_):
        pass

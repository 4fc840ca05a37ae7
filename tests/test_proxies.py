"""nginx and Caddy in front of a node, configured as docs/operations.md says."""

import http.client
import os
import re
import subprocess

import pytest
from conftest import PROJECT, Answer, free_port, require_tools, wait_until

SITE = "counter.example"  # under which browsers know the proxy; no name that is looked up


def documented(language):
    """Return the part of a configuration that the document shows."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", (PROJECT / "docs/operations.md").read_text(), re.DOTALL)
    return block


def nginx(tmp_path, port, location):
    """Return a command line for nginx, with its configuration written."""
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (tmp_path / name).mkdir()
    paths = "\n".join(
        f"{module}_temp_path {tmp_path}/{name};"
        for module, name in [("client_body", "body"), *((n, n) for n in ("proxy", "fastcgi", "uwsgi", "scgi"))]
    )
    user = "user root;" if os.geteuid() == 0 else ""
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"daemon off; {user} pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {paths}\nserver {{ listen 127.0.0.1:{port};\n{location} }} }}\n"
    )
    return ["nginx", "-p", tmp_path, "-e", "stderr", "-c", configuration]


def caddy(tmp_path, port, site):
    configuration = tmp_path / "Caddyfile"
    configuration.write_text(f"{{\nadmin off\nauto_https off\n}}\nhttp://:{port} {{\n{site}\n}}\n")
    return ["caddy", "run", "--adapter", "caddyfile", "--config", configuration]


@pytest.fixture
def start_proxy(tmp_path):
    """Start nginx or Caddy by calling it with a function that writes its configuration, and a part of that."""
    processes = []

    def start(program, part):
        require_tools(program.__name__)
        port = free_port()
        command = program(tmp_path, port, part)
        log = (tmp_path / "log").open("wb")
        processes.append((subprocess.Popen(command, stderr=log, env={**os.environ, "HOME": str(tmp_path)}), log))

        def listens():
            """The proxy listens."""
            try:
                return ask(port, "GET", "/").status
            except ConnectionRefusedError:
                return None

        wait_until(listens)
        return port

    yield start
    for process, log in processes:
        process.terminate()
        process.wait(10)
        log.close()


def ask(port, method, path, **headers):
    """Return the Answer to a request as the browser of a visitor sends it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers={"Host": f"{SITE}:{port}", **headers})
        return Answer(connection.getresponse())
    finally:
        connection.close()


@pytest.mark.parametrize(("program", "language"), [(nginx, "nginx"), (caddy, "caddy")])
def test_a_proxy_shows_a_node_under_a_path_of_its_own(start_node, start_proxy, program, language):
    """The page is there, its +1 is taken, and the path without the slash leads to it."""
    node = start_node("--allow-host", SITE)
    port = start_proxy(program, documented(language).replace("127.0.0.1:8080", node.address))
    assert b"<title>Counter</title>" in ask(port, "GET", "/counters/").body
    counted = ask(port, "POST", "/counters/increment/visits?amount=2", Origin=f"http://{SITE}:{port}")
    assert (counted.status, counted.json()["count"]) == (200, 2)
    assert ask(port, "GET", "/counters/count/visits").json()["count"] == 2
    moved = ask(port, "GET", "/counters")
    assert moved.status in (301, 302, 308)
    assert moved.headers["Location"].removeprefix(f"http://{SITE}:{port}").endswith("/counters/")
    assert ask(port, "POST", "/counters/increment", Origin="http://elsewhere.example").status == 403


def test_the_remedies_of_a_proxy_that_rewrites_host_work(start_node, start_proxy):
    """The refusal names them: to pass Host on, as above, or --cors-origin with the page's origin."""
    node = start_node("--cors-origin", "http://allowed.example")
    part = documented("nginx").replace("127.0.0.1:8080", node.address)
    port = start_proxy(nginx, re.sub(".*Host.*\n", "", part))
    refused = ask(port, "POST", "/counters/increment", Origin=f"http://{SITE}:{port}")
    assert refused.status == 403
    assert f"--cors-origin http://{SITE}:{port}" in refused.json()["detail"]
    assert ask(port, "POST", "/counters/increment", Origin="http://allowed.example").status == 200

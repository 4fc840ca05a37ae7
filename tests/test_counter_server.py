"""The program: how it starts, and why it may not."""

import os
import socket
import subprocess
import sys

import pytest
import urllib3
from conftest import PROJECT

import counter_server
from counter import __version__


def run(*arguments):
    command = [sys.executable, "counter_server.py", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=30, check=False)


def test_the_version_is_printed():
    """As name and number, with status 0."""
    ended = run("--version")
    assert (ended.returncode, ended.stdout) == (0, f"counter_server.py {__version__}\n")


@pytest.mark.parametrize(("flag", "value"), [("--port", "x"), ("--peers", "nowhere"), ("--peer-timeout", "0.5")])
def test_a_node_with_a_bad_argument_does_not_start(flag, value):
    """The process ends with status 2 and one line that names the flag."""
    ended = run(flag, value)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert flag in ended.stderr


def test_a_node_whose_port_is_taken_does_not_start():
    """The process ends with status 1 and one line that names the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("--port", port)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert port in ended.stderr


def test_a_node_with_an_old_urllib3_does_not_start(monkeypatch, capsys):
    """Some distributions ship one, and all sending would fail.  One line says what is needed; the status is 1."""
    monkeypatch.setattr(urllib3, "__version__", "1.26.18")
    monkeypatch.setattr(counter_server, "Node", None)  # would it go on, it would fail here
    assert counter_server.main(["--port", "0"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "urllib3 1.26.18" in err


@pytest.mark.parametrize("package", ["requests", "urllib3"])
def test_a_node_without_its_packages_says_how_to_install_them(package, tmp_path):
    """As one line with the command of the README, and status 1."""
    for other in {"requests", "urllib3"} - {package}:
        (tmp_path / f"{other}.py").touch()
    ended = subprocess.run(
        [sys.executable, "-S", "counter_server.py", "--port", "8080"],  # -S: without the installed packages
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith(f"counter_server.py: {package} is not installed; ")
    command = ended.stderr.partition("; run ")[2].strip()
    assert command.endswith("pip install -q requests && .venv/bin/python counter_server.py --port 8080")
    assert command in (PROJECT / "README.md").read_text()


def test_a_node_whose_host_is_no_name_does_not_start():
    """The process ends with an error and one line that names the host, also with --insecure."""
    ended = run("--port", "0", "--insecure", "--host", "a..b")
    assert ended.returncode in (1, 2)
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)
    assert "a..b" in ended.stderr

"""The documents keep their word: examples run as they are written, links lead somewhere, flags are complete."""

import re
import shlex
import subprocess
import sys
import urllib.parse

import pytest
from conftest import PROJECT, require_tools, wait_until

from counter.config import parse_arguments

DOCUMENTS = [*sorted(PROJECT.glob("*.md")), *sorted(PROJECT.glob("docs/**/*.md")), PROJECT / "benchmarks/README.md"]
UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

TOKENS = re.search(r"^```text\n(read .*?)```$", (PROJECT / "docs/operations.md").read_text(), re.DOTALL | re.MULTILINE)[
    1
]


def named(path):
    return str(path.relative_to(PROJECT))


def text(name):
    return (PROJECT / name).read_text()


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def shown(path):
    """Return [(command, the output shown below it)] of the examples that show what they print."""
    examples = "".join(block for block in blocks(path, "sh") if block.startswith("$ "))
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).+\n)*)", examples, re.MULTILINE)


def commands(path):
    """Return the command lines of a document that show no output."""
    lines = "".join(block for block in blocks(path, "sh") if not block.startswith("$ ")).splitlines()
    return [line.partition("  # ")[0].rstrip() for line in lines if line]


def is_request(command):
    return re.match(r"(curl|id=|until) ?", command)


def at(nodes, command):
    """Return a command as it is for these nodes, where the documents have ports 8080 and on."""
    for number, node in enumerate(nodes):
        command = command.replace(f"localhost:{8080 + number}", node.address)
    return command


def run(command, cwd=PROJECT):
    """Run a command of a document as a shell does, with the Python of these tests; return what it prints."""
    command = re.sub(r"(?<!\S)python3? ", f"{shlex.quote(sys.executable)} ", command)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if "curl" in path.read_text()], ids=named)
def test_requests_do_what_they_are_shown_to_do(path, start_cluster, tmp_path):
    """In the order they are written, at three nodes.  What is shown as output is what comes, but for ids."""
    require_tools("curl", "bash")
    nodes = start_cluster(3, data=tmp_path)
    wait_until(lambda: all(node.ask("GET", "/readyz").status == 200 for node in nodes))
    for command, output in shown(path):
        wait_until(lambda: all(node.get("/counts") == nodes[0].get("/counts") for node in nodes))
        assert UUID.sub("ID", run(at(nodes, command))) == UUID.sub("ID", output)
    requests = [command for command in commands(path) if is_request(command)]
    printed = run(at(nodes, "\n".join(requests)), cwd=tmp_path)
    assert "about:blank" not in printed  # which every refusal has


def commands_with_files():
    """Return the commands of docs/data.md that need a file which a node has filled."""
    section = text("docs/data.md").partition("## Backup and restore")[2]
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]


def test_backup_restore_and_moving_in_are_as_shown(start_node, tmp_path):
    """One after the other: beside a running node, and in the place of its file."""
    require_tools("sqlite3")
    lines = [line.replace("counter_server.py", str(PROJECT / "counter_server.py")) for line in commands_with_files()]
    backup, restore, moving_in, anew = lines[:2], lines[2:4], lines[4:6], lines[6:]
    data = tmp_path / "counter.db"
    node = start_node("--data", data)
    for _ in range(3):
        node.increment("/increment/visits?durable=true")
    run("\n".join(backup), cwd=tmp_path)
    node.increment("/increment/visits?durable=true")
    assert node.stop() == 0
    run("\n".join(restore), cwd=tmp_path)
    for file in (data, tmp_path / "backup.db"):
        node = start_node("--data", file)
        assert node.count("visits") == 3
        node.stop()
    run("\n".join(moving_in), cwd=tmp_path)
    run("\n".join(anew), cwd=tmp_path)
    for file, cluster in (("counter.db", "counter"), ("counter-2.db", "counter-2")):
        assert start_node("--data", tmp_path / file, "--cluster", cluster).count("visits") == 4714


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_other_command_is_one_that_works(path, tmp_path):
    """Flags exist, scripts are there, and short commands run."""
    for command in commands(path):
        server = re.search(r"counter_server\.py (.*)", command)
        script = re.match(r"python (benchmarks/\w+\.py|tests/\w+\.py)(.*)", command)
        if is_request(command) or command in commands_with_files():
            continue
        if server:
            arguments = server[1]
            for name, content in (("secret", "x" * 64), ("tokens", TOKENS)):
                (tmp_path / name).write_text(content)
                (tmp_path / name).chmod(0o600)
                arguments = re.sub(rf"(?<=-file ){name}\b", str(tmp_path / name), arguments)
            arguments = re.sub(r"\b\w+\.(crt|key)\b", lambda file: str(tmp_path / file[0]), arguments)
            parse_arguments(shlex.split(arguments))
        elif script:
            known = run(f"python {script[1]} --help")
            assert all(flag in known for flag in re.findall(r"(?<!\S)--[a-z-]+", script[2])), command
        elif "-m timeit" in command:
            run(command.replace("-m timeit", "-m timeit -n 1 -r 1"))
        elif command.startswith(("python -c", "openssl ")):
            run(command, cwd=tmp_path)
        else:
            assert re.match(r"(python3 -m venv|\.venv/bin/(pip|python -m (pytest|ruff))) ", command), command
            assert all((PROJECT / name).exists() for name in re.findall(r"\S+/\w+\.py", command)), command


def test_the_command_that_runs_the_tests_is_the_first_of_its_kind():
    """.ci/run takes it from the README, to the letter."""
    line = next(line for line in text("README.md").splitlines() if "python -m pytest" in line)
    assert line in commands(PROJECT / "README.md")


def anchors(path):
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    """To a file there is, and to a heading of it."""
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        url = urllib.parse.urlsplit(link)
        if url.scheme:
            continue
        target = (path.parent / url.path).resolve() if url.path else path
        assert target.exists(), link
        assert not url.fragment or url.fragment in anchors(target), link


def test_the_readme_is_read_in_a_few_minutes():
    """All else has a document of its own."""
    assert len(text("README.md").split()) <= 1100


@pytest.mark.parametrize("name", ["docs/performance.md", "docs/scale.md"])
def test_figures_come_with_the_command_that_measures_them(name):
    """Before the first table of a section that has one."""
    for section in re.split("^## ", text(name), flags=re.MULTILINE):
        table = re.search(r"^\|.*\d", section, re.MULTILINE)
        assert not table or "\npython benchmarks/" in section[: table.start()], section[:60]


def test_the_layout_names_every_module():
    """Of the program; in docs/architecture.md."""
    layout = text("docs/architecture.md").partition("## What a node holds")[0]
    modules = {path.name for pattern in ("*.py", "counter/*.py") for path in PROJECT.glob(pattern)} - {"__init__.py"}
    assert set(re.findall(r"\b\w+\.py\b", layout)) >= modules


def test_every_flag_is_documented(capsys):
    """As the help lists them, and none besides."""
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--version"}
    table = text("docs/operations.md").partition("## Command line")[2].partition("A wrong flag")[0]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == flags

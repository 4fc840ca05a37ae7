"""The README keeps its word: its examples run as they are written."""

import re
import subprocess

from conftest import PROJECT, require_tools, wait_until

from counter.config import parse_arguments

README = (PROJECT / "README.md").read_text()


def test_every_example_with_curl_works(start_cluster):
    """In the order they are written, at three nodes; none of them is refused."""
    require_tools("curl", "bash")
    nodes = start_cluster(3)
    wait_until(lambda: all(node.ask("GET", "/readyz").status == 200 for node in nodes))
    script = "\n".join(re.findall(r"^    (?:\$ )?((?:curl|id=|until) ?.*)$", README, re.MULTILINE))
    assert script.count("curl") >= 15
    for number, node in enumerate(nodes):
        script = script.replace(f"localhost:{8080 + number}", node.address)
    command = ["bash", "-euo", "pipefail", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "about:blank" not in ran.stdout
    assert '{"name": "visits", "count": ' in ran.stdout
    assert 'counter_value{name="visits"} 3' in ran.stdout


def test_every_flag_is_in_the_readme(capsys):
    """As the help lists them, and none besides."""
    try:
        parse_arguments(["--help"])
    except SystemExit:
        flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--version"}
    table = README.partition("## Command line")[2].partition("A wrong flag")[0]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == flags

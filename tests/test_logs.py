"""How log lines look."""

import errno
import json
import logging
from types import SimpleNamespace

import pytest
from conftest import wait_until

from counter.logs import JsonFormatter, TextFormatter

ABSENT = SimpleNamespace(address="127.0.0.1:1")  # nobody listens there


def line(message, *arguments, level=logging.INFO, exc_info=None):
    record = logging.LogRecord("counter.test", level, __file__, 1, message, arguments, exc_info)
    record.created, record.msecs = 1_700_000_000.25, 250.0
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_of_json_has_the_message_and_its_values():
    """What the message says as key=value is there once more as fields of their own."""
    assert line("peer %s: addr=%s silent_s=%.1f number=%d", "lost", "10.0.0.1:8080", 5.25, 3) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "counter.test",
        "message": "peer lost: addr=10.0.0.1:8080 silent_s=5.2 number=3",
        "addr": "10.0.0.1:8080",
        "silent_s": 5.25,
        "number": 3,
    }


def test_values_of_any_type_are_text_in_json():
    """An exception as a value, and a message that is no format."""
    assert line("retrying: error=%s", OSError("refused"), level=logging.WARNING)["error"] == "refused"
    assert line("100 %")["message"] == "100 %"


def test_a_traceback_is_part_of_its_line():
    """So that what collects the lines does not tear it apart."""
    with pytest.raises(ZeroDivisionError) as raised:
        raise ZeroDivisionError
    fields = line("failed", exc_info=(raised.type, raised.value, raised.tb))
    assert "ZeroDivisionError" in fields["exception"]


def test_nobody_else_can_begin_a_line_of_the_log():
    """What a peer answered may be part of a message, before it is known whether it is one."""
    record = logging.LogRecord(
        "counter.test", logging.INFO, __file__, 1, "error=%s", ("a\r\nb\x1b[2K\x85\u2028ä",), None
    )
    assert TextFormatter().format(record).endswith(" counter.test: error=a\\r\\nb\\x1b[2K\\x85\\u2028ä")


def test_a_line_of_text_says_its_time_in_utc():
    """As the lines of JSON do: lines of machines in several time zones can be merged."""
    record = logging.LogRecord("counter.test", logging.INFO, __file__, 1, "lost", (), None)
    record.created, record.msecs = 1_700_000_000.25, 250.0
    assert TextFormatter().format(record) == "2023-11-14T22:13:20.250Z INFO counter.test: lost"


def test_a_node_logs_json_from_its_first_line_to_its_last(start_node):
    """Every line is an object of its own, and a peer that joins or leaves is one."""
    node = start_node("--log-format", "json")
    peer = start_node(peers=[node])
    wait_until(lambda: node.peers() == {peer.address})
    assert peer.stop() == node.stop() == 0
    lines = [json.loads(text) for text in node.stderr().splitlines()]
    assert [line["message"].partition(":")[0] for line in lines] == [
        "listening",
        "peer joined",
        "peer left",
        "stopping",
        "stopped",
    ]
    assert lines[1]["addr"] == lines[2]["addr"] == peer.address
    assert (lines[1]["active"], lines[2]["active"]) == (1, 0)
    assert lines[3]["signal"] == "SIGTERM"


def test_the_last_line_of_a_stop_says_what_was_handed_over(start_cluster):
    """How many increments the node accepted, and how many of its peers hold them all."""
    nodes = start_cluster(3)
    for _ in range(5):
        nodes[0].increment()
    for node, held_by, peers in ((nodes[0], 2, 2), (nodes[1], 1, 1), (nodes[2], 0, 0)):
        accepted = 5 if node is nodes[0] else 0
        assert node.stop() == 0
        last = f"INFO counter.server: stopped: accepted={accepted} held_by={held_by} peers={peers}"
        assert node.stderr().splitlines()[-1].endswith(last)


def test_to_start_first_in_a_cluster_is_no_warning(start_node):
    """A seed that is not there yet is what to expect then; a peer that was there and is gone is not."""
    first = start_node("--join-timeout", "1", peers=[ABSENT])
    refused = f"no answer yet: addr=127.0.0.1:1 error=[Errno {errno.ECONNREFUSED}] Connection refused\n"
    wait_until(lambda: refused in first.stderr())
    wait_until(lambda: first.ask("GET", "/readyz").status == 200)
    (warning,) = [line for line in first.stderr().splitlines() if "WARNING" in line]
    assert warning.endswith("ready alone, and without counts: no seed has answered")
    second = start_node(peers=[first])
    wait_until(lambda: [peer["unconfirmed"] for peer in first.get("/peers")["peers"]] == [0])  # it has answered
    second.kill()
    wait_until(lambda: f"WARNING counter.replication: retrying: addr={second.address} " in first.stderr())

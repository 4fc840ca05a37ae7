"""How log lines look."""

import json
import logging

import pytest
from conftest import wait_until

from counter.logs import JsonFormatter, TextFormatter


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
    assert TextFormatter("%(message)s").format(record) == "error=a\\r\\nb\\x1b[2K\\x85\\u2028ä"


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
    ]
    assert lines[1]["addr"] == lines[2]["addr"] == peer.address
    assert lines[3]["signal"] == "SIGTERM"

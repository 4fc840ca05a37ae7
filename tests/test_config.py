"""The command line: what is taken, and what is refused with one line."""

import pytest

from counter.config import parse_arguments


def test_defaults():
    """Without arguments a node listens on loopback, alone, with the documented times and limits."""
    assert (
        vars(parse_arguments([])).items()
        >= {
            "port": 8080,
            "host": "127.0.0.1",
            "advertise": None,
            "peers": (),
            "heartbeat_interval": 1.0,
            "peer_timeout": 5.0,
            "join_timeout": 10.0,
            "fanout": 8,
            "retry_backoff": 0.1,
            "retry_backoff_max": 10.0,
            "retry_workers": 4,
            "drain_timeout": 5.0,
            "max_connections": 10_000,
            "max_waiting": 512,
            "log_level": "info",
        }.items()
    )


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--port", "0"], "port", 0),
        (["--port=65535"], "port", 65535),
        (["--host", "::1"], "host", "::1"),
        (["--advertise", "Example.org:080"], "advertise", "example.org:80"),
        (["--peers", "a:1"], "peers", ("a:1",)),
        (["--peers", "a:1, b:2,,[::1]:3,"], "peers", ("a:1", "b:2", "[::1]:3")),
        (["--peers", "a:1", "--peers", "b:2"], "peers", ("a:1", "b:2")),
        (["--peers", "[0:0:0:0:0:0:0:1]:3"], "peers", ("[::1]:3",)),
        (["--heartbeat-interval", "0.5"], "heartbeat_interval", 0.5),
        (["--heartbeat-interval", ".5"], "heartbeat_interval", 0.5),
        (["--peer-timeout", "1.001"], "peer_timeout", 1.001),
        (["--join-timeout", "0"], "join_timeout", 0),
        (["--drain-timeout", "0"], "drain_timeout", 0),
        (["--retry-backoff", "10"], "retry_backoff", 10),
        (["--max-connections", "1"], "max_connections", 1),
        (["--max-idempotency-keys", "100000000"], "max_idempotency_keys", 100_000_000),
        (["--log-level", "debug"], "log_level", "debug"),
        (["--log-format", "json"], "log_format", "json"),
        (["--cors-origin", "*", "--cors-origin", "null"], "cors_origin", ("*", "null")),
        (["--cors-origin", "https://Example.org"], "cors_origin", ("https://example.org",)),
        (["--cors-origin", "http://[::1]:8080"], "cors_origin", ("http://[::1]:8080",)),
    ],
)
def test_an_argument_is_taken(arguments, field, value):
    """Addresses are normalised, and times are numbers of seconds."""
    assert getattr(parse_arguments(arguments), field) == value


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--port", "65536"], "--port"),
        (["--port", "-1"], "--port"),
        (["--port", "80a"], "--port"),
        (["--port", "8_0"], "--port"),
        (["--port", "٣"], "--port"),
        (["--port", ""], "--port"),
        (["--port", "9\n"], "--port"),
        (["--port"], "--port"),
        (["--host", "a..b"], "--host"),
        (["--host", "a" * 64], "--host"),
        (["--advertise", "example.org"], "--advertise"),
        (["--advertise", "::1:80"], "--advertise"),
        (["--advertise", "example.org:0"], "--advertise"),
        (["--peers", "a"], "--peers"),
        (["--peers", "a:1,b"], "--peers"),
        (["--peers", "a:1 b:2"], "--peers"),
        (["--peers", "http://a:1"], "--peers"),
        (["--peers", "[::z]:1"], "--peers"),
        (["--peers", "a:65536"], "--peers"),
        (["--heartbeat-interval", "0"], "--heartbeat-interval"),
        (["--heartbeat-interval", "nan"], "--heartbeat-interval"),
        (["--heartbeat-interval", "1e3"], "--heartbeat-interval"),
        (["--peer-timeout", "inf"], "--peer-timeout"),
        (["--peer-timeout", "1"], "--peer-timeout"),
        (["--peer-timeout", "2", "--heartbeat-interval", "3"], "--peer-timeout"),
        (["--join-timeout", "-1"], "--join-timeout"),
        (["--drain-timeout", "5s"], "--drain-timeout"),
        (["--fanout", "0"], "--fanout"),
        (["--retry-backoff", "0"], "--retry-backoff"),
        (["--retry-backoff-max", "0.05"], "--retry-backoff-max"),
        (["--retry-workers", "0"], "--retry-workers"),
        (["--retry-workers", "1.5"], "--retry-workers"),
        (["--max-connections", "0"], "--max-connections"),
        (["--max-waiting", "0"], "--max-waiting"),
        (["--cluster", "\udcff"], "--cluster"),  # as a byte that is no UTF-8 arrives
        (["--cors-origin", "example.org"], "--cors-origin"),
        (["--cors-origin", "https://example.org/"], "--cors-origin"),
        (["--cors-origin", "https://example.org:443"], "--cors-origin"),  # browsers do not send it
        (["--cors-origin", "http://a http://b"], "--cors-origin"),
        (["--cors-origin", ""], "--cors-origin"),
        (["--log-level", "loud\n"], "--log-level"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--heartbeat", "1"], "--heartbeat"),
        (["--version=1"], "--version"),
        (["8080"], "8080"),  # its port without --port
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, flag, capsys):
    """The line names the flag."""
    with pytest.raises(SystemExit) as exit:
        parse_arguments(arguments)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("counter_server.py: ")
    assert flag in err.replace(":", " ").split()


@pytest.fixture
def secret_file(tmp_path):
    """Write a secret file with a text and a mode; return its path."""

    def write(text, mode=0o600):
        path = tmp_path / "secret"
        path.write_bytes(text)
        path.chmod(mode)
        return str(path)

    return write


def test_a_secret_file_has_a_secret_in_each_line(secret_file):
    """The first signs; blank lines and spaces around a secret are no part of it."""
    path = secret_file(b"\n" + b"a" * 32 + b" \r\n\n  " + b"b" * 33)
    assert parse_arguments(["--secret-file", path]).secrets == (b"a" * 32, b"b" * 33)
    assert parse_arguments([]).secrets == ()


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (b" \n", 0o600, "is empty"),
        (b"a" * 31, 0o600, "at least 32 bytes"),
        (b"a" * 32 + b"\nb", 0o600, "at least 32 bytes"),
        (b"a" * 32, 0o640, "open to other users"),
        (b"a" * 32, 0o604, "open to other users"),
    ],
)
def test_a_secret_file_that_is_not_good_is_refused(secret_file, capsys, text, mode, why):
    with pytest.raises(SystemExit):
        parse_arguments(["--secret-file", secret_file(text, mode)])
    assert why in capsys.readouterr().err


def test_help_tells_every_flag_and_its_default(capsys):
    """On standard output, with status 0."""
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--help"])
    assert not exit.value.code
    help = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--port",
        "--host",
        "--advertise",
        "--peers",
        "--heartbeat-interval",
        "--peer-timeout",
        "--join-timeout",
        "--fanout",
        "--retry-backoff",
        "--retry-backoff-max",
        "--retry-workers",
        "--drain-timeout",
        "--max-connections",
        "--max-waiting",
        "--log-level",
        "--log-format",
        "--version",
    ):
        assert f" {flag} " in help
    assert "(default: 8080)" in help
    for nothing in ("None", "[]", "b''", "False"):
        assert f"(default: {nothing})" not in help

"""The command line, checked."""

import argparse
import ipaddress
import re
import socket
from dataclasses import dataclass

from counter import __version__
from counter.addresses import HOST, parse_address
from counter.certificates import Certificates
from counter.private import read_secret_file
from counter.tokens import read_token_file

_ORIGIN = re.compile(
    r"(?!https://.*:443\Z|http://.*:80\Z)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?\Z"
)


@dataclass(frozen=True)
class Config:
    """What the command line sets; times are in seconds."""

    port: int
    host: str
    advertise: str  # HOST:PORT, or None: derived from the listening address
    peers: tuple  # of HOST:PORT
    heartbeat_interval: float
    peer_timeout: float
    join_timeout: float
    fanout: int
    retry_backoff: float
    retry_backoff_max: float
    retry_workers: int
    drain_timeout: float
    max_connections: int
    max_waiting: int
    max_counters: int
    idempotency_window: float
    max_idempotency_keys: int
    data: str  # the data file, or None: counts live in memory alone
    fsync: str  # "always" or "never"
    allow_host: tuple  # of further names by which this node answers; "*" is any
    cors_origin: tuple  # of origins whose pages may use this node; "*" is any
    secret_file: str  # or None
    secrets: tuple  # of bytes, as they were in the file; the first signs, all are accepted
    token_file: str  # or None
    tokens: tuple  # of tokens.Grant, as they were in the file
    certificates: Certificates  # None without --tls-cert
    cluster: str
    log_level: str
    log_format: str


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        # "default: None" would tell a reader nothing.
        says = isinstance(action.default, (str, int, float)) and action.default is not False
        return super()._get_help_string(action) if says else action.help


def parse_arguments(arguments):
    """Return the Config of a command line; SystemExit with status 2 and one line if it is wrong."""
    parser = Parser(
        prog="counter_server.py",
        description="A node of a distributed in-memory counter. Times are in seconds, fractions allowed.",
        epilog="For data files there are also counter_server.py export and counter_server.py import.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _add_flags(parser)
    options = parser.parse_args(arguments)
    if options.peer_timeout <= options.heartbeat_interval:
        parser.error("argument --peer-timeout: must be longer than --heartbeat-interval")
    if options.retry_backoff_max < options.retry_backoff:
        parser.error("argument --retry-backoff-max: must not be shorter than --retry-backoff")
    certificates = _certificates(options, parser)
    is_trusted = options.secret_file or options.tls_ca or options.insecure
    if not is_trusted and not _is_loopback(options.host, parser):
        parser.error("argument --host: to listen beyond loopback give --secret-file, --tls-ca, or --insecure")
    fields = {name: tuple(value) if type(value) is list else value for name, value in vars(options).items()}
    for flag in ("tls_cert", "tls_key", "tls_ca", "tls_client_auth", "insecure"):
        del fields[flag]
    fields["certificates"] = certificates
    fields["secret_file"], fields["secrets"] = options.secret_file or (None, ())
    fields["token_file"], fields["tokens"] = options.token_file or (None, ())
    return Config(**fields)


def _certificates(options, parser):
    """Return the Certificates that a command line names; None if there are none."""
    if bool(options.tls_cert) != bool(options.tls_key):
        parser.error("argument --tls-cert: it needs --tls-key, and that needs it")
    if options.tls_ca and not options.tls_cert:
        parser.error("argument --tls-ca: it needs --tls-cert and --tls-key")
    if options.tls_client_auth and not options.tls_ca:
        parser.error("argument --tls-client-auth: it needs --tls-ca")
    if not options.tls_cert:
        return None
    try:
        return Certificates(options.tls_cert, options.tls_key, options.tls_ca, bool(options.tls_client_auth))
    except ValueError as error:
        parser.error(f"argument --tls-cert: {error}")


def _add_flags(parser):
    listen = parser.add_argument_group("listening").add_argument
    listen("--port", type=_integer(0, 65535), default=8080, metavar="N", help="port to listen on; 0 takes a free one")
    listen("--host", default="127.0.0.1", help="address to listen on")
    listen("--advertise", type=_address, metavar="HOST:PORT", help="address that peers are told to connect to")
    listen("--max-connections", type=_integer(1, 100_000), default=10_000, metavar="N", help="clients served at once")
    listen(
        "--max-waiting",
        type=_integer(1, 10_000),
        default=512,
        metavar="N",
        help="requests that may wait at once for acks or an increment",
    )
    listen(
        "--allow-host",
        type=_host,
        action="append",
        default=[],
        metavar="NAME",
        help="answer requests by this name in Host as well; repeatable, * is any",
    )
    listen(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin use this node; repeatable, * is any",
    )
    trust = parser.add_argument_group("trust").add_argument
    trust(
        "--secret-file",
        type=_secret_file,
        metavar="FILE",
        help="sign all messages between nodes with the secret in this file; a line each, the first signs",
    )
    trust("--tls-cert", type=_path, metavar="FILE", help="speak TLS, with the certificate (and its chain) in this file")
    trust("--tls-key", type=_path, metavar="FILE", help="the key of that certificate")
    trust("--tls-ca", type=_path, metavar="FILE", help="talk only to peers with a certificate that one of these signed")
    trust("--tls-client-auth", choices=("required",), help="clients need such a certificate as well")
    trust("--token-file", type=_token_file, metavar="FILE", help="answer only clients that show a token in this file")
    trust("--cluster", type=_text, default="counter", metavar="NAME", help="talk only to nodes of this cluster")
    trust("--insecure", action="store_true", help="listen beyond loopback without a secret or --tls-ca")
    limits = parser.add_argument_group("limits").add_argument
    limits("--max-counters", type=_integer(1, 10**6), default=100_000, metavar="N", help="counters created here")
    limits("--idempotency-window", type=_seconds(0.001), default=3600.0, metavar="S", help="how long keys are kept")
    limits("--max-idempotency-keys", type=_integer(1, 10**8), default=1_000_000, metavar="N", help="keys kept at once")
    data = parser.add_argument_group("data").add_argument
    data("--data", type=_path, metavar="FILE", help="keep the counts in this file as well; made if there is none")
    data("--fsync", choices=("always", "never"), default="always",
         help="always: what is committed survives a power cut; never: only the end of the process")  # fmt: skip
    cluster = parser.add_argument_group("cluster").add_argument
    cluster(
        "--peers",
        type=_addresses,
        action="extend",
        default=[],
        metavar="HOST:PORT,...",
        help="nodes to join through; repeatable",
    )
    cluster("--heartbeat-interval", type=_seconds(0.01), default=1.0, metavar="S", help="between two heartbeats")
    cluster("--peer-timeout", type=_seconds(0.01), default=5.0, metavar="S", help="silence until a peer is lost")
    cluster(
        "--join-timeout", type=_seconds(0), default=10.0, metavar="S", help="wait so long for seeds that do not answer"
    )
    cluster("--fanout", type=_integer(1, 1000), default=8, metavar="N", help="peers contacted at once")
    retry = parser.add_argument_group("replication").add_argument
    retry("--retry-backoff", type=_seconds(0.001), default=0.1, metavar="S", help="longest first backoff")
    retry("--retry-backoff-max", type=_seconds(0.001), default=10.0, metavar="S", help="longest backoff")
    retry("--retry-workers", type=_integer(2, 256), default=4, metavar="N", help="threads that send to live peers")
    retry(
        "--drain-timeout", type=_seconds(0), default=5.0, metavar="S", help="time to hand over to peers when stopping"
    )
    logging_ = parser.add_argument_group("logging, to stderr").add_argument
    logging_("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="the least to log")
    logging_("--log-format", choices=("text", "json"), default="text", help="lines of text, or of JSON objects")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def _is_loopback(host, parser):
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        parser.error(f"argument --host: {host}: {error}")
    return all(ipaddress.ip_address(info[4][0].partition("%")[0]).is_loopback for info in found)


def _origin(text):
    if text not in ("*", "null") and not _ORIGIN.match(text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin as browsers send it, such as https://example.org")
    return text.lower()


def _host(text):
    if text != "*" and not HOST.match(text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name as it stands in a URL, such as counter.example.org")
    return text.lower()


def _text(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not in the encoding of this system") from None
    return text


def _path(text):
    if not text:
        raise argparse.ArgumentTypeError("it names no file")
    return _text(text)


def _secret_file(path):
    return path, _read(read_secret_file, path)


def _token_file(path):
    return path, _read(read_token_file, path)


def _read(read, path):
    try:
        return read(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _integer(least, most):
    def integer(text):
        if not re.fullmatch("-?[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {most}")
        return int(text)

    return integer


def _seconds(least):
    def seconds(text):
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text) or float(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, {least} or more")
        return float(text)

    return seconds


def _address(text):
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _addresses(text):
    return [_address(part) for part in text.split(",") if part.strip()]

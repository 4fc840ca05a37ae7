"""The files in deploy/: valid for the tools that read them, and with flags that exist."""

import configparser
import gc
import re
import shlex
import subprocess
import sys
import tracemalloc
import uuid
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from authority import Authority
from conftest import PROJECT, require_tools

from counter import Counter, Delta, cancelling_replica, new_replica
from counter.config import parse_arguments

DEPLOY = PROJECT / "deploy"
UNIT = DEPLOY / "counter-server.service"
DROP_IN = DEPLOY / "counter-server.tls.conf"
FURTHER = 5  # processes beside the first that incremented all counters


def run(*command):
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)


def documents():
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def stateful_set():
    return next(document for document in documents() if document["kind"] == "StatefulSet")


def stateful_set_with_data():
    return patched_by("kustomization.yaml", stateful_set())


def stateful_set_with_tls():
    return patched_by("tls/kustomization.yaml", stateful_set_with_data())


def patched_by(name, patched):
    """Return what a file of Kustomize makes of it: its patch has operations of RFC 6902, all of which add."""
    (patch,) = yaml.safe_load((DEPLOY / name).read_text())["patches"]
    assert patch["target"] == {"kind": patched["kind"], "name": patched["metadata"]["name"]}
    for change in yaml.safe_load(patch["patch"]):
        assert change["op"] == "add"
        *path, last = (part.replace("~1", "/") for part in change["path"].strip("/").split("/"))
        parent = patched
        for part in path:
            parent = parent[int(part) if type(parent) is list else part]
        if type(parent) is list:
            assert last == "-"
            parent.append(change["value"])
        else:
            assert last not in parent
            parent[last] = change["value"]
    return patched


def container():
    return stateful_set()["spec"]["template"]["spec"]["containers"][0]


def compose(name="compose.yaml"):
    return yaml.safe_load((DEPLOY / name).read_text())


def unit_arguments(data=False, unit=UNIT):
    line = re.search("^ExecStart=(.+)$", unit.read_text(), re.MULTILINE)[1]
    example = re.search("COUNTER_PEERS=([^']+)", UNIT.read_text())[1]
    options = re.search("COUNTER_OPTIONS=([^']+)", UNIT.read_text())[1] if data else ""
    return shlex.split(line.replace("${COUNTER_PEERS}", example).replace("$COUNTER_OPTIONS", options))[1:]


def command_lines():
    yield unit_arguments()
    yield container()["args"]
    for service in compose()["services"].values():
        yield service["command"]


def command_lines_with_data():
    yield unit_arguments(data=True)
    yield stateful_set_with_data()["spec"]["template"]["spec"]["containers"][0]["args"]
    for service in compose("compose.data.yaml")["services"].values():
        yield service["command"]


def command_lines_with_tls():
    yield unit_arguments(unit=DROP_IN)
    yield stateful_set_with_tls()["spec"]["template"]["spec"]["containers"][0]["args"]
    for service in compose("compose.tls.yaml")["services"].values():
        yield service["command"]


@pytest.mark.parametrize("arguments", [*command_lines(), *command_lines_with_data()], ids=" ".join)
def test_a_command_line_is_accepted(arguments, tmp_path):
    """It listens beyond loopback, with a secret, and has peers."""
    secret = tmp_path / "secret"
    secret.write_text("deployed" * 4)
    secret.chmod(0o400)
    text = re.sub(r"(--secret-file[ =])\S+", rf"\1{secret}", " ".join(arguments))
    config = parse_arguments(text.split())
    assert (config.host, config.port, config.secrets) == ("0.0.0.0", 8080, (b"deployed" * 4,))
    assert config.peers
    assert (config.data is None) == (arguments in command_lines())


def flags(arguments):
    """Return {flag: value} of a command line, in either spelling."""
    return dict(re.findall(r"(--[a-z-]+)[ =](\S+)", " ".join(arguments)))


def test_with_a_file_is_as_without_but_for_the_file():
    """And the file is in a folder that outlives the process."""
    for with_file, without in zip(command_lines_with_data(), command_lines(), strict=True):
        path = flags(with_file)["--data"]
        assert flags(with_file) == flags(without) | {"--data": path}
        assert Path(path).parent in (Path("/data"), Path("/var/lib/counter-server"))
    assert "\nStateDirectory=counter-server\n" in UNIT.read_text()
    data = compose("compose.data.yaml")
    mounted = [mount for service in data["services"].values() for mount in service["volumes"]]
    assert sorted(mounted) == [f"{name}:/data" for name in sorted(data["volumes"])]
    assert data["services"].keys() == compose()["services"].keys()
    spec = stateful_set_with_data()["spec"]
    (claim,), mounts = spec["volumeClaimTemplates"], spec["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": claim["metadata"]["name"], "mountPath": "/data"} in mounts
    group = spec["template"]["spec"]["securityContext"]["fsGroup"]
    assert f"install -d -m 0770 -g {group} /data" in (DEPLOY / "Dockerfile").read_text()
    assert all(service["user"].endswith(f":{group}") for service in compose()["services"].values())


def test_systemd_accepts_the_unit(tmp_path):
    """Without a warning, and with a low exposure score."""
    require_tools("systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/counter-server/bin/counter-server", sys.executable))
    verified = run("systemd-analyze", "verify", "--man=no", str(unit))
    assert [line for line in verified.stderr.splitlines() if UNIT.name in line] == []
    assert verified.returncode == 0, verified.stderr
    exposure = run("systemd-analyze", "security", "--offline=yes", "--threshold=20", str(unit))
    assert exposure.returncode == 0, exposure.stdout


TLS_FLAGS = {"--tls-cert": "node.crt", "--tls-key": "node.key", "--tls-ca": "ca.crt", "--token-file": "tokens"}


@pytest.mark.parametrize("arguments", [*command_lines_with_tls()], ids=" ".join)
def test_a_command_line_with_tls_is_accepted(arguments, tmp_path):
    """It names all files there are for that, beside the secret."""
    require_tools("openssl")
    Authority(tmp_path).issue("node")
    for name, content in (("secret", "deployed" * 4), ("counter", "deployed" * 4), ("tokens", "read deployed")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o400)
    text = re.sub(r"(--(?:secret|token|tls)-[a-z]+[ =])\S*/", rf"\1{tmp_path}/", " ".join(arguments))
    config = parse_arguments(text.split())
    assert config.certificates.asks_peers
    assert config.tokens
    assert config.secrets


def test_with_tls_is_as_without_but_for_its_files():
    """Which all are there, where the flags look for them, and probes ask as the node answers."""
    without = [*command_lines()]
    without[1] = [*command_lines_with_data()][1]  # the one with TLS is made of this
    for with_tls, plain in zip(command_lines_with_tls(), without, strict=True):
        added = {flag: path for flag, path in flags(with_tls).items() if flag not in flags(plain)}
        assert {flag: Path(path).name for flag, path in added.items()} == TLS_FLAGS
        assert flags(with_tls) == flags(plain) | added
        assert {str(Path(path).parent) for path in added.values()} <= {
            str(Path(flags(plain)["--secret-file"]).parent), "/run/secrets"
        }  # fmt: skip
    loaded = re.findall(r"^LoadCredential=(\S+):", UNIT.read_text() + DROP_IN.read_text(), re.MULTILINE)
    assert sorted(loaded) == sorted(["secret", *TLS_FLAGS.values()])
    secured = compose("compose.tls.yaml")
    assert {*secured["secrets"], "counter"} == {"counter", *TLS_FLAGS.values()}
    assert all(set(service["secrets"]) == {"counter", *TLS_FLAGS.values()} for service in secured["services"].values())
    pod = stateful_set_with_tls()["spec"]["template"]["spec"]["containers"][0]
    assert {pod[f"{kind}Probe"]["httpGet"]["scheme"] for kind in ("startup", "liveness", "readiness")} == {"HTTPS"}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.data.yaml", "compose.tls.yaml"])
def test_compose_accepts_its_files(name):
    """They follow the schema of the Compose specification."""
    checked = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", f"deploy/{name}")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    "document", [*documents(), stateful_set_with_data(), stateful_set_with_tls()], ids=lambda document: document["kind"]
)
def test_kubernetes_accepts_its_resources(document):
    """They follow the schemas of its API, without unknown fields."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_finds_what_the_resources_name():
    """Services select the pods, the seeds are the headless service, and probes and secret match the node."""
    pod = stateful_set()["spec"]["template"]
    named = {document["metadata"]["name"]: document for document in documents()}
    services = {name: document["spec"] for name, document in named.items() if document["kind"] == "Service"}
    for spec in services.values():
        assert spec["selector"].items() <= pod["metadata"]["labels"].items()
    config_peers = next(argument for argument in container()["args"] if argument.startswith("--peers="))
    headless = stateful_set()["spec"]["serviceName"]
    assert services[headless]["clusterIP"] == "None"
    assert services[headless]["publishNotReadyAddresses"]
    assert config_peers == f"--peers={headless}:8080"
    assert container()["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container()["readinessProbe"]["httpGet"]["path"] == "/readyz"
    volume, mount = pod["spec"]["volumes"][0], container()["volumeMounts"][0]
    assert volume["name"] == mount["name"]
    assert volume["secret"]["defaultMode"] & 0o007 == 0
    assert f"--secret-file={mount['mountPath']}/secret" in container()["args"]


def test_a_probe_may_restart_one_pod_but_never_all():
    """Only after minutes without an answer, longer than a flood or a slow network lasts."""
    startup, liveness = container()["startupProbe"], container()["livenessProbe"]
    assert startup["httpGet"] == liveness["httpGet"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 60
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 300
    budget = next(document for document in documents() if document["kind"] == "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1


def bytes_per_item(fill, number=20_000):
    """Return the bytes that stay allocated for each of `number` items that fill(number) makes."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = fill(number)
        gc.collect()
        assert kept
        return tracemalloc.get_traced_memory()[0] / number
    finally:
        tracemalloc.stop()


def counters(number):
    counter = Counter(new_replica(), number, number, 3600)
    for name in range(number):
        counter.increment(f"checkout.completed.{name:06}")
    return counter


def entries(number):
    counter = counters(number)
    for _ in range(FURTHER):
        totals = {name: (sequence, 1) for sequence, name in enumerate(counter.list("", "", number)[0], 1)}
        counter.merge(Delta(new_replica(), 0, number, totals), 0.0)
    return counter


def ended(number):
    """Processes that ended without an heir, and counted once each."""
    counter = Counter(new_replica())
    for _ in range(number):
        counter.merge(Delta(new_replica(), 0, 1, {"default": (1, 1)}), 0.0)
    counter.was_loaded(0.0)
    assert counter.vector()
    return counter


def absorbed(number):
    counter = Counter(new_replica())
    facts = {new_replica(): (1000, new_replica(), 7, 9) for _ in range(number)}
    counter.merge(Delta(new_replica(), 0, 9, {"default": (9, 1)}, absorbed=facts), 0.0)
    return counter


def cancellations(number):
    counter, (stays, cancelled) = Counter(new_replica()), (new_replica(), new_replica())
    for replica in (stays, cancelled):
        counter.merge(Delta(replica, 0, number, {"default": (number, number)}), 0.0)
    for sequence in range(1, number + 1):
        dots = (stays, sequence), (cancelled, sequence)
        counter.merge(Delta(cancelling_replica(dots[1]), 0, 1, {"default": (1, -1)}, (), dots), 0.0)
    counter.was_loaded(0.0)
    assert counter.vector()
    return counter


def keys(number):
    counter = Counter(new_replica(), number, number, 3600)
    for key in range(number):
        counter.increment_once(f"{uuid.UUID(int=key)}", "default", 1, 0.0)
    return counter


def test_the_memory_limit_holds_what_the_flags_allow():
    """It follows from the formula beside it, whose figures bound those of the real objects."""
    text = (DEPLOY / "kubernetes.yaml").read_text()
    base, per_counter, per_entry, per_process, per_absorbed, per_cancellation, per_key, per_connection, per_waiting = (
        float(re.search(pattern, text)[1]) * unit
        for pattern, unit in [
            (r"# +(\d+) MiB\n", 2**20),
            (r"\+ ([\d.]+) KB for every counter\n", 1000),
            (r"\+ ([\d.]+) KB for every counter and further process", 1000),
            (r"\+ ([\d.]+) KB for every process that ended without an heir", 1000),
            (r", ([\d.]+) KB for every other that ended", 1000),
            (r"\+ ([\d.]+) KB for every increment that was counted twice", 1000),
            (r"\+ ([\d.]+) KB for every key", 1000),
            (r"\+ ([\d.]+) KB for every connection", 1000),
            (r"\+ ([\d.]+) KB for every request that waits", 1000),
        ]
    )
    assert bytes_per_item(counters) <= per_counter
    assert bytes_per_item(entries) - bytes_per_item(counters) <= FURTHER * per_entry
    assert bytes_per_item(ended) <= per_process
    assert bytes_per_item(absorbed) <= per_absorbed
    assert bytes_per_item(cancellations) <= per_cancellation
    assert bytes_per_item(keys) <= per_key
    flags = [flag for flag in container()["args"] if not flag.startswith("--secret-file")]
    config = parse_arguments([*flags, "--insecure"])
    pods = stateful_set()["spec"]["replicas"]
    processes = int(re.search(r"With (\d+) of them", text)[1])
    needed = (
        base
        + pods * config.max_counters * (per_counter + per_entry * (processes - 1))
        + per_process * processes
        + per_key * config.max_idempotency_keys
        + per_connection * config.max_connections
        + per_waiting * config.max_waiting
    )
    formula = re.findall(r"# +(\+ .*)\n", text)
    assert [line for line in formula if line not in (PROJECT / "docs/operations.md").read_text()] == []
    limit = container()["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    assert needed <= int(limit.removesuffix("Gi")) * 2**30


def test_the_image_has_what_the_project_is_made_of():
    """Every module and page is installed, and none is missing from the build's context."""
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    modules = {path.stem for path in PROJECT.glob("*.py")}
    assert set(setup["options"]["py_modules"].split()) == modules
    packages = [path.parent.relative_to(PROJECT) for path in PROJECT.glob("counter/**/__init__.py")]
    assert set(setup["options"]["packages"].split()) == {".".join(path.parts) for path in packages}
    pages = {path.name for path in Path(PROJECT, "counter/dashboard").glob("*.html")}
    assert set(setup["options.package_data"]["counter.dashboard"].split()) == pages
    sent = set((PROJECT / ".dockerignore").read_text().split())
    assert sent >= {"!*.py", "!counter", "!setup.cfg", "!pyproject.toml", "!README.md", "!LICENSE"}
    entry = setup["options.entry_points"]["console_scripts"].split()[0]
    assert f'ENTRYPOINT ["{entry}"]' in (DEPLOY / "Dockerfile").read_text()

"""What deploys the receiver: linted where there is a linter, and held to what the program takes and does."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from otel_pg_exporter.config import SERVER_PREFIX, ServeSettings, settings_of
from otel_pg_exporter.postgres.roles import Roles
from tests import serving
from tests.e2e.support import receiving

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "otel-pg-exporter.service"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS: dict[tuple[str, str], Any] = {
    (each["kind"], each["metadata"]["name"]): each
    for file in (DEPLOY / "kubernetes").iterdir()
    for each in yaml.safe_load_all(file.read_text(encoding="utf-8"))
}
RECEIVERS = MANIFESTS["StatefulSet", "otel-pg-exporter"]
MIGRATION = MANIFESTS["Job", "otel-pg-exporter-migrate"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

SHUTDOWN_TIMEOUT = ServeSettings().shutdown_timeout
EXPOSED = {int(port) for port in re.findall(r"\d+", re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[0])}


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - subprocess's
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that deploy/compose/make-secrets makes."""
    folder = tmp_path_factory.mktemp("compose")
    shutil.copy(DEPLOY / "compose" / "make-secrets", folder)
    assert run(folder / "make-secrets").returncode == 0
    return folder / "secrets"


# Names of settings, wherever they are written.


@pytest.mark.parametrize(
    "file",
    [ROOT / "Dockerfile", ROOT / "compose.yaml", *(each for each in DEPLOY.rglob("*") if each.is_file())],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_variable_is_a_setting(file: Path) -> None:
    known = {setting.variable(SERVER_PREFIX) for setting in settings_of(ServeSettings)} | {f"{SERVER_PREFIX}CONFIG"}
    assert set(re.findall(rf"{SERVER_PREFIX}\w+", file.read_text(encoding="utf-8"))) <= known


# Dockerfile


def test_hadolint_finds_nothing() -> None:
    done = run(Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_binds_what_it_exposes_on_all_interfaces() -> None:
    endpoints = re.findall(rf"{SERVER_PREFIX}(\w+)_ENDPOINT=([\d.]+):(\d+)", DOCKERFILE)
    assert {(name, host) for name, host, _ in endpoints} == {(each, "0.0.0.0") for each in ("GRPC", "HTTP", "METRICS")}
    assert {int(port) for *_, port in endpoints} == EXPOSED


def test_the_builds_context_has_all_that_the_package_is_made_of() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / each).exists() for each in kept)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = project["tool"]["setuptools"]["package-dir"].values()
    files = [project["project"]["readme"], *project["project"]["license-files"], "MANIFEST.in", "uv.lock"]
    assert {*folders, *files, "native", "otel_pg_exporter", "pyproject.toml"} <= kept


def test_the_images_uv_is_the_one_that_is_tested_with() -> None:
    [version] = re.findall(r"^version=(\S+)$", (ROOT / ".ci" / "uv").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"uv=={version}" in DOCKERFILE


def test_the_health_check_tells_a_receiver_that_lives_from_one_that_does_not(dsn: str, writer_dsn: str) -> None:
    [command] = re.findall(r'CMD (\["python".*?\])$', DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    _, *arguments = json.loads(command)

    def check(port: int) -> int:
        return run(sys.executable, *(each.replace("9464", str(port)) for each in arguments)).returncode

    with receiving(writer_dsn, read_dsn=dsn) as running:
        endpoint = running.service.metrics_endpoint
        assert endpoint is not None
        assert check(endpoint.port) == 0
    assert check(endpoint.port) != 0


# compose.yaml


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_service_is_hardened(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not any(key in service for key in ("privileged", "network_mode", "pid"))


def test_what_services_name_is_declared() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_only_loopback_is_published_and_only_what_the_image_exposes() -> None:
    ports = [each for service in COMPOSE["services"].values() for each in service.get("ports", [])]
    assert {each.rpartition(":")[0].rpartition(":")[0] for each in ports} == {"127.0.0.1"}
    assert {int(each.rpartition(":")[2]) for each in ports} == EXPOSED


def test_a_stop_is_given_longer_than_it_may_take() -> None:
    assert int(COMPOSE["services"]["otel-pg-exporter"]["stop_grace_period"].rstrip("s")) > SHUTDOWN_TIMEOUT
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)s$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert int(seconds) > SHUTDOWN_TIMEOUT
    assert _pod()["terminationGracePeriodSeconds"] > SHUTDOWN_TIMEOUT


def test_the_secrets_that_are_made_are_those_that_are_declared(secrets: Path) -> None:
    declared = {Path(each["file"]).name for each in COMPOSE["secrets"].values()}
    assert declared == {each.name for each in secrets.iterdir()}
    assert oct(secrets.stat().st_mode)[-3:] == "700"
    before = {each: each.read_text() for each in secrets.iterdir()}
    assert run(secrets.parent / "make-secrets").returncode == 0
    assert {each: each.read_text() for each in secrets.iterdir()} == before


def test_who_connects_is_the_writer_and_the_administrator(secrets: Path) -> None:
    found = {}
    for name in ("serve", "migrate"):
        target = conninfo_to_dict(tomllib.loads((secrets / f"{name}.toml").read_text())["dsn"])
        assert target["host"] in COMPOSE["services"]
        assert target["dbname"] == COMPOSE["services"]["postgres"]["environment"]["POSTGRES_DB"]
        found[str(target["user"])] = target["password"]
    assert found == {
        "postgres": (secrets / "postgres_password").read_text(),
        Roles().names["writer"]: (secrets / "writer_password").read_text(),
    }


@pytest.fixture
def new_writer(empty_dsn: str, migrated: str) -> Iterator[str]:
    """Return the name of a role that is not there yet, and drop it afterwards; `otel_writer` is."""
    yield (name := "composed_writer")
    with psycopg.connect(empty_dsn, autocommit=True) as administrator:
        administrator.execute(f"DROP ROLE IF EXISTS {name}".encode())


def test_the_first_start_of_postgresql_makes_the_writer_with_its_password(
    secrets: Path, binaries: Path, empty_dsn: str, new_writer: str
) -> None:
    script = (DEPLOY / "compose" / "writer.sql").read_text(encoding="utf-8")
    script = script.replace("/run/secrets", str(secrets)).replace(Roles().names["writer"], new_writer)
    done = run(binaries / "psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", "-", empty_dsn, input=script)
    assert (done.returncode, done.stderr) == (0, "")
    password = (secrets / "writer_password").read_text()
    with psycopg.connect(empty_dsn, user=new_writer, password=password) as connection:
        assert connection.info.user == new_writer


# systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_takes_the_unit_and_finds_it_well_locked_up(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="utf-8")
    [program] = re.findall(r"^ExecStart=(\S+) serve ", text, re.MULTILINE)
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace(program, sys.executable), encoding="utf-8")  # it wants to see a program
    for arguments in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = run("systemd-analyze", *arguments, unit, env={**os.environ, "SYSTEMD_PAGER": ""})
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_the_units_configuration_has_settings_alone_and_says_whom_to_trust() -> None:
    text = (UNIT.parent / "config.toml").read_text(encoding="utf-8")
    for file in (tomllib.loads(text), tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text))):
        assert set(file) <= {setting.name for setting in settings_of(ServeSettings)}
        target = conninfo_to_dict(file["dsn"])
        assert (target["user"], target["sslmode"]) == (Roles().names["writer"], "verify-full")
        assert Path(str(target["sslrootcert"])).parent == Path("/etc/otel-pg-exporter")


def test_every_credential_that_is_loaded_is_used_and_none_is_a_pgpass_that_libpq_would_pass_over() -> None:
    text = UNIT.read_text(encoding="utf-8")
    for name in re.findall(r"^LoadCredential=([^:]+):", text, re.MULTILINE):
        assert f"%d/{name}" in text or f"${{CREDENTIALS_DIRECTORY}}/{name}" in text
    assert "PGPASSFILE" not in text


def test_the_units_folder_is_its_own_and_not_that_of_roots_postgresql_or_spool() -> None:
    text = UNIT.read_text(encoding="utf-8")
    [folder] = re.findall(r"^StateDirectory=(\S+)$", text, re.MULTILINE)
    assert f"_SPOOL_DIR=%S/{folder}/" in text
    for file in ("postgres/embedded_folder.py", "pipeline/spool_folder.py"):
        code = (ROOT / "otel_pg_exporter" / file).read_text(encoding="utf-8")
        assert f'"/var/lib/{folder}"' not in code
        assert '"/var/lib/otel-pg-exporter' in code


def test_the_unit_is_not_started_again_with_a_setting_that_is_wrong(tmp_path: Path) -> None:
    [status] = re.findall(r"^RestartPreventExitStatus=(\d+)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    file = tmp_path / "config.toml"
    file.write_text("nonsense = 1\n", encoding="utf-8")
    assert serving.run("serve", "--config", file).returncode == int(status)


# What is kept how long.


@pytest.mark.parametrize(
    "command",
    [COMPOSE["services"]["migrate"]["command"], MIGRATION["spec"]["template"]["spec"]["containers"][0]["args"]],
    ids=["compose", "kubernetes"],
)
def test_who_migrates_says_what_is_kept_how_long(command: list[str]) -> None:
    done = serving.run(*command, "--print")
    assert done.returncode == 0, done.stderr
    policy = re.findall(r"""INSERT INTO "otel"\."retention" .* VALUES \('(\w+)'""", done.stdout)
    assert set(policy) >= {"spans", "logs", "dead_letters"}


# Kubernetes


def _pod() -> Mapping[str, Any]:
    return RECEIVERS["spec"]["template"]["spec"]  # type: ignore[no-any-return] # YAML


def _mebibytes(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([MG]iB?)", size).groups()  # type: ignore[union-attr] # or it fails here
    return int(number) * {"M": 1, "G": 1024}[unit[0]]


@pytest.mark.parametrize("workload", [RECEIVERS, MIGRATION], ids=lambda each: each["kind"])
def test_the_pods_are_hardened_and_their_volumes_are_there(workload: Mapping[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in DOCKERFILE
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    claimed = {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", [])}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]} | claimed


@pytest.mark.parametrize("workload", [RECEIVERS, MIGRATION], ids=lambda each: each["kind"])
def test_what_settings_name_is_mounted_and_read_by_the_group_alone(workload: Mapping[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    [container] = pod["containers"]
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    secrets = {each["name"]: each["secret"] for each in pod["volumes"] if "secret" in each}
    paths = [each["value"] for each in container["env"] if each["value"].startswith("/")]
    assert paths
    for path in paths:
        mount = mounts[str(Path(path).parent)]
        assert "subPath" not in mount, "what is renewed would not arrive"
        assert secrets[mount["name"]]["defaultMode"] == 0o440


def test_senders_from_elsewhere_find_tls_and_authentication_switched_on() -> None:
    [container] = _pod()["containers"]
    variables = {each["name"].removeprefix(SERVER_PREFIX) for each in container["env"]}
    assert {"TLS_CERT", "TLS_KEY", "AUTH_BEARER_FILE"} <= variables


def test_the_memory_that_a_pod_may_take_is_three_times_what_may_be_in_flight() -> None:
    [container] = _pod()["containers"]
    [in_flight] = [each["value"] for each in container["env"] if each["name"].endswith("_MAX_INFLIGHT_BYTES")]
    assert _mebibytes(container["resources"]["limits"]["memory"]) >= 3 * _mebibytes(in_flight)


def test_the_image_is_that_of_this_version_and_the_page_says_how_it_is_built() -> None:
    images = {each["spec"]["template"]["spec"]["containers"][0]["image"] for each in (RECEIVERS, MIGRATION)}
    assert images == {f"registry.example/otel-pg-exporter:{VERSION}"}
    assert f"docker build -t {images.pop()} ." in (ROOT / "docs/how-to/deploy.md").read_text(encoding="utf-8")


def test_probes_and_services_ask_at_ports_that_the_image_exposes() -> None:
    [container] = _pod()["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert set(ports.values()) == EXPOSED
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}
    for (kind, _), manifest in MANIFESTS.items():
        if kind == "Service":
            assert all(each["port"] == ports[each["targetPort"]] for each in manifest["spec"]["ports"])


def test_the_pods_names_are_of_a_service_without_an_address_and_senders_have_one_with() -> None:
    assert MANIFESTS["Service", RECEIVERS["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in MANIFESTS["Service", "otel-pg-exporter"]["spec"]


def test_all_that_selects_pods_selects_receivers_alone() -> None:
    labels = RECEIVERS["spec"]["template"]["metadata"]["labels"]
    assert RECEIVERS["spec"]["selector"]["matchLabels"] == labels
    for (kind, _), manifest in MANIFESTS.items():
        if kind == "Service":
            assert manifest["spec"]["selector"] == labels
    assert MANIFESTS["PodDisruptionBudget", "otel-pg-exporter"]["spec"]["selector"]["matchLabels"] == labels
    assert MIGRATION["spec"]["template"]["metadata"]["labels"] != labels


def test_prometheus_in_the_cluster_keeps_the_receivers_port_for_metrics_alone() -> None:
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "kubernetes.yml").read_text(encoding="utf-8"))
    assert all((DEPLOY / "prometheus" / each).exists() for each in configuration["rule_files"])
    [job] = configuration["scrape_configs"]
    [keep] = [each for each in job["relabel_configs"] if each.get("action") == "keep"]
    [name] = RECEIVERS["spec"]["template"]["metadata"]["labels"].values()
    kept = [port for port in _pod()["containers"][0]["ports"] if f"{name};{port['name']}" == keep["regex"]]
    assert [port["containerPort"] for port in kept] == [9464]

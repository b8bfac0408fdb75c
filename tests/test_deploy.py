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
from tests.e2e.support import receiving

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "otel-pg-exporter.service"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS: dict[str, Any] = {
    each["kind"]: each
    for each in yaml.safe_load_all((DEPLOY / "kubernetes" / "otel-pg-exporter.yaml").read_text(encoding="utf-8"))
}

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


def test_the_units_configuration_has_settings_alone_and_no_password() -> None:
    file = tomllib.loads((UNIT.parent / "config.toml").read_text(encoding="utf-8"))
    assert set(file) <= {setting.name for setting in settings_of(ServeSettings)}
    target = conninfo_to_dict(file["dsn"])
    assert (target["user"], target["sslmode"]) == (Roles().names["writer"], "verify-full")
    assert "password" not in target


def test_every_credential_that_is_loaded_is_used() -> None:
    text = UNIT.read_text(encoding="utf-8")
    for name in re.findall(r"^LoadCredential=([^:]+):", text, re.MULTILINE):
        assert f"%d/{name}" in text or f"${{CREDENTIALS_DIRECTORY}}/{name}" in text


# Kubernetes


def _pod() -> Mapping[str, Any]:
    return MANIFESTS["StatefulSet"]["spec"]["template"]["spec"]  # type: ignore[no-any-return] # YAML


def test_the_pod_is_hardened_and_its_volumes_are_there() -> None:
    pod = _pod()
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in DOCKERFILE
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    claimed = {each["metadata"]["name"] for each in MANIFESTS["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]} | claimed


def test_probes_and_services_ask_at_ports_that_the_image_exposes() -> None:
    [container] = _pod()["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert set(ports.values()) == EXPOSED
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}
    for each in MANIFESTS["Service"]["spec"]["ports"]:
        assert each["port"] == ports[each["targetPort"]]


def test_all_that_selects_pods_selects_these() -> None:
    labels = MANIFESTS["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert MANIFESTS["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["Service"]["spec"]["selector"] == labels
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels

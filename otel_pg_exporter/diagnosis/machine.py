"""The machine that asks: what `serve` would find on it before and beside PostgreSQL."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from otel_pg_exporter import mapping
from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.diagnosis.finding import Check, Finding, findings_of, ok, problem, warning
from otel_pg_exporter.diagnosis.listener import listener_of
from otel_pg_exporter.errors import EmbeddedServerError, StartupError
from otel_pg_exporter.pipeline.spool_folder import default_spool_dir, left_behind
from otel_pg_exporter.postgres.embedded import default_data_dir, find_binaries
from otel_pg_exporter.postgres.embedded_account import choose_account
from otel_pg_exporter.postgres.embedded_binaries import major_of, server_version
from otel_pg_exporter.postgres.embedded_folder import DataFolder
from otel_pg_exporter.postgres.operations import size
from otel_pg_exporter.receiver.endpoint import check_free, optional_endpoint
from otel_pg_exporter.receiver.exposure import exposure_warnings
from otel_pg_exporter.receiver.security import Security

_LEAST_ROOM = 2**30  # bytes, for a PostgreSQL of our own


def examine_machine(settings: ServeSettings) -> Iterator[Finding]:
    """Yield what is found; changes nothing, and connects to nothing."""
    checks: list[tuple[str, Check]] = [
        ("mappings", lambda: _mappings(settings)),
        ("endpoints", lambda: _endpoints(settings)),
        ("security", lambda: _security(settings)),
        ("spool", lambda: _spool(settings)),
    ]
    if not settings.database.dsn:
        checks.append(("embedded PostgreSQL", lambda: _embedded(settings)))
    yield from findings_of(checks)


def _mappings(settings: ServeSettings) -> Iterator[Finding]:
    files = settings.mapping.mappings
    try:
        loaded = mapping.load(files)
    except StartupError as exc:
        yield problem("mappings", str(exc), "mend the file: docs/reference/mapping.md")
        return
    columns = sum(len(table.columns) for table in (loaded.spans, loaded.logs, loaded.resources))
    yield ok("mappings", f"{columns} columns, {len(files)} files of yours")


def _endpoints(settings: ServeSettings) -> Iterator[Finding]:
    receiver = settings.receiver
    for flag, text in (
        ("--grpc-endpoint", receiver.grpc_endpoint),
        ("--http-endpoint", receiver.http_endpoint),
        ("--metrics-endpoint", settings.monitoring.metrics_endpoint),
    ):
        subject = flag.removeprefix("--").replace("-", " ")
        found = None
        try:
            endpoint = optional_endpoint(text, setting=flag)
            if endpoint is None:
                yield ok(subject, "not served")
                continue
            found = listener_of(endpoint.port)
            check_free(endpoint, setting=flag, reuse_port=receiver.reuse_port)
        except StartupError as exc:
            said, _, remedy = str(exc).partition("; ")
            if found is not None and found.is_ours:
                yield ok(subject, f"{text} is served by our own process {found.pid}")
            else:
                yield problem(subject, said + (f" ({found})" if found else ""), remedy)
        else:
            yield ok(subject, f"{text} is free")


def _security(settings: ServeSettings) -> Iterator[Finding]:
    try:
        security = Security(settings.security)
    except StartupError as exc:
        yield problem("security", str(exc))
        return
    warnings = [*exposure_warnings(settings), *security.warnings()]
    for text in warnings:
        said, _, remedy = text.partition("; ")
        yield warning("security", said, remedy)
    if not warnings:
        tls = "on" if security.tls is not None else "off"
        credentials = "asked for" if security.authenticator is not None else "not asked for"
        yield ok("security", f"TLS is {tls}, credentials are {credentials}")


def _spool(settings: ServeSettings) -> Iterator[Finding]:
    spool = settings.spool
    if not spool.spool:
        yield warning("spool", "there is none: while PostgreSQL is away, senders are asked to retry", "set --spool")
        return
    root = (spool.spool_dir or default_spool_dir()).absolute()
    there = _existing(root)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield problem(
            "spool", f"{root} cannot be {'used' if there == root else 'made'} by this user", "set --spool-dir"
        )
        return
    free = shutil.disk_usage(there).free
    if free < spool.spool_max_bytes:
        yield warning(
            "spool",
            f"{root} has {size(free)} free, less than --spool-max-bytes, {size(spool.spool_max_bytes)}",
            "make room, lower --spool-max-bytes, or set --spool-dir",
        )
    else:
        yield ok("spool", f"{root}, {size(free)} free for up to {size(spool.spool_max_bytes)}")
    targets = [each for each in root.iterdir() if each.is_dir()] if there == root else []
    for left in [path for target in sorted(targets) for path in left_behind(target)]:
        yield warning(
            "spool",
            f"a dead process has left requests in {left}",
            "start `serve` for the same PostgreSQL and schema: it writes them",
        )


def _embedded(settings: ServeSettings) -> Iterator[Finding]:
    subject = "embedded PostgreSQL"
    path = settings.data_dir or default_data_dir()
    folder = DataFolder(path)
    version_file = folder.pgdata / "PG_VERSION"
    try:
        major = major_of(version_file.read_text()) if version_file.exists() else None
        binaries = find_binaries(major)
        version = server_version(binaries)
        holder, account = folder.holder(), choose_account(folder.path, folder.pgdata)
    except EmbeddedServerError as exc:
        said, _, remedy = str(exc).partition(": ")
        yield problem(subject, said, remedy)
        return
    except OSError as exc:
        yield problem(subject, f"{path} cannot be used: {exc.strerror}", "set --data-dir")
        return
    yield ok(subject, f"version {version}, in {binaries}")
    there = _existing(folder.path)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield problem(subject, f"{path} cannot be {'used' if there == path else 'made'} by this user", "set --data-dir")
        return
    if there != folder.path and not account.can_enter(there):
        yield problem(
            subject, f"it would run as user {account.name}, who cannot enter {there}", "set --data-dir, or chmod o+x"
        )
        return
    free = shutil.disk_usage(there).free
    state = f"served by process {holder}" if holder else "data is there" if major else "no data yet"
    said = f"{path}: {state}; {size(free)} free"
    yield ok(subject, said) if free >= _LEAST_ROOM else warning(subject, said, "make room, or set --data-dir")


def _existing(path: Path) -> Path:
    """Return a folder, or what is nearest above it, as far as this user may look."""
    for each in (path, *path.parents):
        with contextlib.suppress(OSError):
            if each.exists():
                return each
    return path

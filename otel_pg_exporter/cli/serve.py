"""`serve`: the receiver, its signals, and what it says when it is ready."""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from otel_pg_exporter.cli import environment
from otel_pg_exporter.cli.arguments import Commands, add_command, add_settings, settings_from
from otel_pg_exporter.cli.output import PROGRAM, OutputError, print_lines, version
from otel_pg_exporter.cli.systemd import Systemd
from otel_pg_exporter.config import ServeSettings, settings_of
from otel_pg_exporter.errors import StartupError

if TYPE_CHECKING:
    from otel_pg_exporter.receiver.endpoint import Endpoint
    from otel_pg_exporter.receiver.security import Security
    from otel_pg_exporter.service import Service

_logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Receive traces and logs by OTLP and write them to PostgreSQL. An OK to a sender means: committed, or, while PostgreSQL
does not commit, safe in the spool on disk.

Without a DSN, PostgreSQL is started too: its data stays in --data-dir, its tables are created and updated. libpq's own
variables (PGHOST, PGUSER, PGPASSFILE, ...) fill in what a DSN leaves out, but name no server by themselves: to rely on
them alone, give `--dsn dbname=telemetry` or `--dsn service=telemetry`.

SIGTERM and SIGINT (Ctrl-C) finish what is in flight and exit with 0; a second one exits at once.
"""

_EPILOG = f"""\
Each setting is a flag, an environment variable, or a key in a TOML file (grpc_endpoint = "127.0.0.1:4317"); flags win
over the environment, and that over the file. Durations are in seconds (30d is understood), sizes in
bytes (64MiB).

examples:
  {PROGRAM} serve --grpc-endpoint 0.0.0.0:4317 --data-dir /srv/telemetry
  {PROGRAM} serve --config /etc/otel-pg-exporter.toml --migrate

exit status: 0 stopped by a signal, 1 could not start, 2 wrong flag or setting.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "serve", help="receive OTLP and write it to PostgreSQL", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.set_defaults(run=_run)
    add_settings(parser, settings_of(ServeSettings))


def _run(options: argparse.Namespace) -> int:
    signals = _Signals()
    systemd = Systemd(os.environ)
    try:
        settings = settings_from(options)
        if settings.database.dsn and settings.data_dir is not None:
            _logger.warning(
                "--data-dir is for a PostgreSQL of its own, and of no use beside a DSN, which is what counts"
            )
        environment.prepare(own_postgres=not settings.database.dsn)
        from otel_pg_exporter.service import Service

        signals.service = service = Service(settings)
        service.start()
        with contextlib.suppress(OutputError):  # nobody has to read it
            print_lines(_banner(service))
        _logger.info("ready: %s", _status(service))
        systemd.ready(_status(service))
        signals.wait(service, systemd)
    except _StopRequested:
        _logger.info("%s: stopping; a second signal ends this at once", signals.name)
        systemd.stopping()
    finally:
        if signals.service is not None:
            signals.service.stop()
    return 0


class _StopRequested(BaseException):
    """Raised in the main thread by the first signal: whatever waits there ends."""


class _Signals:
    """The first SIGTERM, SIGINT or SIGHUP stops in good order, the second ends the process at once."""

    def __init__(self) -> None:
        self.service: Service | None = None
        self._received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._handle)

    @property
    def name(self) -> str:
        """What the first signal is called."""
        return signal.Signals(self._received).name

    def wait(self, service: "Service", systemd: Systemd) -> None:
        """Wait for the first signal; while the service is healthy, tell systemd so."""
        # With a look now and then: what a handler raises while a finalizer runs gets lost.
        pause = threading.Event()
        timeout = systemd.watchdog_timeout
        interval = 1.0 if timeout is None else min(timeout / 3, 1.0)
        while not self._received:
            if service.healthy:
                systemd.alive()
            pause.wait(interval)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received:
            if self.service is not None:
                self.service.abandon()
            os._exit(128 + number)
        self._received = number
        if self.service is None or not self.service.stopping:
            raise _StopRequested


def _banner(service: "Service") -> list[str]:
    from psycopg.conninfo import make_conninfo

    from otel_pg_exporter.postgres.dsn import mask_dsn, shareable_url

    server, reader = service.embedded, service.reader_instead
    grpc, http = service.grpc_endpoint, service.http_endpoint
    scheme = "http" if service.security.tls is None else "https"
    ways = [
        f"OTEL_EXPORTER_OTLP_ENDPOINT={_url(endpoint, scheme=scheme)} OTEL_EXPORTER_OTLP_PROTOCOL={protocol}"
        for endpoint, protocol in ((grpc, "grpc"), (http, "http/protobuf"))
        if endpoint is not None
    ]
    everywhere = any(_is_everywhere(endpoint) for endpoint in (grpc, http))
    database = (
        service.postgres_version if server is None else f"{service.postgres_version}, its own, in {server.data_dir}"
    )
    return [
        "",
        f"{PROGRAM} {version()} is ready; Ctrl-C stops it.",
        "",
        f"  OTLP/gRPC   {grpc or 'not served'}",
        f"  OTLP/HTTP   {http or 'not served'}",
        f"  PostgreSQL  {database}",
        f"  DSN         {mask_dsn(service.dsn)}",
        f"  Metrics     {_metrics_url(service)}",
        f"  Spool       {service.spool_folder or 'none: while PostgreSQL is away, senders are asked to retry'}",
        "",
        "See what arrives:" if reader is None else "See what arrives, as a role that may read, since this one may not:",
        "",
        f"  {_psql()} '{shareable_url(service.dsn if reader is None else make_conninfo(service.dsn, user=reader))}'",
        "",
        "Send from an app" + (" (on another machine, with this one's name for localhost):" if everywhere else ":"),
        "",
        f"  export {ways[0]}",
        *(f"  # or: {way}" for way in ways[1:]),
        *(f"  export {variable}" for variable in _credentials(service.security)),
        "  export OTEL_SERVICE_NAME=my-app",
        "  export OTEL_TRACES_EXPORTER=otlp OTEL_LOGS_EXPORTER=otlp OTEL_METRICS_EXPORTER=none",
        "  opentelemetry-instrument python app.py",
        "",
    ]


def _metrics_url(service: "Service") -> str:
    endpoint = service.metrics_endpoint
    return "not served" if endpoint is None else f"{_url(endpoint)}/metrics, and /healthz, /readyz"


def _credentials(security: "Security") -> Iterator[str]:
    """Yield what a sender sets to be let in; nothing secret, and nothing that we know."""
    if security.authenticator is not None:
        yield "OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20…  # or Basic%20…, as the file has it"
    if security.tls is not None:
        yield "OTEL_EXPORTER_OTLP_CERTIFICATE=…  # the authority's, unless it is trusted anyway"
        if security.tls.client_auth:
            yield "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=… OTEL_EXPORTER_OTLP_CLIENT_KEY=…"


def _status(service: "Service") -> str:
    doors = {"OTLP/gRPC": service.grpc_endpoint, "OTLP/HTTP": service.http_endpoint}
    said = [f"{name} on {endpoint}" for name, endpoint in doors.items() if endpoint is not None]
    if service.metrics_endpoint is not None:
        said.append(f"metrics on {service.metrics_endpoint}")
    return f"serving {', '.join(said)}"


def _url(endpoint: "Endpoint", *, scheme: str = "http") -> str:
    return f"{scheme}://localhost:{endpoint.port}" if _is_everywhere(endpoint) else f"{scheme}://{endpoint}"


def _is_everywhere(endpoint: "Endpoint | None") -> bool:
    return endpoint is not None and endpoint.host in {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound


def _psql() -> str:
    """Return how to call psql: by its name, else where the embedded PostgreSQL's programs lie."""
    if shutil.which("psql") is None:
        from otel_pg_exporter.postgres.embedded import find_binaries

        try:
            program = find_binaries() / "psql"
        except StartupError:
            return "psql"
        if program.exists():
            return shlex.quote(str(program))
    return "psql"

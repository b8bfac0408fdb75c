"""Every setting that there is, in groups, as frozen values; names are flags, variables and keys at once (`loading`)."""

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from otel_pg_exporter.config.loading import redacted, setting
from otel_pg_exporter.errors import ConfigurationError

SERVER_PREFIX = "OTEL_PG_EXPORTER_"
SDK_PREFIX = "OTEL_EXPORTER_POSTGRESQL_"

_DAY = 86_400.0  # seconds
_LEAST_RETENTION = 3_600.0  # seconds, as the database has it
_LARGEST_INT32 = 2**31 - 1  # what gRPC's and PostgreSQL's own settings can hold

# A writer keeps one of PostgreSQL's processes busy, so more of them than cores fill batches less and gain nothing; a
# second one writes while the first one waits for the disk.
_FEWEST_WRITERS, _MOST_WRITERS = 2, 8

# An origin as browsers write it, without the port that its scheme has anyway: any other form would match no page.
_ORIGIN = re.compile(r"(?!https://[^:]+:443$|http://[^:]+:80$)[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LEDGER_TTL: dict[str, Any] = {
    "default": 7 * _DAY,
    "help": "seconds that the ledger (`ingest_requests`) remembers a log request; one that may have been committed"
    " before it was spooled is written only within half of that",
    "minimum": 3600,
    "maximum": 3650 * _DAY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """How to reach PostgreSQL, and how long a call to it may take."""

    dsn: str = setting(
        "",
        "PostgreSQL to write to, as URL or key=value string; libpq's PG* fill in the rest",
        secret=True,  # it may hold a password
    )
    schema: str = setting("otel", "schema that holds the tables")
    connect_timeout: float = setting(5.0, "seconds that a connection attempt may take", minimum=0.1, maximum=_DAY)
    statement_timeout: float = setting(30.0, "seconds that one statement may take", minimum=0.1, maximum=_DAY)
    lock_timeout: float = setting(10.0, "seconds that a statement may wait for a lock", minimum=0.1, maximum=_DAY)
    synchronous_commit: Literal["server", "on", "remote_apply", "remote_write", "local", "off"] = setting(
        "on", "what a COMMIT waits for; `server` keeps the server's own setting; `off` gives up durability for speed"
    )
    application_name: str = setting("otel-pg-exporter", "name shown in pg_stat_activity")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterSettings:
    """How one batch is written."""

    write_method: Literal["auto", "copy", "insert"] = setting(
        "auto",
        "`copy`: binary COPY first, always; `auto`: the same, but by a temporary table for a while after retries were"
        " met; `insert`: neither, and slower",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """Which core makes rows: read from the environment alone, once, by all of a process."""

    core: Literal["auto", "native", "python"] = setting(
        "auto", "which core makes rows; auto: native where there is one"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingSettings:
    """Which columns there are, and which times belong to them."""

    mappings: tuple[Path, ...] = setting((), "TOML files that promote further attributes to columns")
    window_past: float = setting(
        30 * _DAY,
        "seconds back from now that get daily partitions; older goes to the DEFAULT partition",
        minimum=0,
        maximum=3650 * _DAY,
    )
    window_future: float = setting(
        _DAY, "seconds ahead of now that get daily partitions", minimum=0, maximum=365 * _DAY
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """What is held in memory between the front door and PostgreSQL."""

    writers: int = setting(
        0,
        "connections that write in parallel; 0: as many as there are cores, 2 at least and 8 at most",
        minimum=0,
        maximum=256,
    )
    max_batch_rows: int = setting(
        20_000, "rows in one transaction (a single larger request still goes whole)", minimum=1, maximum=_LARGEST_INT32
    )
    max_batch_bytes: int = setting(
        32 * 2**20,
        "bytes of rows in one transaction (a single larger request still goes whole)",
        minimum=1,
        maximum=2**40,
        size=True,
    )
    linger: float = setting(
        0.0, "seconds that a free writer waits for more; fewer, larger transactions", minimum=0, maximum=60
    )
    ack_timeout: float = setting(
        3.0,
        "seconds until a request that is not committed goes to the spool, or without one is answered UNAVAILABLE",
        minimum=0.1,
        maximum=_DAY,
    )
    max_inflight_bytes: int = setting(
        512 * 2**20,
        "bytes of requests held in memory, at least `max_request_bytes`; beyond it senders are asked to retry",
        minimum=2**20,
        maximum=2**50,
        size=True,
    )

    @property
    def writer_count(self) -> int:
        """How many writers there are."""
        return self.writers or min(max(_FEWEST_WRITERS, available_cores()), _MOST_WRITERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolSettings:
    """The spool on disk, which takes what PostgreSQL does not commit in time."""

    spool: bool = setting(True, "keep on disk, and acknowledge, what PostgreSQL does not commit within `ack_timeout`")
    spool_dir: Path | None = setting(None, "folder of the spool; default: in the user's state folder")
    spool_max_bytes: int = setting(
        2**30,
        "bytes of requests on disk, at least `max_request_bytes`; beyond it senders are asked to retry",
        minimum=2**20,
        maximum=2**50,
        size=True,
    )
    ledger_ttl: float = setting(**_LEDGER_TTL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExporterSpoolSettings:
    """The exporters' spool on disk, which takes what PostgreSQL does not commit within `timeout`."""

    spool_dir: Path | None = setting(
        None, "folder of a spool, which keeps what PostgreSQL does not commit within `timeout`; default: no spool"
    )
    spool_max_bytes: int = setting(
        256 * 2**20,
        "bytes of requests on disk, in one process's folder; beyond it exports fail as without a spool",
        minimum=2**20,
        maximum=2**50,
        size=True,
    )
    ledger_ttl: float = setting(**_LEDGER_TTL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverSettings:
    """The OTLP front door."""

    grpc_endpoint: str = setting("127.0.0.1:4317", "host:port for OTLP/gRPC; `none`: not served")
    http_endpoint: str = setting("127.0.0.1:4318", "host:port for OTLP/HTTP; `none`: not served")
    max_request_bytes: int = setting(
        64 * 2**20, "largest request, also after decompression", minimum=1024, maximum=_LARGEST_INT32, size=True
    )
    # A call in flight costs a thread that waits for its commit, some 40 KB: 240 senders with commits of 100 ms were all
    # served in 67 MiB of memory, where a limit of 64 refused four calls of five and took 60 MiB.
    max_calls: int = setting(256, "calls in flight; beyond it senders are asked to retry", minimum=1, maximum=10_000)
    reuse_port: bool = setting(False, "let another process listen on the same port, for rolling restarts")
    cors_origins: tuple[str, ...] = setting(
        (), "origins (https://app.example) whose pages in a browser may send by OTLP/HTTP; `*`: all"
    )

    def __post_init__(self) -> None:
        """Refuse what no browser calls an origin: it would let nobody in, and say so nowhere."""
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigurationError(
                    f"--cors-origins: {redacted(origin)!r} is no origin as browsers send it (examples: "
                    "https://app.example, http://localhost:3000; *: all)"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SecuritySettings:
    """Who may send, and how it is encrypted, for OTLP/gRPC and OTLP/HTTP alike; the files may change at any time."""

    tls_cert: Path | None = setting(None, "PEM file with the server's certificate chain; with it, TLS is on")
    tls_key: Path | None = setting(None, "PEM file with the certificate's private key")
    tls_client_ca: Path | None = setting(
        None, "PEM file with the authorities one of which must have signed a client's certificate (mTLS)"
    )
    auth_bearer_file: Path | None = setting(
        None, "file with the bearer tokens that may send, one a line, plain or as sha256:…"
    )
    auth_basic_file: Path | None = setting(
        None, "file with the pairs that may send, one a line, user:password or user:sha256:…"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitoringSettings:
    """What we tell of ourselves."""

    metrics_endpoint: str = setting(
        "127.0.0.1:9464", "host:port for /metrics, /healthz and /readyz; `none`: not served"
    )
    self_metrics_endpoint: str = setting(
        "", "URL of an OTLP/gRPC receiver that our own metrics are sent to (needs the extra `otlp-metrics`)"
    )
    self_metrics_interval: float = setting(60.0, "seconds between two of these sendings", minimum=0.1, maximum=_DAY)
    statistics_interval: float = setting(
        60.0, "seconds between two log lines with statistics; 0: only at exit", minimum=0, maximum=_DAY
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severity that is logged")
    log_format: Literal["auto", "text", "json"] = setting(
        "auto", "form of log lines on stderr; auto: text on a terminal, else JSON"
    )


def _retention(what: str) -> Any:  # noqa: ANN401 - as `setting`
    return setting(
        None,
        f"how long {what} are kept, as 30d; 0: for ever; default: as the database has it, at first for ever",
        minimum=0,
        maximum=3650 * _DAY,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """What is kept how long. The database holds this, so that it is one for all that write there."""

    retention_spans: float | None = _retention("spans, and with them `traces`,")
    retention_logs: float | None = _retention("log records")
    retention_dead_letters: float | None = _retention("dead letters")

    def __post_init__(self) -> None:
        """Refuse what a clock that is a little wrong would turn into a loss."""
        for name in ("retention_spans", "retention_logs", "retention_dead_letters"):
            if 0 < (getattr(self, name) or 0) < _LEAST_RETENTION:
                raise ConfigurationError(f"--{name.replace('_', '-')} must be an hour (1h) at least, or 0: for ever")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Everything that `otel-pg-exporter serve` reads."""

    database: DatabaseSettings = DatabaseSettings()
    writer: WriterSettings = WriterSettings()
    mapping: MappingSettings = MappingSettings()
    pipeline: PipelineSettings = PipelineSettings()
    spool: SpoolSettings = SpoolSettings()
    receiver: ReceiverSettings = ReceiverSettings()
    security: SecuritySettings = SecuritySettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    retention: RetentionSettings = RetentionSettings()
    data_dir: Path | None = setting(None, "folder of the embedded PostgreSQL; default: in the user's state folder")
    migrate: bool = setting(False, "create or update the tables of the PostgreSQL that `dsn` names")
    partitions_ahead: int = setting(7, "daily partitions created ahead", minimum=1, maximum=365)
    shutdown_timeout: float = setting(
        20.0, "seconds that a stop may take to finish what is in flight", minimum=0, maximum=_DAY
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        largest, bound = self.receiver.max_request_bytes, self.pipeline.max_inflight_bytes
        if largest > bound:  # one such request would be let in, and break the bound
            raise ConfigurationError(
                f"--max-inflight-bytes ({bound:,}) is less than --max-request-bytes ({largest:,}), so a single request "
                "could hold more than all may together; raise the one or lower the other"
            )
        room = self.spool.spool_max_bytes
        if self.spool.spool and largest > room:  # one such request could never be spooled
            raise ConfigurationError(
                f"--spool-max-bytes ({room:,}) is less than --max-request-bytes ({largest:,}), so a single request "
                "could be too large for the spool; raise the one or lower the other"
            )
        endpoints = {
            "--grpc-endpoint": self.receiver.grpc_endpoint,
            "--http-endpoint": self.receiver.http_endpoint,
            "--metrics-endpoint": self.monitoring.metrics_endpoint,
        }
        for (one, endpoint), (other, same) in itertools.combinations(endpoints.items(), 2):
            if endpoint == same and re.search(r":0*[1-9][0-9]*$", endpoint):
                raise ConfigurationError(
                    f"{one} and {other} are both {redacted(endpoint)}: each needs a port of its own"
                )
        security = self.security
        if (security.tls_cert is None) != (security.tls_key is None):
            raise ConfigurationError("--tls-cert and --tls-key belong together: one of them is missing")
        if security.tls_client_ca is not None and security.tls_cert is None:
            raise ConfigurationError(
                "--tls-client-ca, which asks for clients' certificates, needs --tls-cert and --tls-key"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExporterSettings:
    """Everything that the SDK exporters read; the environment's names begin with `OTEL_EXPORTER_POSTGRESQL_`."""

    database: DatabaseSettings = DatabaseSettings()
    writer: WriterSettings = WriterSettings()
    mapping: MappingSettings = MappingSettings()
    spool: ExporterSpoolSettings = ExporterSpoolSettings()
    timeout: float = setting(10.0, "seconds that one export may take, retries included", minimum=0.1, maximum=_DAY)

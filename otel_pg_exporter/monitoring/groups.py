"""Every metric that is read when somebody asks: its name, unit and meaning, and what it reads.

The one definition, with `histograms`: `Metrics` makes the SDK's instruments of it, and `docs/reference/metrics.md` is
generated from it. Names are those of OpenTelemetry's semantic conventions where there is one, else begin with
`otel_pg_exporter.`. Attributes have values from small, fixed sets: the number of series is bounded, whatever is sent.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from opentelemetry.metrics import Observation

from otel_pg_exporter.model import KINDS_OF_REJECTION, Anomaly, Signal
from otel_pg_exporter.monitoring.definition import Group, Instrument, Kind, Observations, each, instrument, one
from otel_pg_exporter.monitoring.watch import Condition, SpoolReading
from otel_pg_exporter.telemetry import ItemCounts, PoolState, StatisticsSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What is in flight."""

    bytes: int
    max_bytes: int
    calls: int
    max_calls: int


def _items(name: str, kind: Kind, description: str) -> Instrument[Mapping[Signal, ItemCounts]]:
    field = name.rpartition(".")[2]

    def observe(counts: Mapping[Signal, ItemCounts]) -> Observations:
        return [Observation(getattr(found, field), {"signal": signal.value}) for signal, found in counts.items()]

    return instrument(name, kind, "{item}", description, observe, "signal")


def _repairs(statistics: StatisticsSnapshot) -> Mapping[str, int]:
    return {str(anomaly.name).lower(): statistics.repairs.get(anomaly, 0) for anomaly in Anomaly}


def _rejections(statistics: StatisticsSnapshot) -> Mapping[str, int]:
    return {**dict.fromkeys(KINDS_OF_REJECTION, 0), **statistics.rejections}


_P = "otel_pg_exporter"

ITEMS: Group[Mapping[Signal, ItemCounts]] = Group(
    title="Where the items are",
    instruments=(
        _items(f"{_P}.items.received", Kind.COUNTER, "Spans and log records that were received and decoded."),
        _items(
            f"{_P}.items.recovered_from_spool", Kind.COUNTER, "Items found in the spools of processes that are dead."
        ),
        _items(f"{_P}.items.stored", Kind.COUNTER, "Items committed in PostgreSQL."),
        _items(
            f"{_P}.items.duplicate",
            Kind.COUNTER,
            "Items that were there already: a sender's retries, and what was spooled although it was committed after "
            "all.",
        ),
        _items(f"{_P}.items.rejected", Kind.COUNTER, "Items refused one by one, and kept in dead_letters."),
        _items(
            f"{_P}.items.refused",
            Kind.COUNTER,
            "Items refused with their whole request: its sender was told to come again, or that it is at fault.",
        ),
        _items(f"{_P}.items.in_spool", Kind.UP_DOWN_COUNTER, "Items that are acknowledged, on disk, and not settled."),
        _items(f"{_P}.items.in_flight", Kind.UP_DOWN_COUNTER, "Items of which neither is known yet."),
        _items(f"{_P}.items.spooled", Kind.COUNTER, "Items ever put into the spool."),
        _items(f"{_P}.items.drained", Kind.COUNTER, "Items ever taken out of the spool, settled."),
    ),
)

STATISTICS: Group[StatisticsSnapshot] = Group(
    title="What was committed",
    instruments=(
        instrument(
            f"{_P}.duplicate_conflicts",
            Kind.COUNTER,
            "{item}",
            "Duplicates whose content is another than what was stored, as far as they met in one batch.",
            one(lambda statistics: statistics.duplicate_conflicts),
        ),
        instrument(
            f"{_P}.repairs",
            Kind.COUNTER,
            "{item}",
            "Items that were repaired or found odd, by the bit that they have in the column `anomalies`.",
            each("anomaly", _repairs),
            "anomaly",
        ),
        instrument(
            f"{_P}.rejections",
            Kind.COUNTER,
            "{item}",
            "Rejected items by reason, counted with the commit: `invalid_id`, `not_decodable`, `limit`, `sqlstate_` and"
            " the class of PostgreSQL's error, or `repeated` in a retry that hears the same answer as before.",
            each("reason", _rejections),
            "reason",
        ),
        instrument(
            f"{_P}.dead_letters",
            Kind.COUNTER,
            "{letter}",
            "Rows written to dead_letters; a retry writes none again.",
            one(lambda statistics: statistics.dead_letters),
        ),
        instrument(
            f"{_P}.stage.time",
            Kind.COUNTER,
            "s",
            "Time spent in each stage of a request's way, added over all threads.",
            each(
                "stage", lambda statistics: {stage.value: found.seconds for stage, found in statistics.stages.items()}
            ),
            "stage",
        ),
        instrument(
            f"{_P}.stage.passes",
            Kind.COUNTER,
            "{pass}",
            "How often each stage was gone through: the first three by each request, the others by each batch.",
            each("stage", lambda statistics: {stage.value: found.count for stage, found in statistics.stages.items()}),
            "stage",
        ),
    ),
)

QUEUE: Group[Queue] = Group(
    title="What is in flight",
    instruments=(
        instrument(
            f"{_P}.queue.size",
            Kind.UP_DOWN_COUNTER,
            "By",
            "Memory that requests in flight have reserved.",
            one(lambda queue: queue.bytes),
        ),
        instrument(
            f"{_P}.queue.limit",
            Kind.UP_DOWN_COUNTER,
            "By",
            "Memory that they may reserve: `--max-inflight-bytes`.",
            one(lambda queue: queue.max_bytes),
        ),
        instrument(
            f"{_P}.calls.in_flight",
            Kind.UP_DOWN_COUNTER,
            "{call}",
            "Export calls that are being read or wait for their commit.",
            one(lambda queue: queue.calls),
        ),
        instrument(
            f"{_P}.calls.limit",
            Kind.UP_DOWN_COUNTER,
            "{call}",
            "How many there may be: `--max-calls`.",
            one(lambda queue: queue.max_calls),
        ),
    ),
)

_POOL_NAME = "db.client.connection.pool.name"
_POOL = {_POOL_NAME: "postgresql"}
_STATE = "db.client.connection.state"


def _pool(value: Callable[[PoolState], int]) -> Callable[[PoolState], Observations]:
    return lambda pool: [Observation(value(pool), _POOL)]


POOL: Group[PoolState] = Group(
    title="Connections to PostgreSQL",
    instruments=(
        instrument(
            "db.client.connection.count",
            Kind.UP_DOWN_COUNTER,
            "{connection}",
            "Connections that are idle, or used: lent, or being opened.",
            lambda pool: [
                Observation(pool.idle, _POOL | {_STATE: "idle"}),
                Observation(pool.used, _POOL | {_STATE: "used"}),
            ],
            _POOL_NAME,
            _STATE,
        ),
        instrument(
            "db.client.connection.max",
            Kind.UP_DOWN_COUNTER,
            "{connection}",
            "Connections that there may be: the writers' and a few more.",
            _pool(lambda pool: pool.limit),
            _POOL_NAME,
        ),
        instrument(
            "db.client.connection.pending_requests",
            Kind.UP_DOWN_COUNTER,
            "{request}",
            "Threads that wait for a connection.",
            _pool(lambda pool: pool.waiting),
            _POOL_NAME,
        ),
        instrument(
            "db.client.connection.timeouts",
            Kind.COUNTER,
            "{timeout}",
            "Threads that gave up waiting, because all connections stayed busy.",
            _pool(lambda pool: pool.timeouts),
            _POOL_NAME,
        ),
        instrument(
            f"{_P}.connections.opened",
            Kind.COUNTER,
            "{connection}",
            "Connections opened.",
            one(lambda pool: pool.opened),
        ),
        instrument(
            f"{_P}.connections.failed",
            Kind.COUNTER,
            "{attempt}",
            "Attempts to open a connection that failed.",
            one(lambda pool: pool.failed),
        ),
    ),
)


def _age(reading: SpoolReading) -> float:
    oldest = reading.level.oldest
    return 0.0 if oldest is None else max(0.0, time.time() - oldest / 1e9)


SPOOL: Group[SpoolReading] = Group(
    title="The spool",
    instruments=(
        instrument(
            f"{_P}.spool.size",
            Kind.UP_DOWN_COUNTER,
            "By",
            "Bytes of requests in the spool.",
            one(lambda spool: spool.level.bytes),
        ),
        instrument(
            f"{_P}.spool.lost",
            Kind.GAUGE,
            "1",
            "1 while its file is deleted or moved although it is in use, so that it takes no requests.",
            one(lambda spool: int(spool.lost)),
        ),
        instrument(
            f"{_P}.spool.limit",
            Kind.UP_DOWN_COUNTER,
            "By",
            "Bytes that it may hold: `--spool-max-bytes`.",
            one(lambda spool: spool.max_bytes),
        ),
        instrument(
            f"{_P}.spool.requests",
            Kind.UP_DOWN_COUNTER,
            "{request}",
            "Requests in the spool, those that are set aside too.",
            one(lambda spool: spool.level.requests),
        ),
        instrument(
            f"{_P}.spool.set_aside",
            Kind.UP_DOWN_COUNTER,
            "{request}",
            "Requests in the spool that are kept, but will not be written without somebody's help.",
            one(lambda spool: spool.level.set_aside),
        ),
        instrument(
            f"{_P}.spool.oldest.age",
            Kind.GAUGE,
            "s",
            "Time since the oldest request that is to be written was received; 0 when there is none.",
            one(_age),
        ),
    ),
)

CONDITION: Group[Condition] = Group(
    title="Whether it takes exports",
    instruments=(
        instrument(
            f"{_P}.ready",
            Kind.GAUGE,
            "1",
            "1 while an export would be acknowledged, as `/readyz` says.",
            one(lambda condition: int(condition.ready)),
        ),
        instrument(
            f"{_P}.postgresql.up",
            Kind.GAUGE,
            "1",
            "1 while PostgreSQL answers.",
            one(lambda condition: None if condition.postgresql_up is None else int(condition.postgresql_up)),
        ),
    ),
)

JOBS: Group[Mapping[str, float]] = Group(
    title="What is done now and then",
    instruments=(
        instrument(
            f"{_P}.job.last_success",
            Kind.GAUGE,
            "s",
            "When a job last went well, in seconds since the epoch; missing until it has.",
            each("job.name", lambda jobs: jobs),  # a plain `job` is Prometheus's own
            "job.name",
        ),
    ),
)


class Expired(NamedTuple):
    """What retention has removed."""

    partitions: int
    rows: int


RETENTION: Group[Expired] = Group(
    title="What is removed",
    instruments=(
        instrument(
            f"{_P}.retention.partitions",
            Kind.COUNTER,
            "{partition}",
            "Expired partitions dropped by this process; of many, one at a time does it.",
            one(lambda expired: expired.partitions),
        ),
        instrument(
            f"{_P}.retention.rows",
            Kind.COUNTER,
            "{row}",
            "Expired rows deleted one by one, likewise.",
            one(lambda expired: expired.rows),
        ),
    ),
)

CERTIFICATE: Group[float] = Group(
    title="TLS",
    instruments=(
        instrument(
            f"{_P}.tls.certificate.expiry",
            Kind.GAUGE,
            "s",
            "When the certificate that is served ends, in seconds since the epoch; missing without TLS.",
            one(lambda expires: expires),
        ),
    ),
)

BUILD: Group[Mapping[str, str]] = Group(
    title="What runs",
    instruments=(
        instrument(
            f"{_P}.build.info",
            Kind.GAUGE,
            "1",
            "1; the version, and the core that makes rows: `native` or `python`.",
            lambda build: [Observation(1, build)],
            "version",
            "core",
        ),
    ),
)

GROUPS: tuple[Group[Any], ...] = (ITEMS, STATISTICS, QUEUE, POOL, SPOOL, CONDITION, JOBS, RETENTION, CERTIFICATE, BUILD)

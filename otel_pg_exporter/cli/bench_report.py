"""What `bench` prints of its figures: tables within 100 columns, or JSON."""

import datetime as dt
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from otel_pg_exporter.bench.bounds import bounds
from otel_pg_exporter.bench.load import Sent
from otel_pg_exporter.bench.run import BATCH_STAGES, REQUEST_STAGES, Plan, Results, Throughput
from otel_pg_exporter.cli.config import plain
from otel_pg_exporter.cli.output import table, version
from otel_pg_exporter.config import ServeSettings, values_of
from otel_pg_exporter.telemetry import Stage

_WIDTH = 100
_PACE = 0.9  # of a core, from which on the load generator may have set the pace


def lines(results: Results) -> Iterator[str]:
    """Yield the report."""
    yield (
        f"PostgreSQL {results.postgres_version}; {results.cores} cores here; {results.core} core makes the rows; "
        f"writers: {results.writers}"
    )
    parts = results.throughput
    yield from ("", "At full speed:", "", *_speed(parts), "")
    yield from ("Where the time goes, mean ms and share:", "", *_stages(parts), "")
    for part in parts:
        said = " ".join([*bounds(part, results), *_failures(part.sent)])
        yield from textwrap.wrap(f"{part.part}: {said}", _WIDTH, subsequent_indent="  ")
    if results.latency:
        yield from ("", "Time to an OK, mixed spans:", "", *_latency(results))
        for each in results.latency:
            for failure in _failures(each.sent):
                yield f"at {each.share:.0%}: {failure}"


def _speed(parts: Sequence[Throughput]) -> list[str]:
    titles = ["part", "items/s", "MB/s", "rows/batch", "p50 ms", "p99 ms", "µs/item", "receiver", "generator"]
    own = all(part.postgres_cores is not None for part in parts)
    if own:
        titles.append("PostgreSQL")
    rows = []
    for part in parts:
        sent = part.sent
        pace = "*" if sent.cpu_share >= _PACE else ""
        row = [
            part.part.value,
            f"{sent.items_per_second:,.0f}",
            f"{_megabytes(sent):,.1f}",
            f"{part.rows_per_batch:,.0f}",
            f"{_ms(sent.latencies['p50'])}",
            f"{_ms(sent.latencies['p99'])}",
            f"{part.receiver_cost * 1e6:.2f}",
            f"{part.receiver_cores:.2f}",
            f"{sent.cpu_share:.2f}{pace}",
        ]
        rows.append([*row, f"{part.postgres_cores:.2f}"] if own else row)
    notes = ["", "µs/item: CPU of the receiver; behind it, how many cores each took."]
    if any(part.sent.cpu_share >= _PACE for part in parts):
        notes.append("* The load generator, which has one core at most, may have set the pace.")
    return [*table(titles, rows, right=titles[1:]), *notes]


def _stages(parts: Sequence[Throughput]) -> list[str]:
    rows = [
        [
            f"{('request' if stage in REQUEST_STAGES else 'batch') if stage in _FIRST else '':<8}{stage.value}",
            *(f"{_ms(part.mean(stage))} {part.share(stage):5.0%}" for part in parts),
        ]
        for stage in (*REQUEST_STAGES, *BATCH_STAGES)
    ]
    titles = ["for each", *(part.part.value for part in parts)]
    return table(titles, rows, right=titles[1:])


_FIRST = {REQUEST_STAGES[0], BATCH_STAGES[0]}


def _latency(results: Results) -> list[str]:
    titles = ["of capacity", "due items/s", "items/s", "items/request", "requests", "p50 ms", "p99 ms"]
    rows = [
        [
            f"{each.share:.0%}",
            f"{(each.load.rate or 0.0) * each.load.items:,.0f}",
            f"{each.sent.items_per_second:,.0f}",
            f"{each.load.items:,}",
            f"{each.sent.requests:,}",
            _ms(each.sent.latencies["p50"]),
            _ms(each.sent.latencies["p99"]),
        ]
        for each in results.latency
    ]
    return table(titles, rows, right=titles[1:])


def _failures(sent: Sent) -> list[str]:
    said = []
    if failed := sum(sent.failures.values()):
        codes = ", ".join(f"{count:,} {code}" for code, count in sent.failures.items())
        said.append(f"{failed:,} of {sent.requests + failed:,} calls failed: {codes}.")
    if sent.rejected:
        said.append(f"In {sent.rejected:,} calls items were refused.")
    return said


def _megabytes(sent: Sent) -> float:
    return sent.bytes / sent.seconds / 1e6


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def as_values(plan: Plan, results: Results, settings: ServeSettings) -> dict[str, Any]:
    """Return the figures for JSON, with what they were measured with, and when."""
    groups = (settings.writer, settings.mapping, settings.pipeline)
    return {
        "version": version(),
        "measured_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "settings": {
            "synchronous_commit": settings.database.synchronous_commit,
            **{name: plain(value) for group in groups for name, value in values_of(group).items()},
        },
        "postgres_version": results.postgres_version,
        "core": results.core,
        "cores": results.cores,
        "writers": results.writers,
        "linger": results.linger,
        "senders": plan.senders,
        "items": plan.items,
        "max_rows": plan.max_rows,
        "seconds": plan.seconds,
        "parts": [_part_values(plan, part, results) for part in results.throughput],
        "latency": [
            {
                "share_of_capacity": each.share,
                "due_items_per_second": (each.load.rate or 0.0) * each.load.items,
                "items_per_request": each.load.items,
                **_sent_values(each.sent),
            }
            for each in results.latency
        ],
    }


def _part_values(plan: Plan, part: Throughput, results: Results) -> dict[str, Any]:
    return {
        "part": part.part.value,
        "items_per_request": plan.items_of(part.part),
        **_sent_values(part.sent),
        "megabytes_per_second": _megabytes(part.sent),
        "receiver_seconds": part.seconds,
        "rows": part.rows,
        "batches": part.batches,
        "rows_per_batch": part.rows_per_batch,
        "cores": {
            "receiver": part.receiver_cores,
            "generator": part.sent.cpu_share,
            "postgres": part.postgres_cores,  # null where it is not the bench's own
        },
        "receiver_cpu_us_per_item": part.receiver_cost * 1e6,
        "writers_busy": part.busy(results.writers),
        "request": _stage_values(part, REQUEST_STAGES),
        "batch": _stage_values(part, BATCH_STAGES),
        "bounds": bounds(part, results),
    }


def _stage_values(part: Throughput, stages: Sequence[Stage]) -> dict[str, Any]:
    return {stage.value: {"mean_ms": part.mean(stage) * 1e3, "share": part.share(stage)} for stage in stages}


def _sent_values(sent: Sent) -> dict[str, Any]:
    return {
        "items_per_second": sent.items_per_second,
        "requests": sent.requests,
        "failures": sent.failures,
        "calls_with_rejected_items": sent.rejected,
        "p50_ms": sent.latencies["p50"] * 1e3,
        "p99_ms": sent.latencies["p99"] * 1e3,
    }

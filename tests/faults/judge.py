"""Holds the tables against the ledger of a load: through SQL alone, item by item."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import psycopg
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_pg_exporter.model import Signal
from otel_pg_exporter.service import Service
from otel_pg_exporter.telemetry import ItemCounts
from tests.faults.load import Ledger
from tests.support import wait_until

_SHOWN = 8  # names in a message


class Tables:
    """What the tables hold, by the items' names."""

    def __init__(self, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SET search_path = otel")
            # One snapshot: writers may be at work.
            with connection.transaction():
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                self.items = {
                    Signal.TRACES: Counter(name for (name,) in connection.execute("SELECT name FROM spans")),
                    Signal.LOGS: Counter(body for (body,) in connection.execute("SELECT body FROM logs")),
                }
                self.dead_letters = Counter(
                    (Signal(signal), _name(Signal(signal), otlp))
                    for signal, otlp in connection.execute("SELECT signal, otlp FROM dead_letters")
                )
                self.inexact_traces = [
                    f"{side}: {row}"
                    for side, row in connection.execute(
                        "(SELECT 'traces', t::text FROM traces t EXCEPT SELECT 'traces', t::text FROM traces_exact t)"
                        " UNION ALL (SELECT 'exact', t::text FROM traces_exact t"
                        " EXCEPT SELECT 'exact', t::text FROM traces t)"
                    )
                ]

    @property
    def rows(self) -> int:
        return sum(counter.total() for counter in self.items.values())


def _name(signal: Signal, otlp: bytes) -> str:
    """Return the name of the one item of a dead letter."""
    if signal is Signal.TRACES:
        spans = [
            span.name
            for group in ExportTraceServiceRequest.FromString(otlp).resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        (name,) = spans
        return name
    (name,) = (
        record.body.string_value
        for group in ExportLogsServiceRequest.FromString(otlp).resource_logs
        for scope in group.scope_logs
        for record in scope.log_records
    )
    return name


def judge(dsn: str, *ledgers: Ledger, services: Sequence[Service] = (), timeout: float = 120.0) -> Tables:
    """Assert that what was acknowledged is stored once, and that nothing else is.

    `services` are all receivers that wrote, if they live in this process and were not killed: then their spools must
    be empty within `timeout` seconds, and their counters must agree with the tables. Without them, the tables have
    `timeout` seconds to take what is still in a spool.
    """
    if services:
        wait_until(lambda: all(_idle(service.counts()) for service in services), timeout)
    else:
        wait_until(_Complete(dsn, ledgers), timeout)
    tables = Tables(dsn)
    findings = [*_findings(tables, ledgers), *_miscounted(tables, ledgers, services)]
    assert not findings, "\n".join(findings)
    return tables


def _idle(counts: ItemCounts) -> bool:
    assert counts.balanced, counts
    return counts.in_flight == counts.in_spool == 0


class _Complete:
    """The condition that nothing acknowledged is missing; its text, for a message, says what is."""

    def __init__(self, dsn: str, ledgers: Sequence[Ledger]) -> None:
        self._dsn = dsn
        self._ledgers = ledgers
        self._missing: list[str] = []

    def __call__(self) -> bool:
        self._missing = list(_missing(Tables(self._dsn), self._ledgers))
        return not self._missing

    def __str__(self) -> str:
        return "; ".join(self._missing)


def _missing(tables: Tables, ledgers: Iterable[Ledger]) -> Iterator[str]:
    for signal in Signal:
        requests = [each for ledger in ledgers for each in ledger.acknowledged if each.signal is signal]
        good = {item for each in requests for item in each.items if item not in each.bad}
        bad = {item for each in requests for item in each.bad}
        yield from _named(f"acknowledged {signal.items} are missing", good - tables.items[signal].keys())
        lost = {item for item in bad if (signal, item) not in tables.dead_letters}
        yield from _named(f"acknowledged bad {signal.items} are missing in dead_letters", lost)


def _findings(tables: Tables, ledgers: Sequence[Ledger]) -> Iterator[str]:
    yield from _missing(tables, ledgers)
    for signal in Signal:
        requests = [each for ledger in ledgers for each in ledger.sent if each.signal is signal]
        good = {item for each in requests for item in each.items if item not in each.bad}
        bad = {item for each in requests for item in each.bad}
        stored = tables.items[signal]
        dead = Counter({item: count for (of, item), count in tables.dead_letters.items() if of is signal})
        yield from _named(f"{signal.items} are stored more than once", _doubled(stored))
        yield from _named(f"{signal.items} are stored that nobody sent, or that are bad", stored.keys() - good)
        yield from _named(f"{signal.items} are in dead_letters more than once", _doubled(dead))
        yield from _named(f"good {signal.items} are in dead_letters", dead.keys() - bad)
    yield from _named("rows of traces and traces_exact differ", tables.inexact_traces)


def _doubled(counter: Counter[str]) -> list[str]:
    return [item for item, count in counter.items() if count > 1]


def _named(what: str, items: Iterable[str]) -> Iterator[str]:
    names = sorted(items)
    if names:
        yield f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}"


def _miscounted(tables: Tables, ledgers: Sequence[Ledger], services: Sequence[Service]) -> Iterator[str]:
    """Compare the counters of all receivers with the tables and with what senders heard.

    A sender that was told to come again, or a COMMIT whose answer was lost, makes a stored item count as refused, and
    as a duplicate when it comes again; so some of these are no more than bounds.
    """
    if not services:
        return
    sums = [service.counts() for service in services]
    total = sums[0]
    for each in sums[1:]:
        total = replace(
            total, **{field: getattr(total, field) + getattr(each, field) for field in ItemCounts.__dataclass_fields__}
        )
    answered = sum(ledger.answered for ledger in ledgers)
    letters = tables.dead_letters.total()
    rules: dict[str, Callable[[], bool]] = {
        "stored + duplicate + rejected = items of all OKs": lambda: (
            total.stored + total.duplicate + total.rejected == answered
        ),
        "stored <= rows": lambda: total.stored <= tables.rows,
        "rows <= stored + duplicate + refused": lambda: tables.rows <= total.stored + total.duplicate + total.refused,
        "dead letters <= rejected + refused": lambda: letters <= total.rejected + total.refused,
    }
    for rule, holds in rules.items():
        if not holds():
            yield f"not so: {rule}: {total}, {answered} answered, {tables.rows} rows, {letters} dead letters"

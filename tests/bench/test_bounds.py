"""What `bench` concludes from a part's figures."""

from collections.abc import Mapping

import pytest

from otel_pg_exporter.bench.bounds import bounds
from otel_pg_exporter.bench.load import Sent
from otel_pg_exporter.bench.run import Part, Results, Throughput
from otel_pg_exporter.telemetry import Stage, StageTime

_IDLE = {Stage.RECEIVE: 1.0, Stage.TRANSCODE: 1.0, Stage.WAIT: 8.0}
_STATEMENTS = {**_IDLE, Stage.COPY: 35.0, Stage.COMMIT: 3.0}
_FLUSHES = {**_IDLE, Stage.COPY: 5.0, Stage.COMMIT: 33.0}
_TRANSCODING = {Stage.RECEIVE: 1.0, Stage.TRANSCODE: 19.0, Stage.WAIT: 1.0, Stage.COPY: 35.0}


def part(stages: Mapping[Stage, float], *, generator: float = 0.2, receiver: float = 0.5) -> Throughput:
    """Return ten measured seconds, with so many seconds in the stages, and cores for the generator and the receiver."""
    return Throughput(
        part=Part.SPANS_MIXED,
        sent=Sent(
            seconds=10,
            requests=10,
            items=10_000,
            bytes=1,
            failures={},
            rejected=0,
            resent=0,
            cpu_seconds=10 * generator,
        ),
        seconds=10,
        rows=10_000,
        batches=10,
        receiver_cpu=10 * receiver,
        postgres_cpu=None,
        stages={stage: StageTime(count=10, seconds=stages.get(stage, 0.0)) for stage in Stage},
    )


def results(*, core: str = "native", linger: float = 0.0) -> Results:
    return Results(postgres_version="18.4", core=core, writers=4, linger=linger, cores=8, throughput=[], latency=[])


@pytest.mark.parametrize(
    ("measured", "run", "said"),
    [
        (part(_STATEMENTS), results(), "PostgreSQL bounds: the 4 writers were busy 95%"),
        (part(_FLUSHES), results(), "The flush to PostgreSQL's disk bounds"),
        (part(_IDLE, generator=0.95), results(), "The load generator set the pace"),
        (part(_IDLE), results(), "Nothing was used up (writers 0% busy)"),
        (part(_IDLE), results(linger=0.5), "The writers waited for more, up to 0.5 seconds"),
        (part(_TRANSCODING, receiver=0.8), results(core="Python reference"), "The core in Python bounds"),
        (part(_STATEMENTS, receiver=0.95), results(core="Python reference"), "The core in Python bounds"),
    ],
)
def test_the_closest_bound_is_named(measured: Throughput, run: Results, said: str) -> None:
    first, *_ = bounds(measured, run)
    assert first.startswith(said)


def test_with_the_core_in_python_nothing_else_is_blamed() -> None:
    assert len(bounds(part(_TRANSCODING, generator=0.95), results(core="Python reference"))) == 1

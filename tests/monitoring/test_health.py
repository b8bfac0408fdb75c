"""Whether it works, and whether it takes exports: by HTTP and by gRPC, the truth within seconds."""

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from otel_pg_exporter.config import PipelineSettings
from otel_pg_exporter.errors import OutageError
from otel_pg_exporter.model import Outcome, RowBatch, Signal
from otel_pg_exporter.monitoring.endpoint import Vitals
from otel_pg_exporter.monitoring.watch import Watch
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.service import Service
from tests.e2e.support import OK, Receiver, heard, persist, receiving
from tests.monitoring.support import TRACE_SERVICE, Scrape, ask, health_of, ready, serving
from tests.proxy import Proxy, proxy_for
from tests.receiver.support import TRACES
from tests.support import wait_until
from tests.test_service import settings, spans_locked
from tests.workload import span, trace_body, traces


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with proxy_for(dsn) as running:
        yield running


def readiness_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage().split(":")[0] for each in caplog.records if each.name.endswith("monitoring.watch")]


def test_without_a_spool_nothing_is_ready_while_postgresql_is_away_and_all_is_again_when_it_is_back(
    dsn: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with receiving(proxy.dsn, read_dsn=dsn, pipeline=PipelineSettings(ack_timeout=1)) as receiver:
        service = receiver.service
        with health_of(service) as health:
            assert ready(service)
            assert serving(health)
            assert serving(health, TRACE_SERVICE)
            proxy.refuse()
            wait_until(lambda: not ready(service))
            wait_until(lambda: not serving(health))
            assert not serving(health, TRACE_SERVICE)
            body = ask(service, "/readyz").body
            assert body["reasons"] == ["PostgreSQL does not answer", "there is no spool"]
            assert (body["postgresql"]["up"], body["spool"], body["state"]) == (False, None, "serving")
            assert ask(service, "/healthz").status == 200
            found = Scrape(service)
            assert (found("otel_pg_exporter_ready"), found("otel_pg_exporter_postgresql_up")) == (0, 0)
            proxy.up()
            wait_until(lambda: ready(service))
            wait_until(lambda: serving(health))
            assert ask(service, "/readyz").body["postgresql"]["up"] is True
    assert readiness_lines(caplog) == [
        "no answer from PostgreSQL",
        "not ready, so exports are refused",
        "PostgreSQL answers again",
        "ready again",
    ]


def test_a_postgresql_that_hangs_is_noticed_and_asking_for_readiness_never_waits_for_it(dsn: str, proxy: Proxy) -> None:
    with receiving(proxy.dsn, read_dsn=dsn, pipeline=PipelineSettings(ack_timeout=1)) as receiver:
        proxy.stall()
        wait_until(lambda: not ready(receiver.service))
        proxy.flow()
        wait_until(lambda: ready(receiver.service))


def test_with_a_spool_it_stays_ready_until_that_is_full_and_is_again_once_it_is_drained(
    dsn: str, proxy: Proxy, tmp_path: Path
) -> None:
    with receiving(
        proxy.dsn, read_dsn=dsn, spool_dir=tmp_path, spool_max_bytes=2**20, pipeline=PipelineSettings(ack_timeout=1)
    ) as receiver:
        service = receiver.service
        with health_of(service) as health:
            proxy.refuse()
            wait_until(lambda: not ask(service, "/readyz").body["postgresql"]["up"])
            assert ready(service)
            _fill_the_spool(receiver)
            wait_until(lambda: not ready(service))
            wait_until(lambda: not serving(health))
            body = ask(service, "/readyz").body
            assert body["reasons"] == ["PostgreSQL does not answer", "the spool is full, or its disk fails"]
            assert 0 < body["spool"]["bytes"] <= body["spool"]["max_bytes"] == 2**20
            found = Scrape(service)
            assert found("otel_pg_exporter_spool_size_bytes") == body["spool"]["bytes"]
            assert found("otel_pg_exporter_spool_limit_bytes") == 2**20
            assert found("otel_pg_exporter_spool_requests") == body["spool"]["requests"]
            assert found("otel_pg_exporter_spool_set_aside") == 0
            assert found("otel_pg_exporter_items_in_spool", signal="traces") == body["spool"]["items"]
            assert 0 < found("otel_pg_exporter_spool_oldest_age_seconds") < 300
            proxy.up()
            wait_until(lambda: ready(service) and serving(health))
            wait_until(lambda: service.counts().in_spool == 0)
            wait_until(lambda: Scrape(service)("otel_pg_exporter_spool_size_bytes") == 0)


@pytest.mark.parametrize("is_back", [True, False])
def test_a_spool_that_is_deleted_is_noticed_takes_no_more_and_what_is_in_it_is_written_if_it_can_be(
    dsn: str, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_back: bool
) -> None:
    with receiving(
        proxy.dsn, read_dsn=dsn, spool_dir=tmp_path / "spool", pipeline=PipelineSettings(ack_timeout=1)
    ) as receiver:
        service = receiver.service
        proxy.refuse()
        assert heard(receiver.client.export(TRACES, trace_body([span(0)]))) == OK
        shutil.rmtree(tmp_path / "spool")
        wait_until(lambda: not ready(service))
        body = ask(service, "/readyz").body
        assert body["reasons"] == ["PostgreSQL does not answer", "the spool was deleted or moved"]
        assert (body["spool"]["takes_requests"], body["spool"]["items"]) == (False, 1)
        assert Scrape(service)("otel_pg_exporter_spool_lost") == 1
        refused = receiver.client.refused(TRACES, trace_body([span(1)]))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert "was deleted or moved while it was in use" in refused.details
        assert (service.counts().in_spool, service.counts().refused) == (1, 1)
        if is_back:
            proxy.up()
            wait_until(lambda: ready(service) and service.counts().in_spool == 0)
            assert ask(service, "/readyz").body["spool"]["takes_requests"] is False
            assert receiver.database.count("spans") == 1
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR and "deleted" in each.message]
    assert len(said) == 1 if is_back else len(said) == 2
    assert is_back or said[-1].startswith("1 items were in the spool ")


def _fill_the_spool(receiver: Receiver) -> None:
    for number in range(1, 100):
        body = trace_body([span(0, trace=number, name="x" * 100_000)])
        try:
            assert heard(receiver.client.export(TRACES, body)) == OK
        except grpc.RpcError:
            return
    raise AssertionError


def test_a_table_that_takes_nothing_makes_it_not_ready_although_postgresql_answers(dsn: str) -> None:
    with receiving(dsn, pipeline=PipelineSettings(ack_timeout=0.5)) as receiver:
        receiver.database.execute("ALTER TABLE spans RENAME TO elsewhere")
        receiver.client.refused(TRACES, trace_body([span(0)]))
        wait_until(lambda: not ready(receiver.service))
        body = ask(receiver.service, "/readyz").body
        assert body["postgresql"]["up"] is True
        assert body["reasons"] == ["PostgreSQL does not take spans", "there is no spool"]
        receiver.database.execute("ALTER TABLE elsewhere RENAME TO spans")
        assert persist(receiver.client, Signal.TRACES, trace_body([span(1)])) == OK
        wait_until(lambda: ready(receiver.service))


def test_a_service_that_is_being_stopped_is_healthy_but_not_ready(dsn: str) -> None:
    service = Service(settings(dsn))
    service.start()
    stopping = threading.Thread(target=service.stop)
    with spans_locked(dsn) as unlock, grpc.insecure_channel(str(service.grpc_endpoint)) as channel:
        call = channel.unary_unary(TRACES, None, None).future(trace_body([span(0)]), timeout=60)
        wait_until(lambda: service.counts().in_flight)
        stopping.start()
        wait_until(lambda: not ready(service))
        assert ask(service, "/readyz").body["state"] == "stopping"
        assert ask(service, "/healthz").body == {"healthy": True, "state": "stopping", "dead_threads": []}
        unlock()
        call.result()
    stopping.join(60)
    assert not stopping.is_alive()


def test_it_is_healthy_and_not_ready_while_it_starts() -> None:
    condition = Watch().condition
    assert (condition.ready, condition.state, condition.reasons) == (False, "starting", ("it is starting",))


def test_while_it_starts_it_is_healthy_and_not_ready_although_postgresql_does_not_answer(proxy: Proxy) -> None:
    service = Service(settings(proxy.dsn))
    proxy.stall()
    failures: list[BaseException] = []

    def start() -> None:
        try:
            service.start()
        except BaseException as exc:  # noqa: BLE001 - handed to the test
            failures.append(exc)

    starting = threading.Thread(target=start)
    starting.start()
    try:
        wait_until(lambda: service.metrics_endpoint is not None and service.metrics_endpoint.port)
        assert ask(service, "/healthz").body == {"healthy": True, "state": "starting", "dead_threads": []}
        answer = ask(service, "/readyz")
        assert (answer.status, answer.body["state"], answer.body["reasons"]) == (503, "starting", ["it is starting"])
        assert Scrape(service)("otel_pg_exporter_ready") == 0
    finally:
        proxy.flow()
        starting.join(60)
        service.stop()
    assert failures == []


def test_a_thread_that_has_ended_is_named() -> None:
    vitals = Vitals()
    thread = threading.Thread(target=lambda: None)
    thread.start()
    vitals.add("lively", lambda: True)
    vitals.add("writers", thread.is_alive)
    thread.join()
    assert vitals.dead == ["writers"]


def test_it_is_not_healthy_once_a_thread_that_it_needs_has_ended(dsn: str) -> None:
    with Service(settings(dsn)) as service:
        assert ask(service, "/healthz").status == 200
        service._retention.stop(10)  # type: ignore[union-attr] # it is started
        answer = ask(service, "/healthz")
        assert (answer.status, answer.body["dead_threads"]) == (503, ["retention"])


class _House:
    """What a watch looks at, with a clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.away = False
        self.looks = 0
        self.availability = Availability(clock=lambda: self.now)
        self.watch = Watch(clock=lambda: self.now)
        self.watch.begin(self.availability, self._probe, None)
        self.told: list[bool] = []
        self.watch.open(self.told.append)

    def _probe(self) -> None:
        self.looks += 1
        if self.away:
            raise OutageError("away")

    def attempt(self, *, fails: bool) -> None:
        def write(batches: object) -> list[Outcome]:
            if fails:
                raise OutageError("away")
            return []

        batch: RowBatch = traces(span(0))
        with contextlib.suppress(OutageError):
            self.availability.observe(write)([batch])

    def ready_after(self, seconds: float) -> bool:
        self.now += seconds
        self.watch.look()
        return self.watch.condition.ready


def test_while_rows_are_committed_nobody_else_asks_postgresql() -> None:
    house = _House()
    assert house.looks == 1
    house.attempt(fails=False)
    assert house.ready_after(1)
    assert house.looks == 1
    assert house.ready_after(2)
    assert house.looks == 2


def test_a_failed_attempt_counts_for_half_a_minute_and_not_after_an_outage_that_explains_it() -> None:
    house = _House()
    house.attempt(fails=True)
    assert not house.ready_after(1)
    assert not house.ready_after(28)
    assert house.ready_after(2)

    house.attempt(fails=True)
    house.away = True
    assert not house.ready_after(1)
    house.away = False
    assert house.ready_after(1)


def test_it_is_not_ready_before_the_front_door_is_open() -> None:
    watch = Watch()
    watch.begin(Availability(), lambda: None, None)
    watch.look()
    assert (watch.condition.state, watch.condition.ready) == ("starting", False)
    assert watch.condition.postgresql_up
    watch.open(lambda _ready: None)
    assert (watch.condition.state, watch.condition.ready) == ("serving", True)


def test_readiness_is_told_at_once_and_at_each_change() -> None:
    house = _House()
    house.away = True
    house.ready_after(1)
    house.ready_after(1)
    house.away = False
    house.ready_after(1)
    house.watch.drain()
    house.ready_after(1)
    assert house.told == [True, False, True, False]
    assert not house.watch.condition.ready

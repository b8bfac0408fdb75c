"""The service inside this process: what starts, what stops, and what runs beside."""

import contextlib
import datetime as dt
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from otel_pg_exporter.config import (
    DatabaseSettings,
    MappingSettings,
    MonitoringSettings,
    PipelineSettings,
    ReceiverSettings,
    ServeSettings,
    SpoolSettings,
)
from otel_pg_exporter.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    EmbeddedServerError,
    OutageError,
    SchemaError,
    StartupError,
)
from otel_pg_exporter.pipeline.ticker import Job, Ticker
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.service import Service
from otel_pg_exporter.telemetry import ItemCounts
from tests.e2e.support import client_of
from tests.monitoring.support import Scrape
from tests.proxy import proxy_for
from tests.receiver.support import TRACES, Client, refusal
from tests.serving import refusal_once_draining, span_request
from tests.support import wait_until


def settings(dsn: str = "", *, endpoint: str = "127.0.0.1:0", ack_timeout: float = 60.0) -> ServeSettings:
    return ServeSettings(
        database=DatabaseSettings(dsn=dsn, lock_timeout=120, statement_timeout=120),
        pipeline=PipelineSettings(ack_timeout=ack_timeout),
        spool=SpoolSettings(spool=False),
        receiver=ReceiverSettings(grpc_endpoint=endpoint, http_endpoint="127.0.0.1:0"),
        monitoring=MonitoringSettings(metrics_endpoint="127.0.0.1:0"),
        shutdown_timeout=60,
    )


@contextlib.contextmanager
def client(service: Service) -> Iterator[Client]:
    with client_of(str(service.grpc_endpoint)) as opened:
        yield opened


def rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


@contextlib.contextmanager
def spans_locked(dsn: str) -> Iterator[Callable[[], None]]:
    """Keep every commit of spans waiting, until the yielded function is called."""
    with contextlib.closing(psycopg.connect(dsn)) as connection:
        connection.execute("LOCK TABLE otel.spans IN ACCESS EXCLUSIVE MODE")
        yield connection.rollback


def a_writer_waits(dsn: str) -> bool:
    query = "SELECT 1 FROM pg_locks JOIN pg_class ON oid = relation WHERE NOT granted AND relname = 'spans'"
    return rows(dsn, query) != []


@pytest.fixture
def new_threads() -> Callable[[], set[str]]:
    """Return a function that names the threads that were not there before the test, but for PostgreSQL's and gRPC's."""
    before = set(threading.enumerate())
    ours = (
        "writer-",
        "ticker",
        "readiness",
        "metrics",
        "http-server",
        "otlp-grpc",
        "otlp-http",
        "http-server",
        "postgresql-start",
    )
    return lambda: {each.name for each in set(threading.enumerate()) - before if each.name.startswith(ours)}


def our_connections(dsn: str) -> list[tuple[object, ...]]:
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'otel-pg-exporter' AND datname = "
    return rows(dsn, f"{query} current_database()")


def test_a_service_stores_what_it_receives_and_tells_how_much(dsn: str) -> None:
    with Service(settings(dsn)) as service, client(service) as sender:
        assert service.dsn == dsn
        for endpoint in (service.grpc_endpoint, service.http_endpoint):
            assert endpoint is not None
            assert endpoint.port != 0
        body = span_request(3)
        assert sender.export(TRACES, body) == b""
        assert sender.export(TRACES, body) == b""
        assert service.counts() == ItemCounts(received=6, stored=3, duplicate=3)
        statistics = service.statistics()
        assert (statistics.rows, statistics.duplicates, statistics.batches) == (3, 3, 2)
    assert rows(dsn, "SELECT count(*) FROM otel.spans") == [(3,)]


def test_a_stopped_service_leaves_no_thread_and_no_connection(dsn: str, new_threads: Callable[[], set[str]]) -> None:
    service = Service(settings(dsn))
    service.start()
    with client(service) as sender:
        assert sender.export(TRACES, span_request()) == b""
    assert new_threads() != set()
    service.stop()
    service.stop()
    assert new_threads() == set()
    wait_until(lambda: our_connections(dsn) == [])


def test_a_start_creates_partitions_ahead(dsn: str) -> None:
    ahead = replace(settings(dsn), partitions_ahead=12)
    with Service(ahead):
        pass
    last = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=12)
    query = f"SELECT count(*) FROM pg_class WHERE relname ~ '^(spans|logs)_p{last:%Y%m%d}$'"
    assert rows(dsn, query) == [(2,)]


def test_views_that_are_gone_are_told_and_keep_nothing_from_being_stored(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP VIEW otel.red_metrics CASCADE")
    with Service(settings(dsn)) as service, client(service) as sender:
        assert sender.export(TRACES, span_request(1)) == b""
    (warning,) = [each for each in caplog.messages if "lacks what the migrations made" in each]
    assert "view red_metrics, function red_metrics; run `otel-pg-exporter migrate`" in warning


@pytest.mark.parametrize("case", ["port", "database", "schema", "mapping", "endpoint"])
def test_a_start_that_fails_leaves_nothing_behind(
    case: str, dsn: str, empty_dsn: str, new_threads: Callable[[], set[str]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        values, error = {
            "port": (settings(dsn, endpoint=busy), StartupError),
            "database": (settings("host=127.0.0.1 port=1"), DatabaseUnavailableError),
            "schema": (settings(empty_dsn), SchemaError),
            "mapping": (replace(settings(dsn), mapping=MappingSettings(mappings=(Path("/no"),))), ConfigurationError),
            "endpoint": (settings(dsn, endpoint="4317"), ConfigurationError),
        }[case]
        with pytest.raises(error):  # noqa: SIM117 - which of the two raises is of no interest
            with Service(values):
                pass
    assert new_threads() == set()
    wait_until(lambda: our_connections(dsn) == [])


def test_a_stop_takes_no_new_requests_and_finishes_those_in_flight(dsn: str) -> None:
    service = Service(settings(dsn))
    service.start()
    stop = threading.Thread(target=service.stop)
    with client(service) as sender, client(service) as late:
        health = health_pb2_grpc.HealthStub(late.channel)
        states = health.Watch(health_pb2.HealthCheckRequest())
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        with spans_locked(dsn) as release:
            future = sender.future(TRACES, span_request())
            wait_until(lambda: a_writer_waits(dsn))
            stop.start()
            assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert refusal_once_draining(late).retry_delay == 1
            assert not future.done()
            release()
        assert future.result() == b""
        stop.join()
    assert service.counts() == ItemCounts(received=1, stored=1)


def test_a_stop_ends_in_time_even_if_a_commit_hangs(
    dsn: str, caplog: pytest.LogCaptureFixture, new_threads: Callable[[], set[str]]
) -> None:
    service = Service(replace(settings(dsn), shutdown_timeout=0.5))
    service.start()
    with client(service) as sender, spans_locked(dsn):
        future = sender.future(TRACES, span_request())
        wait_until(lambda: a_writer_waits(dsn))
        service.stop()
        error = future.exception()
        assert refusal(error).code in {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
        assert "its senders were not told OK" in caplog.text
        wait_until(lambda: new_threads() == set())
    counts = service.counts()
    assert (counts.received, counts.refused, counts.in_flight) == (1, 1, 0)
    assert rows(dsn, "SELECT count(*) FROM otel.spans") == [(0,)]


def test_statistics_are_logged_in_one_line_and_items_where_not_all_were_stored(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Service(settings(dsn)) as service, client(service) as sender:
        body = span_request(2)
        sender.export(TRACES, body)
        service._log_statistics()
        assert "statistics: 2 rows in 1 batches" in caplog.text
        assert "items:" not in caplog.text
        sender.export(TRACES, body)
    assert "items: 4 received = 2 stored + 2 duplicate + 0 rejected + 0 refused + 0 in flight" in caplog.text


def test_its_own_postgresql_is_found_again_on_a_new_port_if_the_old_one_is_taken(open_folder: Path) -> None:
    with Service(replace(settings(), data_dir=open_folder)) as service, client(service) as sender:
        server = service.embedded
        assert isinstance(server, EmbeddedServer)
        assert server.pid is not None
        assert sender.export(TRACES, span_request()) == b""
        before, opened = service.dsn, Scrape(service)("otel_pg_exporter_connections_opened_total")
        with socket.socket() as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = psycopg.conninfo.conninfo_to_dict(before)["port"]
            assert port is not None
            with server._lock:  # or it might be revived before the port is taken
                os.kill(server.pid, signal.SIGKILL)
                wait_until(lambda: _binds(squatter, int(port)))
                squatter.listen()
            assert sender.export(TRACES, span_request()) == b""
        assert service.dsn != before
        assert Scrape(service)("otel_pg_exporter_connections_opened_total") > opened
        assert rows(service.dsn, "SELECT count(*) FROM otel.spans") == [(2,)]


def _binds(squatter: socket.socket, port: int) -> bool:
    try:
        squatter.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


# What runs beside.


def test_a_job_that_fails_is_run_again_and_does_not_end_the_others(
    caplog: pytest.LogCaptureFixture, new_threads: Callable[[], set[str]]
) -> None:
    ran: dict[str, int] = {"refused": 0, "buggy": 0, "good": 0}
    errors = {"refused": EmbeddedServerError("no room"), "buggy": ZeroDivisionError("a bug")}

    def job(name: str) -> Job:
        def run() -> None:
            ran[name] += 1
            if name in errors:
                raise errors[name]

        return Job(name=name, interval=0.001, run=run)

    ticker = Ticker([job(name) for name in ran])
    wait_until(lambda: min(ran.values()) > 2)
    ticker.stop()
    assert caplog.text.count("refused: no room") == 1
    assert caplog.text.count("buggy failed unexpectedly") == 1
    assert "ZeroDivisionError" in caplog.text
    assert new_threads() == set()


def test_a_job_s_failures_of_another_kind_are_told_too_with_what_to_do_about_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors = [OutageError("no connection", remedy="chmod the passfile"), DatabaseUnavailableError("the clocks differ")]
    told = iter(errors)

    def run() -> None:
        raise next(told, errors[1])

    ticker = Ticker([Job(name="job", interval=0.001, run=run)])
    wait_until(lambda: "the clocks differ" in caplog.text)
    ticker.stop()
    assert caplog.messages == ["job: no connection; chmod the passfile", "job: the clocks differ"]


def test_jobs_run_at_their_own_intervals() -> None:
    clock = [0.0]
    ran: list[tuple[float, str]] = []
    ticker = Ticker.__new__(Ticker)  # its thread would run by the real clock
    jobs = [
        Job(name=name, interval=interval, run=lambda name=name: ran.append((clock[0], name)))  # type: ignore[misc] # mypy can't infer it
        for name, interval in (("second", 1.0), ("minute", 3.0))
    ]
    ticker._clock, ticker._due, ticker.succeeded = lambda: clock[0], [(job.interval, job) for job in jobs], {}
    for clock[0] in (0.5, 1.0, 1.5, 2.0, 3.0, 3.5):
        ticker._run_due()
    assert ran == [(1.0, "second"), (2.0, "second"), (3.0, "second"), (3.0, "minute")]


def test_partitions_are_created_ahead_again_and_again(dsn: str) -> None:
    with Service(settings(dsn)) as service:
        job = next(job for job in service._jobs() if job.name == "partitions ahead")
        last = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=7)
        name = f"spans_p{last:%Y%m%d}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"DROP TABLE otel.{name}".encode())
        job.run()
        assert rows(dsn, f"SELECT 1 FROM pg_class WHERE relname = '{name}'") == [(1,)]


def test_partitions_that_could_not_be_made_are_no_success(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with Service(settings(dsn)) as service, psycopg.connect(dsn) as connection:
        job = next(job for job in service._jobs() if job.name == "partitions ahead")
        last = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=7)
        connection.execute(f"DROP TABLE otel.spans_p{last:%Y%m%d}".encode())
        connection.commit()
        connection.execute("LOCK TABLE otel.spans IN ROW EXCLUSIVE MODE")  # as a writer who never ends
        with pytest.raises(DatabaseUnavailableError, match="not all of the days to come have partitions"):
            job.run()
        assert "their rows go to the DEFAULT partition" in caplog.text
        connection.rollback()
        job.run()


def test_a_postgresql_that_was_reached_before_may_be_away_at_the_start(dsn: str, tmp_path: Path) -> None:
    with proxy_for(dsn) as proxy:
        with_spool = replace(settings(proxy.dsn), spool=SpoolSettings(spool_dir=tmp_path))
        proxy.refuse()
        with pytest.raises(DatabaseUnavailableError), Service(with_spool):
            pass
        proxy.up()
        with Service(with_spool):
            pass
        proxy.refuse()
        with Service(with_spool) as service, client(service) as sender:
            sender.export(TRACES, span_request())
            assert service.counts().in_spool == 1
            proxy.up()
            wait_until(lambda: service.counts().stored == 1)
            wait_until(lambda: service.postgres_version != "not reached yet")
    assert service.counts().balanced

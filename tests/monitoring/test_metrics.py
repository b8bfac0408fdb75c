"""What `/metrics` shows is what happened: as the tables have it, in one snapshot, and bounded."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from otel_pg_exporter.model import Anomaly, Signal
from otel_pg_exporter.monitoring.groups import GROUPS
from otel_pg_exporter.monitoring.histograms import HISTOGRAMS
from otel_pg_exporter.service import Service
from tests.e2e.support import METHODS, Receiver, receiving
from tests.monitoring.support import Scrape, ask
from tests.receiver.certificates import Files
from tests.receiver.support import LOGS, METRICS, TRACES
from tests.support import wait_until
from tests.test_service import settings
from tests.workload import log_body, record, span, trace_body

_ITEMS = "otel_pg_exporter_items_"


@pytest.fixture
def receiver(dsn: str) -> Iterator[Receiver]:
    with receiving(dsn) as running:
        yield running


def balance(scrape: Scrape) -> tuple[float, float]:
    """Return both sides of the sum that must be right at any moment."""
    came = ("received_total", "recovered_from_spool_total")
    went = ("stored_total", "duplicate_total", "rejected_total", "refused_total", "in_spool", "in_flight")
    return sum(scrape(_ITEMS + each) for each in came), sum(scrape(_ITEMS + each) for each in went)


def at_rest(scrape: Scrape) -> bool:
    used = scrape("db_client_connection_count", db_client_connection_state="used")
    return used == scrape("otel_pg_exporter_queue_size_bytes") == 0


def test_counts_are_those_of_the_tables_and_balanced_in_every_scrape_under_load(receiver: Receiver) -> None:
    over = threading.Event()

    def send(sender: int) -> None:
        for number in range(20):
            spans = [span(each, trace=1 + sender * 100 + number) for each in range(5)]
            receiver.client.export(TRACES, trace_body([*spans, spans[0], span(9, trace=0)]))
            receiver.client.export(LOGS, log_body([record("line"), record("other")]))

    def scrape() -> int:
        scrapes = 0
        while not over.is_set() or scrapes == 0:
            came, went = balance(Scrape(receiver.service))
            assert came == went
            scrapes += 1
        return scrapes

    with ThreadPoolExecutor(5) as pool:
        scraping = pool.submit(scrape)
        for done in [pool.submit(send, sender) for sender in range(4)]:
            done.result()
        over.set()
        assert scraping.result() > 1

    # The rows are let go, and a look at PostgreSQL is over, a moment after the last answer.
    wait_until(lambda: at_rest(Scrape(receiver.service)))
    found = Scrape(receiver.service)
    assert balance(found) == (80 * 9, 80 * 9)
    assert found(f"{_ITEMS}received_total", signal="traces") == 80 * 7
    assert found(f"{_ITEMS}stored_total", signal="traces") == receiver.database.count("spans") == 80 * 5
    assert found(f"{_ITEMS}stored_total", signal="logs") == receiver.database.count("logs") == 80 * 2
    assert found(f"{_ITEMS}duplicate_total", signal="traces") == 80
    assert found(f"{_ITEMS}in_flight") == 0
    assert found("otel_pg_exporter_rejections_total", reason="invalid_id") == 80
    assert found("otel_pg_exporter_dead_letters_total") == receiver.database.count("dead_letters") == 80
    assert found("otel_pg_exporter_batch_rows_sum", signal="traces") == 80 * 5
    batches = found("otel_pg_exporter_batch_rows_count")
    assert found("otel_pg_exporter_transaction_duration_seconds_count") == batches
    assert found("otel_pg_exporter_stage_passes_total", stage="commit") == batches
    assert found("otel_pg_exporter_stage_time_seconds_total", stage="commit") > 0
    assert (
        0 < found("otel_pg_exporter_lag_seconds_count") <= found("otel_pg_exporter_batch_rows_count", signal="traces")
    )
    assert found("otel_pg_exporter_lag_seconds_sum") < 60 * batches
    assert found("db_client_connection_count", db_client_connection_state="used") == 0
    assert found("db_client_connection_count", db_client_connection_state="idle") > 0
    assert found("otel_pg_exporter_queue_size_bytes") == found("otel_pg_exporter_calls_in_flight") == 0
    assert found("otel_pg_exporter_queue_limit_bytes") == 512 * 2**20
    assert (found("otel_pg_exporter_ready"), found("otel_pg_exporter_postgresql_up")) == (1, 1)


def test_repairs_are_counted_by_kind(receiver: Receiver) -> None:
    repaired = span(0)
    repaired.name = "a\0b"
    receiver.client.export(TRACES, trace_body([repaired, span(1)]))
    found = Scrape(receiver.service)
    assert found("otel_pg_exporter_repairs_total", anomaly="text_repaired") == 1
    assert {sample.labels["anomaly"] for sample in found.families["otel_pg_exporter_repairs"].samples} == {
        str(each.name).lower() for each in Anomaly
    }


def test_calls_are_counted_by_method_and_status_also_those_refused_before_they_are_decoded(receiver: Receiver) -> None:
    def calls(method: str, status: str) -> float:
        labels = {"rpc_method": method.removeprefix("/"), "rpc_response_status_code": status}
        return Scrape(receiver.service)("rpc_server_call_duration_seconds_count", **labels)

    receiver.client.export(METHODS[Signal.TRACES], trace_body([span(0)]))
    receiver.client.export(METRICS, b"")
    assert receiver.client.refused(LOGS, b"\xff").code is grpc.StatusCode.INVALID_ARGUMENT
    assert [calls(TRACES, "OK"), calls(METRICS, "OK"), calls(LOGS, "INVALID_ARGUMENT")] == [1, 1, 1]


def test_a_wrong_path_or_method_is_counted_and_never_named(receiver: Receiver) -> None:
    for method, path, host in (
        ("POST", "/v1/profiles", "here"),
        ("POST", "/made/up", "here"),
        ("GET", "/v1/traces", "made/up"),
        ("GET", "/v1/traces%0A", "here"),
        ("PROPFIND", "/v1/logs", "here"),
    ):
        request = urllib.request.Request(
            f"http://{receiver.service.http_endpoint}{path}", method=method, headers={"Host": host}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=120)
        caught.value.close()

    found = Scrape(receiver.service).families["http_server_request_duration_seconds"]
    assert {
        tuple(map(each.labels.get, ("http_request_method", "http_route", "http_response_status_code"))): each.value
        for each in found.samples
        if each.name.endswith("_count")
    } == {
        ("POST", "", "404"): 2,
        ("GET", "/v1/traces", "405"): 1,
        ("GET", "", "405"): 1,
        ("_OTHER", "/v1/logs", "405"): 1,
    }


def test_every_metric_is_defined_once_with_a_unit_and_a_meaning_and_shows_up(dsn: str, tmp_path: Path) -> None:
    definitions = [
        *(instrument.definition for group in GROUPS for instrument in group.instruments),
        *(histogram.definition for histogram in HISTOGRAMS),
    ]
    assert len({definition.name for definition in definitions}) == len(definitions)
    with receiving(dsn, spool_dir=tmp_path) as receiver:
        receiver.client.export(TRACES, trace_body([span(0)]))
        urllib.request.urlopen(
            urllib.request.Request(
                f"http://{receiver.service.http_endpoint}/v1/traces",
                trace_body([span(1)]),
                {"Content-Type": "application/x-protobuf"},
            )
        ).close()
        found = Scrape(receiver.service)
    assert found("http_server_request_duration_seconds_count", http_route="/v1/traces", url_scheme="http") == 1
    for definition in definitions:
        assert definition.description.endswith(".")
        if definition.name.startswith(("otel_pg_exporter.job.", "otel_pg_exporter.tls.")):
            continue  # no job was due yet, and there is no TLS
        family = found.families[definition.prometheus.removesuffix("_total")]
        assert family.documentation == definition.description
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} <= {each.replace(".", "_") for each in definition.attributes}


def test_what_prometheus_asks_for_is_what_it_gets_and_nothing_else_is_served(receiver: Receiver) -> None:
    plain = ask(receiver.service, "/metrics")
    assert (plain.status, plain.headers["content-type"].split(";")[0]) == (200, "text/plain")
    open_metrics = ask(receiver.service, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")
    head = ask(receiver.service, "/metrics", method="HEAD")
    assert (head.status, head.text) == (200, "")
    assert ask(receiver.service, "/metrics", method="POST").status == 405
    assert ask(receiver.service, "/").status == 404


def test_with_tls_the_certificates_end_is_shown(dsn: str, tmp_path: Path) -> None:
    files = Files(folder=tmp_path)
    files.write()
    with Service(replace(settings(dsn), security=files.settings)) as service:
        ends = Scrape(service)("otel_pg_exporter_tls_certificate_expiry_seconds")
    assert ends > time.time()

"""What monitoring systems ask a service, over its real endpoint."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from otel_pg_exporter.service import Service
from tests.receiver.support import TRACES


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an HTTP client got."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def body(self) -> Any:  # noqa: ANN401 - JSON's
        return json.loads(self.text)


def ask(service: Service, path: str, *, method: str = "GET", accept: str = "*/*") -> Answer:
    request = urllib.request.Request(
        f"http://{service.metrics_endpoint}{path}", method=method, headers={"Accept": accept}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return Answer(status=response.status, headers=dict(response.headers), text=response.read().decode())
    except urllib.error.HTTPError as exc:
        with exc:
            return Answer(status=exc.code, headers=dict(exc.headers), text=exc.read().decode())


class Scrape:
    """All samples of one scrape."""

    def __init__(self, service: Service) -> None:
        self.text = ask(service, "/metrics").text
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}

    def __call__(self, name: str, **labels: str) -> float:
        """Add up the samples of a name that have these labels, at least one."""
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, (name, labels)
        return sum(found)


def ready(service: Service) -> bool:
    return ask(service, "/readyz").status == 200


@contextmanager
def health_of(service: Service) -> Iterator[health_pb2_grpc.HealthStub]:
    with grpc.insecure_channel(str(service.grpc_endpoint)) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def serving(stub: health_pb2_grpc.HealthStub, name: str = "") -> bool:
    answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=120)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


TRACE_SERVICE = TRACES.split("/")[1]

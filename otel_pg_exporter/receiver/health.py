"""`grpc.health.v1`: the state of the server as a whole, and of each OTLP service."""

from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class Health:
    """The health service. It says NOT_SERVING until told otherwise."""

    def __init__(self, services: Iterable[str]) -> None:
        self._names = (health.OVERALL_HEALTH, *services)
        self._servicer = health.HealthServicer()
        self.set_serving(False)

    def register(self, server: grpc.Server) -> None:
        """Add the service to a server that has not started."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def set_serving(self, serving: bool) -> None:
        """Say whether exports succeed at the moment; without effect after `shut_down`."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            self._servicer.set(name, status)

    def shut_down(self) -> None:
        """Say NOT_SERVING for good."""
        self._servicer.enter_graceful_shutdown()

"""`/metrics`, `/healthz` and `/readyz`: what monitoring systems and orchestrators ask for, by plain HTTP."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from otel_pg_exporter.monitoring.metrics import Metrics
from otel_pg_exporter.monitoring.watch import STOPPING, Condition, Watch
from otel_pg_exporter.receiver.endpoint import Endpoint
from otel_pg_exporter.receiver.http_server import HttpServer

ENDPOINT_SETTING = "--metrics-endpoint (OTEL_PG_EXPORTER_METRICS_ENDPOINT)"

_GRACE = 1.0  # seconds for the last answers
_NO_STORE = {"Cache-Control": "no-store"}


class Vitals:
    """Whether the threads live that nothing works without. Threads are added while it starts."""

    def __init__(self) -> None:
        self._alive: dict[str, Callable[[], bool]] = {}

    def add(self, name: str, alive: Callable[[], bool]) -> None:
        """Look at this, too."""
        self._alive[name] = alive

    @property
    def dead(self) -> list[str]:
        """What has ended and should not have."""
        return [name for name, alive in list(self._alive.items()) if not alive()]


class MonitoringEndpoint:
    """Serves the three paths. A scrape runs in a thread of its own, one at a time; the others answer at once."""

    def __init__(
        self, endpoint: Endpoint, metrics: Metrics, vitals: Vitals, watch: Watch, *, reuse_port: bool = False
    ) -> None:
        self._metrics = metrics
        self._vitals = vitals
        self._watch = watch
        self._scrapes = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        routes = [
            Route("/metrics", self._get_metrics),
            Route("/healthz", self._get_health),
            Route("/readyz", self._get_readiness),
        ]
        self._server = HttpServer(Starlette(routes=routes), endpoint, setting=ENDPOINT_SETTING, reuse_port=reuse_port)

    def start(self) -> int:
        """Listen and serve; return the port. Raises StartupError when the endpoint cannot be had."""
        return self._server.start()

    def stop(self) -> None:
        """Finish the answers in flight, shortly."""
        self._server.stop(_GRACE)
        self._scrapes.shutdown()

    async def _get_metrics(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        accept = request.headers.get("accept", "")
        content, media_type = await loop.run_in_executor(self._scrapes, self._metrics.exposition, accept)
        return Response(content, headers={**_NO_STORE, "Content-Type": media_type})

    async def _get_health(self, _request: Request) -> Response:
        state = self._watch.condition.state
        dead = [] if state == STOPPING else self._vitals.dead
        return _answer(ok=not dead, body={"healthy": not dead, "state": state, "dead_threads": dead})

    async def _get_readiness(self, _request: Request) -> Response:
        found = self._watch.condition
        return _answer(ok=found.ready, body=_readiness(found, time.monotonic()))


def _readiness(found: Condition, now: float) -> Mapping[str, object]:
    spool = found.spool
    return {
        "ready": found.ready,
        "state": found.state,
        "reasons": found.reasons,
        "postgresql": {"up": found.postgresql_up, "for_seconds": round(now - found.postgresql_since, 1)},
        "spool": spool
        and {
            "takes_requests": spool.takes,
            "bytes": spool.level.bytes,
            "max_bytes": spool.max_bytes,
            "requests": spool.level.requests,
            "items": spool.level.items,
            "set_aside": spool.level.set_aside,
        },
    }


def _answer(*, ok: bool, body: Mapping[str, object]) -> Response:
    return JSONResponse(body, status_code=200 if ok else 503, headers=_NO_STORE)

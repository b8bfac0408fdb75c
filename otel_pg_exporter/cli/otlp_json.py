"""OTLP requests as people read them: OTLP's own JSON."""

import base64
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_pg_exporter.model import Signal

_REQUESTS: dict[str, type[ExportTraceServiceRequest | ExportLogsServiceRequest]] = {
    Signal.TRACES.value: ExportTraceServiceRequest,
    Signal.LOGS.value: ExportLogsServiceRequest,
}
_IDS = frozenset({"traceId", "spanId", "parentSpanId"})


def otlp_json(signal: str, body: bytes) -> dict[str, Any] | None:
    """Render a request as OTLP/JSON has it: ids in hex, enums as numbers; None where it cannot be decoded.

    Fields that OTLP doesn't know are left out.
    """
    try:
        request = _REQUESTS[signal].FromString(body)
    except (DecodeError, KeyError):
        return None
    rendered: dict[str, Any] = _with_hex_ids(MessageToDict(request, use_integers_for_enums=True))
    return rendered


def _with_hex_ids(value: Any) -> Any:  # noqa: ANN401 - a JSON tree
    if isinstance(value, list):
        return [_with_hex_ids(each) for each in value]
    if isinstance(value, dict):
        # Attributes are lists of {key, value}: a key of a dict is always a field's name.
        return {
            key: base64.b64decode(each).hex() if key in _IDS else _with_hex_ids(each) for key, each in value.items()
        }
    return value

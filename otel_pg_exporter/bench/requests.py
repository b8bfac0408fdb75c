"""Made-up telemetry for a load: requests that are serialised once, and made new for each time they are sent.

Ten spans make a trace, over four services. Everything but the trace ids comes from a seeded generator.
"""

import enum
import functools
import os
import random
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_INFO
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from otel_pg_exporter.model import Signal

SPANS_PER_TRACE = 10

_SERVICES = ("frontend", "checkout", "payment", "inventory")
_FAILED = 0.02  # share of spans that end in an error, with an exception as event
_PROMPT_BYTES = (2_000, 8_000)
_PROSE_WORDS = 150_000  # some 1 MB
_SPREAD = 10**9  # nanoseconds over which a request's start times lie
_time = struct.Struct("<Q")


class Content(enum.StrEnum):
    """What is in an item."""

    SMALL = "small"  # no attributes; some 75 bytes of OTLP
    MIXED = "mixed"  # ten attributes of all types; some 450 bytes
    GENAI = "genai"  # a chat with a language model, its prompt of 2 to 8 KB included


@dataclass(frozen=True, slots=True)
class _Timed:
    """Where an item's times are, and how much later than the request's they are."""

    position: int
    offset: int  # nanoseconds


class Template:
    """One request, serialised; `fresh` makes requests of the same size and shape that no other one equals."""

    def __init__(self, signal: Signal, content: Content, items: int, *, seed: int = 1) -> None:
        chance = random.Random(seed)
        self.signal = signal
        self.items = items
        request = _Maker(signal, content, chance).request(items)
        self._body = bytes(request.body)
        self.size = len(self._body)  # bytes
        traces = defaultdict(list)
        for position in _occurrences(self._body, request.trace_prefix):
            traces[self._body[position : position + 16]].append(position)
        self._traces = list(traces.values())
        self._times = list(_timed(self._body, request.times))

    def fresh(self, now_ns: int) -> bytes:
        """Return a request with new trace ids, whose items began within the second after `now_ns`."""
        body = bytearray(self._body)
        ids = os.urandom(16 * len(self._traces))
        for number, positions in enumerate(self._traces):
            trace_id = ids[16 * number : 16 * number + 16]
            for position in positions:
                body[position : position + 16] = trace_id
        for timed in self._times:
            _time.pack_into(body, timed.position, now_ns + timed.offset)
        return bytes(body)


def _occurrences(body: bytes, part: bytes) -> Iterator[int]:
    position = -1
    while (position := body.find(part, position + 1)) >= 0:
        yield position


def _timed(body: bytes, times: Mapping[int, int]) -> Iterator[_Timed]:
    position = 0
    for marker, offset in times.items():
        # From where the last was found: to look through all of 40 MB for each would take a minute.
        position = body.index(_time.pack(marker), position)
        yield _Timed(position, offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    body: bytes
    trace_prefix: bytes  # of all trace ids, and of nothing else
    times: dict[int, int]  # a time that stands there once, to its offset; in the order in which they stand there


class _Maker:
    """Makes a request whose times are numbers that are met nowhere else in it."""

    def __init__(self, signal: Signal, content: Content, chance: random.Random) -> None:
        self._signal = signal
        self._content = content
        self._chance = chance
        self._markers = count(chance.getrandbits(63))
        self._times: dict[int, int] = {}

    def request(self, items: int) -> _Request:
        """Make one with so many items."""
        prefix = self._chance.randbytes(8)
        trace_ids = [prefix + self._chance.randbytes(8) for _ in range(0, items, SPANS_PER_TRACE)]
        root_ids = [self._chance.randbytes(8) for _ in trace_ids]
        traces = self._signal is Signal.TRACES
        request: Any = ExportTraceServiceRequest() if traces else ExportLogsServiceRequest()
        for number, service in enumerate(_SERVICES):
            group = request.resource_spans.add() if traces else request.resource_logs.add()
            group.resource.attributes.extend(_resource(service))
            scope = group.scope_spans.add() if traces else group.scope_logs.add()
            scope.scope.name = "shop.instrumentation"
            scope.scope.version = "1.4.2"
            for item in range(number, items, len(_SERVICES)):
                trace = item % len(trace_ids)
                made = scope.spans.add() if traces else scope.log_records.add()
                made.trace_id = trace_ids[trace]
                made.span_id = root_ids[trace] if item < len(trace_ids) else self._chance.randbytes(8)
                made.attributes.extend(self._attributes(item))
                if traces:
                    self._fill_span(made, b"" if item < len(trace_ids) else root_ids[trace])
                else:
                    self._fill_record(made, item)
        return _Request(body=request.SerializeToString(), trace_prefix=prefix, times=self._times)

    def _fill_span(self, span: Any, parent_id: bytes) -> None:  # noqa: ANN401 - protobuf's own
        chance = self._chance
        start = chance.randrange(_SPREAD)
        span.parent_span_id = parent_id
        span.name = "GET /api/v1/customers/{id}/orders"
        span.kind = 2
        span.start_time_unix_nano = self._marker(start)
        span.end_time_unix_nano = self._marker(start + chance.randrange(10**8))
        if chance.random() < _FAILED:
            span.status.code = Status.STATUS_CODE_ERROR
            event = span.events.add(time_unix_nano=self._marker(start), name="exception")
            event.attributes.extend(_pairs({"exception.type": AnyValue(string_value="TimeoutError")}))

    def _fill_record(self, record: Any, item: int) -> None:  # noqa: ANN401 - protobuf's own
        start = self._chance.randrange(_SPREAD)
        record.time_unix_nano = self._marker(start)
        record.observed_time_unix_nano = self._marker(start + 1_000)
        record.severity_number = SEVERITY_NUMBER_INFO
        record.severity_text = "INFO"
        record.body.string_value = f"GET /api/v1/customers/{item}/orders took {self._chance.randrange(100)} ms"

    def _marker(self, offset: int) -> int:
        marker = next(self._markers)
        self._times[marker] = offset
        return marker

    def _attributes(self, number: int) -> list[KeyValue]:
        chance = self._chance
        if self._content is Content.SMALL:
            return []
        if self._content is Content.MIXED:
            return _pairs(
                {
                    "http.request.method": AnyValue(string_value="GET"),
                    "url.full": AnyValue(string_value=f"https://shop.example/api/v1/customers/{number}/orders?limit=9"),
                    "user_agent.original": AnyValue(string_value="Mozilla/5.0 (X11; Linux x86_64) Chrome/131.0 Safari"),
                    "http.route": AnyValue(string_value="/api/v1/customers/{id}/orders"),
                    "http.response.status_code": AnyValue(int_value=200),
                    "http.response.body.size": AnyValue(int_value=chance.randrange(10**6)),
                    "app.cache.ratio": AnyValue(double_value=chance.random()),
                    "app.retried": AnyValue(bool_value=False),
                    "db.response.returned_rows": AnyValue(int_value=number),
                    "app.tags": AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=tag) for tag in "ab"])),
                }
            )
        return _pairs(
            {
                "gen_ai.operation.name": AnyValue(string_value="chat"),
                "gen_ai.provider.name": AnyValue(string_value="openai"),
                "gen_ai.request.model": AnyValue(string_value="gpt-4o"),
                "gen_ai.usage.input_tokens": AnyValue(int_value=chance.randrange(2_000)),
                "gen_ai.usage.output_tokens": AnyValue(int_value=chance.randrange(2_000)),
                "gen_ai.input.messages": AnyValue(string_value=self._prompt(chance.randrange(*_PROMPT_BYTES))),
            }
        )

    def _prompt(self, size: int) -> str:
        prose = _prose()
        start = self._chance.randrange(len(prose) - size)
        return f'[{{"role": "user", "parts": [{{"type": "text", "content": "{prose[start : start + size]}"}}]}}]'


def _pairs(values: dict[str, AnyValue]) -> list[KeyValue]:
    return [KeyValue(key=key, value=value) for key, value in values.items()]


def _resource(service: str) -> list[KeyValue]:
    return _pairs(
        {
            "service.name": AnyValue(string_value=service),
            "service.version": AnyValue(string_value="2.14.0"),
            "deployment.environment.name": AnyValue(string_value="production"),
            "k8s.pod.name": AnyValue(string_value=f"{service}-5d7cbf79b4-x2x7k"),
        }
    )


@functools.cache
def _prose() -> str:
    """Write words that are made up, so that they compress about as prose does; prompts are cut out of it."""
    chance = random.Random(1)
    words = [_word(chance) for _ in range(2_000)]
    return " ".join(chance.choices(words, k=_PROSE_WORDS))


def _word(chance: random.Random) -> str:
    return "".join(chance.choices("aaabcdeeeefghiiijklmnnoooprrssttuuvwyz", k=chance.randrange(2, 11)))


def templates(signal: Signal, content: Content, items: int, *, number: int) -> list[Template]:
    """Make some that differ in what `fresh` leaves as it is."""
    return [Template(signal, content, items, seed=seed) for seed in range(1, number + 1)]

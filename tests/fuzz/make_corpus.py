"""Write the seeds of the corpus: `python -m tests.fuzz.make_corpus`. What fuzzing found lies beside them."""

from collections.abc import Iterator
from pathlib import Path

from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from otel_pg_exporter.model import Signal
from tests.e2e.wire import delimited, enclosed, varint
from tests.fuzz.checks import TARGETS
from tests.fuzz.mutations import arrays, kvlists
from tests.transcode.support import NOW, log_request, span, trace_request
from tests.transcode.test_every_field import full

CORPUS = Path(__file__).parent / "corpus"

_ATTRIBUTES = {Signal.TRACES: 9, Signal.LOGS: 6}  # field numbers


def seeds(target: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of each seed."""
    signals = [Signal(target)] if target in {"traces", "logs"} else list(Signal)
    for signal in signals:
        for name, body in _requests(signal):
            yield f"{signal.value}-{name}", body
    yield from _broken()


def _requests(signal: Signal) -> Iterator[tuple[str, bytes]]:
    whole = full(signal).SerializeToString()
    yield "every-field", whole
    yield "every-field-twice", whole * 2
    yield "invalid-utf8-everywhere", whole.replace(b" a", b"\xff\xc3").replace(b"a", b"\xe2")
    yield "nul-everywhere", whole.replace(b" a", b"\0a")
    values = [
        AnyValue(double_value=float("nan")),
        AnyValue(double_value=float("-inf")),
        AnyValue(double_value=-0.0),
        AnyValue(int_value=-(2**63)),
        AnyValue(bytes_value=b"\0\xff"),
        AnyValue(string_value="\0\\u0000\ufffd\U0010ffff"),
        AnyValue(),
    ]
    yield "odd-values", enclosed([_item(signal, value.SerializeToString()) for value in values])
    yield "one-item-with-all-odd-values", enclosed([_item(signal, *(value.SerializeToString() for value in values))])
    for levels in (30, 31, 32, 300):
        yield f"{levels}-kvlists", enclosed([_item(signal), _item(signal, kvlists(levels)), _item(signal)])
    for levels in (46, 47, 48, 49, 300):
        yield f"{levels}-arrays", enclosed([_item(signal), _item(signal, arrays(levels)), _item(signal)])
    yield "broken-item-between-good-ones", enclosed([_item(signal), b"\xff", _item(signal)])
    yield "invalid-utf8-in-one", enclosed([_item(signal), _item(signal, delimited(1, b"\xed\xa0\x80")), _item(signal)])
    yield "a-thousand-empty-items", enclosed([b""] * 1_000)
    yield "a-thousand-empty-scopes", delimited(1, delimited(2, b"") * 1_000)
    yield "a-thousand-empty-resources", delimited(1, b"") * 1_000
    yield "broken-resource", delimited(1, delimited(1, b"\xff") + delimited(2, delimited(2, _item(signal)))) + whole
    yield "broken-scope", delimited(1, delimited(2, delimited(1, b"\xff") + delimited(2, _item(signal)) * 2)) + whole
    for levels in (47, 48, 49):
        for end, bottom in ("", b"\x18\x07"), ("-around-invalid-utf8", b"\x0a\x01\xff"):
            yield (
                f"deep-message-{levels}-arrays{end}",
                enclosed([_item(signal) + _deep(signal, arrays(levels, bottom))]),
            )
    group = varint(2**29 - 1 << 3 | 3) * 99 + varint(2**29 - 1 << 3 | 4) * 99
    yield "unknown-groups", group + enclosed([_item(signal) + group, _item(signal) + group[:-1]])
    shallow = varint(19 << 3 | 3) * 97 + varint(19 << 3 | 4) * 97
    yield "97-groups-in-a-good-item", enclosed([_item(signal) + shallow])
    yield "97-groups-in-an-item", enclosed([_item(signal) + shallow, _item(signal) + shallow + b"\x2a\x01\xff"])


def _item(signal: Signal, *values: bytes) -> bytes:
    """Encode an item with these encoded values as attributes."""
    if signal is Signal.TRACES:
        item = trace_request(span()).resource_spans[0].scope_spans[0].spans[0].SerializeToString()
    else:
        item = b"\x09" + NOW.to_bytes(8, "little")
    keys = (f"k{index % 4}".encode() for index in range(len(values)))
    pairs = (delimited(1, key) + delimited(2, value) for key, value in zip(keys, values, strict=True))
    return item + b"".join(delimited(_ATTRIBUTES[signal], pair) for pair in pairs)


def _deep(signal: Signal, value: bytes) -> bytes:
    """Encode the field of an item in which a value may nest one level deeper or less deep than in an attribute."""
    if signal is Signal.TRACES:  # an event's attribute
        return delimited(11, delimited(3, delimited(1, b"k") + delimited(2, value)))
    return delimited(5, value)  # the body


def _broken() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "text", b"POST /v1/traces HTTP/1.1\r\n\r\n"
    yield "cut-off", enclosed([_item(Signal.TRACES)])[:-1]
    yield "other-signal", log_request().SerializeToString() + enclosed([_item(Signal.LOGS)])
    yield "field-0", b"\x00\x00"
    yield "field-2-to-the-29", varint(2**29 << 3) + b"\0"
    yield "wire-type-7", b"\x0f"
    yield "end-of-no-group", b"\x0c"
    yield "groups-without-end", b"\x0b" * 1_000
    yield "long-tag", b"\x8a\x80\x80\x80\x80\x80\x80\x80\x80\x00\x00"
    yield "long-length", b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00"
    yield "length-2-to-the-70", b"\x0a" + b"\xff" * 9 + b"\x7f"
    yield "varint-beyond-64-bits", b"\x78" + b"\xff" * 9 + b"\x7f"


def main() -> None:
    for target in TARGETS:
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds(target):
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()

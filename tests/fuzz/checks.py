"""What must hold whatever the bytes are: one check a target, for hypothesis, atheris and the corpus alike."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from otel_pg_exporter.errors import RefusedError, TooLargeError, UndecodableError
from otel_pg_exporter.model import Anomaly, ColumnType, RowBatch, Signal, Table
from otel_pg_exporter.transcode import transcode
from otel_pg_exporter.transcode.copy_format import split as split_row
from otel_pg_exporter.transcode.limits import Limits
from otel_pg_exporter.transcode.protobuf_wire import Field, MalformedError, delimited, fields, repair_utf8
from tests.fuzz.mutations import children
from tests.transcode.cores import assert_equal, plain
from tests.transcode.support import NOW, Row, columns, plan, read
from tests.transcode.test_every_field import REQUESTS

_EPOCH = 946_684_800_000_000  # 2000-01-01 UTC, in microseconds since 1970
_MINUTE = 60_000_000  # microseconds
_WHOLE = Limits()
_PIECES = (Limits(piece_bytes=1), Limits(piece_bytes=40), Limits(piece_bytes=300))
_STRICT = Limits(piece_bytes=50, parts=40, fields=12, text_bytes=300, repair_bytes=60)
_CUT_OUT = 8  # items of a request that are cut out and transcoded alone
_ROW_OVERHEAD = 4_096  # bytes a row that a batch may be reckoned to hold beside its data, at most


def check_traces(body: bytes) -> None:
    """Transcode as spans."""
    _check_transcode(Signal.TRACES, body)


def check_logs(body: bytes) -> None:
    """Transcode as log records."""
    _check_transcode(Signal.LOGS, body)


def check_pieces(body: bytes) -> None:
    """Decode in pieces: their size changes nothing, and limits refuse without a change to what they let pass."""
    for signal in Signal:
        whole = _decoded(signal, body, _WHOLE)
        for limits in _PIECES:
            assert _comparable(_decoded(signal, body, limits)) == _comparable(whole)
        strict = _decoded(signal, body, _STRICT)
        if isinstance(strict, RefusedError):
            continue
        assert isinstance(whole, RowBatch)
        _check_batch(strict, body)
        assert strict.item_count == whole.item_count
        row_of = dict(zip(whole.items, whole.rows, strict=True))
        assert list(strict.rows) == [row_of[item] for item in strict.items]


def check_wire_format(data: bytes) -> None:
    """Walk the bytes by hand: inside them, and no less tolerant than protobuf."""
    well_formed = True
    try:
        _check_fields(data, list(fields(data, 0, len(data))))
    except MalformedError:
        well_formed = False
    for signal, request in REQUESTS.items():
        parses = _parsed(signal, data) is not None
        assert well_formed or not parses
        descriptor: Any = request.DESCRIPTOR  # the stubs don't agree which class it has
        try:
            repaired = repair_utf8(data, descriptor, 0)
        except MalformedError:
            assert not parses
            continue
        assert repaired == data or not parses
        assert "UTF-8" not in _fault(signal, repaired)  # protobuf's message
        assert repair_utf8(repaired, descriptor, 0) == repaired


TARGETS: dict[str, Callable[[bytes], None]] = {
    "traces": check_traces,
    "logs": check_logs,
    "pieces": check_pieces,
    "wire_format": check_wire_format,
}


def _decoded(signal: Signal, body: bytes, limits: Limits) -> RowBatch | RefusedError:
    try:
        return transcode(plan(signal), body, now_ns=NOW, limits=limits)
    except (UndecodableError, TooLargeError) as error:
        return error


def _comparable(decoded: RowBatch | RefusedError) -> Any:  # noqa: ANN401 - a message or a batch's fields
    if isinstance(decoded, RefusedError):
        return type(decoded), str(decoded)
    return plain(decoded)


def _check_fields(data: bytes, walked: list[Field]) -> None:
    assert [*(field.start for field in walked), len(data)] == [0, *(field.end for field in walked)]
    for field in walked:
        assert field.start < field.content <= field.end
        if field.delimited:
            again = delimited(field.number, data[field.content : field.end])
            assert len(again) <= field.end - field.start
            assert next(fields(again, 0, len(again))).number == field.number


def _check_transcode(signal: Signal, body: bytes) -> None:
    assert_equal(plan(signal), body)
    whole = _parsed(signal, body)
    held: list[int] = []
    try:
        batch = transcode(plan(signal), body, now_ns=NOW, hold=held.append)
    except RefusedError as error:
        _check_refusal(error, whole)
        return
    assert not held or (held, held[-1]) == (sorted(held), batch.size)
    assert batch.item_count == _count(body)
    _check_batch(batch, body)
    _check_cut_out(batch)
    if whole is not None:
        assert not any("not decodable" in rejection.reason for rejection in batch.rejected)
        # However a sender orders the fields of a message, and whatever else it says, the rows are the same.
        again = transcode(plan(signal), _known(whole), now_ns=NOW, request_id=batch.request_id)
        said, before = plain(again), plain(batch)
        assert all(said[name] == before[name] for name in ("rows", "items", "rejected"))


def _check_refusal(error: RefusedError, whole: Message | None) -> None:
    """What protobuf can decode is refused for its size alone, or for its first item: that is the other signal's."""
    assert isinstance(error, TooLargeError | UndecodableError)
    assert whole is None or isinstance(error, TooLargeError) or str(error).startswith("the body holds ")


def _check_batch(batch: RowBatch, body: bytes) -> None:
    count = len(batch.rows)
    per_span = count if batch.signal is Signal.TRACES else 0
    assert (len(batch.items), len(batch.resource_ids)) == (count, count)
    assert (len(batch.keys), len(batch.facts)) == (per_span, per_span)
    rejected = [rejection.item for rejection in batch.rejected]
    _check_partition(batch.items, rejected)
    assert rejected == sorted(rejected)
    assert all(rejection.reason for rejection in batch.rejected)
    assert len(batch.request_id) == 16

    data = sum(map(len, batch.rows)) + len(body)
    resources = sum(map(len, batch.resources.values()))
    assert data <= batch.size <= data + resources + _ROW_OVERHEAD * (batch.item_count + 1)

    assert set(batch.resource_ids) == set(batch.resources)
    for identity, row in batch.resources.items():
        assert _row(columns().resources, row)["resource_id"] == identity
    table = columns().table(batch.signal)
    rows = [_row(table, row) for row in batch.rows]
    assert [row["resource_id"] for row in rows] == list(batch.resource_ids)
    bits = Counter(bit for row in rows for bit in Anomaly if row["anomalies"] & bit)
    assert dict(batch.repairs) == dict(bits)
    _check_times(batch, table, rows)
    for index in range(per_span):
        _check_span(batch, index, table, rows[index])


def _check_times(batch: RowBatch, table: Table, rows: list[Row]) -> None:
    name = "start" if batch.signal is Signal.TRACES else "time"
    days = set()
    for data, row in zip(batch.rows, rows, strict=True):
        time = _integer(_contents(table, data)["start_time" if name == "start" else "time"]) + _EPOCH
        assert row[f"{name}_minute"] == time // _MINUTE
        assert 0 <= row["start_time_ns" if name == "start" else "time_ns"] < 1000
        if not row["anomalies"] & Anomaly.TIME_OUTSIDE_WINDOW:
            days.add(time // _MINUTE // 1440)
    assert batch.days == days
    assert all(abs(day - NOW // 86_400_000_000_000) <= 31 for day in days)


def _check_span(batch: RowBatch, index: int, table: Table, row: Row) -> None:
    contents = _contents(table, batch.rows[index])
    facts = batch.facts[index]
    assert batch.keys[index] == b"".join(contents[column.name] or b"" for column in table.key)
    assert len(batch.keys[index]) == 4 + 16 + 8 + 8
    assert (facts.trace_id, facts.span_id) == (row["trace_id"], row["span_id"])
    assert (len(facts.trace_id), len(facts.span_id)) == (16, 8)
    assert any(facts.trace_id)
    assert any(facts.span_id)
    assert facts.start == _integer(contents["start_time"])
    end = facts.start if contents["end_time"] is None else _integer(contents["end_time"])
    assert facts.end == max(facts.start, end)
    assert facts.error == (row["status_code"] == 2)
    assert facts.root == (row["parent_span_id"] is None)
    assert (facts.name, facts.service_name) == (row["name"], row["service_name"])
    assert list(facts.sums) == [row[column.name] for column in table.sums]


def _check_cut_out(batch: RowBatch) -> None:
    """Each item, as a request of its own, meets the same fate."""
    row_of = dict(zip(batch.items, batch.rows, strict=True))
    reason_of = {rejection.item: rejection.reason for rejection in batch.rejected}
    table = columns().table(batch.signal)
    for index in _sample(batch.item_count):
        cut_out = batch.otlp(index)
        parses = _parsed(batch.signal, cut_out) is not None
        if index in row_of:
            assert bool(read(table, row_of[index])["anomalies"] & Anomaly.INVALID_UTF8) != parses
        else:
            assert not (parses and "not decodable" in reason_of[index])
        try:
            alone = transcode(plan(batch.signal), cut_out, now_ns=NOW, request_id=batch.request_id)
        except UndecodableError as error:
            _check_refusal(error, REQUESTS[batch.signal]())
            continue
        assert list(alone.rows) == ([row_of[index]] if index in row_of else [])
        assert [rejection.reason for rejection in alone.rejected] == ([reason_of[index]] if index in reason_of else [])


def _sample(count: int) -> range:
    """Choose some of so many items, since each repeats its resource and scope."""
    return range(0, count, max(1, count // _CUT_OUT))


def _check_partition(items: Any, rejected: Any) -> None:  # noqa: ANN401 - lists or tuples
    assert list(items) == sorted(items)
    assert sorted([*items, *rejected]) == list(range(len(items) + len(rejected)))


def _row(table: Table, data: bytes) -> Row:
    """Read a row; it must have no byte more, and all its JSON must be what jsonb takes."""
    contents = split_row(data)
    assert len(data) == 2 + sum(4 + len(content or b"") for content in contents)
    row = read(table, data)
    for column in table.columns:
        if column.type is ColumnType.JSONB and row[column.name] is not None:
            for text in _texts(row[column.name]):
                assert "\0" not in text
                text.encode()
            json.dumps(row[column.name], allow_nan=False)
    return row


def _texts(tree: Any) -> Iterator[str]:  # noqa: ANN401 - a value tree
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _texts(value)
    elif isinstance(tree, list):
        for element in tree:
            yield from _texts(element)


def _contents(table: Table, row: bytes) -> dict[str, bytes | None]:
    return dict(zip([column.name for column in table.columns], split_row(row), strict=True))


def _integer(content: bytes | None) -> int:
    assert content is not None
    return int.from_bytes(content, "big", signed=True)


def _count(body: bytes) -> int:
    """Count the items of a request by another walk than the decoder's."""
    scopes = [scope for resource in children(body, 1) for scope in children(resource, 2)]
    return sum(len(children(scope, 2)) for scope in scopes)


def _parsed(signal: Signal, body: bytes) -> Message | None:
    return None if _fault(signal, body) else REQUESTS[signal].FromString(body)


def _fault(signal: Signal, body: bytes) -> str:
    """Return why protobuf refuses these bytes; an empty string when it does not."""
    try:
        REQUESTS[signal].FromString(body)
    except DecodeError as error:
        return str(error)
    return ""


def _known(request: Message) -> bytes:
    """Encode a message without the fields that nobody knows."""
    copy = type(request)()
    copy.CopyFrom(request)
    copy.DiscardUnknownFields()
    return copy.SerializeToString(deterministic=True)

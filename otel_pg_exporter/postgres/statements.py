"""The SQL of the write path, compiled once from the mapping, and rows as arrays of binary fields.

Rows arrive as binary COPY tuples. A field of such a tuple and an element of a binary array look alike (int32 length,
then bytes), so the bytes that COPY would send also feed `INSERT … SELECT FROM unnest(…)`: one encoding, all ways in.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence

import psycopg
from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.model import Column, ColumnType, Table
from otel_pg_exporter.transcode import extension

# pg_type's oids, as binary arrays carry them.
_OIDS = {
    ColumnType.BOOL: 16,
    ColumnType.BYTEA: 17,
    ColumnType.FLOAT8: 701,
    ColumnType.INT2: 21,
    ColumnType.INT4: 23,
    ColumnType.INT8: 20,
    ColumnType.JSONB: 3802,
    ColumnType.TEXT: 25,
    ColumnType.TIMESTAMPTZ: 1184,
    ColumnType.UUID: 2950,
}

_NULL = b"\xff\xff\xff\xff"
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
_COPY_TRAILER = struct.pack("!h", -1)
_COPY_PIECE = 2**17  # bytes: what is more, psycopg cuts into copies of this size; and it stays in the CPU's cache


class Array(bytes):
    """A one-dimensional PostgreSQL array in binary format, as a query parameter; the SQL names its type."""


class _ArrayDumper(Dumper):
    """Hands an `Array` to libpq as it is."""

    format = Format.BINARY

    def dump(self, obj: Array) -> bytes:
        return obj


psycopg.adapters.register_dumper(Array, _ArrayDumper)


def array(kind: ColumnType, values: Iterable[bytes | None]) -> Array:
    """Build an array from values in binary format; None is NULL."""
    return _join(kind, [_NULL if value is None else struct.pack("!i", len(value)) + value for value in values])


def oids(kinds: Iterable[ColumnType]) -> list[int]:
    """List the types' oids."""
    return [_OIDS[kind] for kind in kinds]


def arrays(kinds: Sequence[ColumnType], rows: Iterable[Sequence[bytes | None]]) -> list[Array]:
    """Turn rows of values in binary format into one array a column."""
    columns = list(zip(*rows, strict=True)) or [()] * len(kinds)
    return [array(kind, column) for kind, column in zip(kinds, columns, strict=True)]


def columns_of(table: Table, rows: Iterable[bytes]) -> list[Array]:
    """Turn binary COPY tuples into one array a column.

    A column that is NULL throughout becomes an empty array: unnest fills up what the other arrays are longer.
    """
    pieces: list[list[bytes]] = [[] for _ in table.columns]
    appends = [column.append for column in pieces]
    unpack = struct.Struct("!i").unpack_from
    for row in rows:
        start = 2
        for append in appends:
            (length,) = unpack(row, start)
            if length < 0:
                append(_NULL)
                start += 4
            else:
                end = start + 4 + length
                append(row[start:end])
                start = end
    return [
        _join(column.type, () if fields.count(_NULL) == len(fields) else fields)
        for column, fields in zip(table.columns, pieces, strict=True)
    ]


def _join(kind: ColumnType, fields: Sequence[bytes]) -> Array:
    if not fields:
        return Array(struct.pack("!iii", 0, 0, _OIDS[kind]))
    return Array(struct.pack("!iiiii", 1, 1, _OIDS[kind], len(fields), 1) + b"".join(fields))


def copy_data(rows: Sequence[bytes], chosen: Sequence[int]) -> Iterator[bytes]:
    """Frame binary COPY tuples as one COPY stream, in pieces: no batch, however large, is in memory a second time."""
    yield _COPY_HEADER
    if extension is not None and isinstance(rows, extension.Rows):
        yield from rows.gather(chosen, _COPY_PIECE)
    else:
        yield from _gathered(map(rows.__getitem__, chosen))
    yield _COPY_TRAILER


def _gathered(rows: Iterable[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    size = 0
    for row in rows:
        if pieces and size + len(row) > _COPY_PIECE:
            yield b"".join(pieces)
            pieces, size = [], 0
        pieces.append(row)
        size += len(row)
    yield b"".join(pieces)


def begin(settings: DatabaseSettings) -> sql.Composed:
    """Compile BEGIN and its settings, one round trip; `SET LOCAL` alone, so that PgBouncer may pool."""
    limits = {
        "statement_timeout": _milliseconds(settings.statement_timeout),
        "lock_timeout": _milliseconds(settings.lock_timeout),
        "idle_in_transaction_session_timeout": _milliseconds(settings.statement_timeout),
    }
    limits |= _keepalives(settings.statement_timeout)
    if settings.synchronous_commit != "server":
        limits["synchronous_commit"] = settings.synchronous_commit
    # The level is said in full, since the user's default is made for other work; READ WRITE is not, since a server that
    # was made read-only, because its disk fills up or another one takes over, is to be left alone.
    parts: list[sql.Composable] = [sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED")]
    parts += [sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(name), value) for name, value in limits.items()]
    return sql.SQL("; ").join(parts)


def _keepalives(seconds: float) -> dict[str, str]:
    """Return the settings by which PostgreSQL ends a session within `seconds` whose client is cut off.

    While it waits for the data of a COPY it heeds no time-out, so all that the session has locked would stay so for as
    long as TCP hopes: two hours, where nobody said otherwise. On a Unix socket they mean nothing.
    """
    probes = 3
    wait = min(60, math.ceil(seconds / (2 * probes)))
    return {
        "tcp_keepalives_idle": str(probes * wait),
        "tcp_keepalives_interval": str(wait),
        "tcp_keepalives_count": str(probes),
    }


def _milliseconds(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


class TableStatements:
    """The statements that put rows into one mapped table."""

    def __init__(self, schema: str, table: Table) -> None:
        target = sql.Identifier(schema, table.name)
        staging = sql.Identifier("pg_temp", f"{table.name}_staging")
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
        # No conflict target and RETURNING of the key alone: a writer needs no right to read anything else.
        insert = sql.SQL("INSERT INTO {} ({}) SELECT * FROM ").format(target, names)
        around = sql.SQL(" ON CONFLICT DO NOTHING") + _returning(table.key)
        self.copy = _copy(target, names)
        self.insert = (insert + unnest([column.type for column in table.columns]) + around).as_bytes()
        # Columns are named one by one: LIKE needs the right to read the table.
        self.create_staging = (
            sql.SQL("CREATE TEMPORARY TABLE {} ({}) ON COMMIT DROP")
            .format(
                staging,
                sql.SQL(", ").join(
                    sql.SQL("{} {}").format(sql.Identifier(column.name), sql.SQL(column.type.value))
                    for column in table.columns
                ),
            )
            .as_bytes()
        )
        self.copy_staging = _copy(staging, names)
        self.insert_staged = (insert + staging + around).as_bytes()


def _copy(target: sql.Identifier, names: sql.Composed) -> bytes:
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(target, names).as_bytes()


def _returning(key: Sequence[Column]) -> sql.Composable:
    if not key:
        return sql.SQL("")
    return sql.SQL(" RETURNING ") + sql.SQL(", ").join(sql.Identifier(column.name) for column in key)


def unnest(types: Iterable[ColumnType]) -> sql.Composed:
    """Compile `unnest(%s::uuid[], …)`: one array parameter a column, in the order of rows."""
    return sql.SQL("unnest({})").format(
        sql.SQL(", ").join(sql.SQL("%s::{}[]").format(sql.SQL(kind.value)) for kind in types)
    )


def upsert_resources(schema: str, table: Table) -> sql.Composed:
    """Compile the INSERT of resources, which refreshes `last_seen` of those that are there.

    By the server's clock, which retention reads too, but as the column's default: Citus wants upserts that call nothing
    volatile.
    """
    names = [sql.Identifier(column.name) for column in table.columns]
    return sql.SQL(
        "INSERT INTO {} AS r ({}) SELECT u.* FROM {} AS u"
        " ON CONFLICT (resource_id) DO UPDATE SET last_seen = GREATEST(r.last_seen, EXCLUDED.last_seen)"
    ).format(
        sql.Identifier(schema, table.name),
        sql.SQL(", ").join(names),
        unnest([column.type for column in table.columns]),
    )


REQUEST_TYPES = (ColumnType.UUID, ColumnType.INT8, ColumnType.TEXT)
DEAD_LETTER_TYPES = (
    ColumnType.TIMESTAMPTZ,
    ColumnType.TEXT,
    ColumnType.UUID,
    ColumnType.INT8,
    ColumnType.TEXT,
    ColumnType.TEXT,
    ColumnType.BYTEA,
)
_TRACE_COLUMNS = {
    "trace_id": ColumnType.UUID,
    "start_time": ColumnType.TIMESTAMPTZ,
    "end_time": ColumnType.TIMESTAMPTZ,
    "span_count": ColumnType.INT8,
    "error_count": ColumnType.INT8,
    "root_span_id": ColumnType.BYTEA,
    "root_start_time": ColumnType.TIMESTAMPTZ,
    "root_name": ColumnType.TEXT,
    "root_service_name": ColumnType.TEXT,
    "service_names": ColumnType.TEXT,  # an array of arrays flattens in unnest, so each one travels as a literal
}


def trace_types(sum_count: int) -> list[ColumnType]:
    """List the types of the upsert's parameters; sums travel as text, since they may exceed int8."""
    return [*_TRACE_COLUMNS.values(), *[ColumnType.TEXT] * sum_count]


def upsert_traces(schema: str, sums: Sequence[Column]) -> sql.Composed:
    """Compile the upsert of `traces` from one array a column, typed as `trace_types` says.

    Each expression is commutative and associative, so neither the order of arrival nor concurrent writers can change
    the result, and immutable, so Citus accepts it.
    """
    casts = dict.fromkeys(_TRACE_COLUMNS, "") | {"service_names": "::text[]"} | {c.name: "::numeric" for c in sums}
    names = [sql.Identifier(name) for name in casts]
    earlier_root = sql.SQL(
        "t.root_span_id IS NULL OR"
        " (EXCLUDED.root_start_time, EXCLUDED.root_span_id) < (t.root_start_time, t.root_span_id)"
    )
    updates = [
        sql.SQL("start_time = LEAST(t.start_time, EXCLUDED.start_time)"),
        sql.SQL("end_time = GREATEST(t.end_time, EXCLUDED.end_time)"),
        sql.SQL("span_count = t.span_count + EXCLUDED.span_count"),
        sql.SQL("error_count = t.error_count + EXCLUDED.error_count"),
        sql.SQL("ingested_at = GREATEST(t.ingested_at, EXCLUDED.ingested_at)"),
        *(
            sql.SQL("{0} = CASE WHEN {1} THEN EXCLUDED.{0} ELSE t.{0} END").format(sql.Identifier(name), earlier_root)
            for name in ("root_span_id", "root_start_time", "root_name", "root_service_name")
        ),
        sql.SQL("service_names = {}(t.service_names, EXCLUDED.service_names)").format(
            sql.Identifier(schema, "merge_service_names")
        ),
        *(
            sql.SQL("{0} = COALESCE(t.{0} + EXCLUDED.{0}, t.{0}, EXCLUDED.{0})").format(sql.Identifier(column.name))
            for column in sums
        ),
    ]
    return sql.SQL(
        "INSERT INTO {} AS t ({}) SELECT {} FROM {} AS u({}) ON CONFLICT (trace_id) DO UPDATE SET {}"
    ).format(
        sql.Identifier(schema, "traces"),
        sql.SQL(", ").join(names),
        sql.SQL(", ").join(
            sql.SQL("u.{}{}").format(name, sql.SQL(cast)) for name, cast in zip(names, casts.values(), strict=True)
        ),
        unnest(trace_types(len(sums))),
        sql.SQL(", ").join(names),
        sql.SQL(", ").join(updates),
    )


def claim_requests(schema: str) -> sql.Composed:
    """Compile the ledger's INSERT; it returns the ids that are new, the others were committed before."""
    return sql.SQL(
        "INSERT INTO {} (request_id, rejected, error_message) SELECT * FROM {}"
        " ON CONFLICT DO NOTHING RETURNING request_id"
    ).format(sql.Identifier(schema, "ingest_requests"), unnest(REQUEST_TYPES))


def read_requests(schema: str) -> sql.Composed:
    """Compile the look-up of what the ledger answered to earlier requests."""
    return sql.SQL("SELECT request_id, rejected, error_message FROM {} WHERE request_id = ANY (%s::uuid[])").format(
        sql.Identifier(schema, "ingest_requests")
    )


def amend_request(schema: str) -> sql.Composed:
    """Compile the correction of a ledger entry whose rows PostgreSQL refused in part."""
    return sql.SQL("UPDATE {} SET rejected = %s, error_message = %s WHERE request_id = %s::uuid").format(
        sql.Identifier(schema, "ingest_requests")
    )


def insert_dead_letters(schema: str) -> sql.Composed:
    """Compile the INSERT of refused items; a retry of the same request adds none."""
    return sql.SQL(
        "INSERT INTO {} (received_at, signal, request_id, item_index, reason, sqlstate, otlp)"
        " SELECT * FROM {} ON CONFLICT DO NOTHING"
    ).format(sql.Identifier(schema, "dead_letters"), unnest(DEAD_LETTER_TYPES))

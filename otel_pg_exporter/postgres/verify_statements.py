"""The SQL of `verify`: what the spans say about traces, for a slice of time or for single traces."""

from collections.abc import Mapping, Sequence
from typing import LiteralString

from psycopg import sql

# As the view traces_exact says it. Columns of `traces` that are not named here are sums.
_EXPRESSIONS: Mapping[str, LiteralString] = {
    "start_time": "min(s.start_time)",
    "end_time": "max(greatest(s.start_time, s.end_time))",
    "span_count": "count(*)",
    "error_count": "count(*) FILTER (WHERE s.status_code = 2)",
    "root_span_id": "(array_agg(s.span_id ORDER BY s.start_time, s.span_id)"
    " FILTER (WHERE s.parent_span_id IS NULL))[1]",
    "root_start_time": "min(s.start_time) FILTER (WHERE s.parent_span_id IS NULL)",
    "root_name": "(array_agg(s.name ORDER BY s.start_time, s.span_id) FILTER (WHERE s.parent_span_id IS NULL))[1]",
    "root_service_name": "(array_agg(s.service_name ORDER BY s.start_time, s.span_id)"
    " FILTER (WHERE s.parent_span_id IS NULL))[1]",
    "ingested_at": "max(s.ingested_at)",
    "service_names": "{merge}(array_agg(DISTINCT s.service_name), '{{}}')",
}
_READ = (
    "trace_id",
    "span_id",
    "parent_span_id",
    "start_time",
    "end_time",
    "status_code",
    "name",
    "service_name",
    "ingested_at",
)

# From the oldest partition's lower bound to the newest one's upper. Read by the statement that compares: its plan
# holds a lock on every partition, so none is dropped in between.
_BOUNDS = sql.SQL(
    "SELECT coalesce(min(bound[1]::timestamptz), 'epoch') AS horizon,"
    " coalesce(max(bound[2]::timestamptz), 'epoch') AS ceiling"
    " FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid"
    " CROSS JOIN regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \\(''(.+)''\\) TO \\(''(.+)''\\)') AS bound"
    " WHERE i.inhparent = {spans}::regclass"
)

# Of `outliers` the spans in DEFAULT are read as well, and the row even if it begins before all slices. Where it begins
# in an earlier slice, that one has judged it.
_COMPARE_SLICE = sql.SQL("""
    WITH exact AS (
        SELECT s.trace_id, {exact} FROM (
            SELECT {read} FROM {spans} AS s WHERE s.start_time >= %(since)s AND s.start_time < %(until)s
            UNION ALL
            SELECT {read} FROM {spans_default} AS s WHERE s.trace_id = ANY (%(outliers)s::uuid[])
                AND NOT (s.start_time >= %(since)s AND s.start_time < %(until)s)
        ) AS s
        GROUP BY s.trace_id
    ), compared AS (
        SELECT coalesce(t.trace_id, e.trace_id) AS trace_id, t.trace_id IS NOT NULL AS has_row,
            ROW({of_t}) IS DISTINCT FROM ROW({of_e}) AS differs
        FROM exact AS e FULL JOIN (
            SELECT * FROM {traces} WHERE start_time >= %(since)s AND start_time < %(until)s
            UNION ALL
            SELECT * FROM {traces} WHERE trace_id = ANY (%(outliers)s::uuid[]) AND start_time < %(walked_since)s
        ) AS t ON t.trace_id = e.trace_id
    )
    SELECT NULL::uuid, count(*) FROM compared WHERE has_row
    UNION ALL
    (SELECT trace_id, 0 FROM compared WHERE differs AND trace_id > %(after)s ORDER BY trace_id LIMIT %(limit)s)
    ORDER BY 1 NULLS FIRST
""")

# Each day apart: the primary key begins with the minute, so all minutes are named, and a day's are enough for a day's
# partition. `since` and `until` widen what is read beyond the row's own times. OFFSET 0 has each day read by itself:
# without, the planner prefers to read every partition as a whole, for each trace, and to filter the days out of that.
_COMPARE_TRACES = sql.SQL("""
    WITH bounds AS ({bounds})
    SELECT w.trace_id, t.trace_id IS NOT NULL, e.trace_id IS NOT NULL,
        coalesce(t.start_time < b.horizon, false) AND NOT coalesce(
            e.start_time = t.start_time AND e.outlier_ingested_at >= b.horizon AND NOT p.outliers_pruned, false
        ) OR p.outliers_pruned AND coalesce(t.end_time >= b.ceiling AND t.end_time IS DISTINCT FROM e.end_time, false),
        coalesce(t.start_time >= %(counted_from)s AND t.start_time < b.horizon, false)
            AND e.outlier_ingested_at IS NULL,
        ARRAY[{of_t_as_text}], ARRAY[{of_e_as_text}], ARRAY[{differing}]
    FROM unnest(%(ids)s::uuid[]) AS w (trace_id)
    CROSS JOIN bounds AS b
    CROSS JOIN {progress} AS p
    LEFT JOIN {traces} AS t ON t.trace_id = w.trace_id
    LEFT JOIN LATERAL (
        SELECT s.trace_id, {exact}, min(s.ingested_at) FILTER (WHERE s.start_time < b.horizon) AS outlier_ingested_at
        FROM (
            SELECT {read} FROM {spans_default} AS s WHERE s.trace_id = w.trace_id
            UNION ALL
            SELECT {read}
            FROM (
                SELECT greatest(least(t.start_time, %(since)s), b.horizon) AS first,
                    least(greatest(t.end_time, %(until)s), b.ceiling) AS last
            ) AS reach
            CROSS JOIN generate_series(reach.first, reach.last, interval '24 hours') AS day
            CROSS JOIN LATERAL (
                SELECT * FROM {spans} AS s
                WHERE s.trace_id = w.trace_id
                    AND s.start_minute = ANY (ARRAY(SELECT generate_series(
                        {minute_of}(day), {minute_of}(least(day + interval '24 hours', reach.last))
                    )))
                    AND s.start_time >= day AND s.start_time < day + interval '24 hours'
                    AND s.tableoid <> {spans_default_name}::regclass
                OFFSET 0
            ) AS s
        ) AS s
        GROUP BY s.trace_id
    ) AS e ON true
    WHERE ROW({of_t}) IS DISTINCT FROM ROW({of_e})
    ORDER BY w.trace_id
""")


class VerifyStatements:
    """Every statement of `verify`, compiled for a schema and the columns that its table `traces` has."""

    def __init__(self, schema: str, columns: Mapping[str, str]) -> None:
        """Compile; `columns` are those of `traces` but for the key, with their types."""
        self.columns = tuple(columns)
        self._schema = schema
        names = {
            "traces": sql.Identifier(schema, "traces"),
            "spans": sql.Identifier(schema, "spans"),
            "spans_default": sql.Identifier(schema, "spans_default"),
            "progress": sql.Identifier(schema, "retention_progress"),
        }
        self.bounds = _BOUNDS.format(spans=_regclass(schema, "spans"))
        pieces = {
            "exact": self._exact(),
            "of_t": _list("t.{}", columns),
            "of_e": _list("e.{}", columns),
            "read": _list("s.{}", [*_READ, *(name for name in columns if name not in _EXPRESSIONS)]),
            **names,
        }
        self.compare_slice = _COMPARE_SLICE.format(**pieces)
        self.compare_traces = _COMPARE_TRACES.format(
            **pieces,
            of_t_as_text=_list("t.{}::text", columns),
            of_e_as_text=_list("e.{}::text", columns),
            differing=_list("t.{0} IS DISTINCT FROM e.{0}", columns),
            minute_of=sql.Identifier(schema, "minute_of"),
            bounds=self.bounds,
            spans_default_name=_regclass(schema, "spans_default"),
        )
        self.outliers = sql.SQL(
            "SELECT DISTINCT trace_id FROM {spans_default} WHERE trace_id > %(after)s"
            " AND (ingested_at >= %(since)s AND ingested_at < %(until)s"
            " OR start_time >= %(since)s AND start_time < %(until)s) ORDER BY trace_id LIMIT %(limit)s"
        ).format(**names)
        self.count_dropped = sql.SQL(
            "SELECT count(*) FROM {traces} AS t WHERE t.start_time >= %(since)s AND t.start_time < %(until)s"
            " AND NOT EXISTS (SELECT FROM {spans_default} AS s WHERE s.trace_id = t.trace_id)"
        ).format(**names)
        self.insert_neutral = sql.SQL(
            "INSERT INTO {traces} (trace_id, start_time, end_time, ingested_at, span_count, error_count)"
            " VALUES (%s, 'infinity', '-infinity', '-infinity', 0, 0) ON CONFLICT DO NOTHING"
        ).format(**names)
        self.lock_row = sql.SQL("SELECT FROM {traces} WHERE trace_id = %s FOR UPDATE").format(**names)
        self.update_row = sql.SQL("UPDATE {traces} SET {assignments} WHERE trace_id = %s").format(
            assignments=sql.SQL(", ").join(
                sql.SQL("{} = %s::{}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in columns.items()
            ),
            **names,
        )
        self.delete_row = sql.SQL("DELETE FROM {traces} WHERE trace_id = %s").format(**names)

    def _exact(self) -> sql.Composed:
        merge = sql.Identifier(self._schema, "merge_service_names")
        return sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(
                sql.SQL(_EXPRESSIONS[name]).format(merge=merge)
                if name in _EXPRESSIONS
                else sql.SQL("sum(s.{}::numeric)").format(sql.Identifier(name)),
                sql.Identifier(name),
            )
            for name in self.columns
        )


def lock_default(schema: str) -> sql.Composed:
    """Compile the lock that keeps `ensure_partitions()` from moving rows."""
    return sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.Identifier(schema, "spans_default"))


def traces_columns(schema: str) -> sql.Composed:
    """Compile the query for the columns of `traces`, the key aside, and their types."""
    return sql.SQL(
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = {}::regclass"
        " AND attnum > 0 AND NOT attisdropped AND attname <> 'trace_id' ORDER BY attnum"
    ).format(_regclass(schema, "traces"))


def _regclass(schema: str, table: str) -> sql.Literal:
    return sql.Literal(sql.Identifier(schema, table).as_string(None))


def _list(template: LiteralString, names: Sequence[str] | Mapping[str, str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL(template).format(sql.Identifier(name)) for name in names)

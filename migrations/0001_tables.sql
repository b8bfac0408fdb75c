-- The tables. Columns that a mapping file declares get their comments from it; promoted columns come from it as a
-- whole (see the last line). No foreign keys, triggers or generated columns: they would stand in ingest's way.

CREATE TABLE spans (
    start_minute int4 NOT NULL,
    trace_id uuid NOT NULL,
    span_id bytea NOT NULL,
    start_time timestamptz NOT NULL,
    start_time_ns int2 NOT NULL,
    end_time timestamptz,
    duration_ns int8,
    parent_span_id bytea,
    name text NOT NULL,
    kind int2 NOT NULL,
    status_code int2 NOT NULL,
    status_message text NOT NULL,
    service_name text,
    scope_name text NOT NULL,
    scope_version text NOT NULL,
    scope_attributes jsonb,
    scope_dropped_attributes_count int8 NOT NULL,
    trace_state text NOT NULL,
    flags int8 NOT NULL,
    attributes jsonb,
    dropped_attributes_count int8 NOT NULL,
    events jsonb,
    dropped_events_count int8 NOT NULL,
    links jsonb,
    dropped_links_count int8 NOT NULL,
    resource_id uuid NOT NULL,
    schema_url text NOT NULL,
    anomalies int4 NOT NULL,
    ingested_at timestamptz NOT NULL DEFAULT now(),
    -- The minute leads, so that inserts touch a few hot index pages for ever: a random trace_id in front costs
    -- two thirds of the ingest rate once the index outgrows memory. An index on trace_id alone would do the same.
    PRIMARY KEY (start_minute, trace_id, span_id, start_time)
) PARTITION BY RANGE (start_time);

CREATE INDEX spans_service_name_start_time_idx ON spans (service_name, start_time);
CREATE INDEX spans_start_time_idx ON spans USING brin (start_time) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX spans_errors_idx ON spans (start_time) WHERE status_code = 2;

COMMENT ON TABLE spans IS 'One row a span, partitioned by day (UTC) of start_time; written once, never updated.';
COMMENT ON COLUMN spans.ingested_at IS
    'When the row was stored; what lies in the DEFAULT partition is pruned by it.';

CREATE TABLE logs (
    time_minute int4 NOT NULL,
    time timestamptz NOT NULL,
    time_ns int2 NOT NULL,
    observed_time timestamptz,
    observed_time_ns int2,
    severity_number int2 NOT NULL,
    severity_text text NOT NULL,
    event_name text NOT NULL,
    body text,
    body_json jsonb,
    trace_id uuid,
    span_id bytea,
    flags int8 NOT NULL,
    service_name text,
    scope_name text NOT NULL,
    scope_version text NOT NULL,
    scope_attributes jsonb,
    scope_dropped_attributes_count int8 NOT NULL,
    attributes jsonb,
    dropped_attributes_count int8 NOT NULL,
    resource_id uuid NOT NULL,
    schema_url text NOT NULL,
    anomalies int4 NOT NULL,
    request_id uuid NOT NULL,
    ingested_at timestamptz NOT NULL DEFAULT now()
    -- No key: two equal log records are two records. ingest_requests makes requests idempotent.
) PARTITION BY RANGE (time);

CREATE INDEX logs_service_name_time_idx ON logs (service_name, time);
CREATE INDEX logs_time_idx ON logs USING brin (time) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX logs_trace_id_idx ON logs (time_minute, trace_id) WHERE trace_id IS NOT NULL;

COMMENT ON TABLE logs IS 'One row a log record, partitioned by day (UTC) of time; written once, never updated.';
COMMENT ON COLUMN logs.ingested_at IS
    'When the row was stored; what lies in the DEFAULT partition is pruned by it.';

-- What lies outside the accepted window, and rows of a day until ensure_partitions() has made its partition.
CREATE TABLE spans_default PARTITION OF spans DEFAULT
    WITH (autovacuum_freeze_min_age = 0, autovacuum_analyze_scale_factor = 0.05);
CREATE TABLE logs_default PARTITION OF logs DEFAULT
    WITH (autovacuum_freeze_min_age = 0, autovacuum_analyze_scale_factor = 0.05);
COMMENT ON TABLE spans_default IS
    'Spans whose start lies outside the accepted window (time 0, far future), or whose day has no partition yet.';
COMMENT ON TABLE logs_default IS
    'Log records whose time lies outside the accepted window (far past or future), or whose day has no partition yet.';

-- Allowed here and nowhere else: this partition is small, and its minutes tell nothing about when a trace took place.
CREATE INDEX spans_default_trace_id_idx ON spans_default (trace_id);
CREATE INDEX logs_default_trace_id_idx ON logs_default (trace_id) WHERE trace_id IS NOT NULL;
-- What is pruned first; rows arrive in its order.
CREATE INDEX spans_default_ingested_at_idx ON spans_default (ingested_at);
CREATE INDEX logs_default_ingested_at_idx ON logs_default (ingested_at);

CREATE TABLE resources (
    resource_id uuid PRIMARY KEY,
    service_name text,
    attributes jsonb,
    schema_url text NOT NULL,
    dropped_attributes_count int8 NOT NULL,
    entity_refs jsonb,
    last_seen timestamptz NOT NULL DEFAULT now(),
    unseen_since timestamptz
);
-- Both change once a day at most.
CREATE INDEX resources_last_seen_idx ON resources (last_seen) WHERE unseen_since IS NULL;
CREATE INDEX resources_unseen_since_idx ON resources (unseen_since) WHERE unseen_since IS NOT NULL;
COMMENT ON TABLE resources IS 'One row a distinct resource, which its spans and log records share by resource_id.';
COMMENT ON COLUMN resources.last_seen IS
    'When a writer last met this resource, a day late at most; rows unseen for longer than any retention are pruned.';
COMMENT ON COLUMN resources.unseen_since IS
    'When retention found that it had not been met for two days; NULL while it is. Writers can''t set it back or forth, '
    'so nobody but time makes a resource old.';

CREATE TABLE traces (
    trace_id uuid PRIMARY KEY,
    start_time timestamptz NOT NULL,
    end_time timestamptz NOT NULL,
    span_count int8 NOT NULL,
    error_count int8 NOT NULL,
    root_span_id bytea,
    root_start_time timestamptz,
    root_name text,
    root_service_name text,
    ingested_at timestamptz NOT NULL DEFAULT now(),
    service_names text[] NOT NULL DEFAULT '{}'
) WITH (
    fillfactor = 70, -- a trace arrives in pieces: room on its page keeps the updates HOT
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.05
);
CREATE INDEX traces_start_time_idx ON traces USING brin (start_time) WITH (pages_per_range = 32, autosummarize = on);
COMMENT ON TABLE traces IS
    'One row a trace, kept up to date in the transaction of its spans; equal to the view traces_exact, until retention '
    'takes the first of its spans: then it says what the whole trace was.';
COMMENT ON COLUMN traces.trace_id IS 'OTLP trace_id, 16 bytes as a uuid.';
COMMENT ON COLUMN traces.start_time IS 'Start of the earliest span.';
COMMENT ON COLUMN traces.end_time IS 'The latest of all starts and ends.';
COMMENT ON COLUMN traces.span_count IS 'Spans stored.';
COMMENT ON COLUMN traces.error_count IS 'Spans whose status is error.';
COMMENT ON COLUMN traces.root_span_id IS
    'The root span: without a parent, and the smallest by start time, then span id; NULL until it arrives.';
COMMENT ON COLUMN traces.root_start_time IS 'Start of the root span.';
COMMENT ON COLUMN traces.root_name IS 'Name of the root span.';
COMMENT ON COLUMN traces.root_service_name IS 'Service of the root span.';
COMMENT ON COLUMN traces.ingested_at IS 'When the last of its spans was stored.';
COMMENT ON COLUMN traces.service_names IS
    'Services that took part, sorted bytewise; the first 100 where there are more.';

CREATE TABLE ingest_requests (
    request_id uuid PRIMARY KEY,
    received_at timestamptz NOT NULL DEFAULT now(),
    rejected int8 NOT NULL DEFAULT 0,
    error_message text NOT NULL DEFAULT ''
);
CREATE INDEX ingest_requests_received_at_idx ON ingest_requests (received_at);
COMMENT ON TABLE ingest_requests IS
    'The ledger that makes log requests idempotent: one row a request, in its rows'' own transaction.';
COMMENT ON COLUMN ingest_requests.request_id IS
    'BLAKE2b-128 of signal and decompressed request; a random id per export() in the SDK.';
COMMENT ON COLUMN ingest_requests.received_at IS 'When it was stored; entries older than ledger_ttl are pruned.';
COMMENT ON COLUMN ingest_requests.rejected IS 'Items that were refused: a retry hears the same number.';
COMMENT ON COLUMN ingest_requests.error_message IS 'Why items were refused: a retry hears the same words.';

CREATE TABLE dead_letters (
    id int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at timestamptz NOT NULL DEFAULT now(),
    signal text NOT NULL,
    request_id uuid NOT NULL,
    item_index int8 NOT NULL,
    reason text NOT NULL,
    sqlstate text,
    otlp bytea NOT NULL,
    UNIQUE (signal, request_id, item_index)
);
CREATE INDEX dead_letters_received_at_idx ON dead_letters (received_at);
COMMENT ON TABLE dead_letters IS 'Items that were refused, each with its reason, ready to be replayed.';
COMMENT ON COLUMN dead_letters.id IS 'Order of arrival.';
COMMENT ON COLUMN dead_letters.received_at IS 'When its request was received.';
COMMENT ON COLUMN dead_letters.signal IS 'OTLP''s word: traces or logs.';
COMMENT ON COLUMN dead_letters.request_id IS 'The request that brought the item, as in ingest_requests.';
COMMENT ON COLUMN dead_letters.item_index IS 'Which item of that request, counted from 0.';
COMMENT ON COLUMN dead_letters.reason IS 'Why it was refused.';
COMMENT ON COLUMN dead_letters.sqlstate IS 'PostgreSQL''s error code; NULL when the item never got as far.';
COMMENT ON COLUMN dead_letters.otlp IS 'An OTLP export request with this item alone: post it again to replay it.';

CREATE TABLE retention (
    item text PRIMARY KEY CHECK (item IN ('spans', 'logs', 'dead_letters', 'ingest_requests')),
    keep interval CHECK (keep BETWEEN '1 hour' AND '100 years'),
    CHECK (item <> 'ingest_requests' OR keep IS NOT NULL)
);
COMMENT ON TABLE retention IS
    'What is kept how long: the one policy for all that write here, which drop_expired_partition() and prune_expired() '
    'enforce. Change it by `otel-pg-exporter migrate --retention-spans 30d`, or by UPDATE.';
COMMENT ON COLUMN retention.item IS 'The table; spans include traces, and resources go after the last that name them.';
COMMENT ON COLUMN retention.keep IS 'How long it is kept; NULL: for ever.';
INSERT INTO retention (item, keep) VALUES
    ('spans', NULL), ('logs', NULL), ('dead_letters', NULL), ('ingest_requests', '7 days');

CREATE TABLE retention_progress (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    outliers_pruned boolean NOT NULL DEFAULT false,
    traces_page int8,
    traces_horizon timestamptz
);
COMMENT ON TABLE retention_progress IS 'How far retention has come: one row.';
COMMENT ON COLUMN retention_progress.one IS 'Always true.';
COMMENT ON COLUMN retention_progress.outliers_pruned IS
    'Whether spans were ever pruned from spans_default: then `verify` leaves traces alone that may have had some there.';
COMMENT ON COLUMN retention_progress.traces_page IS
    'The next page of traces to be looked through; NULL when the last walk has come to its end.';
COMMENT ON COLUMN retention_progress.traces_horizon IS
    'The start of the oldest partition of spans when that walk began; another one is due when it has moved.';
INSERT INTO retention_progress DEFAULT VALUES;

CREATE TABLE partitions (
    name text PRIMARY KEY,
    rows_since timestamptz NOT NULL
);
COMMENT ON TABLE partitions IS
    'The daily partitions that ensure_partitions() made: what retention must know of their rows without reading them.';
COMMENT ON COLUMN partitions.name IS 'The partition''s name.';
COMMENT ON COLUMN partitions.rows_since IS
    'No row of it was stored earlier: when it was made, or the oldest ingested_at of what it took over from DEFAULT. '
    'Spans may come before their day, as far as a receiver''s window reaches.';

:promoted_columns

-- Repeatable: nothing but functions and views, which `migrate` makes again where one of them is gone.
-- Views for people and dashboards, and functions for a range of time where a view cannot be narrowed well. Conditions on
-- start_time or time prune partitions; conditions on start_minute or time_minute use the indexes.

-- What follows from the promoted columns: run again by `migrate` whenever it has added some.
CREATE FUNCTION follow_promoted_columns() RETURNS void
    LANGUAGE plpgsql
    SET search_path = :schema, pg_temp
AS $body$
DECLARE
    target record;
    span_columns text;
    log_columns text;
    sums text;
    traces_exact text;
BEGIN
    -- lz4 where the server has it (14 and newer, if built so): prompts and stack traces compress several times faster.
    IF EXISTS (SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)) THEN
        FOR target IN EXECUTE
            'SELECT a.attrelid::regclass AS relation, a.attname AS name FROM pg_attribute AS a'
            ' JOIN pg_class AS c ON c.oid = a.attrelid LEFT JOIN pg_inherits AS i ON i.inhrelid = c.oid'
            ' WHERE coalesce(i.inhparent, c.oid) IN (''spans''::regclass, ''logs''::regclass, ''resources''::regclass,'
            ' ''dead_letters''::regclass) AND c.relkind IN (''r'', ''p'') AND a.attnum > 0 AND NOT a.attisdropped'
            ' AND a.attcompression <> ''l'' AND a.attstorage IN (''x'', ''m'')'
        LOOP
            EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET COMPRESSION lz4', target.relation, target.name);
        END LOOP;
    END IF;

    -- Promoted columns are those behind ingested_at, and the sums in traces those behind service_names.
    SELECT coalesce(string_agg(format(', s.%I', attname), '' ORDER BY attnum), '') INTO span_columns
        FROM pg_attribute WHERE attrelid = 'spans'::regclass AND NOT attisdropped
            AND attnum > (SELECT attnum FROM pg_attribute WHERE attrelid = 'spans'::regclass AND attname = 'ingested_at');
    SELECT coalesce(string_agg(format(', l.%I', attname), '' ORDER BY attnum), '') INTO log_columns
        FROM pg_attribute WHERE attrelid = 'logs'::regclass AND NOT attisdropped
            AND attnum > (SELECT attnum FROM pg_attribute WHERE attrelid = 'logs'::regclass AND attname = 'ingested_at');
    SELECT coalesce(string_agg(format(', sum(s.%1$I::numeric) AS %1$I', attname), '' ORDER BY attnum), '') INTO sums
        FROM pg_attribute WHERE attrelid = 'traces'::regclass AND NOT attisdropped
            AND attnum > (SELECT attnum FROM pg_attribute WHERE attrelid = 'traces'::regclass AND attname = 'service_names');

    traces_exact := format($view$
        CREATE OR REPLACE VIEW traces_exact AS
        SELECT s.trace_id,
            min(s.start_time) AS start_time,
            max(greatest(s.start_time, s.end_time)) AS end_time,
            count(*) AS span_count,
            count(*) FILTER (WHERE s.status_code = 2) AS error_count,
            (array_agg(s.span_id ORDER BY s.start_time, s.span_id) FILTER (WHERE s.parent_span_id IS NULL))[1]
                AS root_span_id,
            min(s.start_time) FILTER (WHERE s.parent_span_id IS NULL) AS root_start_time,
            (array_agg(s.name ORDER BY s.start_time, s.span_id) FILTER (WHERE s.parent_span_id IS NULL))[1]
                AS root_name,
            (array_agg(s.service_name ORDER BY s.start_time, s.span_id) FILTER (WHERE s.parent_span_id IS NULL))[1]
                AS root_service_name,
            max(s.ingested_at) AS ingested_at,
            merge_service_names(array_agg(DISTINCT s.service_name), '{}') AS service_names
            %s
        FROM spans AS s
        GROUP BY s.trace_id
    $view$, sums);
    BEGIN
        EXECUTE traces_exact;
    EXCEPTION WHEN invalid_table_definition THEN
        -- A column of traces was dropped and came back: it is the last one now, and a view's cannot change places.
        DROP VIEW traces_exact;
        EXECUTE traces_exact;
    END;
    COMMENT ON VIEW traces_exact IS
        'What traces must hold, computed from spans: reads all of them. `EXCEPT` of the two is empty.';

    EXECUTE format($view$
        CREATE OR REPLACE VIEW span_details AS
        SELECT s.trace_id, replace(s.trace_id::text, '-', '') AS trace_id_hex, encode(s.span_id, 'hex') AS span_id_hex,
            encode(s.parent_span_id, 'hex') AS parent_span_id_hex, s.start_minute, s.start_time, s.start_time_ns,
            s.end_time, s.duration_ns, round(s.duration_ns / 1000000.0, 3) AS duration_ms, s.name,
            span_kind_name(s.kind) AS kind, status_code_name(s.status_code) AS status, s.status_message,
            s.service_name, s.attributes, s.events, s.links, s.scope_name, s.scope_version, s.scope_attributes,
            s.trace_state, s.flags, s.dropped_attributes_count, s.dropped_events_count, s.dropped_links_count,
            s.scope_dropped_attributes_count, s.schema_url, s.resource_id, r.attributes AS resource_attributes,
            r.schema_url AS resource_schema_url, r.dropped_attributes_count AS resource_dropped_attributes_count,
            r.entity_refs, anomaly_names(s.anomalies) AS anomalies, s.ingested_at
            %s
        FROM spans AS s LEFT JOIN resources AS r USING (resource_id)
    $view$, span_columns);
    COMMENT ON VIEW span_details IS 'Spans with ids in hex, enums in words, and the resource''s attributes.';

    EXECUTE format($view$
        CREATE OR REPLACE VIEW log_details AS
        SELECT l.time_minute, l.time, l.time_ns, l.observed_time, l.observed_time_ns, l.severity_number,
            coalesce(nullif(l.severity_text, ''), severity_name(l.severity_number)) AS severity, l.event_name,
            coalesce(l.body, l.body_json::text) AS body, l.body_json, l.service_name, l.attributes, l.trace_id,
            replace(l.trace_id::text, '-', '') AS trace_id_hex, encode(l.span_id, 'hex') AS span_id_hex, l.flags,
            l.scope_name, l.scope_version, l.scope_attributes, l.dropped_attributes_count,
            l.scope_dropped_attributes_count, l.schema_url, l.resource_id, r.attributes AS resource_attributes,
            r.schema_url AS resource_schema_url, r.dropped_attributes_count AS resource_dropped_attributes_count,
            r.entity_refs, anomaly_names(l.anomalies) AS anomalies, l.request_id, l.ingested_at
            %s
        FROM logs AS l LEFT JOIN resources AS r USING (resource_id)
    $view$, log_columns);
    COMMENT ON VIEW log_details IS
        'Log records with ids in hex, severity in words, one body, and the resource''s attributes.';
END
$body$;
COMMENT ON FUNCTION follow_promoted_columns() IS
    'Bring compression and the views traces_exact, span_details and log_details up to date with the promoted columns.';
REVOKE EXECUTE ON FUNCTION follow_promoted_columns() FROM PUBLIC;

SELECT follow_promoted_columns();

-- Each of these is two things made from one query: a view, which is simple and counts all there is, and a function of
-- the same name and columns for a range of time. A view groups before a condition on start_time could reach the spans;
-- the function's conditions stand where they prune partitions (start_time) and use the key (start_minute). The functions
-- are plain SQL without settings of their own, so that the planner unfolds them into the query around them; therefore
-- they name the schema. They read with the caller's rights, the views with their owner's.
DO $do$
DECLARE
    red_metrics constant text := $query$
        SELECT s.start_minute, to_timestamp(s.start_minute * 60.0) AS minute, s.service_name, s.name AS operation,
            %1$I.span_kind_name(s.kind) AS kind, count(*) AS spans, round(count(*) / 60.0, 3) AS rate_per_second,
            count(*) FILTER (WHERE s.status_code = 2) AS errors,
            round(count(*) FILTER (WHERE s.status_code = 2) / count(*)::numeric, 4) AS error_ratio,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY s.duration_ns / 1e6) AS p50_ms,
            percentile_cont(0.95) WITHIN GROUP (ORDER BY s.duration_ns / 1e6) AS p95_ms,
            percentile_cont(0.99) WITHIN GROUP (ORDER BY s.duration_ns / 1e6) AS p99_ms
        FROM %1$I.spans AS s
        WHERE %2$s
        GROUP BY s.start_minute, s.service_name, s.name, s.kind
    $query$;
    service_map constant text := $query$
        SELECT child.start_minute, to_timestamp(child.start_minute * 60.0) AS minute, parent.service_name AS caller,
            child.service_name AS callee, count(*) AS calls, count(*) FILTER (WHERE child.status_code = 2) AS errors,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY child.duration_ns / 1e6) AS p50_ms,
            percentile_cont(0.95) WITHIN GROUP (ORDER BY child.duration_ns / 1e6) AS p95_ms
        FROM %1$I.spans AS child
        JOIN %1$I.spans AS parent ON parent.trace_id = child.trace_id AND parent.span_id = child.parent_span_id
        WHERE parent.service_name IS DISTINCT FROM child.service_name AND %2$s
        GROUP BY child.start_minute, parent.service_name, child.service_name
    $query$;
    genai_usage constant text := $query$
        SELECT (s.start_time AT TIME ZONE 'UTC')::date AS day, s.gen_ai_provider_name AS provider,
            coalesce(s.gen_ai_response_model, s.gen_ai_request_model) AS model, s.gen_ai_operation_name AS operation,
            s.service_name, count(*) AS calls, count(*) FILTER (WHERE s.status_code = 2) AS errors,
            sum(s.gen_ai_input_tokens) AS input_tokens, sum(s.gen_ai_output_tokens) AS output_tokens,
            sum(s.gen_ai_cache_read_input_tokens) AS cache_read_input_tokens,
            sum(s.gen_ai_cache_creation_input_tokens) AS cache_creation_input_tokens,
            sum(s.gen_ai_reasoning_output_tokens) AS reasoning_output_tokens
        FROM %1$I.spans AS s
        WHERE coalesce(s.gen_ai_response_model, s.gen_ai_request_model) IS NOT NULL AND %2$s
        GROUP BY 1, 2, 3, 4, 5
    $query$;
    within_range constant text := $condition$
        %2$I.start_time >= from_time AND %2$I.start_time < to_time
        AND %2$I.start_minute BETWEEN %1$I.minute_of(from_time) AND %1$I.minute_of(to_time)
    $condition$;
    -- Once for each pair, so that neighbouring ranges add up, and once for the range, so that partitions are pruned.
    within_reach constant text := $condition$
        AND parent.start_time BETWEEN child.start_time - reach AND child.start_time + interval '1 minute'
        AND parent.start_time >= from_time - reach AND parent.start_time < to_time + interval '1 minute'
        AND parent.start_minute BETWEEN %1$I.minute_of(from_time - reach)
            AND %1$I.minute_of(to_time + interval '1 minute')
    $condition$;
    target record;
BEGIN
    FOR target IN
        SELECT * FROM (VALUES
            ('red_metrics', red_metrics, '', format(within_range, current_schema(), 's')),
            ('genai_usage', genai_usage, '', format(within_range, current_schema(), 's')),
            ('service_map', service_map, ', reach interval DEFAULT ''10 minutes''',
                format(within_range, current_schema(), 'child') || format(within_reach, current_schema()))
        ) AS t (name, query, parameters, condition)
    LOOP
        EXECUTE format('CREATE VIEW %I AS ', target.name) || format(target.query, current_schema(), 'true');
        EXECUTE format(
            'CREATE FUNCTION %1$I(from_time timestamptz, to_time timestamptz DEFAULT now()%2$s) RETURNS SETOF %1$I'
            ' LANGUAGE sql STABLE PARALLEL SAFE AS %3$L',
            target.name, target.parameters, format(target.query, current_schema(), target.condition)
        );
    END LOOP;
END
$do$;

COMMENT ON VIEW red_metrics IS
    'Rate, errors and duration per minute, service and operation. Narrow it by start_minute, or call the function.';
COMMENT ON FUNCTION red_metrics(timestamptz, timestamptz) IS
    'The view red_metrics for the spans that started from from_time on and before to_time: reads only these. Give whole '
    'minutes, or the first and the last one count in part.';
COMMENT ON VIEW service_map IS
    'Who called whom: spans whose parent belongs to another service, per minute of the callee. Looks for parents among '
    'all spans, even when narrowed by start_minute: for a range of time, call the function.';
COMMENT ON FUNCTION service_map(timestamptz, timestamptz, interval) IS
    'The view service_map for the calls that started from from_time on and before to_time: reads only these, and for '
    'their callers what started up to reach before. A caller counts if it started at most reach before its callee, or '
    'a minute after it, since clocks differ.';
COMMENT ON VIEW genai_usage IS
    'Calls and tokens of language models by day (UTC), provider, model, operation and service, over all spans: for a '
    'range of time, call the function. Agents may report the tokens of their calls once more: choose by operation.';
COMMENT ON FUNCTION genai_usage(timestamptz, timestamptz) IS
    'The view genai_usage for the spans that started from from_time on and before to_time: reads only these.';

CREATE VIEW slow_spans AS
SELECT s.trace_id, replace(s.trace_id::text, '-', '') AS trace_id_hex, encode(s.span_id, 'hex') AS span_id_hex,
    s.start_time, round(s.duration_ns / 1000000.0, 3) AS duration_ms, s.service_name, s.name AS operation,
    span_kind_name(s.kind) AS kind, s.status_code = 2 AS error
FROM spans AS s
WHERE s.duration_ns >= 1000000000
ORDER BY s.duration_ns DESC;
COMMENT ON VIEW slow_spans IS 'Spans of a second or more, slowest first. Narrow it by start_time.';

CREATE VIEW grafana_traces AS
SELECT s.trace_id, s.start_time, replace(s.trace_id::text, '-', '') AS "traceID", encode(s.span_id, 'hex') AS "spanID",
    coalesce(encode(s.parent_span_id, 'hex'), '') AS "parentSpanID", s.name AS "operationName",
    coalesce(s.service_name, '') AS "serviceName",
    (SELECT coalesce(jsonb_agg(jsonb_build_object('key', a.key, 'value', a.value) ORDER BY a.key), '[]')
        FROM jsonb_each(r.attributes) AS a) AS "serviceTags",
    extract(epoch FROM s.start_time)::float8 * 1000 AS "startTime", s.duration_ns / 1e6::float8 AS "duration",
    (SELECT coalesce(jsonb_agg(jsonb_build_object('key', a.key, 'value', a.value) ORDER BY a.key), '[]')
        FROM jsonb_each(s.attributes) AS a) AS "tags",
    (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'timestamp', (e.event ->> 'time_unix_nano')::numeric / 1000000,
            'name', e.event -> 'name',
            'fields', (SELECT coalesce(jsonb_agg(jsonb_build_object('key', a.key, 'value', a.value) ORDER BY a.key), '[]')
                FROM jsonb_each(e.event -> 'attributes') AS a)
        ) ORDER BY e.position), '[]')
        FROM jsonb_array_elements(s.events) WITH ORDINALITY AS e (event, position)) AS "logs",
    span_kind_name(s.kind) AS "kind", s.status_code AS "statusCode", s.status_message AS "statusMessage",
    s.trace_state AS "traceState"
FROM spans AS s LEFT JOIN resources AS r USING (resource_id);
COMMENT ON VIEW grafana_traces IS
    'Spans in the columns that Grafana''s trace panel reads. One trace: WHERE trace_id = … AND start_time BETWEEN … .';

CREATE VIEW grafana_logs AS
SELECT l.time, coalesce(l.body, l.body_json::text, l.event_name) AS body,
    coalesce(nullif(l.severity_text, ''), severity_name(l.severity_number)) AS level,
    l.tableoid::text || l.ctid::text AS id,
    jsonb_strip_nulls(jsonb_build_object('service_name', l.service_name, 'scope_name', nullif(l.scope_name, ''),
        'event_name', nullif(l.event_name, ''))) || coalesce(l.attributes, '{}') AS labels,
    l.service_name, replace(l.trace_id::text, '-', '') AS "traceID", encode(l.span_id, 'hex') AS "spanID"
FROM logs AS l;
COMMENT ON VIEW grafana_logs IS
    'Log records in the columns that Grafana''s logs panel reads. Narrow it by time: $__timeFilter(time).';

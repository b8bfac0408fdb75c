-- Repeatable: nothing but functions and views, which `migrate` makes again where one of them is gone.
-- Functions for the write path, for partitions, and for people.

CREATE FUNCTION merge_service_names(a text[], b text[]) RETURNS text[]
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
AS $body$
BEGIN
    -- Nearly every trace stays within one service; this is five times quicker than to sort.
    IF cardinality(a) = 1 AND a = b AND a[1] IS NOT NULL THEN
        RETURN a;
    END IF;
    RETURN ARRAY(
        SELECT DISTINCT name COLLATE "C"
        FROM unnest(coalesce(a, '{}') || coalesce(b, '{}')) AS name
        WHERE name IS NOT NULL
        ORDER BY 1
        LIMIT 100
    );
END
$body$;
COMMENT ON FUNCTION merge_service_names(text[], text[]) IS
    'Both lists as one: distinct, sorted bytewise, the first 100. Commutative and associative, so that the order in '
    'which spans arrive cannot change traces.service_names.';

CREATE FUNCTION minute_of(moment timestamptz) RETURNS int4
    LANGUAGE sql STABLE PARALLEL SAFE
AS $body$
    SELECT CASE
        WHEN moment >= to_timestamp(2147483647 * 60.0) THEN 2147483647 -- infinity among them
        WHEN moment = '-infinity' THEN (-2147483648)::int4
        ELSE floor(extract(epoch FROM moment) / 60)::int4
    END
$body$;
COMMENT ON FUNCTION minute_of(timestamptz) IS
    'Whole minutes since 1970-01-01 UTC: what start_minute and time_minute hold, for conditions on them. The infinities '
    'are the limits of int4.';

CREATE FUNCTION span_kind_name(kind int2) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $body$
    SELECT CASE kind
        WHEN 0 THEN 'unspecified' WHEN 1 THEN 'internal' WHEN 2 THEN 'server'
        WHEN 3 THEN 'client' WHEN 4 THEN 'producer' WHEN 5 THEN 'consumer' ELSE kind::text
    END
$body$;
COMMENT ON FUNCTION span_kind_name(int2) IS 'OTLP SpanKind in words.';

CREATE FUNCTION status_code_name(status_code int2) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $body$
    SELECT CASE status_code WHEN 0 THEN 'unset' WHEN 1 THEN 'ok' WHEN 2 THEN 'error' ELSE status_code::text END
$body$;
COMMENT ON FUNCTION status_code_name(int2) IS 'OTLP StatusCode in words.';

CREATE FUNCTION severity_name(severity_number int2) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $body$
    SELECT CASE
        WHEN severity_number BETWEEN 1 AND 24 THEN
            (ARRAY['trace', 'debug', 'info', 'warn', 'error', 'fatal'])[(severity_number + 3) / 4]
            || CASE WHEN severity_number % 4 = 1 THEN '' ELSE ((severity_number - 1) % 4 + 1)::text END
        WHEN severity_number = 0 THEN 'unspecified'
        ELSE severity_number::text
    END
$body$;
COMMENT ON FUNCTION severity_name(int2) IS 'OTLP SeverityNumber in words: trace, trace2, … fatal4.';

CREATE FUNCTION anomaly_names(anomalies int4) RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $body$
    SELECT ARRAY(
        SELECT name
        FROM (VALUES
            (1, 'text_repaired'), (2, 'invalid_utf8'), (4, 'non_finite'), (8, 'bytes_value'), (16, 'duplicate_key'),
            (32, 'invalid_id'), (64, 'time_substituted'), (128, 'time_outside_window'), (256, 'duration_saturated'),
            (512, 'enum_saturated'), (1024, 'text_cut')
        ) AS bits (bit, name)
        WHERE anomalies & bit <> 0
        ORDER BY bit
    )
$body$;
COMMENT ON FUNCTION anomaly_names(int4) IS 'The bits of a column anomalies in words; see docs/reference/schema.md.';

-- Partitions ---------------------------------------------------------------------------------------------------------

CREATE FUNCTION expired_before(item text) RETURNS timestamptz
    LANGUAGE sql STABLE
    SET search_path = :schema, pg_temp
    SET timezone = 'UTC'
AS $body$
    SELECT date_trunc('day', now() - r.keep) FROM retention AS r WHERE r.item = $1
$body$;
COMMENT ON FUNCTION expired_before(text) IS
    'The midnight (UTC) before which spans or logs are older than the retention; NULL where they are kept for ever.';

CREATE FUNCTION missing_partitions(parent regclass, from_day date, to_day date) RETURNS SETOF date
    LANGUAGE sql STABLE
    SET search_path = :schema, pg_temp
AS $body$
    SELECT wanted.day
    FROM (SELECT from_day + n AS day FROM generate_series(0, to_day - from_day) AS n) AS wanted
    CROSS JOIN (SELECT relname FROM pg_class WHERE oid = parent) AS its
    -- What retention has dropped, or would drop at once, is not made again.
    WHERE wanted.day >= coalesce((expired_before(its.relname) AT TIME ZONE 'UTC')::date, '-infinity')
        AND NOT EXISTS (
            SELECT FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
            WHERE i.inhparent = parent AND c.relname = its.relname || to_char(wanted.day::timestamp, '"_p"YYYYMMDD')
        )
    ORDER BY wanted.day
$body$;
COMMENT ON FUNCTION missing_partitions(regclass, date, date) IS
    'Days of a range that have no partition of their own, and are not older than the retention.';

CREATE FUNCTION create_partition(parent text, time_column text, what text, day date) RETURNS void
    LANGUAGE plpgsql
    SET search_path = :schema, pg_temp
AS $body$
DECLARE
    part constant text := parent || to_char(day::timestamp, '"_p"YYYYMMDD');
    -- Spelled out with an offset, so that neither TimeZone nor DateStyle of the session has a say.
    first constant text := to_char(day::timestamp, 'YYYY-MM-DD') || ' 00:00:00+00';
    after constant text := to_char((day + 1)::timestamp, 'YYYY-MM-DD') || ' 00:00:00+00';
    columns text;
    oldest timestamptz;
BEGIN
    -- The CHECK repeats the partition's bounds, which spares ATTACH a scan.
    EXECUTE format(
        'CREATE TABLE %1$I (LIKE %2$I INCLUDING ALL, CONSTRAINT bounds CHECK (%3$I >= %4$L::timestamptz AND %3$I < %5$L::timestamptz))'
        ' WITH (autovacuum_freeze_min_age = 0, autovacuum_analyze_scale_factor = 0.05)',
        part, parent, time_column, first, after
    );
    EXECUTE format('COMMENT ON TABLE %I IS %L', part, format('%s of %s (UTC).', what, to_char(day::timestamp, 'YYYY-MM-DD')));
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns
        FROM pg_attribute WHERE attrelid = parent::regclass AND attnum > 0 AND NOT attisdropped;
    EXECUTE format(
        'WITH moved AS (DELETE FROM %1$I WHERE %2$I >= %3$L AND %2$I < %4$L RETURNING %5$s),'
        ' stored AS (INSERT INTO %6$I (%5$s) SELECT %5$s FROM moved RETURNING ingested_at)'
        ' SELECT least(now(), min(ingested_at)) FROM stored',
        parent || '_default', time_column, first, after, columns, part
    ) INTO oldest;
    INSERT INTO partitions (name, rows_since) VALUES (part, oldest)
        ON CONFLICT (name) DO UPDATE SET rows_since = EXCLUDED.rows_since; -- somebody dropped one of that name
    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', parent, part, first, after);
    EXECUTE format('ALTER TABLE %I DROP CONSTRAINT bounds', part);
END
$body$;
COMMENT ON FUNCTION create_partition(text, text, text, date) IS
    'Build one day''s partition, with the rows of that day that lie in DEFAULT. For ensure_partitions(), which holds '
    'the locks.';

CREATE FUNCTION ensure_partitions(from_day date, to_day date) RETURNS SETOF date
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = :schema, pg_temp
AS $body$
DECLARE
    first_allowed constant date := '1971-01-01';
    last_allowed constant date := (now() AT TIME ZONE 'UTC')::date + 400;
    most_days constant int := 60; -- more would crowd the server's lock table
    -- Below deadlock_timeout's default of 1 s: whoever meets us in the opposite order, we are the one that gives up.
    longest_wait constant int := 800;
    -- What `lock_timeout` was: this function must not change it for the rest of the caller's transaction.
    callers_wait constant text := current_setting('lock_timeout');
    target record;
    day date;
BEGIN
    IF NOT coalesce(isfinite(from_day) AND isfinite(to_day), false)
        OR from_day < first_allowed OR to_day > last_allowed OR to_day - from_day >= most_days
    THEN
        RAISE EXCEPTION 'ensure_partitions(%, %): days must lie between % and %, and at most % in one call',
            from_day, to_day, first_allowed, last_allowed, most_days
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- An older snapshot would not see what others committed into DEFAULT before we had locked it.
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'ensure_partitions() must run in READ COMMITTED, not in %',
            upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'invalid_transaction_state';
    END IF;

    -- The usual case takes no lock at all.
    IF EXISTS (SELECT FROM missing_partitions('spans', from_day, to_day))
        OR EXISTS (SELECT FROM missing_partitions('logs', from_day, to_day))
    THEN
        PERFORM set_config('lock_timeout', least(nullif(setting::int8, 0), longest_wait) || 'ms', true)
            FROM pg_settings WHERE name = 'lock_timeout';
        PERFORM pg_advisory_xact_lock(hashtextextended('otel-pg-exporter partitions ' || current_schema(), 0));
        FOR target IN
            SELECT * FROM (VALUES ('spans', 'start_time', 'Spans'), ('logs', 'time', 'Log records')) AS t (parent, time_column, what)
        LOOP
            CONTINUE WHEN NOT EXISTS (SELECT FROM missing_partitions(target.parent::regclass, from_day, to_day));
            -- The parent first, as ALTER TABLE and every writer take it. This mode lets readers pass, but no writer
            -- may be under way: a COPY that began before ATTACH would still route rows of the new day to DEFAULT,
            -- and fail. DEFAULT next, before its rows move, so that nobody adds to it between move and ATTACH.
            EXECUTE format('LOCK TABLE ONLY %I IN SHARE ROW EXCLUSIVE MODE', target.parent);
            EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', target.parent || '_default');
            FOR day IN SELECT * FROM missing_partitions(target.parent::regclass, from_day, to_day) LOOP
                PERFORM create_partition(target.parent, target.time_column, target.what, day);
            END LOOP;
        END LOOP;
        PERFORM set_config('lock_timeout', callers_wait, true);
    END IF;
    RETURN QUERY SELECT from_day + n FROM generate_series(0, to_day - from_day) AS n
        WHERE from_day + n >= (
            SELECT min(coalesce((expired_before(t.item) AT TIME ZONE 'UTC')::date, '-infinity'))
            FROM (VALUES ('spans'), ('logs')) AS t (item)
        );
END
$body$;
COMMENT ON FUNCTION ensure_partitions(date, date) IS
    'Give each day (UTC) from from_day to to_day a partition of spans and logs, with what DEFAULT holds of it, unless it '
    'is older than the retention; returns the days that have one. Fails with lock_not_available (55P03) where writers leave no gap for 0.8 s: call again later.';
-- Callers whose rights end at INSERT may run it; docs/how-to/roles.md grants it to the writer.
REVOKE EXECUTE ON FUNCTION ensure_partitions(date, date) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION create_partition(text, text, text, date) FROM PUBLIC;

-- Traces -------------------------------------------------------------------------------------------------------------

CREATE FUNCTION trace_spans(trace_id uuid) RETURNS SETOF spans
    LANGUAGE plpgsql STABLE ROWS 100
    SET search_path = :schema, pg_temp
    SET timezone = 'UTC' -- partition bounds are read as text
    SET datestyle = 'ISO'
    SET plan_cache_mode = force_custom_plan -- partitions are pruned when the query is planned
AS $body$
#variable_conflict use_column
DECLARE
    trace traces;
    missing int8; -- spans still to be found
    found_now int8;
    outliers_ingested timestamptz;
    first_bound timestamptz; -- of all daily partitions
    last_bound timestamptz;
    floor_time timestamptz; -- [floor_time, ceil_time): where partitions exist and the trace may have spans
    ceil_time timestamptz;
    searched_from timestamptz; -- [searched_from, searched_to): done
    searched_to timestamptz;
    next_from timestamptz;
    next_to timestamptz;
    probe_from timestamptz;
    probe_to timestamptz;
    step interval := '10 minutes';
BEGIN
    -- Outliers (time 0, far future) lie in DEFAULT, the one partition with an index on trace_id.
    RETURN QUERY SELECT d.* FROM spans_default AS d WHERE d.trace_id = trace_spans.trace_id;
    GET DIAGNOSTICS found_now = ROW_COUNT;
    SELECT t.* INTO trace FROM traces AS t WHERE t.trace_id = trace_spans.trace_id;
    missing := trace.span_count - found_now;

    SELECT min(bounds[1]::timestamptz), max(bounds[2]::timestamptz) INTO first_bound, last_bound
        FROM pg_inherits AS i
        JOIN pg_class AS c ON c.oid = i.inhrelid
        CROSS JOIN regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''(.+)''\) TO \(''(.+)''\)') AS bounds
        WHERE i.inhparent = 'spans'::regclass;
    IF first_bound IS NULL THEN
        RETURN;
    END IF;
    floor_time := greatest(trace.start_time, first_bound);
    ceil_time := least(trace.end_time + interval '1 microsecond', last_bound);

    -- Where to begin: a trace whose start lies in a partition begins there, and few reach beyond the first probe.
    -- Where an outlier hides the start, the root span tells, or the time at which the outlier came in.
    IF floor_time > trace.start_time THEN
        SELECT min(d.ingested_at) INTO outliers_ingested FROM spans_default AS d
            WHERE d.trace_id = trace_spans.trace_id;
        searched_from := CASE
            WHEN trace.root_start_time >= floor_time AND trace.root_start_time < ceil_time THEN trace.root_start_time
            ELSE least(greatest(outliers_ingested, floor_time), ceil_time)
        END;
    END IF;
    searched_from := coalesce(searched_from, floor_time);
    searched_to := searched_from;

    -- Outward from there, until traces' own count of spans is reached. A probe names every minute of its range, since
    -- the primary key begins with the minute; no probe names more than those of a day, and none is made twice.
    WHILE missing > 0 AND (searched_from > floor_time OR searched_to < ceil_time) LOOP
        next_from := greatest(floor_time, searched_from - step);
        next_to := least(ceil_time, searched_to + step);
        FOR probe_from, probe_to IN
            SELECT * FROM (VALUES (searched_to, next_to), (next_from, searched_from)) AS sides (a, b) WHERE a < b
        LOOP
            RETURN QUERY SELECT s.* FROM spans AS s
                WHERE s.trace_id = trace_spans.trace_id
                    AND s.start_minute = ANY (ARRAY(SELECT generate_series(minute_of(probe_from), minute_of(probe_to))))
                    AND s.start_time >= probe_from AND s.start_time < probe_to
                    AND s.tableoid <> 'spans_default'::regclass;
            GET DIAGNOSTICS found_now = ROW_COUNT;
            missing := missing - found_now;
        END LOOP;
        searched_from := next_from;
        searched_to := next_to;
        step := least(step * 2, interval '1 day');
    END LOOP;
END
$body$;
COMMENT ON FUNCTION trace_spans(uuid) IS
    'All spans of a trace, in no order, found through its row in traces: the quick way to read a trace.';

CREATE FUNCTION trace_tree(trace_id uuid)
    RETURNS TABLE (
        depth int4,
        operation text,
        service_name text,
        start_time timestamptz,
        offset_ms numeric,
        duration_ms numeric,
        error boolean,
        status_message text,
        kind text,
        span_id text,
        parent_span_id text,
        path text[]
    )
    LANGUAGE sql STABLE ROWS 100
    SET search_path = :schema, pg_temp
AS $body$
    WITH RECURSIVE nodes AS MATERIALIZED (
        SELECT s.span_id, s.parent_span_id, s.start_time, s.start_time_ns, s.duration_ns, s.name, s.service_name,
            s.status_code, s.status_message, s.kind,
            -- A span id that comes twice: the first one is the parent of its children, or they would multiply.
            row_number() OVER (PARTITION BY s.span_id ORDER BY s.start_time) = 1 AS is_parent,
            int8send((extract(epoch FROM s.start_time) * 1000000)::int8) || s.span_id AS sort_key
        FROM trace_spans($1) AS s
    ), tree AS (
        SELECT n.span_id, n.start_time, n.is_parent, 0 AS depth, ARRAY[encode(n.span_id, 'hex')] AS path,
            ARRAY[n.sort_key] AS sort_path
        FROM nodes AS n
        WHERE NOT EXISTS (SELECT FROM nodes AS p WHERE p.span_id = n.parent_span_id)
        UNION ALL
        SELECT n.span_id, n.start_time, n.is_parent, t.depth + 1, t.path || encode(n.span_id, 'hex'),
            t.sort_path || n.sort_key
        FROM tree AS t JOIN nodes AS n ON n.parent_span_id = t.span_id
        WHERE t.is_parent AND t.depth < 255
    )
    -- What no root leads to (a circle of parents, or deeper than 255) comes last, with depth NULL, but it does come.
    SELECT t.depth, repeat('  ', coalesce(t.depth, 0)) || n.name, n.service_name, n.start_time,
        round((extract(epoch FROM n.start_time - min(n.start_time) OVER ()) * 1000)::numeric, 3),
        round(n.duration_ns / 1000000.0, 3),
        n.status_code = 2, n.status_message, span_kind_name(n.kind), encode(n.span_id, 'hex'),
        encode(n.parent_span_id, 'hex'), t.path
    FROM nodes AS n LEFT JOIN tree AS t USING (span_id, start_time)
    ORDER BY t.sort_path NULLS LAST, n.sort_key
$body$;
COMMENT ON FUNCTION trace_tree(uuid) IS
    'A trace as an indented tree, in order of start: depth, duration, error, and the span ids from the root (path). '
    'A span whose parent is not stored stands at depth 0.';

CREATE FUNCTION trace_logs(trace_id uuid) RETURNS SETOF logs
    LANGUAGE plpgsql STABLE ROWS 100
    SET search_path = :schema, pg_temp
    SET timezone = 'UTC'
    SET plan_cache_mode = force_custom_plan
AS $body$
#variable_conflict use_column
DECLARE
    -- The minutes during which the trace's spans ran, outliers (anomaly bit 128) aside; of each at most a day.
    minutes constant int4[] := ARRAY(
        SELECT DISTINCT minute
        FROM trace_spans(trace_logs.trace_id) AS s
        CROSS JOIN generate_series(
            s.start_minute, least(minute_of(coalesce(s.end_time, s.start_time)), s.start_minute + 1440)
        ) AS minute
        WHERE s.anomalies & 128 = 0
    );
BEGIN
    RETURN QUERY SELECT d.* FROM logs_default AS d WHERE d.trace_id = trace_logs.trace_id;
    RETURN QUERY SELECT l.* FROM logs AS l
        WHERE l.trace_id = trace_logs.trace_id
            AND l.time_minute = ANY (minutes)
            AND l.time >= to_timestamp((SELECT min(m) FROM unnest(minutes) AS m) * 60.0)
            AND l.time < to_timestamp((SELECT max(m) FROM unnest(minutes) AS m) * 60.0 + 60)
            AND l.tableoid <> 'logs_default'::regclass;
END
$body$;
COMMENT ON FUNCTION trace_logs(uuid) IS
    'The log records of a trace, in no order: those in DEFAULT, and those of the minutes in which its spans ran.';

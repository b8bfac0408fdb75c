-- Repeatable: nothing but functions and views, which `migrate` makes again where one of them is gone.
-- Retention: functions that enforce what the table `retention` says, and nothing else, so that the writer may call them.
-- Whatever it passes, and whatever it has changed in rows that it may change, no span or log record goes that is younger
-- than the policy says. Each call does a bounded piece of work; otel_pg_exporter/postgres/retention.py calls them.

CREATE FUNCTION daily_partitions(parent regclass)
    RETURNS TABLE (relation regclass, name text, first_time timestamptz, after_time timestamptz, ours boolean)
    LANGUAGE sql STABLE
    SET search_path = :schema, pg_temp
    SET timezone = 'UTC' -- bounds are read as text
    SET datestyle = 'ISO'
AS $body$
    SELECT c.oid::regclass, c.relname::text, b.first_time, b.after_time,
        (c.relkind = 'r' AND c.relnamespace = its.relnamespace
            AND c.relname = its.relname || to_char(b.first_time, '"_p"YYYYMMDD')) IS TRUE
    FROM pg_inherits AS i
    JOIN pg_class AS its ON its.oid = i.inhparent
    JOIN pg_class AS c ON c.oid = i.inhrelid
    CROSS JOIN regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM [(](.+)[)] TO [(](.+)[)]') AS bound
    CROSS JOIN LATERAL (
        SELECT CASE bound[1] WHEN 'MINVALUE' THEN '-infinity' ELSE trim(bound[1], '''')::timestamptz END AS first_time,
            CASE bound[2] WHEN 'MAXVALUE' THEN 'infinity' ELSE trim(bound[2], '''')::timestamptz END AS after_time
    ) AS b
    WHERE i.inhparent = parent AND bound IS NOT NULL
$body$;
COMMENT ON FUNCTION daily_partitions(regclass) IS
    'The partitions of spans or logs but for DEFAULT, with their bounds, and whether ensure_partitions() made them: what '
    'somebody has attached under another name, from another schema, or as a foreign table, is theirs.';

CREATE FUNCTION rows_since(parent text) RETURNS timestamptz
    LANGUAGE sql STABLE
    SET search_path = :schema, pg_temp
AS $body$
    -- Of what somebody else has attached, the day is all that is known.
    SELECT min(least(p.first_time, made.rows_since))
    FROM daily_partitions(parent::regclass) AS p LEFT JOIN partitions AS made USING (name)
$body$;
COMMENT ON FUNCTION rows_since(text) IS
    'The moment before which none of the rows in partitions of spans or logs but for DEFAULT was stored.';

CREATE FUNCTION expired_partition(parent text) RETURNS text
    LANGUAGE sql STABLE
    SET search_path = :schema, pg_temp
AS $body$
    SELECT p.name
    FROM daily_partitions(parent::regclass) AS p
    WHERE p.ours AND p.after_time <= expired_before(parent)
    ORDER BY p.after_time
    LIMIT 1
$body$;
COMMENT ON FUNCTION expired_partition(text) IS 'The oldest day of spans or logs that is older than the retention.';

CREATE FUNCTION drop_expired_partition(parent text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = :schema, pg_temp
AS $body$
DECLARE
    -- As in ensure_partitions(): below deadlock_timeout, so that we are the one that gives up.
    longest_wait constant int := 800;
    callers_wait constant text := current_setting('lock_timeout');
    expired text;
BEGIN
    IF parent IS NULL OR parent NOT IN ('spans', 'logs') THEN
        RAISE EXCEPTION 'drop_expired_partition(%): it must be spans or logs', quote_nullable(parent)
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- An older snapshot might hold an older policy.
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'drop_expired_partition() must run in READ COMMITTED, not in %',
            upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    IF expired_partition(parent) IS NULL THEN
        RETURN NULL; -- the usual case takes no lock
    END IF;
    PERFORM set_config('lock_timeout', least(nullif(setting::int8, 0), longest_wait) || 'ms', true)
        FROM pg_settings WHERE name = 'lock_timeout';
    PERFORM pg_advisory_xact_lock(hashtextextended('otel-pg-exporter partitions ' || current_schema(), 0));
    -- In ensure_partitions()' order. DROP would take the same locks, in an order of its own.
    EXECUTE format('LOCK TABLE ONLY %I IN ACCESS EXCLUSIVE MODE', parent);
    EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', parent || '_default');
    SELECT expired_partition(parent) INTO expired; -- somebody else may have been quicker
    IF expired IS NOT NULL THEN
        EXECUTE format('DROP TABLE %I', expired);
        DELETE FROM partitions WHERE name = expired;
    END IF;
    PERFORM set_config('lock_timeout', callers_wait, true);
    RETURN expired;
END
$body$;
COMMENT ON FUNCTION drop_expired_partition(text) IS
    'Drop the oldest day of spans or logs, if all of it is older than the retention; returns its name, NULL if none is. '
    'Everybody waits until the caller''s transaction ends. Fails with lock_not_available (55P03) where readers and '
    'writers leave no gap for lock_timeout, and for 0.8 s at most.';

CREATE FUNCTION prune_before(relation text, column_name text, moment timestamptz, most int4) RETURNS int8
    LANGUAGE plpgsql
    SET search_path = :schema, pg_temp
AS $body$
DECLARE
    removed int8;
BEGIN
    -- A row that somebody holds is left to the next round. Locked, it stays where it is until it is deleted.
    EXECUTE format(
        'DELETE FROM %1$I WHERE ctid = ANY (ARRAY('
        'SELECT ctid FROM %1$I WHERE %2$I < $1 ORDER BY %2$I LIMIT $2 FOR UPDATE SKIP LOCKED))',
        relation, column_name
    ) USING moment, most;
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END
$body$;
COMMENT ON FUNCTION prune_before(text, text, timestamptz, int4) IS
    'Delete up to so many rows that are older than a moment, oldest first. For prune_expired(), which knows the moment.';

CREATE FUNCTION prune_traces(pages int4, OUT removed int8, OUT finished boolean)
    LANGUAGE plpgsql
    SET search_path = :schema, pg_temp
AS $body$
DECLARE
    walk retention_progress;
    horizon timestamptz; -- what began before it, and what ends not before the ceiling, has no daily partition
    ceiling timestamptz;
    gone_before timestamptz;
    stored_before timestamptz; -- no daily partition has a row that was
    last_page int8;
    next_page int8;
    ids tid[];
BEGIN
    removed := 0;
    finished := true;
    -- From here on no partition of spans comes or goes, nor do rows leave DEFAULT for one.
    LOCK TABLE spans_default IN ACCESS SHARE MODE;
    SELECT min(p.first_time), max(p.after_time) INTO horizon, ceiling FROM daily_partitions('spans') AS p;
    gone_before := least(horizon, expired_before('spans'));
    -- Two days, since of what others have attached rows_since() knows the day alone, and a clock may be a day ahead.
    stored_before := least(gone_before, rows_since('spans')) - interval '2 days';
    SELECT * INTO walk FROM retention_progress FOR UPDATE;
    IF horizon IS NULL OR expired_before('spans') IS NULL
        OR walk.traces_page IS NULL AND walk.traces_horizon IS NOT DISTINCT FROM gone_before
    THEN
        RETURN;
    END IF;
    IF walk.traces_page IS NULL THEN
        walk.traces_page := 0;
        walk.traces_horizon := gone_before;
    END IF;
    -- Page by page, once for each day that goes: an index that knew the end of a trace would make each new span of it a
    -- new entry.
    last_page := pg_relation_size('traces') / current_setting('block_size')::int8; -- empty, or the one behind the last
    next_page := walk.traces_page + CASE
        WHEN current_setting('server_version_num')::int < 140000 THEN last_page -- reads the whole table for any range
        ELSE pages
    END;
    ids := ARRAY(
        SELECT t.ctid FROM traces AS t
        WHERE t.ctid >= format('(%s,0)', least(walk.traces_page, 4294967294))::tid
            AND t.ctid < format('(%s,0)', least(next_page, 4294967294))::tid
            AND (
                t.end_time < gone_before
                -- All its spans were outliers, far in the future.
                OR t.start_time >= ceiling
                -- Some had a time or an end far in the future, which hides how old the others are. But all that is
                -- left in daily partitions was stored later.
                OR t.start_time < gone_before AND t.end_time >= ceiling AND t.ingested_at < stored_before
            )
        FOR UPDATE SKIP LOCKED
    );
    -- In a statement of its own: what writers had committed when we got the locks is seen. What they add later, they
    -- add to a new row.
    DELETE FROM traces AS t WHERE t.ctid = ANY (ids)
        AND NOT EXISTS (SELECT FROM spans_default AS s WHERE s.trace_id = t.trace_id);
    GET DIAGNOSTICS removed = ROW_COUNT;
    finished := next_page >= last_page;
    UPDATE retention_progress SET traces_page = CASE WHEN finished THEN NULL ELSE next_page END,
        traces_horizon = walk.traces_horizon;
END
$body$;
COMMENT ON FUNCTION prune_traces(int4) IS
    'Look through the next pages of traces for those of which no span can be left, and delete them. For prune_expired().';

CREATE FUNCTION prune_resources(most int4, OUT removed int8, OUT finished boolean)
    LANGUAGE plpgsql
    SET search_path = :schema, pg_temp
AS $body$
DECLARE
    -- Spans may be a day ahead of the clock, and are dropped a day late, with the whole day.
    margin constant interval := '2 days';
    gone_before timestamptz;
    changed int8;
BEGIN
    removed := 0;
    finished := true;
    SELECT now() - max(r.keep) - margin INTO gone_before FROM retention AS r WHERE r.item IN ('spans', 'logs')
        HAVING count(r.keep) = 2;
    IF gone_before IS NULL THEN
        RETURN;
    END IF;
    -- Writers refresh last_seen daily. That it is old must have held for as long as spans are kept, by our own note:
    -- last_seen alone is theirs to change.
    UPDATE resources SET unseen_since = NULL WHERE resource_id = ANY (ARRAY(
        SELECT r.resource_id FROM resources AS r WHERE r.unseen_since IS NOT NULL
            AND r.last_seen > r.unseen_since - interval '1 day' LIMIT most FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS changed = ROW_COUNT;
    finished := finished AND changed < most;
    UPDATE resources SET unseen_since = now() WHERE resource_id = ANY (ARRAY(
        SELECT r.resource_id FROM resources AS r WHERE r.unseen_since IS NULL
            AND r.last_seen < now() - interval '2 days' LIMIT most FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS changed = ROW_COUNT;
    finished := finished AND changed < most;
    -- No row may be left, even where retention is held up, that was stored before the note was made.
    SELECT least(gone_before, min(m.moment)) INTO gone_before
        FROM (
            SELECT rows_since('spans')
            UNION ALL SELECT rows_since('logs')
            UNION ALL SELECT min(s.ingested_at) FROM spans_default AS s
            UNION ALL SELECT min(l.ingested_at) FROM logs_default AS l
        ) AS m (moment);
    DELETE FROM resources WHERE resource_id = ANY (ARRAY(
        SELECT r.resource_id FROM resources AS r WHERE r.unseen_since < gone_before
            AND r.last_seen <= r.unseen_since - interval '1 day' ORDER BY r.unseen_since LIMIT most FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS removed = ROW_COUNT;
    finished := finished AND removed < most;
END
$body$;
COMMENT ON FUNCTION prune_resources(int4) IS
    'Delete resources that no span or log record names any more. For prune_expired().';

CREATE FUNCTION prune_expired(item text, most int4 DEFAULT 1000, OUT removed int8, OUT finished boolean)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = :schema, pg_temp
    SET timezone = 'UTC' -- a caller's own could make days longer
AS $body$
DECLARE
    moment constant timestamptz := (SELECT now() - r.keep FROM retention AS r WHERE r.item = prune_expired.item);
BEGIN
    IF coalesce(most NOT BETWEEN 1 AND 10000, true) THEN
        RAISE EXCEPTION 'prune_expired(%, %): between 1 and 10000 rows in one call', quote_nullable(item), most
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'prune_expired() must run in READ COMMITTED, not in %',
            upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    CASE item
        WHEN 'ingest_requests', 'dead_letters' THEN
            removed := prune_before(item, 'received_at', moment, most);
        WHEN 'spans' THEN
            removed := prune_before('spans_default', 'ingested_at', expired_before(item), most);
            IF removed > 0 THEN
                -- Their traces may be without a span now, wherever they lie.
                UPDATE retention_progress SET outliers_pruned = true, traces_horizon = NULL;
            END IF;
        WHEN 'logs' THEN
            removed := prune_before('logs_default', 'ingested_at', expired_before(item), most);
        WHEN 'traces' THEN
            SELECT * INTO removed, finished FROM prune_traces(greatest(most / 10, 1));
        WHEN 'resources' THEN
            SELECT * INTO removed, finished FROM prune_resources(most);
        ELSE
            RAISE EXCEPTION 'prune_expired(%): it must be spans, logs, traces, resources, ingest_requests or dead_letters',
                quote_nullable(item)
                USING ERRCODE = 'invalid_parameter_value';
    END CASE;
    finished := coalesce(finished, removed < most);
END
$body$;
COMMENT ON FUNCTION prune_expired(text, int4) IS
    'Delete some of what is older than the retention: rows of DEFAULT (spans, logs, by ingested_at), traces, resources, '
    'ingest_requests, dead_letters. Returns how many went, and whether that was all for now.';

-- Callers whose rights end at INSERT may run the two that check what they are told.
REVOKE EXECUTE ON FUNCTION drop_expired_partition(text), prune_expired(text, int4) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION prune_before(text, text, timestamptz, int4), prune_traces(int4), prune_resources(int4)
    FROM PUBLIC;

-- Rights of the roles, granted by the owner of the tables. To grant them again changes nothing.

GRANT USAGE ON SCHEMA :schema TO :writer, :reader;

-- Writer. COPY and INSERT go to the parent tables: partitions need no rights of their own.
GRANT INSERT ON spans, logs, resources, traces, ingest_requests, dead_letters TO :writer;
-- The key, which `ON CONFLICT DO NOTHING RETURNING` gives back.
GRANT SELECT (start_minute, trace_id, span_id, start_time) ON spans TO :writer;
GRANT SELECT (resource_id, last_seen), UPDATE (last_seen) ON resources TO :writer;
GRANT SELECT, UPDATE ON traces TO :writer;
GRANT SELECT, UPDATE (rejected, error_message) ON ingest_requests TO :writer;
GRANT SELECT ON schema_migrations, retention TO :writer;
GRANT EXECUTE ON FUNCTION ensure_partitions(date, date), drop_expired_partition(text), prune_expired(text, int4)
    TO :writer;

-- Operator, beyond what it has as a member of both others.
GRANT DELETE, UPDATE (reason, sqlstate) ON dead_letters TO :operator;
GRANT DELETE ON traces TO :operator;

-- Reader. Later tables, partitions and views included.
GRANT SELECT ON ALL TABLES IN SCHEMA :schema TO :reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA :schema GRANT SELECT ON TABLES TO :reader;

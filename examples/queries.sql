-- Questions to ask of your telemetry. All at once:
--
--     psql 'postgresql://…' -f examples/queries.sql
--
-- or copy those that you need. Every query says how far it looks back: a condition on start_time (spans, traces) or time
-- (logs) is what keeps it off the partitions of other days. Adapt the interval, and mind it when you write your own.

SET search_path = otel, public;

-- 1. The slowest operations: how often, and how long at the median, the 95th and the 99th percentile. -----------------
SELECT
    service_name,
    name AS operation,
    span_kind_name(kind) AS kind,
    count(*) AS spans,
    round((percentile_cont(0.50) WITHIN GROUP (ORDER BY duration_ns) / 1e6)::numeric, 2) AS p50_ms,
    round((percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ns) / 1e6)::numeric, 2) AS p95_ms,
    round((percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ns) / 1e6)::numeric, 2) AS p99_ms
FROM spans
WHERE start_time >= now() - interval '1 hour'
GROUP BY service_name, name, kind
ORDER BY p95_ms DESC
LIMIT 20;

-- 2. The same per minute, by a function for a range of time: from then until now. Without a range, there is a view. -----
SELECT minute, service_name, operation, spans, errors, round(p95_ms::numeric, 2) AS p95_ms
FROM red_metrics(now() - interval '15 minutes')
WHERE kind = 'server'
ORDER BY minute, service_name, operation;

-- 3. Errors by service, with the last message. An index holds the errors alone: few rows are read, however many spans. -
SELECT
    service_name,
    name AS operation,
    count(*) AS errors,
    max(start_time) AS last_seen,
    (array_agg(status_message ORDER BY start_time DESC))[1] AS last_message
FROM spans
WHERE status_code = 2
    AND start_time >= now() - interval '1 day'
GROUP BY service_name, name
ORDER BY errors DESC, service_name, operation;

-- 4. The latest traces, a row each. ------------------------------------------------------------------------------------
SELECT
    start_time,
    round((extract(epoch FROM end_time - start_time) * 1000)::numeric, 1) AS duration_ms,
    root_service_name,
    root_name,
    span_count,
    error_count,
    service_names,
    trace_id
FROM traces
WHERE start_time >= now() - interval '1 hour'
ORDER BY start_time DESC
LIMIT 20;

-- 5. A trace as a tree: here the one with most errors. One that you know goes in as it is:
--    trace_tree('0af7651916cd43dd8448eb211c80319c') --------------------------------------------------------------------
SELECT operation, service_name, offset_ms, duration_ms, error, status_message, depth
FROM trace_tree((
    SELECT trace_id
    FROM traces
    WHERE error_count > 0 AND start_time >= now() - interval '1 hour'
    ORDER BY error_count DESC, start_time DESC
    LIMIT 1
));

-- 6. What went wrong there: the events of its spans, exceptions with their stack traces among them. ---------------------
SELECT
    to_timestamp((event ->> 'time_unix_nano')::numeric / 1e9) AS time,
    s.service_name,
    s.name AS operation,
    event ->> 'name' AS event,
    event -> 'attributes' ->> 'exception.type' AS exception,
    event -> 'attributes' ->> 'exception.message' AS message
FROM trace_spans((
    SELECT trace_id
    FROM traces
    WHERE error_count > 0 AND start_time >= now() - interval '1 hour'
    ORDER BY error_count DESC, start_time DESC
    LIMIT 1
)) AS s
CROSS JOIN jsonb_array_elements(s.events) AS event
ORDER BY time;

-- 7. The logs of a trace. trace_logs() finds them by the minutes in which the trace ran. --------------------------------
SELECT l.time, l.service_name, l.severity_text, l.body, encode(l.span_id, 'hex') AS span_id
FROM trace_logs((
    SELECT trace_id
    FROM traces
    WHERE error_count > 0 AND start_time >= now() - interval '1 hour'
    ORDER BY error_count DESC, start_time DESC
    LIMIT 1
)) AS l
ORDER BY l.time;

-- 8. The latest warnings and errors in the logs, and the operation during which each was logged. ------------------------
SELECT l.time, l.service_name, severity_name(l.severity_number) AS severity, l.body, s.name AS operation, l.trace_id
FROM logs AS l
LEFT JOIN spans AS s
    ON s.trace_id = l.trace_id
    AND s.span_id = l.span_id
    -- The key's first column: the span began in the record's minute, in one of the 10 before, or, by a clock that is
    -- ahead, in the next. Without it, this would have to read all spans.
    AND s.start_minute BETWEEN l.time_minute - 10 AND l.time_minute + 1
    AND s.start_time >= now() - interval '1 hour' - interval '10 minutes'
WHERE l.severity_number >= 13
    AND l.time >= now() - interval '1 hour'
ORDER BY l.time DESC
LIMIT 20;

-- 9. Who calls whom: spans whose parent belongs to another service. The function gives a row a minute. -----------------
SELECT caller, callee, sum(calls) AS calls, sum(errors) AS errors, round(max(p95_ms)::numeric, 2) AS worst_p95_ms
FROM service_map(now() - interval '1 hour')
GROUP BY caller, callee
ORDER BY calls DESC;

-- 10. Links: which traces a batch came from. ----------------------------------------------------------------------------
SELECT s.name AS batch, s.start_time, count(*) AS orders, min(t.start_time) AS first_order, max(t.end_time) AS last_order
FROM spans AS s
CROSS JOIN jsonb_array_elements(s.links) AS link
JOIN traces AS t ON t.trace_id = (link ->> 'trace_id')::uuid
WHERE s.links IS NOT NULL
    AND s.start_time >= now() - interval '1 hour'
GROUP BY s.name, s.start_time, s.trace_id
ORDER BY s.start_time DESC
LIMIT 20;

-- 11. Language models: calls and tokens by day and model. Only calls of models count: an agent's span may repeat the
--     tokens of the calls that it made. --------------------------------------------------------------------------------
SELECT
    (start_time AT TIME ZONE 'UTC')::date AS day,
    gen_ai_provider_name AS provider,
    gen_ai_request_model AS model, -- gen_ai_response_model has the exact version
    count(*) AS calls,
    count(*) FILTER (WHERE status_code = 2) AS errors,
    sum(gen_ai_input_tokens) AS input_tokens,
    sum(gen_ai_cache_read_input_tokens) AS cached_tokens,
    sum(gen_ai_output_tokens) AS output_tokens
FROM spans
WHERE gen_ai_operation_name IN ('chat', 'generate_content', 'text_completion', 'embeddings')
    AND start_time >= now() - interval '30 days'
GROUP BY day, provider, model
ORDER BY day DESC, input_tokens DESC NULLS LAST;

-- 12. What they cost. The prices, in dollars per million tokens, are examples: put yours there, or into a table. Cached
--     tokens are part of the input tokens, and have prices of their own. -----------------------------------------------
WITH prices (model, input, cache_read, cache_write, output) AS (
    VALUES
        ('claude-haiku-4-5', 1.00, 0.10, 1.25, 5.00),
        ('gpt-5-mini', 0.25, 0.025, 0.25, 2.00)
), used AS (
    SELECT
        (start_time AT TIME ZONE 'UTC')::date AS day,
        gen_ai_request_model AS model,
        sum(gen_ai_input_tokens) AS input_tokens,
        coalesce(sum(gen_ai_cache_read_input_tokens), 0) AS cache_read,
        coalesce(sum(gen_ai_cache_creation_input_tokens), 0) AS cache_write,
        sum(gen_ai_output_tokens) AS output_tokens
    FROM spans
    WHERE gen_ai_operation_name IN ('chat', 'generate_content', 'text_completion', 'embeddings')
        AND start_time >= now() - interval '30 days'
    GROUP BY day, gen_ai_request_model
)
SELECT
    used.day,
    used.model,
    used.input_tokens,
    used.output_tokens,
    round(
        (
            (used.input_tokens - used.cache_read - used.cache_write) * prices.input
            + used.cache_read * prices.cache_read
            + used.cache_write * prices.cache_write
            + used.output_tokens * prices.output
        ) / 1e6,
        6
    ) AS dollars -- NULL: a model without a price
FROM used
LEFT JOIN prices USING (model)
ORDER BY used.day DESC, dollars DESC NULLS LAST;

-- 13. Conversations: how many questions, calls and tokens, and what it was about. The traces' own sums do for tokens, as
--     long as agents don't repeat them; here they come from the calls. --------------------------------------------------
SELECT
    gen_ai_conversation_id AS conversation,
    min(start_time) AS started,
    count(DISTINCT trace_id) AS questions,
    count(*) AS model_calls,
    count(*) FILTER (WHERE status_code = 2) AS errors,
    sum(gen_ai_input_tokens) AS input_tokens,
    sum(gen_ai_output_tokens) AS output_tokens,
    -- Messages are JSON, as text where the SDK knows no nested attributes; ->> makes them the same.
    (array_agg((attributes ->> 'gen_ai.input.messages')::jsonb #>> '{0,parts,0,content}' ORDER BY start_time))[1]
        AS first_message
FROM spans
WHERE gen_ai_conversation_id IS NOT NULL
    AND gen_ai_operation_name = 'chat'
    AND start_time >= now() - interval '1 day'
GROUP BY gen_ai_conversation_id
ORDER BY started DESC
LIMIT 20;

-- 14. A conversation, word for word: what the model answered to what. ---------------------------------------------------
SELECT
    s.start_time,
    s.gen_ai_request_model AS model,
    (s.attributes ->> 'gen_ai.input.messages')::jsonb -> -1 -> 'parts' -> 0 AS last_input,
    (s.attributes ->> 'gen_ai.output.messages')::jsonb -> 0 -> 'parts' -> 0 AS output,
    s.gen_ai_finish_reasons ->> 0 AS finish_reason,
    s.status_message
FROM spans AS s
WHERE s.gen_ai_conversation_id = 'conv-83c0'
    AND s.gen_ai_operation_name = 'chat'
    AND s.start_time >= now() - interval '1 day'
ORDER BY s.start_time;

-- 15. Telemetry and your own data in one query, for which this is PostgreSQL. A table of yours: --------------------------
CREATE TEMPORARY TABLE customers (customer_id text PRIMARY KEY, name text, plan text);
INSERT INTO customers VALUES
    ('c-1001', 'Ada', 'gold'), ('c-1002', 'Grace', 'gold'), ('c-1003', 'Edsger', 'free'), ('c-1004', 'Barbara', 'free');

--     How each plan fares. With promoted.toml, s.shop_customer_id does for s.attributes ->> 'shop.customer.id'.
SELECT
    c.plan,
    count(DISTINCT c.customer_id) AS customers,
    count(*) AS orders,
    count(*) FILTER (WHERE s.status_code = 2) AS failed,
    round(avg(s.duration_ns) / 1e6, 2) AS mean_ms
FROM spans AS s
JOIN customers AS c ON c.customer_id = s.attributes ->> 'shop.customer.id'
WHERE s.service_name = 'shop'
    AND s.name = 'POST /orders'
    AND s.start_time >= now() - interval '1 day'
GROUP BY c.plan
ORDER BY c.plan;

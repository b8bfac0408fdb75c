"""Numbered SQL files, applied in order by `otel_pg_exporter.postgres.migrate`.

They name no schema: the runner sets the search_path of its transaction. Two placeholders are filled in first:
`:schema`, the schema's name as a quoted identifier, for functions that pin their search_path; and `:promoted_columns`,
the ALTER TABLE statements that add the promoted columns which the mapping declares, for files that read such columns.
A file that was released never changes; what it got wrong, the next one mends.
"""

-- Run once, when the volume is new: `migrate --roles` leaves a role that exists as it is, and makes the others.
\set password `cat /run/secrets/writer_password`
CREATE ROLE otel_writer LOGIN PASSWORD :'password';

-- What an administrator does once, before there are tables: roles, rights on the database, the schema. Roles that
-- exist stay as they are, and nobody gets a password. Each step is taken only where it is missing, so that who may not
-- take it can run the rest again. The transaction goes on as the role that owns the schema.

DO $roles$
DECLARE
    writer constant name := :'writer';
    reader constant name := :'reader';
    operator constant name := :'operator';
    -- The owner of a schema that exists is the migrator already.
    migrator constant name := coalesce(
        (SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = :'schema'), :'migrator'
    );
    may_grant constant boolean := pg_has_role(datdba, 'USAGE') FROM pg_database WHERE datname = current_database();
    role name;
BEGIN
    FOREACH role IN ARRAY ARRAY[migrator, writer, reader, operator] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I LOGIN', role);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL; -- roles belong to all databases of a server: another one's migration was quicker
            END;
        END IF;
        IF may_grant THEN
            EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), role);
        ELSIF NOT has_database_privilege(role, current_database(), 'CONNECT') THEN
            RAISE insufficient_privilege USING MESSAGE = format(
                'role %I may not connect to database %I, which only its owner can grant', role, current_database()
            );
        END IF;
    END LOOP;
    IF may_grant THEN
        -- Not needed, but it makes batches with retried spans quicker: they go through a temporary table.
        EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO %I', current_database(), writer);
    END IF;
    FOREACH role IN ARRAY ARRAY[writer, reader] LOOP
        IF NOT pg_has_role(operator, role, 'USAGE') THEN
            EXECUTE format('GRANT %I TO %I', role, operator);
        END IF;
    END LOOP;

    -- From PostgreSQL 16 on, who makes a role may grant it to others, and must grant it to himself to act as it.
    IF NOT pg_has_role(
        migrator, CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END
    ) THEN
        EXECUTE format('GRANT %I TO CURRENT_USER', migrator);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = :'schema') THEN
        EXECUTE format('CREATE SCHEMA %I AUTHORIZATION %I', :'schema', migrator);
        EXECUTE format('COMMENT ON SCHEMA %I IS %L', :'schema', 'OpenTelemetry traces and logs.');
    END IF;
    PERFORM set_config('role', migrator, true);
END
$roles$;

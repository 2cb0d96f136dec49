-- The role of the service, which owns nothing: it reads and writes rows, and cannot change or drop tables.
-- Run this as the user that migrates, before or after `viralfx migrate`, as often as you like. Then set a
-- password: ALTER ROLE viralfx_service PASSWORD '...'; DATABASE_URL names this role, and
-- DATABASE_MIGRATION_URL the user that migrates. With DB_SCHEMA, replace viralfx_ops.
DO $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'viralfx_service') THEN
    CREATE ROLE viralfx_service LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE;
  END IF;
END
$$;
CREATE SCHEMA IF NOT EXISTS viralfx_ops;
GRANT USAGE ON SCHEMA viralfx_ops TO viralfx_service;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA viralfx_ops TO viralfx_service;
ALTER DEFAULT PRIVILEGES IN SCHEMA viralfx_ops GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO viralfx_service;

"""The migrations, which only :mod:`viralfx.adapters.postgres.migrate` loads."""

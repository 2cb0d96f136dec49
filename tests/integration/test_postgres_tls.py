"""TLS to a real server that accepts nothing else; the server confirms the encryption."""

from pathlib import Path

import pytest
from tests.integration.postgres_clients import changed, checked, config_of, migrated, opened
from tests.servers.certificates import Certificates
from tests.servers.postgres import PostgresServer

from viralfx.bootstrap import assemble
from viralfx.core.errors import ConfigurationError, StartupError
from viralfx.jobs.postgres import PostgresLeaseStore
from viralfx.postgres import PostgresConfig
from viralfx.settings import read_settings

UNKNOWN_NAME = "127.1"
"""The server's address in a form that its certificate does not contain."""

ENCRYPTED = "encrypted"
PLAIN = "does not admit this user, after 1 attempt; check user, pg_hba.conf and DB_TLS_MODE"
UNTRUSTED = "cannot be trusted over TLS, after 1 attempt; check DB_TLS_MODE and DB_TLS_CA_FILE"
OTHER_HOST = "presents a certificate for another host, after 1 attempt; check the host, or see"

MODES: dict[str, dict[tuple[str | None, str], str]] = {
    "disable": {(None, "localhost"): PLAIN},
    "prefer": {(None, UNKNOWN_NAME): ENCRYPTED},
    "require": {
        (None, UNKNOWN_NAME): ENCRYPTED,
        ("ca", UNKNOWN_NAME): ENCRYPTED,
        # As in libpq: with a CA file, the certificate is verified.
        ("other_ca", "localhost"): UNTRUSTED,
    },
    "verify-ca": {
        ("ca", UNKNOWN_NAME): ENCRYPTED,
        ("other_ca", "localhost"): UNTRUSTED,
        (None, "localhost"): UNTRUSTED,
    },
    "verify-full": {
        ("ca", "127.0.0.1"): ENCRYPTED,
        ("ca", "localhost"): ENCRYPTED,
        ("ca", UNKNOWN_NAME): OTHER_HOST,
        ("other_ca", "localhost"): UNTRUSTED,
        (None, "localhost"): UNTRUSTED,
    },
}


async def outcome(config: PostgresConfig) -> str:
    """Return the result of connecting, for the pool and for the check."""
    try:
        async with opened(config) as pool, checked(pool) as check, pool.acquire() as connection:
            await check.check()
            rows = await connection.fetch(
                # A session of the case before may still end.
                "select distinct application_name, ssl"
                " from pg_stat_ssl join pg_stat_activity using (pid)"
                " where application_name like 'viralfx%' order by 1"
            )
    except StartupError as error:
        return str(error)
    assert [tuple(row) for row in rows] == [("viralfx", True), ("viralfx-health", True)]
    return ENCRYPTED


@pytest.mark.each_python
@pytest.mark.parametrize("mode", MODES)
async def test_each_mode_accepts_and_refuses_as_documented(
    tls_postgres: PostgresServer, certificates: Certificates, mode: str
) -> None:
    """Refusals name the remedy."""
    for (ca, host), expected in MODES[mode].items():
        file = None if ca is None else str(getattr(certificates, ca))
        config = changed(config_of(tls_postgres), tls_mode=mode, tls_ca_file=file, host=host)
        assert expected in await outcome(config), (ca, host)


async def test_the_lease_store_encrypts_as_the_pool_does(
    tls_postgres: PostgresServer, certificates: Certificates
) -> None:
    """Its connection has the same settings."""
    plain = config_of(tls_postgres)
    config = changed(plain, tls_mode="verify-full", tls_ca_file=str(certificates.ca))
    await migrated(config)
    async with opened(config) as pool, pool.acquire() as connection:
        store = PostgresLeaseStore(pool)
        await store.register("w", ["default"], 1.0)
        encrypted = await connection.fetchval(
            "select ssl from pg_stat_ssl join pg_stat_activity using (pid)"
            " where application_name = 'viralfx-heartbeat'"
        )
        await store.close()
    assert encrypted is True


@pytest.mark.parametrize("content", ["", "no certificate"])
def test_invalid_ca_file_is_refused_before_connecting(
    tls_postgres: PostgresServer, tmp_path: Path, content: str
) -> None:
    """The start fails with the variable's name."""
    path = tmp_path / "ca.pem"
    path.write_text(content, encoding="utf-8")
    environ = {
        "DATABASE_URL": tls_postgres.url(),
        "DB_TLS_MODE": "verify-full",
        "DB_TLS_CA_FILE": str(path),
    }
    with pytest.raises(ConfigurationError, match=f"^DB_TLS_CA_FILE: {path} holds no certificates"):
        assemble(read_settings(environ))

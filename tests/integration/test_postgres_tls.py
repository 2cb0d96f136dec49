"""TLS to a real server that speaks nothing else; that it is encrypted is the server's word."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.postgres_clients import checked, config_of, opened
from tests.servers.certificates import Certificates
from tests.servers.postgres import PostgresServer

from viralfx.adapters.postgres import PostgresConfig
from viralfx.bootstrap import assemble
from viralfx.domain.errors import ConfigurationError, StartupError
from viralfx.settings import read_settings

UNKNOWN_NAME = "127.1"
"""The server's address, written so that it is no name of its certificate's."""

ENCRYPTED = "encrypted"
PLAIN = "does not let this user in, after 1 attempt; check user, pg_hba.conf and DB_TLS_MODE"
UNTRUSTED = "cannot be trusted over TLS, after 1 attempt; check DB_TLS_MODE and DB_TLS_CA_FILE"
OTHER_HOST = "shows a certificate for another host, after 1 attempt; check the host, or see"

MODES: dict[str, dict[tuple[str | None, str], str]] = {
    "disable": {(None, "localhost"): PLAIN},
    "prefer": {(None, UNKNOWN_NAME): ENCRYPTED},
    "require": {
        (None, UNKNOWN_NAME): ENCRYPTED,
        ("ca", UNKNOWN_NAME): ENCRYPTED,
        # As libpq: where it is told whom to trust, it trusts nobody else.
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
    """Say how connecting went, for the pool and for the check."""
    try:
        async with opened(config) as pool, checked(pool) as check, pool.acquire() as connection:
            await check.check()
            rows = await connection.fetch(
                "select application_name, ssl from pg_stat_ssl join pg_stat_activity using (pid)"
                " where application_name like 'viralfx%' order by 1"
            )
    except StartupError as error:
        return str(error)
    assert [tuple(row) for row in rows] == [("viralfx", True), ("viralfx-health", True)]
    return ENCRYPTED


@pytest.mark.parametrize("mode", MODES)
async def test_each_mode(
    tls_postgres: PostgresServer, certificates: Certificates, mode: str
) -> None:
    """Takes what it should, and refuses the rest with what to look at."""
    for (ca, host), expected in MODES[mode].items():
        file = None if ca is None else str(getattr(certificates, ca))
        config = replace(config_of(tls_postgres), tls_mode=mode, tls_ca_file=file, host=host)
        assert expected in await outcome(config), (ca, host)


@pytest.mark.parametrize("content", ["", "no certificate"])
def test_a_file_without_certificates_is_refused_before_anything_connects(
    tls_postgres: PostgresServer, tmp_path: Path, content: str
) -> None:
    """Not one by one by connections that cannot be verified."""
    path = tmp_path / "ca.pem"
    path.write_text(content, encoding="utf-8")
    environ = {
        "DATABASE_URL": tls_postgres.url(),
        "DB_TLS_MODE": "verify-full",
        "DB_TLS_CA_FILE": str(path),
    }
    with pytest.raises(ConfigurationError, match=f"^DB_TLS_CA_FILE: {path} holds no certificates"):
        assemble(read_settings(environ))

"""Examines the database before a deployment: one connection, a few questions, nothing changed."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import asyncpg
from asyncpg.connection import Connection

from viralfx.adapters.postgres.config import PostgresConfig
from viralfx.adapters.postgres.connection import connect
from viralfx.adapters.postgres.errors import Trouble, explain
from viralfx.adapters.postgres.facts import Facts, ask, judge
from viralfx.adapters.postgres.schema import VERSION_TABLE, is_later, pending_migrations
from viralfx.domain.diagnosis import Area, Finding, failed, passed, skipped, warned

LONGEST = 5.0
"""Seconds to connect at most, and for each answer, whatever the configuration allows."""

_VARIABLES = {
    "auth": "DATABASE_URL, DB_PASSWORD",
    "too_many_connections": "",  # these two name theirs already
    "tls": "",
}


class PostgresExamination:
    """Connects once, as the service would, and says what keeps it from working or may do so.

    ``production`` makes it look at what is only a risk there.
    """

    def __init__(self, config: PostgresConfig, *, production: bool) -> None:
        self._config = replace(config, connection_timeout=min(config.connection_timeout, LONGEST))
        self._production = production

    async def examine(self) -> Sequence[Finding]:
        """Look once."""
        config = self._config
        try:
            arguments = config.connect_arguments()
        except OSError:
            found = f"DB_TLS_CA_FILE: {config.tls_ca_file} holds no certificates"
            return self._alone(failed(Area.DATABASE, found, "name a file in PEM format"))
        arguments["command_timeout"] = LONGEST
        arguments["server_settings"]["application_name"] = f"{config.application_name}-doctor"
        try:
            connection = await connect(config, arguments)
        except Exception as error:  # noqa: BLE001 - every error is explained
            return self._alone(self._explained(error))
        try:
            return await self._ask(connection)
        finally:
            with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.shield(connection.close(timeout=1))

    async def _ask(self, connection: "Connection[Any]") -> Sequence[Finding]:
        try:
            facts = await ask(connection)
        except Exception as error:  # noqa: BLE001 - likewise
            return self._alone(self._explained(error))
        findings = list(judge(facts, self._config, production=self._production))
        try:
            return [*findings, *await _migrations(connection, facts)]
        except Exception as error:  # noqa: BLE001 - likewise
            return [*findings, replace(self._explained(error), area=Area.MIGRATIONS)]

    def _explained(self, error: BaseException) -> Finding:
        trouble = explain(error)
        return failed(
            Area.DATABASE,
            f"the database at {self._config.address} {trouble.problem}",
            _remedy(trouble),
        )

    def _alone(self, finding: Finding) -> Sequence[Finding]:
        reason = "the database could not be asked"
        return [finding, skipped(Area.POOL, reason), skipped(Area.MIGRATIONS, reason)]


def _remedy(trouble: Trouble) -> str:
    if trouble.code == "error":
        return "look at the server's log"
    variables = _VARIABLES.get(trouble.code, "DATABASE_URL")
    return f"{trouble.remedy} ({variables})" if variables else trouble.remedy


async def _migrations(connection: "Connection[Any]", facts: Facts) -> Sequence[Finding]:
    area = Area.MIGRATIONS
    if not facts.may_read_versions:
        return [
            failed(
                area,
                f"the user may not read the table {VERSION_TABLE}",
                f"grant SELECT on {VERSION_TABLE} to the user of DATABASE_URL",
            )
        ]
    pending, revision = await pending_migrations(connection), facts.revision
    if pending:
        names = ", ".join(pending)
        behind = failed(area, f"the schema is behind: {names} pending", "run `viralfx migrate`")
        return [behind, *_migrator_rights(facts)]
    if is_later(revision):
        return [
            warned(
                area,
                f"the schema is at {revision}, which a later version of the service made",
                "deploy that version or a later one; this one can go on using it",
            )
        ]
    return [passed(area, f"the schema is current at {revision}")]


def _migrator_rights(facts: Facts) -> Iterator[Finding]:
    if facts.schema is not None and not facts.may_create:
        yield failed(
            Area.MIGRATIONS,
            f"`viralfx migrate` cannot create tables as this user in the schema {facts.schema}",
            f"grant CREATE on schema {facts.schema} to the user of DATABASE_URL, or migrate as"
            " another one",
        )

"""The servers of the chaos run: a standby that is promoted, and a disk that is full."""

import asyncpg
import pytest
from tests.contracts.ledgers import draft
from tests.integration.job_ledgers import QUICK, ledger_in
from tests.servers.fixtures import or_skip
from tests.servers.postgres import PostgresServer, postgres_server, postgres_standby
from tests.servers.waiting import wait_until

from viralfx.core.errors import LedgerUnavailableError

_IN_STEP = "select count(*) from pg_stat_replication where sync_state = 'sync'"


def test_a_promoted_standby_has_every_commit(own_postgres: PostgresServer) -> None:
    """With a synchronous standby, no commit is lost when the primary dies."""
    with or_skip(), postgres_standby(own_postgres) as standby:
        own_postgres.execute("alter system set synchronous_standby_names = 'standby'")
        own_postgres.execute("select pg_reload_conf()")
        wait_until(lambda: own_postgres.execute(_IN_STEP) == [(1,)], what="synchronous")
        own_postgres.execute("create table kept as select 7 as number")
        own_postgres.kill()

        assert standby.execute("select pg_promote()") == [(True,)]
        assert standby.execute("select number from kept") == [(7,)]


async def test_a_job_is_on_the_standby_also_when_its_key_is_sent_again(
    own_postgres: PostgresServer,
) -> None:
    """While the standby is frozen, neither call counts as accepted; afterwards it has the job."""
    with or_skip(), postgres_standby(own_postgres) as standby:
        async with ledger_in(own_postgres, call_timeout=QUICK) as ledger:
            own_postgres.execute("alter system set synchronous_standby_names = 'standby'")
            own_postgres.execute("select pg_reload_conf()")
            wait_until(lambda: own_postgres.execute(_IN_STEP) == [(1,)], what="synchronous")
            await ledger.accept([draft()])
            standby.freeze()
            for _ in range(2):
                with pytest.raises(LedgerUnavailableError):
                    await ledger.accept([draft(key="again")])
            standby.thaw()
            (accepted,) = await ledger.accept([draft(key="again")])
            own_postgres.kill()
            kept = f"select from viralfx_all_jobs where id = '{accepted.job.id}'"
            wait_until(lambda: standby.execute(kept), what="replayed")

    assert not accepted.created


def test_a_full_disk_refuses_rows_until_it_has_space() -> None:
    """The server reports 53100, and stores rows again afterwards."""
    with or_skip(), postgres_server(mebibytes=256) as server:
        assert server.disk is not None
        server.execute("create table kept (number int)")
        server.disk.fill()
        with pytest.raises(asyncpg.DiskFullError):
            server.execute("insert into kept select generate_series(1, 100000)")
        server.disk.empty()
        server.execute("insert into kept select generate_series(1, 100000)")

        assert server.execute("select count(*) from kept") == [(100000,)]

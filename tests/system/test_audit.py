"""The audit trail of a process: with a raised level, through its stop, and without its table."""

from collections.abc import Iterator

import psycopg
import pytest
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.workers import api, environment_of

TOKEN = "planted-management-token-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
EVENTS = (
    "select action, actor, address, before, after from viralfx_ops.viralfx_audit_events order by id"
)


@pytest.mark.each_python
def test_a_raised_level_and_the_stop_are_in_the_log_and_in_the_table(database: Database) -> None:
    """The last event is stored before the pool closes."""
    environment = environment_of(database, MANAGEMENT_TOKEN=TOKEN)
    with api(environment) as service:
        level = service.get(
            "/health/loggers/root", method="PUT", headers=BEARER, json_body={"level": "error"}
        )
        stopped = service.get("/health/shutdown", method="POST", headers=BEARER)
        code = service.exit_code()
        actions = [each["action"] for each in service.logged("Audit event")]
        began = service.logged("Shutdown began")

    assert (level.status, stopped.status, code) == (200, 202, 0)
    assert (actions, began) == (["logger.level", "process.stop"], [])
    assert database.execute(EVENTS) == [
        ("logger.level", "management", "127.0.0.1", "log", "error"),
        ("process.stop", "management", "127.0.0.1", None, None),
    ]


def test_a_lost_table_stops_neither_an_action_nor_the_stop(database: Database) -> None:
    """It is one line and a metric; the log has the events."""
    environment = environment_of(database, MANAGEMENT_TOKEN=TOKEN)
    with api(environment) as service:
        database.execute("drop table viralfx_ops.viralfx_audit_events")
        for level in ("debug", "verbose", "log"):
            changed = service.get(
                "/health/loggers/viralfx.jobs",
                method="PUT",
                headers=BEARER,
                json_body={"level": level},
            )
            assert changed.status == 200
        wait_until(lambda: service.logged("Audit trail is not stored"), what="the line")
        shown = str(service.get("/metrics").body)
        stopped = service.get("/health/shutdown", method="POST", headers=BEARER)
        code = service.exit_code()
        actions = [each["action"] for each in service.logged("Audit event")]
        (line,) = service.logged("Audit trail is not stored")

    assert 'viralfx_audit_events_total{outcome="done"} 3.0' in shown
    assert (stopped.status, code) == (202, 0)
    assert actions == ["logger.level"] * 3 + ["process.stop"]
    assert "run `viralfx migrate`" in line["detail"]


_TABLE = "viralfx_ops.viralfx_audit_events"
_REFUSING = f"""
create function refuse() returns trigger language plpgsql as $$
begin raise exception 'no space left on device' using errcode = '53100'; end $$;
create trigger refusing before insert on {_TABLE} for each statement execute function refuse()
"""
FAULTS = {
    "missing": f"drop table {_TABLE}",
    "full": _REFUSING,
    "not allowed": f"revoke insert on {_TABLE} from current_service",
    "locked": f"begin; lock table {_TABLE} in access exclusive mode",
}
"""The statements that cause each condition of the table; the role is ``current_service``."""


@pytest.fixture
def least(database: Database) -> Iterator[Database]:
    """Return a database with a role of the same name, which has the rights of the service alone."""
    role = database.name
    for statement in (
        f"create role {role} login password '{database.server.password}'",
        f"grant usage on schema viralfx_ops to {role}",
        f"grant select, insert, update, delete on all tables in schema viralfx_ops to {role}",
    ):
        database.execute(statement)
    yield database
    database.execute(f"drop owned by {role}")
    database.execute(f"drop role {role}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_table_never_delays_the_stop(least: Database, fault: str) -> None:
    """The stop is regular, and its last line about the trail has the number of lost events."""
    url = least.server.url(least.name, user=least.name)
    environment = environment_of(least, MANAGEMENT_TOKEN=TOKEN) | {"DATABASE_URL": url}
    with api(environment) as service, psycopg.connect(least.url, autocommit=True) as holder:
        holder.execute(FAULTS[fault].replace("current_service", least.name))
        level = service.get(
            "/health/loggers/viralfx.jobs",
            method="PUT",
            headers=BEARER,
            json_body={"level": "debug"},
        )
        stopped = service.get("/health/shutdown", method="POST", headers=BEARER)
        code = service.exit_code(seconds=60)
        actions = [each["action"] for each in service.logged("Audit event")]
        (lost,) = service.logged("Audit trail ends without some events")

    assert (level.status, stopped.status, code) == (200, 202, 0)
    assert actions == ["logger.level", "process.stop"]
    assert lost["lost"] == 2

"""The composition root: policies from settings, invalid names, and state across a restart."""

import asyncio
import logging
from pathlib import Path

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck, ActingStage

from viralfx.bootstrap import assemble
from viralfx.bootstrap.postgres import migration_config
from viralfx.core.errors import ConfigurationError
from viralfx.domain.health.check_runner import CheckCompleted, CheckConfig
from viralfx.domain.health.model import (
    CheckPolicy,
    HealthCheck,
    NotReadyReason,
    Observation,
    State,
    Status,
)
from viralfx.domain.shutdown import Phase
from viralfx.resilience.breaker import CircuitBreaker
from viralfx.settings import Settings, read_settings


def problems(
    settings: Settings | None = None, *, checks: dict[str, HealthCheck] | None = None
) -> tuple[str, ...]:
    """Return the problems of settings and checks; empty if there are none."""
    try:
        assemble(settings or Settings(), checks=checks)
    except ConfigurationError as error:
        return error.problems
    return ()


def test_built_in_checks_come_first_and_in_order() -> None:
    """The four checks of docs/operations.md, `circuits`, then the application's own."""
    operations = assemble(Settings(), checks={"disk": ActingCheck()}).operations

    assert operations.monitor.checks == (
        "database",
        "redis",
        "memory",
        "queues",
        "circuits",
        "disk",
    )


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        (
            "database",
            CheckPolicy(
                interval=30.0,
                retry_interval=5.0,
                timeout=2.0,
                critical=True,
                required_for_readiness=True,
                shared=True,
            ),
        ),
        ("redis", CheckPolicy(interval=5.0, retry_interval=5.0, timeout=2.0, shared=True)),
        (
            "memory",
            CheckPolicy(
                interval=5.0,
                retry_interval=5.0,
                timeout=2.0,
                failure_threshold=2,
                recovery_threshold=2,
                critical=True,
            ),
        ),
        (
            "queues",
            CheckPolicy(
                interval=5.0, retry_interval=5.0, timeout=2.0, shared=True, follows="database"
            ),
        ),
        ("disk", CheckPolicy(interval=5.0, retry_interval=5.0, timeout=2.0)),
    ],
)
def test_default_policies_are_those_of_the_contract(name: str, policy: CheckPolicy) -> None:
    """Intervals, thresholds, criticality and readiness without any configuration."""
    operations = assemble(Settings(), checks={"disk": ActingCheck()}).operations

    assert policy == operations.monitor.policy(name)


def test_policies_follow_the_settings() -> None:
    """An application's check can be required for readiness or critical, and uses the thresholds."""
    settings = Settings(
        health_critical=("disk",),
        readiness_requires=("disk", "redis"),
        health_failure_threshold=3,
        health_check_interval=0.1,
        health_check_timeout=0.05,
    )
    monitor = assemble(settings, checks={"disk": ActingCheck()}).operations.monitor

    assert CheckPolicy(
        interval=0.1,
        retry_interval=0.1,
        timeout=0.05,
        failure_threshold=3,
        critical=True,
        required_for_readiness=True,
    ) == monitor.policy("disk")
    assert (
        monitor.policy("database").critical,
        monitor.policy("database").required_for_readiness,
    ) == (False, False)
    assert monitor.policy("redis").required_for_readiness
    assert monitor.policy("memory").failure_threshold == 3


@pytest.mark.parametrize("name", ["database", "redis", "memory", "queues", "circuits"])
def test_built_in_name_is_reserved(name: str) -> None:
    """An application cannot replace a built-in check."""
    assert (
        f"OperationsConfig.checks: {name!r} is a built-in check; choose another name",
    ) == problems(checks={name: ActingCheck()})


@pytest.mark.parametrize("name", ["live", "ready", "detailed", "shutdown", "Disk", "a/b", "", "1"])
def test_name_that_cannot_be_a_path_is_refused(name: str) -> None:
    """The name of a check is a path below ``/health``."""
    (line,) = problems(checks={name: ActingCheck()})

    assert line.startswith(f"OperationsConfig.checks: {name!r} cannot be a check's name; ")


def test_setting_with_an_unknown_check_gets_a_suggestion() -> None:
    """A typing error does not silently remove a check from readiness."""
    settings = Settings(health_critical=("databse",), readiness_requires=("xyz",))

    close, far = problems(settings)

    assert close == "HEALTH_CRITICAL: there is no check named 'databse'; did you mean database?"
    assert far == (
        "READINESS_REQUIRES: there is no check named 'xyz';"
        " there are database, redis, memory, queues, circuits"
    )


def test_application_stages_run_after_the_built_in_ones(clock: ManualClock) -> None:
    """Within their phases."""
    stage = ActingStage(clock=clock)
    operations = assemble(Settings(), stages={Phase.CLOSE: {"pool": stage}}, clock=clock).operations

    assert operations.shutdown.report().reason is None

    with pytest.raises(ValueError, match="'pool' already"):
        operations.shutdown.register(Phase.CLOSE, "pool", stage)


async def test_state_is_saved_at_shutdown_and_restored_at_start(
    clock: ManualClock, tmp_path: Path
) -> None:
    """Counters, last health and the reason of the shutdown."""
    settings = Settings(state_dir=str(tmp_path))
    first = assemble(settings, clock=clock).operations
    await first.start()
    await clock.settle()
    first.application_ready()
    await clock.advance(1.5)
    first.shutdown.trigger("SIGTERM")
    report = await first.shutdown.run()

    second = assemble(settings, clock=clock).operations
    await second.start()
    await clock.settle()
    await second.shutdown.run()
    third = assemble(settings, clock=clock).operations
    await third.start()
    previous = third.previous
    await third.shutdown.run()

    assert report.clean
    assert second.previous is not None
    assert (
        second.previous.starts,
        second.previous.uptime,
        second.previous.health,
        second.previous.shutdown_reason,
    ) == (1, 1.5, "healthy", "SIGTERM")
    assert second.previous.shutdown_phases == {"stop accepting": "ok", "drain": "ok"}
    assert {"database", "redis", "memory", "queues", "circuits"} == set(second.previous.checks)
    assert previous is not None
    assert (previous.starts, previous.transitions["database"]) == (2, 2)


async def test_lifecycle_follows_the_readiness_checks(clock: ManualClock) -> None:
    """Without any probe request."""
    disk = ActingCheck()
    operations = assemble(
        Settings(readiness_requires=("disk",)), checks={"disk": disk}, clock=clock
    ).operations
    await operations.start()
    operations.application_ready()
    await clock.settle()
    states = [operations.lifecycle.state]
    for act in (Act.FAIL, Act.PASS):
        disk.act = act
        await clock.advance(5.0)
        states.append(operations.lifecycle.state)
    await operations.shutdown.run()
    states.append(operations.lifecycle.state)

    assert states == [State.READY, State.NOT_READY, State.READY, State.STOPPED]


async def test_checks_of_the_application_begin_once_it_has_started(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, with an interval of any length; until then the instance is starting."""
    pool = ActingCheck(Act.RAISE)
    operations = assemble(
        Settings(readiness_requires=("pool",)),
        checks={"pool": CheckConfig(pool, interval=60.0)},
        clock=clock,
    ).operations
    await operations.start()
    await clock.advance(30.0)
    before = operations.monitor.report()
    pool.act = Act.PASS
    operations.application_ready()
    reason = operations.lifecycle.follow(operations.monitor.report())
    await clock.settle()
    state = operations.lifecycle.state
    await operations.shutdown.run()
    operations.application_ready()
    await clock.settle()

    assert (before.checks["pool"].code, before.started) == ("pending", False)
    assert before.checks["memory"].checked_at is not None
    assert (reason, state) == (NotReadyReason.STARTING, State.READY)
    assert pool.attempts == 1
    assert [line for line in caplog.records if line.levelno >= logging.ERROR] == []


async def test_start_is_idempotent(clock: ManualClock) -> None:
    """A lifespan and a runner may both start the layer."""
    disk = ActingCheck()
    operations = assemble(Settings(), checks={"disk": disk}, clock=clock).operations
    await operations.start()
    await operations.start()
    operations.application_ready()
    operations.application_ready()
    await clock.settle()
    await operations.shutdown.run()

    assert disk.attempts == 1
    assert operations.monitor.report().checks["disk"].status is Status.PASS


async def test_an_open_breaker_stays_open_over_a_restart(
    clock: ManualClock, tmp_path: Path
) -> None:
    """The application's breakers are part of the check ``circuits``.

    Their state is saved and restored.
    """
    settings = Settings(state_dir=str(tmp_path))
    breaker = CircuitBreaker(failure_threshold=1, open_for=60.0, name="users", clock=clock)
    first = assemble(settings, clock=clock, breakers=[breaker]).operations
    await first.start()
    await clock.settle()
    breaker.open()
    await clock.advance(6.0)
    warned = first.monitor.report().checks["circuits"]
    await first.shutdown.run()

    again = CircuitBreaker(failure_threshold=1, open_for=60.0, name="users", clock=clock)
    second = assemble(settings, clock=clock, breakers=[again]).operations
    completed: list[Observation] = []
    second.monitor.subscribe(
        lambda event: (
            completed.append(event.observation)
            if isinstance(event, CheckCompleted) and event.check == "circuits"
            else None
        )
    )
    starting = asyncio.create_task(second.start())
    await clock.settle()
    await starting
    await clock.settle()
    await second.shutdown.run()

    # The first check already sees the restored state.
    assert [observation.code for observation in completed] == ["circuit_open"]
    assert (warned.status, warned.code) == (Status.WARN, "circuit_open")
    assert again.get_state()["state"] == "OPEN"


def test_two_breakers_of_one_name_are_refused() -> None:
    """A name identifies one dependency."""
    twice = [CircuitBreaker(name="users"), CircuitBreaker(name="users")]

    with pytest.raises(ConfigurationError, match=r"OperationsConfig\.breakers: .*'users'"):
        assemble(Settings(), breakers=twice)


def test_migrations_have_the_password_of_their_own_address(tmp_path: Path) -> None:
    """In the address or in its file; DB_PASSWORD is that of the user in DATABASE_URL."""
    passwords = tmp_path / "pgpass"
    passwords.touch(mode=0o600)
    passwords.write_text("*:*:*:owner:of the owner\n")
    environ = {"DATABASE_URL": "postgresql://app@db/app", "DB_PASSWORD": "of the application"}

    def password(address: str) -> str | None:
        config = migration_config(read_settings({**environ, "DATABASE_MIGRATION_URL": address}))
        return None if config.settings.password is None else config.settings.password.value

    assert password("postgresql://owner:own@db/app") is None
    assert password(f"postgresql://owner@db/app?passfile={passwords}") is None
    assert password("postgresql://app@db/app") == "of the application"

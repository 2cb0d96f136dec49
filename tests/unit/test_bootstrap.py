"""The composition root: policies from settings, names that do not fit, state over a restart."""

from pathlib import Path

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck, ActingStage

from viralfx.bootstrap import assemble
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.health import CheckPolicy, HealthCheck, Status
from viralfx.domain.lifecycle import State
from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.shutdown import Phase
from viralfx.settings import Settings


def problems(
    settings: Settings | None = None, *, checks: dict[str, HealthCheck] | None = None
) -> tuple[str, ...]:
    """Return what is said about the settings and checks; nothing when they are fine."""
    try:
        assemble(settings or Settings(), checks=checks)
    except ConfigurationError as error:
        return error.problems
    return ()


def test_built_in_checks_come_first_and_in_order() -> None:
    """The guide's four checks, then the application's own."""
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
                gates_readiness=True,
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
def test_default_policies_are_the_contracts(name: str, policy: CheckPolicy) -> None:
    """Intervals, thresholds, criticality and gates without any configuration."""
    operations = assemble(Settings(), checks={"disk": ActingCheck()}).operations

    assert policy == operations.monitor.policy(name)


def test_policies_follow_the_settings() -> None:
    """An application's check can gate, be critical, and share the thresholds."""
    settings = Settings(
        health_critical=("disk",),
        readiness_requires=("disk", "redis"),
        health_failure_threshold=3,
        health_check_interval=100,
        health_check_timeout=50,
    )
    monitor = assemble(settings, checks={"disk": ActingCheck()}).operations.monitor

    assert CheckPolicy(
        interval=0.1,
        retry_interval=0.1,
        timeout=0.05,
        failure_threshold=3,
        critical=True,
        gates_readiness=True,
    ) == monitor.policy("disk")
    assert (
        monitor.policy("database").critical,
        monitor.policy("database").gates_readiness,
    ) == (False, False)
    assert monitor.policy("redis").gates_readiness
    assert monitor.policy("memory").failure_threshold == 3


@pytest.mark.parametrize("name", ["database", "redis", "memory", "queues", "circuits"])
def test_built_in_name_is_taken(name: str) -> None:
    """An application cannot replace a built-in check unseen."""
    assert (
        f"OperationsConfig.checks: {name!r} is a built-in check; choose another name",
    ) == problems(checks={name: ActingCheck()})


@pytest.mark.parametrize("name", ["live", "ready", "detailed", "shutdown", "Disk", "a/b", "", "1"])
def test_name_that_cannot_be_a_path_is_refused(name: str) -> None:
    """A check's name is a path below ``/health``."""
    (line,) = problems(checks={name: ActingCheck()})

    assert line.startswith(f"OperationsConfig.checks: {name!r} cannot be a check's name; ")


def test_setting_that_names_no_check_gets_a_suggestion() -> None:
    """A typing error does not silently take a check out of readiness."""
    settings = Settings(health_critical=("databse",), readiness_requires=("xyz",))

    close, far = problems(settings)

    assert close == "HEALTH_CRITICAL: there is no check named 'databse'; did you mean database?"
    assert far == (
        "READINESS_REQUIRES: there is no check named 'xyz';"
        " there are database, redis, memory, queues, circuits"
    )


def test_own_stages_come_behind_the_built_in_ones(clock: ManualClock) -> None:
    """An application's stages join their phases."""
    stage = ActingStage(clock=clock)
    operations = assemble(Settings(), stages={Phase.CLOSE: {"pool": stage}}, clock=clock).operations

    assert operations.shutdown.report().reason is None

    with pytest.raises(ValueError, match="'pool' already"):
        operations.shutdown.register(Phase.CLOSE, "pool", stage)


async def test_shutdown_saves_and_the_next_start_restores(
    clock: ManualClock, tmp_path: Path
) -> None:
    """Counters, last health and the reason of the stop reach the next process."""
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


async def test_process_follows_its_gates(clock: ManualClock) -> None:
    """Without any probe asking, the state of the process follows the checks."""
    disk = ActingCheck()
    operations = assemble(
        Settings(readiness_requires=("disk",)), checks={"disk": disk}, clock=clock
    ).operations
    await operations.start()
    await clock.settle()
    operations.application_ready()
    states = [operations.lifecycle.state]
    for act in (Act.FAIL, Act.PASS):
        disk.act = act
        await clock.advance(5.0)
        states.append(operations.lifecycle.state)
    await operations.shutdown.run()
    states.append(operations.lifecycle.state)

    assert states == [State.READY, State.NOT_READY, State.READY, State.STOPPED]


async def test_start_twice_is_harmless(clock: ManualClock) -> None:
    """A lifespan and a runner may both start the layer."""
    disk = ActingCheck()
    operations = assemble(Settings(), checks={"disk": disk}, clock=clock).operations
    await operations.start()
    await operations.start()
    await clock.settle()
    await operations.shutdown.run()

    assert disk.attempts == 1
    assert operations.monitor.report().checks["disk"].status is Status.PASS


async def test_an_open_breaker_stays_open_over_a_restart(
    clock: ManualClock, tmp_path: Path
) -> None:
    """The application's breakers are the check ``circuits``, saved at the stop and restored."""
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
    await second.start()
    await second.shutdown.run()

    assert (warned.status, warned.code) == (Status.WARN, "circuit_open")
    assert again.get_state()["state"] == "OPEN"


def test_two_breakers_of_one_name_are_refused() -> None:
    """A name stands for one dependency."""
    twice = [CircuitBreaker(name="users"), CircuitBreaker(name="users")]

    with pytest.raises(ConfigurationError, match=r"OperationsConfig\.breakers: .*'users'"):
        assemble(Settings(), breakers=twice)

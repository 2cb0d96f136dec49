"""Rules about the manifests and the program: variables, ports, paths, times."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from tests.deploy.manifests import ROOT, Container, Resource, containers, of_kind, selected

from viralfx.bootstrap import assemble
from viralfx.cli import _parser
from viralfx.core.errors import ConfigurationError
from viralfx.domain.doctor import Area, Finding, Verdict, failed
from viralfx.settings import Settings, fields, read_settings
from viralfx.settings.doctor import review
from viralfx.web.auth import AccessPolicy
from viralfx.web.endpoints import OperationsEndpoints

PROBES = {
    "livenessProbe": (
        "/health/live",
        {
            "initialDelaySeconds": 30,
            "periodSeconds": 15,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
    ),
    "readinessProbe": (
        "/health/ready",
        {"initialDelaySeconds": 10, "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 3},
    ),
    "startupProbe": ("/health/startup", {}),
}
"""The path of each probe, and its numbers in docs/operations.md."""

PHASES = (5.0, 30.0, 5.0, 15.0, 60.0)
"""Seconds of readiness delay, drain, state, connections and forced end: docs/operations.md."""
GRACE = 75

_SAMPLES = {
    "DATABASE_URL": "postgresql://app:0123456789abcdef@db.production.internal/app",
    "DATABASE_MIGRATION_URL": "postgresql://owner:0123456789abcdef@db.production.internal/app",
    "WEBHOOK_SECRET": "whsec_" + "c2Vj" * 8,
    "WEBHOOK_KEYS": "hooks.example.com=whsec_" + "b3du" * 8,
    "WEBHOOK_SHARED_SECRET": "whsec_" + "Zm9y" * 8,
    "ALERT_WEBHOOK_SECRET": "whsec_" + "YWxy" * 8,
    "ALERT_WEBHOOK_URL": "https://hooks.production.internal/alerts",
}


def rules_of_the_program(name: str, resources: list[Resource]) -> Iterator[str]:
    """Yield the problems of an overlay, one line each, with the rule's name before it."""
    # The overlays set the values that depend on the environment.
    unsaid = {Area.DATABASE, Area.REDIS} if name == "base" else set()
    for container in containers(resources):
        yield from (f"variables: {container.where}: {p}" for p in _sources(container, resources))
        settings, findings = settings_of(container, resources)
        problems = [finding.found for finding in findings if finding.area not in unsaid]
        yield from (f"variables: {container.where}: {problem}" for problem in problems)
        yield from (f"command: {container.where}: {p}" for p in _command(container))
        yield from (f"init: {container.where}: {p}" for p in _init(container))
        if settings is None or container.command not in {"serve", "worker"}:
            continue
        yield from (f"ports: {container.where}: {p}" for p in _ports(container, settings))
        yield from (f"probes: {container.where}: {p}" for p in _probes(container, settings))
        yield from (f"budgets: {container.where}: {p}" for p in _budgets(container, settings))
        for policy in of_kind(resources, "NetworkPolicy"):
            if selected(policy["spec"].get("podSelector", {}), container.labels):
                found = _network(policy["spec"], container, settings)
                yield from (f"network: {container.where}: {p}" for p in found)


def settings_of(
    container: Container, resources: list[Resource]
) -> tuple[Settings | None, list[Finding]]:
    """Return the settings that the program would read there, and the findings about them."""
    environ = container.variables(resources)
    for name in environ.keys() & {field.variable for field in fields() if field.secret}:
        environ[name] = _SAMPLES.get(name, f"c0a8e1f59d3b7264-{name.lower()}")
    return _read(container.command, tuple(environ.items()))


@cache
def _read(
    command: str, variables: tuple[tuple[str, str], ...]
) -> tuple[Settings | None, list[Finding]]:
    environ = dict(variables)
    try:
        settings = read_settings(environ, strict=True, with_api=command == "serve")
    except ConfigurationError as error:
        return None, [failed(Area.ENVIRONMENT, problem, "see there") for problem in error.problems]
    found = review(settings, environ) if command in {"serve", "worker"} else []
    if not settings.in_production:
        found.append(failed(Area.ENVIRONMENT, f"ENVIRONMENT={settings.environment}", "say so"))
    return settings, [f for f in found if f.verdict in {Verdict.WARN, Verdict.FAIL}]


def _sources(container: Container, resources: list[Resource]) -> Iterator[str]:
    """Every name is a setting; secrets, and only secrets, come from the Secret."""
    known = {field.variable: field for field in fields()}
    secrets = {one["name"]: one for one in container.spec.get("env", ())}
    for name, key in container.variables(resources).items():
        if name not in known:
            yield f"{name} is no variable of the program"
        elif name in OF_ONE_CONTAINER and "value" in secrets.get(name, {}):
            continue
        elif known[name].secret != (name in secrets):
            yield f"{name} comes from the wrong place"
        elif name in secrets:
            reference = secrets[name].get("valueFrom", {}).get("secretKeyRef", {})
            if (reference.get("name"), key) != ("viralfx-secrets", name):
                yield f"{name} is not the key of that name in viralfx-secrets"
            if reference.get("optional", False) != (name in OPTIONAL):
                yield f"{name}: whether there must be one is said wrongly"
    needed = NEEDED.get(container.command, set()) - container.variables(resources).keys()
    yield from (f"{name} is not given" for name in sorted(needed))


_BACKENDS = {"ENVIRONMENT", "DATABASE_URL", "REDIS_HOST"}
_LONG_LIVED = {
    *_BACKENDS,
    "REDIS_PASSWORD",
    "MANAGEMENT_TOKEN",
    "WEBHOOK_SECRET",
    "WEBHOOK_KEYS",
    "WEBHOOK_SHARED_SECRET",
    "ALERT_WEBHOOK_SECRET",
    "ALERT_WEBHOOK_URL",
    "DB_HEALTH_CHECK_INTERVAL",
    "SHUTDOWN_READINESS_DELAY",
    "SHUTDOWN_GRACE_PERIOD",
}
OF_ONE_CONTAINER = {"MANAGEMENT_PORT"}
"""Variables that differ between the containers of a pod, and so are no part of the ConfigMap."""
NEEDED = {
    "serve": {*_LONG_LIVED, *OF_ONE_CONTAINER, "API_TOKEN"},
    "worker": _LONG_LIVED,
    "migrate": {*_BACKENDS, "DATABASE_MIGRATION_URL"},
}
"""The variables that each command needs; a command gets no secret that it does not need."""
OPTIONAL = {
    "DATABASE_MIGRATION_URL",
    "WEBHOOK_SECRET",
    "WEBHOOK_KEYS",
    "WEBHOOK_SHARED_SECRET",
    "ALERT_WEBHOOK_SECRET",
    "ALERT_WEBHOOK_URL",
}


def _command(container: Container) -> Iterator[str]:
    arguments = container.spec["args"]
    if container.command not in NEEDED:
        yield f"{container.command} is none of {', '.join(NEEDED)}"
        return
    if not _is_known(tuple(arguments)):
        yield f"{container.command} is no command of the program"
    given = {one["name"] for one in container.spec.get("env", ())}
    if more := given - NEEDED[container.command]:
        yield f"it has no need of {', '.join(sorted(more))}"


def _init(container: Container) -> Iterator[str]:
    """Check that nothing replaces the entry point, which starts the init as PID 1."""
    if "command" in container.spec:
        yield f"command {container.spec['command']} bypasses the image's init; use args"


@cache
def _is_known(arguments: tuple[str, ...]) -> bool:
    try:
        _parser().parse_args(arguments)
    except SystemExit:
        return False
    return True


def _listens(container: Container, settings: Settings) -> set[int]:
    if container.command == "worker":
        return {settings.worker_management_port}
    return {settings.port} | ({settings.management_port} if settings.management_port else set())


def _ports(container: Container, settings: Settings) -> Iterator[str]:
    """Check that the container listens on its declared ports, and no other one of the pod does."""
    declared = [port["containerPort"] for port in container.spec.get("ports", ())]
    listens = _listens(container, settings)
    if set(declared) != listens:
        yield f"declares {declared}, listens on {sorted(listens)}"
    others = [c for c in container.neighbours if c.spec["name"] != container.spec["name"]]
    taken = {port["containerPort"] for c in others for port in c.spec.get("ports", ())}
    if taken & listens:
        yield f"{taken & listens} are taken by another container of the pod"
    job = "viralfx-worker" if container.command == "worker" else "viralfx-backend"
    if (scraped := _scraped(job)) not in listens:
        yield f"prometheus.yml scrapes {job} at {scraped}"
    said = (
        f"a worker at {settings.worker_management_port}"
        if container.command == "worker"
        else f"the service at port {settings.port},"
    )
    if said not in _runbook():
        yield "the runbook uses other ports"


@cache
def _scraped(job: str) -> int:
    path = ROOT / "deploy/observability/prometheus.yml"
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["scrape_configs"]
    (scrape,) = (one for one in jobs if one["job_name"] == job)
    if scrape["metrics_path"] not in endpoints():
        return -1
    if "dns_sd_configs" in scrape:
        return int(scrape["dns_sd_configs"][0]["port"])
    return int(scrape["static_configs"][0]["targets"][0].rpartition(":")[2])


@cache
def _runbook() -> str:
    return " ".join((ROOT / "docs/runbook.md").read_text(encoding="utf-8").split())


@cache
def endpoints() -> frozenset[str]:
    """Return the paths that the operations layer answers in every process."""
    settings = Settings()
    assembly = assemble(settings)
    access = AccessPolicy.from_settings(settings)
    return frozenset(OperationsEndpoints(assembly.operations, access, assembly.metrics).endpoints)


def _probes(container: Container, settings: Settings) -> Iterator[str]:
    probes = {kind: container.spec[kind] for kind in PROBES if kind in container.spec}
    expected = set(PROBES)
    if container.command == "worker" and len(container.neighbours) > 1:
        # It would remove the API in the same pod from the Service.
        expected -= {"readinessProbe"}
    if probes.keys() != expected:
        yield f"has {sorted(probes)}, not {sorted(expected)}"
    for kind, probe in probes.items():
        path, numbers = PROBES[kind]
        asked = probe.get("httpGet", {})
        if asked.get("path") != path or path not in endpoints():
            yield f"{kind} asks {asked.get('path')}"
        if container.port(asked.get("port", "")) != _asked(container, kind, settings):
            yield f"{kind} asks at {asked.get('port')}"
        if wrong := {n for n, v in numbers.items() if probe.get(n) != v}:
            yield f"{kind}: {sorted(wrong)} differ from docs/operations.md"
    yield from _start(container, probes.get("startupProbe", {}), settings)


def _asked(container: Container, kind: str, settings: Settings) -> int | None:
    """Return the port for a probe: only readiness depends on the port of the clients."""
    if container.command == "worker":
        return settings.worker_management_port
    return settings.port if kind == "readinessProbe" else settings.management_port


def _start(container: Container, probe: dict[str, Any], settings: Settings) -> Iterator[str]:
    """Check that the startup probe outlasts a failing start, and a roll-out the probe."""
    db = settings.db
    attempts = db.max_reconnect_attempts * db.connection_timeout
    longest = attempts + (db.max_reconnect_attempts - 1) * db.reconnect_delay
    allowed = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
    if not longest < allowed <= longest + 60:
        yield f"startupProbe waits {allowed} s, a start takes up to {longest:g} s"
    if (
        probe.get("initialDelaySeconds")
        or probe.get("timeoutSeconds") != 3
        or probe.get("periodSeconds", 10) > 5
    ):
        yield "startupProbe is slow"
    if container.workload["spec"].get("progressDeadlineSeconds", 0) < 2 * allowed:
        yield "progressDeadlineSeconds ends before a start may"


def _budgets(container: Container, settings: Settings) -> Iterator[str]:
    """Phases are those of docs/operations.md, and fit into each other and the grace period."""
    b = settings.shutdown_budgets
    phases = (b.readiness_delay, b.drain, b.state, b.connections, b.force)
    if phases != PHASES:
        yield f"the phases are {phases}, not {PHASES}"
    granted = container.pod.get("terminationGracePeriodSeconds", 30)
    known = settings.shutdown_grace_period or 0.0
    if not granted == known == GRACE:
        yield f"{granted} s are granted, the program knows {known:g} s, and {GRACE} s are right"
    if granted < b.force + 10:
        yield f"{granted} s are granted for {b.force:g} s and a margin"
    if "lifecycle" in container.spec:
        yield "a hook would use up the grace period"
    if settings.db.health_check_interval > 5.0:
        yield "an outage of the database is noticed late"


def _network(policy: dict[str, Any], container: Container, settings: Settings) -> Iterator[str]:
    """Check that the policy admits traffic to the ports and to the needed servers."""
    entries = [port for rule in policy.get("ingress", ()) for port in rule.get("ports", ())]
    for port in _listens(container, settings):
        if port not in {container.port(entry["port"]) for entry in entries}:
            yield f"the policy blocks port {port}"
    exits = {
        (port["port"], port.get("protocol", "TCP"))
        for rule in policy.get("egress", ())
        for port in rule.get("ports", ())
    }
    if settings.database_address is None:
        return
    needed = {
        ("a name server", 53, "UDP"),
        ("a name server", 53, "TCP"),
        ("Postgres", settings.database_address.port, "TCP"),
        ("Redis", settings.redis.port, "TCP"),
        ("a Sentinel", 26379, "TCP"),
        ("a webhook", 443, "TCP"),
        *(("a collector", port, "TCP") for port in _receivers()),
    }
    yield from (
        f"cannot reach {server} at {port}"
        for server, port, kind in needed
        if (port, kind) not in exits
    )
    if more := exits - {(port, kind) for _, port, kind in needed}:
        yield f"may reach {sorted(more)} without need"


@cache
def _receivers() -> list[int]:
    path = ROOT / "deploy/observability/otel-collector.yml"
    receivers = yaml.safe_load(path.read_text(encoding="utf-8"))["receivers"]["otlp"]["protocols"]
    return [int(receiver["endpoint"].rpartition(":")[2]) for receiver in receivers.values()]

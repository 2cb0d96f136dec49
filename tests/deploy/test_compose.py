"""deploy/compose.yaml, read: it agrees with the code, the manifests and the files beside it."""

import re
from typing import Any

import pytest
import yaml
from tests.deploy.engine import ROOT

from viralfx.cli import _parser
from viralfx.settings import Settings, read_settings
from viralfx.settings.model import WORKER_MANAGEMENT_PORT

FOLDER = ROOT / "deploy"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(
    (FOLDER / "compose.yaml").read_text(encoding="utf-8")
)["services"]
PROGRAM_SERVICES = {name: service for name, service in SERVICES.items() if "build" in service}
PROGRAMS = ("migrate", "backend", "worker")


def seconds(text: str) -> int:
    """Read a duration such as 75s."""
    return int(text.removesuffix("s"))


def deployment() -> dict[str, Any]:
    """Return the pods of the manifests."""
    text = (FOLDER / "kustomize/base/deployment.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_contained_and_pinned(name: str) -> None:
    """No capabilities, no write access except to named volumes, and a pinned image."""
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "cap_add" not in service
    assert re.search(r":v?\d[\d.]*$|:-viralfx-backend:trial\}$", service["image"])
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_run_with_settings_that_it_takes(name: str) -> None:
    """Every variable is known and every value valid, also in production."""
    given = {**PROGRAM_SERVICES[name]["environment"], "ENVIRONMENT": "production"}
    for variable in [variable for variable in given if variable.endswith("_FILE")]:
        # Another test checks the paths of the files.
        assert given.pop(variable).startswith("/run/secrets/")
        given[variable.removesuffix("_FILE")] = f"planted-Qw7rT2zXk9Lm4vNc-{variable}"
    endpoint = given.pop("OTEL_EXPORTER_OTLP_ENDPOINT")

    settings = read_settings(given, strict=True, with_api=name == "backend")

    assert endpoint == "${OTEL_EXPORTER_OTLP_ENDPOINT:-}"
    granted = seconds(PROGRAM_SERVICES[name]["stop_grace_period"])
    assert settings.shutdown_grace_period == granted
    assert settings.database_address is not None
    assert settings.database_address.host in SERVICES
    assert settings.redis.host in SERVICES


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_secret_is_in_a_volume_that_the_program_only_reads(name: str) -> None:
    """The service that generates the secrets fills the volume."""
    made = {volume.split(":")[1] for volume in SERVICES["secrets"]["volumes"]}
    mounted = {volume.split(":")[1] for volume in PROGRAM_SERVICES[name]["volumes"]}
    named = [v for k, v in PROGRAM_SERVICES[name]["environment"].items() if k.endswith("_FILE")]
    script = SERVICES["secrets"]["command"][0]

    assert {volume.rpartition(":")[2] for volume in PROGRAM_SERVICES[name]["volumes"]} == {"ro"}
    assert mounted <= made
    for path in named:
        assert path.rpartition("/")[0] in mounted
        assert path.removeprefix("/run/secrets/") in script


def test_only_migrations_have_the_rights_of_the_owner() -> None:
    """The others connect as the role of postgres/service-role.sql, and lack its password."""
    script = (FOLDER / "postgres/service-role.sql").read_text(encoding="utf-8")
    owner = SERVICES["postgres"]["environment"]["POSTGRES_USER"]
    (role,) = re.findall(r"CREATE ROLE (\w+) ", script)
    owners = SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"]
    users = {
        name: (
            read_settings({"DATABASE_URL": each["environment"]["DATABASE_URL"]}).database_address,
            each["environment"]["DB_PASSWORD_FILE"],
            any(owners.startswith(volume.split(":")[1]) for volume in each["volumes"]),
        )
        for name, each in PROGRAM_SERVICES.items()
        if name in PROGRAMS
    }

    assert {
        name: (address.user if address else None, password == owners, mounted)
        for name, (address, password, mounted) in users.items()
    } == {
        "migrate": (owner, True, True),
        "backend": (role, False, False),
        "worker": (role, False, False),
    }
    assert SERVICES["migrate"]["depends_on"].keys() == {"roles"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_command_and_its_probe_are_the_programs(name: str) -> None:
    """The command line accepts them."""
    service = PROGRAM_SERVICES[name]
    assert callable(_parser().parse_args(service["command"]).run)
    if name == "migrate":
        assert service["healthcheck"] == {"disable": True}
        return
    kind, program, *arguments = service["healthcheck"]["test"]
    probe = _parser().parse_args(arguments)

    assert (kind, program) == ("CMD", "viralfx")
    assert (probe.kind, probe.worker) == ("ready", name == "worker")
    assert probe.timeout < seconds(service["healthcheck"]["timeout"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_init_of_the_image_is_the_first_process(name: str) -> None:
    """Nothing replaces the image's entry point, and no second init stands before it."""
    assert not {"entrypoint", "init", "pid"} & PROGRAM_SERVICES[name].keys()


def test_it_agrees_with_the_manifests() -> None:
    """The limits of time and memory are equal, so that the trial exercises them."""
    pod = deployment()
    limits = {container["resources"]["limits"]["memory"] for container in pod["containers"]}

    assert {seconds(PROGRAM_SERVICES[name]["stop_grace_period"]) for name in PROGRAMS} == {
        pod["terminationGracePeriodSeconds"]
    }
    assert {
        f"{PROGRAM_SERVICES[name]['mem_limit'].removesuffix('m')}Mi" for name in PROGRAMS
    } == limits


def test_the_ports_are_those_of_the_settings() -> None:
    """Only the API is published, at the documented port."""
    port = Settings().port

    assert SERVICES["backend"]["ports"] == [f"127.0.0.1:${{VIRALFX_PORT:-{port}}}:{port}"]
    assert [name for name in PROGRAM_SERVICES if "ports" in PROGRAM_SERVICES[name]] == ["backend"]


@pytest.mark.parametrize("path", ["docs/deployment.md", "deploy/compose.yaml"])
def test_the_first_commands_are_right(path: str) -> None:
    """The documented command reads the token that the API reads."""
    text = (ROOT / path).read_text(encoding="utf-8")
    compose = "docker compose -f deploy/compose.yaml"
    fetched = re.search(rf"{compose} exec -T backend cat (\S+?)\)?$", text, re.MULTILINE)

    assert re.search(rf"^[# ]*{compose} up --wait$", text, re.MULTILINE)
    assert fetched
    assert fetched[1] == SERVICES["backend"]["environment"]["API_TOKEN_FILE"]


def test_mounted_files_exist() -> None:
    """A file that is missing would become an empty folder."""
    mounted = [
        volume.split(":")
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if volume.startswith(".")
    ]

    assert len(mounted) == 7
    assert [source for source, _, mode in mounted if not (FOLDER / source).is_file()] == []
    assert {mode for _, _, mode in mounted} == {"ro"}


def test_prometheus_finds_the_programs_and_grafana_prometheus() -> None:
    """Each by the name of a service and a port where it listens."""
    read = yaml.safe_load
    observability = FOLDER / "observability"
    scrapes = read((observability / "prometheus.yml").read_text())["scrape_configs"]
    jobs = {scrape["job_name"]: scrape for scrape in scrapes}
    [source] = read((observability / "grafana/datasources.yml").read_text())["datasources"]
    [provider] = read((observability / "grafana/dashboards.yml").read_text())["providers"]
    dashboard = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    [workers] = jobs["viralfx-worker"]["dns_sd_configs"]

    assert jobs["viralfx-backend"]["static_configs"] == [
        {"targets": [f"backend:{Settings().port}"]}
    ]
    assert (workers["names"], workers["port"]) == (["worker"], WORKER_MANAGEMENT_PORT)
    assert source["url"] == "http://prometheus:9090"
    assert f"./observability/dashboard.json:{dashboard}:ro" in SERVICES["grafana"]["volumes"]
    assert dashboard.startswith(f"{provider['options']['path']}/")
    profiles = {name for name, service in SERVICES.items() if service.get("profiles")}
    assert profiles == {"prometheus", "grafana", "otel-collector"}

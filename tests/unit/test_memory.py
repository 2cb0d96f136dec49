"""The memory check: the limit in force, and the usage of the process."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from viralfx.adapters.process_memory import ProcessMemory, memory_limit
from viralfx.core.errors import StartupError
from viralfx.domain.health.model import Observation, ProcessUsage, Status
from viralfx.settings.platform import require_memory

MIB = 2**20
HOST = 64 * MIB
"""The memory of the fake host."""
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"

Root = Callable[[str, dict[str, str]], Path]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Return a factory of root folders with a ``/proc/self/cgroup`` and other files."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: {HOST // 1024} kB\nMemFree: 1 kB\nMemAvailable: 1 kB\nBuffers: 0 kB\n"
        "Cached: 0 kB\nActive: 0 kB\nInactive: 0 kB\nShmem: 0 kB\nSlab: 0 kB\n"
    )

    def make(cgroup: str, files: dict[str, str]) -> Path:
        (proc / "self" / "cgroup").write_text(cgroup)
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))
    return make


# -- the limit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/\n", {f"{V2}/memory.max": "1000\n"}, 1000),
        ("0::/pod/app\n", {f"{V2}/pod/app/memory.max": "1000\n"}, 1000),
        (
            "0::/pod/app\n",
            {f"{V2}/pod/app/memory.max": "2000\n", f"{V2}/pod/memory.max": "1000\n"},
            1000,
        ),
        (
            "0::/pod/app\n",
            {f"{V2}/pod/app/memory.max": "1000\n", f"{V2}/pod/memory.max": "2000\n"},
            1000,
        ),
        (
            "0::/pod/app\n",
            {f"{V2}/pod/app/memory.max": "max\n", f"{V2}/pod/memory.max": "1000\n"},
            1000,
        ),
        ("0::/not/below/the/mount\n", {f"{V2}/memory.max": "1000\n"}, 1000),
        ("0::/../../outside\n", {f"{V2}/memory.max": "1000\n"}, 1000),
        ("0::/with:colon\n", {f"{V2}/with:colon/memory.max": "1000\n"}, 1000),
        ("0::/\n", {f"{V2}/memory.max": "max\n"}, HOST),
        ("0::/\n", {}, HOST),
        ("0::/\n", {f"{V2}/memory.max": ""}, HOST),
        ("0::/\n", {f"{V2}/memory.max": "many\n"}, HOST),
        ("0::/\n", {f"{V2}/memory.max": "0\n"}, HOST),
        ("0::/\n", {f"{V2}/memory.max": f"{10 * HOST}\n"}, HOST),
        ("", {f"{V2}/memory.max": "1000\n"}, HOST),
        ("4:memory:/app\n", {f"{V1}/app/memory.limit_in_bytes": "1000\n"}, 1000),
        ("4:cpu,memory:/app\n", {f"{V1}/memory.limit_in_bytes": "1000\n"}, 1000),
        (
            "4:memory:/pod/app\n",
            {
                f"{V1}/pod/app/memory.limit_in_bytes": "2000\n",
                f"{V1}/memory.limit_in_bytes": "1000",
            },
            1000,
        ),
        ("4:memory:/\n", {f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"}, HOST),
        ("4:cpu:/app\n", {f"{V1}/app/memory.limit_in_bytes": "1000\n"}, HOST),
        ("4:memoryless:/\n", {f"{V1}/memory.limit_in_bytes": "1000\n"}, HOST),
        (
            "4:memory:/app\n1:name=systemd:/\n0::/app\n",
            {f"{V1}/app/memory.limit_in_bytes": "1000\n"},
            1000,
        ),
        (
            "4:memory:/app\n0::/app\n",
            {f"{V1}/app/memory.limit_in_bytes": "2000", f"{V2}/app/memory.max": "1000"},
            1000,
        ),
    ],
    ids=[
        "v2 in a namespace",
        "v2",
        "v2, the parent has less",
        "v2, the parent has more",
        "v2, only the parent has a limit",
        "v2, path not below the mount",
        "v2, path outside the namespace",
        "v2, colon in the path",
        "v2, no limit",
        "v2, missing file",
        "v2, empty file",
        "v2, nonsense",
        "v2, zero",
        "v2, more than the host",
        "no group",
        "v1",
        "v1, mount's own file",
        "v1, the parent has less",
        "v1, no limit",
        "v1, another controller",
        "v1, another name",
        "hybrid, limit in v1",
        "hybrid, limit in both",
    ],
)
def test_limit_in_force(root: Root, cgroup: str, files: dict[str, str], limit: int) -> None:
    """The lowest of the limits of all control groups and the host's memory is in force."""
    assert limit == memory_limit(root(cgroup, files))


def test_without_control_groups_the_host_is_the_limit(root: Root) -> None:
    """Without ``/proc/self/cgroup`` the limit is the host's memory."""
    folder = root("", {})
    (folder / "proc/self/cgroup").unlink()

    assert memory_limit(folder) == HOST


def test_limit_of_the_test_process_is_plausible() -> None:
    """It is at most the machine's memory."""
    assert 0 < memory_limit() <= psutil.virtual_memory().total


# -- the check -------------------------------------------------------------------------------


@pytest.fixture
def observe(root: Root) -> Callable[[int, int], "ProcessMemory"]:
    """Return a factory of checks for a process with resident and private pages, out of 100.

    The fake root contains this process's folder, so that psutil reads the numbers from there.
    """

    def make(resident: int, own: int) -> ProcessMemory:
        page = os.sysconf("SC_PAGE_SIZE")
        folder = root("0::/\n", {f"{V2}/memory.max": str(100 * page)})
        process = folder / "proc" / str(os.getpid())
        process.mkdir()
        shutil.copy(f"/proc/{os.getpid()}/stat", process / "stat")
        shutil.copy("/proc/stat", folder / "proc" / "stat")
        kilobytes = own * page // 1024
        for name in ("smaps", "smaps_rollup"):
            (process / name).write_text(
                f"00400000-00500000 ---p 00000000 00:00 0 [rollup]\n"
                f"Rss: {resident * page // 1024} kB\nPss: {kilobytes} kB\n"
                f"Private_Clean: 0 kB\nPrivate_Dirty: {kilobytes} kB\nSwap: 0 kB\n"
            )
        (process / "statm").write_text(f"200 {resident} 10 5 0 50 0\n")
        return ProcessMemory(folder)

    return make


@pytest.mark.parametrize(
    ("resident", "status", "code", "message"),
    [
        (1, Status.PASS, None, "Memory usage is normal"),
        (74, Status.PASS, None, "Memory usage is normal"),
        (75, Status.WARN, "usage_high", "Memory usage is high"),
        (89, Status.WARN, "usage_high", "Memory usage is high"),
        (90, Status.FAIL, "usage_critical", "Memory usage is critical"),
        (100, Status.FAIL, "usage_critical", "Memory usage is critical"),
        (150, Status.FAIL, "usage_critical", "Memory usage is critical"),
    ],
)
async def test_thresholds(
    observe: Callable[[int, int], ProcessMemory],
    resident: int,
    status: Status,
    code: str | None,
    message: str,
) -> None:
    """The check warns from exactly 75 % of the limit, and fails from exactly 90 %."""
    observation = await observe(resident, 1).check()

    assert (status, code, message) == (
        observation.status,
        observation.code,
        observation.message,
    )
    assert isinstance(observation.details, dict)
    assert f"{resident}.00%" == observation.details["usagePercent"]


async def test_usage_maps_to_the_documented_fields(
    observe: Callable[[int, int], ProcessMemory],
) -> None:
    """``heapUsed`` is the private memory, ``external`` the shared memory, in bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    memory = observe(60, 40)
    await memory.check()
    usage = memory.usage

    assert (60 * page, 40 * page, 20 * page, 100 * page) == (
        usage.rss,
        usage.heap_used,
        usage.external,
        usage.heap_total,
    )
    assert pytest.approx(usage.ratio) == 0.6


async def test_usage_is_the_last_checks_reading(
    observe: Callable[[int, int], ProcessMemory], tmp_path: Path
) -> None:
    """Reading the usage makes no system call, so that responses stay cheap."""
    memory = observe(50, 10)
    await memory.check()
    before = memory.usage
    (tmp_path / "proc" / str(os.getpid()) / "statm").write_text("200 99 10 5 0 50 0\n")

    assert before is memory.usage

    await memory.check()

    assert 99 * os.sysconf("SC_PAGE_SIZE") == memory.usage.rss


def test_usage_before_the_first_check_is_read(
    observe: Callable[[int, int], ProcessMemory],
) -> None:
    """The usage is available before the first check."""
    assert 50 * os.sysconf("SC_PAGE_SIZE") == observe(50, 10).usage.rss


def test_shared_memory_is_never_negative() -> None:
    """The two numbers are read at different moments, so their difference may be negative."""
    usage = ProcessUsage(rss=10, heap_used=12, heap_total=100, cpu_percent=0.0)

    assert usage.external == 0


async def test_the_test_process_can_be_checked() -> None:
    """The check works with the real numbers of the machine."""
    observation = await ProcessMemory().check()

    assert isinstance(observation, Observation)
    assert observation.status in Status


def test_unusual_group_names_and_lines_are_handled(root: Root) -> None:
    """A name with non-ASCII letters is found, a malformed line is ignored."""
    folder = root("nonsense\n0::/pöd\n", {f"{V2}/pöd/memory.max": "1000\n"})

    assert memory_limit(folder) == 1000


# -- too little memory ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max", f"{64 * MIB}"])
def test_a_start_with_enough_memory_is_allowed(root: Root, limit: str) -> None:
    """There is no limit, or it is exactly the minimum."""
    require_memory(root("0::/pod\n", {f"{V2}/pod/memory.max": limit}))


def test_a_start_with_too_little_memory_is_refused(root: Root) -> None:
    """The limit of any group on the path counts."""
    files = {f"{V2}/pod/memory.max": f"{32 * MIB}", f"{V2}/pod/app/memory.max": "max"}

    with pytest.raises(StartupError) as refused:
        require_memory(root("0::/pod/app\n", files))
    assert str(refused.value) == (
        "the memory limit is 32 MiB, but a start needs 64 MiB; raise it to 256 MiB or more"
    )

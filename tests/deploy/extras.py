"""Environments of the distribution with some of its extras, from the packages installed here.

``python -m tests.deploy.extras`` prints the table of docs/installation.md.
"""

import contextlib
import os
import tomllib
from collections.abc import Collection, Iterator
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from importlib.util import cache_from_source
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

HIDE = '''"""Makes imports fail as if only some packages were installed."""
import sys

HIDDEN = frozenset({hidden!r})


class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hide)
'''


@cache
def declared() -> dict[str, list[Requirement]]:
    """Return the extras and their requirements; the empty name has those of every installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    by_extra = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: list(map(Requirement, lines)) for name, lines in by_extra.items()}


def packages_of(extras: Collection[str]) -> set[str]:
    """Return the names of all packages that an installation with these extras brings."""
    found: set[str] = set()
    left = [r for extra in {"", *extras} for r in _declared(extra)]
    done = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in done:
            continue
        done.add(key)
        if name == "viralfx":
            left += [r for extra in requirement.extras for r in _declared(extra)]
            continue
        found.add(name)
        wanted = {"", *requirement.extras}
        left += [r for r in _requires(name) if _applies(r, wanted)]
    return found


def _declared(extra: str) -> list[Requirement]:
    return [r for r in declared()[extra] if _applies(r, {""})]


def _applies(requirement: Requirement, extras: Collection[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


@cache
def _requires(name: str) -> tuple[Requirement, ...]:
    try:
        return tuple(map(Requirement, distribution(name).requires or ()))
    except PackageNotFoundError:  # for other systems or versions of Python
        return ()


def environment_of(extras: Collection[str], folder: Path) -> dict[str, str]:
    """Return variables for a Python that finds only the packages of these extras.

    ``folder`` is for a file that hides the others.
    """
    kept = packages_of(extras)
    visible, hidden = set[str](), set[str]()
    for name, modules in _installed():
        if name != "viralfx":
            (visible if name in kept else hidden).update(modules)
    (folder / "sitecustomize.py").write_text(HIDE.format(hidden=sorted(hidden - visible)))
    clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    return {**clean, "PYTHONPATH": str(folder)}


@cache
def _installed() -> list[tuple[str, frozenset[str]]]:
    """Return each package that is installed here with its modules."""
    return [(canonicalize_name(each.name), frozenset(_modules(each))) for each in distributions()]


def _modules(package: Distribution) -> Iterator[str]:
    """Yield the modules at the top of a package, and the packages below it."""
    for file in package.files or ():
        path = PurePosixPath(file)
        if path.suffix in {".py", ".so"} and ".." not in path.parts:
            parent = ".".join(path.parent.parts)
            yield parent or path.name.partition(".")[0]


def size_of(extras: Collection[str]) -> float:
    """Return the size of the packages of an installation with these extras, in MiB.

    It includes the byte code of modules, whether or not the installer has listed that.
    """
    files: dict[str, int] = {}
    for name in packages_of(extras):
        files |= _files(name)
    return sum(files.values()) / 2**20


@cache
def _files(name: str) -> dict[str, int]:
    """Return the files of a package that are here, with the size of each in bytes."""
    found: dict[str, int] = {}
    with contextlib.suppress(PackageNotFoundError):
        for file in distribution(name).files or ():
            path = str(file.locate())
            for each in (path, cache_from_source(path)) if path.endswith(".py") else (path,):
                with contextlib.suppress(OSError):
                    if S_ISREG((status := Path(each).stat()).st_mode):
                        found[each] = status.st_size
    return found


def table() -> Iterator[tuple[str, int, float]]:
    """Yield each extra with the number of its packages and their size, dependencies included."""
    for extra in declared():
        yield extra, len(packages_of([extra])), size_of([extra])


if __name__ == "__main__":
    for name, number, size in table():
        print(f"| `{name or 'none'}` | {number} | {size:.0f} MiB |")

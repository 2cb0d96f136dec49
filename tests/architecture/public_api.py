"""Describes the public names: ``python -m tests.architecture.public_api`` prints them.

``just api`` renews the description beside this file, which a test compares with the code.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]
DESCRIPTION = Path(__file__).with_name("public_api.txt")

MODULES = ("viralfx", "viralfx.asgi", "viralfx.checks", "viralfx.taskiq", "viralfx.testing")
"""Modules that an application may import; the names in their ``__all__`` are public."""

SPECIAL = {"__aenter__", "__aexit__", "__await__", "__call__", "__enter__", "__exit__"}
"""Methods that belong to a form of use. The parameters of a class stand beside its name."""


def description(root: Path = ROOT) -> str:
    """Return one line for each public name and for each public member of a class."""
    loader = griffe.GriffeLoader(search_paths=[root / "src"], allow_inspection=False)
    package = loader.load("viralfx")
    loader.resolve_aliases(external=False)
    return "".join(
        f"{line}\n"
        for name in MODULES
        for line in _module(package if name == "viralfx" else package[name.partition(".")[2]])
    )


def _module(module: griffe.Object | griffe.Alias) -> Iterator[str]:
    for name in sorted(map(str, module.exports or ())):
        found = module[name]
        target = found.final_target if isinstance(found, griffe.Alias) else found
        path = f"{module.path}.{name}"
        if isinstance(target, griffe.Class):
            yield from _class(path, target)
        else:
            yield _member(path, target)


def _class(path: str, found: griffe.Class) -> Iterator[str]:
    bases = ", ".join(str(base).rpartition(".")[2] for base in found.bases)
    yield f"class {path}({bases}){_made_with(found)}"
    for name, member in sorted(found.all_members.items()):
        if not name.startswith("_") or name in SPECIAL:
            target = member.final_target if isinstance(member, griffe.Alias) else member
            yield f"    {_member(name, target)}"


def _made_with(found: griffe.Class) -> str:
    try:
        made: griffe.Object | griffe.Alias = found.all_members["__init__"]
    except KeyError:
        return ""
    made = made.final_target if isinstance(made, griffe.Alias) else made
    return f" takes {_parameters(made)}" if isinstance(made, griffe.Function) else ""


def _member(name: str, found: griffe.Object | griffe.Alias) -> str:
    if isinstance(found, griffe.Function):
        prefix = "async " if "async" in found.labels else ""
        labels = "".join(f"@{n} " for n in ("classmethod", "staticmethod") if n in found.labels)
        result = f" -> {found.returns}" if found.returns is not None else ""
        return f"{labels}{prefix}{name}{_parameters(found)}{result}"
    annotation = getattr(found, "annotation", None)
    return f"{name}: {annotation}" if annotation is not None else name


def _parameters(function: griffe.Function) -> str:
    written = []
    kinds = griffe.ParameterKind
    only_by_name = False
    for place, each in enumerate(function.parameters):
        if place == 0 and each.name in {"self", "cls"}:
            continue
        star = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(each.kind, "")
        if each.kind is kinds.keyword_only and not only_by_name:
            written.append("*")
        only_by_name = only_by_name or each.kind in {kinds.keyword_only, kinds.var_positional}
        text = f"{star}{each.name}"
        if each.annotation is not None:
            text += f": {each.annotation}"
        if each.default is not None and not star:
            text += f" = {each.default}"
        written.append(text)
    return f"({', '.join(written)})"


if __name__ == "__main__":
    sys.stdout.write(description())

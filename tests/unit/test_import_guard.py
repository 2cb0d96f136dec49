"""Tests of hiding packages from imports."""

import importlib
import sys

import pytest

from viralfx.telemetry import hide_packages


def test_a_package_is_hidden_only_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports of a hidden package's modules fail too; after the block they succeed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "wsgiref"]:
        monkeypatch.delitem(sys.modules, name)
    with hide_packages("wsgiref"), pytest.raises(ModuleNotFoundError):
        importlib.import_module("wsgiref.util")

    assert importlib.import_module("wsgiref.util").__name__ == "wsgiref.util"


def test_imported_packages_stay_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that was imported before stays available, also if the block raises."""
    present = importlib.import_module("json")
    monkeypatch.delitem(sys.modules, "wsgiref", raising=False)
    with hide_packages("json", "wsgiref"):
        within = sys.modules["json"]
    with pytest.raises(RuntimeError), hide_packages("wsgiref"):
        raise RuntimeError("planted")

    assert within is present
    assert sys.modules["json"] is present
    assert "wsgiref" not in sys.modules

"""Tests that are run again where something took too long, because other processes can do that."""

import pytest

AGAIN_IF_SLOW = pytest.mark.flaky(reruns=2, only_rerun="TooSlowError")
"""Twice more, and for nothing but a ``TooSlowError``; those that run ``alone`` have it anyway."""

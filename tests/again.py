"""Reruns of tests that measure time, since other processes can delay them."""

import pytest

AGAIN_IF_SLOW = pytest.mark.flaky(reruns=2, only_rerun="TooSlowError")
"""Up to two reruns, only after a ``TooSlowError``. Tests marked ``alone`` get it automatically."""

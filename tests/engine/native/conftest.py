"""Fixtures of the native backend's tests."""

from __future__ import annotations

import pytest

from engine.native.build import INSTRUCTION_SETS
from tests.engine.native.support import kernels


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> str:
    """Each of the kernels' paths that this CPU can run."""
    name: str = request.param
    kernels(name)
    return name

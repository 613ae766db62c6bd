"""The implementations of `RowChooser` that this machine can run, by name."""

from __future__ import annotations

import pytest

from engine.draw import NumpyRowChooser, RowChooser
from engine.errors import NativeUnavailable
from engine.model_runner import DEFAULT_CACHE_DIR
from engine.native.build import INSTRUCTION_SETS, load_kernels
from engine.native.sampling import NativeRowChooser

NAMES = ("numpy", *INSTRUCTION_SETS)


def row_chooser(name: str) -> RowChooser:
    """One of `NAMES`, or `native`: the best instruction set. Skips the test where this machine cannot run it."""
    if name == "numpy":
        return NumpyRowChooser()
    try:
        return NativeRowChooser(load_kernels(DEFAULT_CACHE_DIR / "native", None if name == "native" else name))
    except NativeUnavailable as error:
        pytest.skip(str(error))

"""The implementations of `RowChooser` that this machine can run, by name, and what they are held against."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.draw import NumpyRowChooser, Row, RowChooser
from engine.errors import NativeUnavailable
from engine.model_runner import DEFAULT_CACHE_DIR
from engine.native.build import INSTRUCTION_SETS, load_kernels
from engine.native.sampling import NativeRowChooser
from engine.request import SamplingParams

NAMES = ("numpy", *INSTRUCTION_SETS)


def row_chooser(name: str) -> RowChooser:
    """One of `NAMES`, or `native`: the best instruction set. Skips the test where this machine cannot run it."""
    if name == "numpy":
        return NumpyRowChooser()
    try:
        return NativeRowChooser(load_kernels(DEFAULT_CACHE_DIR / "native", None if name == "native" else name))
    except NativeUnavailable as error:
        pytest.skip(str(error))


def reference_ids(row: Row, sampling: SamplingParams) -> list[int]:
    """What the truncations leave, by the textbook: full sort, full softmax, double precision."""
    logits = row.astype(np.float64)
    order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))
    if sampling.top_k:
        edge = logits[order[min(sampling.top_k, len(order)) - 1]]
        order = [index for index in order if logits[index] >= edge]
    mass_of = {index: math.exp((logits[index] - logits[order[0]]) / sampling.temperature) for index in order}
    order = [index for index in order if mass_of[index] >= sampling.min_p]
    total = sum(mass_of[index] for index in order)
    kept, mass = [], 0.0
    for index in order:
        if mass >= sampling.top_p * total and kept:
            break
        kept.append(index)
        mass += mass_of[index]
    return sorted(kept)

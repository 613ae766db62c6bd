"""The C++ twin of `engine.draw.NumpyRowChooser`: the same token from the same row, bit for bit.

The calls keep Python's lock: they take microseconds, and taking it back could take milliseconds.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np

from engine.draw import MIN_TEMPERATURE, Ids, Mask, Row, min_p_offset
from engine.request import SamplingParams


class NativeRowChooser:
    """`RowChooser` over the native library. One thread at a time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """
        Args:
            library: One that holds the functions of kernels/sampling.h; kept loaded.
        """
        self._library = library
        functions = ctypes.PyDLL(library._name, handle=library._handle)
        self._scratch_bytes = functions.zs_sampling_scratch_bytes
        self._scratch_bytes.argtypes = [ctypes.c_int32]
        self._scratch_bytes.restype = ctypes.c_int64
        self._choose = functions.zs_choose
        self._choose.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_double,
            ctypes.c_int32,
            ctypes.c_double,
            ctypes.c_double,
            ctypes.c_double,
            ctypes.c_void_p,
        ]
        self._choose.restype = ctypes.c_int32
        self._likelihoods = functions.zs_likelihoods
        self._likelihoods.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._likelihoods.restype = ctypes.c_double
        self._scratch = np.empty(0, np.float64)
        self._scratch_address = 0
        self._num_columns = 0

    def choose(self, row: Row, mask: Mask | None, sampling: SamplingParams, uniform: float) -> int | None:
        """As `RowChooser.choose`."""
        self._reserve(len(row))
        _check(row)
        assert mask is None or (mask.dtype == np.int32 and mask.flags.c_contiguous and 32 * len(mask) >= len(row))
        is_greedy = sampling.temperature < MIN_TEMPERATURE
        token_id: int = self._choose(
            row.ctypes.data,
            None if mask is None else mask.ctypes.data,
            len(row),
            0.0 if is_greedy else sampling.temperature,
            min(sampling.top_k, len(row)),
            min_p_offset(sampling),
            sampling.top_p,
            uniform,
            self._scratch_address,
        )
        return token_id if token_id >= 0 else None

    def likelihoods(self, row: Row, num_top: int) -> tuple[float, Ids]:
        """As `RowChooser.likelihoods`."""
        self._reserve(len(row))
        _check(row)
        ids = np.empty(min(num_top, len(row)), np.int32)
        total: float = self._likelihoods(row.ctypes.data, len(row), len(ids), ids.ctypes.data, self._scratch_address)
        return float(row.max()) + math.log(total), ids[ids >= 0].astype(np.intp)

    def _reserve(self, num_columns: int) -> None:
        if num_columns > self._num_columns:
            num_bytes: int = self._scratch_bytes(num_columns)
            self._scratch, self._num_columns = np.empty(num_bytes // 8, np.float64), num_columns
            self._scratch_address = self._scratch.ctypes.data


def _check(row: Row) -> None:
    assert row.dtype == np.float32
    assert row.ndim == 1
    assert row.flags.c_contiguous

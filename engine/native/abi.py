"""What Python and the kernels share: ctypes mirrors of kernels/abi.h, field by field, and the tile formats."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path

import numpy as np

ABI_VERSION = 2
TILE_ROWS = 32
TILE_COLUMNS = 32
HALF_ROWS = 16


class Kind(IntEnum):
    """What the tiles of a matrix hold; abi.h states each kind's arithmetic."""

    Q4_HALF = 0
    Q4_FLOAT = 1
    Q8_HALF = 2
    Q8_SPLIT = 3

    @property
    def code_bits(self) -> int:
        return 4 if self in (Kind.Q4_HALF, Kind.Q4_FLOAT) else 8


# Codes are words of 4 bytes: (half, j, row of the half).
TILES = {
    Kind.Q4_HALF: np.dtype([("codes", "<u4", (2, 4, 16)), ("scale", "<f2", 32), ("minimum", "<f2", 32)]),
    Kind.Q4_FLOAT: np.dtype([("codes", "<u4", (2, 4, 16)), ("scale", "<f4", 32), ("minimum", "<f4", 32)]),
    Kind.Q8_HALF: np.dtype([("codes", "<u4", (2, 8, 16)), ("scale", "<f2", 32)]),
    Kind.Q8_SPLIT: np.dtype([("codes", "<u4", (2, 8, 16)), ("scale", "<f4", (2, 32))]),
}


class Matrix(ctypes.Structure):
    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("q_bias", ctypes.c_void_p),
        ("k_bias", ctypes.c_void_p),
        ("v_bias", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("num_layers", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("intermediate_size", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("vocab_size", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("rms_norm_eps", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        ("inverse_frequencies", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("embedding", Matrix),
        ("head", Matrix),
        ("layers", ctypes.POINTER(Layer)),
    )


class Chunk(ctypes.Structure):
    _fields_ = (
        ("first_row", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("start", ctypes.c_int32),
        ("first_block", ctypes.c_int32),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int32),
        ("num_chunks", ctypes.c_int32),
        ("num_sampled", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("token_ids", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("sampled_rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "zs_tile_bytes": (ctypes.c_int64, (ctypes.c_int32,)),
    "zs_create": (
        ctypes.c_void_p,
        (ctypes.POINTER(Model), ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
    ),
    "zs_destroy": (None, (ctypes.c_void_p,)),
    "zs_step": (None, (ctypes.c_void_p, ctypes.POINTER(Step))),
    "zs_scratch_bytes": (ctypes.c_int64, (ctypes.c_void_p,)),
    "zs_path": (ctypes.c_char_p, ()),
    "zs_abi_version": (ctypes.c_int32, ()),
    "zs_scrub": (None, (ctypes.c_void_p,)),
}


def bind(path: Path) -> ctypes.CDLL:
    """Load a library of kernels and declare its functions. Calls release the GIL.

    Raises:
        OSError: Not a library that can be loaded here.
        AttributeError: A function is missing.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library

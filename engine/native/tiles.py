"""Quantised matrices as the kernels read them: a GGUF file's blocks, or plain numbers, to tiles. Numpy only.

A GGUF block keeps its values exactly where a kind of tile can hold them (Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K);
everything else becomes 8-bit groups of 32. Sources: ggml-quants.c for the blocks, kernels/abi.h for the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint.gguf import QuantisedRows
from engine.errors import NativeUnavailable
from engine.native.abi import HALF_ROWS, TILE_COLUMNS, TILE_ROWS, TILES, Kind

SLAB_ROWS = 4096  # rows quantised at a time, which bounds the memory that takes

_CODE_ZERO = 128  # what an 8-bit code of a weight 0 is
_PADDING_WORDS = {4: 0, 8: 0x80808080}

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Groups:
    """A matrix in groups of 32 columns. Letters: R rows, B groups of a row.

    `codes`: uint32 (R, B, code_bits). A word is 4 bytes: 8-bit codes of 4 columns, or column i in the low
    nibble and column 16 + i in the high one. `scale`: (R, B), or (R, B, 2) of Q8_SPLIT. `minimum`: (R, B) of
    the 4-bit kinds, else None.
    """

    kind: Kind
    codes: Array
    scale: Array
    minimum: Array | None = None


def from_blocks(blocks: QuantisedRows) -> Groups | None:
    """A GGUF matrix with the very values that dequantising gives; None for a type that no kind of tile holds."""
    if blocks.quant_type not in _BLOCKS:
        return None
    block, read = _BLOCKS[blocks.quant_type]
    return read(np.ascontiguousarray(blocks.data).view(block))


def from_values(name: str, values: Array) -> Groups:
    """Quantise float32 (R, C): a group's scale is max |w| / 127 as fp16, its codes are rounded with that scale.

    Raises:
        NativeUnavailable: A weight is not finite, or too large for its scale.
    """
    parts = [_quantise(values[first : first + SLAB_ROWS]) for first in range(0, len(values), SLAB_ROWS)]
    scale = np.concatenate([scale for _, scale in parts])
    if not np.isfinite(scale).all():
        raise NativeUnavailable(f"{name} has weights that 8-bit groups cannot hold")
    return Groups(Kind.Q8_HALF, np.concatenate([codes for codes, _ in parts]), scale)


def interleaved(first: Groups, second: Groups) -> Groups | None:
    """16 rows of `first`, the same 16 of `second`, the next 16 of `first`, ...; None where no one kind holds both."""
    if first.kind.code_bits != second.kind.code_bits:
        return None
    if first.kind is not second.kind:
        first, second = _widened(first), _widened(second)
    minimum = None
    if first.minimum is not None and second.minimum is not None:
        minimum = _interleave(first.minimum, second.minimum)
    return Groups(first.kind, _interleave(first.codes, second.codes), _interleave(first.scale, second.scale), minimum)


def separated(groups: Groups) -> tuple[Groups, Groups]:
    """What `interleaved` was given."""

    def half(values: Array, index: int) -> Array:
        pairs = values.reshape(-1, 2, HALF_ROWS, *values.shape[1:])
        return pairs[:, index].reshape(-1, *values.shape[1:])

    first, second = (
        Groups(
            groups.kind,
            half(groups.codes, index),
            half(groups.scale, index),
            None if groups.minimum is None else half(groups.minimum, index),
        )
        for index in (0, 1)
    )
    return first, second


def tile_grid(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of tiles of a matrix; `columns` is a multiple of 32."""
    return -(-rows // TILE_ROWS), columns // TILE_COLUMNS


def to_tiles(groups: Groups) -> Array:
    """Records of `TILES[kind]`, shaped as `tile_grid` says. Rows of padding are worth 0."""
    codes = _padded(groups.codes, _PADDING_WORDS[groups.kind.code_bits])
    codes = codes.reshape(-1, TILE_ROWS // HALF_ROWS, HALF_ROWS, *codes.shape[1:])
    tiles: Array = np.empty((codes.shape[0], codes.shape[3]), TILES[groups.kind])
    tiles["codes"] = codes.transpose(0, 3, 1, 4, 2)
    tiles["scale"] = _rows_last(groups.scale)
    if groups.minimum is not None:
        tiles["minimum"] = _rows_last(groups.minimum)
    return tiles


def from_tiles(kind: Kind, tiles: Array, rows: int) -> Groups:
    """What `to_tiles` was given."""

    def rows_first(values: Array) -> Array:
        moved = np.moveaxis(values, -1, 1)
        return moved.reshape(-1, *moved.shape[2:])[:rows]

    codes = tiles["codes"].transpose(0, 2, 4, 1, 3)
    codes = codes.reshape(-1, *codes.shape[3:])[:rows]
    minimum = rows_first(tiles["minimum"]) if kind.code_bits == 4 else None
    return Groups(kind, codes, rows_first(tiles["scale"]), minimum)


def values_of(groups: Groups) -> Array:
    """float32 (R, C): what the kernels hold the weights to be worth."""
    packed = np.ascontiguousarray(groups.codes).view(np.uint8)
    scale = groups.scale.astype(np.float32).reshape(*packed.shape[:2], -1)
    if groups.minimum is None:
        codes = packed.astype(np.float32) - _CODE_ZERO
        values = codes * np.repeat(scale, TILE_COLUMNS // scale.shape[-1], -1)
    else:
        codes = np.concatenate((packed & 15, packed >> 4), -1).astype(np.float32)
        values = scale * codes + groups.minimum.astype(np.float32)[..., None]
    return values.reshape(len(values), -1)


def _quantise(values: Array) -> tuple[Array, Array]:
    """Codes and fp16 scales of `Kind.Q8_HALF`."""
    groups = values.reshape(len(values), -1, TILE_COLUMNS)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (np.abs(groups).max(-1) / 127).astype(np.float16)
        divisor = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
        codes = np.clip(np.rint(groups / divisor), -127, 127) + _CODE_ZERO
        return codes.astype(np.uint8).view("<u4"), scale


def _read_q4_0(blocks: Array) -> Groups:
    scale = blocks["scale"].astype(np.float32)
    minimum = -8 * scale
    with np.errstate(over="ignore"):
        half_minimum = minimum.astype(np.float16)
    if np.array_equal(half_minimum, minimum):
        return Groups(Kind.Q4_HALF, blocks["codes"], blocks["scale"], half_minimum)
    return Groups(Kind.Q4_FLOAT, blocks["codes"], scale, minimum)


def _read_q4_1(blocks: Array) -> Groups:
    return Groups(Kind.Q4_HALF, blocks["codes"], blocks["scale"], blocks["minimum"])


def _read_q5_0(blocks: Array) -> Groups:
    low = np.concatenate((blocks["low"] & 15, blocks["low"] >> 4), -1)
    high = np.unpackbits(np.ascontiguousarray(blocks["high"]), axis=-1, bitorder="little")
    codes = (low | high << 4) + np.uint8(_CODE_ZERO - 16)
    return Groups(Kind.Q8_HALF, codes.view("<u4"), blocks["scale"])


def _read_q8_0(blocks: Array) -> Groups:
    signed = np.ascontiguousarray(blocks["codes"])
    groups = Groups(Kind.Q8_HALF, (signed.view(np.uint8) ^ np.uint8(_CODE_ZERO)).view("<u4"), blocks["scale"])
    # Q8_HALF has no code for -128, which no quantiser writes and a file may hold all the same.
    return _widened(groups) if signed.min() == -128 else groups


def _read_q4_k(blocks: Array) -> Groups:
    low, middle, high = np.split(blocks["packed"], 3, -1)  # 6 bits of 8 scales and of 8 minima
    scale_codes = np.concatenate((low & 63, (high & 15) | (low >> 2 & 0x30)), -1)
    minimum_codes = np.concatenate((middle & 63, (high >> 4) | (middle >> 2 & 0x30)), -1)
    # A product of 11 and 6 bits is exact in float32.
    scale = blocks["scale"].astype(np.float32)[..., None] * scale_codes
    minimum = -(blocks["minimum"].astype(np.float32)[..., None] * minimum_codes)
    stored = blocks["codes"]  # 32 bytes hold one group in the low nibbles and the next in the high ones
    pairs = np.stack((stored & 15, stored >> 4), -2)
    codes = pairs[..., :16] | pairs[..., 16:] << 4
    rows = len(blocks)
    codes = np.ascontiguousarray(codes).view("<u4").reshape(rows, -1, 4)
    return Groups(Kind.Q4_FLOAT, codes, scale.reshape(rows, -1), minimum.reshape(rows, -1))


def _read_q6_k(blocks: Array) -> Groups:
    rows = len(blocks)
    low = np.stack((blocks["low"] & 15, blocks["low"] >> 4), -2)
    high = np.stack([blocks["high"] >> shift & 3 for shift in (0, 2, 4, 6)], -2)
    codes = low.reshape(rows, -1, 32) | high.reshape(rows, -1, 32) << 4
    scale = blocks["scale"].astype(np.float32)[..., None] * blocks["scales"]
    return Groups(Kind.Q8_SPLIT, (codes + np.uint8(_CODE_ZERO - 32)).view("<u4"), scale.reshape(rows, -1, 2))


_BLOCKS: dict[str, tuple[np.dtype[Any], Callable[[Array], Groups]]] = {
    "Q4_0": (np.dtype([("scale", "<f2"), ("codes", "<u4", 4)]), _read_q4_0),
    "Q4_1": (np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("codes", "<u4", 4)]), _read_q4_1),
    "Q5_0": (np.dtype([("scale", "<f2"), ("high", "u1", 4), ("low", "u1", 16)]), _read_q5_0),
    "Q8_0": (np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), _read_q8_0),
    "Q4_K": (
        np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("packed", "u1", 12), ("codes", "u1", (4, 32))]),
        _read_q4_k,
    ),
    "Q6_K": (
        np.dtype([("low", "u1", (2, 64)), ("high", "u1", (2, 32)), ("scales", "i1", 16), ("scale", "<f2")]),
        _read_q6_k,
    ),
}


def _widened(groups: Groups) -> Groups:
    """The same values with float32 scales."""
    scale = groups.scale.astype(np.float32)
    if groups.minimum is not None:
        return Groups(Kind.Q4_FLOAT, groups.codes, scale, groups.minimum.astype(np.float32))
    if groups.kind is Kind.Q8_HALF:
        scale = np.stack((scale, scale), -1)
    return Groups(Kind.Q8_SPLIT, groups.codes, scale)


def _interleave(first: Array, second: Array) -> Array:
    shape = first.shape[1:]
    pairs = np.stack((first.reshape(-1, HALF_ROWS, *shape), second.reshape(-1, HALF_ROWS, *shape)), 1)
    return pairs.reshape(-1, *shape)


def _rows_last(values: Array) -> Array:
    """(R, B, ..) -> (rows of tiles, B, .., 32)."""
    padded = _padded(values, 0)
    return np.moveaxis(padded.reshape(-1, TILE_ROWS, *values.shape[1:]), 1, -1)


def _padded(values: Array, fill: int) -> Array:
    """Rows appended up to a multiple of 32."""
    missing = -len(values) % TILE_ROWS
    if not missing:
        return values
    return np.concatenate((values, np.full((missing, *values.shape[1:]), fill, values.dtype)))

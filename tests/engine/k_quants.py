"""Quantises to Q4_K and Q6_K, which the gguf package only reads. Plain, not optimal: range by range.

Source: the block layouts of ggml, github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SUPER_BLOCK = 256


def quantize_q4_k(values: np.ndarray) -> np.ndarray:
    """(..., C) float32 -> (..., C / 256 * 144) uint8: 8 groups of 32, each scale * code - minimum."""
    groups = values.reshape(-1, 8, 32)
    minimum = np.maximum(0, -groups.min(-1))
    scale = (groups.max(-1) + minimum) / 15
    d, scale_codes = _share(scale, 63)
    d_minimum, minimum_codes = _share(minimum, 63)
    step = (d * scale_codes)[..., None]
    offset = (d_minimum * minimum_codes)[..., None]
    codes = np.clip(_divide(groups + offset, step), 0, 15).astype(np.uint8)
    packed = np.concatenate(
        (
            scale_codes[:, :4] | scale_codes[:, 4:] >> 4 << 6,
            minimum_codes[:, :4] | minimum_codes[:, 4:] >> 4 << 6,
            (scale_codes[:, 4:] & 15) | (minimum_codes[:, 4:] & 15) << 4,
        ),
        axis=-1,
    )
    nibbles = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(-1, 128)
    return _rows(values, _halves(d), _halves(d_minimum), packed, nibbles)


def quantize_q6_k(values: np.ndarray) -> np.ndarray:
    """(..., C) float32 -> (..., C / 256 * 210) uint8: 16 groups of 16, each scale * (code - 32)."""
    groups = values.reshape(-1, 16, 16)
    d, scale_codes = _share(np.abs(groups).max(-1) / 31, 127)
    codes = (np.clip(_divide(groups, (d * scale_codes)[..., None]), -32, 31) + 32).astype(np.uint8)
    quarters = codes.reshape(-1, 2, 4, 32)  # value 128 h + 32 r + i is row r, column i of half h
    low = quarters & 15
    nibbles = low[:, :, :2] | low[:, :, 2:] << 4
    high = quarters >> 4
    crumbs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return _rows(values, nibbles.reshape(-1, 128), crumbs.reshape(-1, 64), scale_codes, _halves(d))


QUANTIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q4_K": quantize_q4_k, "Q6_K": quantize_q6_k}


def _share(scales: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """One float16 factor a super-block and integer multiples of it, near `scales` (N, groups)."""
    factor = (scales.max(-1, keepdims=True) / largest).astype(np.float16).astype(np.float32)
    return factor, np.clip(_divide(scales, factor), 0, largest).astype(np.uint8)


def _divide(values: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.rint(values / np.where(step > 0, step, 1)) * (step > 0)


def _halves(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8)


def _rows(values: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=-1).reshape(*values.shape[:-1], -1)

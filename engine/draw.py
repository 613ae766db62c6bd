"""Chooses one token of one row of logits: truncation, weights, draw. NumPy; engine/native has the same in C++.

A weight is exp((logit - greatest) / temperature): IEEE float32 operations in one fixed order, without fused
multiply-adds, then rounded to a multiple of 2^-34. Sums of such numbers are exact in float64 whatever their
order, so every CPU and both implementations draw the same token from the same row, seed and position. What is
lost is below 2e-6 of the probability mass of a vocabulary of 50,000.

No row is ever sorted or normalised: the greatest columns are found among the greatest of groups of columns, and a
nucleus among the columns heavy enough to be in it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams

MIN_TEMPERATURE = 1e-5  # below it sampling is greedy
MAX_COLUMNS = 2**18  # sums of as many weights are exact
_GROUP = 64
_CHUNK = 16384  # float32 temporaries of this size are reused and not mapped anew: 3x faster than whole rows
_CDF_BLOCK = 256
_ROUNDING = 393216.0  # 1.5 * 2^18: adding it to a float64 below 2^17 rounds to 2^-34
_SMALLEST_CUT = 2.0**-33
_NEAREST = np.float32(12582912.0)  # 1.5 * 2^23: adding it to a small float32 rounds to an integer, in the low bits
_LOG2_E = 1.4426950408889634
# 2^x = 1 + x (...) on [-0.5, 0.5], highest power first; error below 2e-7; after Cephes.
_EXP2 = np.array(
    [
        1.535336188319500e-4,
        1.339887440266574e-3,
        9.618437357674640e-3,
        5.550332471162809e-2,
        2.402264791363012e-1,
        6.931472028550421e-1,
    ],
    np.float32,
)

Row = NDArray[np.float32]
Mask = NDArray[np.int32]
Ids = NDArray[np.intp]


class RowChooser(Protocol):
    """What the sampler needs done with a row of V logits, float32, contiguous, at most `MAX_COLUMNS`."""

    def choose(self, row: Row, mask: Mask | None, sampling: SamplingParams, uniform: float) -> int | None:
        """The token that `uniform` in [0, 1) draws; where sampling is greedy, the first of the greatest.

        Args:
            row: Finite or -inf.
            mask: Bit i, from the least significant of the first word, allows column i; at least V bits. None: all.
            sampling: temperature, top_k, min_p and top_p are used, the truncations in this order. Ties at the
                edge of top_k are all kept; ties at the edge of top_p go to the smaller id.

        Returns:
            None where no column that the mask allows is finite.
        """
        ...

    def likelihoods(self, row: Row, num_top: int) -> tuple[float, Ids]:
        """Log of the sum of exponentials, and the ids of up to `num_top` greatest columns, best first.

        Of equals the smaller id comes first; a column of -inf is none of them.

        Args:
            row: Finite or -inf, and not -inf everywhere.
        """
        ...


def draw_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, output position): 53 bits of BLAKE2b, the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"token draw").digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


class NumpyRowChooser:
    """`RowChooser` where there is no native library."""

    def choose(self, row: Row, mask: Mask | None, sampling: SamplingParams, uniform: float) -> int | None:
        """As `RowChooser.choose`."""
        values = row if mask is None else np.where(unpack(mask, len(row)), row, np.float32(-np.inf))
        best = int(values.argmax())
        if not math.isfinite(values[best]):
            return None
        if sampling.temperature < MIN_TEMPERATURE:
            return best
        kept = kept_ids(values, sampling)
        index = invert(weights(values if kept is None else values[kept], values[best], sampling.temperature), uniform)
        return index if kept is None else int(kept[index])

    def likelihoods(self, row: Row, num_top: int) -> tuple[float, Ids]:
        """As `RowChooser.likelihoods`."""
        peak = row.max()
        head = np.flatnonzero(row >= _kth_greatest(row, min(num_top, len(row)))) if num_top else np.arange(0)
        head = head[row[head] > -np.inf]
        best = head[np.argsort(-row[head], kind="stable")][:num_top]
        return float(peak) + math.log(weights(row, peak, 1.0).sum()), best


def unpack(mask: Mask, size: int) -> NDArray[np.bool_]:
    """(size,) of the mask's first bits."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=size).view(np.bool_)


def min_p_offset(sampling: SamplingParams) -> float:
    """min_p as a distance from the greatest logit, at most 0; -inf where it is off."""
    return sampling.temperature * math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf


def weights(values: Row, peak: np.float32, temperature: float) -> NDArray[np.float64]:
    """exp((values - peak) / temperature), rounded to multiples of 2^-34: 1 for the peak, 0 below 3e-11."""
    result = np.empty(len(values))
    for start in range(0, len(values), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        _weigh(values[chunk], peak, temperature, result[chunk])
    return result


def _weigh(values: Row, peak: np.float32, temperature: float, result: NDArray[np.float64]) -> None:
    with np.errstate(over="ignore"):
        x = (values - peak) * np.float32(_LOG2_E / temperature)
    np.maximum(x, np.float32(-44.0), out=x)
    shifted = x + _NEAREST
    x -= shifted - _NEAREST
    y = x * _EXP2[0]
    for coefficient in _EXP2[1:]:
        y += coefficient
        y *= x
    y += np.float32(1.0)
    power = shifted.view(np.uint32)
    power <<= np.uint32(23)
    power += np.uint32(0x3F800000)
    y *= power.view(np.float32)
    np.add(y, _ROUNDING, out=result, dtype=np.float64)
    result -= _ROUNDING


def invert(weights: NDArray[np.float64], uniform: float) -> int:
    """Index at which the sum of the weights so far passes `uniform` of the sum of all. Never one of weight 0."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _CDF_BLOCK)))
    # Below the sum of all, for `uniform` is at most 1 - 2^-53.
    target = uniform * sums[-1]
    block = int(np.searchsorted(sums, target, side="right"))
    before = sums[block - 1] if block else 0.0
    inside = before + np.cumsum(weights[block * _CDF_BLOCK : (block + 1) * _CDF_BLOCK])
    return block * _CDF_BLOCK + int(np.searchsorted(inside, target, side="right"))


def kept_ids(values: Row, sampling: SamplingParams) -> Ids | None:
    """Ids that top_k, min_p and top_p leave, ascending; None: all."""
    peak = values.max()
    floor = float(peak) + min_p_offset(sampling)
    if 0 < sampling.top_k < len(values):
        floor = max(floor, float(_kth_greatest(values, sampling.top_k)))
    kept = np.flatnonzero(values >= np.float64(floor)) if floor > -math.inf else None
    if sampling.top_p == 1.0:
        return kept
    nucleus = _nucleus(values if kept is None else values[kept], peak, sampling)
    return nucleus if kept is None else kept[nucleus]


def _kth_greatest(values: Row, k: int) -> np.float32:
    """At least k columns reach the k-th greatest of the peaks of groups, and few more do. 0 < k <= V."""
    groups = len(values) // _GROUP
    peaks = np.concatenate([values[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0), values[groups * _GROUP :]])
    head = values[values >= _partitioned(peaks, k)] if k <= len(peaks) else values
    return _partitioned(head, k)


def _partitioned(values: Row, k: int) -> np.float32:
    index = len(values) - k
    value: np.float32 = np.partition(values, index)[index]
    return value


def _nucleus(values: Row, peak: np.float32, sampling: SamplingParams) -> Ids:
    """Indices of the fewest values whose weight reaches top_p of that of all; of equal values the first ones."""
    total = float(weights(values, peak, sampling.temperature).sum())
    # All values lighter than `cut` weigh less together than what the nucleus may leave out.
    cut = 0.5 * (1.0 - sampling.top_p) * total / len(values)
    floor = float(peak) + sampling.temperature * math.log(cut) if cut >= _SMALLEST_CUT else -math.inf
    ids = np.flatnonzero(values >= np.float64(floor))
    candidates = values[ids]
    ordered = np.sort(candidates)[::-1]
    cumulative = np.cumsum(weights(ordered, peak, sampling.temperature))
    num_kept = int(np.searchsorted(cumulative, sampling.top_p * total, side="left")) + 1
    last = ordered[num_kept - 1]
    is_kept = candidates > last
    num_last = num_kept - int(np.count_nonzero(is_kept))
    is_kept[np.flatnonzero(candidates == last)[:num_last]] = True
    kept: Ids = ids[is_kept]
    return kept

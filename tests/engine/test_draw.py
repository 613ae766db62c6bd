"""The choice within a row: exact sums of weights, truncations against a full softmax, the draw against fractions.

Every implementation is held to the same oracles, and the native ones to NumPy's bits.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.draw import (
    MAX_COLUMNS,
    Mask,
    NumpyRowChooser,
    Row,
    RowChooser,
    draw_uniform,
    invert,
    kept_ids,
    unpack,
    weights,
)
from engine.native.sampling import NativeRowChooser
from engine.request import SamplingParams
from tests.engine.row_choosers import NAMES, reference_ids, row_chooser

INFINITY = np.float32(np.inf)
ALMOST_ONE = 1 - 2.0**-53
LARGE = 5000


@pytest.fixture(scope="module", params=NAMES)
def chooser(request: pytest.FixtureRequest) -> RowChooser:
    return row_chooser(request.param)


def random_row(size: int, seed: int = 0, scale: float = 2.0) -> Row:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def packed(allowed: Sequence[bool]) -> Mask:
    bits = np.zeros(-(-len(allowed) // 32) * 32, np.bool_)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


def drawn(chooser: RowChooser, row: Row, uniform: float = 0.5, mask: Mask | None = None, **sampling: Any) -> int | None:
    return chooser.choose(row, mask, SamplingParams(**{"temperature": 1.0, **sampling}), uniform)


class ExactDraw:
    """The first of `ids` at which the sum of weights passes `uniform` of all, in whole numbers."""

    def __init__(self, row: Row, ids: Sequence[int], temperature: float) -> None:
        self.ids = ids
        self.shares = weights(row[list(ids)], row.max(), temperature)
        self.passed = list(accumulate(int(share * 2.0**34) for share in self.shares))

    def __call__(self, uniform: float) -> int:
        target = Fraction(uniform * self.passed[-1] / 2.0**34) * 2**34
        return self.ids[bisect_right(self.passed, target)]

    def edge(self, place: int) -> float:
        """About where the draw goes over from the tokens before `ids[place]` to it."""
        return self.passed[place - 1] / self.passed[-1] if place else 0.0


TRUNCATIONS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.05, "top_p": 0.9, "temperature": 0.7},
    {"top_k": 3000},
    {"top_k": 10_000, "top_p": 0.999},
]


def truncation_id(truncation: dict[str, float]) -> str:
    return ",".join(f"{key}={value}" for key, value in truncation.items()) or "none"


# Weights


def test_weights_are_exponentials_to_a_millionth() -> None:
    for temperature in (0.3, 1.0, 2.0):
        values = np.linspace(-24 * temperature, 0, 50_001).astype(np.float32) + np.float32(7.0)
        expected = np.exp((values.astype(np.float64) - 7.0) / temperature)
        found = weights(values, np.float32(7.0), temperature)
        assert np.abs(found - expected).max() < 2e-7
        assert np.abs(found / expected - 1)[expected > 1e-3].max() < 2e-6


def test_the_weight_of_the_peak_is_one_and_far_below_it_is_zero() -> None:
    values = np.array([3.0, 3.0 - 30.0, -3e38, -np.inf], np.float32)
    assert weights(values, np.float32(3.0), 1.0).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert weights(np.array([0.0, -1.0], np.float32), np.float32(0.0), 1e-5).tolist() == [1.0, 0.0]


def test_sums_of_weights_are_exact_in_any_order() -> None:
    row = random_row(49_152, scale=4.0)
    found = weights(row, row.max(), 1.3)
    assert np.array_equal(found * 2.0**34, np.rint(found * 2.0**34))
    total = math.fsum(found)
    rng = np.random.default_rng(1)
    for _ in range(5):
        rng.shuffle(found)
        assert float(np.cumsum(found)[-1]) == float(found.sum()) == total


# Truncation


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=truncation_id)
def test_the_kept_set_is_that_of_a_full_softmax(truncation: dict[str, Any]) -> None:
    sampling = SamplingParams(**{"temperature": 1.0, **truncation})
    for seed, scale in enumerate((0.1, 0.3, 1.0, 2.0, 6.0) * 2):
        row = random_row(LARGE, seed, scale)
        kept = kept_ids(row, sampling)
        assert (list(range(LARGE)) if kept is None else kept.tolist()) == reference_ids(row, sampling)


@pytest.mark.parametrize("truncation", [{}, *TRUNCATIONS], ids=truncation_id)
def test_the_whole_of_the_kept_set_is_drawn_from_and_nothing_else(
    chooser: RowChooser, truncation: dict[str, Any]
) -> None:
    sampling = SamplingParams(**{"temperature": 1.0, **truncation})
    for seed, size in enumerate((1, 40, 63, 64, 65, 700)):
        row = random_row(size, seed, scale=1.0)
        ids = reference_ids(row, sampling)
        exact = ExactDraw(row, ids, sampling.temperature)
        found = set()
        for place in range(len(ids)):
            start, end = exact.edge(place), exact.edge(place + 1)
            for uniform in (start, (start + end) / 2, math.nextafter(end, 0.0)):
                found.add(exact(uniform))
                assert chooser.choose(row, None, sampling, uniform) == exact(uniform)
        assert found == set(ids)


def test_ties_at_the_edge_of_top_k_are_all_kept(chooser: RowChooser) -> None:
    row = np.array([1, 3, 2, 2, 2, 0], np.float32)
    found = {drawn(chooser, row, uniform, top_k=2) for uniform in np.linspace(0, ALMOST_ONE, 100)}
    assert found == {1, 2, 3, 4}


def test_ties_in_a_nucleus_go_to_the_smaller_id(chooser: RowChooser) -> None:
    row = np.zeros(8, np.float32)
    assert {drawn(chooser, row, uniform, top_p=0.5) for uniform in np.linspace(0, ALMOST_ONE, 50)} == {0, 1, 2, 3}
    wide = np.zeros(LARGE, np.float32)
    assert drawn(chooser, wide, ALMOST_ONE, top_p=0.5) == LARGE // 2 - 1


def test_of_equals_at_the_edge_of_a_nucleus_the_later_ones_are_not_drawn(chooser: RowChooser) -> None:
    row = np.array([0.0, 0.0, 0.0, 5.0], np.float32)
    uniforms = [*np.linspace(0, 0.02, 200), 0.5, ALMOST_ONE]
    assert {drawn(chooser, row, uniform, top_p=0.985) for uniform in uniforms} == {0, 3}


def test_the_edge_of_min_p_is_drawn_in_double_precision(chooser: RowChooser) -> None:
    for min_p in np.linspace(0.01, 0.9, 50).tolist():
        floor = math.log(min_p)
        edge = np.float32(floor)
        steps = [np.nextafter(edge, np.float32(direction)) for direction in (np.inf, -np.inf)]
        row = np.full(64, -50.0, np.float32)
        row[[0, 10, 20, 30]] = 0.0, steps[0], edge, steps[1]
        expected = 20 if float(edge) >= floor else 10
        assert drawn(chooser, row, ALMOST_ONE, min_p=min_p) == expected


@pytest.mark.parametrize("row", [[0.0, 9.0, 9.0, 9.0], [-np.inf, 0.0, -np.inf, 0.0], [-3e38, 3e38, -3e38, 3e38]])
def test_greedy_takes_the_first_of_the_greatest(chooser: RowChooser, row: list[float]) -> None:
    for mask in (None, packed([True] * 4)):
        assert drawn(chooser, np.array(row, np.float32), 0.9, mask, temperature=0.0) == 1
        assert drawn(chooser, np.array(row, np.float32), 0.9, mask, temperature=1e-6, top_k=3, top_p=0.2) == 1


# Rows that say nothing


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}], ids=truncation_id)
@pytest.mark.parametrize("size", [3, 64, 200])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_sound_gives_no_token(
    chooser: RowChooser, bad: float, size: int, sampling: dict[str, Any]
) -> None:
    for place in {0, 1, size // 2, size - 1}:
        row = random_row(size)
        row[place] = bad
        assert drawn(chooser, row, **sampling) is None


def test_a_row_of_minus_infinity_gives_no_token(chooser: RowChooser) -> None:
    assert drawn(chooser, np.full(100, -INFINITY)) is None


# Masks


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}], ids=truncation_id)
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 1000])
def test_a_mask_that_allows_everything_changes_nothing(
    chooser: RowChooser, size: int, sampling: dict[str, Any]
) -> None:
    row = random_row(size)
    for uniform in (0.0, 0.4, ALMOST_ONE):
        assert drawn(chooser, row, uniform, packed([True] * size), **sampling) == drawn(
            chooser, row, uniform, **sampling
        )


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}], ids=truncation_id)
def test_a_mask_that_allows_one_token_decides(chooser: RowChooser, sampling: dict[str, Any]) -> None:
    row = random_row(200, scale=30.0)
    for token_id in (0, 31, 32, 127, 199):
        mask = packed([index == token_id for index in range(300)])
        assert drawn(chooser, row, 0.7, mask, **sampling) == token_id


def test_a_mask_that_allows_nothing_here_gives_no_token(chooser: RowChooser) -> None:
    assert drawn(chooser, random_row(70), 0.5, packed([False] * 70)) is None
    beyond = packed([index == 80 for index in range(96)])
    assert drawn(chooser, random_row(70), 0.5, beyond) is None
    row = random_row(70)
    row[7] = -np.inf
    assert drawn(chooser, row, 0.5, packed([index == 7 for index in range(70)])) is None


def test_a_forbidden_token_that_is_not_sound_does_no_harm(chooser: RowChooser) -> None:
    row = random_row(70)
    row[7] = np.nan
    assert drawn(chooser, row, 0.5, packed([index != 7 for index in range(70)])) not in (None, 7)


# The draw


@pytest.mark.parametrize("numbers", [[1.0], [0.0, 1.0, 0.0], [0.0] * 700 + [1.0] + [0.0] * 700, [2.0**-34] * 1000])
def test_a_token_without_weight_is_never_drawn(numbers: list[float]) -> None:
    array = np.array(numbers)
    for uniform in (0.0, 0.3, ALMOST_ONE):
        assert array[invert(array, uniform)] > 0


def test_the_inverse_is_that_of_a_plain_cumulative_sum() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 255, 256, 257, 1000, 5000):
        shares = np.rint(rng.random(size) ** 8 * 2.0**34) / 2.0**34
        cumulative = np.cumsum(shares)
        for uniform in rng.random(100):
            expected = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
            assert invert(shares, float(uniform)) == expected


def test_the_draw_of_a_seed_and_position_never_changes() -> None:
    # Recorded values: another generator would break the replay of every stored review.
    assert draw_uniform(0, 0) == 0.8596060714261461
    assert draw_uniform(2**63 - 1, 12345) == 0.5936451742428333


# Likelihoods


@pytest.mark.parametrize("size", [1, 64, 100, LARGE])
def test_likelihoods_are_those_of_a_log_softmax(chooser: RowChooser, size: int) -> None:
    row = random_row(size, scale=4.0)
    log_total, best = chooser.likelihoods(row, 20)
    expected = torch.log_softmax(torch.from_numpy(row).double(), 0).numpy()
    assert log_total == pytest.approx(float(row[0]) - expected[0], abs=1e-6)
    assert best.tolist() == np.argsort(-row, kind="stable")[:20].tolist()


def test_likelihoods_leave_out_what_is_impossible(chooser: RowChooser) -> None:
    row = np.full(300, -np.inf, np.float32)
    row[[9, 200]] = 0.0
    log_total, best = chooser.likelihoods(row, 20)
    assert best.tolist() == [9, 200]
    assert log_total == pytest.approx(math.log(2))


def test_likelihoods_break_ties_by_id_and_name_as_many_as_asked_for(chooser: RowChooser) -> None:
    row = np.zeros(200, np.float32)
    row[70] = 1.0
    row[3] = -np.inf
    assert chooser.likelihoods(row, 4)[1].tolist() == [70, 0, 1, 2]
    assert chooser.likelihoods(row, 0)[1].tolist() == []
    assert chooser.likelihoods(row[:2].copy(), 20)[1].tolist() == [0, 1]


# Native against NumPy


@st.composite
def rows(draw: st.DrawFn) -> tuple[Row, Mask | None]:
    """Rows with ties, infinities, extremes and ragged ends, and masks from empty to full."""
    size = draw(st.sampled_from((1, 2, 31, 33, 63, 64, 65, 128, 700, 4999)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row = rng.normal(0, draw(st.sampled_from((0.0, 0.1, 1.0, 3.0, 30.0))), size).astype(np.float32)
    if draw(st.booleans()):
        row = np.round(row)
    row[rng.random(size) < draw(st.sampled_from((0.0, 0.0, 0.5, 1.0)))] = -np.inf
    row[rng.random(size) < draw(st.sampled_from((0.0, 0.0, 0.01)))] = draw(
        st.sampled_from((3e38, -3e38, np.nan, np.inf))
    )
    share = draw(st.sampled_from((None, 0.0, 0.01, 0.5, 0.99, 1.0)))
    return row, None if share is None else packed((rng.random(size + draw(st.integers(0, 70))) < share).tolist())


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 1e-5, 0.3, 1.0, 2.0)),
    top_k=st.sampled_from((0, 0, 1, 2, 7, 50, 100, 1000, 10**9)),
    top_p=st.sampled_from((1.0, 1.0, 0.5, 0.9, 0.999, 1 - 1e-9, 1e-9)),
    min_p=st.sampled_from((0.0, 0.0, 1.0, 0.1, 1e-20)),
)


@settings(max_examples=300, deadline=None)
@given(case=rows(), sampling=samplings, uniforms=st.lists(st.floats(0, ALMOST_ONE), min_size=1, max_size=5))
def test_every_implementation_chooses_the_same_token(
    chooser: RowChooser, case: tuple[Row, Mask | None], sampling: SamplingParams, uniforms: list[float]
) -> None:
    row, mask = case
    before = row.copy(), None if mask is None else mask.copy()
    for uniform in (*uniforms, ALMOST_ONE):
        assert chooser.choose(row, mask, sampling, uniform) == NumpyRowChooser().choose(row, mask, sampling, uniform)
    assert row.tobytes() == before[0].tobytes()
    assert mask is None or mask.tolist() == before[1].tolist()  # type: ignore[union-attr]


def long_rows() -> dict[str, Row]:
    """Rows of whose candidates the native code looks at some to guess where a nucleus ends, and guesses wrong."""
    size, rng = 20_000, np.random.default_rng(7)
    normal = rng.normal(0, 0.3, size)
    found = {
        "flat": normal,
        "nearly flat": normal * 1e-30,
        "denormal": normal * 1e-40,
        "all equal": np.zeros(size),
        "two values": rng.integers(0, 2, size) * -0.01,
        "both zeros": np.where(rng.random(size) < 0.5, 0.0, -0.0),
        "whole numbers": np.round(rng.normal(0, 1, size)),
        "one outlier": np.where(np.arange(size) == 777, 30.0, normal),
        "a few heavy": np.where(rng.random(size) < 2e-4, 12.0, rng.normal(0, 2, size)),
        "sorted": np.sort(normal),
        "heavy tail": -np.abs(rng.standard_cauchy(size)),
        "looks at what is heavy": np.where(np.arange(size) % 320 < 16, 2.0, 0.0) + normal * 0.1,
        "looks at what is light": np.where(np.arange(size) % 320 < 16, -2.0, 0.0) + normal * 0.1,
        "mostly impossible": np.where(rng.random(size) < 0.9, -np.inf, normal),
        "extremes": rng.choice([3e38, -3e38, 0.0], size),
    }
    return {name: row.astype(np.float32) for name, row in found.items()}


LONG_ROWS = long_rows()


@pytest.mark.parametrize("row", LONG_ROWS.values(), ids=LONG_ROWS)
def test_every_implementation_finds_the_same_nucleus_of_a_long_row(chooser: RowChooser, row: Row) -> None:
    for sampling in (
        {"top_p": 0.95},
        {"top_p": 0.5},
        {"top_p": 1e-9},
        {"top_p": 1 - 1e-9},
        {"top_p": 0.9, "min_p": 0.2},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": 15_000},
        {"top_k": 15_000, "top_p": 0.7},
    ):
        for uniform in (0.0, 0.3, ALMOST_ONE):
            expected = drawn(NumpyRowChooser(), row, uniform, **sampling)
            assert drawn(chooser, row, uniform, **sampling) == expected, (sampling, uniform)


@pytest.mark.parametrize("name", NAMES[1:])
def test_sums_of_the_most_columns_are_exact(name: str) -> None:
    """Each weight is 1, in as many columns as may be: a sum in the kernels runs over several times."""
    row = np.zeros(MAX_COLUMNS, np.float32)
    chooser = row_chooser(name)
    for sampling in ({}, {"top_p": 0.75}):
        for uniform in (0.0, 0.5, ALMOST_ONE):
            mass = MAX_COLUMNS * sampling.get("top_p", 1.0)
            assert drawn(chooser, row, uniform, **sampling) == int(uniform * mass)
    assert chooser.likelihoods(row, 0)[0] == math.log(MAX_COLUMNS)


@settings(max_examples=100, deadline=None)
@given(case=rows(), num_top=st.integers(0, 20))
def test_every_implementation_finds_the_same_likelihoods(
    chooser: RowChooser, case: tuple[Row, Mask | None], num_top: int
) -> None:
    row, _ = case
    if not math.isfinite(row[row.argmax()]):
        return
    log_total, best = chooser.likelihoods(row, num_top)
    expected = NumpyRowChooser().likelihoods(row, num_top)
    assert (log_total, best.tolist()) == (expected[0], expected[1].tolist())


@settings(max_examples=200, deadline=None)
@given(case=rows(), sampling=samplings, uniform=st.floats(0, ALMOST_ONE))
def test_numpy_draws_what_fractions_say(
    case: tuple[Row, Mask | None], sampling: SamplingParams, uniform: float
) -> None:
    row, mask = case
    values = row if mask is None else np.where(unpack(mask, len(row)), row, -INFINITY)
    token_id = NumpyRowChooser().choose(row, mask, sampling, uniform)
    if not math.isfinite(values[values.argmax()]):
        assert token_id is None
    elif sampling.temperature < 1e-5:
        assert token_id == values.argmax()
    else:
        kept = kept_ids(values, sampling)
        ids = range(len(values)) if kept is None else kept.tolist()
        assert token_id == ExactDraw(values, ids, sampling.temperature)(uniform)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_native_scratch_suffices(name: str) -> None:
    chooser = row_chooser(name)
    assert isinstance(chooser, NativeRowChooser)
    for size in (1, 16, 63, 64, 65, 1000):
        chooser._reserve(size)
        needed = chooser._scratch_bytes(size) // 8
        chooser._scratch = np.full(needed + 64, 12345.0)
        chooser._scratch_address = chooser._scratch.ctypes.data
        for row in (np.zeros(size, np.float32), random_row(size)):
            for sampling in ({}, {"top_k": size // 2}, {"top_k": 1}, {"top_p": 0.999999999}, {"min_p": 1e-20}):
                drawn(chooser, row, 0.9, packed([True] * size), **sampling)
            chooser.likelihoods(row, 20)
        assert chooser._scratch[needed:].tolist() == [12345.0] * 64
        assert chooser._num_columns >= size


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_row_of_another_form_never_reaches_the_native_code(name: str) -> None:
    chooser = row_chooser(name)
    for row in (np.zeros(8), np.zeros(16, np.float32)[::2], np.zeros((2, 4), np.float32)):
        with pytest.raises(AssertionError):
            drawn(chooser, row)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        drawn(chooser, np.zeros(33, np.float32), 0.5, packed([True] * 32))

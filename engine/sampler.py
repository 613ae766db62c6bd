"""Chooses one token from each row of logits. A row's choice depends on that row and its request alone.

Everything but plain greedy runs in NumPy on the host, one row at a time: the result is then the same
for any batch, thread count or device, and no full row is ever sorted or normalised.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import EngineError, GrammarError, IntegrityError
from engine.grammar import Grammar, GrammarCompiler
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer

MIN_TEMPERATURE = 1e-5  # below it sampling is greedy
NUCLEUS_CANDIDATES = 1024  # as many tokens are sorted before a top_p row is sorted whole
_CDF_BLOCK = 256

Row = NDArray[np.float32]
Ids = NDArray[np.intp]


class SamplingError(EngineError):
    """A row of logits that no token can be drawn from. The request fails, its neighbours do not."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob` and `top_logprobs` (token id, logprob; best first) are of the unmodified logits."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class _State:
    """What the sampler keeps of a request between steps."""

    grammar: Grammar | None
    num_consumed: int = 0
    failure: GrammarError | None = None
    prompt_ids: Ids = field(default_factory=lambda: np.zeros(0, np.intp))
    output_counts: Counter[int] = field(default_factory=Counter)
    num_counted: int = 0


class Sampler:
    """Grammar constraint, penalties, truncation and the draw. One thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiler = GrammarCompiler(tokenizer)
        self._states: dict[str, _State] = {}
        self.num_full_sorts = 0  # top_p rows for which `NUCLEUS_CANDIDATES` did not suffice

    def warm_up(self) -> None:
        """Do now what the first constrained request would wait for."""
        self._compiler.warm_up()

    def add(self, request: Request) -> None:
        """Take up a request: compile its grammar and replay its output so far. Idempotent.

        Raises:
            GrammarError: The schema cannot be compiled; nothing has changed.
        """
        if request.request_id in self._states:
            return
        schema = request.sampling.json_schema
        state = _State(self._compiler.compile(schema) if schema is not None else None)
        if request.sampling.repetition_penalty != 1.0:
            state.prompt_ids = np.unique(np.array(request.prompt_token_ids, np.intp))
        self._states[request.request_id] = state
        for token_id in request.output_token_ids:
            self.accept(request, token_id)

    def remove(self, request_id: str) -> None:
        """Forget a request. Idempotent."""
        self._states.pop(request_id, None)

    def accept(self, request: Request, token_id: int) -> None:
        """One more token of the output, sampled here or elsewhere, in order. Never raises for the
        token's sake: one that breaks the grammar makes the request's next `sample` fail."""
        state = self._states.get(request.request_id)
        if state is None:
            return  # `add` replays the output
        state.num_consumed += 1
        if state.grammar is None or state.failure is not None:
            return
        try:
            state.grammar.consume(token_id)
        except GrammarError as error:
            state.failure = error

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken | EngineError]:
        """Next token of each request.

        Order of operations: grammar; penalties (repetition over prompt and output, then frequency and
        presence over output); end and stop tokens barred until `min_tokens`; temperature; top_k and
        min_p; top_p over what is left; draw. The draw comes from (seed, output position) alone.

        Args:
            logits: (R, V) float32, any device. Columns past the tokenizer's vocabulary are ignored;
                tokens past V cannot be drawn.
            requests: R of them, row r for requests[r]. Unknown ones are added.

        Returns:
            R items. An error stands for a request that cannot go on; the others are not affected.

        Raises:
            ValueError: Shape or dtype is wrong.
        """
        if logits.ndim != 2 or logits.shape[0] != len(requests) or logits.dtype != torch.float32:
            raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}, not ({len(requests)}, V) float32")
        logits = logits.detach()[:, : self._tokenizer.vocab_size]
        results: list[SampledToken | EngineError] = []
        for request, row in zip(requests, _host_rows(logits, requests), strict=True):
            try:
                results.append(row if isinstance(row, SampledToken) else self._sample_row(row, request))
            except EngineError as error:
                results.append(error)
        return results

    def _sample_row(self, row: Row, request: Request) -> SampledToken:
        sampling = request.sampling
        best = int(row.argmax())
        # argmax takes NaN for the greatest, so one look tells that the whole row is sound.
        if not math.isfinite(row[best]):
            raise SamplingError(f"{request.request_id}: the logits hold {row[best]} at token {best}")
        if _is_plain_greedy(sampling):
            return SampledToken(best)
        state = self._current_state(request)
        shaped = self._shaped(row, request, state)
        allowed = _below(state.grammar.allowed_token_ids(), len(row)) if state.grammar is not None else None
        values = _select(shaped, allowed)
        if values.size and not np.isfinite(values).any():
            # The grammar leaves only tokens that `min_tokens` bars; the grammar is the stronger promise.
            values = _select(row, allowed)
        index = self._choose(values, request)
        token_id = index if allowed is None else int(allowed[index])
        return _with_logprobs(token_id, row, sampling.logprobs)

    def _current_state(self, request: Request) -> _State:
        self.add(request)
        state = self._states[request.request_id]
        if state.failure is not None:
            raise state.failure
        num_output = len(request.output_token_ids)
        if state.grammar is not None and state.num_consumed != num_output:
            raise IntegrityError(
                f"{request.request_id}: the grammar has seen {state.num_consumed} of {num_output} tokens"
            )
        if _has_penalty(request.sampling):
            state.output_counts.update(request.output_token_ids[state.num_counted :])
            state.num_counted = num_output
        return state

    def _shaped(self, row: Row, request: Request, state: _State) -> Row:
        """The row with penalties and `min_tokens` applied; the row itself where there are none."""
        sampling = request.sampling
        barred = self._barred(request, len(row))
        if not barred and not _has_penalty(sampling):
            return row
        shaped = row.copy()
        output = [(token_id, count) for token_id, count in state.output_counts.items() if token_id < len(row)]
        output_ids = np.array([token_id for token_id, _ in output], np.intp)
        if sampling.repetition_penalty != 1.0:
            seen = np.union1d(_below(state.prompt_ids, len(row)), output_ids)
            values = shaped[seen]
            penalty = np.float32(sampling.repetition_penalty)
            shaped[seen] = np.where(values > 0, values / penalty, values * penalty)
        if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
            counts = np.array([count for _, count in output], np.float32)
            shaped[output_ids] -= np.float32(sampling.frequency_penalty) * counts
            shaped[output_ids] -= np.float32(sampling.presence_penalty)
        shaped[barred] = -np.inf
        return shaped

    def _barred(self, request: Request, num_columns: int) -> list[int]:
        sampling = request.sampling
        if len(request.output_token_ids) >= sampling.min_tokens:
            return []
        ends = frozenset() if sampling.ignore_eos else self._tokenizer.eos_token_ids
        # A caller may name any number as a stop token.
        return [token_id for token_id in ends.union(sampling.stop_token_ids) if 0 <= token_id < num_columns]

    def _choose(self, values: Row, request: Request) -> int:
        """Index into `values` of the token drawn."""
        sampling = request.sampling
        if not values.size:
            raise SamplingError(f"{request.request_id}: the grammar allows only tokens that the model lacks")
        best = int(values.argmax())
        if not math.isfinite(values[best]):
            raise SamplingError(f"{request.request_id}: every allowed token has logit {values[best]}")
        if sampling.temperature < MIN_TEMPERATURE:
            return best
        kept = self._kept(values, sampling)
        weights = _weights(values if kept is None else values[kept], values[best], sampling.temperature)
        drawn = _invert(weights, draw_uniform(sampling.seed, len(request.output_token_ids)))
        return drawn if kept is None else int(kept[drawn])

    def _kept(self, values: Row, sampling: SamplingParams) -> Ids | None:
        """Indices that top_k, min_p and top_p leave, in an order that depends on `values` alone; None: all.

        Ties at the edge of top_k are all kept.
        """
        kept: Ids | None = None
        if 0 < sampling.top_k < len(values):
            kept = np.flatnonzero(values >= _kth_largest(values, sampling.top_k))
        if sampling.min_p > 0.0:
            floor = float(values.max()) + sampling.temperature * math.log(sampling.min_p)
            above = np.flatnonzero(values >= np.float64(floor))
            kept = above if kept is None else np.intersect1d(kept, above, assume_unique=True)
        if sampling.top_p < 1.0:
            pool = values if kept is None else values[kept]
            nucleus = self._nucleus(pool, sampling)
            kept = nucleus if kept is None else kept[nucleus]
        return kept

    def _nucleus(self, values: Row, sampling: SamplingParams) -> Ids:
        """Indices of the fewest values whose probability reaches top_p; of equal values the first ones."""
        peak = values.max()
        total = float(_weights(values, peak, sampling.temperature).sum(dtype=np.float64))
        head, reached = values, None
        if len(values) > NUCLEUS_CANDIDATES:
            split = len(values) - NUCLEUS_CANDIDATES
            head, reached = _reach(np.partition(values, split)[split:], peak, total, sampling)
        if reached is None:
            self.num_full_sorts += len(values) > NUCLEUS_CANDIDATES
            head, reached = _reach(values, peak, total, sampling)
        # Rounding may leave the sum of all just short of top_p: then all are kept.
        kept = head[: len(head) if reached is None else reached]
        last = kept[-1]
        num_last = len(kept) - int(np.searchsorted(-kept, -last, side="left"))
        return np.concatenate([np.flatnonzero(values > last), np.flatnonzero(values == last)[:num_last]])


def draw_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, output position): 53 bits of BLAKE2b, the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"token draw").digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _is_plain_greedy(sampling: SamplingParams) -> bool:
    """True where the greatest logit decides and nothing else is asked for."""
    return (
        sampling.temperature < MIN_TEMPERATURE
        and sampling.json_schema is None
        and sampling.logprobs is None
        and sampling.min_tokens == 0
        and not _has_penalty(sampling)
    )


def _has_penalty(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _host_rows(logits: torch.Tensor, requests: Sequence[Request]) -> list[Row | SampledToken]:
    """Rows in host memory; off the host, plain greedy is settled where the logits are."""
    if logits.device.type == "cpu":
        return list(logits.numpy())
    return _settle_greedy_rows(logits, requests)


def _settle_greedy_rows(logits: torch.Tensor, requests: Sequence[Request]) -> list[Row | SampledToken]:
    """The token for each sound plain greedy row, a host copy of every other row."""
    peaks, best = (tensor.tolist() for tensor in logits.max(dim=1))
    is_settled = [
        _is_plain_greedy(request.sampling) and math.isfinite(peak)
        for request, peak in zip(requests, peaks, strict=True)
    ]
    others = [index for index, settled in enumerate(is_settled) if not settled]
    copies = iter(logits[others].cpu().numpy())
    return [SampledToken(best[index]) if settled else next(copies) for index, settled in enumerate(is_settled)]


def _below(ids: Ids, size: int) -> Ids:
    """The ids that have a column: a row may be narrower than the vocabulary."""
    return ids[ids < size]


def _select(row: Row, allowed: Ids | None) -> Row:
    return row if allowed is None else row[allowed]


def _kth_largest(values: Row, k: int) -> np.float32:
    index = len(values) - k
    value: np.float32 = np.partition(values, index)[index]
    return value


def _weights(values: Row, peak: np.float32, temperature: float) -> Row:
    """Unnormalised probabilities, float32, 1 for the peak."""
    with np.errstate(over="ignore", under="ignore"):
        weights: Row = np.exp((values - peak) / np.float32(temperature))
    return weights


def _reach(values: Row, peak: np.float32, total: float, sampling: SamplingParams) -> tuple[Row, int | None]:
    """`values`, greatest first, and how many of them reach top_p of `total`; None if all do not."""
    ordered = np.sort(values)[::-1]
    cumulative = np.cumsum(_weights(ordered, peak, sampling.temperature), dtype=np.float64)
    reached = int(np.searchsorted(cumulative, sampling.top_p * total, side="left")) + 1
    return ordered, reached if reached <= len(ordered) else None


def _invert(weights: Row, uniform: float) -> int:
    """Index at which the cumulative weight passes `uniform` of the total. Never one of weight 0."""
    if len(weights) <= _CDF_BLOCK:
        return _invert_block(weights, 0.0, uniform * float(weights.sum(dtype=np.float64)))
    padded = np.zeros(-(-len(weights) // _CDF_BLOCK) * _CDF_BLOCK, np.float32)
    padded[: len(weights)] = weights
    blocks = padded.reshape(-1, _CDF_BLOCK)
    sums = blocks.sum(axis=1, dtype=np.float64)
    cumulative = np.cumsum(sums)
    target = uniform * float(cumulative[-1])
    block = min(int(np.searchsorted(cumulative, target, side="right")), int(np.flatnonzero(sums)[-1]))
    before = float(cumulative[block - 1]) if block else 0.0
    return block * _CDF_BLOCK + _invert_block(blocks[block], before, target)


def _invert_block(weights: Row, before: float, target: float) -> int:
    cumulative = before + np.cumsum(weights, dtype=np.float64)
    # Rounding may leave the target past the end: the last token with any weight takes it.
    last = int(np.flatnonzero(weights)[-1])
    return min(int(np.searchsorted(cumulative, target, side="right")), last)


def _with_logprobs(token_id: int, row: Row, num_top: int | None) -> SampledToken:
    if num_top is None:
        return SampledToken(token_id)
    peak = row.max()
    log_total = float(peak) + math.log(_weights(row, peak, 1.0).sum(dtype=np.float64))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        head = np.flatnonzero(row >= _kth_largest(row, min(num_top, len(row))))
        best = head[np.argsort(-row[head], kind="stable")][:num_top]
        top = tuple((int(index), float(row[index]) - log_total) for index in best)
    return SampledToken(token_id, float(row[token_id]) - log_total, top)

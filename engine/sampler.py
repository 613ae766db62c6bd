"""Chooses one token from each row of logits. A row's choice depends on that row and its request alone.

Grammar, penalties and errors are here, one row at a time; the choice within a row is a `RowChooser`'s. The masks of
constrained requests are computed in a thread of their own while the model computes the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.draw import MAX_COLUMNS, MIN_TEMPERATURE, Ids, Mask, NumpyRowChooser, Row, RowChooser, draw_uniform
from engine.errors import EngineError, GrammarError, IntegrityError
from engine.grammar import Grammar, GrammarCompiler, MaskWorker
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer


class SamplingError(EngineError):
    """A row of logits that no token can be drawn from. The request fails, its neighbours do not."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob` and `top_logprobs` (token id, logprob; best first) are of the unmodified logits."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class _Occurrences:
    """The tokens that penalties are for: ids, each once, and how often each is in the output (0: prompt only)."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self.ids: Ids = np.unique(np.array(prompt_token_ids, np.intp))
        self.counts = np.zeros(len(self.ids), np.float32)
        self._places = {int(token_id): place for place, token_id in enumerate(self.ids)}
        self._num_counted = 0

    def update(self, output_token_ids: Sequence[int]) -> None:
        """Count the tokens that are new in the output."""
        for token_id in output_token_ids[self._num_counted :]:
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids, self.counts = np.append(self.ids, token_id), np.append(self.counts, np.float32(0.0))
            self.counts[place] += 1
        self._num_counted = len(output_token_ids)


@dataclass(slots=True)
class _State:
    """What the sampler keeps of a request between steps."""

    grammar: Grammar | None
    occurrences: _Occurrences | None  # where the request has penalties
    num_consumed: int = 0
    failure: GrammarError | None = None


class Sampler:
    """Grammar constraint, penalties, truncation and the draw. One thread at a time.

    `num_masks_ahead`, `num_masks_on_demand`: grammar masks that were ready when their row was sampled, and those
    that the row had to wait for.
    """

    def __init__(self, tokenizer: Tokenizer, row_chooser: RowChooser | None = None) -> None:
        """
        Args:
            row_chooser: How a token is chosen within a row; None: with NumPy.

        Raises:
            ValueError: The vocabulary is larger than `MAX_COLUMNS`.
        """
        if tokenizer.vocab_size > MAX_COLUMNS:
            raise ValueError(f"a vocabulary of {tokenizer.vocab_size} is larger than {MAX_COLUMNS}")
        self._tokenizer = tokenizer
        self._rows = row_chooser or NumpyRowChooser()
        self._compiler = GrammarCompiler(tokenizer)
        self._masks = MaskWorker()
        self._states: dict[str, _State] = {}
        self.num_masks_ahead = 0
        self.num_masks_on_demand = 0

    def close(self) -> None:
        """End the thread that computes masks. Idempotent; masks are computed on demand from then on."""
        self._masks.close()

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
        sampling = request.sampling
        grammar = self._compiler.compile(sampling.json_schema) if sampling.json_schema is not None else None
        occurrences = None
        if _has_penalty(sampling):
            occurrences = _Occurrences(request.prompt_token_ids if sampling.repetition_penalty != 1.0 else ())
        self._states[request.request_id] = _State(grammar, occurrences)
        for token_id in request.output_token_ids:
            self.accept(request, token_id)

    def remove(self, request_id: str) -> None:
        """Forget a request. Idempotent."""
        self._states.pop(request_id, None)

    def accept(self, request: Request, token_id: int) -> None:
        """One more token of the output, sampled here or elsewhere, in order. Never raises for the
        token's sake: one that breaks the grammar makes the request's next `sample` fail."""
        self._masks.wait()
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

    def prepare(self, requests: Sequence[Request]) -> None:
        """Start computing the masks of requests that the next `sample` may be given, and return at once.

        Until then the grammars belong to the worker; whatever else needs one waits for it.
        """
        states = [self._states.get(request.request_id) for request in requests]
        self._masks.start([state.grammar for state in states if state is not None and state.grammar is not None])

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
        rows = _host_rows(logits, requests)
        self._masks.wait()
        results: list[SampledToken | EngineError] = []
        for request, row in zip(requests, rows, strict=True):
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
        mask = self._mask(state.grammar) if state.grammar is not None else None
        uniform = draw_uniform(sampling.seed, len(request.output_token_ids))
        token_id = self._rows.choose(shaped, mask, sampling, uniform)
        if token_id is None and shaped is not row:
            # The grammar leaves only tokens that `min_tokens` bars; the grammar is the stronger promise.
            token_id = self._rows.choose(row, mask, sampling, uniform)
        if token_id is None:
            raise SamplingError(f"{request.request_id}: the model gives no weight to any token that may come")
        return self._with_logprobs(token_id, row, sampling.logprobs)

    def _mask(self, grammar: Grammar) -> Mask:
        if grammar.has_mask:
            self.num_masks_ahead += 1
        else:
            self.num_masks_on_demand += 1
        return grammar.mask()

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
        if state.occurrences is not None:
            state.occurrences.update(request.output_token_ids)
        return state

    def _shaped(self, row: Row, request: Request, state: _State) -> Row:
        """The row with penalties and `min_tokens` applied; the row itself where there are none."""
        sampling = request.sampling
        barred = self._barred(request, len(row))
        if not barred and state.occurrences is None:
            return row
        shaped = row.copy()
        if state.occurrences is not None:
            has_column = state.occurrences.ids < len(row)
            ids, counts = state.occurrences.ids[has_column], state.occurrences.counts[has_column]
            values, penalty = row[ids], np.float32(sampling.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
            values -= np.float32(sampling.frequency_penalty) * counts
            values -= np.float32(sampling.presence_penalty) * (counts > 0)
            shaped[ids] = values
        shaped[barred] = -np.inf
        return shaped

    def _barred(self, request: Request, num_columns: int) -> list[int]:
        sampling = request.sampling
        if len(request.output_token_ids) >= sampling.min_tokens:
            return []
        ends = frozenset() if sampling.ignore_eos else self._tokenizer.eos_token_ids
        # A caller may name any number as a stop token.
        return [token_id for token_id in ends.union(sampling.stop_token_ids) if 0 <= token_id < num_columns]

    def _with_logprobs(self, token_id: int, row: Row, num_top: int | None) -> SampledToken:
        if num_top is None:
            return SampledToken(token_id)
        log_total, best = self._rows.likelihoods(row, num_top)
        top = tuple((int(index), float(row[index]) - log_total) for index in best)
        return SampledToken(token_id, float(row[token_id]) - log_total, top)


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
        return list(logits.numpy() if logits.stride(1) == 1 else logits.contiguous().numpy())
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

"""A request inside the engine: parameters, states and the transitions between them. No torch, no clock."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import pairwise

from engine.errors import IntegrityError
from engine.zone import EPHEMERAL, Zone, ZoneSpan, zone_at

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(Enum):
    WAITING = auto()  # queued; owns no blocks
    RESERVED = auto()  # owns blocks that a remote prefill is writing
    RUNNING = auto()  # owns blocks; scheduled in every step that has room
    HELD = auto()  # prefill-only, computed or aborted; owns its blocks until they are released
    FINISHED = auto()


_ALLOWED: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.RESERVED, RequestStatus.FINISHED}),
    RequestStatus.RESERVED: frozenset({RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.WAITING, RequestStatus.HELD, RequestStatus.FINISHED}),
    RequestStatus.HELD: frozenset({RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Every random draw depends on (seed, output position) alone.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and penalties at their neutral values are off.
    `seed` is always set by the caller: the edge draws one when the client names none.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens must lie between 0 and max_tokens"),
            (0.0 <= self.temperature <= 2.0, "temperature must lie between 0 and 2"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0.0 < self.top_p <= 1.0, "top_p must lie in (0, 1]"),
            (0.0 <= self.min_p <= 1.0, "min_p must lie in [0, 1]"),
            (-2.0 <= self.presence_penalty <= 2.0, "presence_penalty must lie between -2 and 2"),
            (-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty must lie between -2 and 2"),
            (0.0 < self.repetition_penalty <= 10.0, "repetition_penalty must lie in (0, 10]"),
            (0 <= self.seed < 2**63, "seed must be a non-negative 63-bit integer"),
            (len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} stop strings"),
            (all(self.stop), "a stop string must not be empty"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
                f"logprobs must lie between 0 and {MAX_TOP_LOGPROBS}",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)


@dataclass(slots=True, eq=False)
class Request:
    """One sequence, owned by the one engine it is given to.

    The caller sets the fields down to `output_token_ids`; the engine keeps the rest.
    `epoch`: that of the request's own zone; a wider zone's epoch stands on its spans.
    `tenant`: on whose behalf blocks are evicted, where the request's own zone does not say.
    `priority`: smaller runs first; arrival order breaks ties.
    `is_prefill_only`: computes the prompt, samples one token, then holds its blocks for a push.
    `output_token_ids`: not empty at the start where another engine began the answer.
    `num_computed_tokens`: leading tokens whose KV is in the request's own blocks.
    `num_cached_tokens`, `num_local_prompt_tokens`: prompt tokens by origin: found in this engine's
        cache, computed by this engine. What remains came from a remote prefill.
    `num_recomputed_tokens`: tokens computed again after a preemption or a failed handoff.
    `num_attributed_tokens`: leading tokens whose origin is already counted.
    `num_lost_tokens`: leading tokens whose KV existed, or was promised, and was lost.
    `num_shareable_blocks`: leading blocks that may be found or become findable; a purge lowers it.
    `block_digests`: of the leading full blocks in cacheable zones, extended as they fill.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    zone_spans: tuple[ZoneSpan, ...] = ()
    epoch: int = 0
    tenant: str = ""
    priority: int = 0
    is_prefill_only: bool = False
    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    arrival: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_local_prompt_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_attributed_tokens: int = 0
    num_lost_tokens: int = 0
    num_preemptions: int = 0
    num_shareable_blocks: int = sys.maxsize
    block_digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("a request needs at least one prompt token")
        if any(before.end >= after.end for before, after in pairwise(self.zone_spans)):
            raise ValueError("zone spans must end in strictly ascending order")

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known but not yet in the KV cache: 1 when decoding, more in prefill."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens [start, end) of prompt and output taken as one sequence."""
        split = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:end] + tuple(
            self.output_token_ids[max(0, start - split) : max(0, end - split)]
        )

    @property
    def zone(self) -> Zone:
        """The request's own zone: the join of all that its prompt holds; also that of what it generates."""
        return self._zone_of_token(len(self.prompt_token_ids) - 1)

    def zone_of_block(self, index: int, block_size: int) -> Zone:
        """Join of the zones of every token up to the block's last."""
        return self._zone_of_token((index + 1) * block_size - 1)

    def epoch_of(self, zone: Zone) -> int:
        """Epoch under which blocks of `zone` are hashed."""
        if zone == self.zone:
            return self.epoch
        return max((span.epoch for span in self.zone_spans if span.zone == zone), default=0)

    def first_block_of(self, zone: Zone, block_size: int) -> int | None:
        """Index of the first block that holds a token labelled `zone`; None where no span is."""
        start = 0
        for span in self.zone_spans:
            if span.zone == zone:
                return start // block_size
            start = span.end
        return None

    def _zone_of_token(self, index: int) -> Zone:
        """Prompt tokens past the last span carry no label: from there on everything is ephemeral."""
        labelled = self.zone_spans[-1].end if self.zone_spans else 0
        if labelled <= index and labelled < len(self.prompt_token_ids):
            return EPHEMERAL
        return zone_at(self.zone_spans, index)

    def advance(self, count: int) -> int:
        """The next `count` tokens have been computed here; attributes them.

        Returns:
            How many of them were computed again.
        """
        start, end = self.num_computed_tokens, self.num_computed_tokens + count
        num_prompt = len(self.prompt_token_ids)
        self.num_local_prompt_tokens += max(0, min(end, num_prompt) - max(start, self.num_attributed_tokens))
        num_again = max(0, min(end, self.num_lost_tokens) - start)
        self.num_recomputed_tokens += num_again
        self.num_attributed_tokens = max(self.num_attributed_tokens, end)
        self.num_computed_tokens = end
        return num_again

    def transition(self, target: RequestStatus) -> None:
        """Move to `target`.

        Raises:
            IntegrityError: The table of states does not allow it.
        """
        if target not in _ALLOWED[self.status]:
            raise IntegrityError(f"{self.request_id}: {self.status.name} -> {target.name} is not allowed")
        self.status = target

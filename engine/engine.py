"""The engine: schedule -> execute -> sample -> update. Token ids in, tokens and text out.

One thread at a time; nothing here waits. A coordinator above it moves KV between engines and calls the
handoff methods: `reserve`, `accept_first_token`, `complete_handoff`, `prefill_locally`, `release_quarantine`
where the KV lands, `block_ids`, `release` where it comes from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from engine.block_hash import BlockHasher
from engine.block_pool import BlockPool
from engine.cache_events import CacheEvent
from engine.detokenizer import Detokenizer
from engine.epoch_floors import MAX_EPOCH
from engine.errors import EngineError, IntegrityError, RequestError, RequestStateError
from engine.kv_cache_manager import KVCacheManager, PurgeCount
from engine.quotas import NO_QUOTAS, Quotas
from engine.request import FinishReason, Request, RequestStatus
from engine.sampler import SampledToken, Sampler
from engine.scheduler import ScheduledChunk, Scheduler, SchedulerConfig
from engine.tokenizer import Tokenizer
from engine.zone import Zone

if TYPE_CHECKING:
    import torch

    from engine.model_runner import ModelRunner

# By request id: its next token, or why it can have none.
_Sampled: TypeAlias = dict[str, SampledToken | EngineError]


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a remote prefill is asked to write.

    `block_ids`, `generations`: only the blocks to be written, in order. The first holds block
    `first_missing_block` of the prompt, the last its end; earlier blocks are here already, and blocks
    reserved for output are nobody else's to write.
    """

    request_id: str
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    num_cached_tokens: int
    first_missing_block: int


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one request: 0 or 1 new tokens, text that has become complete, and how it ends.

    `text` may come without a token (held back until the end) and a token without text. A stop string or
    the token that ended the request is not part of it. `stop_reason`: the stop string, or the id of
    a stop token from the request; None where an end-of-sequence token ended it. `error`: why, where
    `finish_reason` is ERROR. Counts are totals so far: see `Request`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_local_prompt_tokens: int = 0
    num_recomputed_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts: requests, blocks and `pending_tokens` (known but not computed, waiting or running) as they
    are now, the others since the start. Each block is in one of the `blocks_` counts; a pinned one is no used
    one. `prefix_cache_queries` and `_hits` are prompt tokens. `evictions`: on demand; `quota_evictions`: above a
    cap. `stale_epochs`: requests that were labelled before a purge. `lost_cache_events`: see `CacheEventLog`.
    """

    running: int
    waiting: int
    reserved: int
    held: int
    pending_tokens: int
    blocks_free: int
    blocks_used: int
    blocks_cached: int
    blocks_quarantined: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int
    steps: int
    generated_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    scrubbed_blocks: int
    evictions: int
    expired_blocks: int
    blocks_pinned: int = 0
    quota_evictions: int = 0
    stale_epochs: int = 0
    lost_cache_events: int = 0


class Engine:
    """Serves requests on one model runner and one KV cache.

    A request that leaves is forgotten at once: what is known of it is in its outputs.
    """

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        hasher: BlockHasher,
        num_blocks: int,
        clock: Callable[[], float] = time.monotonic,
        case_idle_ttl_s: float = 900.0,
        quotas: Quotas = NO_QUOTAS,
    ) -> None:
        """
        Args:
            num_blocks: How many of the runner's blocks to use.
            clock: Monotonic seconds.
            case_idle_ttl_s: How long a case's blocks stay findable after its last use.

        Raises:
            ValueError: The runner has fewer blocks, or the quotas would leave the longest request too few.
        """
        if num_blocks > runner.num_blocks:
            raise ValueError(f"the runner has {runner.num_blocks} blocks, not {num_blocks}")
        self._config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._clock = clock
        self._pool = BlockPool(num_blocks, runner.scrub, quotas=quotas)
        self._cache = KVCacheManager(
            self._pool, hasher, runner.layout.block_size, clock=clock, case_idle_ttl_s=case_idle_ttl_s
        )
        self._scheduler = Scheduler(config, self._cache)
        num_left, num_longest = self._pool.num_dependable(), self._scheduler.num_longest_blocks
        if num_left < num_longest:
            raise ValueError(
                f"floors and the public cap leave {num_left} of {num_blocks} blocks; a request of "
                f"{config.max_model_len} tokens, the longest, needs {num_longest}"
            )
        self._sampler = Sampler(tokenizer, runner.row_chooser)
        self._detokenizers: dict[str, Detokenizer] = {}
        self._num_steps = 0
        self._num_generated = 0
        self._num_computed = 0
        self._num_expired = 0

    @property
    def has_work(self) -> bool:
        """True where a step may compute something. False too while the queue waits for blocks or seats that
        only a call from outside can free (`release`, `release_quarantine`, `expire`, the end of a handoff)."""
        return self._scheduler.has_work

    def step(self) -> list[RequestOutput]:
        """Compute one batch. Where the runner raises, no request has moved and the step may be repeated."""
        self.expire()
        outputs: list[RequestOutput] = []
        chunks = self._scheduler.schedule()
        if chunks:
            sampling = [self._live(chunk.request_id) for chunk in chunks if chunk.samples]
            self._sampler.prepare(sampling)  # works while the model does
            logits = self._runner.execute(chunks)
            sampled = self._sample(sampling, logits)
            outputs = self._update(chunks, sampled)
        outgrown = self._scheduler.take_outgrown()
        return outputs + [self._end(request, FinishReason.LENGTH) for request in outgrown]

    def add_request(self, request: Request) -> None:
        """Queue a new request. One that another engine began brings its `output_token_ids`; their text is
        not given out again.

        Raises:
            RequestError: It can never be served: too long, an unknown token, an id that is live, a schema
                that does not compile (`GrammarError`).
            QueueFullError: Too many are waiting.
        """
        self._take_up(request)
        try:
            self._scheduler.add(request)
        except EngineError:
            self._forget(request.request_id)
            raise

    def num_cached_prompt_tokens(self, request: Request) -> int:
        """Tokens that a prefix hit would save the request now. Nothing changes.

        Raises:
            RequestError: A token id lies outside the vocabulary.
        """
        self._check_tokens(request.prompt_token_ids)
        return len(self._cache.match_prefix(request)) * self._cache.block_size

    def abort(self, request_id: str) -> None:
        """End a request without a further output. Idempotent.

        Waiting or running: freed. Reserved: what a remote prefill may write goes to quarantine.
        Prefill-only and running: it holds its blocks until `release`.
        """
        request = self._scheduler.get(request_id)
        if request is not None:
            self._finish(request)

    def expire(self) -> int:
        """Drop idle blocks of cases past their time to live. Each step does this; so must an idle caller.

        Returns:
            How many blocks were scrubbed and freed.
        """
        num_expired = self._cache.expire(self._clock())
        self._num_expired += num_expired
        return num_expired

    def reserve(self, request: Request) -> Reservation | None:
        """Seat a request whose prompt a remote prefill computes, with blocks for prompt and first output.

        Returns:
            None when there is no seat or no room, and then nothing has changed.

        Raises:
            RequestError: As `add_request`; or blocks of this request id are in quarantine still.
        """
        self._take_up(request)
        is_seated = False
        try:
            is_seated = self._scheduler.reserve(request)
        finally:
            if not is_seated:
                self._forget(request.request_id)
        if not is_seated:
            return None
        table = self._cache.table(request.request_id)
        start, end = table.exposed
        return Reservation(
            request_id=request.request_id,
            block_ids=tuple(table.block_ids[start:end]),
            generations=tuple(table.generations[start:end]),
            num_cached_tokens=request.num_cached_tokens,
            first_missing_block=start,
        )

    def generations(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Present generations, to be compared with those of a reservation or a ticket."""
        return tuple(self._pool.generation(block_id) for block_id in block_ids)

    def accept_first_token(self, request_id: str, token: SampledToken) -> RequestOutput:
        """Take the token that the remote prefill sampled, before its KV has landed.

        The output may end the request; its exposed blocks are then in quarantine.

        Raises:
            RequestStateError: The request holds no reservation, or has its first token.
            RequestError: No such token.
        """
        request = self._scheduler.reserved(request_id)
        if request.output_token_ids:
            raise RequestStateError(f"request {request_id} has its first token already")
        self._check_tokens((token.token_id,))
        return self._append(request, token)

    def complete_handoff(self, request_id: str) -> None:
        """The prompt's KV has landed and is verified: the request runs, and its blocks may be found.

        Raises:
            RequestStateError: The request holds no reservation, or its first token was not accepted.
        """
        if not self._scheduler.reserved(request_id).output_token_ids:
            raise RequestStateError(f"request {request_id} has no first token yet")
        self._scheduler.land(request_id)

    def prefill_locally(self, request_id: str) -> None:
        """The handoff failed: compute the prompt here. Exposed blocks go to quarantine.

        A first token that was accepted stays and is not given out again.

        Raises:
            RequestStateError: The request holds no reservation.
        """
        self._scheduler.fall_back(request_id)

    def release_quarantine(self, request_id: str) -> int:
        """No write to the request's reservation can land any more: scrub and free. Idempotent.

        Returns:
            How many blocks were freed.
        """
        return self._pool.release_quarantine(request_id)

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """The request's block table; for a prefill-only request it does not change until `release`.

        Raises:
            RequestStateError: It has none.
        """
        request = self._scheduler.get(request_id)
        if request is None or request.status is RequestStatus.WAITING:
            raise RequestStateError(f"request {request_id} has no blocks")
        return self._cache.table(request_id).as_tuple()

    def release(self, request_id: str) -> None:
        """Free what a prefill-only request holds, once its writes are done. Idempotent.

        Raises:
            RequestStateError: It is still being served; `abort` it first.
        """
        self._scheduler.release(request_id)

    def pin(self, request_id: str) -> int:
        """Keep the prefix that a prefill-only request has computed: it ends, its other blocks are freed, and what
        is findable of it is not evicted before `unpin(request_id)`, a purge or `rekey`.

        Returns:
            How many blocks are pinned under this name. 0 where nothing is findable, as after a purge, and then the
            name is not pinned. Blocks from the first one of a case on are never pinned.

        Raises:
            RequestStateError: It is not a prefill-only request whose prompt is computed and that holds its blocks.
            PinRefused: The longest request could not be sure of room besides, or too many names are pinned;
                nothing has changed, and the request waits for `release`.
        """
        return self._scheduler.pin(request_id)

    def unpin(self, request_id: str) -> int:
        """End a pin. Idempotent. What nobody else uses or pins is dropped from the index, scrubbed if its zone
        is, and freed; what a request uses stays findable.

        Returns:
            How many blocks were freed.
        """
        return self._cache.unpin(request_id)

    def pinned(self) -> tuple[str, ...]:
        """Names that are pinned, oldest first."""
        return self._cache.pinned()

    def purge(self, zone_path: str, epoch: int) -> PurgeCount:
        """Make nothing of a zone findable, now, by a request that is live now, or by one of an earlier epoch.

        Raises the zone's floor to `epoch`; it is never lowered, and the same epoch purges again. A request with a
        lower epoch is served, but from the zone's first block on it finds and publishes nothing; one with a higher
        epoch raises the floor and purges. What is idle or pinned is scrubbed at once, whatever the zone; what is
        used or in quarantine, when it is given back. A pinned prefix that holds a block of the zone is unpinned.

        Blocks of other zones that follow a purged one stay in the index, where nothing leads to them
        unless the same tokens are computed again in the same zone and epoch.

        Where floors of `MAX_EPOCH_FLOORS` zones are kept, the floor of every zone rises to the highest of them and
        the whole index is dropped: zones below it are served without a cache from then on.

        Raises:
            RequestError: Not a zone path, or an epoch outside [0, 2**63).
        """
        try:
            zone = Zone.parse(zone_path)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if not 0 <= epoch <= MAX_EPOCH:
            raise RequestError("an epoch lies outside [0, 2**63)")
        return self._scheduler.purge(zone, epoch)

    def epoch_floor(self, zone: Zone) -> int:
        """The least epoch with which a request finds or publishes blocks of the zone."""
        return self._cache.epoch_floor(zone)

    def rekey(self, hasher: BlockHasher) -> int:
        """Use another hasher from now on. All that is findable is dropped, pins too; requests that are live
        publish nothing.

        Returns:
            How many blocks were findable.
        """
        return self._scheduler.rekey(hasher)

    def take_cache_events(self) -> list[CacheEvent]:
        """What the cache did since the last call, for the audit log; bounded by `MAX_CACHE_EVENTS`."""
        return self._pool.events.take()

    def warm_up(self) -> None:
        """Do now what the first request with a JSON schema would wait for."""
        self._sampler.warm_up()

    def close(self) -> None:
        """End the engine's own thread. Idempotent; it may be used on."""
        self._sampler.close()

    def stats(self) -> EngineStats:
        scheduler, pool, cache = self._scheduler, self._pool, self._cache
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            reserved=scheduler.num_reserved,
            held=scheduler.num_held,
            pending_tokens=scheduler.num_pending_tokens,
            blocks_free=pool.num_free,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_idle,
            blocks_quarantined=pool.num_quarantined,
            prefix_cache_queries=cache.num_queried_tokens,
            prefix_cache_hits=cache.num_hit_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self._num_steps,
            generated_tokens=self._num_generated,
            computed_tokens=self._num_computed,
            recomputed_tokens=scheduler.num_recomputed_tokens,
            scrubbed_blocks=pool.num_scrubbed,
            evictions=pool.num_evictions,
            expired_blocks=self._num_expired,
            blocks_pinned=pool.num_pinned,
            quota_evictions=pool.num_quota_evictions,
            stale_epochs=cache.num_stale_epochs,
            lost_cache_events=pool.events.num_lost,
        )

    def check(self) -> None:
        """Every invariant of scheduler, tables and pool. Linear in blocks; for tests and idle moments.

        Raises:
            IntegrityError: One does not hold.
        """
        self._scheduler.check()
        if set(self._detokenizers) != self._scheduler.unfinished_ids():
            raise IntegrityError("the engine keeps text of requests that are not live, or lacks it")

    def _sample(self, requests: Sequence[Request], logits: torch.Tensor) -> _Sampled:
        """The next token of each request whose known tokens are now computed."""
        sampled = self._sampler.sample(logits, requests)
        return {request.request_id: item for request, item in zip(requests, sampled, strict=True)}

    def _update(self, chunks: Sequence[ScheduledChunk], sampled: _Sampled) -> list[RequestOutput]:
        """The step has succeeded: move every request on."""
        self._num_steps += 1
        self._num_computed += sum(len(chunk.token_ids) for chunk in chunks)
        self._scheduler.update(chunks)
        outputs = []
        for chunk in chunks:
            request, item = self._live(chunk.request_id), sampled.get(chunk.request_id)
            if isinstance(item, SampledToken):
                outputs.append(self._append(request, item))
            elif item is not None:
                outputs.append(self._end(request, FinishReason.ERROR, error=str(item)))
            elif request.is_prefill_only:
                outputs.append(self._output(request))
        return outputs

    def _append(self, request: Request, token: SampledToken) -> RequestOutput:
        """Add a token to the request's answer, and end it where the token does."""
        request.output_token_ids.append(token.token_id)
        self._num_generated += 1
        self._sampler.accept(request, token.token_id)
        detokenizer = self._detokenizers[request.request_id]
        stop_reason: str | int | None
        reason, stop_reason = self._stopped_by_token(request, token.token_id)
        text = detokenizer.push(token.token_id) if reason is None else ""
        if detokenizer.stopped_by is not None:
            reason, stop_reason = FinishReason.STOP, detokenizer.stopped_by
        if reason is None and self._is_at_limit(request):
            reason = FinishReason.LENGTH
        if reason is not None:
            text += detokenizer.flush()
            self._finish(request)
        return self._output(
            request,
            token_ids=(token.token_id,),
            text=text,
            logprobs=(token,) if request.sampling.logprobs is not None else (),
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput:
        """End a request for a reason that no token gave."""
        text = self._detokenizers[request.request_id].flush()
        self._finish(request)
        return self._output(request, text=text, finish_reason=reason, error=error)

    def _stopped_by_token(self, request: Request, token_id: int) -> tuple[FinishReason | None, int | None]:
        if token_id in request.sampling.stop_token_ids:
            return FinishReason.STOP, token_id
        if token_id in self._tokenizer.eos_token_ids and not request.sampling.ignore_eos:
            return FinishReason.STOP, None
        return None, None

    def _is_at_limit(self, request: Request) -> bool:
        return (
            request.is_prefill_only
            or len(request.output_token_ids) >= request.sampling.max_tokens
            or request.num_tokens >= self._config.max_model_len
        )

    def _output(
        self,
        request: Request,
        *,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[SampledToken, ...] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=request.request_id,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_computed_tokens=request.num_computed_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_local_prompt_tokens=request.num_local_prompt_tokens,
            num_recomputed_tokens=request.num_recomputed_tokens,
            error=error,
        )

    def _take_up(self, request: Request) -> None:
        """Check a new request and prepare its sampling and text."""
        self._scheduler.validate(request)
        self._check_tokens(request.prompt_token_ids)
        self._check_tokens(request.output_token_ids)
        self._scheduler.observe_epochs(request)
        self._sampler.add(request)
        detokenizer = Detokenizer(self._tokenizer, request.sampling.stop, min_tokens=request.sampling.min_tokens)
        for token_id in request.output_token_ids:
            detokenizer.push(token_id)
        self._detokenizers[request.request_id] = detokenizer

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._runner.vocab_size:
            raise RequestError(f"a token id lies outside the vocabulary of {self._runner.vocab_size}")

    def _live(self, request_id: str) -> Request:
        request = self._scheduler.get(request_id)
        if request is None:
            raise IntegrityError(f"{request_id} was scheduled but is not live")
        return request

    def _finish(self, request: Request) -> None:
        self._scheduler.finish(request)
        self._forget(request.request_id)

    def _forget(self, request_id: str) -> None:
        self._sampler.remove(request_id)
        self._detokenizers.pop(request_id, None)

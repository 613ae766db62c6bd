"""Chooses what the next step computes. Pure bookkeeping: no tensors, no clock, no I/O.

Continuous batching with chunked prefill under a token budget, decodes first. A request takes all blocks of
the tokens it knows when it is admitted, so only decodes ever need to grow; where one cannot, the request
that matters least gives its blocks up and is computed again later.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.block_hash import BlockHasher
from engine.epoch_floors import MAX_EPOCH
from engine.errors import IntegrityError, PinRefused, QueueFullError, RequestError, RequestStateError
from engine.kv_cache_manager import KVCacheManager, PurgeCount
from engine.request import Request, RequestStatus
from engine.zone import Zone


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens [start, start + len(token_ids)) of one request, to be computed in this step.

    `block_ids`: the request's table; it covers at least these tokens.
    `samples`: the chunk reaches the end of the known tokens, so its last row's logits are wanted.
    """

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one engine.

    `max_num_batched_tokens`: token budget of a step.
    `max_num_seqs`: seats; a running request takes one, and so does a reservation, which will run.
    `max_prefill_chunk`: most prompt tokens of one request in a step.
    `max_model_len`: most tokens of a request, prompt and output.
    `max_waiting`: most requests in the queue that were not admitted yet.
    `local_output_reserve`: output tokens for which there must be room beside the prompt at admission, as
        far as `max_tokens` asks for so many. A reservation takes these blocks at once, since a request
        that ran out of room right after its KV was sent would have to be computed again; a local
        request only needs them to be available. 64 tokens are 4 blocks of 16: most structured answers
        start without a preemption, and a full pool is not left idle for outputs that end early.
    """

    max_num_batched_tokens: int = 512
    max_num_seqs: int = 32
    max_prefill_chunk: int = 256
    max_model_len: int = 8192
    max_waiting: int = 256
    local_output_reserve: int = 64

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_prefill_chunk", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_model_len < 2:
            raise ValueError("max_model_len must leave room for a prompt token and an output token")
        if self.local_output_reserve < 0:
            raise ValueError("local_output_reserve must not be negative")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must give each of max_num_seqs decodes its token")


class Scheduler:
    """Queue, seats and states of all live requests.

    Order everywhere: smaller `priority` first, then arrival; a preempted request keeps its place. The
    queue is served strictly in this order: a request that does not fit yet is not overtaken.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager) -> None:
        self.config = config
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self._cache = cache
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._reserved: dict[str, Request] = {}
        self._held: dict[str, Request] = {}
        self._outgrown: list[Request] = []
        self._num_arrived = 0
        self._blocked_by: tuple[object, ...] | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_reserved(self) -> int:
        return len(self._reserved)

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known but not computed, of waiting and running requests."""
        return sum(request.num_pending_tokens for request in (*self._waiting, *self._running))

    @property
    def has_work(self) -> bool:
        """True where `schedule` may find something to compute: a queue whose head waits for blocks or a
        seat that nothing here will free is no work."""
        if self._running or self._outgrown:
            return True
        return bool(self._waiting) and self._blocked_by != self._admission_state()

    def get(self, request_id: str) -> Request | None:
        """A live request."""
        return self._requests.get(request_id)

    def unfinished_ids(self) -> set[str]:
        """Live requests that still get tokens: all but those that only hold blocks."""
        return self._requests.keys() - self._held.keys()

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            RequestError: It can never be served: see `validate`.
            QueueFullError: `max_waiting` are queued.
        """
        self.validate(request)
        if len(self._waiting) >= self.config.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting already")
        self._register(request)
        insort(self._waiting, request, key=_order)

    def validate(self, request: Request) -> None:
        """
        Raises:
            RequestError: The id is live, the sequence is too long for the model or the whole pool, the
                request is not a new one, a label is another tenant's, or an epoch is out of range.
        """
        limit = self.config.max_model_len
        num_tokens, capacity = request.num_tokens, self._cache.pool.num_blocks * self._cache.block_size
        if request.request_id in self._requests:
            raise RequestError(f"request {request.request_id} is being served already")
        if request.status is not RequestStatus.WAITING or request.num_computed_tokens:
            raise RequestError(f"request {request.request_id} has been served before")
        if num_tokens >= limit:
            raise RequestError(f"{num_tokens} tokens leave no room for output in a context of {limit} tokens")
        if num_tokens > capacity:
            raise RequestError(f"{num_tokens} tokens exceed the KV cache, which holds {capacity}")
        if len(request.output_token_ids) >= request.sampling.max_tokens:
            raise RequestError(f"request {request.request_id} has all its {request.sampling.max_tokens} tokens")
        if request.tenant and any(span.zone.tenant not in ("", request.tenant) for span in request.zone_spans):
            raise RequestError(f"request {request.request_id} has a label of another tenant than its own")
        if not all(0 <= epoch <= MAX_EPOCH for epoch in (request.epoch, *(span.epoch for span in request.zone_spans))):
            raise RequestError(f"request {request.request_id} has an epoch outside [0, 2**63)")

    def reserve(self, request: Request) -> bool:
        """Seat a request whose prompt a remote prefill will write: WAITING -> RESERVED.

        Returns:
            False when there is no seat or no room, and then nothing has changed.

        Raises:
            RequestError: As `validate`; or an earlier reservation of this id is in quarantine still, and
                one fence could not be told from the other.
        """
        self.validate(request)
        if request.is_prefill_only or request.output_token_ids:
            raise RequestError(f"request {request.request_id} cannot wait for a remote prefill")
        if self._cache.pool.has_quarantined(request.request_id):
            raise RequestError(f"an earlier reservation of {request.request_id} is in quarantine")
        queued = [before for before in self._waiting if before.priority <= request.priority]
        if not self._has_seat(len(queued)):
            return False
        num_tokens = request.num_tokens + self._output_reserve(request)
        num_tokens = min(num_tokens, self._cache.pool.num_blocks * self._cache.block_size)
        # What queued before is not overtaken: room for it is left, or a stream of reservations starves it.
        headroom = sum(self._cache.num_blocks_for(before.num_tokens) for before in queued)
        if not self._cache.reserve(request, num_tokens, headroom=headroom + self._num_growing()):
            return False
        self._register(request)
        request.transition(RequestStatus.RESERVED)
        self._reserved[request.request_id] = request
        return True

    def reserved(self, request_id: str) -> Request:
        """
        Raises:
            RequestStateError: There is no such reservation, or no longer.
        """
        if request_id not in self._reserved:
            raise RequestStateError(f"request {request_id} holds no reservation")
        return self._reserved[request_id]

    def land(self, request_id: str) -> None:
        """The prompt's KV has arrived: RESERVED -> RUNNING."""
        request = self.reserved(request_id)
        self._cache.land(request)
        del self._reserved[request_id]
        self._run(request)

    def fall_back(self, request_id: str) -> None:
        """The handoff failed: RESERVED -> WAITING, to be computed here. Exposed blocks go to quarantine.

        It was admitted once, so `max_waiting` does not refuse it now.
        """
        request = self.reserved(request_id)
        self._cache.quarantine(request)
        del self._reserved[request_id]
        request.num_lost_tokens = len(request.prompt_token_ids)
        request.num_attributed_tokens = 0
        self._requeue(request)

    def schedule(self) -> tuple[ScheduledChunk, ...]:
        """The next step's work: decodes, then prefills, those under way before those of the queue.

        Changes tables and states, not token counts: `update` does that once the step has been computed.
        """
        plan = _Plan(self.config.max_num_batched_tokens)
        self._schedule_decodes(plan)
        self._schedule_prefills(plan)
        self._blocked_by = None if plan.chunks else self._admission_state()
        return tuple(plan.chunks.values())

    def update(self, chunks: Sequence[ScheduledChunk]) -> None:
        """The chunks have been computed: their blocks may be found from now on."""
        for chunk in chunks:
            request = self._requests[chunk.request_id]
            if request.num_computed_tokens != chunk.start:
                raise IntegrityError(f"{chunk.request_id}: chunk at {chunk.start} was not the next one")
            self.num_recomputed_tokens += request.advance(len(chunk.token_ids))
            self._cache.publish(request)

    def take_outgrown(self) -> list[Request]:
        """Requests that the whole pool could not hold one token more of. They are to be finished."""
        outgrown, self._outgrown = self._outgrown, []
        return outgrown

    def finish(self, request: Request) -> None:
        """End a request in any state; its blocks go where that state says.

        WAITING has none. RESERVED: exposed ones to quarantine. RUNNING: freed, but a prefill-only request
        holds them until `release`, since they may be being sent.
        """
        match request.status:
            case RequestStatus.WAITING:
                self._waiting.remove(request)
            case RequestStatus.RESERVED:
                self._cache.quarantine(self._reserved.pop(request.request_id))
            case RequestStatus.RUNNING:
                self._leave_running(request)
                if request.is_prefill_only:
                    request.transition(RequestStatus.HELD)
                    self._held[request.request_id] = request
                    return
                self._cache.free(request)
            case RequestStatus.HELD | RequestStatus.FINISHED:
                return
        self._end(request)

    def release(self, request_id: str) -> None:
        """Free what a prefill-only request holds: HELD -> FINISHED. Idempotent.

        Raises:
            RequestStateError: The request is still being served; `finish` it first.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        if self._held.pop(request_id, None) is None:
            raise RequestStateError(f"request {request_id} is {request.status.name}, not HELD")
        self._cache.free(request)
        self._end(request)

    def pin(self, request_id: str) -> int:
        """A prefill-only request ends, and its findable blocks stay: HELD -> FINISHED. Returns how many.

        Raises:
            RequestStateError: The request is not HELD.
            PinRefused: The longest request could find too little room besides, or see `KVCacheManager.pin`;
                then nothing has changed.
        """
        request = self._requests.get(request_id)
        if request is None or request.status is not RequestStatus.HELD:
            raise RequestStateError(f"request {request_id} is not HELD")
        num_left = self._cache.num_dependable_with(request)
        if num_left < self.num_longest_blocks:
            raise PinRefused(f"{num_left} blocks would be left for requests, which need {self.num_longest_blocks}")
        num_pinned = self._cache.pin(request)
        del self._held[request_id]
        self._end(request)
        return num_pinned

    @property
    def num_longest_blocks(self) -> int:
        """Blocks of the longest request that is served."""
        num_blocks = self._cache.num_blocks_for(self.config.max_model_len)
        return min(num_blocks, self._cache.pool.num_blocks)

    def observe_epochs(self, request: Request) -> None:
        """Before a new request is admitted: see `KVCacheManager.observe_epochs`."""
        self._cache.observe_epochs(request, self._requests.values())

    def purge(self, zone: Zone, epoch: int) -> PurgeCount:
        """Drop what is findable of `zone`; no live request makes it findable again."""
        return self._cache.purge(zone, epoch, self._requests.values())

    def rekey(self, hasher: BlockHasher) -> int:
        """Drop all that is findable; live requests make nothing findable. Returns how many blocks."""
        return self._cache.rekey(hasher, self._requests.values())

    def check(self) -> None:
        """Every live request is in the one place that its state says.

        Raises:
            IntegrityError: It is not, or the cache's own check fails.
        """
        self._cache.check()
        places = {
            RequestStatus.WAITING: self._waiting,
            RequestStatus.RUNNING: self._running,
            RequestStatus.RESERVED: list(self._reserved.values()),
            RequestStatus.HELD: list(self._held.values()),
        }
        placed = [request for requests in places.values() for request in requests]
        if len(placed) != len(self._requests) or set(placed) != set(self._requests.values()):
            raise IntegrityError("a live request is in no place, or in two")
        for status, requests in places.items():
            for request in requests:
                if request.status is not status:
                    raise IntegrityError(f"{request.request_id} is {request.status.name} among {status.name}")
        for requests in (self._waiting, self._running):
            if requests != sorted(requests, key=_order):
                raise IntegrityError("requests are out of order")
        with_table = {request.request_id for request in placed if request.status is not RequestStatus.WAITING}
        if with_table != self._cache.request_ids():
            raise IntegrityError("block tables and live requests differ")
        if len(self._running) + len(self._reserved) > self.config.max_num_seqs:
            raise IntegrityError("more requests than seats")

    def _schedule_decodes(self, plan: _Plan) -> None:
        for request in tuple(self._running):
            is_decode = request.status is RequestStatus.RUNNING and request.num_pending_tokens == 1
            if is_decode and self._grow(request, plan):
                self._plan_chunk(request, plan)

    def _schedule_prefills(self, plan: _Plan) -> None:
        for request in [request for request in self._running if request.num_pending_tokens > 1]:
            self._admit_waiting(plan, before_priority=request.priority)
            if plan.budget > 0 and request.status is RequestStatus.RUNNING:
                self._plan_chunk(request, plan)
        self._admit_waiting(plan)

    def _admit_waiting(self, plan: _Plan, before_priority: float = math.inf) -> None:
        """Admit the queue in order as far as budget and room go, and only what goes before that priority."""
        while self._waiting and plan.budget > 0 and self._waiting[0].priority < before_priority:
            request = self._waiting[0]
            if not self._admit(request) and not self._make_room(request, plan):
                return
            self._waiting.pop(0)
            self._run(request)
            self._plan_chunk(request, plan)

    def _plan_chunk(self, request: Request, plan: _Plan) -> None:
        start = request.num_computed_tokens
        end = start + min(request.num_pending_tokens, self.config.max_prefill_chunk, plan.budget)
        plan.add(
            ScheduledChunk(
                request_id=request.request_id,
                start=start,
                token_ids=request.token_ids(start, end),
                block_ids=self._cache.table(request.request_id).as_tuple(),
                samples=end == request.num_tokens,
            )
        )

    def _grow(self, request: Request, plan: _Plan) -> bool:
        """Room for the decode's pending token, at the cost of whoever matters least, itself included."""
        if self._cache.num_blocks_for(request.num_tokens) > self._cache.pool.num_blocks:
            if request not in self._outgrown:
                self._outgrown.append(request)
            return False
        while not self._cache.extend(request, request.num_tokens):
            victim = next(self._victims())  # the request itself, if no other
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _admit(self, request: Request) -> bool:
        headroom = self._headroom(request, self._num_growing())
        return self._has_seat() and self._cache.allocate(request, request.num_tokens, headroom=headroom)

    def _make_room(self, request: Request, plan: _Plan) -> bool:
        """Admit the request in the place of running ones of strictly lower priority, if they give enough."""
        victims = [victim for victim in self._victims() if victim.priority > request.priority]
        headroom = self._headroom(request, self._num_growing() - len(victims))
        if not victims or not self._cache.fits(request, request.num_tokens, headroom=headroom, without=victims):
            return False
        with self._cache.holding_prefix(request):
            for victim in victims:
                self._preempt(victim, plan)
                if self._admit(request):
                    return True
        raise IntegrityError(f"{request.request_id}: the room that was foreseen is not there")

    def _victims(self) -> Iterator[Request]:
        """Who gives its blocks up first: lowest priority, then latest arrival; never a prefill-only request."""
        return (request for request in reversed(self._running) if not request.is_prefill_only)

    def _preempt(self, victim: Request, plan: _Plan) -> None:
        plan.drop(victim.request_id)
        self._leave_running(victim)
        self._cache.free(victim)
        victim.num_lost_tokens = max(victim.num_lost_tokens, victim.num_computed_tokens)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._requeue(victim)

    def _requeue(self, request: Request) -> None:
        request.num_computed_tokens = 0
        request.transition(RequestStatus.WAITING)
        insort(self._waiting, request, key=_order)

    def _run(self, request: Request) -> None:
        request.transition(RequestStatus.RUNNING)
        insort(self._running, request, key=_order)

    def _leave_running(self, request: Request) -> None:
        self._running.remove(request)
        if request in self._outgrown:
            self._outgrown.remove(request)

    def _register(self, request: Request) -> None:
        self._num_arrived += 1
        request.arrival = self._num_arrived
        self._requests[request.request_id] = request
        self._cache.count_stale_epochs(request)

    def _end(self, request: Request) -> None:
        request.transition(RequestStatus.FINISHED)
        del self._requests[request.request_id]

    def _has_seat(self, num_queued: int = 0) -> bool:
        return len(self._running) + len(self._reserved) + num_queued < self.config.max_num_seqs

    def _num_growing(self) -> int:
        """Running requests that may each need one more block soon."""
        return sum(not request.is_prefill_only for request in self._running)

    def _headroom(self, request: Request, num_growing: int) -> int:
        """Blocks to leave free: alone a request may use the whole pool, beside others it must not push
        them out, or be pushed out, at once."""
        if request.is_prefill_only or num_growing == 0:
            return 0
        with_output = self._cache.num_blocks_for(request.num_tokens + self._output_reserve(request))
        return with_output - self._cache.num_blocks_for(request.num_tokens) + num_growing

    def _output_reserve(self, request: Request) -> int:
        room = min(
            request.sampling.max_tokens - len(request.output_token_ids),
            self.config.max_model_len - request.num_tokens,
        )
        return min(room, self.config.local_output_reserve)

    def _admission_state(self) -> tuple[object, ...]:
        """All that decides whether the head of the queue is admitted while nothing runs."""
        head = self._waiting[0] if self._waiting else None
        return head, self._cache.pool.version, len(self._reserved)


class _Plan:
    """Chunks chosen so far for one step, and what is left of its token budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[str, ScheduledChunk] = {}

    def add(self, chunk: ScheduledChunk) -> None:
        self.chunks[chunk.request_id] = chunk
        self.budget -= len(chunk.token_ids)

    def drop(self, request_id: str) -> None:
        chunk = self.chunks.pop(request_id, None)
        if chunk is not None:
            self.budget += len(chunk.token_ids)


def _order(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival

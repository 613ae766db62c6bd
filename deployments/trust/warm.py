"""Computes shared texts before traffic asks for them and keeps them: what is resident depends on manifests alone.

Each replica reads and verifies policy and manifests by itself; the texts are those kept beside the manifests. Only
whole blocks that every prompt with these texts shares are pinned.

A purge of a zone unpins what lies in it, and the zone is not warmed again until another manifest of it comes into force
or the replica restarts: after a purge the same prompt is a miss, and stays one until traffic or a publication asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

from deployments.claims.model import canonical_sha256
from deployments.config import TrustSection
from deployments.engine_host import EngineHost
from deployments.prompts import ZonedMessage, ZonedText, tokenise_chat
from deployments.trust.key_files import KeyFileError
from deployments.trust.manifest import SharedSegment, SignedManifest, kept_text
from deployments.trust.manifest_floors import FLOORS_NAME, read_floors
from deployments.trust.manifest_keys import TrustedKeys
from deployments.trust.manifest_set import ManifestSet
from deployments.trust.policy import DEFAULT_POLICY, PolicyStore
from engine.engine import Engine
from engine.errors import EngineError, IntegrityError, PinRefused, RequestError
from engine.request import FinishReason, Request, SamplingParams
from engine.tokenizer import Tokenizer
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan

logger = logging.getLogger("ray.serve.zoneserve.trust")

MAX_WARM_PROMPTS = 256
WARM_TIMEOUT_S = 120.0  # of one prompt, behind all traffic
WARM_PRIORITY = 1_000  # after every request of a client
NAME_PREFIX = "warm-"

# Segment ids in the order in which `claims.prompt.shared_segments` puts them; all are one system message.
REVIEW_ORDER = ("system", "rubric", "policies")
# What a prompt may go on with. A token that depends on it is no shared one.
_PROBES = ("a", "A", "0", " a", "  ", "\n", "\n\n", ".", "-", "é")


class WarmFailure(StrEnum):
    """Why shared texts are not resident."""

    NO_ROOM = "no_room"  # beyond the pool's share or `MAX_WARM_PROMPTS`, or the engine's pool has none to give up
    NO_TEXT = "no_text"  # not kept beside the manifest, or not the text that it lists
    TOO_LONG = "too_long"  # for a prompt of the model
    NO_BLOCK = "no_block"  # they fill no block that every prompt with them would share
    FAILED = "failed"  # the template or the engine refused them, or did not keep them all


class EpochSource(Protocol):
    """As `epochs.EpochStore`."""

    def epoch_of(self, zone: Zone) -> int: ...
    def refresh(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Head:
    """Texts that a system message begins with: (zone, SHA-256 of the text), and whether they are all of it."""

    texts: tuple[tuple[Zone, str], ...]
    is_whole: bool

    @property
    def zones(self) -> frozenset[Zone]:
        return frozenset(zone for zone, _ in self.texts)


@dataclass(frozen=True, slots=True)
class WarmPrompt:
    """Whole blocks to be pinned under `name`, which stands for the texts, their zones and epochs."""

    name: str
    token_ids: tuple[int, ...]
    zone_spans: tuple[ZoneSpan, ...]
    num_blocks: int

    def request(self) -> Request:
        """Computes the blocks. One token follows them, cached for nobody, so that all of them can be found."""
        num_tokens = len(self.token_ids) + 1
        return Request(
            request_id=self.name,
            prompt_token_ids=(*self.token_ids, self.token_ids[-1]),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True),
            zone_spans=(*self.zone_spans, ZoneSpan(num_tokens, EPHEMERAL)),
            tenant=self.zone_spans[-1].zone.tenant,
            priority=WARM_PRIORITY,
            is_prefill_only=True,
        )


@dataclass(frozen=True, slots=True)
class WarmPlan:
    """Names to unpin, then prompts to compute and pin, in order."""

    to_add: tuple[WarmPrompt, ...] = ()
    to_drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What prompts must fit: `max_blocks` is of all of them, a block that several begin with counted once."""

    block_size: int
    max_blocks: int
    max_model_len: int


def heads(in_force: Mapping[Zone, SignedManifest], *, is_strict: bool) -> tuple[Head, ...]:
    """What the listed texts can be the beginning of, most shared first: public texts in their manifest's order, then
    for each plan what stands before the case in its reviews, then the plans' other texts, each alone.

    A text that reviews do not use can only be a client's whole first message. Under strict, public text is shared in no
    zone of its own and takes that of the plan behind it.
    """
    public = in_force[PUBLIC].manifest.segments if PUBLIC in in_force else ()
    first = {segment.id: segment for segment in public}.get(REVIEW_ORDER[0])
    shared = [] if is_strict else [Head(((PUBLIC, segment.sha256),), segment is not first) for segment in public]
    reviews: list[Head] = []
    others: list[Head] = []
    for zone in sorted(in_force.keys() - {PUBLIC}, key=lambda zone: zone.path):
        segments = in_force[zone].manifest.segments
        used = [] if first is None else _leading(segments)
        if first is not None and used:
            texts = ((zone if is_strict else PUBLIC, first.sha256), *((zone, segment.sha256) for segment in used))
            reviews.append(Head(texts, is_whole=len(texts) == len(REVIEW_ORDER)))
        others += [Head(((zone, segment.sha256),), is_whole=True) for segment in segments if segment not in used]
    return (*shared, *reviews, *others)


def _leading(segments: Iterable[SharedSegment]) -> list[SharedSegment]:
    """The plan's texts that reviews use, up to the first that is not listed: from there on a prompt is its case's."""
    listed = {segment.id: segment for segment in segments}
    used: list[SharedSegment] = []
    for segment_id in REVIEW_ORDER[1:]:
        if segment_id not in listed:
            break
        used.append(listed[segment_id])
    return used


def warm_prompts(
    wanted: Sequence[Head],
    *,
    text_of: Callable[[str], str | None],
    epoch_of: Callable[[Zone], int],
    tokenizer: Tokenizer,
    pool: PoolLimits,
) -> tuple[tuple[WarmPrompt, ...], tuple[tuple[WarmFailure, Head], ...]]:
    """The prompts of the first heads that have a text and room, and why the others have none."""
    prompts: dict[str, WarmPrompt] = {}
    failures: list[tuple[WarmFailure, Head]] = [(WarmFailure.NO_ROOM, head) for head in wanted[MAX_WARM_PROMPTS:]]
    resident: dict[Any, Any] = {}  # a tree of blocks, each under the one before it
    num_resident = 0
    for head in wanted[:MAX_WARM_PROMPTS]:
        texts = [text_of(digest) for _, digest in head.texts]
        zoned = tuple(
            ZonedText(text, zone) for text, (zone, _) in zip(texts, head.texts, strict=True) if text is not None
        )
        if len(zoned) < len(texts):
            failures.append((WarmFailure.NO_TEXT, head))
            continue
        try:
            blocks = _shared_blocks(tokenizer, zoned, head.is_whole, pool)
        except RequestError:
            blocks = WarmFailure.FAILED
        if isinstance(blocks, WarmFailure):
            failures.append((blocks, head))
            continue
        token_ids, spans = blocks
        spans = tuple(replace(span, epoch=epoch_of(span.zone)) for span in spans)
        prompt = WarmPrompt(_name(head, epoch_of), token_ids, spans, len(token_ids) // pool.block_size)
        num_new = _grow(resident, prompt, pool.block_size, pool.max_blocks - num_resident)
        if num_new is None:
            failures.append((WarmFailure.NO_ROOM, head))
            continue
        num_resident += num_new
        prompts.setdefault(prompt.name, prompt)
    return tuple(prompts.values()), tuple(failures)


def _name(head: Head, epoch_of: Callable[[Zone], int]) -> str:
    texts = [[zone.path, epoch_of(zone), digest] for zone, digest in head.texts]
    return NAME_PREFIX + canonical_sha256([head.is_whole, *texts])[:32]


def _shared_blocks(
    tokenizer: Tokenizer, texts: tuple[ZonedText, ...], is_whole: bool, pool: PoolLimits
) -> tuple[tuple[int, ...], tuple[ZoneSpan, ...]] | WarmFailure:
    """Tokens and zones of the whole blocks that do not depend on what follows the texts."""
    num_shared: int | None = None
    reference: tuple[int, ...] = ()
    spans: tuple[ZoneSpan, ...] = ()
    for messages in _continued(texts, is_whole):
        prompt = tokenise_chat(tokenizer, messages, EPHEMERAL)
        if num_shared is None:
            reference = prompt.token_ids
            spans = tuple(span for span in prompt.zone_spans if span.zone != EPHEMERAL)
            num_shared = spans[-1].end if spans else 0
        else:
            num_shared = min(num_shared, _num_equal(reference, prompt.token_ids))
        if len(prompt.token_ids) >= pool.max_model_len:
            return WarmFailure.TOO_LONG
    end = (num_shared or 0) // pool.block_size * pool.block_size
    if end == 0:
        return WarmFailure.NO_BLOCK
    return reference[:end], _cut(spans, end)


def _continued(texts: tuple[ZonedText, ...], is_whole: bool) -> Iterator[list[ZonedMessage]]:
    for probe in _PROBES:
        private = ZonedText(probe, EPHEMERAL)
        user = ZonedMessage("user", (private,))
        yield [ZonedMessage("system", texts), user]
        if not is_whole:
            yield [ZonedMessage("system", (*texts, private)), user]


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _cut(spans: tuple[ZoneSpan, ...], end: int) -> tuple[ZoneSpan, ...]:
    starts = (0, *(span.end for span in spans))
    return tuple(
        replace(span, end=min(span.end, end)) for start, span in zip(starts, spans, strict=False) if start < end
    )


def _grow(resident: dict[Any, Any], prompt: WarmPrompt, block_size: int, room: int) -> int | None:
    """Add the prompt's blocks to the tree. Returns how many are new; None where that is more than `room`, and then
    nothing has changed."""
    request = prompt.request()
    blocks = []
    for index in range(prompt.num_blocks):
        zone = request.zone_of_block(index, block_size)
        blocks.append((zone, request.epoch_of(zone), request.token_ids(index * block_size, (index + 1) * block_size)))
    node, num_known = resident, 0
    while num_known < len(blocks) and blocks[num_known] in node:
        node, num_known = node[blocks[num_known]], num_known + 1
    if len(blocks) - num_known > room:
        return None
    for block in blocks[num_known:]:
        node = node.setdefault(block, {})
    return len(blocks) - num_known


class Warmer:
    """Of one engine replica: what should be pinned now, and the way there.

    Files are read again at each look. One that is broken leaves what was good in force, as at the ingress, which tells
    of it; a withdrawn, superseded or expired manifest takes its pins with it. `reload` and `look` raise nothing.
    """

    def __init__(
        self,
        config: TrustSection,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        epochs: EpochSource,
        on_failure: Callable[[WarmFailure], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            num_blocks: Of the pool; `prewarm_share` of them may be pinned.
            on_failure: Called once for each text and reason while that lasts; from the thread that looks.
            clock: Unix time in seconds.

        Raises:
            PolicyError: There is no good policy, so nobody knows whether it is strict.
            FloorError: Which revisions were in force before cannot be read.
        """
        self._tokenizer = tokenizer
        # The engine pins nothing that would leave too little for a longest request.
        num_spare = num_blocks + -max_model_len // block_size
        max_blocks = max(0, min(int(config.prewarm_share * num_blocks), num_spare))
        self._pool = PoolLimits(block_size, max_blocks, max_model_len)
        self._epochs = epochs
        self._on_failure = on_failure
        self._folder = config.manifests_dir if config.prewarm else None
        self._keys_file = config.manifest_keys_file
        self._policies = PolicyStore(config.policy_file or DEFAULT_POLICY)
        self._manifests: ManifestSet | None = None
        if self._folder is not None:
            floors = {} if config.state_dir is None else read_floors(config.state_dir / FLOORS_NAME)
            self._manifests = ManifestSet(self._folder, TrustedKeys(), clock, floors=floors)
        self._first_epochs: dict[Zone, tuple[str, int]] = {}  # manifest in force, and the zone's epoch when it came
        self._told: frozenset[tuple[WarmFailure, Head]] = frozenset()
        self._failed: set[tuple[str, WarmFailure]] = set()
        self._last: tuple[object, tuple[WarmPrompt, ...]] | None = None

    def warm_engine(self, engine: Engine) -> None:
        """Before the engine has a thread and traffic. Blocks until everything that can be pinned is.

        What the runner raises goes through: a replica that cannot compute must not start.
        """
        plan = self.look(*_state_of(engine, self.reload()))
        for name in plan.to_drop:
            engine.unpin(name)
        for prompt in plan.to_add:
            try:
                failure = _pin(engine, prompt) if _compute(engine, prompt) else WarmFailure.FAILED
            except EngineError as error:
                failure = _failure(error, prompt)
            if failure is not None:
                engine.abort(prompt.name)
                engine.release(prompt.name)
                self._on_failure(failure)

    async def warm_host(self, host: EngineHost) -> None:
        """Beside traffic, behind it in priority. One prompt at a time; to be called by one task.

        Raises:
            EngineStopped: The engine is gone.
        """
        zones = await asyncio.to_thread(self.reload)
        state = await host.call(lambda engine: _state_of(engine, zones))
        plan = await asyncio.to_thread(self.look, *state)
        for name in plan.to_drop:
            await host.call(lambda engine, name=name: engine.unpin(name))  # type: ignore[misc]
        failed = {(prompt.name, failure) for prompt in plan.to_add if (failure := await _warm_in_host(host, prompt))}
        for _, failure in failed - self._failed:  # it is tried again at each look, and told once
            self._on_failure(failure)
        self._failed = failed

    def reload(self) -> frozenset[Zone]:
        """Read the files again. Returns the zones that share something now. Blocks on the files."""
        if self._manifests is None:
            return frozenset()
        self._policies.reload()
        trusted = None
        try:
            trusted = None if self._keys_file is None else TrustedKeys.from_file(self._keys_file)
        except KeyFileError as error:
            logger.warning("the trusted keys stay as they were: %s", error)
        self._manifests.reload(trusted)
        self._epochs.refresh()
        return frozenset(self._manifests.in_force())

    def look(self, pinned: Collection[str] = (), floors: Mapping[Zone, int] | None = None) -> WarmPlan:
        """What is to be done, by the files as last read. Tokenises what is new.

        Args:
            pinned: Names that the engine keeps; those that are not ours are left alone.
            floors: Epochs that the engine knows, by zone: a purge can reach it before the epochs' file, or without one.
        """
        wanted = self._wanted(floors or {})
        names = {prompt.name for prompt in wanted}
        ours = [name for name in pinned if name.startswith(NAME_PREFIX)]
        return WarmPlan(
            tuple(prompt for prompt in wanted if prompt.name not in pinned),
            tuple(sorted(name for name in ours if name not in names)),
        )

    def _wanted(self, floors: Mapping[Zone, int]) -> tuple[WarmPrompt, ...]:
        if self._manifests is None or self._folder is None:
            return ()
        folder, in_force, is_strict = self._folder, self._manifests.in_force(), self._policies.policy.strict
        epochs = {zone: max(self._epochs.epoch_of(zone), floors.get(zone, 0)) for zone in in_force}
        self._first_epochs = {
            zone: (signed.sha256, self._first_epoch(zone, signed, epochs[zone])) for zone, signed in in_force.items()
        }
        purged = {zone for zone, epoch in epochs.items() if epoch != self._first_epochs[zone][1]}
        basis = (is_strict, frozenset(purged), frozenset(self._first_epochs.items()))
        if self._last is not None and self._last[0] == basis:
            return self._last[1]
        prompts, failures = warm_prompts(
            [head for head in heads(in_force, is_strict=is_strict) if not head.zones & purged],
            text_of=lambda digest: kept_text(folder, digest),
            epoch_of=lambda zone: epochs[zone],
            tokenizer=self._tokenizer,
            pool=self._pool,
        )
        self._tell(failures)
        # A text may yet come to lie beside its manifest; all else follows from the basis.
        is_final = all(reason is not WarmFailure.NO_TEXT for reason, _ in failures)
        self._last = (basis, prompts) if is_final else None
        return prompts

    def _first_epoch(self, zone: Zone, signed: SignedManifest, epoch: int) -> int:
        digest, first = self._first_epochs.get(zone, ("", epoch))
        return first if digest == signed.sha256 else epoch

    def _tell(self, failures: Iterable[tuple[WarmFailure, Head]]) -> None:
        found = frozenset(failures)
        for reason, head in found - self._told:
            zone, digest = head.texts[-1]
            logger.warning("text %s of %s is not warmed: %s", digest[:16], zone, reason)
            self._on_failure(reason)
        self._told = found


def _state_of(engine: Engine, zones: Iterable[Zone]) -> tuple[tuple[str, ...], dict[Zone, int]]:
    return engine.pinned(), {zone: engine.epoch_floor(zone) for zone in zones}


def _compute(engine: Engine, prompt: WarmPrompt) -> bool:
    """Step until the prompt is computed. False where the engine has no room for it."""
    request = prompt.request()
    engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            if output.request_id == prompt.name and output.finish_reason is not None:
                return output.finish_reason is FinishReason.LENGTH
    return False


def _pin(engine: Engine, prompt: WarmPrompt) -> WarmFailure | None:
    """Pin the computed prompt whole, or not at all."""
    if engine.pin(prompt.name) == prompt.num_blocks:
        return None
    engine.unpin(prompt.name)
    return WarmFailure.FAILED


def _failure(error: EngineError | TimeoutError, prompt: WarmPrompt) -> WarmFailure:
    """What the error comes to. An engine that must not go on is no failure of a text: raised again."""
    if isinstance(error, IntegrityError):
        raise error
    logger.warning("%s is not warmed: %s", prompt.name, str(error) or "no time")
    return WarmFailure.NO_ROOM if isinstance(error, PinRefused) else WarmFailure.FAILED


async def _warm_in_host(host: EngineHost, prompt: WarmPrompt) -> WarmFailure | None:
    request = prompt.request()
    stream = host.open(request)
    try:
        async with asyncio.timeout(WARM_TIMEOUT_S):
            await host.add(request)
            async for output in stream:
                if output.finish_reason is FinishReason.LENGTH:
                    return await host.call(lambda engine: _pin(engine, prompt))
        return WarmFailure.FAILED
    except (EngineError, TimeoutError) as error:
        return _failure(error, prompt)
    finally:
        host.close(prompt.name)
        host.post(lambda engine: engine.release(prompt.name))

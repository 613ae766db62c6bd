"""`POST /v1/reviews`: claim files in, reviews and dispositions out, as one body or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime as dt
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.claims.dispositions import Disposition, IntakeResult
from deployments.claims.history import with_history
from deployments.claims.intake import MAX_FILE_BYTES, ClaimIntake
from deployments.claims.model import Claim, Pseudonymiser, canonical_sha256
from deployments.claims.plan import load_plan
from deployments.claims.prompt import LabelledPrompt, slug
from deployments.claims.review_model import Generation, Usage
from deployments.claims.review_schema import review_schema
from deployments.claims.reviewer import ClaimReviewer, ModelIdentity, ReviewResult
from deployments.config import ZoneserveConfig
from deployments.errors import BadRequest, BodyTooLarge
from deployments.generation import GenerationService, TokenisedPrompt
from deployments.metrics import IngressMetrics
from deployments.prompts import ZonedMessage, ZonedText, tokenise_chat
from deployments.reuse import ReuseReport
from deployments.trust.audit.record import Value
from deployments.trust.guard import TrustGuard
from deployments.trust.principals import Principal
from deployments.trust.resolve import Grant
from deployments.trust.review_record import review_fields
from deployments.trust.scope import CallScope
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer

MAX_FILES = 100
MAX_FILE_NAME_CHARS = 200
PlanName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]


class ClaimFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1, max_length=MAX_FILE_NAME_CHARS)
    content_base64: str

    def data(self) -> bytes:
        """
        Raises:
            BadRequest: Not base64.
        """
        try:
            return base64.b64decode(self.content_base64, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"{self.name}: content_base64 is not base64", param="files") from error


class ReviewRequest(BaseModel):
    """Exactly one of `x12` (an 837P interchange), `claim` (one claim as JSON) and `files`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    x12: str | None = None
    claim: dict[str, Any] | None = None
    files: list[ClaimFile] | None = Field(None, min_length=1, max_length=MAX_FILES)
    plan: PlanName | None = None
    stream: bool = False

    @model_validator(mode="after")
    def _exactly_one_input(self) -> Self:
        if sum(value is not None for value in (self.x12, self.claim, self.files)) != 1:
            raise ValueError("give exactly one of x12, claim and files")
        return self

    def inputs(self) -> list[tuple[str, bytes]]:
        """Name and bytes of each input file."""
        if self.x12 is not None:
            return [("request.edi", self.x12.encode())]
        if self.claim is not None:
            return [("request.jsonl", json.dumps(self.claim).encode())]
        return [(file.name, file.data()) for file in self.files or ()]


class ReviewService:
    """Reviews a principal's claims, bounded in number and concurrency."""

    def __init__(
        self,
        *,
        generation: GenerationService,
        tokenizer: Tokenizer,
        config: ZoneserveConfig,
        guard: TrustGuard,
        metrics: IngressMetrics,
        weights_digest: str,
        pseudonym_key: bytes,
        content_key: bytes,
        arithmetic: Callable[[], Awaitable[str]],
    ) -> None:
        """
        Args:
            content_key: Under which the audit log's digests of content are made.
            arithmetic: What the decode pool computes with now; a review's identity names it, and not what was asked
                for, since a replica that fell back answers with other bits.
        """
        self._generation = generation
        self._tokenizer = tokenizer
        self._config = config
        self._guard = guard
        self._metrics = metrics
        self._weights_digest = weights_digest
        self._pseudonym_key = pseudonym_key
        self._content_key = content_key
        self._arithmetic = arithmetic
        self._schema_digest = canonical_sha256(review_schema())
        self._seats = asyncio.Semaphore(config.claims.max_concurrent_reviews)

    def parse(self, document: dict[str, Any]) -> ReviewRequest:
        """
        Raises:
            ValidationError: An unknown key, or not exactly one input.
            BadRequest: No such plan.
        """
        request = ReviewRequest.model_validate(document)
        try:
            load_plan(request.plan or self._config.claims.plan)
        except ValueError as error:
            raise BadRequest(str(error), param="plan") from error
        return request

    async def events(self, request: ReviewRequest, principal: Principal) -> AsyncIterator[dict[str, Any]]:
        """`accepted`, then `disposition` and `review` as they come, then `done`. Every claim has one of the two.

        Raises:
            BadRequest: A file is not base64. BodyTooLarge: More claims than one call may have; none was reviewed.
        """
        results = await asyncio.to_thread(self._read, request.inputs(), principal.tenant)
        claims = [claim for result in results for claim in result.claims]
        if len(claims) > self._config.claims.max_claims_per_call:
            raise BodyTooLarge(
                f"{len(claims)} claims in one call; at most {self._config.claims.max_claims_per_call}", param="files"
            )
        arithmetic = await self._arithmetic()
        yield {"type": "accepted", "num_claims": len(claims), "num_files": len(results)}
        for disposition in (item for result in results for item in result.dispositions):
            self._metrics.dispositions.labels(disposition.reason.value).inc()
            yield {"type": "disposition", "disposition": _plain(disposition)}
        plan = request.plan or self._config.claims.plan
        async with aclosing(self._reviews(arithmetic, claims, principal, plan)) as reviews:
            async for result in reviews:
                self._metrics.reviews.labels(result.review["recommended_action"]).inc()
                yield {
                    "type": "review",
                    "file_stem": result.file_stem,
                    "review": result.review,
                    "narrative_md": result.narrative_md,
                    "serving": result.serving,
                }
        yield {"type": "done", "num_reviews": len(claims)}

    async def whole(self, request: ReviewRequest, principal: Principal) -> dict[str, Any]:
        """The same as one body."""
        body: dict[str, Any] = {"reviews": [], "dispositions": []}
        async for event in self.events(request, principal):
            if event["type"] == "review":
                body["reviews"].append({key: value for key, value in event.items() if key != "type"})
            elif event["type"] == "disposition":
                body["dispositions"].append(event["disposition"])
        return body

    def _read(self, inputs: list[tuple[str, bytes]], tenant: str) -> list[IntakeResult]:
        intake = ClaimIntake(Pseudonymiser(self._pseudonym_key, tenant))
        return [intake.read_bytes(data[: MAX_FILE_BYTES + 1], name=name) for name, data in inputs]

    async def _reviews(
        self, arithmetic: str, claims: list[Claim], principal: Principal, plan: str
    ) -> AsyncGenerator[ReviewResult, None]:
        stems = _file_stems(claims)

        async def one(claim: Claim, history: tuple[Claim, ...], stem: str) -> ReviewResult:
            async with self._seats:
                scope = self._guard.scope(principal, f"review-{uuid.uuid4().hex}")
                result = await self._reviewer(scope, arithmetic).review(
                    claim, tenant=principal.tenant, plan=plan, history=history, file_stem=stem
                )
                await scope.completed(self._record(result, arithmetic))
                return result

        tasks = [
            asyncio.create_task(one(claim, history, stem))
            for (claim, history), stem in zip(with_history(claims), stems, strict=True)
        ]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _reviewer(self, scope: CallScope, arithmetic: str) -> ClaimReviewer:
        config = self._config
        return ClaimReviewer(
            ServedReviewModel(self._generation, self._tokenizer, scope, tells_reuse=config.trust.report_cached_tokens),
            identity=ModelIdentity(config.model.served_name, f"{self._weights_digest[:16]}-{arithmetic}"),
            clock=lambda: dt.datetime.now(dt.UTC),
            max_tokens=config.claims.max_tokens,
            deadline_s=config.routing.request_timeout_s,
        )

    def _record(self, result: ReviewResult, arithmetic: str) -> dict[str, Value]:
        conditions: dict[str, Value] = {
            "model_digest": self._weights_digest,
            "arithmetic": arithmetic,
            "schema_digest": self._schema_digest,
            "max_tokens": self._config.claims.max_tokens,
        }
        return review_fields(result.review, result.serving, self._content_key, conditions)


class ServedReviewModel:
    """The review model over this deployment's own generation: labelled, tokenised once, greedy."""

    def __init__(
        self, generation: GenerationService, tokenizer: Tokenizer, scope: CallScope, *, tells_reuse: bool
    ) -> None:
        """
        Args:
            tells_reuse: Whether the caller may know what of its own text was found in a cache.
        """
        self._generation = generation
        self._tokenizer = tokenizer
        self._scope = scope
        self._tells_reuse = tells_reuse

    async def generate(
        self, prompt: LabelledPrompt, *, json_schema: Mapping[str, object] | None, max_tokens: int, request_id: str
    ) -> Generation:
        arrival = time.monotonic()
        tokenised = await asyncio.to_thread(tokenise, self._tokenizer, prompt, self._scope.label(prompt))
        sampling = SamplingParams(
            max_tokens=self._generation.token_limit(len(tokenised.token_ids), max_tokens),
            json_schema=None if json_schema is None else json.dumps(json_schema),
        )
        tenant = self._scope.principal.tenant
        (result,) = await self._generation.complete(tokenised, [sampling], arrival, tenant=tenant)
        report = ReuseReport.of(tokenised.zone_spans, is_told=self._tells_reuse)
        return Generation(
            text=result.text,
            finish_reason=result.finish_reason or "error",
            usage=Usage(len(tokenised.token_ids), len(result.token_ids)),
            prompt_tokens_by_origin=report.origins(result.provenance),
            ttft_s=result.timeline.ttft_s,
            e2e_s=result.timeline.e2e_s,
            pushed_bytes=report.pushed_bytes(result.provenance),
        )


def tokenise(tokenizer: Tokenizer, prompt: LabelledPrompt, grant: Grant) -> TokenisedPrompt:
    """The prompt as a system and a user message, each segment in the zone granted to it."""
    zoned = list(zip(prompt.segments, grant.zones, strict=True))
    messages = []
    for role in ("system", "user"):
        texts = tuple(ZonedText(segment.text, zone) for segment, zone in zoned if segment.role == role)
        if any(text.text for text in texts):
            messages.append(ZonedMessage(role, texts))
    return tokenise_chat(tokenizer, messages, grant.private)


def _file_stems(claims: list[Claim]) -> list[str]:
    """A file name for each claim, distinct where two claims share an id."""
    seen: Counter[str] = Counter()
    stems = []
    for claim in claims:
        stem = slug(claim.claim_id)
        seen[stem] += 1
        stems.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return stems


def _plain(disposition: Disposition) -> dict[str, Any]:
    return disposition.model_dump(mode="json")

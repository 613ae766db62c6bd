"""The HTTP edge: OpenAI-compatible generation, claim reviews, health and metrics.

Every request: body size and schema checked, credential -> principal -> zone, prompt labelled and
tokenised once, then admitted or refused. Content never reaches a log.

No deferred annotations here: FastAPI resolves them in a class that Serve ships by value.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray import serve
from starlette.exceptions import HTTPException

from deployments import openai_api as api
from deployments.client import DecodeClient
from deployments.config import ZoneserveConfig
from deployments.errors import BadRequest, Forbidden, InternalFault, ServeError, UnknownModel
from deployments.generation import GenerationService, TokenisedPrompt
from deployments.http import (
    ZONE_HEADERS,
    BodyLimit,
    RequestCounter,
    bad_request,
    error_response,
    event_stream,
    from_http_exception,
    read_json,
    stripped_headers,
    with_first,
)
from deployments.metrics import exposition, ingress_metrics, merge_expositions
from deployments.openai_shapes import ChatShape, CompletionShape
from deployments.prompts import ZonedMessage, ZonedText, one_text, tokenise_chat
from deployments.reuse import ReuseReport
from deployments.reviews import ReviewService
from deployments.trust.epochs import EPOCHS_NAME, EpochStore
from deployments.trust.guard import TrustGuard
from deployments.trust.keyring import KeyringWatch
from deployments.trust.principals import Principal
from deployments.trust.receipts import ReceiptSigner
from deployments.trust.review_record import CONTENT_KEY_INFO, PSEUDONYM_KEY_INFO
from deployments.trust.upkeep import GRANT_KEY_INFO
from deployments.trust.zone_grant import KEY_SETTLE_PERIODS, GrantSealer
from deployments.zone_admin import ZoneAdmin, purge_pool
from engine.block_hash import derive_key
from engine.checkpoint import load_checkpoint
from engine.errors import RequestError
from engine.grammar import GrammarCompiler
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve.zoneserve.ingress")

SCRAPE_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0
HEALTH_FIELDS = ("replica", "alive", "arithmetic", "backend_fallback")
AFFINITY_KEY_INFO = b"routing-affinity"
ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/reviews",
        "/v1/models",
        "/v1/zones/purge",
        "/health",
        "/metrics",
    }
)
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(max_body_bytes: int) -> FastAPI:
    """The ASGI application whose routes the Ingress deployment fills."""
    app = FastAPI(title="zoneserve", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(RequestCounter, routes=ROUTES, count=_count_request)

    def refuse(error: ServeError) -> Response:
        ingress_metrics().refusals.labels(error.code).inc()
        return error_response(error)

    async def on_serve_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        return refuse(error)

    async def on_request_error(request: Request, error: Exception) -> Response:
        return refuse(BadRequest(str(error)))

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ValidationError)
        return refuse(bad_request(error))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refuse(from_http_exception(error))

    async def on_any_error(request: Request, error: Exception) -> Response:
        logger.exception("unhandled error")
        return refuse(InternalFault("internal error"))

    app.add_exception_handler(ServeError, on_serve_error)
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(ValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_any_error)
    return app


def _count_request(route: str, status: int) -> None:
    ingress_metrics().requests.labels(route, str(status)).inc()


class Ingress:
    """Routes. One method an endpoint; bound to Serve by `ingress_deployment`."""

    def __init__(self, decode: Any, prefill: Any | None, config: ZoneserveConfig, model_path: str) -> None:
        self._config = config
        self._decode = decode
        self._prefill = prefill
        checkpoint = load_checkpoint(Path(model_path))
        self._tokenizer = Tokenizer.from_path(checkpoint.tokenizer_source)
        self._tokenizer.warm_up()
        self._grammars = GrammarCompiler(self._tokenizer)
        self._grammars.warm_up()
        self._metrics = ingress_metrics()
        self._keys = KeyringWatch(config.trust.master_key_file)
        self._epochs = EpochStore(None if config.trust.state_dir is None else config.trust.state_dir / EPOCHS_NAME)
        self._receipts = ReceiptSigner(self._keys.keyring)
        master_key = self._keys.keyring.current
        self._generation = GenerationService(
            client=DecodeClient(decode, config.routing, self._metrics),
            config=config,
            affinity_key=derive_key(master_key, AFFINITY_KEY_INFO),
            grants=GrantSealer(
                self._keys.keyring.derive(GRANT_KEY_INFO),
                settle_s=KEY_SETTLE_PERIODS * config.trust.policy_reload_s,
            ),
            epochs=self._epochs,
            metrics=self._metrics,
        )
        self._guard = TrustGuard(
            config.trust,
            stream=f"ingress-{_replica_name()}",
            master_key=master_key,
            metrics=self._metrics,
            also_look=(self._look_at_keys, self._epochs.refresh),
        )
        self._zones = ZoneAdmin(
            self._guard,
            epochs=self._epochs,
            signer=self._receipts,
            pools={name: purge_pool(handle) for name, handle in self._pools().items()},
            metrics=self._metrics,
        )
        self._reviews = ReviewService(
            generation=self._generation,
            tokenizer=self._tokenizer,
            config=config,
            guard=self._guard,
            metrics=self._metrics,
            weights_digest=checkpoint.weights_digest,
            pseudonym_key=derive_key(master_key, PSEUDONYM_KEY_INFO),
            content_key=derive_key(master_key, CONTENT_KEY_INFO),
            arithmetic=self._decode_arithmetic,
        )

    def __del__(self) -> None:
        """Serve calls it when the replica shuts down in order."""
        if hasattr(self, "_guard"):
            self._guard.close()

    def _look_at_keys(self) -> None:
        """Take new master keys into use. Pseudonyms and the audit log keep theirs until the replica starts anew."""
        keyring = self._keys.poll()
        if keyring is not None:
            self._generation.rotate(derive_key(keyring.current, AFFINITY_KEY_INFO), keyring.derive(GRANT_KEY_INFO))
            self._receipts.set_keyring(keyring)
            self._metrics.key_rotations.inc()

    def _pools(self) -> dict[str, Any]:
        return {"decode": self._decode} | ({"prefill": self._prefill} if self._prefill is not None else {})

    # -- generation

    async def chat_completions(self, request: Request) -> Response:
        arrival = time.monotonic()
        principal = await self._authenticate(request)
        body, claimed = await self._parse(request, api.ChatRequest)
        shape = ChatShape(self._config.model.served_name, self._tokenizer.token_bytes)
        texts = [message.text() for message in body.messages]
        grant = self._guard.scope(principal, shape.id).resolve(texts, body.metadata or {}, claimed)
        messages = [
            ZonedMessage(message.role, (ZonedText(text, zone),))
            for message, text, zone in zip(body.messages, texts, grant.zones, strict=True)
        ]
        prompt = await asyncio.to_thread(tokenise_chat, self._tokenizer, messages, grant.private)
        choices = await self._choices(body, prompt, body.token_limit, body.num_logprobs)
        return await self._respond(shape, body, prompt, choices, arrival, tenant=principal.tenant)

    async def completions(self, request: Request) -> Response:
        arrival = time.monotonic()
        principal = await self._authenticate(request)
        body, claimed = await self._parse(request, api.CompletionRequest)
        shape = CompletionShape(self._config.model.served_name, self._tokenizer.token_bytes)
        texts = [body.text] if body.text is not None else []
        grant = self._guard.scope(principal, shape.id).resolve(texts, body.metadata or {}, claimed)
        token_ids = await asyncio.to_thread(self._prompt_ids, body)
        prompt = one_text(token_ids, grant.zones[0] if grant.zones else grant.private, grant.private)
        choices = await self._choices(body, prompt, body.token_limit, body.num_logprobs)
        return await self._respond(shape, body, prompt, choices, arrival, tenant=principal.tenant)

    def _prompt_ids(self, body: api.CompletionRequest) -> list[int]:
        if body.text is not None:
            token_ids = self._tokenizer.encode(body.text)
        else:
            token_ids = [int(token_id) for token_id in body.prompt]
            if not all(0 <= token_id < self._tokenizer.vocab_size for token_id in token_ids):
                raise BadRequest("a token id lies outside the vocabulary", param="prompt")
        if not token_ids:
            raise BadRequest("the prompt has no tokens", param="prompt")
        return token_ids

    async def _choices(
        self,
        body: api.ChatRequest | api.CompletionRequest,
        prompt: TokenisedPrompt,
        asked: int | None,
        logprobs: int | None,
    ) -> list[SamplingParams]:
        max_tokens = self._generation.token_limit(len(prompt.token_ids), asked)
        seed = body.seed if body.seed is not None else secrets.randbits(62)
        sampling = [body.sampling(max_tokens, seed + index, logprobs) for index in range(body.n)]
        if sampling[0].json_schema is not None:  # refused here, before anything is admitted
            await asyncio.to_thread(self._grammars.compile, sampling[0].json_schema)
        return sampling

    async def _respond(
        self,
        shape: ChatShape | CompletionShape,
        body: api.ChatRequest | api.CompletionRequest,
        prompt: TokenisedPrompt,
        choices: list[SamplingParams],
        arrival: float,
        *,
        tenant: str,
    ) -> Response:
        report = ReuseReport.of(prompt.zone_spans, is_told=self._config.trust.report_cached_tokens)
        if not body.stream:
            results = await self._generation.complete(prompt, choices, arrival, tenant=tenant)
            return JSONResponse(shape.whole(report, results))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        events = self._generation.stream(prompt, choices, arrival, tenant=tenant)
        replay = await with_first(shape.chunks(events, report, include_usage))
        return event_stream(replay())

    # -- claims

    async def reviews(self, request: Request) -> Response:
        principal = await self._authenticate(request)
        scope = self._guard.scope(principal, f"reviews-{uuid.uuid4().hex}")
        scope.require_no_contradiction(self._strip_headers(request))
        body = self._reviews.parse(await read_json(request))
        if not body.stream:
            return JSONResponse(await self._reviews.whole(body, principal))
        replay = await with_first(self._reviews.events(body, principal))
        return event_stream(replay())

    # -- operations

    async def models(self, request: Request) -> Response:
        await self._authenticate(request)
        model = {
            "id": self._config.model.served_name,
            "object": "model",
            "created": 0,
            "owned_by": "zoneserve",
            "max_model_len": self._config.model.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """200 when every replica of both pools answers and its engine can step; 503 with the reason otherwise."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                states = {
                    name: list(await handle.broadcast("health").results_async())
                    for name, handle in self._pools().items()
                }
        except Exception as error:  # whatever keeps a pool from answering is the finding
            return JSONResponse({"status": "unavailable", "reason": type(error).__name__}, status_code=503)
        is_healthy = all(replicas and all(state["alive"] for state in replicas) for replicas in states.values())
        shown = {  # no process ids: this answer needs no key
            name: [{key: state[key] for key in HEALTH_FIELDS} for state in replicas]
            for name, replicas in states.items()
        }
        body = {"status": "ok" if is_healthy else "unavailable", "pools": shown}
        return JSONResponse(body, status_code=200 if is_healthy else 503)

    async def purge(self, request: Request) -> Response:
        """The signed receipt of a purge, which says whether every replica has purged."""
        principal = await self._authenticate(request)
        signed = await self._zones.purge(principal, await read_json(request))
        return Response(signed.data, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        """Counts of hits and misses say what others cache: where `trust.metrics_role` is set, only it may read them."""
        role = self._config.trust.metrics_role
        if role is not None and role not in (await self._authenticate(request)).roles:
            self._metrics.zone_denials.labels("metrics_role").inc()
            raise Forbidden("the metrics are not for this principal")
        texts: list[tuple[Mapping[str, str], str]] = [
            (
                {"role": "ingress", "replica": _replica_name()},
                exposition(self._metrics.registry, self._guard.audit_metrics()),
            )
        ]
        for pool, handle in self._pools().items():
            try:
                async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                    for name, text in await handle.broadcast("metrics_text").results_async():
                        texts.append(({"role": pool, "replica": name}, text))
            except Exception as error:  # a scrape shows what can be had
                logger.warning("no metrics from %s: %s", pool, type(error).__name__)
        return Response(merge_expositions(texts), media_type=METRICS_CONTENT_TYPE)

    async def _decode_arithmetic(self) -> str:
        """What the decode replicas compute with, joined where they differ; `unknown` where none answers, and then the
        model will abstain and the rules stand alone."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                states = list(await self._decode.broadcast("health").results_async())
        except Exception as error:
            logger.warning("the decode pool does not say what it computes with: %s", type(error).__name__)
            states = []
        return "+".join(sorted({str(state["arithmetic"]) for state in states})) or "unknown"

    # -- checks

    async def _authenticate(self, request: Request) -> Principal:
        return await self._guard.authenticate(request.headers.get("authorization"))

    async def _parse(self, request: Request, kind: Any) -> tuple[Any, list[object]]:
        """The body without what a client may not decide, and the zones that it named there."""
        document = await read_json(request)
        claimed = self._strip_headers(request)
        for name, value in api.strip_client_parameters(document).items():
            self._metrics.stripped.labels(name).inc()
            if name in api.ZONE_PARAMETERS and value is not None:
                claimed.append(value)
        body = kind.model_validate(document)
        if body.model != self._config.model.served_name:
            raise UnknownModel(f"the model {body.model!r} does not exist", param="model")
        return body, claimed

    def _strip_headers(self, request: Request) -> list[object]:
        claimed: list[object] = []
        for name, value in stripped_headers(request):
            self._metrics.stripped.labels(name).inc()
            if name in ZONE_HEADERS:
                claimed.append(value)
        return claimed


def _replica_name() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def ingress_deployment(config: ZoneserveConfig) -> Any:
    """The Serve deployment class of the ingress."""
    app = make_app(config.ingress.max_body_bytes)

    @serve.ingress(app)
    class HttpIngress(Ingress):
        @app.post("/v1/chat/completions")
        async def chat_completions(self, request: Request) -> Response:
            return await super().chat_completions(request)

        @app.post("/v1/completions")
        async def completions(self, request: Request) -> Response:
            return await super().completions(request)

        @app.post("/v1/reviews")
        async def reviews(self, request: Request) -> Response:
            return await super().reviews(request)

        @app.get("/v1/models")
        async def models(self, request: Request) -> Response:
            return await super().models(request)

        @app.get("/health")
        async def health(self, request: Request) -> Response:
            return await super().health(request)

        @app.post("/v1/zones/purge")
        async def purge(self, request: Request) -> Response:
            return await super().purge(request)

        @app.get("/metrics")
        async def metrics(self, request: Request) -> Response:
            return await super().metrics(request)

    return HttpIngress

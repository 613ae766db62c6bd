"""The native backend behind HTTP: the tokens of a request do not depend on how it was served, so that a review can be
replayed on one bare engine.

The deployment is a process with a Ray of its own, since the float32 one that other tests share may be up beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from deployments.config import BUNDLED
from deployments.review_client import SAMPLES
from engine.checkpoint import load_checkpoint
from engine.engine import Engine
from engine.model_runner import ModelRunner, load_runner
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer
from engine.zone import Zone, ZoneSpan
from load_tests.exposition import Exposition
from load_tests.local import local_server
from tests.conformance.greedy import make_engine

pytestmark = [pytest.mark.cluster, pytest.mark.model]

MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 16
NUM_BLOCKS = 640
BLOCK_SIZE = 16
LOCAL_PREFILL_MAX_TOKENS = 64  # of the shipped configuration
REQUEST_TIMEOUT_S = 120.0

Answer = list[tuple[bytes, float]]
"""Each token's bytes, which no other token has, and its logprob: of equal bits only where the logits are."""


@dataclass(frozen=True)
class BareEngine:
    """One engine in this process."""

    runner: ModelRunner
    engine: Engine
    tokenizer: Tokenizer

    def answer(self, prompt: Sequence[int]) -> Answer:
        """With nothing else in a step, and nothing in the cache before or after."""
        request = Request(
            request_id="alone",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0),
            zone_spans=(ZoneSpan(len(prompt), Zone.parse("ephemeral")),),
        )
        self.engine.add_request(request)
        tokens = []
        while self.engine.has_work:
            tokens += [token for output in self.engine.step() for token in output.logprobs]
        assert self.engine.stats().prefix_cache_hits == 0
        return [(self.tokenizer.token_bytes(token.token_id), token.logprob or 0.0) for token in tokens]


@dataclass(frozen=True)
class NativeServer:
    """The deployment, as a client sees it."""

    client: httpx.Client

    def get(self, path: str) -> httpx.Response:
        response = self.client.get(path)
        assert response.status_code == 200, response.text
        return response

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def counts(self) -> Exposition:
        return Exposition.parse(self.get("/metrics").text)

    def answer(self, prompt: Sequence[int]) -> Answer:
        body = {"model": MODEL, "prompt": list(prompt), "max_tokens": NUM_TOKENS, "temperature": 0}
        (choice,) = self.post("/v1/completions", body | {"ignore_eos": True, "logprobs": 0})["choices"]
        logprobs = choice["logprobs"]
        return list(zip(map(spelled, logprobs["tokens"]), logprobs["token_logprobs"], strict=True))


def spelled(token: str) -> bytes:
    """A token's bytes; a part of a character comes as `bytes:\\xf0\\x9f`."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


@pytest.fixture(scope="module")
def native_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeServer]:
    """1 prefill and 1 decode in bfloat16, as shipped but for their size."""
    folder = tmp_path_factory.mktemp("native")
    document = yaml.safe_load((BUNDLED / "local.yaml").read_text())
    assert (document["engine"]["backend"], document["model"]["dtype"]) == ("native", "bfloat16")
    assert document["routing"]["local_prefill_max_tokens"] == LOCAL_PREFILL_MAX_TOKENS
    document["model"] |= {"max_model_len": 4096}
    document["prefill"] |= {"num_blocks": NUM_BLOCKS}
    document["decode"] |= {"num_blocks": NUM_BLOCKS}
    (folder / "small.yaml").write_text(yaml.safe_dump(document))
    with (
        local_server(folder, config=folder / "small.yaml") as server,
        httpx.Client(base_url=server.url, headers=server.headers, timeout=REQUEST_TIMEOUT_S) as client,
    ):
        yield NativeServer(client)


@pytest.fixture(scope="module")
def bare(smollm2_path: Path, tokenizer: Tokenizer) -> BareEngine:
    """Cuts prompts into other chunks than the deployment does."""
    num_threads = torch.get_num_threads()
    runner = load_runner(
        load_checkpoint(smollm2_path),
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        backend="native",
        num_threads=1,
    )
    torch.set_num_threads(num_threads)
    assert runner.fallback_reason is None
    engine = make_engine(runner, tokenizer, max_num_batched_tokens=1024, max_prefill_chunk=1024)
    return BareEngine(runner, engine, tokenizer)


def test_both_pools_compute_natively(native_server: NativeServer, bare: BareEngine) -> None:
    arithmetic = bare.runner.arithmetic
    assert arithmetic.startswith("native-")
    pools = native_server.get("/health").json()["pools"]
    assert set(pools) == {"prefill", "decode"}
    for (state,) in pools.values():
        assert (state["alive"], state["arithmetic"], state["backend_fallback"]) == (True, arithmetic, None)
    counts = native_server.counts()
    for role in pools:
        assert counts.total("zoneserve_engine_info", role=role, arithmetic=arithmetic) == 1
        assert counts.total("zoneserve_engine_info", role=role) == 1
    assert counts.total("zoneserve_backend_fallbacks_total") == 0


def test_tokens_handed_off_are_those_of_one_bare_engine_cold_and_warm(
    native_server: NativeServer, bare: BareEngine, greedy_prompts: dict[str, tuple[int, ...]]
) -> None:
    """Bytes and counts are exact: the test fails too where prefill and decode are not apart, or nothing is reused."""
    prompts = [greedy_prompts["p1"], greedy_prompts["p65"], greedy_prompts["p100"], greedy_prompts["p700"][:513]]
    prompts.append(greedy_prompts["p1000"])
    expected = [bare.answer(prompt) for prompt in prompts]
    assert {len(answer) for answer in expected} == {NUM_TOKENS}
    apart = [prompt for prompt in prompts if len(prompt) > LOCAL_PREFILL_MAX_TOKENS]

    before = native_server.counts()
    assert [native_server.answer(prompt) for prompt in prompts] == expected
    cold = native_server.counts()
    assert [native_server.answer(prompt) for prompt in prompts] == expected
    warm = native_server.counts()

    def during_cold(name: str, **labels: str) -> float:
        return cold.total(name, **labels) - before.total(name, **labels)

    def during_warm(name: str, **labels: str) -> float:
        return warm.total(name, **labels) - cold.total(name, **labels)

    num_blocks = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in apart)
    assert during_cold("zoneserve_handoff_seconds_count", role="decode") == len(apart) == 4
    assert during_cold("zoneserve_pushed_bytes_total", role="prefill") == num_blocks * bare.runner.layout.block_bytes
    assert during_cold("zoneserve_prompt_tokens_total", origin="prefill_computed") == sum(map(len, apart))
    num_cached = sum((len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in prompts)
    assert during_warm("zoneserve_prompt_tokens_total", origin="decode_cache") == num_cached
    assert during_warm("zoneserve_handoff_seconds_count") == 0
    assert warm.total("zoneserve_local_prefill_fallbacks_total") == 0
    assert warm.total("zoneserve_recomputed_tokens_total") == 0


def test_tokens_of_many_requests_at_once_are_those_of_one_bare_engine(
    native_server: NativeServer, bare: BareEngine, greedy_prompts: dict[str, tuple[int, ...]]
) -> None:
    """Every prompt twice; some are in the cache, and some continue what is, so that prefill adds to decode's blocks."""
    known = [greedy_prompts["p129"], greedy_prompts["p300"]]
    for prompt in known:
        native_server.answer(prompt)
    new = [greedy_prompts[f"p{length}"] for length in (2, 17, 64, 127, 128, 255, 511)]
    on_decode, apart = ([prefix + greedy_prompts[tail] for prefix in known] for tail in ("p31", "p200"))
    prompts = new + known + on_decode + apart
    expected = [bare.answer(prompt) for prompt in prompts]
    before = native_server.counts()
    with ThreadPoolExecutor(2 * len(prompts)) as clients:
        answers = list(clients.map(native_server.answer, prompts + prompts))
    assert answers == expected + expected
    after = native_server.counts()

    def during(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    apart += [prompt for prompt in new if len(prompt) > LOCAL_PREFILL_MAX_TOKENS]
    assert len(apart) <= during("zoneserve_handoff_seconds_count", role="decode") <= 2 * len(apart)
    assert during("zoneserve_prompt_tokens_total", origin="decode_cache") > 0


def test_reviews_name_their_arithmetic_and_are_the_same_again(native_server: NativeServer, bare: BareEngine) -> None:
    """Of claims with flags, on which the model gives its opinion in words."""
    body = {"x12": (SAMPLES / "05-units.edi").read_text()}
    first, second = (native_server.post("/v1/reviews", body)["reviews"] for _ in range(2))
    revision = f"{bare.runner.weights_digest[:16]}-{bare.runner.arithmetic}"
    again = {item["review"]["review_id"]: item for item in second}
    assert len(again) == len(first) > 0
    for item in first:
        review = item["review"]
        assert (review["model"]["id"], review["model"]["revision"]) == (MODEL, revision)
        assert not review["abstained"]
        assert without_time(again[review["review_id"]]["review"]) == without_time(review)
        assert again[review["review_id"]]["serving"]["prompt_tokens_by_origin"]["decode_cache"] > 0
    assert any(flag["model"]["rationale"] for item in first for flag in item["review"]["flags"] if flag["model"])
    assert sum(item["serving"]["pushed_bytes"] for item in first) > 0


def without_time(review: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in review.items() if key != "created"}

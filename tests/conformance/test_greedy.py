"""Greedy output is the same however the engine came to it, and is transformers' output. For every backend.

torch in float32 gives the oracle's tokens. A backend that rounds activations may take the next best token where two
are as good as equal: its tokens are those that it gives to the prompt alone, and none is far from the best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from engine.checkpoint import load_checkpoint
from engine.model_runner import BACKENDS, ModelRunner, load_runner
from engine.tokenizer import Tokenizer
from tests.conformance.greedy import (
    NUM_OUTPUT_TOKENS,
    PROMPT_LENGTHS,
    TransformersOracle,
    greedy_alone,
    make_engine,
    make_request,
    run_all,
)

pytestmark = pytest.mark.model

DTYPES = {"torch": "float32", "native": "bfloat16"}
# Logits below the oracle's best, given the prompt and the tokens before; greatest seen 0.055.
MAX_REGRET = {"torch": 0.0, "native": 0.15}

Answer = Callable[[tuple[int, ...], int], tuple[int, ...]]


@dataclass(frozen=True)
class Backend:
    """`answer`: the tokens that a prompt must get, and how many."""

    name: str
    runner: ModelRunner
    answer: Answer


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, smollm2_path: Path, transformers_oracle: TransformersOracle) -> Backend:
    name: str = request.param
    runner = load_runner(
        load_checkpoint(smollm2_path),
        dtype=DTYPES[name],
        block_size=16,
        num_blocks=640,
        backend=name,
        num_threads=2,
    )
    assert runner.fallback_reason is None
    if name == "torch":
        return Backend(name, runner, cache(transformers_oracle.greedy))
    return Backend(name, runner, cache(lambda prompt, count: greedy_alone(runner, prompt, count)))


def answers(backend: Backend, prompts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: backend.answer(prompt, NUM_OUTPUT_TOKENS) for name, prompt in prompts.items()}


def test_the_oracle_continues_a_known_sentence(transformers_oracle: TransformersOracle, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The capital of France is")
    tokens = transformers_oracle.greedy(prompt, 1)
    assert tokenizer.decode(tokens) == " Paris"
    assert transformers_oracle.regrets(prompt, tokens) == [0.0]
    assert transformers_oracle.regrets(prompt, tokenizer.encode(" London"))[0] > MAX_REGRET["native"]


def test_no_token_is_far_from_the_oracles_best(
    backend: Backend, greedy_prompts, greedy_oracle, transformers_oracle: TransformersOracle
) -> None:
    for name, tokens in answers(backend, greedy_prompts).items():
        if tokens != greedy_oracle[name]:
            regrets = transformers_oracle.regrets(greedy_prompts[name], tokens)
            assert max(regrets) <= MAX_REGRET[backend.name], name


def test_each_prompt_alone(backend: Backend, tokenizer: Tokenizer, greedy_prompts) -> None:
    assert len(greedy_prompts) == len(PROMPT_LENGTHS) >= 20
    for name, prompt in greedy_prompts.items():
        engine = make_engine(backend.runner, tokenizer, max_num_batched_tokens=4096, max_prefill_chunk=4096)
        tokens = run_all(engine, [make_request(name, prompt)])
        assert tokens == {name: backend.answer(prompt, NUM_OUTPUT_TOKENS)}


@pytest.mark.parametrize("chunk", [16, 40, 128, 512])
def test_all_at_once_in_chunks(chunk: int, backend: Backend, tokenizer: Tokenizer, greedy_prompts) -> None:
    """Mixed batches: decodes of the short prompts ride along with chunks of the long ones."""
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if chunk >= 128 or len(prompt) <= 1000}
    engine = make_engine(backend.runner, tokenizer, max_num_batched_tokens=max(512, chunk), max_prefill_chunk=chunk)
    tokens = run_all(engine, [make_request(name, prompt) for name, prompt in chosen.items()])
    assert tokens == answers(backend, chosen)


def test_after_a_prefix_hit(backend: Backend, tokenizer: Tokenizer, greedy_prompts) -> None:
    engine = make_engine(backend.runner, tokenizer, max_num_batched_tokens=512, max_prefill_chunk=512)
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if len(prompt) <= 1000}
    requests = [make_request(name, prompt) for name, prompt in chosen.items()]
    run_all(engine, requests)
    before = engine.stats().prefix_cache_hits
    again = [make_request(name, prompt) for name, prompt in chosen.items()]
    assert run_all(engine, again) == answers(backend, chosen)
    reusable = sum((len(prompt) - 1) // 16 * 16 for prompt in chosen.values())
    assert engine.stats().prefix_cache_hits - before == reusable > 0


def test_after_preemption(backend: Backend, tokenizer: Tokenizer, greedy_prompts) -> None:
    """Four answers of 40 tokens in a pool that holds the prompts and little more: some must start again."""
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if len(prompt) in (15, 31, 47, 64)}
    engine = make_engine(
        backend.runner,
        tokenizer,
        num_blocks=15,
        max_num_batched_tokens=512,
        max_prefill_chunk=512,
        local_output_reserve=0,
    )
    tokens = run_all(engine, [make_request(name, prompt, 40) for name, prompt in chosen.items()])
    assert engine.stats().preemptions > 0
    assert tokens == {name: backend.answer(prompt, 40) for name, prompt in chosen.items()}

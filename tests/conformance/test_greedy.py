"""Greedy output equals transformers, token for token, however the engine came to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.checkpoint import load_checkpoint
from engine.model_runner import ModelRunner, load_runner
from engine.tokenizer import Tokenizer
from tests.conformance.greedy import (
    PROMPT_LENGTHS,
    TransformersOracle,
    make_engine,
    make_request,
    run_all,
)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def runner(smollm2_path: Path) -> ModelRunner:
    return load_runner(load_checkpoint(smollm2_path), dtype="float32", block_size=16, num_blocks=640, num_threads=2)


def test_the_oracle_continues_a_known_sentence(transformers_oracle: TransformersOracle, tokenizer: Tokenizer) -> None:
    tokens = transformers_oracle.greedy(tokenizer.encode("The capital of France is"), 1)
    assert tokenizer.decode(tokens) == " Paris"


def test_each_prompt_alone(runner: ModelRunner, tokenizer: Tokenizer, greedy_prompts, greedy_oracle) -> None:
    assert len(greedy_prompts) == len(PROMPT_LENGTHS) >= 20
    for name, prompt in greedy_prompts.items():
        engine = make_engine(runner, tokenizer, max_num_batched_tokens=4096, max_prefill_chunk=4096)
        assert run_all(engine, [make_request(name, prompt)]) == {name: greedy_oracle[name]}


@pytest.mark.parametrize("chunk", [16, 40, 128, 512])
def test_all_at_once_in_chunks(
    chunk: int, runner: ModelRunner, tokenizer: Tokenizer, greedy_prompts, greedy_oracle
) -> None:
    """Mixed batches: decodes of the short prompts ride along with chunks of the long ones."""
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if chunk >= 128 or len(prompt) <= 1000}
    engine = make_engine(runner, tokenizer, max_num_batched_tokens=max(512, chunk), max_prefill_chunk=chunk)
    tokens = run_all(engine, [make_request(name, prompt) for name, prompt in chosen.items()])
    assert tokens == {name: greedy_oracle[name] for name in chosen}


def test_after_a_prefix_hit(runner: ModelRunner, tokenizer: Tokenizer, greedy_prompts, greedy_oracle) -> None:
    engine = make_engine(runner, tokenizer, max_num_batched_tokens=512, max_prefill_chunk=512)
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if len(prompt) <= 1000}
    requests = [make_request(name, prompt) for name, prompt in chosen.items()]
    run_all(engine, requests)
    before = engine.stats().prefix_cache_hits
    again = [make_request(name, prompt) for name, prompt in chosen.items()]
    assert run_all(engine, again) == {name: greedy_oracle[name] for name in chosen}
    reusable = sum((len(prompt) - 1) // 16 * 16 for prompt in chosen.values())
    assert engine.stats().prefix_cache_hits - before == reusable > 0


def test_after_preemption(
    runner: ModelRunner, tokenizer: Tokenizer, greedy_prompts, transformers_oracle: TransformersOracle
) -> None:
    """Four answers of 40 tokens in a pool that holds the prompts and little more: some must start again."""
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if len(prompt) in (15, 31, 47, 64)}
    engine = make_engine(
        runner, tokenizer, num_blocks=15, max_num_batched_tokens=512, max_prefill_chunk=512, local_output_reserve=0
    )
    tokens = run_all(engine, [make_request(name, prompt, 40) for name, prompt in chosen.items()])
    assert engine.stats().preemptions > 0
    assert tokens == {name: transformers_oracle.greedy(prompt, 40) for name, prompt in chosen.items()}

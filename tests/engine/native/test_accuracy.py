"""The native backend on a real model: near float32, and the same bits by every way through the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.model_runner import DEFAULT_CACHE_DIR, load_runner
from engine.native.packing import open_packed
from engine.scheduler import ScheduledChunk
from engine.tokenizer import Tokenizer
from load_tests.accuracy import (
    BATCH_SIZE,
    BLOCK_SIZE,
    MAX_KL,
    MAX_PERPLEXITY_CHANGE,
    MIN_TOP1,
    NUM_TOKENS,
    Agreement,
    claims_tokens,
    compare,
    forced_logits,
    reference_logits,
)
from tests.engine.native.support import build_model, random_tokens, same_bits
from tests.engine.tiny_tokenizer import tiny_tokenizer

# Twice the promise's text: of 2,000 tokens, agreement on one is 0.05 %, and a change in the order of sums moves ten.
# The promise holds on its own text too.
TEXT_TOKENS = 2 * NUM_TOKENS
PORTABLE_TOKENS = 200
NUM_BLOCKS = -(-TEXT_TOKENS // BLOCK_SIZE)


@pytest.mark.model
def test_native_logits_are_as_near_to_float32_as_promised(smollm2_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = load_checkpoint(smollm2_path)
    token_ids = claims_tokens(tokenizer, TEXT_TOKENS)
    weights = open_packed(checkpoint, DEFAULT_CACHE_DIR / "packed").tensors()
    reference = reference_logits(checkpoint.config, weights, token_ids)
    runner = load_runner(checkpoint, dtype="bfloat16", block_size=16, num_blocks=2 * NUM_BLOCKS, backend="native")
    assert runner.fallback_reason is None
    rows = torch.cat(list(forced_logits(runner, token_ids)))
    for num_tokens in (2000, 4000):
        text = iter(rows[:num_tokens].split(BATCH_SIZE))
        agreement = compare(reference[:num_tokens], text, token_ids[:num_tokens])
        assert agreement.num_tokens == num_tokens
        assert 0 < agreement.kl <= MAX_KL
        assert agreement.top1 >= MIN_TOP1
        assert abs(agreement.perplexity_change) <= MAX_PERPLEXITY_CHANGE
    # What was compared is what prefill gives, in chunks of any size.
    start, table = 0, tuple(range(NUM_BLOCKS, 2 * NUM_BLOCKS))
    for end in (1, 3, 200, 712, 1736, 3999, 4000):
        chunk = ScheduledChunk("chunks", start, token_ids[start:end], table, True)
        assert same_bits(runner.execute([chunk])[0], rows[end - 1])
        start = end


@pytest.mark.model
def test_portable_logits_are_nearer_still(smollm2_path: Path, tokenizer: Tokenizer) -> None:
    """On fewer tokens, too few to count top-1: without vector instructions the whole text takes two minutes."""
    checkpoint = load_checkpoint(smollm2_path)
    token_ids = claims_tokens(tokenizer, PORTABLE_TOKENS)
    weights = open_packed(checkpoint, DEFAULT_CACHE_DIR / "packed").tensors()
    reference = reference_logits(checkpoint.config, weights, token_ids)
    kl: dict[str | None, float] = {}
    for instruction_set in ("portable", None):
        runner = load_runner(
            checkpoint, dtype="bfloat16", block_size=16, num_blocks=2 * NUM_BLOCKS, backend="native",
            instruction_set=instruction_set,
        )  # fmt: skip
        kl[instruction_set] = compare(reference, forced_logits(runner, token_ids), token_ids).kl
    assert 0 < kl["portable"] <= 0.6 * kl[None] <= MAX_KL


def test_bars_are_those_that_the_project_promises() -> None:
    assert (MAX_KL, MIN_TOP1, MAX_PERPLEXITY_CHANGE) == (0.005, 0.985, 0.005)
    good = Agreement(2000, kl=0.005, kl_p99=1.0, top1=0.985, perplexity=10.04, reference_perplexity=10.0)
    assert good.holds
    assert not Agreement(2000, 0.0051, 1.0, 1.0, 10.0, 10.0).holds
    assert not Agreement(2000, 0.0, 0.0, 0.9845, 10.0, 10.0).holds
    assert not Agreement(2000, 0.0, 0.0, 1.0, 10.06, 10.0).holds
    assert not Agreement(2000, 0.0, 0.0, 1.0, 9.94, 10.0).holds


def test_agreement_is_that_of_the_definitions() -> None:
    reference = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]]).log()
    ours = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.25, 0.25, 0.5]]).log()
    found = compare(reference, iter(ours.split(2)), [0, 1, 2])
    first = 0.5 * torch.tensor(0.5 / 0.4).log() + 0.3 * torch.tensor(0.3 / 0.4).log()
    assert found.num_tokens == 3
    assert found.kl == pytest.approx(float(first + 0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log()) / 3)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.perplexity == pytest.approx((0.4 * 0.8) ** -0.5)
    assert found.reference_perplexity == pytest.approx((0.3 * 0.8) ** -0.5)


def test_reference_and_forced_logits_are_those_of_every_position(tmp_path: Path, instruction_set: str) -> None:
    model = build_model(tmp_path, "qwen2")
    token_ids = random_tokens(50, model.vocab_size, 3)
    exact = model.oracle().logits(token_ids)
    reference = reference_logits(model.checkpoint.config, model.packed.tensors(), token_ids)
    torch.testing.assert_close(reference.double(), exact, rtol=1e-4, atol=1e-4)
    rows = torch.cat(list(forced_logits(model.runner(instruction_set), token_ids)))
    rounded = model.oracle(instruction_set).logits(token_ids)
    assert rows.shape == rounded.shape
    assert (rows - rounded).square().mean() < 0.05**2 * rounded.var()


def test_text_is_a_chat_of_the_length_asked_for_or_refused() -> None:
    tokenizer = tiny_tokenizer()
    token_ids = claims_tokens(tokenizer, 3000)
    assert len(token_ids) == 3000
    assert claims_tokens(tokenizer, 100) == token_ids[:100]
    assert "CLAIM SYNTH" in tokenizer.decode(token_ids)
    with pytest.raises(ValueError, match=r"the sample claims make [0-9]+ tokens, not 1000000"):
        claims_tokens(tokenizer, 1_000_000)

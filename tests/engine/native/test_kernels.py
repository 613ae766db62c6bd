"""The kernels' logits and cache against a float64 oracle, over shapes, weight kinds and instruction paths."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.scheduler import ScheduledChunk
from tests.engine import tiny_models
from tests.engine.native.oracle import KEY_TILE, Oracle
from tests.engine.native.support import NativeModel, build_model, cached, random_tokens, same_bits

# Errors are in multiples of the logits' standard deviation. A row in which no value lies on the edge between two 8-bit
# codes, or two bfloat16 values, differs by the order of float32 sums, 1e-7, or by a step of 16 bits, 1e-5 to 3e-4. One
# of those edges moves it by 2e-3 to 0.11.
ALIKE = 1e-3
ROUNDED_OTHERWISE = 0.2
# Of the rows whose last key is in one tile, at least so many are alike (least seen 0.25, the median is 0.7), and of the
# values in the cache so many are equal (least seen 0.926).
MIN_ALIKE = 0.15
MIN_EQUAL_IN_CACHE = 0.9
# Of the mean KL divergence from unrounded arithmetic; 0.0018 at most on these random, peaked models.
MAX_KL = 0.005


def heads(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, one head": ("llama", heads(1, 1, 64)),
    "llama, 3 to 1": ("llama", {"hidden_size": 96, "tie_word_embeddings": True, **heads(6, 2, 64)}),
    "llama, head_dim 80": ("llama", {"vocab_size": 33, **heads(2, 2, 80)}),
    "llama, head_dim 80, 4 to 1": ("llama", {"intermediate_size": 32, "vocab_size": 64, **heads(4, 1, 80)}),
    "llama, llama3 scaling": ("llama", {"rope_parameters": tiny_models.LLAMA3, **heads(2, 1, 96)}),
    "llama, large epsilon": ("llama", {"rms_norm_eps": 0.3, **heads(4, 2, 64)}),
    "mistral, 2 to 1": ("mistral", {"hidden_size": 128, "vocab_size": 161, **heads(8, 4, 64)}),
    "mistral, head_dim 96, 3 to 1": ("mistral", {"hidden_size": 96, **heads(3, 1, 96)}),
    "qwen2, 7 to 1": ("qwen2", {"intermediate_size": 160, "spread": 0.1, **heads(14, 2, 64)}),
    "qwen2, head_dim 128": ("qwen2", {"num_hidden_layers": 1, **heads(2, 1, 128)}),
    "qwen3, 8 to 1": ("qwen3", {"hidden_size": 32, **heads(8, 1, 128)}),
    "qwen3, 3 layers": ("qwen3", {"num_hidden_layers": 3, "tie_word_embeddings": True, **heads(2, 2, 64)}),
}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "spread": 0.1, **heads(4, 1, 64)}
"""Rows that K-quants can hold."""


def q4_k_m(name: str) -> str:
    """Types as in the widespread Q4_K_M files: 6 bits where it matters most."""
    return "Q6_K" if any(part in name for part in ("output.weight", "attn_v", "ffn_down")) else "Q4_K"


WEIGHTS: dict[str, str | Callable[[str], str]] = {
    **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "F16")},
    "Q4_K_M": q4_k_m,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., NativeModel]:
    """Builds a model once."""
    built: dict[str, NativeModel] = {}

    def get(name: str, family: str, **options: Any) -> NativeModel:
        if name not in built:
            built[name] = build_model(tmp_path_factory.mktemp("model"), family, **options)
        return built[name]

    return get


def check(model: NativeModel, instruction_set: str, *, block_size: int, length: int = 2 * KEY_TILE + 64) -> None:
    """Compute a sequence in chunks; compare each chunk's last row, and the keys and values that it stored.

    The oracle goes on from the kernels' own cache, so that one rounding does not hide the rows after it.
    """
    source = random.Random(length)
    oracle = model.oracle(instruction_set)
    num_blocks = -(-length // block_size)
    runner = model.runner(instruction_set, block_size=block_size, num_blocks=num_blocks + 3)
    table = source.sample(range(num_blocks + 3), num_blocks)
    tokens = random_tokens(length, model.vocab_size, seed=length)
    errors: dict[int, list[float]] = {}
    equal = []
    start = 0
    while start < length:
        end = min(length, start + source.choice((1, 1, 1, 2, 9)))
        past = cached(runner, table, start)
        row = runner.execute([ScheduledChunk("r", start, tokens[start:end], tuple(table), True)])[0]
        expected, expected_kv = oracle.extend(tokens[start:end], past)
        error = (row.double() - expected[-1]).abs().max() / expected[-1].std()
        errors.setdefault((end - 1) // KEY_TILE, []).append(float(error))
        equal.append(cached(runner, table, end)[..., start:, :] == expected_kv)
        start = end
    for tile_errors in errors.values():
        assert max(tile_errors) < ROUNDED_OTHERWISE
        assert sum(error < ALIKE for error in tile_errors) >= MIN_ALIKE * len(tile_errors), sorted(tile_errors)
    assert torch.cat(equal, 3).double().mean() > MIN_EQUAL_IN_CACHE


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_oracles_logits_and_cache(models, instruction_set, name):
    family, options = SHAPES[name]
    check(models(name, family, **options), instruction_set, block_size=16)


@pytest.mark.parametrize("block_size", [1, 5, 32, 48, 128])
def test_every_block_size_gives_them(models, instruction_set, block_size):
    family, options = SHAPES["llama, 3 to 1"]
    check(models("llama, 3 to 1", family, **options), instruction_set, block_size=block_size)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kind_of_weight_gives_them(models, instruction_set, weights):
    model = models(weights, "llama", quant_type=WEIGHTS[weights], **WIDE)
    check(model, instruction_set, block_size=16, length=KEY_TILE + 64)


def test_weights_of_a_file_are_taken_as_they_are(models):
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "Q4_K_M"):
        model = models(name, "llama", quant_type=WEIGHTS[name], **WIDE)
        taken = model.packed.tensors()
        for tensor, values in model.checkpoint.tensors.items():
            torch.testing.assert_close(taken[tensor], values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["llama, 3 to 1", "mistral, 2 to 1", "qwen2, head_dim 128", "qwen3, 8 to 1"])
def test_rounding_of_activations_costs_little(models, instruction_set, name):
    family, options = SHAPES[name]
    model = models(name, family, **options)
    tokens = random_tokens(100, model.vocab_size, seed=1)
    exact = model.oracle().logits(tokens).log_softmax(-1)
    runner = model.runner(instruction_set)
    rows = [runner.execute([ScheduledChunk("r", i, (token,), tuple(range(7)), True)]) for i, token in enumerate(tokens)]
    divergence = (exact.exp() * (exact - torch.cat(rows).double().log_softmax(-1))).sum(-1)
    assert 0 < divergence.mean() < MAX_KL


def test_a_token_whose_embedding_is_zero_is_computed_like_any_other(tmp_path, instruction_set):
    def silence(model: Any) -> None:
        with torch.no_grad():
            model.model.embed_tokens.weight[:50] = 0

    model = build_model(tmp_path, "llama", edit=silence)
    tokens = (7, 60, 7, 7, 70)
    row = model.runner(instruction_set).execute([ScheduledChunk("r", 0, tokens, (0,), True)])[0]
    expected = model.oracle(instruction_set).logits(tokens)[-1]
    torch.testing.assert_close(row.double(), expected, rtol=0, atol=ROUNDED_OTHERWISE * float(expected.std()))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("block_size", [5, 16])
def test_a_broken_value_in_the_cache_shows_in_its_own_sequence_and_nowhere_else(
    models, instruction_set, broken, block_size
):
    family, options = SHAPES["llama, 3 to 1"]
    model = models("llama, 3 to 1", family, **options)
    runner = model.runner(instruction_set, block_size=block_size)
    pairs = [(random_tokens(20, model.vocab_size, seed=1), (0, 1, 2, 3)), (random_tokens(20, 96, seed=2), (4, 5, 6, 7))]
    prompts = [ScheduledChunk("r", 0, tokens[:19], table, False) for tokens, table in pairs]
    last = [ScheduledChunk("r", 19, tokens[19:], table, True) for tokens, table in pairs]
    runner.execute(prompts)
    healthy = runner.execute(last)
    elements = runner.kv_buffer.view(torch.bfloat16).view(runner.layout.shape(runner.num_blocks))
    elements[0, 1, 1].flatten()[torch.tensor([8, -8])] = broken  # a key and a value of the first slots
    rows = runner.execute(last)
    assert not rows[0].isfinite().all()
    assert same_bits(rows[1], healthy[1])


def test_the_oracle_without_rounding_is_transformers(tmp_path):
    for family in tiny_models.FAMILIES:
        model = tiny_models.build(family, head_dim=16)
        checkpoint = load_checkpoint(tiny_models.save(model, tmp_path / family))
        tokens = random_tokens(40, 96, seed=3)
        oracle = Oracle(checkpoint.config, checkpoint.tensors, is_rounded=False)
        expected = tiny_models.reference_logits(model, tokens).double()
        torch.testing.assert_close(oracle.logits(tokens), expected, rtol=1e-4, atol=1e-4)
        halves = oracle.extend(tokens[:15], None)
        torch.testing.assert_close(oracle.extend(tokens[15:], halves[1])[0], expected[15:], rtol=1e-4, atol=1e-4)

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import torch_model
from engine.attention import inverse_frequencies
from engine.checkpoint import load_checkpoint
from engine.model_config import RopeConfig
from engine.model_runner import load_runner
from engine.scheduler import ScheduledChunk
from engine.torch_model import Linear, can_pack
from tests.engine import tiny_models

TOKENS = tuple(int(token) for token in np.random.default_rng(7).integers(0, 96, 40))


def last_logits(path, *, dtype="float32", tokens=TOKENS):
    runner = load_runner(load_checkpoint(path), dtype=dtype, block_size=8, num_blocks=8)
    blocks = (3, 0, 6, 1, 7)
    return runner.execute([ScheduledChunk("r", 0, tuple(tokens), blocks, True)])[0]


def assert_matches_transformers(path, model):
    got = last_logits(path)
    expected = tiny_models.reference_logits(model, TOKENS)[-1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.argmax() == expected.argmax()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_gives_the_logits_of_transformers(family, tmp_path):
    model = tiny_models.build(family)
    assert_matches_transformers(tiny_models.save(model, tmp_path), model)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_gives_them_from_gguf_too(family, tmp_path):
    model = tiny_models.build(family)
    assert_matches_transformers(tiny_models.write_gguf(model, tmp_path / "model.gguf"), model)


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 12},
        {"rms_norm_eps": 0.3},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": tiny_models.LLAMA3},
    ],
)
def test_variations_of_llama_give_the_logits_of_transformers(overrides, tmp_path):
    model = tiny_models.build("llama", **overrides)
    assert_matches_transformers(tiny_models.save(model, tmp_path), model)


def test_gguf_frequency_factors_are_llama3_scaling_in_another_form(tmp_path):
    model = tiny_models.build("llama", rope_parameters=tiny_models.LLAMA3)
    rope = load_checkpoint(tiny_models.save(model, tmp_path / "hf")).config.rope
    factors = inverse_frequencies(RopeConfig(), 8) / inverse_frequencies(rope, 8)
    path = tiny_models.write_gguf(model, tmp_path / "model.gguf", extra_tensors={"rope_freqs.weight": factors.numpy()})
    assert_matches_transformers(path, model)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_bfloat16_stays_near_float32(family, tmp_path):
    path = tiny_models.save(tiny_models.build(family), tmp_path)
    exact = last_logits(path).log_softmax(-1)
    rounded = last_logits(path, dtype="bfloat16")
    assert rounded.dtype is torch.float32
    divergence = (exact.exp() * (exact - rounded.log_softmax(-1))).sum()
    assert 0 < divergence < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_path_without_packed_weights_gives_the_same_model(dtype, tmp_path, monkeypatch):
    path = tiny_models.save(tiny_models.build("qwen2"), tmp_path)
    packed = last_logits(path, dtype=dtype)
    monkeypatch.setattr(torch_model, "can_pack", lambda dtype, device: False)
    plain = last_logits(path, dtype=dtype)
    torch.testing.assert_close(plain, packed, rtol=0, atol=1e-4 if dtype == "float32" else 0.3)


def test_packing_is_for_cpus_with_onednn_and_two_dtypes(monkeypatch):
    assert can_pack(torch.float32, "cpu")
    assert not can_pack(torch.float16, "cpu")
    assert not can_pack(torch.float32, "cuda")
    monkeypatch.setattr(torch_model, "_has_onednn", lambda: False)
    assert not can_pack(torch.float32, "cpu")


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="claimed for the AVX-512 paths of oneDNN"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (576, 1536), (512, 4864)])
def test_row_of_a_packed_linear_layer_depends_on_its_input_row_alone(dtype, outputs, inputs):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(200, inputs, generator=generator).to(dtype)
    with torch.inference_mode():
        layer = Linear(weight, bias, pack=True)
        expected = layer(x)
        for rows in (1, 2, 3, 4, 7, 16, 33, 64, 128):
            for first in (0, 5, 72):
                assert torch.equal(layer(x[first : first + rows]), expected[first : first + rows])

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.model_config import MAX_LAYERS, ModelConfig, RopeConfig

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    max_position=128,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "gpt2", "architecture 'gpt2' is not one of"),
        ("vocab_size", 0, "vocab_size must be at least 1"),
        ("num_layers", 0, "num_layers must be at least 1"),
        ("num_layers", MAX_LAYERS + 1, "layers are more than"),
        ("num_kv_heads", 3, "not a multiple"),
        ("head_dim", 7, "even head_dim"),
        ("rms_norm_eps", 0.0, "rms_norm_eps must be positive"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps must be positive"),
        ("rope", RopeConfig(scaling="factors", frequency_factors=(1.0,)), "1 rope frequency factors"),
    ],
)
def test_impossible_model_is_refused_with_a_reason(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"theta": 0.0}, "must be positive"),
        ({"scaling": "linear", "factor": -1.0}, "must be positive"),
        ({"scaling": "llama3", "factor": 8.0}, "llama3 rope scaling needs"),
        ({"scaling": "factors"}, "go with the scaling 'factors'"),
        ({"frequency_factors": (1.0,)}, "go with the scaling 'factors'"),
    ],
)
def test_impossible_rope_is_refused_with_a_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


def test_every_rope_field_changes_the_description():
    llama3 = RopeConfig(scaling="llama3", factor=8.0, original_max_position=8192)
    variants = [
        RopeConfig(),
        RopeConfig(theta=1e6),
        RopeConfig(scaling="linear", factor=2.0),
        RopeConfig(scaling="linear", factor=4.0),
        RopeConfig(scaling="factors", frequency_factors=(1.0, 2.0)),
        RopeConfig(scaling="factors", frequency_factors=(1.0, 3.0)),
        llama3,
        replace(llama3, low_freq_factor=2.0),
        replace(llama3, high_freq_factor=8.0),
        replace(llama3, original_max_position=4096),
    ]
    assert len({rope.describe() for rope in variants}) == len(variants)


def test_tensor_shapes_list_every_weight_once():
    shapes = CONFIG.tensor_shapes()
    assert len(shapes) == 3 + 2 * 9
    assert shapes["lm_head.weight"] == (100, 32)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (32, 32)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (32, 64)


def test_tied_model_has_no_head_of_its_own():
    assert "lm_head.weight" not in replace(CONFIG, tie_word_embeddings=True).tensor_shapes()


def test_biases_and_head_norms_appear_where_the_family_has_them():
    shapes = replace(CONFIG, has_qkv_bias=True, has_qk_norm=True, head_dim=16).tensor_shapes()
    assert shapes["model.layers.0.self_attn.q_proj.bias"] == (64,)
    assert shapes["model.layers.0.self_attn.v_proj.bias"] == (32,)
    assert shapes["model.layers.1.self_attn.k_norm.weight"] == (16,)
    assert len(shapes) == 3 + 2 * (9 + 5)

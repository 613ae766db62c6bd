from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import load_checkpoint
from engine.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, model_config
from engine.errors import CheckpointError
from tests.engine import tiny_models


@pytest.fixture(scope="module")
def llama():
    return tiny_models.build("llama")


@pytest.fixture
def directory(llama, tmp_path):
    return tiny_models.save(llama, tmp_path / "tiny")


@pytest.fixture
def sharded(llama, tmp_path):
    return tiny_models.save(llama, tmp_path / "sharded", max_shard_size="40KB")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_comes_back_weight_for_weight(family, tmp_path):
    model = tiny_models.build(family)
    checkpoint = load_checkpoint(tiny_models.save(model, tmp_path / family))
    assert checkpoint.format == "safetensors"
    assert checkpoint.config.architecture == family
    assert set(checkpoint.config.tensor_shapes()) == set(checkpoint.tensors)
    for name, weight in model.state_dict().items():
        assert torch.equal(checkpoint.tensors[name], weight), name


def test_sharded_directory_holds_the_same_weights(llama, sharded):
    assert not (sharded / SINGLE_FILE).exists()
    checkpoint = load_checkpoint(sharded)
    assert len(checkpoint.files) > 3
    for name, weight in llama.state_dict().items():
        assert torch.equal(checkpoint.tensors[name], weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_the_dtype_they_are_stored_in(directory, dtype):
    weights = {name: weight.to(dtype) for name, weight in load_file(directory / SINGLE_FILE).items()}
    save_file(weights, directory / SINGLE_FILE)
    assert load_checkpoint(directory).tensors["model.norm.weight"].dtype is dtype


def test_integer_weights_are_refused_when_read(directory):
    weights = {name: weight.to(torch.int8) for name, weight in load_file(directory / SINGLE_FILE).items()}
    save_file(weights, directory / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.norm.weight' is stored as torch.int8"):
        load_checkpoint(directory).tensors["model.norm.weight"]


def test_digest_follows_weights_and_config_and_not_the_place(llama, directory, sharded, tmp_path):
    digest = load_checkpoint(directory).weights_digest
    assert load_checkpoint(tiny_models.save(llama, tmp_path / "again")).weights_digest == digest
    assert load_checkpoint(sharded).weights_digest != digest
    edit(directory / "config.json", lambda content: content.update(rms_norm_eps=1e-6))
    changed = load_checkpoint(directory).weights_digest
    assert changed != digest
    data = bytearray((directory / SINGLE_FILE).read_bytes())
    data[-1] ^= 1
    (directory / SINGLE_FILE).write_bytes(data)
    assert load_checkpoint(directory).weights_digest not in (digest, changed)


# --- config.json ------------------------------------------------------------------------------


def test_both_spellings_of_rope_are_read(directory):
    def old_spelling(content):
        del content["rope_parameters"]
        content |= {"rope_theta": 5e5}
        content["rope_scaling"] = {"type": "linear", "factor": 2.0}

    edit(directory / "config.json", old_spelling)
    rope = model_config(directory).rope
    assert (rope.theta, rope.scaling, rope.factor) == (5e5, "linear", 2.0)

    def new_spelling(content):
        del content["rope_theta"], content["rope_scaling"]
        content["rope_parameters"] = {
            "rope_theta": 1e6,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }

    edit(directory / "config.json", new_spelling)
    rope = model_config(directory).rope
    assert (rope.theta, rope.scaling, rope.factor, rope.original_max_position) == (1e6, "llama3", 8.0, 64)


def test_sliding_window_caps_the_context_where_it_is_in_use(tmp_path):
    mistral = tiny_models.save(tiny_models.build("mistral", sliding_window=100), tmp_path / "mistral")
    assert model_config(mistral).max_position == 100
    qwen = tiny_models.save(tiny_models.build("qwen2"), tmp_path / "qwen")
    edit(qwen / "config.json", lambda content: content.update(sliding_window=100, use_sliding_window=False))
    assert model_config(qwen).max_position == 512
    edit(qwen / "config.json", lambda content: content.update(use_sliding_window=True))
    assert model_config(qwen).max_position == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not one of LlamaForCausalLM"),
        ({"architectures": None}, r"architecture '\(none named\)'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias with architecture 'llama'"),
        ({"mlp_bias": True}, "mlp_bias with architecture 'llama'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "field 'factor' is missing"),
        ({"num_key_value_heads": 4}, "6 heads are not a multiple of 4"),
        ({"hidden_size": "wide"}, "invalid literal"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(directory, change, message):
    edit(directory / "config.json", lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(directory)
    assert str(directory / "config.json") in str(caught.value)


def test_missing_field_is_named(directory):
    edit(directory / "config.json", lambda content: content.pop("intermediate_size"))
    with pytest.raises(CheckpointError, match=r"config\.json: field 'intermediate_size' is missing"):
        load_checkpoint(directory)


def test_unreadable_config_is_named(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not readable JSON"):
        load_checkpoint(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object"):
        load_checkpoint(directory)


# --- files ------------------------------------------------------------------------------------


def test_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a model directory \(no config\.json\)"):
        load_checkpoint(tmp_path)


def test_directory_without_weights_is_named(directory):
    (directory / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_checkpoint(directory)


@pytest.mark.parametrize("length", [0, 5, 100, 20_000, -1])
def test_weights_cut_short_are_named(directory, length):
    path = directory / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load_checkpoint(directory)


def test_missing_tensor_and_wrong_shape_are_named(directory):
    weights = load_file(directory / SINGLE_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: weight for key, weight in weights.items() if key != name}
    save_file(without, directory / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        load_checkpoint(directory)
    save_file(without | {name: torch.zeros(3, 4)}, directory / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' has shape \(3, 4\), the model needs \(80, 48\)"):
        load_checkpoint(directory)


def test_untied_model_without_a_head_is_refused(directory):
    weights = load_file(directory / SINGLE_FILE)
    del weights["lm_head.weight"]
    save_file(weights, directory / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head.weight' is missing"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("weight_map"), "no weight_map"),
        (lambda content: content["weight_map"].update({"model.norm.weight": 3}), "no weight_map"),
        (lambda content: content["weight_map"].update({"model.norm.weight": "gone.safetensors"}), "'gone.safetensors'"),
        (lambda content: content["weight_map"].update({"model.norm.weight": "../x.safetensors"}), "'x.safetensors'"),
    ],
)
def test_index_that_does_not_fit_is_refused(sharded, change, message):
    (sharded.parent / "x.safetensors").touch()
    edit(sharded / INDEX_FILE, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(sharded)

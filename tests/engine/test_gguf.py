from __future__ import annotations

import random
import struct

import gguf
import numpy as np
import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.checkpoint.gguf import QUANT_TYPES, GGUFFile, model_config, read_metadata
from engine.errors import CheckpointError
from tests.engine import tiny_models


@pytest.fixture(scope="module")
def llama():
    return tiny_models.build("llama")


@pytest.fixture
def llama_file(llama, tmp_path):
    return tiny_models.write_gguf(llama, tmp_path / "tiny.gguf")


def write_tensor(path, name, raw, quant_type):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[quant_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- metadata ---------------------------------------------------------------------------------


def test_metadata_of_every_type_comes_back(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "fields.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("flag", True)
    writer.add_string("text", "naïve 😀")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["a", "", "Ġb"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_metadata(tmp_path / "fields.gguf")
    assert metadata == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -3,
        "u16": 60_000,
        "i16": -30_000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "u64": 2**63,
        "i64": -(2**62),
        "f32": 0.5,
        "f64": 0.1,
        "flag": True,
        "text": "naïve 😀",
        "numbers": [1, 2, 3],
        "words": ["a", "", "Ġb"],
    }


def test_config_comes_from_the_metadata(llama_file):
    config = load_checkpoint(llama_file).config
    assert (config.architecture, config.num_layers, config.num_heads, config.num_kv_heads) == ("llama", 3, 6, 2)
    assert (config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size) == (48, 80, 8, 96)
    assert (config.max_position, config.rope.theta, config.tie_word_embeddings) == (512, 10_000.0, False)


def test_missing_head_means_tied_embeddings(tmp_path):
    tied = tiny_models.build("llama", tie_word_embeddings=True)
    assert load_checkpoint(tiny_models.write_gguf(tied, tmp_path / "tied.gguf")).config.tie_word_embeddings


def test_sliding_window_caps_the_context(llama, tmp_path):
    path = tiny_models.write_gguf(llama, tmp_path / "window.gguf", extra_fields={"llama.attention.sliding_window": 64})
    assert load_checkpoint(path).config.max_position == 64


def test_linear_scaling_and_frequency_factors_are_read(llama, tmp_path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    rope = load_checkpoint(tiny_models.write_gguf(llama, tmp_path / "linear.gguf", extra_fields=linear)).config.rope
    assert (rope.scaling, rope.factor) == ("linear", 4.0)
    factors = {"rope_freqs.weight": np.array([1, 2, 4, 8], np.float32)}
    path = tiny_models.write_gguf(llama, tmp_path / "factors.gguf", extra_tensors=factors)
    assert load_checkpoint(path).config.rope.frequency_factors == (1.0, 2.0, 4.0, 8.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, "'llama.rope.scaling.factor' is missing"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 8 dimensions"),
        ({"llama.attention.value_length": 16}, "value_length 16 differs"),
        ({"llama.attention.key_length": "8"}, "holds str"),
    ],
)
def test_unsupported_feature_is_refused_by_name(llama, tmp_path, fields, message):
    path = tiny_models.write_gguf(llama, tmp_path / "odd.gguf", extra_fields=fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_unknown_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'falcon' is not one of llama, qwen2, qwen3"):
        load_checkpoint(tmp_path / "falcon.gguf")


# --- tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensor_comes_back_close_to_what_was_written(tmp_path, quant_type):
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[quant_type])
    got = GGUFFile(write_tensor(tmp_path / "one.gguf", "w", raw, quant_type)).load("w")
    assert got.dtype is torch.float32
    assert got.shape == (6, 64)
    error = np.abs(got.numpy() - values).max()
    assert error <= {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2}.get(quant_type, 0.35)


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def decode_q4_1(block: bytes) -> list[float]:
    scale, minimum = half(block[:2]), half(block[2:4])
    return [scale * (byte & 15) + minimum for byte in block[4:]] + [scale * (byte >> 4) + minimum for byte in block[4:]]


def decode_q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * value for value in struct.unpack("32b", block[2:])]


def decode_q4_k(block: bytes) -> list[float]:
    scale, minimum, packed, codes = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            group_scale, group_minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            group_scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            group_minimum = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        pair = codes[group // 2 * 32 : group // 2 * 32 + 32]
        for byte in pair:
            code = byte >> 4 if group % 2 else byte & 15
            values.append(scale * group_scale * code - minimum * group_minimum)
    return values


def decode_q6_k(block: bytes) -> list[float]:
    low, high, scales, scale = block[:128], block[128:192], struct.unpack("16b", block[192:208]), half(block[208:])
    values = [0.0] * 256
    for part in range(2):
        for index in range(32):
            for row in range(4):
                nibble = low[part * 64 + index + 32 * (row % 2)] >> (4 * (row // 2)) & 15
                code = (nibble | (high[part * 32 + index] >> (2 * row) & 3) << 4) - 32
                position = part * 128 + row * 32 + index
                values[position] = scale * scales[position // 16] * code
    return values


@pytest.mark.parametrize(
    ("quant_type", "block_values", "scale_at", "decode"),
    [
        ("Q4_1", 32, (0, 2), decode_q4_1),
        ("Q8_0", 32, (0,), decode_q8_0),
        ("Q4_K", 256, (0, 2), decode_q4_k),
        ("Q6_K", 256, (208,), decode_q6_k),
    ],
)
def test_quantised_block_decodes_as_its_format_says(tmp_path, quant_type, block_values, scale_at, decode):
    generator = np.random.default_rng(1)
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant_type]][1]
    raw = generator.integers(0, 256, (4, 2 * block_bytes), dtype=np.uint8)
    for block in raw.reshape(8, block_bytes):
        for at in scale_at:
            block[at : at + 2] = np.frombuffer(np.float16(generator.uniform(0.01, 1)).tobytes(), np.uint8)
    got = GGUFFile(write_tensor(tmp_path / "one.gguf", "w", raw, quant_type)).load("w")
    expected = [decode(block.tobytes()) for block in raw.reshape(8, block_bytes)]
    assert got.shape == (4, 2 * block_values)
    np.testing.assert_allclose(got.numpy().reshape(8, -1), expected, rtol=1e-5, atol=1e-5)


def test_type_that_is_not_read_is_refused_when_loaded(tmp_path):
    assert "Q2_K" not in QUANT_TYPES
    raw = np.zeros((2, 84), np.uint8)
    file = GGUFFile(write_tensor(tmp_path / "one.gguf", "w", raw, "Q2_K"))
    with pytest.raises(CheckpointError, match="tensor 'w' is of type Q2_K"):
        file.load("w")


def test_llama_rows_come_out_in_half_split_order_and_others_untouched(llama, llama_file):
    tensors = load_checkpoint(llama_file).tensors
    for name, weight in llama.state_dict().items():
        assert torch.equal(tensors[name], weight), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_rows_are_stored_as_they_are(family, tmp_path):
    model = tiny_models.build(family)
    tensors = load_checkpoint(tiny_models.write_gguf(model, tmp_path / "qwen.gguf")).tensors
    for name, weight in model.state_dict().items():
        assert torch.equal(tensors[name], weight), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_quantised_rows_are_the_files_blocks_in_the_order_of_the_model(family, tmp_path):
    model = tiny_models.build(family, hidden_size=64, num_attention_heads=4)
    checkpoint = load_checkpoint(tiny_models.write_gguf(model, tmp_path / "tiny.gguf", quant_type="Q8_0"))
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
        name = f"model.layers.1.{part}.weight"
        rows = checkpoint.quantised(name)
        assert rows.quant_type == "Q8_0"
        assert rows.data.shape == (checkpoint.tensors[name].shape[0], 68)
        values = gguf.quants.dequantize(rows.data, gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(values, checkpoint.tensors[name].numpy())
    assert checkpoint.quantised("model.norm.weight") is None


def test_plain_numbers_are_not_quantised_rows(llama, llama_file, tmp_path):
    assert load_checkpoint(llama_file).quantised("lm_head.weight") is None
    directory = load_checkpoint(tiny_models.save(llama, tmp_path / "directory"))
    assert directory.quantised("lm_head.weight") is None


# --- damaged files ----------------------------------------------------------------------------


def test_absent_empty_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metadata(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match=r"empty\.gguf: the file is empty"):
        load_checkpoint(tmp_path / "empty.gguf")
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    with pytest.raises(CheckpointError, match=r"page\.gguf: not a GGUF file"):
        load_checkpoint(tmp_path / "page.gguf")


def test_version_that_is_not_supported_is_named(llama_file):
    data = bytearray(llama_file.read_bytes())
    data[4:8] = struct.pack("<I", 9)
    llama_file.write_bytes(data)
    with pytest.raises(CheckpointError, match="GGUF version 9 is not supported"):
        load_checkpoint(llama_file)


def test_file_cut_short_anywhere_is_refused(llama_file):
    data = llama_file.read_bytes()
    for length in [*range(1, len(data) - 64, 997), len(data) - 64]:
        llama_file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf: (truncated|not a GGUF|corrupt)"):
            load_checkpoint(llama_file)


def test_missing_tensor_is_named(llama, tmp_path):
    path = tiny_models.write_gguf(llama, tmp_path / "tiny.gguf", skip=["blk.1.ffn_up.weight"])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: tensor 'model.layers.1.mlp.up_proj.weight' is missing"):
        load_checkpoint(path)
    path = tiny_models.write_gguf(llama, tmp_path / "none.gguf", skip=["token_embd.weight"])
    with pytest.raises(CheckpointError, match=r"none\.gguf: tensor 'token_embd.weight' is missing"):
        load_checkpoint(path)


def test_qwen2_without_its_biases_is_refused(tmp_path):
    skip = ["blk.0.attn_q.bias"]
    path = tiny_models.write_gguf(tiny_models.build("qwen2"), tmp_path / "tiny.gguf", skip=skip)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj.bias' is missing"):
        load_checkpoint(path)


def test_wrong_shape_is_named(llama, tmp_path):
    path = tiny_models.write_gguf(
        llama,
        tmp_path / "tiny.gguf",
        skip=["blk.2.attn_k.weight"],
        extra_tensors={"blk.2.attn_k.weight": np.zeros((24, 48), np.float32)},
    )
    with pytest.raises(CheckpointError, match=r"k_proj.weight' has shape \(24, 48\), the model needs \(16, 48\)"):
        load_checkpoint(path)


def test_any_damage_to_the_header_is_refused_or_harmless(llama_file):
    """Bytes of the header and tables are changed at random; nothing but CheckpointError may come out."""
    data = llama_file.read_bytes()
    table_end = min(info.offset for info in GGUFFile(llama_file).tensors.values())
    generator = random.Random(0)
    messages = []
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 1, 2, 8])):
            damaged[generator.randrange(4, table_end)] = generator.choice([0, 1, 127, 255, generator.randrange(256)])
        llama_file.write_bytes(damaged)
        try:
            load_checkpoint(llama_file)
        except CheckpointError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 400
    assert all(message.startswith(f"{llama_file}: ") for message in messages)


def test_model_config_needs_no_tensor_data_beyond_the_table(llama_file):
    assert model_config(GGUFFile(llama_file)).vocab_size == 96


# --- the real file ----------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_is_read_as_the_gguf_package_reads_it(smollm2_path):
    file = GGUFFile(smollm2_path)
    reader = gguf.GGUFReader(smollm2_path)
    assert {tensor.name for tensor in reader.tensors} == set(file.tensors)
    for tensor in reader.tensors[:8]:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.load(tensor.name).numpy(), expected)
    for key in ("llama.rope.freq_base", "tokenizer.chat_template", "tokenizer.ggml.eos_token_id"):
        assert file.metadata[key] == reader.fields[key].contents()
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152

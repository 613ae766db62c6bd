from __future__ import annotations

import ctypes
import hashlib
import logging
import stat
import struct
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.checkpoint.gguf import QuantisedRows
from engine.errors import NativeUnavailable
from engine.model_config import ModelConfig, RopeConfig
from engine.native import packing, tiles
from engine.native.abi import TILES, Kind
from engine.native.cache import file_lock
from engine.native.packing import open_packed, unsupported_reason
from tests.engine import tiny_models

EXACT_TYPES = {
    "Q4_0": Kind.Q4_HALF,
    "Q4_1": Kind.Q4_HALF,
    "Q5_0": Kind.Q8_HALF,
    "Q8_0": Kind.Q8_SPLIT,  # random bytes hold -128
    "Q4_K": Kind.Q4_FLOAT,
    "Q6_K": Kind.Q8_SPLIT,
}
HALF_AT = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
NUM_ROWS = 70  # two rows of tiles, and six rows of a third


def random_rows(quant_type: str, num_rows: int = NUM_ROWS, num_blocks: int = 3, seed: int = 0) -> QuantisedRows:
    """Blocks of random bytes with random scales: every code comes up."""
    generator = np.random.default_rng(seed)
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant_type]][1]
    data = generator.integers(0, 256, (num_rows, num_blocks * block_bytes), np.uint8)
    for block in data.reshape(-1, block_bytes):
        for at in HALF_AT[quant_type]:
            block[at : at + 2] = np.frombuffer(np.float16(generator.normal()).tobytes(), np.uint8)
    return QuantisedRows(quant_type, data)


def dequantised(rows: QuantisedRows) -> np.ndarray:
    return gguf.quants.dequantize(rows.data, gguf.GGMLQuantizationType[rows.quant_type])


def worth(tile: bytes, kind: Kind, row: int, column: int) -> np.float32:
    """What abi.h says a tile's element is."""
    half, n = divmod(row, 16)
    if kind in (Kind.Q4_HALF, Kind.Q4_FLOAT):
        j, i = divmod(column % 16, 4)
        byte = tile[256 * half + (j * 16 + n) * 4 + i]
        code = byte >> 4 if column >= 16 else byte & 15
        scales = np.frombuffer(tile[512:], np.float16 if kind is Kind.Q4_HALF else np.float32).astype(np.float32)
        return scales[row] * np.float32(code) + scales[32 + row]
    j, i = divmod(column, 4)
    code = tile[512 * half + (j * 16 + n) * 4 + i] - 128
    if kind is Kind.Q8_HALF:
        return np.float32(np.frombuffer(tile[1024:], np.float16)[row]) * np.float32(code)
    return np.frombuffer(tile[1024:], np.float32)[32 * (column // 16) + row] * np.float32(code)


@pytest.mark.parametrize("quant_type", EXACT_TYPES)
def test_tile_holds_exactly_what_the_gguf_block_says(quant_type):
    rows = random_rows(quant_type)
    expected = dequantised(rows)
    groups = tiles.from_blocks(rows)
    assert groups.kind is EXACT_TYPES[quant_type]
    packed = tiles.to_tiles(groups)
    assert packed.shape == (3, expected.shape[1] // 32)
    assert packed.dtype.itemsize % 64 == 0
    if groups.kind is Kind.Q8_HALF:
        assert (packed["codes"].copy().view(np.uint8) != 0).all()  # in rows of padding too
    padded = np.zeros((96, expected.shape[1]), np.float32)
    padded[:NUM_ROWS] = expected
    for tile_row, tile_column in np.ndindex(packed.shape):
        tile = packed[tile_row, tile_column].tobytes()
        got = [[worth(tile, groups.kind, row, column) for column in range(32)] for row in range(32)]
        first_row, first_column = 32 * tile_row, 32 * tile_column
        np.testing.assert_array_equal(got, padded[first_row : first_row + 32, first_column : first_column + 32])
    np.testing.assert_array_equal(tiles.values_of(tiles.from_tiles(groups.kind, packed, NUM_ROWS)), expected)


def test_tiles_are_as_long_as_the_kernels_take_them():
    lengths = {Kind.Q4_HALF: 640, Kind.Q4_FLOAT: 768, Kind.Q8_HALF: 1088, Kind.Q8_SPLIT: 1280}
    assert {kind: dtype.itemsize for kind, dtype in TILES.items()} == lengths


def test_minimum_beyond_fp16_takes_float_scales():
    rows = random_rows("Q4_0")
    rows.data[5, :2] = np.frombuffer(np.float16(9000).tobytes(), np.uint8)  # minimum -72,000
    groups = tiles.from_blocks(rows)
    assert groups.kind is Kind.Q4_FLOAT
    np.testing.assert_array_equal(tiles.values_of(groups), dequantised(rows))


def test_q8_0_without_its_lowest_code_takes_half_scales():
    rows = random_rows("Q8_0")
    rows.data[rows.data == 0x80] = 0x81
    for block in rows.data.reshape(-1, 34):
        block[1] &= 0x3F  # a scale that is finite whatever the line above made of it
    groups = tiles.from_blocks(rows)
    assert groups.kind is Kind.Q8_HALF
    np.testing.assert_array_equal(tiles.values_of(groups), dequantised(rows))


def test_plain_numbers_are_within_half_a_step_of_their_codes():
    generator = np.random.default_rng(1)
    spread = np.exp(generator.normal(size=(tiles.SLAB_ROWS + 40, 3, 1)))
    values = (generator.normal(size=(tiles.SLAB_ROWS + 40, 3, 32)) * spread).astype(np.float32)
    values[3, 1] = 0
    groups = tiles.from_values("w", values.reshape(-1, 96))
    assert groups.kind is Kind.Q8_HALF
    error = np.abs(tiles.values_of(groups).reshape(values.shape) - values)
    peak = np.abs(values).max(-1, keepdims=True)
    # Half a step; and the largest weight loses up to 2^-11 of itself where its scale was rounded down.
    assert (error <= peak * (0.5 / 127 + 2**-11)).all()
    assert not error[3, 1].any()
    again = tiles.from_values("w", values.reshape(-1, 96))
    assert np.array_equal(groups.codes, again.codes)
    assert np.array_equal(groups.scale, again.scale)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1e30])
def test_weight_that_no_group_can_hold_is_a_named_reason(weight):
    values = np.ones((32, 64), np.float32)
    values[7, 40] = weight
    with pytest.raises(NativeUnavailable, match="up_proj has weights that 8-bit groups cannot hold"):
        tiles.from_values("up_proj", values)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("Q4_1", "Q4_1", Kind.Q4_HALF),
        ("Q4_K", "Q4_1", Kind.Q4_FLOAT),
        ("Q5_0", "Q5_0", Kind.Q8_HALF),
        ("Q5_0", "Q6_K", Kind.Q8_SPLIT),
    ],
)
def test_interleaved_matrices_alternate_every_16_rows_and_keep_their_values(first, second, kind):
    sizes = {"Q4_K": 1, "Q6_K": 1}
    pair = [random_rows(name, 48, sizes.get(name, 8), seed) for seed, name in enumerate((first, second))]
    whole = tiles.interleaved(*(tiles.from_blocks(rows) for rows in pair))
    assert whole.kind is kind
    values = tiles.values_of(whole)
    expected = [dequantised(rows) for rows in pair]
    for index in range(3):
        for side in (0, 1):
            at = 32 * index + 16 * side
            np.testing.assert_array_equal(values[at : at + 16], expected[side][16 * index : 16 * index + 16])
    for part, wanted in zip(tiles.separated(whole), expected, strict=True):
        np.testing.assert_array_equal(tiles.values_of(part), wanted)


def test_matrices_of_4_and_of_8_bits_do_not_interleave():
    assert tiles.interleaved(tiles.from_blocks(random_rows("Q4_1")), tiles.from_blocks(random_rows("Q5_0"))) is None


# --- whole checkpoints ------------------------------------------------------------------------


SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 101, "num_attention_heads": 4}


def checkpoint_of(path, family="llama", *, quant_type="Q8_0", **overrides):
    model = tiny_models.build(family, **(SIZES | overrides))
    return load_checkpoint(tiny_models.write_gguf(model, path, quant_type=quant_type))


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoint_of(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quant_type", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_packed_weights_are_those_of_the_gguf_file(family, quant_type, tmp_path):
    checkpoint = checkpoint_of(tmp_path / "tiny.gguf", family, quant_type=quant_type)
    got = open_packed(checkpoint, tmp_path / "packed").tensors()
    assert set(got) == set(checkpoint.config.tensor_shapes())
    assert len(got) == len(set(got))
    for name, tensor in got.items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, checkpoint.tensors[name]), name
    with pytest.raises(KeyError):
        got["model.layers.9.mlp.up_proj.weight"]


@pytest.mark.parametrize("quant_type", ["F32", "F16", "Q5_1"])
def test_types_that_no_tile_holds_become_8_bit_groups(quant_type, tmp_path):
    checkpoint = checkpoint_of(tmp_path / "tiny.gguf", quant_type=quant_type)
    packed = open_packed(checkpoint, tmp_path / "packed")
    for name, tensor in packed.tensors().items():
        expected = checkpoint.tensors[name]
        if expected.ndim == 1:
            assert torch.equal(tensor, expected), name
            continue
        peak = expected.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
        error = (tensor - expected).unflatten(1, (-1, 32)).abs()
        assert error.any()
        assert (error <= peak * (0.5 / 127 + 2**-11)).all(), name


def test_safetensors_in_bfloat16_become_8_bit_groups(tmp_path):
    model = tiny_models.build("qwen3", **SIZES).to(torch.bfloat16)
    checkpoint = load_checkpoint(tiny_models.save(model, tmp_path / "model"))
    got = open_packed(checkpoint, tmp_path / "packed").tensors()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, checkpoint.tensors[name].float(), rtol=0, atol=5e-3)


def test_tied_embedding_is_stored_once(tmp_path):
    tied = open_packed(checkpoint_of(tmp_path / "tied.gguf", tie_word_embeddings=True), tmp_path / "packed")
    untied = open_packed(checkpoint_of(tmp_path / "untied.gguf"), tmp_path / "packed")
    assert set(untied.entries) - set(tied.entries) == {"lm_head.weight"}


def test_gate_of_4_bits_beside_up_of_8_is_a_named_reason(tmp_path):
    checkpoint = checkpoint_of(
        tmp_path / "mixed.gguf", quant_type=lambda name: "Q8_0" if name == "blk.1.ffn_up.weight" else "Q4_1"
    )
    reason = r"layers\.1\.mlp\.gate_proj\.weight has 4-bit weights and .*up_proj\.weight has 8-bit ones"
    with pytest.raises(NativeUnavailable, match=reason):
        open_packed(checkpoint, tmp_path / "packed")
    assert [path.suffix for path in (tmp_path / "packed").iterdir()] == [".lock"]


def test_addresses_lead_to_the_tiles_and_vectors(checkpoint, tmp_path):
    packed = open_packed(checkpoint, tmp_path / "packed")
    matrix = packed.matrix("model.layers.2.mlp.down_proj.weight")
    assert (matrix.rows, matrix.columns, matrix.kind) == (64, 96, Kind.Q8_HALF)
    assert matrix.tiles % packing.ALIGNMENT == 0
    groups = tiles.from_blocks(checkpoint.quantised("model.layers.2.mlp.down_proj.weight"))
    wanted = tiles.to_tiles(groups).tobytes()
    assert ctypes.string_at(matrix.tiles, len(wanted)) == wanted
    norm = checkpoint.tensors["model.norm.weight"].numpy().tobytes()
    assert ctypes.string_at(packed.vector("model.norm.weight"), len(norm)) == norm
    assert packed.vector("model.layers.0.self_attn.q_proj.bias") is None


# --- the cache --------------------------------------------------------------------------------


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def cache_file(directory):
    (path,) = directory.glob("*.packed")
    return path


def test_second_opening_maps_what_the_first_packed(checkpoint, tmp_path, monkeypatch):
    directory = tmp_path / "packed"
    assert open_packed(checkpoint, directory).origin == "packed"
    before = cache_file(directory).stat()
    monkeypatch.setattr(tiles, "to_tiles", None)  # nothing is packed any more
    assert open_packed(checkpoint, directory).origin == "cache"
    assert cache_file(directory).stat().st_mtime_ns == before.st_mtime_ns
    assert stat.S_IMODE(before.st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert sorted(path.suffix for path in directory.iterdir()) == [".lock", ".packed"]


def test_another_checkpoint_has_a_file_of_its_own(checkpoint, tmp_path):
    other = checkpoint_of(tmp_path / "other.gguf", quant_type="Q4_1")
    for one in (checkpoint, other):
        assert open_packed(one, tmp_path / "packed").origin == "packed"
    for one in (checkpoint, other):
        assert open_packed(one, tmp_path / "packed").origin == "cache"


def flip(data, at):
    damaged = bytearray(data)
    damaged[at] ^= 1
    return bytes(damaged)


DAMAGE = {
    "first byte": lambda data: flip(data, 0),
    "version": lambda data: flip(data, 8),
    "checksum": lambda data: flip(data, 40),
    "padding": lambda data: flip(data, 100),
    "a tile": lambda data: flip(data, len(data) // 2),
    "table": lambda data: flip(data, len(data) - 20),
    "last byte": lambda data: flip(data, len(data) - 1),
    "cut by a byte": lambda data: data[:-1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:20],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "another file": lambda data: b"<!doctype html>" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_packed_again_with_one_line(damage, checkpoint, tmp_path, caplog):
    open_packed(checkpoint, tmp_path / "packed")
    path = cache_file(tmp_path / "packed")
    data = path.read_bytes()
    path.write_bytes(DAMAGE[damage](data))
    packed = open_packed(checkpoint, tmp_path / "packed")
    assert packed.origin == "packed"
    assert path.read_bytes() == data
    assert torch.equal(packed.tensors()["model.norm.weight"], checkpoint.tensors["model.norm.weight"])
    (line,) = warnings_of(caplog)
    assert f"{path} is not usable and the weights are packed again" in line
    assert open_packed(checkpoint, tmp_path / "packed").origin == "cache"


def rewritten(data, table, version=packing.FORMAT_VERSION):
    """The file with another table or version, and a checksum that holds."""
    offset = table_offset(data)
    body = data[56:offset] + table
    header = struct.pack("<8sQQ", b"ZSPACKED", version, offset)
    return header + hashlib.sha256(body + header).digest() + body


def table_offset(data):
    return struct.unpack_from("<Q", data, 16)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: b"{}", "its table is not one"),
        (lambda table: b"[1, [[2]]]", "its table is not one"),
        (lambda table: b"[", "its table is not one"),
        (lambda table: table.replace(b'["', b'["0', 1), "it holds another model"),
        (lambda table: table.replace(b", 101, 64,", b", 102, 64,"), "it holds another model"),
        (lambda table: table.replace(b"Q8_HALF", b"Q4_HALF", 1), "its table is inconsistent"),
        (lambda table: table.replace(b"Q8_HALF", b"Q9_HALF", 1), "its table is inconsistent"),
        (lambda table: table.replace(b", 4096,", b", 4097,", 1), "its table is inconsistent"),
        (lambda table: table.replace(b", 4096,", b", 40960000,", 1), "its table is inconsistent"),
    ],
)
def test_table_that_does_not_fit_the_model_is_packed_again(change, message, checkpoint, tmp_path, caplog):
    open_packed(checkpoint, tmp_path / "packed")
    path = cache_file(tmp_path / "packed")
    data = path.read_bytes()
    table = data[table_offset(data) :]
    assert rewritten(data, table) == data
    path.write_bytes(rewritten(data, change(table)))
    assert open_packed(checkpoint, tmp_path / "packed").origin == "packed"
    (line,) = warnings_of(caplog)
    assert message in line
    assert path.read_bytes() == data


def test_file_of_another_version_is_packed_again(checkpoint, tmp_path, caplog):
    open_packed(checkpoint, tmp_path / "packed")
    path = cache_file(tmp_path / "packed")
    data = path.read_bytes()
    path.write_bytes(rewritten(data, data[table_offset(data) :], version=packing.FORMAT_VERSION + 1))
    assert open_packed(checkpoint, tmp_path / "packed").origin == "packed"
    (line,) = warnings_of(caplog)
    assert "it is b'ZSPACKED' of version 2, not b'ZSPACKED' of version 1" in line
    assert path.read_bytes() == data


def test_cache_that_cannot_be_written_leaves_the_weights_in_memory(checkpoint, tmp_path, caplog):
    (tmp_path / "file").touch()
    packed = open_packed(checkpoint, tmp_path / "file" / "packed")
    assert packed.origin == "memory"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(packed.tensors()[name], checkpoint.tensors[name])
    (line,) = warnings_of(caplog)
    assert "the packed weights cannot be stored" in line


def test_cache_that_others_can_write_is_not_used(checkpoint, tmp_path, caplog):
    directory = tmp_path / "packed"
    assert open_packed(checkpoint, directory).origin == "packed"
    directory.chmod(0o777)
    assert open_packed(checkpoint, directory).origin == "memory"
    (line,) = warnings_of(caplog)
    assert "can be written by other users" in line


def test_of_concurrent_openings_one_packs_and_the_others_wait(checkpoint, tmp_path):
    directory = tmp_path / "packed"
    directory.mkdir(mode=0o700)
    lock = directory / f"{checkpoint.weights_digest}.lock"
    with ThreadPoolExecutor(4) as pool:
        with file_lock(lock, 1.0):
            openings = [pool.submit(open_packed, checkpoint, directory) for _ in range(4)]
            with pytest.raises(TimeoutError):
                openings[0].result(0.2)
        origins = sorted(opening.result(60).origin for opening in openings)
    assert origins == ["cache", "cache", "cache", "packed"]


def test_lock_that_is_never_released_leaves_the_weights_in_memory(checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(packing, "PACK_TIMEOUT_S", 0.0)
    directory = tmp_path / "packed"
    directory.mkdir(mode=0o700)
    with file_lock(directory / f"{checkpoint.weights_digest}.lock", 1.0):
        assert open_packed(checkpoint, directory).origin == "memory"
    (line,) = warnings_of(caplog)
    assert "is locked by another process" in line


def test_mapping_outlives_the_file_it_came_from(checkpoint, tmp_path):
    packed = open_packed(checkpoint, tmp_path / "packed")
    cache_file(tmp_path / "packed").unlink()
    assert torch.equal(packed.tensors()["model.norm.weight"], checkpoint.tensors["model.norm.weight"])


# --- what the kernels cover -------------------------------------------------------------------


def config_of(**overrides):
    fields = {
        "architecture": "llama",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(),
        "max_position": 512,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**(fields | overrides))


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        ({}, {}, None),
        ({"head_dim": 80}, {}, None),
        ({"head_dim": 256}, {}, None),
        ({"num_heads": 14, "vocab_size": 1}, {}, None),
        ({"hidden_size": 48}, {}, "hidden_size 48 is not a multiple of 32"),
        ({"intermediate_size": 80}, {}, "intermediate_size 80 is not a multiple of 32"),
        ({"num_heads": 3, "num_kv_heads": 1}, {}, "num_heads x head_dim 48 is not a multiple of 32"),
        ({"head_dim": 8}, {}, "head_dim 8 is not a multiple of 16 up to 256"),
        ({"head_dim": 272}, {}, "head_dim 272 is not a multiple of 16 up to 256"),
        ({}, {"dtype": "float32"}, "its KV cache is bfloat16, not float32"),
        ({}, {"device": "cuda:0"}, "device 'cuda:0' is not the CPU"),
    ],
)
def test_shape_that_is_not_covered_has_a_named_reason(overrides, options, reason):
    assert unsupported_reason(config_of(**overrides), **({"dtype": "bfloat16", "device": "cpu"} | options)) == reason


@pytest.mark.model
def test_smollm2_keeps_its_weights(smollm2_path, tmp_path):
    checkpoint = load_checkpoint(smollm2_path)
    got = open_packed(checkpoint, tmp_path / "packed").tensors()
    for name in checkpoint.config.tensor_shapes():
        assert torch.equal(got[name], checkpoint.tensors[name]), name

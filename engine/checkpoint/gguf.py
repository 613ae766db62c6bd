"""Reads GGUF files, version 2 and 3: metadata, tensor table, dequantised tensors. Memory-mapped.

Every length in the file is checked against the bytes that are there before it is used.
Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import CheckpointError
from engine.model_config import ModelConfig, RopeConfig

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65_535
MAX_ARRAY_DEPTH = 4
DEFAULT_ALIGNMENT = 32
BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
QUANT_TYPES = ("F32", "F16", "BF16", *BLOCK_TYPES)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_Expected = TypeVar("_Expected")

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table. `shape` is row-major, as torch has it; `offset` is from the file's start."""

    name: str
    shape: tuple[int, ...]
    quant_type: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """A matrix as the file stores it: `data` is uint8 (rows, bytes of a row), whole blocks of `quant_type`."""

    quant_type: str
    data: np.ndarray


class GGUFFile:
    """An open GGUF file. Tensors are dequantised when asked for; nothing is cached."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: Not a GGUF file, an unsupported version, cut short, or inconsistent.
        """
        self.path = path
        reader = _Reader(path)
        self._data = reader.data
        num_tensors, num_fields = reader.header()
        self.metadata: dict[str, object] = dict(reader.field() for _ in range(num_fields))
        self.tensors = self._tensor_table(reader, num_tensors)

    def load(self, name: str) -> torch.Tensor:
        """Dequantise one tensor to float32, shape as in its `TensorInfo`.

        Raises:
            CheckpointError: No such tensor, or a type that is not read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        if info.quant_type.name not in QUANT_TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {info.quant_type.name}, "
                f"which is not one of {', '.join(QUANT_TYPES)}"
            )
        values = dequantize(self.raw(info), info.quant_type)
        return torch.from_numpy(np.require(values, np.float32, ["W", "C"]).reshape(info.shape))

    def raw(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes in the mapped file, read-only uint8, (.., bytes of a row)."""
        row_bytes = info.num_bytes // math.prod(info.shape[:-1])
        data = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        return data.reshape(*info.shape[:-1], row_bytes)

    def _tensor_table(self, reader: _Reader, num_tensors: int) -> dict[str, TensorInfo]:
        rows = [reader.tensor_row() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}")
        base = -(-reader.position // alignment) * alignment
        table: dict[str, TensorInfo] = {}
        for name, shape, type_id, relative in rows:
            if name in table:
                raise CheckpointError(f"{self.path}: tensor {name!r} is listed twice")
            info = _tensor_info(self.path, name, shape, type_id, base + relative)
            if info.offset + info.num_bytes > len(self._data):
                raise CheckpointError(
                    f"{self.path}: truncated, tensor {name!r} needs {info.offset + info.num_bytes} bytes "
                    f"and the file has {len(self._data)}"
                )
            table[name] = info
        return table


class GGUFTensors(Mapping[str, torch.Tensor]):
    """The file's weights under their transformers names, float32, dequantised at each access.

    `llama` files hold the q and k rows in the order that interleaved rotary embedding wants; they come
    out in the half-split order that the model uses.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        self._names = {canonical: name for name in file.tensors if (canonical := _canonical_name(name)) is not None}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._file.load(self._names[name])
        order = self._row_order(name)
        return tensor if order is None else tensor[torch.from_numpy(order)]

    def quantised(self, name: str) -> QuantisedRows | None:
        """A matrix in the file's own blocks, rows in the order of `self[name]`; None where it is not quantised."""
        info = self._file.tensors[self._names[name]]
        if len(info.shape) != 2 or info.quant_type.name not in BLOCK_TYPES:
            return None
        data = self._file.raw(info)
        order = self._row_order(name)
        return QuantisedRows(info.quant_type.name, data if order is None else data[order])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._names[name]].shape

    def _row_order(self, name: str) -> np.ndarray | None:
        """The file's row for each row of the model; None where they are the same."""
        if self._config.architecture != "llama":
            return None
        if ".q_proj." in name:
            return _half_split_order(self.shape(name)[0], self._config.num_heads)
        if ".k_proj." in name:
            return _half_split_order(self.shape(name)[0], self._config.num_kv_heads)
        return None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_metadata(path: Path) -> dict[str, object]:
    """Every metadata field of a GGUF file: numbers, strings, booleans, lists of them.

    Raises:
        CheckpointError: As `GGUFFile`; the message names the file and the fault.
    """
    reader = _Reader(path)
    _, num_fields = reader.header()
    return dict(reader.field() for _ in range(num_fields))


def model_config(file: GGUFFile) -> ModelConfig:
    """The model that a GGUF file describes.

    Raises:
        CheckpointError: An unknown architecture, a missing or odd field, unsupported rope scaling.
    """
    fields = _Fields(file.path, file.metadata)
    architecture = fields.require("general.architecture", str)
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise CheckpointError(
            f"{file.path}: architecture {architecture!r} is not one of llama, qwen2, qwen3 (mistral is llama here)"
        )
    num_heads = fields.require(f"{architecture}.attention.head_count", int)
    hidden_size = fields.require(f"{architecture}.embedding_length", int)
    head_dim = fields.get(f"{architecture}.attention.key_length", hidden_size // max(num_heads, 1))
    _refuse_unsupported(fields, architecture, head_dim)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    max_position = fields.require(f"{architecture}.context_length", int)
    window = fields.get(f"{architecture}.attention.sliding_window", 0)
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=fields.require(f"{architecture}.feed_forward_length", int),
            num_layers=fields.require(f"{architecture}.block_count", int),
            num_heads=num_heads,
            num_kv_heads=fields.get(f"{architecture}.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.require(f"{architecture}.attention.layer_norm_rms_epsilon", float),
            rope=_rope_config(file, fields, architecture),
            max_position=min(max_position, window) if window > 0 else max_position,
            tie_word_embeddings="output.weight" not in file.tensors,
            has_qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
            has_qk_norm=architecture == "qwen3",
        )
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def _refuse_unsupported(fields: _Fields, architecture: str, head_dim: int) -> None:
    if fields.get(f"{architecture}.expert_count", 0):
        raise CheckpointError(f"{fields.path}: mixture-of-experts models are not supported")
    value_dim = fields.get(f"{architecture}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise CheckpointError(f"{fields.path}: value_length {value_dim} differs from key_length {head_dim}")
    rotated = fields.get(f"{architecture}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(f"{fields.path}: rope rotates {rotated} of {head_dim} dimensions, not all of them")


def _rope_config(file: GGUFFile, fields: _Fields, architecture: str) -> RopeConfig:
    theta = fields.get(f"{architecture}.rope.freq_base", 10_000.0)
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise CheckpointError(f"{file.path}: rope scaling {scaling!r} is not supported")
    if _ROPE_FREQUENCIES in file.tensors:
        factors = tuple(float(value) for value in file.load(_ROPE_FREQUENCIES).flatten())
        return RopeConfig(theta=theta, scaling="factors", frequency_factors=factors)
    if scaling == "linear":
        return RopeConfig(
            theta=theta, scaling="linear", factor=fields.require(f"{architecture}.rope.scaling.factor", float)
        )
    return RopeConfig(theta=theta)


class _Fields:
    """Metadata with the expected type of each field checked as it is read."""

    def __init__(self, path: Path, metadata: Mapping[str, object]) -> None:
        self.path = path
        self._metadata = metadata

    def require(self, key: str, kind: Callable[..., _Expected]) -> _Expected:
        if key not in self._metadata:
            raise CheckpointError(f"{self.path}: metadata field {key!r} is missing")
        return self._typed(key, kind)

    def get(self, key: str, default: _Expected) -> _Expected:
        return self._typed(key, type(default)) if key in self._metadata else default

    def _typed(self, key: str, kind: Callable[..., _Expected]) -> _Expected:
        value = self._metadata[key]
        numeric = kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool)
        if not (numeric or (kind is str and isinstance(value, str))):
            raise CheckpointError(f"{self.path}: metadata field {key!r} holds {type(value).__name__}")
        return kind(value)


class _Reader:
    """A cursor over the mapped file that never reads past its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        try:
            with path.open("rb") as handle:
                self.data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise CheckpointError(f"{path}: the file is empty") from None

    def header(self) -> tuple[int, int]:
        """Number of tensors and of metadata fields."""
        if self.data[:4] != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file (it begins with {self.data[:4]!r})")
        self.position = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        if num_tensors + num_fields > len(self.data):
            raise CheckpointError(f"{self.path}: corrupt header ({num_tensors} tensors, {num_fields} fields)")
        return num_tensors, num_fields

    def field(self) -> tuple[str, object]:
        key = self._string(MAX_KEY_BYTES)
        return key, self._value(self._scalar("I"), key, depth=0)

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(MAX_KEY_BYTES)
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _value(self, type_id: int, key: str, depth: int) -> object:
        if type_id in _SCALARS:
            return self._scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self._string()
        if type_id == _ARRAY and depth < MAX_ARRAY_DEPTH:
            return self._array(key, depth)
        raise CheckpointError(f"{self.path}: metadata field {key!r} has unknown type {type_id}")

    def _array(self, key: str, depth: int) -> list[object]:
        type_id, count = self._scalar("I"), self._scalar("Q")
        if type_id in _SCALARS:
            layout = f"<{self._fits(count, struct.calcsize(_SCALARS[type_id]))}{_SCALARS[type_id]}"
            return list(struct.unpack(layout, self._take(struct.calcsize(layout))))
        self._fits(count, 1)
        return [self._value(type_id, key, depth + 1) for _ in range(count)]

    def _string(self, limit: int | None = None) -> str:
        length = self._scalar("Q")
        if limit is not None and length > limit:
            raise CheckpointError(f"{self.path}: corrupt, a name of {length} bytes at byte {self.position}")
        return self._take(length).decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        self._fits(count, 1)
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def _fits(self, count: int, item_bytes: int) -> int:
        if count * item_bytes > len(self.data) - self.position:
            raise CheckpointError(
                f"{self.path}: truncated, {count * item_bytes} bytes wanted at byte {self.position} of {len(self.data)}"
            )
        return count


def _tensor_info(path: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorInfo:
    try:
        quant_type = GGMLQuantizationType(type_id)
    except ValueError:
        raise CheckpointError(f"{path}: tensor {name!r} has unknown type {type_id}") from None
    if min(shape) < 1:
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape}")
    block_values, block_bytes = GGML_QUANT_SIZES[quant_type]
    if shape[-1] % block_values:
        raise CheckpointError(
            f"{path}: rows of tensor {name!r} hold {shape[-1]} values, not a multiple of {block_values}"
        )
    return TensorInfo(name, shape, quant_type, offset, math.prod(shape) // block_values * block_bytes)


def _canonical_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None where the model has no such part."""
    match name.split("."):
        case ["blk", layer, stem, kind] if stem in _TENSOR_NAMES:
            return f"model.layers.{layer}.{_TENSOR_NAMES[stem]}.{kind}"
        case [stem, kind] if stem in _TENSOR_NAMES:
            return f"{_TENSOR_NAMES[stem]}.{kind}"
    return None


def _half_split_order(num_rows: int, num_heads: int) -> np.ndarray:
    """Undoes the interleaving of each head's rows: (.., pair, 2) -> (.., 2, pair)."""
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)

"""Reads a transformers model directory: config.json and safetensors files, one or sharded with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError
from engine.model_config import ModelConfig, RopeConfig

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEFAULT_THETA = 10_000.0
_QWEN3_DEFAULT_HEAD_DIM = 128


class SafetensorsTensors(Mapping[str, torch.Tensor]):
    """The weights of a directory by name, in the dtype they are stored in, memory-mapped."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            CheckpointError: A file is missing, cut short or corrupt.
        """
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in weight_files(directory):
            try:
                handle: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
            for name in handle.keys():  # noqa: SIM118 - not a dict: it has no iterator
                self._handles[name] = handle
                self._paths[name] = path

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{self._paths[name]}: tensor {name!r} is stored as {tensor.dtype}")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in a stable order.

    Raises:
        CheckpointError: There are none, or the index is unreadable or names a file that is not there.
    """
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        single = directory / SINGLE_FILE
        if not single.exists():
            raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        return [single]
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: it has no weight_map from tensors to files")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if path.parent != directory or not path.exists():
            raise CheckpointError(f"{index_path}: it names {path.name!r}, which is not in the directory")
    return files


def model_config(directory: Path) -> ModelConfig:
    """The model that config.json describes.

    Raises:
        CheckpointError: No config.json, an unknown architecture, a missing or odd field, a feature
            that the engine does not compute.
    """
    path = directory / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{directory}: not a model directory (no {CONFIG_FILE})")
    fields = _read_json(path)
    names = fields.get("architectures") or ["(none named)"]
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        raise CheckpointError(f"{path}: architecture {names[0]!r} is not one of {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(path, fields, architecture)
    try:
        return _model_config(fields, architecture)
    except KeyError as error:
        raise CheckpointError(f"{path}: field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _model_config(fields: Mapping[str, Any], architecture: str) -> ModelConfig:
    num_heads = int(fields["num_attention_heads"])
    hidden_size = int(fields["hidden_size"])
    default_head_dim = _QWEN3_DEFAULT_HEAD_DIM if architecture == "qwen3" else hidden_size // max(num_heads, 1)
    max_position = int(fields["max_position_embeddings"])
    window = _sliding_window(fields, architecture)
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(fields["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(fields["intermediate_size"]),
        num_layers=int(fields["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(fields.get("num_key_value_heads") or num_heads),
        head_dim=int(fields.get("head_dim") or default_head_dim),
        rms_norm_eps=float(fields["rms_norm_eps"]),
        rope=_rope_config(fields),
        max_position=min(max_position, window) if window is not None else max_position,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        has_qkv_bias=architecture == "qwen2",
        has_qk_norm=architecture == "qwen3",
    )


def _refuse_unsupported(path: Path, fields: Mapping[str, Any], architecture: str) -> None:
    if fields.get("quantization_config"):
        raise CheckpointError(f"{path}: quantized weights (quantization_config) are not supported")
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{path}: activation {activation!r} is not supported")
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise CheckpointError(f"{path}: {name} with architecture {architecture!r} is not supported")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: a partial rotary embedding is not supported")


def _sliding_window(fields: Mapping[str, Any], architecture: str) -> int | None:
    window = fields.get("sliding_window")
    in_use = architecture == "mistral" or bool(fields.get("use_sliding_window"))
    return int(window) if window and in_use else None


def _rope_config(fields: Mapping[str, Any]) -> RopeConfig:
    """Of `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    rope = dict(fields.get("rope_scaling") or {}) | dict(fields.get("rope_parameters") or {})
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("a partial rotary embedding is not supported")
    theta = float(rope.get("rope_theta") or fields.get("rope_theta") or _DEFAULT_THETA)
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling == "default":
        return RopeConfig(theta=theta)
    if scaling == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(rope["factor"]))
    if scaling == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"rope scaling {scaling!r} is not supported")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content

"""Opens a model on disk: a GGUF file, or a transformers directory with safetensors.

Every weight the model needs is looked up and its shape checked before any is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from engine.checkpoint import gguf, safetensors
from engine.errors import CheckpointError
from engine.model_config import ModelConfig

_DIGEST_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """One model, ready to be loaded. `tensors` are read at each access and never kept.

    `files` are all that decide the weights; `tokenizer_source` is what the tokenizer is built from.
    """

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]
    tokenizer_source: Path
    files: tuple[Path, ...]

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 (hex) over the files' names, sizes and bytes."""
        return _digest(self.files)

    def quantised(self, name: str) -> gguf.QuantisedRows | None:
        """A matrix in the blocks that the file stores it in; None where it is stored as plain numbers."""
        return self.tensors.quantised(name) if isinstance(self.tensors, gguf.GGUFTensors) else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` file or a model directory.

    Raises:
        CheckpointError: The path is neither, the model is not supported, or a weight is missing or
            has the wrong shape. The message names the file and the fault.
    """
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory")
    return _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    file = gguf.GGUFFile(path)
    config = gguf.model_config(file)
    tensors = gguf.GGUFTensors(file, config)
    _check_shapes(path, config, tensors)
    return Checkpoint(path, "gguf", config, tensors, tokenizer_source=path, files=(path,))


def _open_directory(path: Path) -> Checkpoint:
    config = safetensors.model_config(path)
    tensors = safetensors.SafetensorsTensors(path)
    _check_shapes(path, config, tensors)
    files = (path / safetensors.CONFIG_FILE, *safetensors.weight_files(path))
    return Checkpoint(path, "safetensors", config, tensors, tokenizer_source=path, files=files)


def _check_shapes(path: Path, config: ModelConfig, tensors: gguf.GGUFTensors | safetensors.SafetensorsTensors) -> None:
    for name, shape in config.tensor_shapes().items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name!r} is missing")
        if tensors.shape(name) != shape:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {tensors.shape(name)}, the model needs {shape}")


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}|{path.stat().st_size}|".encode())
        with path.open("rb") as handle:
            while chunk := handle.read(_DIGEST_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()

"""What the tests of the native backend share: tiny models packed for it, runners, and comparison by bits."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from engine.checkpoint import Checkpoint, load_checkpoint
from engine.errors import NativeUnavailable
from engine.model_runner import DEFAULT_CACHE_DIR
from engine.native.build import load_kernels
from engine.native.packing import PackedWeights, open_packed
from engine.native.runner import NativeModelRunner
from tests.engine import tiny_models
from tests.engine.native.oracle import FINE_INPUTS, PORTABLE_FINE_INPUTS, Oracle

KV_FILL = 0xFF
"""Makes a NaN of every slot that was not written."""


def kernels(instruction_set: str) -> ctypes.CDLL:
    """The compiled kernels; skips the test on a CPU that cannot run them."""
    try:
        return load_kernels(DEFAULT_CACHE_DIR / "native", instruction_set)
    except NativeUnavailable as error:
        if "this CPU has no" in str(error):
            pytest.skip(str(error))
        raise


@dataclass(frozen=True)
class NativeModel:
    """A checkpoint and its packed weights."""

    checkpoint: Checkpoint
    packed: PackedWeights

    @classmethod
    def open(cls, path: Path, cache_dir: Path) -> NativeModel:
        checkpoint = load_checkpoint(path)
        return cls(checkpoint, open_packed(checkpoint, cache_dir))

    @property
    def vocab_size(self) -> int:
        return self.checkpoint.config.vocab_size

    def oracle(self, instruction_set: str | None = None) -> Oracle:
        """Over the weights as the kernels take them, rounded as an instruction path does; None: not rounded."""
        return Oracle(
            self.checkpoint.config,
            self.packed.tensors(),
            is_rounded=instruction_set is not None,
            fine_inputs=PORTABLE_FINE_INPUTS if instruction_set == "portable" else FINE_INPUTS,
        )

    def runner(
        self,
        instruction_set: str,
        *,
        block_size: int = 16,
        num_blocks: int = 64,
        num_threads: int = 1,
        fill: int = KV_FILL,
    ) -> NativeModelRunner:
        runner = NativeModelRunner(
            self.checkpoint,
            kernels(instruction_set),
            self.packed,
            block_size=block_size,
            num_blocks=num_blocks,
            num_threads=num_threads,
        )
        runner.kv_buffer.fill_(fill)
        return runner


def build_model(
    directory: Path,
    family: str,
    *,
    quant_type: str | Callable[[str], str] | None = None,
    edit: Callable[[PreTrainedModel], None] = lambda model: None,
    **overrides: Any,
) -> NativeModel:
    """A tiny model, from safetensors, or from a GGUF file of the given type or types.

    `edit`: changes the weights before they are written. `overrides`: of the configuration; by default the model
    has a few hundred kilobytes.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 101}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    directory.mkdir(parents=True, exist_ok=True)
    model = tiny_models.build(family, **(sizes | overrides))
    edit(model)
    if quant_type is None:
        path = tiny_models.save(model, directory / "checkpoint")
    else:
        path = tiny_models.write_gguf(model, directory / "model.gguf", quant_type=quant_type)
    return NativeModel.open(path, directory / "packed")


def random_tokens(length: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(vocab_size) for _ in range(length))


def blocks_of(runner: NativeModelRunner) -> torch.Tensor:
    """(N, block_bytes) uint8, a view of the cache."""
    return runner.kv_buffer.view(runner.num_blocks, runner.layout.block_bytes)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of float32 tensors as bytes: NaN equals itself, and 0 is not -0."""
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


def cached(runner: NativeModelRunner, block_ids: Sequence[int], length: int) -> torch.Tensor:
    """Keys and values of a sequence's first `length` tokens out of the cache: (L, 2, G, length, D) float64."""
    layout = runner.layout
    blocks = runner.kv_buffer.view(torch.bfloat16).view(layout.shape(runner.num_blocks))[list(block_ids)]
    if layout.slab_order == "pairs":  # keys [D / 2][S][2], values [S / 2][D][2]
        size, dim = layout.block_size, layout.head_dim
        slabs = blocks.flatten(-2)
        keys = slabs[:, :, :, 0].unflatten(-1, (dim // 2, size, 2)).transpose(-3, -2).flatten(-2)
        values = slabs[:, :, :, 1].unflatten(-1, (size // 2, dim, 2)).transpose(-2, -1).flatten(-3, -2)
        blocks = torch.stack((keys, values), 3)
    return blocks.permute(2, 3, 1, 0, 4, 5).flatten(3, 4)[:, :, :, :length].double()

"""Executes one step: scheduled chunks in, logits of the sampling rows out. Owns the KV cache's memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from engine import model_store
from engine.attention import PagedKVCache, StepAttention, in_step_order
from engine.checkpoint import Checkpoint
from engine.draw import NumpyRowChooser, RowChooser
from engine.errors import IntegrityError, NativeUnavailable
from engine.kv_cache import KVCacheLayout
from engine.torch_model import TorchModel

if TYPE_CHECKING:
    from engine.scheduler import ScheduledChunk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("torch", "native")
DEFAULT_CACHE_DIR = model_store.DEFAULT_CACHE_DIR.parent

logger = logging.getLogger(__name__)


class ModelRunner(Protocol):
    """What the engine needs of a backend.

    `kv_buffer`: uint8, `num_blocks * layout.block_bytes` long, allocated once and never moved.
    `arithmetic`: what computed the cache's numbers, such as `torch-bfloat16-cpu` or `native-avx512`; keys and
    values of two arithmetics are not mixed.
    `fallback_reason`: why another backend than the one asked for runs; None where none does.
    `row_chooser`: draws a token from a row of the logits.
    """

    layout: KVCacheLayout
    num_blocks: int
    vocab_size: int
    weights_digest: str
    kv_buffer: torch.Tensor
    arithmetic: str
    fallback_reason: str | None
    row_chooser: RowChooser

    def execute(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        """Compute the chunks' tokens.

        Returns:
            (R, vocab_size) float32, one row for each chunk with `samples`, in order.

        Raises:
            IntegrityError: A chunk names a block, position or token that does not exist; nothing is
                computed then.
        """
        ...

    def scrub(self, block_ids: Sequence[int]) -> None:
        """Zero every byte of the blocks."""
        ...


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may name: nothing is computed before all of it was checked."""

    layout: KVCacheLayout
    num_blocks: int
    max_position: int
    vocab_size: int

    def check(self, chunks: Sequence[ScheduledChunk]) -> None:
        """
        Raises:
            IntegrityError: A chunk names a block, position or token that does not exist.
        """
        for chunk in chunks:
            self._check_chunk(chunk)

    def check_blocks(self, block_ids: Sequence[int]) -> None:
        """
        Raises:
            IntegrityError: A block does not exist.
        """
        if block_ids and (min(block_ids) < 0 or max(block_ids) >= self.num_blocks):
            raise IntegrityError(f"blocks {min(block_ids)} to {max(block_ids)} of a cache of {self.num_blocks}")

    def _check_chunk(self, chunk: ScheduledChunk) -> None:
        end = chunk.start + len(chunk.token_ids)
        if not chunk.token_ids or chunk.start < 0 or end > self.max_position:
            raise IntegrityError(f"{chunk.request_id}: tokens [{chunk.start}, {end}) of at most {self.max_position}")
        if len(chunk.block_ids) < self.layout.num_blocks_for(end):
            raise IntegrityError(f"{chunk.request_id}: {len(chunk.block_ids)} blocks for {end} tokens")
        self.check_blocks(chunk.block_ids)
        if min(chunk.token_ids) < 0 or max(chunk.token_ids) >= self.vocab_size:
            raise IntegrityError(f"{chunk.request_id}: a token id outside the vocabulary")


class TorchModelRunner:
    """The `torch` backend."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        block_size: int,
        num_blocks: int,
        device: str = "cpu",
        fallback_reason: str | None = None,
    ) -> None:
        config = checkpoint.config
        self.layout = KVCacheLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype=dtype,
        )
        self.num_blocks = num_blocks
        self.vocab_size = config.vocab_size
        self.weights_digest = checkpoint.weights_digest
        self.kv_buffer = torch.zeros(num_blocks * self.layout.block_bytes, dtype=torch.uint8, device=device)
        self.arithmetic = f"torch-{dtype}-{self.kv_buffer.device.type}"
        self.fallback_reason = fallback_reason
        self.row_chooser: RowChooser = NumpyRowChooser()
        self._limits = StepLimits(self.layout, num_blocks, config.max_position, config.vocab_size)
        self._scale = config.head_dim**-0.5
        with torch.inference_mode():
            self._cache = PagedKVCache(self.kv_buffer, self.layout, num_blocks)
            self._model = TorchModel(config, checkpoint.tensors, dtype=DTYPES[dtype], device=device)

    @torch.inference_mode()
    def execute(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        """As `ModelRunner.execute`."""
        self._limits.check(chunks)
        if not chunks:
            return torch.empty(0, self.vocab_size)
        ordered = [chunks[index] for index in in_step_order(chunks)]
        device = self.kv_buffer.device
        token_ids = torch.tensor([token for chunk in ordered for token in chunk.token_ids], device=device)
        positions = torch.tensor(
            [chunk.start + offset for chunk in ordered for offset in range(len(chunk.token_ids))],
            device=device,
        )
        attention = StepAttention(self._cache, ordered, self._scale)
        rows = torch.tensor(_sampled_rows(chunks), dtype=torch.int64, device=device)
        return self._model.forward(token_ids, positions, attention, rows)

    @torch.inference_mode()
    def scrub(self, block_ids: Sequence[int]) -> None:
        """As `ModelRunner.scrub`; the copies of keys and values that attention works on go too."""
        blocks = self.kv_buffer.view(self.num_blocks, self.layout.block_bytes)
        self._limits.check_blocks(block_ids)
        for block_id in block_ids:
            blocks[block_id].zero_()
        self._cache.workspace.scrub()


def load_runner(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    block_size: int,
    num_blocks: int,
    backend: str = "torch",
    device: str = "cpu",
    num_threads: int | None = None,
    cache_dir: Path | None = None,
    instruction_set: str | None = None,
) -> ModelRunner:
    """Load the weights and allocate the cache.

    The `native` backend gives way to `torch` where it cannot run, with one warning in the log that says why.

    Args:
        checkpoint: From `load_checkpoint`.
        dtype: `bfloat16` or `float32`, of weights, activations and KV cache.
        block_size: Tokens in a block.
        num_blocks: Blocks in the cache.
        backend: One of `BACKENDS`.
        device: A torch device.
        num_threads: CPU threads of torch, for the whole process, and of the native backend; None leaves them.
        cache_dir: Where the native backend keeps compiled kernels and packed weights; None is `DEFAULT_CACHE_DIR`.
        instruction_set: One of `engine.native.build.INSTRUCTION_SETS`; None is the best that this CPU has.

    Raises:
        ValueError: An unknown dtype, backend or instruction set, or a size below 1.
        CheckpointError: A weight cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if num_blocks < 1:
        raise ValueError("num_blocks must be at least 1")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    reason = None
    if backend == "native":
        from engine.native.runner import load_native

        try:
            return load_native(
                checkpoint,
                dtype=dtype,
                block_size=block_size,
                num_blocks=num_blocks,
                device=device,
                cache_dir=cache_dir or DEFAULT_CACHE_DIR,
                instruction_set=instruction_set,
            )
        except NativeUnavailable as error:
            reason = str(error)
            logger.warning("the torch backend runs instead of the native one: %s", reason)
    return TorchModelRunner(
        checkpoint,
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        device=device,
        fallback_reason=reason,
    )


def _sampled_rows(chunks: Sequence[ScheduledChunk]) -> list[int]:
    """Row of the last token of each sampling chunk, in the order of `chunks`, among tokens in step order."""
    last_row, row = {}, 0
    for index in in_step_order(chunks):
        row += len(chunks[index].token_ids)
        last_row[index] = row - 1
    return [last_row[index] for index, chunk in enumerate(chunks) if chunk.samples]

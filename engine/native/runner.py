"""The model runner over the native kernels: packed weights, a KV cache of its own memory, one call a step."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from engine.attention import inverse_frequencies
from engine.checkpoint import Checkpoint
from engine.draw import RowChooser
from engine.errors import NativeUnavailable
from engine.kv_cache import KVCacheLayout, native_slab_order
from engine.model_config import ModelConfig
from engine.model_runner import StepLimits
from engine.native import abi
from engine.native.build import load_kernels
from engine.native.mapping import zeroed_buffer
from engine.native.packing import PackedWeights, gate_up_name, open_packed, unsupported_reason
from engine.native.sampling import NativeRowChooser

if TYPE_CHECKING:
    from engine.scheduler import ScheduledChunk

MAX_ROWS = 1024


def load_native(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    block_size: int,
    num_blocks: int,
    device: str,
    cache_dir: Path,
    instruction_set: str | None = None,
) -> NativeModelRunner:
    """Compile the kernels and pack the weights, or find both in the cache.

    Raises:
        NativeUnavailable: The kernels cannot be had here, or do not cover the model.
        CheckpointError: A weight cannot be read.
        ValueError: An unknown instruction set, or a size below 1.
    """
    if sys.platform != "linux":
        raise NativeUnavailable("it runs on Linux alone")
    reason = unsupported_reason(checkpoint.config, dtype=dtype, device=device)
    if reason is not None:
        raise NativeUnavailable(reason)
    library = load_kernels(cache_dir / "native", instruction_set)
    packed = open_packed(checkpoint, cache_dir / "packed")
    return NativeModelRunner(checkpoint, library, packed, block_size=block_size, num_blocks=num_blocks)


class NativeModelRunner:
    """The `native` backend: bfloat16 KV, weights as packed, activations in 8 bits.

    A row's logits are the same bits whatever else is in the step, however its sequence was cut into chunks,
    and whatever the number of threads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        library: ctypes.CDLL,
        packed: PackedWeights,
        *,
        block_size: int,
        num_blocks: int,
        num_threads: int | None = None,
    ) -> None:
        """`num_threads`: None is as many as torch has.

        Raises:
            NativeUnavailable: The kernels refuse the sizes, or there is no memory for their scratch.
        """
        config = checkpoint.config
        self.layout = KVCacheLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype="bfloat16",
            slab_order=native_slab_order(block_size),
        )
        self.num_blocks = num_blocks
        self.vocab_size = config.vocab_size
        self.weights_digest = checkpoint.weights_digest
        self.kv_buffer = zeroed_buffer(num_blocks * self.layout.block_bytes)
        self.arithmetic = f"native-{library.zs_path().decode()}"
        self.fallback_reason: str | None = None
        self.row_chooser: RowChooser = NativeRowChooser(library)
        self._limits = StepLimits(self.layout, num_blocks, config.max_position, config.vocab_size)
        self._library = library
        model = _Model(config, packed, block_size)
        threads = num_threads or torch.get_num_threads()
        self._engine: int | None = library.zs_create(
            ctypes.byref(model.struct), self.kv_buffer.data_ptr(), MAX_ROWS, threads
        )
        if not self._engine:
            raise NativeUnavailable("the kernels refuse the model's sizes, or there is no memory for their scratch")
        # Holds the weights and the cache until the engine, which points at them, is gone. Not at the end of the
        # process: a thread may still be in a step then.
        self._finalizer = weakref.finalize(self, _destroy, library, self._engine, model, self.kv_buffer)
        self._finalizer.atexit = False

    @property
    def scratch_bytes(self) -> int:
        """Held by the kernels beside weights and cache; it never grows."""
        return int(self._library.zs_scratch_bytes(self._alive()))

    def execute(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        """As `ModelRunner.execute`."""
        self._limits.check(chunks)
        logits = torch.empty(sum(chunk.samples for chunk in chunks), self.vocab_size)
        first = 0
        for spans in _pieces(chunks):
            first += self._step(spans, logits[first:])
        return logits

    def scrub(self, block_ids: Sequence[int]) -> None:
        """As `ModelRunner.scrub`; the kernels' scratch goes too."""
        self._limits.check_blocks(block_ids)
        self._library.zs_scrub(self._alive())
        blocks = self.kv_buffer.view(self.num_blocks, self.layout.block_bytes)
        for block_id in block_ids:
            blocks[block_id].zero_()

    def close(self) -> None:
        """Free the kernels' scratch. The KV cache stays readable; nothing can be computed any more."""
        self._finalizer()
        self._engine = None

    def _alive(self) -> int:
        if self._engine is None:
            raise RuntimeError("the runner is closed")
        return self._engine

    def _step(self, spans: Sequence[_Span], logits: torch.Tensor) -> int:
        """Compute up to `MAX_ROWS` rows; returns how many of them sample, the first rows of `logits`."""
        num_rows = num_blocks = 0
        chunk_fields: list[int] = []  # of one `abi.Chunk` after another
        tables: list[Sequence[int]] = []
        last_rows: list[int] = []
        for span in spans:
            length = len(span.token_ids)
            table = span.block_ids[: self.layout.num_blocks_for(span.start + length)]
            chunk_fields += (num_rows, length, span.start, num_blocks)
            tables.append(table)
            num_blocks += len(table)
            num_rows += length
            if span.samples:
                last_rows.append(num_rows - 1)
        token_ids = np.fromiter(chain.from_iterable(span.token_ids for span in spans), np.int32, num_rows)
        block_tables = np.fromiter(chain.from_iterable(tables), np.int32, num_blocks)
        chunks, sampled_rows = np.array(chunk_fields, np.int32), np.array(last_rows, np.int32)
        step = abi.Step(
            num_rows,
            len(spans),
            len(last_rows),
            0,
            token_ids.ctypes.data,
            chunks.ctypes.data,
            block_tables.ctypes.data,
            sampled_rows.ctypes.data,
            logits.data_ptr(),
        )
        self._library.zs_step(self._alive(), ctypes.byref(step))
        return len(last_rows)


class _Span(NamedTuple):
    """Neighbouring tokens of one chunk; `start` is the position of the first."""

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    samples: bool


def _pieces(chunks: Sequence[ScheduledChunk]) -> Iterator[list[_Span]]:
    """The step in pieces of at most `MAX_ROWS` rows, in order; a chunk may be cut anywhere."""
    piece: list[_Span] = []
    room = MAX_ROWS
    for chunk in chunks:
        length, first = len(chunk.token_ids), 0
        while first < length:
            last = min(first + room, length)
            piece.append(
                _Span(
                    chunk.token_ids[first:last],
                    chunk.start + first,
                    chunk.block_ids,
                    chunk.samples and last == length,
                )
            )
            room -= last - first
            first = last
            if not room:
                yield piece
                piece, room = [], MAX_ROWS
    if piece:
        yield piece


class _Model:
    """The kernels' description of a model, with everything it points at."""

    def __init__(self, config: ModelConfig, packed: PackedWeights, block_size: int) -> None:
        self._packed = packed
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).contiguous()
        self._layers = (abi.Layer * config.num_layers)(*(self._layer(index) for index in range(config.num_layers)))
        embedding = packed.matrix("model.embed_tokens.weight")
        self.struct = abi.Model(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            block_size=block_size,
            rms_norm_eps=config.rms_norm_eps,
            inverse_frequencies=self._frequencies.data_ptr(),
            final_norm=packed.vector("model.norm.weight"),
            embedding=embedding,
            head=embedding if config.tie_word_embeddings else packed.matrix("lm_head.weight"),
            layers=self._layers,
        )

    def _layer(self, index: int) -> abi.Layer:
        prefix = f"model.layers.{index}."
        matrix, vector = self._packed.matrix, self._packed.vector
        return abi.Layer(
            input_norm=vector(f"{prefix}input_layernorm.weight"),
            mlp_norm=vector(f"{prefix}post_attention_layernorm.weight"),
            q_bias=vector(f"{prefix}self_attn.q_proj.bias"),
            k_bias=vector(f"{prefix}self_attn.k_proj.bias"),
            v_bias=vector(f"{prefix}self_attn.v_proj.bias"),
            q_norm=vector(f"{prefix}self_attn.q_norm.weight"),
            k_norm=vector(f"{prefix}self_attn.k_norm.weight"),
            q=matrix(f"{prefix}self_attn.q_proj.weight"),
            k=matrix(f"{prefix}self_attn.k_proj.weight"),
            v=matrix(f"{prefix}self_attn.v_proj.weight"),
            output=matrix(f"{prefix}self_attn.o_proj.weight"),
            gate_up=matrix(gate_up_name(index)),
            down=matrix(f"{prefix}mlp.down_proj.weight"),
        )


def _destroy(library: ctypes.CDLL, engine: int, model: _Model, kv_buffer: torch.Tensor) -> None:
    """`model` and `kv_buffer` are arguments so that they outlive the engine."""
    library.zs_destroy(engine)

"""Attention over the paged KV cache, and the rotation of queries and keys. Plain torch, any device.

Letters: T tokens of the step, B sequences, H query heads, G KV heads, R = H / G, D head_dim,
N blocks, L layers, S slots in a block, M blocks in a table, C = M * S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from engine.kv_cache import KVCacheLayout
from engine.model_config import RopeConfig

# Decodes share one padded call while the longest context is at most twice the shortest plus this.
PADDING_SLACK_TOKENS = 256
# Scores of one tile of a prefill chunk stay near the size of a CPU's second-level cache.
QUERY_TILE_TOKENS = 128
# oneDNN sums up to this many products in one order whatever else the call computes; for more, the order varies.
SEGMENT_TOKENS = 1024


class Chunk(Protocol):
    """What attention needs to know of one scheduled chunk (`engine.scheduler.ScheduledChunk`)."""

    @property
    def start(self) -> int: ...
    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def block_ids(self) -> tuple[int, ...]: ...


class PagedKVCache:
    """Views of one buffer in the layout `(N, G, L, 2, S, D)`."""

    def __init__(self, buffer: torch.Tensor, layout: KVCacheLayout, num_blocks: int) -> None:
        """`buffer`: uint8, `num_blocks * layout.block_bytes` long."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.blocks = buffer.view(getattr(torch, layout.dtype)).view(layout.shape(num_blocks))
        self.token_rows = self.blocks.view(-1, layout.head_dim)
        slabs = self.blocks.view(
            num_blocks * layout.num_kv_heads, layout.num_layers, 2, layout.block_size * layout.head_dim
        )
        self.key_slabs = [slabs[:, layer, 0] for layer in range(layout.num_layers)]
        self.value_slabs = [slabs[:, layer, 1] for layer in range(layout.num_layers)]
        self.workspace = Workspace(self.dtype, self.device)

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    def write_rows(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Rows of `token_rows` that the chunks' keys and values go to: (L, T * 2 * G) in (T, 2, G) order."""
        layout = self.layout
        block_ids, slots = [], []
        for chunk in chunks:
            for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
                index, slot = divmod(position, layout.block_size)
                block_ids.append(chunk.block_ids[index])
                slots.append(slot)
        heads = torch.arange(layout.num_kv_heads)
        layers = torch.arange(layout.num_layers).view(-1, 1, 1, 1)
        pair = torch.arange(2).view(2, 1)
        block = torch.tensor(block_ids).view(-1, 1, 1)
        slot_in_block = torch.tensor(slots).view(-1, 1, 1)
        head_row = block * layout.num_kv_heads + heads
        rows = ((head_row * layout.num_layers + layers) * 2 + pair) * layout.block_size + slot_in_block
        return rows.view(layout.num_layers, -1).to(self.device)


class Workspace:
    """Scratch memory that layers and steps share: fresh pages cost more than the arithmetic on them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._memory: dict[str, torch.Tensor] = {}

    def take(self, purpose: str, *shape: int) -> torch.Tensor:
        """Memory of that shape with anything in it; the next call for this purpose may reuse it."""
        size = math.prod(shape)
        memory = self._memory.get(purpose)
        if memory is None or memory.numel() < size:
            memory = torch.empty(size + size // 4, dtype=self._dtype, device=self._device)
            self._memory[purpose] = memory
        return memory[:size].view(shape)

    def scrub(self) -> None:
        """Zero all of it."""
        for memory in self._memory.values():
            memory.zero_()


class _Gather:
    """Contexts of B sequences taken out of the cache, each padded to M blocks with its own first block.

    A slot that holds no token of its sequence is zeroed on the way, so what lies in it, NaN included,
    cannot reach a result: a masked key gets probability 0, and 0 times a finite value is 0.
    """

    def __init__(self, cache: PagedKVCache, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        layout = cache.layout
        num_blocks = max(layout.num_blocks_for(length) for length in lengths)
        padded = torch.empty(len(lengths), 1, num_blocks, dtype=torch.int64)
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            used = layout.num_blocks_for(length)
            padded[row, 0, :used] = torch.tensor(table[:used])
            padded[row, 0, used:] = table[0]
        heads = torch.arange(layout.num_kv_heads).view(-1, 1)
        self.num_groups = len(lengths) * layout.num_kv_heads
        self.context = num_blocks * layout.block_size
        self._cache = cache
        self._slabs = (padded * layout.num_kv_heads + heads).flatten().to(cache.device)
        self._stale_rows = self._find_stale_rows(lengths).to(cache.device)
        self._keys, self._values = cache.workspace.take(
            "keys_values", 2, self._slabs.numel(), layout.block_size * layout.head_dim
        )

    def load(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each (B * G, C, D), valid until the next load."""
        return (
            self._load(self._cache.key_slabs[layer], self._keys),
            self._load(self._cache.value_slabs[layer], self._values),
        )

    def _load(self, slabs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        torch.index_select(slabs, 0, self._slabs, out=target)
        rows = target.view(-1, self._cache.layout.head_dim)
        if self._stale_rows.numel():
            rows.index_fill_(0, self._stale_rows, 0.0)
        return rows.view(self.num_groups, self.context, -1)

    def _find_stale_rows(self, lengths: Sequence[int]) -> torch.Tensor:
        layout = self._cache.layout
        rows = []
        for sequence, length in enumerate(lengths):
            # Padding repeats the first block, which has stale slots of its own only when it is the last.
            end = self.context if length < layout.block_size else layout.num_blocks_for(length) * layout.block_size
            heads = torch.arange(layout.num_kv_heads).view(-1, 1) + sequence * layout.num_kv_heads
            rows.append((heads * self.context + torch.arange(length, end)).flatten())
        return torch.cat(rows)


class DecodeAttention:
    """One new token for each of B sequences: R query rows against each KV head's context."""

    def __init__(self, cache: PagedKVCache, chunks: Sequence[Chunk], scale: float) -> None:
        lengths = [chunk.start + 1 for chunk in chunks]
        self._scale = scale
        self._workspace = cache.workspace
        self._gather = _Gather(cache, [chunk.block_ids for chunk in chunks], lengths)
        is_stale = torch.arange(self._gather.context) >= torch.tensor(lengths).view(-1, 1)
        mask = torch.zeros(is_stale.shape).masked_fill_(is_stale, float("-inf"))
        mask = mask.repeat_interleave(cache.layout.num_kv_heads, 0).unsqueeze(1)
        self._mask = mask.to(cache.device, cache.dtype)  # (B * G, 1, C)

    def __call__(self, query: torch.Tensor, layer: int) -> torch.Tensor:
        """(B, H, D) -> (B, H * D)."""
        keys, values = self._gather.load(layer)
        grouped = query.reshape(keys.shape[0], -1, keys.shape[2])
        shape = (*grouped.shape[:2], keys.shape[1])
        scores = self._workspace.take("scores", *shape)
        torch.baddbmm(self._mask, grouped, keys.transpose(1, 2), alpha=self._scale, out=scores)
        probabilities = torch.softmax(scores, -1, out=self._workspace.take("probabilities", *shape))
        output = torch.empty_like(grouped)
        _weighted_sum(probabilities, values, output)
        return output.view(query.shape[0], -1)


class PrefillAttention:
    """T consecutive tokens of one sequence over themselves and everything before them.

    Works through `QUERY_TILE_TOKENS` queries at a time, each tile against the keys up to its last query.
    """

    def __init__(self, cache: PagedKVCache, chunk: Chunk, scale: float) -> None:
        self._scale = scale
        self._workspace = cache.workspace
        self._layout = cache.layout
        self._start = chunk.start
        self._gather = _Gather(cache, [chunk.block_ids], [chunk.start + len(chunk.token_ids)])
        tile = min(QUERY_TILE_TOKENS, len(chunk.token_ids))
        # (tile, 1, columns from the tile's first token on): a query does not see the tokens after it.
        is_later = torch.arange(tile + cache.layout.block_size) > torch.arange(tile).view(-1, 1, 1)
        mask = torch.zeros(is_later.shape).masked_fill_(is_later, float("-inf"))
        self._mask = mask.to(cache.device, cache.dtype)

    def __call__(self, query: torch.Tensor, layer: int) -> torch.Tensor:
        """(T, H, D) -> (T, H * D)."""
        layout = self._layout
        keys, values = self._gather.load(layer)
        num_tokens = query.shape[0]
        # (G, T, R, D): a KV head serves R query heads.
        grouped = query.view(num_tokens, layout.num_kv_heads, -1, layout.head_dim).transpose(0, 1).contiguous()
        output = torch.empty_like(grouped)
        for first in range(0, num_tokens, QUERY_TILE_TOKENS):
            tile = slice(first, first + QUERY_TILE_TOKENS)
            self._tile(grouped[:, tile], keys, values, self._start + first, output[:, tile])
        return output.transpose(0, 1).reshape(num_tokens, -1)

    def _tile(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, output: torch.Tensor
    ) -> None:
        """Write the attention of the queries from `position` on to `output`, both (G, tile, R, D)."""
        groups, num_tokens, group_size, _ = query.shape
        layout = self._layout
        context = layout.num_blocks_for(position + num_tokens) * layout.block_size
        shape = (groups, num_tokens * group_size, context)
        scores = self._workspace.take("scores", *shape)
        keys, values = keys[:, :context], values[:, :context]
        torch.baddbmm(scores, query.flatten(1, 2), keys.transpose(1, 2), beta=0, alpha=self._scale, out=scores)
        tail = scores.view(groups, num_tokens, group_size, context)[..., position:]
        tail.add_(self._mask[:num_tokens, :, : tail.shape[3]])
        probabilities = torch.softmax(scores, -1, out=self._workspace.take("probabilities", *shape))
        _weighted_sum(probabilities, values, output.flatten(1, 2))


class StepAttention:
    """Attention of one step: B decodes first, then prefill chunks, over tokens concatenated in that order.

    A row's value is a function of its own sequence up to itself. On a CPU with AVX-512 its bits are too, and
    depend neither on the rest of the batch nor on the number of threads; in bfloat16 nor on how the
    sequence was cut into chunks, while float32 prefill and decode differ in the last bits (MKL picks its
    order of summation by the number of rows).

    Numerics: scores, probabilities and results are rounded to the cache's dtype, sums are float32;
    tolerances in tests/conformance/test_attention.py.
    """

    def __init__(self, cache: PagedKVCache, chunks: Sequence[Chunk], scale: float) -> None:
        """`chunks`: those of one token before all others (see `in_step_order`)."""
        self._cache = cache
        self._write_rows = cache.write_rows(chunks)
        self._parts: list[tuple[int, int, DecodeAttention | PrefillAttention]] = []
        token = 0
        for group in _groups(chunks):
            end = token + sum(len(chunk.token_ids) for chunk in group)
            part: DecodeAttention | PrefillAttention
            if len(group[0].token_ids) == 1:
                part = DecodeAttention(cache, group, scale)
            else:
                part = PrefillAttention(cache, group[0], scale)
            self._parts.append((token, end, part))
            token = end

    def __call__(self, query: torch.Tensor, key_value: torch.Tensor, layer: int) -> torch.Tensor:
        """Store this step's keys and values, then attend.

        Args:
            query: (T, H, D), rotated.
            key_value: (T, 2 * G, D), keys (rotated) before values.
            layer: Index of the layer.

        Returns:
            (T, H * D), dtype of `query`.
        """
        rows = key_value.reshape(-1, key_value.shape[-1])
        self._cache.token_rows.index_copy_(0, self._write_rows[layer], rows)
        outputs = [part(query[start:end], layer) for start, end, part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _weighted_sum(probabilities: torch.Tensor, values: torch.Tensor, output: torch.Tensor) -> None:
    """`output = probabilities @ values`, a segment of the context after another."""
    for first in range(0, values.shape[1], SEGMENT_TOKENS):
        segment = slice(first, first + SEGMENT_TOKENS)
        if first == 0:
            torch.bmm(probabilities[:, :, segment], values[:, segment], out=output)
        else:
            output.baddbmm_(probabilities[:, :, segment], values[:, segment])


class RotaryEmbedding:
    """Cosines and sines of the positions of one step, computed in float32."""

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: str) -> None:
        self._frequencies = inverse_frequencies(config, head_dim).to(device)
        self._dtype = dtype

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine, each (T, 1, D)."""
        angles = torch.outer(positions.float(), self._frequencies).unsqueeze(1)
        cosine, sine = angles.cos(), angles.sin()
        return (
            torch.cat((cosine, cosine), -1).to(self._dtype),
            torch.cat((-sine, sine), -1).to(self._dtype),
        )


def rotate_(heads: torch.Tensor, cosine: torch.Tensor, signed_sine: torch.Tensor) -> None:
    """Rotate (T, heads, D) in place: x cos + swap_halves(x) (-sin, sin)."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cosine).addcmul_(swapped, signed_sine)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """(D / 2,) float32, scaled. Source of llama3: transformers `_compute_llama3_parameters`."""
    frequencies = 1.0 / (config.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    match config.scaling:
        case "linear":
            return frequencies / config.factor
        case "factors":
            return frequencies / torch.tensor(config.frequency_factors)
        case "llama3":
            return _llama3(config, frequencies)
    return frequencies


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Interpolates by `factor` between no scaling (short wavelengths) and full scaling (long ones)."""
    turns = config.original_max_position * frequencies / (2 * torch.pi)
    ramp = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = ramp.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / config.factor + kept * frequencies


def in_step_order(chunks: Sequence[Chunk]) -> list[int]:
    """Indices of `chunks`: one-token chunks by context length, then the others as they come."""
    decodes = [index for index, chunk in enumerate(chunks) if len(chunk.token_ids) == 1]
    prefills = [index for index, chunk in enumerate(chunks) if len(chunk.token_ids) > 1]
    return sorted(decodes, key=lambda index: chunks[index].start) + prefills


def _groups(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks that share one call: neighbouring decodes of like context; every prefill chunk alone."""
    groups: list[list[Chunk]] = []
    for chunk in chunks:
        if len(chunk.token_ids) == 1 and groups and len(groups[-1][0].token_ids) == 1:
            shortest = groups[-1][0].start + 1
            if chunk.start + 1 <= 2 * shortest + PADDING_SLACK_TOKENS:
                groups[-1].append(chunk)
                continue
        groups.append([chunk])
    return groups

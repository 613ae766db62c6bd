"""What every attention backend must compute, against a loop over tokens in float64."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.attention import (
    PADDING_SLACK_TOKENS,
    QUERY_TILE_TOKENS,
    PagedKVCache,
    RotaryEmbedding,
    StepAttention,
    in_step_order,
    rotate_,
)
from engine.kv_cache import KVCacheLayout
from engine.model_config import RopeConfig
from engine.scheduler import ScheduledChunk

NUM_LAYERS = 2
LAYER = 1
DTYPES = ("float32", "bfloat16")
# Largest absolute error on unit-normal inputs. bfloat16 rounds the scores, the probabilities and the result.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}

needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="bit-for-bit independence is claimed, and holds, on the AVX-512 paths of oneDNN and MKL",
)


class Pool:
    """A cache full of NaN, sequences with random keys and values, and the answers."""

    def __init__(self, *, dtype="float32", heads=6, kv_heads=2, head_dim=16, block_size=4, num_blocks=400, seed=0):
        self.layout = KVCacheLayout(NUM_LAYERS, kv_heads, head_dim, block_size, dtype)
        buffer = torch.zeros(num_blocks * self.layout.block_bytes, dtype=torch.uint8)
        self.cache = PagedKVCache(buffer, self.layout, num_blocks)
        self.cache.blocks.fill_(float("nan"))
        self.heads = heads
        self.scale = head_dim**-0.5
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.free = list(range(num_blocks))
        self.random.shuffle(self.free)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.cache.dtype)

    def sequence(self, past: int, new: int, spare_blocks: int = 0):
        """A sequence whose `past` tokens are in the cache and whose `new` ones are to be computed."""
        needed = self.layout.num_blocks_for(past + new) + spare_blocks
        blocks = tuple(self.free.pop() for _ in range(needed))
        keys_values = self.draw(past + new, 2 * self.layout.num_kv_heads, self.layout.head_dim)
        queries = self.draw(new, self.heads, self.layout.head_dim)
        for position in range(past):
            self._store(blocks, position, keys_values[position])
        chunk = ScheduledChunk(f"r{blocks[0]}", past, (0,) * new, blocks, True)
        return chunk, queries, keys_values

    def _store(self, blocks, position, row):
        block, slot = divmod(position, self.layout.block_size)
        pair = row.view(2, self.layout.num_kv_heads, -1).transpose(0, 1)
        self.cache.blocks[blocks[block], :, LAYER, :, slot] = pair

    def expected(self, chunk, queries, keys_values):
        """(T, H * D) in float64, one token and one head at a time."""
        keys, values = (
            keys_values.double().numpy().reshape(len(keys_values), 2, -1, self.layout.head_dim).swapaxes(0, 1)
        )
        group_size = self.heads // self.layout.num_kv_heads
        rows = []
        for index, query in enumerate(queries.double().numpy()):
            length = chunk.start + index + 1
            for head in range(self.heads):
                scores = keys[:length, head // group_size] @ query[head] * self.scale
                weights = np.exp(scores - scores.max())
                rows.append(weights @ values[:length, head // group_size] / weights.sum())
        return torch.from_numpy(np.array(rows).reshape(len(queries), -1))


def run(pool: Pool, sequences) -> list[torch.Tensor]:
    """One step; the result of each sequence."""
    order = in_step_order([chunk for chunk, _, _ in sequences])
    ordered = [sequences[index] for index in order]
    attention = StepAttention(pool.cache, [chunk for chunk, _, _ in ordered], pool.scale)
    new_rows = [keys_values[chunk.start :] for chunk, _, keys_values in ordered]
    output = attention(torch.cat([queries for _, queries, _ in ordered]), torch.cat(new_rows), LAYER)
    parts = output.split([len(queries) for _, queries, _ in ordered])
    return [parts[order.index(index)] for index in range(len(sequences))]


def check(pool: Pool, sequences) -> None:
    for result, sequence in zip(run(pool, sequences), sequences, strict=True):
        expected = pool.expected(*sequence)
        assert result.dtype is pool.cache.dtype
        torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[pool.layout.dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (6, 2), (8, 1), (8, 2)])
def test_every_head_geometry(dtype, head_dim, heads, kv_heads):
    pool = Pool(dtype=dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    check(pool, [pool.sequence(9, 1), pool.sequence(0, 11), pool.sequence(6, 7)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 32])
def test_every_block_size(dtype, block_size):
    pool = Pool(dtype=dtype, block_size=block_size)
    check(pool, [pool.sequence(30, 1), pool.sequence(3, 1), pool.sequence(0, 33), pool.sequence(17, 20)])


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 255, 256, 257])
def test_decode_at_the_edges_of_blocks(length):
    pool = Pool(block_size=4)
    check(pool, [pool.sequence(length - 1, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", [0, 1, 16, 29])
@pytest.mark.parametrize("new", [2, 16, QUERY_TILE_TOKENS - 1, QUERY_TILE_TOKENS, QUERY_TILE_TOKENS + 5])
def test_prefill_chunk_sees_its_past_and_not_its_future(dtype, past, new):
    pool = Pool(dtype=dtype, block_size=16)
    check(pool, [pool.sequence(past, new)])


def test_decodes_of_very_different_contexts():
    pool = Pool(block_size=16)
    far_apart = 2 * PADDING_SLACK_TOKENS + 20
    check(pool, [pool.sequence(length, 1) for length in (far_apart, 0, 3, 700, 15, 16)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_context_longer_than_one_segment_of_the_sum(dtype):
    pool = Pool(dtype=dtype, block_size=16, heads=4)
    check(pool, [pool.sequence(2100, 1), pool.sequence(1020, 9)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_in_scratch_memory_does_not_matter(dtype):
    pool = Pool(dtype=dtype)
    for purpose in ("keys_values", "scores", "probabilities"):
        pool.cache.workspace.take(purpose, 1 << 16).fill_(float("nan"))
    check(pool, [pool.sequence(9, 1), pool.sequence(2, 1), pool.sequence(5, 16)])


def test_scratch_memory_is_scrubbed_on_demand():
    pool = Pool()
    check(pool, [pool.sequence(9, 1)])
    assert pool.cache.workspace.take("keys_values", 64).any()
    pool.cache.workspace.scrub()
    assert not pool.cache.workspace.take("keys_values", 64).any()


def test_blocks_reserved_ahead_do_not_matter():
    pool = Pool()
    check(pool, [pool.sequence(9, 1, spare_blocks=3), pool.sequence(5, 6, spare_blocks=2)])


def test_step_order_is_decodes_by_context_and_then_prefills_as_they_come():
    starts_and_sizes = [(0, 5), (900, 1), (3, 1), (8, 2), (40, 1)]
    chunks = [ScheduledChunk("r", start, (0,) * size, (0,), True) for start, size in starts_and_sizes]
    assert in_step_order(chunks) == [2, 4, 1, 0, 3]


def test_random_mixed_steps():
    for seed in range(25):
        pool = Pool(seed=seed, block_size=random.Random(seed).choice([2, 4, 8, 16]))
        shapes = [(pool.random.randrange(60), pool.random.choice([1, 1, 1, 2, 5, 31])) for _ in range(6)]
        check(pool, [pool.sequence(past, new) for past, new in shapes])


def test_step_writes_its_own_slots_and_nothing_else():
    pool = Pool(block_size=4)
    sequences = [pool.sequence(6, 1), pool.sequence(3, 6)]
    before = pool.cache.blocks.clone()
    run(pool, sequences)
    changed = ~((pool.cache.blocks == before) | (pool.cache.blocks.isnan() & before.isnan()))
    written = {
        (chunk.block_ids[position // 4], position % 4)
        for chunk, _, _ in sequences
        for position in range(chunk.start, chunk.start + len(chunk.token_ids))
    }
    where = changed.nonzero()
    assert {(int(block), int(slot)) for block, _, _, _, slot, _ in where} == written
    assert set(where[:, 2].tolist()) == {LAYER}
    assert int(changed.sum()) == len(written) * 2 * 2 * 16


@needs_avx512
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_row_is_the_same_bit_for_bit_alone_and_in_any_batch(dtype):
    pool = Pool(dtype=dtype, heads=9, kv_heads=3, head_dim=64, block_size=16, num_blocks=300)
    sequences = [pool.sequence(past, 1) for past in (1, 40, 99, 300, 301, 555, 1030, 1500)]
    together = run(pool, sequences)
    for sequence, row in zip(sequences, together, strict=True):
        assert torch.equal(run(pool, [sequence])[0], row)


@needs_avx512
@pytest.mark.parametrize("sizes", [(1200,), (512, 688), (128, 128, 944), (100,) * 12, (999, 1, 23, 1, 176)])
def test_bfloat16_prefill_is_the_same_bit_for_bit_in_any_chunks(sizes):
    pool = Pool(dtype="bfloat16", heads=9, kv_heads=3, head_dim=64, block_size=16, num_blocks=160)
    whole, queries, keys_values = pool.sequence(0, 1200)
    expected = run(pool, [(whole, queries, keys_values)])[0]
    blocks = tuple(pool.free.pop() for _ in range(75))
    start, parts = 0, []
    for size in sizes:
        chunk = ScheduledChunk("chunked", start, (0,) * size, blocks, True)
        end = start + size
        parts.append(run(pool, [(chunk, queries[start:end], keys_values[:end])])[0])
        start = end
    assert torch.equal(torch.cat(parts), expected)


def test_rotation_turns_each_pair_by_its_angle():
    head_dim, positions = 8, [0, 1, 7, 300]
    heads = torch.randn(len(positions), 3, head_dim, dtype=torch.float32)
    rotated = heads.clone()
    rope = RotaryEmbedding(RopeConfig(theta=100.0), head_dim, torch.float32, "cpu")
    rotate_(rotated, *rope.at(torch.tensor(positions)))
    for row, position in enumerate(positions):
        for pair in range(head_dim // 2):
            turn = np.exp(1j * position * 100.0 ** (-2 * pair / head_dim))
            for head in range(3):
                first, second = heads[row, head, pair].item(), heads[row, head, pair + head_dim // 2].item()
                expected = (first + 1j * second) * turn
                got = rotated[row, head, pair].item() + 1j * rotated[row, head, pair + head_dim // 2].item()
                assert abs(got - expected) < 1e-4

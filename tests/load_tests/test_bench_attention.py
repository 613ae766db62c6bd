"""The attention bench reads what it says it reads; its times are nobody's business here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from load_tests import bench_attention
from load_tests.bench_attention import BATCH_SIZE, BLOCK_SIZE, Cache, DecodeStep, Reader, Shape

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SHAPE = Shape(num_kv_heads=2, queries_per_head=3, head_dim=64, blocks_each=3)


@pytest.fixture
def cache() -> Cache:
    return Cache(SHAPE)


def test_the_cache_is_the_largest_that_fits() -> None:
    shape = Shape.of(10 << 20, 3, 3, 64)
    assert shape.num_bytes <= 10 << 20 < shape.num_bytes + BATCH_SIZE * 3 * shape.slab_bytes
    assert shape.num_bytes == BATCH_SIZE * shape.context_tokens * 3 * 64 * 2 * 2


def test_both_orders_are_of_every_slab_once(cache: Cache) -> None:
    everything = np.arange(0, SHAPE.num_bytes, SHAPE.slab_bytes)
    in_order = cache.offsets_in_order()
    assert sorted(in_order) == everything.tolist()
    assert in_order.tolist() != everything.tolist()
    assert cache.offsets_from_the_start().tolist() == everything.tolist()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_plain_read_sums_every_word(cache: Cache, num_threads: int) -> None:
    expected = int(np.add.reduce(cache.buffer.numpy().view(np.uint64), dtype=np.uint64))
    for offsets in (cache.offsets_in_order(), cache.offsets_from_the_start()):
        assert Reader().sum(cache, offsets, num_threads) == expected


def test_a_step_writes_its_token_and_nothing_else(cache: Cache) -> None:
    """The last slot of each sequence's last block: keys [D / 2][S][2], values [S / 2][D][2]."""
    before = cache.buffer.clone()
    step = DecodeStep(cache, 2)
    step.run()
    step.close()
    changed = (cache.buffer != before).view(-1, SHAPE.num_kv_heads, 2, BLOCK_SIZE * SHAPE.head_dim, 2).any(-1)
    assert {int(block) for block in changed.flatten(1).any(1).nonzero()} == set(cache.tables[:, -1].tolist())
    keys = changed[:, :, 0].view(-1, SHAPE.num_kv_heads, SHAPE.head_dim // 2, BLOCK_SIZE, 2)
    values = changed[:, :, 1].view(-1, SHAPE.num_kv_heads, BLOCK_SIZE // 2, SHAPE.head_dim, 2)
    assert not keys[..., :-1, :].any()
    assert not values[:, :, :-1].any()
    assert not values[..., 0].any()
    assert torch.count_nonzero(changed) > BATCH_SIZE * SHAPE.num_kv_heads * SHAPE.head_dim


def test_the_last_line_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    bench_attention.main(["--mib", "1", "--repeats", "2", "--threads", "1", "2"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bytes"] == report["num_blocks"] * 3 * 2 * BLOCK_SIZE * 64 * 2
    assert [len(speeds) for row in report["gb_s"].values() for speeds in row.values()] == [2] * 6
    assert all(speed > 0 for row in report["gb_s"].values() for speeds in row.values() for speed in speeds)

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.kv_cache import KVCacheLayout

LAYOUT = KVCacheLayout(num_layers=2, num_kv_heads=3, head_dim=16, block_size=16, dtype="bfloat16")


def test_slab_order_is_part_of_the_fingerprint_and_not_of_the_size():
    paired = replace(LAYOUT, slab_order="pairs")
    assert paired.fingerprint() != LAYOUT.fingerprint()
    assert paired.block_bytes == LAYOUT.block_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slab_order": "columns"}, "slab order 'columns' is not one of rows, pairs"),
        ({"slab_order": "pairs", "block_size": 8}, "slab order 'pairs' needs an even head_dim and a multiple of 16"),
        ({"slab_order": "pairs", "head_dim": 15}, "slab order 'pairs' needs an even head_dim and a multiple of 16"),
    ],
)
def test_slab_order_that_no_cache_can_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LAYOUT, **changes)

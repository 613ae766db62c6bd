"""Geometry of the paged KV cache: shape, strides, bytes, fingerprint. No tensors."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SLAB_ORDERS = ("rows", "pairs")
PAIRED_SLOTS = 16
LAYOUT_VERSION = 1


def native_slab_order(block_size: int) -> str:
    """The order in which the native backend keeps blocks of that many slots (kernels/abi.h)."""
    return "rows" if block_size % PAIRED_SLOTS else "pairs"


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """Block-major KV cache: `(N blocks, G kv heads, L layers, 2 {k,v}, S slots, D head_dim)`, contiguous.

    One block of all layers is one contiguous extent of `block_bytes`: one transfer descriptor a
    block, one memset to scrub it, and a tensor-parallel rank's heads are contiguous inside it.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    slab_order: str = "rows"

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {sorted(ITEM_BYTES)}")
        for field in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1")
        if self.slab_order not in SLAB_ORDERS:
            raise ValueError(f"slab order {self.slab_order!r} is not one of {', '.join(SLAB_ORDERS)}")
        if self.slab_order == "pairs" and (self.block_size % PAIRED_SLOTS or self.head_dim % 2):
            raise ValueError(f"slab order 'pairs' needs an even head_dim and a multiple of {PAIRED_SLOTS} slots")

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (num_blocks, self.num_kv_heads, self.num_layers, 2, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        elements = self.num_kv_heads * self.num_layers * 2 * self.block_size * self.head_dim
        return elements * ITEM_BYTES[self.dtype]

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        """Hex digest of everything two caches must agree on before bytes may move between them."""
        fields = "|".join(f"{key}={value}" for key, value in sorted(asdict(self).items()))
        return hashlib.sha256(f"kv-layout-v{LAYOUT_VERSION}|{fields}".encode()).hexdigest()

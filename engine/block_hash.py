"""Keyed, chained block digests: the only trace of prompt content that leaves a process.

`digest = HMAC-SHA256(zone key, parent | token ids | context)`, every field length-prefixed. The zone
key comes from a master key by HKDF-SHA256 (RFC 5869) for each zone path and epoch, so a digest of one
zone says nothing to another, and raising the epoch makes every earlier entry unreachable.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

from engine.zone import Zone

ROOT_DIGEST = b""
MIN_MASTER_KEY_BYTES = 16
_MAX_CACHED_ZONE_KEYS = 4096


@dataclass(frozen=True, slots=True)
class HashContext:
    """Everything besides tokens and zone that changes the bytes of a block."""

    weights_digest: str
    tokenizer_digest: str
    layout_fingerprint: str
    rope: str
    kv_scales: str = "none"


class BlockHasher:
    """Digests of the blocks of one deployment."""

    def __init__(self, master_key: bytes, context: HashContext) -> None:
        """
        Raises:
            ValueError: The master key is shorter than `MIN_MASTER_KEY_BYTES`.
        """
        if len(master_key) < MIN_MASTER_KEY_BYTES:
            raise ValueError(f"the master key needs at least {MIN_MASTER_KEY_BYTES} bytes")
        self._context = b"".join(_prefixed(str(getattr(context, item.name)).encode()) for item in fields(context))
        self._zone_key = lru_cache(_MAX_CACHED_ZONE_KEYS)(
            lambda path, epoch: derive_key(master_key, b"zone|" + path.encode() + struct.pack("<Q", epoch))
        )

    def digest(self, parent: bytes, token_ids: Sequence[int], zone: Zone, epoch: int) -> bytes:
        """32-byte digest of one full block that follows `parent` (`ROOT_DIGEST` for the first)."""
        path = zone.path
        tokens = struct.pack(f"<{len(token_ids)}I", *token_ids)
        message = _prefixed(parent) + _prefixed(tokens) + _prefixed(path.encode()) + self._context
        return hmac.digest(self._zone_key(path, epoch), message, "sha256")


def derive_key(master_key: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 with an empty salt (RFC 5869)."""
    pseudo_random_key = hmac.digest(b"\0" * 32, master_key, "sha256")
    output, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudo_random_key, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


def _prefixed(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data

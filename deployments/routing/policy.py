"""Choice of replica. Pure: no Ray, no clock, no randomness.

Affinity first: the replica that rendezvous hashing names for a zone's prefix, as long as it is not
much busier than the least busy one. A key moves only when its replica goes, so a prefix stays warm
through scaling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def choose_replica(
    load: Mapping[str, int], affinity: bytes, *, max_imbalance: int, avoid: frozenset[str] = frozenset()
) -> str | None:
    """Replica id for a request.

    Args:
        load: Requests in flight by replica id.
        affinity: Keyed digest of zone and shareable prefix; empty: least loaded.
        max_imbalance: How many more requests than the least busy the affine replica may hold.
        avoid: Replicas that refused or failed this request; used only when no other is left.

    Returns:
        None when `load` is empty. Ties fall to the smallest id.
    """
    candidates = {name: count for name, count in load.items() if name not in avoid} or dict(load)
    if not candidates:
        return None
    least = min(candidates.values())
    if affinity:
        name = max(candidates, key=lambda candidate: _rendezvous_weight(candidate, affinity))
        if candidates[name] - least <= max_imbalance:
            return name
    return min(candidates, key=lambda candidate: (candidates[candidate], candidate))


def _rendezvous_weight(name: str, affinity: bytes) -> bytes:
    return hashlib.blake2b(name.encode(), key=affinity[:64], digest_size=16).digest()

"""A deployment for the audit to judge: a prefix cache in memory whose times are drawn, not taken. Its faults are
chosen: what a zone is to it, and whether a tenant's floor holds."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from load_tests.isolation.system import ATTACKER, BYSTANDER, INSIDER, VICTIM, Counts

TENANTS = {VICTIM: "acme", INSIDER: "acme", ATTACKER: "beta", BYSTANDER: "gamma"}
BLOCK_WORDS = 4
POOL_BLOCKS = 4000
FLOOR_BLOCKS = 1000
WORD_S, BASE_S, NOISE_S = 0.0007, 0.02, 0.006


def by_tenant(caller: str) -> str:
    return TENANTS[caller]


def by_nobody(caller: str) -> str:
    """The leak: one zone for all."""
    return ""


class FakeSystem:
    """Blocks of whole words, chained, least recently used first out."""

    def __init__(
        self, zone_of: Callable[[str], str] = by_tenant, *, caches: bool = True, floor: bool = True, seed: int = 1
    ) -> None:
        self.pool_tokens = {"pool": POOL_BLOCKS * BLOCK_WORDS}
        self.asked: list[tuple[str, str]] = []
        self._zone_of = zone_of
        self._caches = caches
        self._floor = {TENANTS[VICTIM]: FLOOR_BLOCKS if floor else 0}
        self._rng = random.Random(seed)
        self._blocks: OrderedDict[tuple[str, str], str] = OrderedDict()  # tenant by zone and prefix
        self._held: Counter[str] = Counter()
        self._num_cached = 0
        self._num_evicted = 0

    def ask(self, caller: str, text: str) -> float:
        self.asked.append((caller, text))
        words = text.split()
        prefixes = [" ".join(words[:end]) for end in range(BLOCK_WORDS, len(words) + 1, BLOCK_WORDS)]
        keys = [(self._zone_of(caller), prefix) for prefix in prefixes]
        num_found = next((index for index, key in enumerate(keys) if key not in self._blocks), len(keys))
        self._num_cached += num_found * BLOCK_WORDS
        for key in keys if self._caches else ():
            if key not in self._blocks:
                self._make_room(TENANTS[caller])
                self._blocks[key] = TENANTS[caller]
                self._held[TENANTS[caller]] += 1
            self._blocks.move_to_end(key)
        uncached = len(words) - num_found * BLOCK_WORDS
        return BASE_S + WORD_S * uncached + self._rng.expovariate(1 / NOISE_S)

    def flood(self, caller: str, prompts: Sequence[Sequence[int]]) -> None:
        for prompt in prompts:
            self.ask(caller, " ".join(map(str, prompt)))

    def counts(self) -> Counts:
        return Counts(self._num_cached, {"pool": self._num_evicted})

    def _make_room(self, requester: str) -> None:
        if len(self._blocks) < POOL_BLOCKS:
            return
        victim = next(
            key
            for key, tenant in self._blocks.items()
            if tenant == requester or self._held[tenant] > self._floor.get(tenant, 0)
        )
        self._held[self._blocks.pop(victim)] -= 1
        self._num_evicted += 1

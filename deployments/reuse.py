"""What a caller is told of prefix reuse: nothing, or where the operator says so, what was found in its own zones.

Text in the public zone is everybody's: whether it lay in a cache would tell one tenant what others do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from deployments.messages import Provenance
from engine.zone import PUBLIC, ZoneSpan

CACHED_ORIGINS = ("decode_cache", "prefill_cache")


@dataclass(frozen=True, slots=True)
class ReuseReport:
    """Of one prompt, whose zones are those of its caller. All counts are tokens of it.

    Attributes:
        num_shared: Tokens at its beginning that lie in the public zone; of them nothing but the number is told.
        is_told: As `trust.report_cached_tokens` says; else every answer is None.
    """

    num_tokens: int
    num_shared: int
    is_told: bool

    @staticmethod
    def of(zone_spans: tuple[ZoneSpan, ...], *, is_told: bool) -> ReuseReport:
        shared = takewhile(lambda span: span.zone == PUBLIC, zone_spans)
        return ReuseReport(zone_spans[-1].end, max((span.end for span in shared), default=0), is_told)

    def cached_tokens(self, provenances: Iterable[Provenance]) -> int | None:
        """Found in a cache for each of the choices that share the prompt."""
        if not self.is_told:
            return None
        counts = [sum(item.origins.get(origin, 0) for origin in CACHED_ORIGINS) for item in provenances]
        return max(0, min(counts, default=0) - self.num_shared)

    def origins(self, provenance: Provenance) -> dict[str, int] | None:
        """By where their KV came from, shared ones as `shared`; they add up to the prompt."""
        if not self.is_told:
            return None
        left = self.num_shared
        told = {"shared": self.num_shared}
        for origin, count in provenance.origins.items():  # in the order of the prompt
            taken = min(left, count)
            told[origin], left = count - taken, left - taken
        return told

    def pushed_bytes(self, provenance: Provenance) -> int | None:
        """From prefill to decode, as far as it was for tokens of the caller's own."""
        own = self.origins(provenance)
        if own is None:
            return None
        num_moved, num_own = (
            sum(origins.get(origin, 0) for origin in ("prefill_cache", "prefill_computed"))
            for origins in (provenance.origins, own)
        )
        return provenance.pushed_bytes * num_own // max(num_moved, 1)

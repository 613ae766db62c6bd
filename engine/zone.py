"""Trust zones as the cache sees them: who may reuse a block. Names and order, no policy.

The order is public < plan < mixed < case < ephemeral within one tenant. Two zones with no common
upper bound below it join in `ephemeral`, which is never cached: the rule is a default of no.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

MAX_ZONE_PATH_CHARS = 256
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)


class ZoneKind(IntEnum):
    """How private a zone is; a larger value is more private."""

    PUBLIC = 0
    PLAN = 1
    MIXED = 2  # text of several plans of one tenant: private to the tenant, cached for nobody
    CASE = 3
    EPHEMERAL = 4


@dataclass(frozen=True, slots=True)
class Zone:
    """One trust zone. Build it with `parse` or the constants; the fields are then consistent."""

    kind: ZoneKind
    tenant: str = ""
    name: str = ""

    @staticmethod
    def parse(path: str) -> Zone:
        """Zone of a path: `public`, `tenant/T/plan/P`, `tenant/T/mixed`, `tenant/T/case/C`, `ephemeral`.

        Raises:
            ValueError: Not such a path; names are 1-64 of [a-z0-9_.-], no `..`, ASCII only.
        """
        if len(path) > MAX_ZONE_PATH_CHARS:
            raise ValueError(f"zone path longer than {MAX_ZONE_PATH_CHARS} characters")
        match path.split("/"):
            case ["public"]:
                return PUBLIC
            case ["ephemeral"]:
                return EPHEMERAL
            case ["tenant", tenant, "plan", name] if is_zone_name(tenant) and is_zone_name(name):
                return Zone(ZoneKind.PLAN, tenant, name)
            case ["tenant", tenant, "case", name] if is_zone_name(tenant) and is_zone_name(name):
                return Zone(ZoneKind.CASE, tenant, name)
            case ["tenant", tenant, "mixed"] if is_zone_name(tenant):
                return Zone(ZoneKind.MIXED, tenant)
        raise ValueError(f"not a zone path: {path!r}")

    @property
    def path(self) -> str:
        match self.kind:
            case ZoneKind.PUBLIC:
                return "public"
            case ZoneKind.PLAN:
                return f"tenant/{self.tenant}/plan/{self.name}"
            case ZoneKind.MIXED:
                return f"tenant/{self.tenant}/mixed"
            case ZoneKind.CASE:
                return f"tenant/{self.tenant}/case/{self.name}"
            case ZoneKind.EPHEMERAL:
                return "ephemeral"

    @property
    def is_cacheable(self) -> bool:
        return self.kind in (ZoneKind.PUBLIC, ZoneKind.PLAN, ZoneKind.CASE)

    @property
    def is_scrubbed(self) -> bool:
        """True where a block is zeroed before anyone else may own it."""
        return self.kind >= ZoneKind.MIXED

    def join(self, other: Zone) -> Zone:
        """Least zone at least as private as both. Associative, commutative, idempotent."""
        low, high = sorted((self, other), key=lambda zone: zone.kind)
        if low == high or low.kind is ZoneKind.PUBLIC or high.kind is ZoneKind.EPHEMERAL:
            return high
        if low.tenant != high.tenant:
            return EPHEMERAL
        if low.kind < high.kind:
            return high
        return Zone(ZoneKind.MIXED, low.tenant) if low.kind is ZoneKind.PLAN else EPHEMERAL

    def __str__(self) -> str:
        return self.path


def is_zone_name(name: str) -> bool:
    """True for what may stand for a tenant, a plan or a case in a path."""
    return _NAME.fullmatch(name) is not None and ".." not in name


PUBLIC = Zone(ZoneKind.PUBLIC)
EPHEMERAL = Zone(ZoneKind.EPHEMERAL)


@dataclass(frozen=True, slots=True)
class ZoneSpan:
    """Tokens up to `end` (exclusive, from the end of the span before) belong to `zone`.

    `epoch` counts the purges of `zone`; digests of an earlier epoch are never found again.
    """

    end: int
    zone: Zone
    epoch: int = 0


def zone_at(spans: tuple[ZoneSpan, ...], last_token: int) -> Zone:
    """Join of all spans that begin at or before token index `last_token`.

    Tokens past the last span (generated ones) belong to the join of all spans; no spans: ephemeral.
    """
    if not spans:
        return EPHEMERAL
    joined = spans[0].zone
    for before, span in pairwise(spans):
        if before.end > last_token:
            break
        joined = joined.join(span.zone)
    return joined


def joined_zone(spans: tuple[ZoneSpan, ...]) -> Zone:
    """Zone of a whole prompt: the join of all spans."""
    return zone_at(spans, spans[-1].end - 1) if spans else EPHEMERAL

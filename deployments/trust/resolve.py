"""Which zone each text of a call gets. The credential gives the zones; a client can only choose among them.

Pure. Texts enter as SHA-256 of their exact UTF-8 bytes, in the order of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from deployments.trust.policy import Decision, Policy, Verb
from deployments.trust.principals import Principal
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneKind, is_zone_name

# Keys of OpenAI's `metadata`; whatever else stands there is the client's own.
CASE_KEY = "zoneserve.case"  # the name of a case that the principal owns, for all text that is not shared
SEGMENTS_KEY = "zoneserve.segments"  # ids of shared segments, by comma, one for each of the first texts
MAX_SEGMENTS = 64

_SHARED = (ZoneKind.PUBLIC, ZoneKind.PLAN)


class ContradictionReason(StrEnum):
    """Why a call is refused: it asks for what its credential does not give."""

    MALFORMED_CASE = "malformed_case"
    NOT_ITS_CASE = "not_its_case"
    MALFORMED_SEGMENTS = "malformed_segments"  # too many, more than there are texts, or no ids
    CLAIMED_ZONE = "claimed_zone"  # a stripped parameter or header names a zone that can never be the principal's
    DENIED_BY_POLICY = "denied_by_policy"  # the case that it names


class ZoneContradiction(Exception):
    """A call that is refused (403). It never repeats what the client sent."""

    def __init__(self, reason: ContradictionReason, decisions: tuple[Decision, ...] = ()) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.decisions = decisions


class WithheldReason(StrEnum):
    """Why a text that was to be shared is private."""

    NOT_LISTED = "not_listed"  # no manifest in force lists this text under this id
    NOT_ALLOWED = "not_allowed"  # the policy, or nothing is shared and no plan follows to hold it


@dataclass(frozen=True, slots=True)
class Withheld:
    """One `segment.deny`: the text `index` is private although the call named it as a shared segment."""

    index: int
    segment_id: str
    reason: WithheldReason


@dataclass(frozen=True, slots=True)
class Grant:
    """The zone of each text, not yet joined. `decisions` are all that the policy was asked, each once."""

    zones: tuple[Zone, ...]
    private: Zone  # of whatever is not shared: a case or ephemeral
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a call gets."""

    grant: Grant
    withheld: tuple[Withheld, ...] = ()


def resolve(
    principal: Principal,
    policy: Policy,
    *,
    digests: Sequence[str],
    metadata: Mapping[str, str],
    claimed: Sequence[object],
    listed: Callable[[str, str], Zone | None],
) -> Resolution:
    """Zones of a client's texts: ephemeral, or a case that the principal owns, but for segments that are listed.

    Args:
        digests: Of each text: the messages of a chat, or the one prompt.
        metadata: The body's, as it came.
        claimed: Values of the stripped parameters and headers that name a zone. They decide nothing, but one that
            contradicts the credential refuses the call.
        listed: The public or plan zone in which a manifest in force lists this segment id with this digest for the
            principal's tenant.

    Raises:
        ZoneContradiction: With the reason.
    """
    if not all(_may_name(principal, value) for value in claimed):
        raise ZoneContradiction(ContradictionReason.CLAIMED_ZONE)
    case = _case(principal, metadata.get(CASE_KEY))
    ids = _segment_ids(metadata.get(SEGMENTS_KEY), len(digests))
    private = case or principal.zone
    found = [listed(segment_id, digest) for segment_id, digest in zip(ids, digests, strict=False)]
    grant = permit(
        principal, policy, [zone or private for zone in found] + [private] * (len(digests) - len(ids)), private
    )
    if case is not None and grant.private != case:
        raise ZoneContradiction(ContradictionReason.DENIED_BY_POLICY, grant.decisions)
    withheld = (
        Withheld(index, segment_id, WithheldReason.NOT_ALLOWED if found[index] else WithheldReason.NOT_LISTED)
        for index, segment_id in enumerate(ids)
        if grant.zones[index] == grant.private
    )
    return Resolution(grant, tuple(withheld))


def permit(principal: Principal, policy: Policy, asked: Sequence[Zone], private: Zone) -> Grant:
    """Of the zones that texts are meant for, those that the policy allows; the other texts go to `private`.

    A public or plan zone must allow `read`. `private` must be a case of the principal's tenant that allows `read` and
    `write`, else it is ephemeral. Under a strict policy public text takes the zone of the plan that follows it, and so
    is the tenant's own; with no plan behind it, it is private.
    """
    decisions: dict[tuple[Verb, Zone], Decision] = {}

    def may(verb: Verb, zone: Zone) -> bool:
        if (verb, zone) not in decisions:
            decisions[verb, zone] = policy.decide(principal, verb, zone)
        return decisions[verb, zone].allowed

    is_own_case = private.kind is ZoneKind.CASE and private.tenant == principal.tenant
    if not is_own_case or not may(Verb.READ, private) or not may(Verb.WRITE, private):
        private = EPHEMERAL
    meant = per_tenant(asked, private) if policy.strict else tuple(asked)
    zones = tuple(zone if zone.kind in _SHARED and may(Verb.READ, zone) else private for zone in meant)
    return Grant(zones, private, tuple(decisions.values()))


def per_tenant(zones: Sequence[Zone], private: Zone) -> tuple[Zone, ...]:
    """The zones with each public one replaced by the next that is not; by `private` where none follows."""
    replaced: list[Zone] = []
    following = private
    for zone in reversed(zones):
        following = following if zone == PUBLIC else zone
        replaced.append(following)
    return tuple(reversed(replaced))


def _may_name(principal: Principal, value: object) -> bool:
    """True for a zone that this principal's texts could lie in: naming it is idle, not a contradiction."""
    if not isinstance(value, str):
        return False
    try:
        zone = Zone.parse(value)
    except ValueError:
        return False
    if zone.kind is ZoneKind.CASE:
        return principal.owns(zone)
    return zone.tenant in ("", principal.tenant)


def _case(principal: Principal, name: str | None) -> Zone | None:
    if name is None:
        return None
    if not is_zone_name(name):
        raise ZoneContradiction(ContradictionReason.MALFORMED_CASE)
    zone = Zone(ZoneKind.CASE, principal.tenant, name)
    if not principal.owns(zone):
        raise ZoneContradiction(ContradictionReason.NOT_ITS_CASE)
    return zone


def _segment_ids(listing: str | None, num_texts: int) -> list[str]:
    if listing is None:
        return []
    ids = listing.split(",", MAX_SEGMENTS)
    if len(ids) > min(MAX_SEGMENTS, num_texts) or not all(map(is_zone_name, ids)):
        raise ZoneContradiction(ContradictionReason.MALFORMED_SEGMENTS)
    return ids

"""From what a text asks to be to what it may be: only listed text is shared.

Pure but for `publish_shipped`, which signs what this package shares by itself: the system text and the shipped plans,
listed as any operator's text is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deployments.claims.model import text_sha256
from deployments.claims.plan import load_plan
from deployments.claims.prompt import LabelledPrompt, Segment, shared_segments
from deployments.trust.manifest import (
    MAX_KEPT_TEXT_BYTES,
    Manifest,
    ManifestError,
    Reason,
    SharedSegment,
    keep_texts,
    next_revision,
    publish,
    rfc3339,
)
from deployments.trust.manifest_keys import TrustedKeys, is_shareable_kind, key_id_of
from deployments.trust.manifest_set import ManifestSet
from deployments.trust.phi import DETECTORS, Detector, Finding, scan
from engine.zone import EPHEMERAL, Zone, ZoneKind

MAX_SEGMENT_BYTES = MAX_KEPT_TEXT_BYTES  # what is published is kept
SHIPPED_VALIDITY_S = 365 * 86_400
SHIPPED_RENEWAL_S = 30 * 86_400  # with less than this left, a start publishes anew


class DenialReason(StrEnum):
    """Why a segment is more private than it asked to be."""

    NOT_LISTED = "not_listed"  # in no manifest in force for its zone
    FOREIGN_TENANT = "foreign_tenant"  # it asked for a zone of a tenant that is not the principal's
    NOT_A_SEGMENT_ZONE = "not_a_segment_zone"  # no text may ask for it: `mixed` comes of a join alone


@dataclass(frozen=True, slots=True)
class Denial:
    """One `segment.deny`. It holds names and digests, no text."""

    segment_id: str
    content_digest: str
    asked: Zone
    given: Zone
    reason: DenialReason


def label_segments(
    prompt: LabelledPrompt, *, tenant: str, is_shareable: Callable[[Zone, str], bool], demote_to: Zone = EPHEMERAL
) -> tuple[LabelledPrompt, tuple[Denial, ...]]:
    """The prompt with each segment in the zone it may have, and what was denied.

    A segment keeps a public or plan zone only if it is listed for that zone. A denied one takes `demote_to`, or
    ephemeral where its zone contradicts the principal; those after it take the join with it and are no denials
    themselves. Text, roles and order stay.

    Args:
        tenant: The principal's.
        is_shareable: Whether a manifest in force lists the content digest for the zone, as `ManifestSet.is_shareable`.
        demote_to: Where unlisted text goes: ephemeral, or the case of the tenant that the whole prompt belongs to.

    Raises:
        ValueError: `demote_to` is neither.
    """
    if demote_to != EPHEMERAL and (demote_to.kind is not ZoneKind.CASE or demote_to.tenant != tenant):
        raise ValueError("unlisted text goes to ephemeral or to a case of the same tenant")
    labelled: list[Segment] = []
    denials: list[Denial] = []
    joined: Zone | None = None
    for segment in prompt.segments:
        asked = Zone.parse(segment.zone)
        reason = _denial(asked, segment, tenant, is_shareable)
        allowed = asked
        if reason is not None:
            allowed = demote_to if reason is DenialReason.NOT_LISTED else EPHEMERAL
            denials.append(Denial(segment.id, segment.content_digest, asked, allowed, reason))
        joined = allowed if joined is None else joined.join(allowed)
        labelled.append(replace(segment, zone=joined.path))
    return LabelledPrompt(tuple(labelled)), tuple(denials)


def _denial(
    asked: Zone, segment: Segment, tenant: str, is_shareable: Callable[[Zone, str], bool]
) -> DenialReason | None:
    if asked.tenant not in ("", tenant):
        return DenialReason.FOREIGN_TENANT
    if asked.kind is ZoneKind.MIXED:
        return DenialReason.NOT_A_SEGMENT_ZONE
    if is_shareable_kind(asked) and not is_shareable(asked, segment.content_digest):
        return DenialReason.NOT_LISTED
    return None


@dataclass(frozen=True, slots=True)
class Publication:
    """A text that is to be listed: its exact text, its name in the manifest, and a title for people."""

    id: str
    text: str
    title: str

    def entry(self) -> SharedSegment:
        """Its line of a manifest.

        Raises:
            ValueError: The id or the title is none.
        """
        return SharedSegment(id=self.id, sha256=text_sha256(self.text), title=self.title)

    def findings(self, detectors: Sequence[Detector] = DETECTORS) -> tuple[Finding, ...]:
        """What the detectors object to in the text, by place; names and titles go into every listing and are held to
        the same, at offset 0."""
        in_names = {finding.detector for name in (self.id, self.title) for finding in scan(name, detectors)}
        return (*(Finding(0, 0, f"{detector} (title)") for detector in sorted(in_names)), *scan(self.text, detectors))


class PublicationVetoed(Exception):
    """A shipped text reads as if it named a person. Nothing was signed; the message names text and detector."""


def shipped_publications(tenant: str, plans: Sequence[str]) -> dict[Zone, tuple[Publication, ...]]:
    """What our own prompts share: the system text with everybody, each shipped plan's texts under the plan's zone.

    Raises:
        ValueError: There is no such plan, or the tenant is no zone name.
    """
    shared: dict[Zone, dict[str, Publication]] = {}
    for plan in plans:
        for segment in shared_segments(tenant, load_plan(plan)):
            texts = shared.setdefault(Zone.parse(segment.zone), {})
            texts[segment.id] = Publication(segment.id, segment.text, f"{segment.source} {segment.revision}")
    return {zone: tuple(texts.values()) for zone, texts in shared.items()}


def publish_shipped(
    folder: Path,
    key: Ed25519PrivateKey,
    trusted: TrustedKeys,
    *,
    tenant: str,
    plans: Sequence[str],
    approver: str,
    now: float,
) -> tuple[Path, ...]:
    """Sign a manifest for each zone of the shipped texts whose last one is missing or stale; nothing else is shared.

    Stale: it lists other texts, or has less than `SHIPPED_RENEWAL_S` left. So it writes at the first start, after a
    change of the shipped texts, and once a year. Texts are kept beside their manifests, and kept again where they have
    gone. A zone whose last manifest has another approver is theirs: it is left alone, whatever it lists.

    Args:
        now: Unix time in seconds; the manifests take effect then and expire `SHIPPED_VALIDITY_S` later.

    Returns:
        The files written.

    Raises:
        PublicationVetoed: A detector objects. ValueError: No such plan or tenant.
        ManifestError: The key may not sign for a zone, or the folder cannot be read. OSError: It cannot be written.
    """
    shipped = shipped_publications(tenant, plans)
    _require_may_publish(shipped, key_id_of(key.public_key()), trusted)
    present = ManifestSet(folder, trusted, lambda: now)
    present.reload()
    written = []
    for zone, texts in shipped.items():
        entries = tuple(text.entry() for text in texts)
        revisions = [signed for signed in present.files.values() if signed.zone == zone]
        last = max(revisions, key=lambda signed: signed.manifest.revision, default=None)
        if last is not None:
            if last.manifest.approver != approver:
                continue
            if last.manifest.segments == entries and last.expires - now >= SHIPPED_RENEWAL_S:
                keep_texts(folder, (text.text for text in texts))
                continue
        manifest = Manifest(
            zone=zone.path,
            revision=next_revision(folder, zone),
            approver=approver,
            effective=rfc3339(now),
            expires=rfc3339(now + SHIPPED_VALIDITY_S),
            segments=entries,
        )
        written.append(publish(folder, manifest, key, texts=[text.text for text in texts]))
    return tuple(written)


def _require_may_publish(shipped: dict[Zone, tuple[Publication, ...]], key_id: str, trusted: TrustedKeys) -> None:
    for zone, texts in shipped.items():
        if not trusted.may_sign_for(key_id, zone):
            raise ManifestError(Reason.FOREIGN_ZONE, zone.path)
        for text in texts:
            for finding in text.findings():
                raise PublicationVetoed(f"{text.title}: {finding.detector}")

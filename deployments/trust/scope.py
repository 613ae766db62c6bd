"""What one call may reach: its principal, and the policy and manifests as they stand for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

from deployments.claims.model import text_sha256
from deployments.claims.prompt import LabelledPrompt
from deployments.errors import Forbidden
from deployments.metrics import IngressMetrics
from deployments.trust.audit.record import Value
from deployments.trust.in_force import InForce
from deployments.trust.manifest_keys import is_shareable_kind
from deployments.trust.policy import Decision, Verb
from deployments.trust.principals import Principal
from deployments.trust.resolve import Grant, Resolution, ZoneContradiction, permit, resolve
from deployments.trust.shareable import label_segments
from deployments.trust.trail import AuditTrail
from engine.zone import Zone


class CallScope:
    """Gives zones to a call's texts. Every refusal is counted and audited; no text is kept."""

    def __init__(
        self, principal: Principal, request_id: str, in_force: InForce, trail: AuditTrail, metrics: IngressMetrics
    ) -> None:
        self.principal = principal
        self.request_id = request_id
        self.policy_digest = in_force.policy.digest
        self.manifest_digest = in_force.manifest_digest
        self._in_force = in_force
        self._trail = trail
        self._metrics = metrics

    def resolve(self, texts: Sequence[str], metadata: Mapping[str, str], claimed: Sequence[object]) -> Grant:
        """Zones of a client's texts; `metadata` and `claimed` as in `resolve.resolve`.

        Raises:
            Forbidden: The call contradicts its credential. AuditUnavailable: It cannot be recorded.
        """
        resolution = self._resolve(texts, metadata, claimed)
        for withheld in resolution.withheld:
            self._withhold(withheld.reason, resolution.grant.private, withheld.segment_id)
        return self._settle(resolution.grant)

    def require(self, verb: Verb, zone: Zone) -> None:
        """For an operator's call.

        Raises:
            Forbidden: The policy does not allow the principal this there; counted and audited.
        """
        decision = self._in_force.policy.decide(self.principal, verb, zone)
        if not decision.allowed:
            self._deny(decision.reason, decision)
            raise Forbidden(f"the policy does not allow this principal to {verb} there")

    def refuse(self, reason: str) -> None:
        """Count and audit a call that names what cannot be a zone."""
        self._deny(reason)

    def require_no_contradiction(self, claimed: Sequence[object]) -> None:
        """For a call whose texts are ours. Raises Forbidden as `resolve`."""
        self._resolve((), {}, claimed)

    def label(self, prompt: LabelledPrompt) -> Grant:
        """Zones of our own prompt's segments: those that it asks for, where manifests list and the policy allows them.

        Raises:
            AuditUnavailable: It cannot be recorded.
        """
        case = Zone.parse(prompt.zone)
        labelled, denials = label_segments(
            prompt, tenant=self.principal.tenant, is_shareable=self._in_force.is_shareable, demote_to=case
        )
        for denial in denials:
            self._withhold(denial.reason, denial.given, denial.segment_id)
        asked = [Zone.parse(segment.zone) for segment in labelled.segments]
        grant = permit(self.principal, self._in_force.policy, asked, private=case)
        # Text in no zone at all stays there: `permit` would give it the case's.
        zones = tuple(zone.join(granted) for zone, granted in zip(asked, grant.zones, strict=True))
        return self._settle(Grant(zones, grant.private, grant.decisions))

    async def completed(self, fields: Mapping[str, Value | None]) -> None:
        """Put a `review.complete` on the medium. Raises AuditUnavailable."""
        await self._trail.record_durable(
            "review.complete",
            request_id=self.request_id,
            principal=self.principal.name,
            tenant=self.principal.tenant,
            policy_digest=self.policy_digest,
            manifest_digest=self.manifest_digest,
            **fields,
        )

    def _resolve(self, texts: Sequence[str], metadata: Mapping[str, str], claimed: Sequence[object]) -> Resolution:
        try:
            return resolve(
                self.principal,
                self._in_force.policy,
                digests=[text_sha256(text) for text in texts],
                metadata=metadata,
                claimed=claimed,
                listed=lambda segment_id, digest: self._in_force.listed(self.principal.tenant, segment_id, digest),
            )
        except ZoneContradiction as contradiction:
            self._contradicted(contradiction)
            raise Forbidden(f"the credential does not give what the call asks for: {contradiction.reason}") from None

    def _settle(self, grant: Grant) -> Grant:
        for decision in grant.decisions:
            if not decision.allowed:
                self._deny(decision.reason, decision)
        zone = reduce(Zone.join, grant.zones, grant.private).path
        self._trail.record(
            "zone.resolve",
            request_id=self.request_id,
            principal=self.principal.name,
            tenant=self.principal.tenant,
            zone=zone,
            policy_digest=self.policy_digest,
        )
        num_shared = sum(map(is_shareable_kind, grant.zones))
        if num_shared:
            self._trail.record(
                "segment.label",
                request_id=self.request_id,
                zone=zone,
                num_segments=len(grant.zones),
                num_shared=num_shared,
                manifest_digest=self.manifest_digest,
                policy_digest=self.policy_digest,
            )
        return grant

    def _contradicted(self, contradiction: ZoneContradiction) -> None:
        for decision in contradiction.decisions:
            if not decision.allowed:
                self._deny(decision.reason, decision)
        self._deny(contradiction.reason)

    def _deny(self, reason: str, decision: Decision | None = None) -> None:
        self._metrics.zone_denials.labels(reason).inc()
        asked: dict[str, Value | None] = {}
        if decision is not None:
            rule = None if decision.rule is None else str(decision.rule)
            asked = {"zone": decision.zone.path, "verb": decision.verb, "rule": rule}
        self._trail.note(
            "zone.deny",
            reason=reason,
            request_id=self.request_id,
            principal=self.principal.name,
            tenant=self.principal.tenant,
            policy_digest=self.policy_digest,
            **asked,
        )

    def _withhold(self, reason: str, zone: Zone, segment_id: str) -> None:
        self._metrics.segment_denials.labels(reason).inc()
        self._trail.note(
            "segment.deny",
            reason=reason,
            zone=zone.path,
            request_id=self.request_id,
            principal=self.principal.name,
            segment_id=segment_id,
            manifest_digest=self.manifest_digest,
        )

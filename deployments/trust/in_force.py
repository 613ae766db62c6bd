"""Policy and manifests in force in this process, looked at again when asked, with each change counted and audited."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deployments.config import TrustSection
from deployments.metrics import IngressMetrics
from deployments.trust.key_files import KeyFileError
from deployments.trust.manifest import Reason, SignedManifest
from deployments.trust.manifest_floors import FLOORS_NAME, FloorError, keep_floors, read_floors
from deployments.trust.manifest_keys import TrustedKeys
from deployments.trust.manifest_set import ManifestSet, Refusal, digest_of, is_listed, zone_that_lists
from deployments.trust.policy import DEFAULT_POLICY, Policy, PolicyStore, Reload
from deployments.trust.trail import AuditTrail
from engine.zone import Zone

logger = logging.getLogger("ray.serve.zoneserve.trust")

WITHDRAWN = "withdrawn"  # a manifest that was in force and is no longer there
FLOORS_NOT_KEPT = "floors_not_kept"  # after a restart an older revision could come into force


@dataclass(frozen=True, slots=True)
class InForce:
    """What one call is decided by."""

    policy: Policy
    manifests: Mapping[Zone, SignedManifest]

    @property
    def manifest_digest(self) -> str:
        return digest_of(self.manifests)

    def is_shareable(self, zone: Zone, content_digest: str) -> bool:
        return is_listed(self.manifests, zone, content_digest)

    def listed(self, tenant: str, segment_id: str, content_digest: str) -> Zone | None:
        """The zone that lists the text under this id for the tenant."""
        return zone_that_lists(self.manifests, content_digest, tenant, segment_id)


class TrustState:
    """The policy file and the folder of manifests as last read. `reload` may run in another thread than `in_force`."""

    def __init__(
        self,
        config: TrustSection,
        trail: AuditTrail,
        metrics: IngressMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            clock: Unix time in seconds.

        Raises:
            PolicyError: There is no good policy to begin with. KeyFileError: No good file of trusted keys.
            FloorError: Which revisions were in force before cannot be read.
        """
        self._trail, self._metrics, self._clock = trail, metrics, clock
        self._policies = PolicyStore(config.policy_file or DEFAULT_POLICY)
        self._keys_file = config.manifest_keys_file
        self._manifests: ManifestSet | None = None
        self._floors_file = None if config.state_dir is None else config.state_dir / FLOORS_NAME
        self._floors_fault: str | None = None
        if config.manifests_dir is not None and self._keys_file is not None:
            trusted = TrustedKeys.from_file(self._keys_file)
            floors = {} if self._floors_file is None else read_floors(self._floors_file)
            self._manifests = ManifestSet(config.manifests_dir, trusted, clock, floors=floors)
        self._told: Mapping[Zone, SignedManifest] = {}
        self._told_refusals: frozenset[Refusal] = frozenset()
        self._tell_policy(Reload.LOADED)
        self._reload_manifests()

    def in_force(self) -> InForce:
        """As it stands now: a manifest that has expired is not in it."""
        return InForce(self._policies.policy, {} if self._manifests is None else self._manifests.in_force())

    def reload(self) -> None:
        """Look at the files again. What is broken is told once and leaves what was good in force; raises nothing."""
        self._tell_policy(self._policies.reload())
        self._reload_manifests()

    def _tell_policy(self, outcome: Reload) -> None:
        if outcome is Reload.UNCHANGED:
            return
        policy, refusal = self._policies.policy, self._policies.refusal
        self._metrics.policy_reloads.labels(outcome).inc()
        if outcome is Reload.LOADED or refusal is None:
            self._trail.note("policy.load", policy_digest=policy.digest, num_rules=len(policy.rules))
        else:
            logger.error("the policy file is refused, the one before stays: %s", refusal)
            self._trail.note("policy.refuse", reason=refusal.fault, policy_digest=policy.digest)

    def _reload_manifests(self) -> None:
        if self._manifests is None or self._keys_file is None:
            return
        refusals: list[Refusal] = []
        trusted = None
        try:
            trusted = TrustedKeys.from_file(self._keys_file)
        except KeyFileError as error:
            logger.error("the trusted keys stay as they were: %s", error)
            refusals.append(Refusal(self._keys_file.name, Reason.UNREADABLE))
        refusals.extend(self._manifests.reload(trusted))
        for refusal in sorted(set(refusals) - self._told_refusals, key=lambda refusal: refusal.file):
            logger.error("manifest %s is refused: %s %s", refusal.file, refusal.reason, refusal.detail)
            self._refused(refusal.reason)
        self._told_refusals = frozenset(refusals)
        self._keep_floors(self._manifests)
        self._tell_changes(self._manifests.in_force())

    def _keep_floors(self, manifests: ManifestSet) -> None:
        """Tried again at each look; told once."""
        if self._floors_file is None:
            return
        fault = None
        try:
            keep_floors(self._floors_file, manifests.floors, manifests.trusted.may_sign_for)
        except FloorError as error:
            fault = str(error)
            if fault != self._floors_fault:
                logger.error("the revisions in force are not kept: %s", error)
                self._refused(FLOORS_NOT_KEPT)
        self._floors_fault = fault

    def _tell_changes(self, found: Mapping[Zone, SignedManifest]) -> None:
        for zone, signed in found.items():
            if zone not in self._told or self._told[zone].sha256 != signed.sha256:
                self._trail.note("manifest.load", **_of(signed), num_segments=len(signed.manifest.segments))
        for zone, signed in self._told.items():
            if zone not in found:
                self._refused(signed.state(self._clock()) or WITHDRAWN, signed)
        self._told = found
        self._metrics.manifests_in_force.set(len(found))

    def _refused(self, reason: str, signed: SignedManifest | None = None) -> None:
        self._metrics.manifest_refusals.labels(reason).inc()
        self._trail.note("manifest.refuse", reason=reason, **(_of(signed) if signed is not None else {}))


def _of(signed: SignedManifest) -> dict[str, str | int]:
    return {
        "zone": signed.zone.path,
        "manifest_digest": signed.sha256,
        "revision": signed.manifest.revision,
    }

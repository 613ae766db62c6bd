"""What operators do to zones over HTTP: purge one, and get the signed receipt."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import ValidationError

from deployments.calls import over_ray
from deployments.errors import BadRequest
from deployments.metrics import IngressMetrics
from deployments.trust.epochs import EpochStore
from deployments.trust.guard import TrustGuard
from deployments.trust.policy import Verb
from deployments.trust.principals import Principal
from deployments.trust.purge import PurgePool, PurgeRequest, PurgeService, purgeable_zone
from deployments.trust.receipts import ReceiptSigner, SignedReceipt

MALFORMED_ZONE = "malformed_zone"


class ZoneAdmin:
    """Purges that the policy allows, each recorded before its receipt is given out."""

    def __init__(
        self,
        guard: TrustGuard,
        *,
        epochs: EpochStore,
        signer: ReceiptSigner,
        pools: Mapping[str, PurgePool],
        metrics: IngressMetrics,
    ) -> None:
        self._guard = guard
        self._metrics = metrics
        self._purges = PurgeService(epochs, signer, pools, self._recorded)

    async def purge(self, principal: Principal, document: dict[str, Any]) -> SignedReceipt:
        """Purge the zone that the body of `POST /v1/zones/purge` names.

        Returns:
            The receipt, which says whether every replica has purged.

        Raises:
            BadRequest: Not a zone in which anything can be cached; counted and audited.
            Forbidden: The policy does not let the principal purge it; counted and audited.
            AuditUnavailable, OverCapacity, PurgeUnavailable: As `PurgeService.purge`.
        """
        scope = self._guard.scope(principal, f"purge-{uuid.uuid4().hex}")
        try:
            zone = purgeable_zone(PurgeRequest.model_validate(document).zone)
        except ValidationError:
            scope.refuse(MALFORMED_ZONE)
            raise BadRequest(
                "the body is a JSON object with one key, zone: public, tenant/T/plan/P or tenant/T/case/C", param="zone"
            ) from None
        scope.require(Verb.PURGE, zone)
        return await self._purges.purge(zone, principal.name)

    async def _recorded(self, signed: SignedReceipt) -> None:
        self._metrics.purges.labels("complete" if signed.receipt.complete else "incomplete").inc()
        await self._guard.record("zone.purge", **signed.audit_fields())


def purge_pool(handle: Any) -> PurgePool:
    """The replicas of a deployment; one that fails is an error among the answers."""

    def tell(zone_path: str, epoch: int) -> Awaitable[Any]:
        question: Callable[..., Any] = over_ray(handle).broadcast
        return question("purge", zone_path, epoch).results_async(return_exceptions=True)  # type: ignore[no-any-return]

    return tell

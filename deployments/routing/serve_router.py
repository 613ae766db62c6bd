"""Serve's request router with our choice of replica.

Overrides `_choose_replica_for_request`: Serve 2.60's base class hangs when one parent request makes
two concurrent calls to a deployment. Every wait of a caller is bounded by the caller's own timeout.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.messages import RouteHint
from deployments.routing.policy import choose_replica

REFUSAL_PAUSE_S = 0.02


@dataclass(slots=True)
class _Choice:
    """Where a request that is not over yet went, and which replicas had no room for it since the last pause."""

    replica: str | None = None
    refused_by: set[str] = field(default_factory=set)


class ZoneAffinityRouter(RequestRouter):  # type: ignore[misc]
    """Sends a prefix's requests to the same replica while load allows; accounts for what is in flight.

    A request is in flight as long as its `PendingRequest` lives, which is until the caller leaves the
    `choose_replica` context. Serve offers no better sign: the calls that one parent makes at the same time
    share their request id, and the end of a choice that was never dispatched is not reported.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._max_imbalance = int(kwargs.get("max_imbalance", 4))
        self._choices: dict[int, _Choice] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        choice = self._choice_of(pending_request)
        if is_retry and choice.replica is not None:
            await self._note_refusal(choice, choice.replica)
        while not self._replicas:
            self._replicas_updated_event.clear()
            await self._replicas_updated_event.wait()
        by_name = {replica_id.unique_id: replica_id for replica_id in self._replicas}
        inflight = self.num_inflight()
        choice.replica = choose_replica(
            {name: inflight[name] for name in by_name},
            _affinity(pending_request),
            max_imbalance=self._max_imbalance,
            avoid=frozenset(choice.refused_by),
        )
        assert choice.replica is not None, "at least one replica is known"
        return self._replicas[by_name[choice.replica]]

    def num_inflight(self) -> Counter[str]:
        """Requests in flight by replica."""
        return Counter(choice.replica for choice in list(self._choices.values()) if choice.replica is not None)

    def _choice_of(self, pending_request: PendingRequest) -> _Choice:
        key = id(pending_request)
        if key not in self._choices:
            self._choices[key] = _Choice()
            weakref.finalize(pending_request, self._choices.pop, key, None).atexit = False
        return self._choices[key]

    async def _note_refusal(self, choice: _Choice, replica: str) -> None:
        """When every replica has refused, pause and let all but the last be asked again."""
        choice.replica = None
        choice.refused_by.add(replica)
        if choice.refused_by.issuperset(replica_id.unique_id for replica_id in self._replicas):
            choice.refused_by = {replica}
            await asyncio.sleep(REFUSAL_PAUSE_S)


def _affinity(pending_request: PendingRequest) -> bytes:
    hint = pending_request.args[0] if pending_request.args else None
    return hint.affinity if isinstance(hint, RouteHint) else b""

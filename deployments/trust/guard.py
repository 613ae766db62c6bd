"""What the ingress asks before it serves: who calls, what the call may reach, and whether it can be recorded."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from deployments.config import ConfigError, JwtSection, TrustSection
from deployments.errors import SignersUnavailable, Unauthorized
from deployments.metrics import AuditCollector, IngressMetrics
from deployments.trust.audit.record import Value
from deployments.trust.authentication import Authenticator
from deployments.trust.in_force import TrustState
from deployments.trust.principals import Principal, Principals
from deployments.trust.scope import CallScope
from deployments.trust.tokens import (
    AuthReason,
    ClaimNames,
    JwksFile,
    JwksUrl,
    KeyCache,
    TokenRules,
    TokenVerifier,
)
from deployments.trust.trail import AuditTrail

logger = logging.getLogger("ray.serve.zoneserve.trust")

JOIN_TIMEOUT_S = 10.0


class TrustGuard:
    """Of one ingress replica. A thread of its own looks at policy, manifests and signing keys again and again."""

    def __init__(
        self,
        config: TrustSection,
        *,
        stream: str,
        master_key: bytes,
        metrics: IngressMetrics,
        also_look: Sequence[Callable[[], object]] = (),
    ) -> None:
        """
        Args:
            stream: Names this replica's audit log.
            also_look: What else is to be looked at again and again, in the same thread.

        Raises:
            AuditError: The log cannot be opened. PolicyError, KeyFileError, FloorError: A file cannot be used.
            ConfigError: `jwt.jwks_url` is none that keys may come from.
        """
        self._metrics = metrics
        self._jwks = None if config.jwt is None else _key_cache(config.jwt, metrics)
        tokens = None
        if config.jwt is not None and self._jwks is not None:
            tokens = TokenVerifier(_rules(config.jwt), self._jwks, time.time)
        self._refresh_signers()
        self._authenticator = Authenticator(Principals.from_file(config.keys_file), tokens)
        self._trail = AuditTrail.open(config.audit, stream, master_key)
        try:
            self._state = TrustState(config, self._trail, metrics)
        except BaseException:
            self._trail.close()
            raise
        self._reload_s = config.policy_reload_s
        self._looks = (self._refresh_signers, self._state.reload, *also_look)
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="trust-reload", daemon=True)
        self._thread.start()

    async def authenticate(self, authorization: str | None) -> Principal:
        """The principal of an `Authorization` header.

        Raises:
            Unauthorized: It names none. Why is counted and audited, and not told.
            SignersUnavailable: It is a token that cannot be checked now. Counted and audited.
        """
        if self._authenticator.is_token(authorization):
            found = await asyncio.to_thread(self._authenticator.authenticate, authorization)
        else:
            found = self._authenticator.authenticate(authorization)
        if isinstance(found, Principal):
            return found
        self._metrics.auth_denials.labels(found).inc()
        self._trail.note_auth_denial(found)
        if found is AuthReason.KEYS_UNAVAILABLE and self._jwks is not None:
            raise SignersUnavailable("tokens cannot be checked now", retry_after_s=self._jwks.next_read_s())
        raise Unauthorized("a valid bearer key or token is required")

    def scope(self, principal: Principal, request_id: str) -> CallScope:
        """What a call of the principal may reach, by what is in force now.

        Raises:
            AuditUnavailable: The audit log cannot be written, and private work is refused then.
        """
        self._trail.require_writable()
        return CallScope(principal, request_id, self._state.in_force(), self._trail, self._metrics)

    async def record(self, kind: str, /, **fields: Value | None) -> None:
        """Put an event on the medium. Raises AuditUnavailable."""
        await self._trail.record_durable(kind, **fields)

    def audit_metrics(self) -> AuditCollector | None:
        """The audit log's counts now; None where there is no log."""
        counts = self._trail.counts()
        return None if counts is None else AuditCollector(counts, is_writable=self._trail.failure is None)

    def close(self) -> None:
        """End the thread and the audit log. Idempotent."""
        self._is_closing.set()
        self._thread.join(JOIN_TIMEOUT_S)
        self._trail.close()

    def _watch(self) -> None:
        while not self._is_closing.wait(self._reload_s):
            for look in self._looks:
                try:
                    look()
                except Exception:
                    logger.exception("policy, manifests, keys or epochs stay as they were")

    def _refresh_signers(self) -> None:
        """Before their keys are too old, so that a caller seldom waits for them."""
        if self._jwks is not None:
            self._jwks.refresh_if_due()


def _key_cache(section: JwtSection, metrics: IngressMetrics) -> KeyCache:
    try:
        read = (
            JwksFile(section.jwks_file)
            if section.jwks_file is not None
            else JwksUrl(section.jwks_url or "", time.monotonic)
        )
    except ValueError as error:
        raise ConfigError(f"trust.jwt.jwks_url: {error}") from error
    return KeyCache(read, time.monotonic, on_fetch=lambda outcome: metrics.jwks_fetches.labels(outcome).inc())


def _rules(section: JwtSection) -> TokenRules:
    claims = ClaimNames(section.subject_claim, section.tenant_claim, section.roles_claim, section.cases_claim)
    return TokenRules(section.issuer, section.audience, claims, section.leeway_s)

"""From an `Authorization` header to a principal: a static key or a token, told apart by shape, or a reason why not."""

from __future__ import annotations

from deployments.trust.principals import KEY_PREFIX, MAX_BEARER_CHARS, Principal, Principals, bearer_credential
from deployments.trust.tokens import AuthReason, TokenRefused, TokenVerifier


class Authenticator:
    """Takes static keys, and tokens where there is a verifier for them."""

    def __init__(self, keys: Principals, tokens: TokenVerifier | None = None) -> None:
        self._keys = keys
        self._tokens = tokens

    def is_token(self, authorization: str | None) -> bool:
        """True where `authenticate` takes the header for a token and so may block on the network."""
        return _is_token(bearer_credential(authorization) or "") and self._tokens is not None

    def authenticate(self, authorization: str | None) -> Principal | AuthReason:
        """The principal, or why there is none. Raises nothing, whatever the header holds."""
        credential = bearer_credential(authorization)
        if credential is None:
            return AuthReason.NO_CREDENTIAL
        if self._tokens is not None and _is_token(credential):
            try:
                return self._tokens.principal(credential)
            except TokenRefused as refusal:
                return refusal.reason
        if len(credential) > MAX_BEARER_CHARS:
            return AuthReason.TOO_LONG
        return self._keys.find(credential) or AuthReason.UNKNOWN_KEY


def _is_token(credential: str) -> bool:
    """A token has three parts; a key that was made here has the prefix and none."""
    return credential.count(".") == 2 and not credential.startswith(KEY_PREFIX)

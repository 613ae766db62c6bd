"""Principals from JSON Web Tokens: RS256 and ES256, keys from a JWKS file or URL. What is not known good is refused.

No threads and no clock of its own. PyJWT reads the token and checks signature, audience and issuer; times are checked
here, against the clock that comes in.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from deployments.trust.principals import MAX_CASES, MAX_ROLES, Principal, case_zones
from engine.zone import EPHEMERAL, is_zone_name

ALGORITHMS = ("RS256", "ES256")
MAX_TOKEN_CHARS = 8192
MAX_JWKS_BYTES = 1 << 18
MAX_JWKS_KEYS = 64
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192  # a larger one makes each check slow
KEYS_TTL_S = 300.0
KEYS_MIN_REFETCH_S = 30.0
KEYS_MAX_AGE_S = 3600.0
FETCH_TIMEOUT_S = 5.0
LEEWAY_S = 30.0

_ALGORITHM_OF_KTY = {"RSA": "RS256", "EC": "ES256"}


class AuthReason(StrEnum):
    """Why a request names no principal."""

    NO_CREDENTIAL = "no_credential"  # no header, or another scheme than Bearer
    UNKNOWN_KEY = "unknown_key"  # a static key that is not listed
    TOO_LONG = "too_long"
    MALFORMED = "malformed"
    ALGORITHM = "algorithm"
    UNKNOWN_KEY_ID = "unknown_key_id"  # the token names no signing key, or one that is not published
    KEYS_UNAVAILABLE = "keys_unavailable"  # nothing is wrong with the token; it cannot be checked now
    BAD_SIGNATURE = "bad_signature"
    MISSING_CLAIM = "missing_claim"
    BAD_CLAIM = "bad_claim"  # a claim of the wrong type, or a name that may not stand in a zone path
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    WRONG_AUDIENCE = "wrong_audience"
    WRONG_ISSUER = "wrong_issuer"


class TokenRefused(Exception):
    """A token that names nobody. It never repeats what stood in the token."""

    def __init__(self, reason: AuthReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


# --- keys ---


class FetchOutcome(StrEnum):
    """What came of reading the JWKS once."""

    LOADED = "loaded"
    UNREACHABLE = "unreachable"  # no answer in time, no such file, an error status, a redirect
    TOO_LARGE = "too_large"  # more bytes or more keys than allowed
    MALFORMED = "malformed"  # not a JWKS, or two keys under one id
    NO_USABLE_KEY = "no_usable_key"


class JwksError(Exception):
    """A JWKS that gives no keys."""

    def __init__(self, outcome: FetchOutcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class JwksFile:
    """Reads a JWKS from a file."""

    path: Path

    def __call__(self) -> bytes:
        """At most one byte more than a JWKS may have. Raises JwksError."""
        try:
            with self.path.open("rb") as file:
                return file.read(MAX_JWKS_BYTES + 1)
        except OSError:
            raise JwksError(FetchOutcome.UNREACHABLE) from None


class JwksUrl:
    """Reads a JWKS over HTTP. Follows no redirect; takes no more bytes and time than allowed."""

    def __init__(
        self, url: str, clock: Callable[[], float], *, timeout_s: float = FETCH_TIMEOUT_S, allow_http: bool = False
    ) -> None:
        """
        Args:
            clock: Monotonic seconds.
            timeout_s: Of each wait on the network; a body that takes longer in all is given up.
            allow_http: For a URL without TLS. Whoever can change the answer on its way then decides who is who.

        Raises:
            ValueError: Not an https URL, or not an http one where that is allowed.
        """
        allowed = ("https", "http") if allow_http else ("https",)
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise ValueError("not a URL") from None
        if parsed.scheme not in allowed or not parsed.host:
            raise ValueError(f"a JWKS URL is {' or '.join(allowed)}")
        self._url = parsed
        self._clock = clock
        self._timeout_s = timeout_s

    def __call__(self) -> bytes:
        """At most a chunk more than a JWKS may have. Raises JwksError."""
        deadline = self._clock() + self._timeout_s
        body = bytearray()
        # Raw bytes of an answer that is asked not to be compressed: nothing can unfold into more than was read.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        try:
            with (
                httpx.Client(timeout=self._timeout_s, follow_redirects=False) as client,
                client.stream("GET", self._url, headers=headers) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    raise JwksError(FetchOutcome.UNREACHABLE)
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > MAX_JWKS_BYTES:
                        break
                    if self._clock() > deadline:
                        raise JwksError(FetchOutcome.UNREACHABLE)
        except (httpx.HTTPError, httpx.InvalidURL):
            raise JwksError(FetchOutcome.UNREACHABLE) from None
        return bytes(body)


_Keys = Mapping[tuple[str, str], jwt.PyJWK]


def parse_jwks(data: bytes) -> dict[tuple[str, str], jwt.PyJWK]:
    """Keys that may sign tokens, by (key id, algorithm).

    A key of another kind, without an id, for another use, weak, or private is passed over: a set may serve others too.

    Raises:
        JwksError: Too large, not a JWKS, two keys with one id and algorithm, or none of use.
    """
    if len(data) > MAX_JWKS_BYTES:
        raise JwksError(FetchOutcome.TOO_LARGE)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise JwksError(FetchOutcome.MALFORMED) from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise JwksError(FetchOutcome.MALFORMED)
    if len(listed) > MAX_JWKS_KEYS:
        raise JwksError(FetchOutcome.TOO_LARGE)
    keys: dict[tuple[str, str], jwt.PyJWK] = {}
    for entry in listed:
        key = _usable(entry)
        if key is None:
            continue
        name = (entry["kid"], key.algorithm_name)
        if name in keys:
            raise JwksError(FetchOutcome.MALFORMED)
        keys[name] = key
    if not keys:
        raise JwksError(FetchOutcome.NO_USABLE_KEY)
    return keys


def _usable(entry: object) -> jwt.PyJWK | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
        return None
    algorithm = _ALGORITHM_OF_KTY.get(str(entry.get("kty")))
    operations = entry.get("key_ops", ["verify"])
    is_for_us = (
        entry.get("alg", algorithm) == algorithm
        and entry.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
    )
    if algorithm is None or not is_for_us:
        return None
    try:
        key = jwt.PyJWK(entry, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError):  # whatever a field may hold instead of a number
        return None
    return key if _is_strong_public_key(key.key) else None


def _is_strong_public_key(key: object) -> bool:
    match key:
        case RSAPublicKey(key_size=bits):
            return MIN_RSA_BITS <= bits <= MAX_RSA_BITS
        case EllipticCurvePublicKey(curve=curve):
            return curve.name == "secp256r1"
    return False


class KeyCache:
    """The keys of a JWKS, read again when they are old or one is asked for that is not there.

    However many unknown ids are asked for, reads lie `min_refetch_s` apart and one thread reads at a time; the others
    go on with what there is. A read that fails leaves the keys in place until `max_age_s` after the last good one.
    """

    def __init__(
        self,
        read: Callable[[], bytes],
        clock: Callable[[], float],
        *,
        on_fetch: Callable[[FetchOutcome], None],
        ttl_s: float = KEYS_TTL_S,
        min_refetch_s: float = KEYS_MIN_REFETCH_S,
        max_age_s: float = KEYS_MAX_AGE_S,
    ) -> None:
        """
        Args:
            read: The JWKS, or JwksError. May block.
            clock: Monotonic seconds.
            on_fetch: Told of every read.
        """
        self._read = read
        self._clock = clock
        self._on_fetch = on_fetch
        self._ttl_s = ttl_s
        self._min_refetch_s = min_refetch_s
        self._max_age_s = max_age_s
        self._reading = threading.Lock()
        self._keys: _Keys = {}
        self._loaded_at: float | None = None
        self._tried_at: float | None = None

    def refresh_if_due(self) -> None:
        """Read the JWKS if its keys are as old as the TTL, or if there are none. Raises nothing."""
        self._refresh(lambda: not self._is_younger_than(self._ttl_s))

    def find(self, key_id: str, algorithm: str) -> jwt.PyJWK | None:
        """The key, after a read where that is due; None where it is not published.

        Raises:
            TokenRefused: KEYS_UNAVAILABLE: there are no keys, they are too old, or it is not known whether there is
                such a key, for the last read failed or another thread reads just now.
        """
        name = (key_id, algorithm)
        is_settled = self._refresh(lambda: name not in self._keys or not self._is_younger_than(self._ttl_s))
        is_settled = is_settled and self._tried_at == self._loaded_at
        key = self._keys.get(name)
        if not self._is_younger_than(self._max_age_s) or (key is None and not is_settled):
            raise TokenRefused(AuthReason.KEYS_UNAVAILABLE)
        return key

    def next_read_s(self) -> float:
        """Seconds until the JWKS may be read again."""
        if self._tried_at is None:
            return 0.0
        return max(0.0, self._tried_at + self._min_refetch_s - self._clock())

    def _refresh(self, is_wanted: Callable[[], bool]) -> bool:
        """False where another thread reads just now; then nothing has been done."""

        def is_due() -> bool:
            may_try = self._tried_at is None or self._clock() - self._tried_at >= self._min_refetch_s
            return may_try and is_wanted()

        if not is_due():
            return True
        if not self._reading.acquire(blocking=False):
            return False
        try:
            if is_due():
                now = self._clock()
                outcome = self._load(now)
                self._tried_at = now
                self._on_fetch(outcome)
        finally:
            self._reading.release()
        return True

    def _load(self, now: float) -> FetchOutcome:
        try:
            self._keys = parse_jwks(self._read())
        except JwksError as error:
            return error.outcome
        self._loaded_at = now
        return FetchOutcome.LOADED

    def _is_younger_than(self, age_s: float) -> bool:
        return self._loaded_at is not None and self._clock() - self._loaded_at < age_s


# --- tokens ---


@dataclass(frozen=True, slots=True)
class ClaimNames:
    """Which claim says what. Subject and tenant are names; roles and cases are lists of names and may be missing."""

    subject: str = "sub"
    tenant: str = "tenant"
    roles: str = "roles"
    cases: str = "cases"


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say to be taken."""

    issuer: str
    audience: str
    claims: ClaimNames = field(default_factory=ClaimNames)
    leeway_s: float = LEEWAY_S


class TokenVerifier:
    """From a token to the principal that its issuer vouches for."""

    def __init__(self, rules: TokenRules, keys: KeyCache, clock: Callable[[], float]) -> None:
        """
        Args:
            clock: Unix time in seconds.
        """
        self._rules = rules
        self._keys = keys
        self._clock = clock

    def principal(self, token: str) -> Principal:
        """May block for as long as reading the JWKS takes.

        Its unlabelled prompts go to its case if the token names exactly one, else nowhere.

        Raises:
            TokenRefused: With the reason.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise TokenRefused(AuthReason.TOO_LONG)
        claims = self._verified_claims(token)
        self._require_time(claims)
        names = self._rules.claims
        tenant = _name(claims, names.tenant)
        cases = case_zones(tenant, _names(claims, names.cases, MAX_CASES))
        return Principal(
            name=_name(claims, names.subject),
            tenant=tenant,
            zone=next(iter(cases)) if len(cases) == 1 else EPHEMERAL,
            roles=frozenset(_names(claims, names.roles, MAX_ROLES)),
            cases=cases,
        )

    def _verified_claims(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, UnicodeError):
            raise TokenRefused(AuthReason.MALFORMED) from None
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in ALGORITHMS:
            raise TokenRefused(AuthReason.ALGORITHM)
        key = self._keys.find(key_id, algorithm) if isinstance(key_id, str) else None
        if key is None:
            raise TokenRefused(AuthReason.UNKNOWN_KEY_ID)
        names = self._rules.claims
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._rules.audience,
                issuer=self._rules.issuer,
                options={
                    "require": ["exp", "aud", "iss", names.subject, names.tenant],
                    "verify_exp": False,  # these three: `_require_time`, by our clock
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_sub": False,  # `_name`, of whichever claim names the subject
                },
            )
        except jwt.PyJWTError as error:
            raise TokenRefused(_reason(error)) from None

    def _require_time(self, claims: Mapping[str, Any]) -> None:
        now, leeway_s = self._clock(), self._rules.leeway_s
        if _time(claims["exp"]) + leeway_s <= now:
            raise TokenRefused(AuthReason.EXPIRED)
        for name in ("nbf", "iat"):
            if name in claims and _time(claims[name]) - leeway_s > now:
                raise TokenRefused(AuthReason.NOT_YET_VALID)


def _reason(error: jwt.PyJWTError) -> AuthReason:
    match error:
        case jwt.InvalidSignatureError():
            return AuthReason.BAD_SIGNATURE
        case jwt.MissingRequiredClaimError():
            return AuthReason.MISSING_CLAIM
        case jwt.InvalidAudienceError():
            return AuthReason.WRONG_AUDIENCE
        case jwt.InvalidIssuerError():
            return AuthReason.WRONG_ISSUER
    return AuthReason.MALFORMED


def _time(value: object) -> float:
    """Seconds of a NumericDate. The upper bound keeps what JSON calls a number within what a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**53:  # also refuses NaN
        raise TokenRefused(AuthReason.BAD_CLAIM)
    return float(value)


def _name(claims: Mapping[str, Any], claim: str) -> str:
    value = claims[claim]
    if not isinstance(value, str) or not is_zone_name(value):
        raise TokenRefused(AuthReason.BAD_CLAIM)
    return value


def _names(claims: Mapping[str, Any], claim: str, limit: int) -> list[str]:
    values = claims.get(claim, [])
    if not isinstance(values, list) or len(values) > limit:
        raise TokenRefused(AuthReason.BAD_CLAIM)
    if not all(isinstance(value, str) and is_zone_name(value) for value in values):
        raise TokenRefused(AuthReason.BAD_CLAIM)
    return values

"""The ingress's word that a request may be computed in its zones: sealed there, checked on every replica on its own.

The ingress alone sees a credential, so it alone decides zones. A grant is a MAC over whose request it is, every span's
zone and epoch, the epoch that the request runs under, the prompt's tokens and an expiry. Decode checks it before it
admits, prefill checks it again and holds decode's ticket against it, not against what decode says. So a hop that mixes
up two requests, widens a span, keeps an old epoch or adds tokens is refused at the next one: KV is computed, pushed,
published and found only in zones that the ingress has given to exactly these tokens. What a replica returns for a
grant that is used twice is what it gave the first time, to the same decode pool, within the call's own time.

What it does not stop: whoever holds the grant key seals what he likes, and a replica that runs foreign code has its
own memory. It names no content: what is refused is told by a reason alone.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from enum import StrEnum

from deployments.messages import GenerateCall
from engine.zone import Zone
from transfer import wire
from transfer.sealing_keys import KEY_ID_BYTES, SealingKeys

MAX_CLOCK_SKEW_S = 5.0
KEY_SETTLE_PERIODS = 4  # of `trust.policy_reload_s`, in which every process looks at the keys at least once
_HEADER = struct.Struct(f"<B{KEY_ID_BYTES}sQ")  # version, key id, expiry in unix milliseconds
_VERSION = 1
_CODE_BYTES = 32
GRANT_BYTES = _HEADER.size + _CODE_BYTES
_KEY_ID_INFO = b"zoneserve|zone-grant-key-id|v1"


class GrantReason(StrEnum):
    """Why a grant is refused. Closed: each is a label of a counter."""

    FORGED = "forged"  # there is none, of a key that we do not have, or of another request
    EXPIRED = "expired"
    MALFORMED = "malformed"


class GrantRefused(Exception):
    """The request must not be computed; nothing of it has been."""

    def __init__(self, reason: GrantReason) -> None:
        super().__init__(f"zone grant refused: {reason}")
        self.reason = reason


class GrantSealer:
    """Seals under the newest key."""

    def __init__(
        self, keys: Sequence[bytes], unix_time_s: Callable[[], float] = time.time, settle_s: float = 0.0
    ) -> None:
        """`unix_time_s`: unix time in seconds. `settle_s` and what is raised: as `SealingKeys`."""
        self._keys = SealingKeys(keys, _KEY_ID_INFO, unix_time_s, settle_s)
        self._unix_time_s = unix_time_s

    def set_keys(self, keys: Sequence[bytes]) -> None:
        """As `SealingKeys.set_keys`."""
        self._keys.set_keys(keys)

    def seal(self, call: GenerateCall) -> bytes:
        """The grant that the call must carry; good for its `timeout_s` and the skew of clocks.

        Raises:
            ValueError: A zone belongs to another tenant than the call.
        """
        if any(span.zone.tenant not in ("", call.tenant) for span in call.zone_spans):
            raise ValueError("a zone of another tenant than the call's")
        key_id, key = self._keys.sealing
        expires_at_s = self._unix_time_s() + call.timeout_s + MAX_CLOCK_SKEW_S
        header = _HEADER.pack(_VERSION, key_id, int(1000 * expires_at_s))
        return header + _code(key, header, call)


class GrantVerifier:
    """Checks under any of its keys."""

    def __init__(self, keys: Sequence[bytes], unix_time_s: Callable[[], float] = time.time) -> None:
        """`unix_time_s`: unix time in seconds. Raises as `SealingKeys`."""
        self._keys = SealingKeys(keys, _KEY_ID_INFO, unix_time_s)
        self._unix_time_s = unix_time_s

    def set_keys(self, keys: Sequence[bytes]) -> None:
        """As `SealingKeys.set_keys`."""
        self._keys.set_keys(keys)

    def verify(self, call: GenerateCall) -> None:
        """Returns where the call is as the ingress sealed it, and in its time.

        Raises:
            GrantRefused: forged, expired or malformed.
        """
        if not call.grant:
            raise GrantRefused(GrantReason.FORGED)
        header, code = call.grant[: _HEADER.size], call.grant[_HEADER.size :]
        if len(call.grant) != GRANT_BYTES or header[0] != _VERSION:
            raise GrantRefused(GrantReason.MALFORMED)
        _, key_id, expires_at_ms = _HEADER.unpack(header)
        key = self._keys.opening(key_id)
        if key is None or not hmac.compare_digest(code, _code(key, header, call)):
            raise GrantRefused(GrantReason.FORGED)
        if 1000 * self._unix_time_s() >= expires_at_ms:
            raise GrantRefused(GrantReason.EXPIRED)


def _code(key: bytes, header: bytes, call: GenerateCall) -> bytes:
    """MAC over everything that a grant binds, in one encoding: two calls that differ there differ in their bytes.

    Raises:
        GrantRefused: malformed, where a field is not of its type.
    """
    try:
        bound = [
            call.request_id,
            call.tenant,
            call.epoch,
            [[span.end, *_plain(span.zone), span.epoch] for span in call.zone_spans],
            hashlib.sha256(array("I", call.prompt_token_ids)).digest(),
        ]
        return hmac.digest(key, header + wire.pack(bound), "sha256")
    except (OverflowError, TypeError, ValueError):
        raise GrantRefused(GrantReason.MALFORMED) from None


def _plain(zone: Zone) -> tuple[int, str, str]:
    """Every field: a path alone would leave out what its kind does not use."""
    return int(zone.kind), zone.tenant, zone.name

"""The CLI's side of a purge: ask for it, and believe only what the deployment's key has signed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from deployments.trust.principals import MAX_BEARER_CHARS
from deployments.trust.purge import MAX_PENDING_PURGES, POOL_TIMEOUT_S, purgeable_zone
from deployments.trust.receipts import MAX_RECEIPT_BYTES, SignedReceipt, read_unverified, verify_receipt

PURGE_PATH = "/v1/zones/purge"
CONNECT_TIMEOUT_S = 10.0
PURGE_TIMEOUT_S = CONNECT_TIMEOUT_S + POOL_TIMEOUT_S * MAX_PENDING_PURGES  # the last in the queue is served too
MAX_SHOWN_CHARS = 300  # of what the service says


class PurgeError(Exception):
    """No receipt; the message says why. The zone may have been purged all the same."""


def read_bearer_key(path: Path) -> str:
    """The key of a file with nothing else in it.

    Raises:
        PurgeError: Missing, or no bearer key. The message does not repeat it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BEARER_CHARS + 2).strip()
    except OSError as error:
        raise PurgeError(f"{path}: {error.strerror or error}") from error
    if not re.fullmatch(rb"[\x21-\x7e]{1,%d}" % MAX_BEARER_CHARS, data):
        raise PurgeError(f"{path}: not a bearer key")
    return data.decode("ascii")


def request_purge(url: str, bearer_key: str, zone: str, receipt_keys: Sequence[Ed25519PublicKey] = ()) -> SignedReceipt:
    """Have a zone purged.

    Args:
        url: Of the deployment, without a path.
        receipt_keys: What the receipt must be signed with one of; none: it is taken unverified.

    Returns:
        The receipt of this zone, complete or not.

    Raises:
        ValueError: Not a zone that can be purged; nothing was sent.
        PurgeError: The service cannot be reached, or refuses. ReceiptError: The receipt is not to be believed.
    """
    path = purgeable_zone(zone).path
    status, data = _post(url.rstrip("/") + PURGE_PATH, bearer_key, path)
    if status != httpx.codes.OK:
        raise PurgeError(_refusal(status, data))
    signed = verify_receipt(data, receipt_keys) if receipt_keys else read_unverified(data)
    if signed.receipt.zone != path:
        raise PurgeError("the receipt is of another zone")
    return signed


def _post(url: str, bearer_key: str, zone: str) -> tuple[int, bytes]:
    limits = httpx.Timeout(PURGE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    deadline = time.monotonic() + PURGE_TIMEOUT_S
    data = b""
    try:
        with httpx.stream(
            "POST", url, json={"zone": zone}, headers={"Authorization": f"Bearer {bearer_key}"}, timeout=limits
        ) as response:
            for piece in response.iter_bytes():
                data += piece
                if len(data) > MAX_RECEIPT_BYTES or time.monotonic() > deadline:
                    raise PurgeError("the service's answer is too long")
            return response.status_code, data
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PurgeError(f"no answer from the service: {type(error).__name__}") from error


def _refusal(status: int, data: bytes) -> str:
    try:
        said = str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the service refused the purge ({status})"
    shown = "".join(character if character.isprintable() else "?" for character in said[:MAX_SHOWN_CHARS])
    return f"the service refused the purge ({status}): {shown}"

"""The 54 bytes which end a handoff: DONE (all blocks pushed) or ABORTED (no write of mine is live any more).

Authentic on its own: its code proves who sent it even when the landed bytes fail their digest, so that either kind
may serve as the fence.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from engine.block_hash import derive_key
from transfer.digest import DIGEST_BYTES
from transfer.protocol import NONCE_BYTES, TransferError

_BODY = struct.Struct(f"<{NONCE_BYTES}sBBI{DIGEST_BYTES}s")
_CODE_BYTES = 16
NOTICE_BYTES = _BODY.size + _CODE_BYTES
_INFO = b"zoneserve|handoff-notice|v1|"


class NoticeKind(IntEnum):
    DONE = 1
    ABORTED = 2


class AbortReason(IntEnum):
    """Why the sender stopped. Closed: each is a label of a counter on the receiving side."""

    NONE = 0  # of a DONE notice
    CANCELLED = 1
    PREFILL_FAILED = 2
    WRITE_FAILED = 3
    EXPIRED = 4
    SHUTDOWN = 5


class ForgedNotice(TransferError):
    """Bytes that the sender of this nonce's ticket did not write."""


@dataclass(frozen=True, slots=True)
class Notice:
    nonce: bytes
    kind: NoticeKind
    num_blocks: int = 0
    digest: bytes = bytes(DIGEST_BYTES)
    reason: AbortReason = AbortReason.NONE

    def sign(self, transfer_key: bytes) -> bytes:
        body = _BODY.pack(self.nonce, self.kind, self.reason, self.num_blocks, self.digest)
        return body + _code(transfer_key, self.nonce, body)

    @staticmethod
    def open(transfer_key: bytes, nonce: bytes, message: bytes) -> Notice:
        """
        Raises:
            ForgedNotice: Not a notice of this nonce signed with this key.
        """
        body, code = message[: _BODY.size], message[_BODY.size :]
        if len(message) != NOTICE_BYTES or not hmac.compare_digest(code, _code(transfer_key, nonce, body)):
            raise ForgedNotice("a notification with a wrong code")
        its_nonce, kind, reason, num_blocks, digest = _BODY.unpack(body)
        try:
            notice = Notice(its_nonce, NoticeKind(kind), num_blocks, digest, AbortReason(reason))
        except ValueError:
            raise ForgedNotice("a notice of an unknown kind") from None
        if notice.nonce != nonce:
            raise ForgedNotice("a notice of another nonce")
        return notice


def _code(transfer_key: bytes, nonce: bytes, body: bytes) -> bytes:
    return hmac.digest(derive_key(transfer_key, _INFO + nonce), body, "sha256")[:_CODE_BYTES]

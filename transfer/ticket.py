"""Leave to write into somebody's blocks: issued by the decode replica that owns them, sealed, single use.

AES-256-GCM (NIST SP 800-38D) under a key derived from one of the deployment's transfer keys, with a random 96-bit IV:
at most 2**32 tickets a key. The seal proves who issued the ticket; everything else is checked against what the
prefill replica itself knows. The header names the key, and a handoff keeps to it from its ticket to its notice: keys
are changed while handoffs are under way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engine.block_hash import derive_key
from transfer import wire
from transfer.protocol import MAX_BLOCKS_IN_WRITE, NONCE_BYTES, TransferError
from transfer.sealing_keys import KEY_ID_BYTES, SealingKeys

MAX_SEALED_BYTES = 2**20
MAX_TICKET_LIFETIME_S = 900.0
MAX_CLOCK_SKEW_S = 5.0
MAX_REMEMBERED_NONCES = 65_536
_VERSION = b"\x02"
_HEADER_BYTES = len(_VERSION) + KEY_ID_BYTES
_IV_BYTES = 12
_SEAL_INFO = b"zoneserve|ticket-seal|v1"
_KEY_ID_INFO = b"zoneserve|ticket-key-id|v1"
_MAX_ID = 2**31 - 1
_MAX_COUNTER = 2**63 - 1


class RefusalReason(StrEnum):
    """Why a ticket is refused. Closed: each is a label of a counter."""

    FORGED = "forged"  # the seal does not hold: a key that we do not have, truncated, or altered
    MALFORMED = "malformed"  # sealed by us, but not a ticket
    EXPIRED = "expired"
    TOO_LONG_LIVED = "too_long_lived"
    WRONG_ZONE = "wrong_zone"
    WRONG_EPOCH = "wrong_epoch"  # not that of the request, or the zone has been purged here since
    WRONG_REQUEST = "wrong_request"
    WRONG_LAYOUT = "wrong_layout"
    WRONG_WEIGHTS = "wrong_weights"
    WRONG_PROMPT = "wrong_prompt"
    WRONG_SENDER = "wrong_sender"  # issued to another prefill replica, or to this one's earlier life
    WRONG_RECEIVER = "wrong_receiver"  # the connected peer is not who issued it
    REPLAYED = "replayed"
    OVERLOADED = "overloaded"  # no room to remember its nonce: fail closed


class TicketRefused(TransferError):
    """The push must not happen; nothing has been written."""

    def __init__(self, reason: RefusalReason, detail: str = "") -> None:
        super().__init__(f"ticket refused: {reason}{': ' if detail else ''}{detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Ticket:
    """What may be written where, until when. `block_ids[i]` has generation `generations[i]`.

    Blocks are the receiver's, in table order, from prompt block `first_missing_block` to the prompt's last; those
    before it the receiver holds already. `sender`: the agent that may use the ticket; empty means any.
    """

    request_id: str
    zone: str
    epoch: int
    receiver: str
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    first_missing_block: int
    num_prompt_tokens: int
    layout_fingerprint: str
    weights_digest: str
    nonce: bytes
    expires_at_s: float
    sender: str = ""

    def __post_init__(self) -> None:
        checks = (
            (len(self.block_ids) == len(self.generations), "one generation for each block"),
            (len(set(self.block_ids)) == len(self.block_ids), "a block id occurs twice"),
            (len(self.block_ids) <= MAX_BLOCKS_IN_WRITE, f"more than {MAX_BLOCKS_IN_WRITE} blocks"),
            (len(self.nonce) == NONCE_BYTES, f"a nonce has {NONCE_BYTES} bytes"),
            (self.num_prompt_tokens >= 1, "a prompt has at least one token"),
            (self.first_missing_block >= 0, "first_missing_block is negative"),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)

    def encode(self) -> bytes:
        """Canonical bytes: the same ticket gives the same."""
        return wire.pack([_plain(getattr(self, item.name)) for item in fields(self)])

    @staticmethod
    def decode(data: bytes) -> Ticket:
        """
        Raises:
            ValueError: Not the encoding of a ticket.
        """
        record = wire.unpack_record(data, len(fields(Ticket)), MAX_SEALED_BYTES)
        expires_at_s = record[11]
        if type(expires_at_s) is not float:
            raise wire.MalformedMessage("the expiry is not a float")
        return Ticket(
            request_id=wire.as_str(record[0]),
            zone=wire.as_str(record[1]),
            epoch=wire.as_int(record[2], 0, _MAX_COUNTER),
            receiver=wire.as_str(record[3]),
            block_ids=wire.as_ints(record[4], 0, _MAX_ID, MAX_BLOCKS_IN_WRITE),
            generations=wire.as_ints(record[5], 0, _MAX_COUNTER, MAX_BLOCKS_IN_WRITE),
            first_missing_block=wire.as_int(record[6], 0, _MAX_ID),
            num_prompt_tokens=wire.as_int(record[7], 1, _MAX_ID),
            layout_fingerprint=wire.as_str(record[8]),
            weights_digest=wire.as_str(record[9]),
            nonce=wire.as_bytes(record[10], NONCE_BYTES),
            expires_at_s=expires_at_s,
            sender=wire.as_str(record[12]),
        )

    def binding(self) -> bytes:
        """32 bytes that stand for every field; part of what the landing digest covers."""
        return hashlib.sha256(b"ticket|" + self.encode()).digest()


@dataclass(frozen=True, slots=True)
class SealedTicket:
    """A ticket under its seal. `transfer_key`: the one that seals it and keys the digest and notices of its handoff."""

    ticket: Ticket
    sealed: bytes
    transfer_key: bytes = field(repr=False)


class TicketSealer:
    """Seals tickets under the newest transfer key, opens those under any."""

    def __init__(self, keys: Sequence[bytes], clock: Callable[[], float], settle_s: float = 0.0) -> None:
        """`clock`: unix time in seconds. `settle_s` and what is raised: as `SealingKeys`."""
        self._clock = clock
        self._keys = SealingKeys(keys, _KEY_ID_INFO, clock, settle_s)

    def set_keys(self, keys: Sequence[bytes]) -> None:
        """As `SealingKeys.set_keys`. Handoffs under way keep theirs."""
        self._keys.set_keys(keys)

    def seal(self, ticket: Ticket) -> SealedTicket:
        key_id, key = self._keys.sealing
        header, iv = _VERSION + key_id, os.urandom(_IV_BYTES)
        return SealedTicket(ticket, header + iv + _aead(key).encrypt(iv, ticket.encode(), header), key)

    def open(self, sealed: bytes) -> SealedTicket:
        """The ticket, if we sealed it and it is in its time.

        Raises:
            TicketRefused: forged, malformed, expired or too_long_lived.
        """
        if not _HEADER_BYTES + _IV_BYTES < len(sealed) <= MAX_SEALED_BYTES or sealed[:1] != _VERSION:
            raise TicketRefused(RefusalReason.FORGED, "not a sealed ticket")
        header, rest = sealed[:_HEADER_BYTES], sealed[_HEADER_BYTES:]
        key = self._keys.opening(header[len(_VERSION) :])
        if key is None:
            raise TicketRefused(RefusalReason.FORGED, "sealed with a key that is not ours")
        try:
            ticket = Ticket.decode(_aead(key).decrypt(rest[:_IV_BYTES], rest[_IV_BYTES:], header))
        except InvalidTag:
            raise TicketRefused(RefusalReason.FORGED) from None
        except ValueError as error:
            raise TicketRefused(RefusalReason.MALFORMED, str(error)) from None
        now = self._clock()
        # A NaN expiry fails the first comparison: it is refused, not eternal.
        if not ticket.expires_at_s > now:
            raise TicketRefused(RefusalReason.EXPIRED)
        if ticket.expires_at_s > now + MAX_TICKET_LIFETIME_S + MAX_CLOCK_SKEW_S:
            raise TicketRefused(RefusalReason.TOO_LONG_LIVED)
        return SealedTicket(ticket, sealed, key)


class ReplayGuard:
    """Remembers nonces until their tickets expire. Bounded: when full of live ones it refuses."""

    def __init__(self, clock: Callable[[], float], max_nonces: int = MAX_REMEMBERED_NONCES) -> None:
        self._clock = clock
        self._max_nonces = max_nonces
        self._expiries: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._expiries)

    def admit(self, nonce: bytes, expires_at_s: float) -> None:
        """Remember a nonce on its first use.

        Raises:
            TicketRefused: replayed or overloaded; nothing has changed.
        """
        if nonce in self._expiries:
            raise TicketRefused(RefusalReason.REPLAYED)
        if len(self._expiries) >= self._max_nonces:
            self._drop_expired()
        if len(self._expiries) >= self._max_nonces:
            raise TicketRefused(RefusalReason.OVERLOADED, f"{self._max_nonces} tickets are live")
        self._expiries[nonce] = expires_at_s

    def _drop_expired(self) -> None:
        now = self._clock()
        self._expiries = {nonce: expiry for nonce, expiry in self._expiries.items() if expiry > now}


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the prefill replica itself knows about the request: from the ingress's grant, not from the ticket.

    `request_id`: of the granted request; a ticket names that, or an attempt of it, `<request id>/<attempt>`. None: any.
    `epoch_floor`: the least epoch of the zone that the replica's own
    engine still serves.
    """

    zone: str
    epoch: int
    num_prompt_tokens: int | None = None
    request_id: str | None = None
    epoch_floor: int = 0


class TicketVerifier:
    """Every check of a ticket on the prefill side. The nonce is spent only by a ticket that passes all."""

    def __init__(
        self,
        sealer: TicketSealer,
        guard: ReplayGuard,
        *,
        layout_fingerprint: str,
        weights_digest: str,
        agent_name: str,
    ) -> None:
        self._sealer = sealer
        self._guard = guard
        self._layout_fingerprint = layout_fingerprint
        self._weights_digest = weights_digest
        self._agent_name = agent_name

    def verify(self, sealed: bytes, expected: Expectation) -> SealedTicket:
        """
        Raises:
            TicketRefused: The first reason found, in the order below.
        """
        opened = self._sealer.open(sealed)
        ticket = opened.ticket
        prompts = (None, ticket.num_prompt_tokens)
        checks = (
            (ticket.zone == expected.zone, RefusalReason.WRONG_ZONE),
            (ticket.epoch == expected.epoch >= expected.epoch_floor, RefusalReason.WRONG_EPOCH),
            (_is_attempt_of(expected.request_id, ticket.request_id), RefusalReason.WRONG_REQUEST),
            (ticket.layout_fingerprint == self._layout_fingerprint, RefusalReason.WRONG_LAYOUT),
            (ticket.weights_digest == self._weights_digest, RefusalReason.WRONG_WEIGHTS),
            (expected.num_prompt_tokens in prompts, RefusalReason.WRONG_PROMPT),
            (ticket.sender in ("", self._agent_name), RefusalReason.WRONG_SENDER),
        )
        for holds, reason in checks:
            if not holds:
                raise TicketRefused(reason)
        self._guard.admit(ticket.nonce, ticket.expires_at_s)
        return opened


def _is_attempt_of(request_id: str | None, attempt: str) -> bool:
    return request_id is None or f"{attempt}/".startswith(f"{request_id}/")


def _aead(transfer_key: bytes) -> AESGCM:
    return AESGCM(derive_key(transfer_key, _SEAL_INFO))


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

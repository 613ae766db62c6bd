"""What the audit log says of a transfer: the same on both sides, so that what was sent meets what was received."""

from __future__ import annotations

from deployments.trust.audit.record import FIELDS, Value
from transfer.ticket import Ticket


def transfer_record(ticket: Ticket, peer: str, num_bytes: int) -> dict[str, Value]:
    """Of blocks that were pushed, or that landed verified. `ticket_digest` holds a nonce, so nobody can guess it."""
    return {
        **_of(ticket),
        "peer": peer,
        "num_blocks": len(ticket.block_ids),
        "num_bytes": num_bytes,
    }


def landing_denial(reason: str, ticket: Ticket) -> dict[str, Value]:
    """Of blocks that did not land as they were promised."""
    return {**_of(ticket), "peer": ticket.sender, "reason": reason}


def grant_denial(reason: str, request_id: str) -> dict[str, Value | None]:
    """Of a call without a good grant: nothing that it says of itself is believed, and its id is only noted if it is
    one."""
    return {"reason": f"grant_{reason}", "request_id": request_id if FIELDS["request_id"](request_id) else None}


def _of(ticket: Ticket) -> dict[str, Value]:
    return {
        "request_id": ticket.request_id,
        "zone": ticket.zone,
        "epoch": ticket.epoch,
        "ticket_digest": ticket.binding().hex(),
    }

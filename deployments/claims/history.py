"""Earlier claims of a member, in the order they came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deployments.claims.model import Claim


def with_history(claims: Iterable[Claim], prior: Iterable[Claim] = ()) -> Iterator[tuple[Claim, tuple[Claim, ...]]]:
    """Each claim of a batch with the claims of the same member that came before it, oldest first.

    Args:
        claims: The batch, in the order of receipt.
        prior: What was received before the batch, oldest first.
    """
    by_member: dict[str, list[Claim]] = {}
    for claim in prior:
        by_member.setdefault(claim.member, []).append(claim)
    for claim in claims:
        earlier = by_member.setdefault(claim.member, [])
        yield claim, tuple(earlier)
        earlier.append(claim)

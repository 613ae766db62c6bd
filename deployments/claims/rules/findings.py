"""What a rule says: a finding, its evidence and the money at stake."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Literal

from deployments.claims.model import text_sha256

EvidenceSource = Literal["claim", "history", "edit_table", "plan"]


class Severity(IntEnum):
    """How much a finding weighs; a larger value is worse."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def label(self) -> str:
        return self.name.lower()


class Action(StrEnum):
    """What should happen to the claim next, from the least careful to the most. See `action.py`."""

    PAY = "pay"
    PAY_ADJUSTED = "pay_adjusted"
    PEND = "pend"
    REQUEST_RECORDS = "request_records"
    DENY_LINE = "deny_line"
    ROUTE_SIU = "route_siu"

    @property
    def rank(self) -> int:
        return list(Action).index(self)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a finding rests on. `quote` is the exact text; only its digest leaves with the review."""

    source: EvidenceSource
    ref: str
    quote: str

    @property
    def quote_sha256(self) -> str:
        return text_sha256(self.quote)


@dataclass(frozen=True, slots=True)
class LineAmount:
    """Money at stake on a line; `line_number` None means on the claim as a whole."""

    line_number: int | None
    cents: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One flag of one rule on one claim.

    `is_decisive`: the claim's own data and the table settle it; no opinion can.
    `amounts` are billed charges, hence upper bounds: no fee schedule is consulted.
    """

    flag_id: str
    rule_id: str
    code: str
    title: str
    severity: Severity
    is_decisive: bool
    carc: str
    rarc: str | None
    lines: tuple[int, ...]
    summary: str
    evidence: tuple[Evidence, ...]
    amounts: tuple[LineAmount, ...]
    policy_sections: tuple[str, ...]
    action: Action
    next_step: str

    @property
    def projected_overpayment_cents(self) -> int:
        return sum(amount.cents for amount in self.amounts)


def amount_at_stake(findings: Iterable[Finding]) -> int:
    """Cents at stake over all findings, a line counted once, at the largest amount that any finding puts on it."""
    worst: dict[int | None, int] = {}
    for finding in findings:
        for amount in finding.amounts:
            worst[amount.line_number] = max(worst.get(amount.line_number, 0), amount.cents)
    return sum(worst.values())

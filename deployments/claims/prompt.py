"""Assembles the labelled prompt of a claim: public text, then the plan's, then the case's. Most shared comes first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Literal

from deployments.claims.model import Claim, Frequency, ServiceLine, canonical_sha256, format_money, text_sha256
from deployments.claims.plan import Plan
from deployments.claims.rules import Finding
from deployments.claims.rules.edits import day_range
from engine.zone import PUBLIC, Zone

# Bounds of the private part: what is left out is counted in the text, and the rules have seen all of it.
MAX_PROMPT_LINES = 20
MAX_PROMPT_FLAGS = 6
MAX_ASSESSED_FLAGS = 3
MAX_PROMPT_HISTORY = 3
MAX_HISTORY_LINES = 4

SYSTEM_REVISION = "2026-10-01"
_SLUG_CHARS = 40
_FREQUENCY = {Frequency.ORIGINAL: "original", Frequency.REPLACEMENT: "replacement", Frequency.VOID: "void"}

Role = Literal["system", "user"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of prompt with one zone. `source` says which file or record the text is from, `revision` which state."""

    id: str
    zone: str
    text: str
    role: Role
    revision: str
    source: str

    @property
    def content_digest(self) -> str:
        """SHA-256 (hex) of the text."""
        return text_sha256(self.text)


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """Segments in order. All system texts joined are one system message, all user texts one user message.

    Raises:
        ValueError: A segment is less private than one before it, or a system segment follows a user segment.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a prompt has at least one segment")
        for before, after in pairwise(self.segments):
            if Zone.parse(before.zone).join(Zone.parse(after.zone)) != Zone.parse(after.zone):
                raise ValueError(f"segment {after.id} in {after.zone} cannot follow {before.id} in {before.zone}")
            if before.role == "user" and after.role == "system":
                raise ValueError(f"system segment {after.id} follows a user segment")

    @property
    def system(self) -> str:
        return "".join(segment.text for segment in self.segments if segment.role == "system")

    @property
    def user(self) -> str:
        return "".join(segment.text for segment in self.segments if segment.role == "user")

    @property
    def zone(self) -> str:
        """Zone of the whole: that of its last segment."""
        return self.segments[-1].zone

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of every segment's id, zone, role and content digest, in order."""
        return canonical_sha256([[s.id, s.zone, s.role, s.content_digest] for s in self.segments])


def assemble(
    claim: Claim, findings: Sequence[Finding], history: Sequence[Claim], *, tenant: str, plan: Plan
) -> LabelledPrompt:
    """The prompt for one review.

    The segments before the last are the `shared_segments`, byte for byte the same for every claim.

    Raises:
        ValueError: The tenant or the plan is no zone name.
    """
    case_zone = Zone.parse(f"tenant/{tenant}/case/{case_name(claim)}").path
    case = Segment("case", case_zone, case_text(claim, findings, history), "user", claim.digest, "claim")
    return LabelledPrompt((*shared_segments(tenant, plan), case))


def shared_segments(tenant: str, plan: Plan) -> tuple[Segment, ...]:
    """What stands before the case: the public system text, the plan's rubric and policies.

    Raises:
        ValueError: The tenant or the plan is no zone name.
    """
    zone = Zone.parse(f"tenant/{tenant}/plan/{plan.name}").path
    folder = f"plans/{plan.name}"
    return (
        Segment("system", PUBLIC.path, _system_text(), "system", SYSTEM_REVISION, "prompts/system.md"),
        Segment("rubric", zone, plan.rubric, "system", plan.rubric_revision, f"{folder}/rubric.md"),
        Segment("policies", zone, plan.policies, "system", plan.policy_pack_revision, f"{folder}/policy_pack.md"),
    )


def case_name(claim: Claim) -> str:
    """A zone name for the claim's case, distinct for each provider's own claim ids. It goes into logs, so it holds no
    identifier; and the member in the digest is a keyed pseudonym, so that none can be guessed from it."""
    return f"claim-{canonical_sha256([claim.claim_id, claim.billing_npi, claim.member])[:24]}"


def slug(text: str) -> str:
    """Lower-case [a-z0-9-] of an identifier, at most 40 characters; `claim` when nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_SLUG_CHARS].strip("-") or "claim"


def assessed(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings that the model is asked about: the worst few. The others stand on the rules alone."""
    return tuple(findings[:MAX_ASSESSED_FLAGS])


def case_text(claim: Claim, findings: Sequence[Finding], history: Sequence[Claim]) -> str:
    """The private part: the claim, its flags, the member's earlier claims, the task."""
    parts = [
        f"CLAIM {plain(claim.claim_id)} ({_FREQUENCY[claim.frequency]}), received {claim.received_date},"
        f" total {format_money(claim.total_charge_cents)}",
        "Diagnoses: " + ", ".join(f"{number} {code}" for number, code in enumerate(claim.diagnoses, start=1)),
        *_line_rows(claim, findings),
        "",
        *_flag_rows(findings),
        "",
        *_history_rows(findings, history),
        "",
        _task(findings),
    ]
    return "\n".join(parts)


def _line_rows(claim: Claim, findings: Sequence[Finding]) -> list[str]:
    flagged = {number for finding in findings for number in finding.lines}
    by_interest = sorted(claim.lines, key=lambda line: line.line_number not in flagged)
    shown = {line.line_number for line in by_interest[:MAX_PROMPT_LINES]}
    rows = [_line_row(line) for line in claim.lines if line.line_number in shown]
    if len(rows) < len(claim.lines):
        rows.append(f"({len(claim.lines) - len(rows)} more lines are not shown.)")
    return rows


def _line_row(line: ServiceLine) -> str:
    pointers = ",".join(map(str, line.diagnosis_pointers)) or "none"
    return (
        f"Line {line.line_number}: {day_range(line.date_from, line.date_to)} {line.code_with_modifiers}"
        f" x{line.units} {format_money(line.charge_cents)} place {line.place_of_service} dx {pointers}"
    )


def _flag_rows(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["FLAGS: none. All rules passed."]
    rows = ["FLAGS"]
    for finding in findings[:MAX_PROMPT_FLAGS]:
        weight = "decisive" if finding.is_decisive else "suspected"
        rows.append(
            f"{finding.flag_id} {finding.title} ({finding.severity.label}, {weight},"
            f" policy {' or '.join(finding.policy_sections)}): {plain(finding.summary)}"
        )
    if len(findings) > MAX_PROMPT_FLAGS:
        rows.append(f"({len(findings) - MAX_PROMPT_FLAGS} more flags are not shown.)")
    return rows


def _history_rows(findings: Sequence[Finding], history: Sequence[Claim]) -> list[str]:
    if not history:
        return ["EARLIER CLAIMS: none on file."]
    quoted = (evidence for finding in findings for evidence in finding.evidence)
    cited = {evidence.ref.rpartition(" line ")[0] for evidence in quoted if evidence.source == "history"}
    by_interest = sorted(reversed(history), key=lambda other: other.claim_id not in cited)
    rows = ["EARLIER CLAIMS"]
    for other in by_interest[:MAX_PROMPT_HISTORY]:
        lines = "; ".join(
            f"{day_range(line.date_from, line.date_to)} {line.code_with_modifiers} x{line.units}"
            f" {format_money(line.charge_cents)}"
            for line in other.lines[:MAX_HISTORY_LINES]
        )
        more = "; ..." if len(other.lines) > MAX_HISTORY_LINES else ""
        rows.append(f"{plain(other.claim_id)}: {lines}{more}")
    if len(history) > MAX_PROMPT_HISTORY:
        rows.append(f"({len(history) - MAX_PROMPT_HISTORY} more are not shown.)")
    return rows


def _task(findings: Sequence[Finding]) -> str:
    ids = [finding.flag_id for finding in assessed(findings)]
    if not ids:
        return "TASK: No flag to assess. Rate the claim. Answer with the JSON object."
    listed = ids[0] if len(ids) == 1 else f"{', '.join(ids[:-1])} and {ids[-1]}"
    order = ", in this order" if len(ids) > 1 else ""
    return f"TASK: Assess {listed}{order}, then rate the claim. Answer with the JSON object."


def plain(text: str) -> str:
    """Text as the prompt may carry it: a provider's own identifier must not be able to spell a control token."""
    return re.sub(r"[^A-Za-z0-9 .,:;$%()/_#+'-]", "?", text)


@cache
def _system_text() -> str:
    return (files(__package__) / "prompts" / "system.md").read_text(encoding="utf-8") + "\n"

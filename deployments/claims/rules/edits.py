"""The rules. Each is a pure function of one claim, earlier claims of its member, and the edit table.

An earlier claim is one that came first: its own review, not this one's, flags what is wrong with it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from deployments.claims.model import Claim, Frequency, ServiceLine, UnitBasis, format_money
from deployments.claims.rules.findings import Evidence, Finding, LineAmount
from deployments.claims.rules.table import EditTable, PairEdit, UnitLimit

MAX_HISTORY_CLAIMS = 500
_NPI_PREFIX = "80840"  # ISO 7812 issuer prefix for United States health care


@dataclass(frozen=True, slots=True)
class Subject:
    """What the rules look at. `history` holds earlier claims of the same member, oldest first."""

    claim: Claim
    history: tuple[Claim, ...]
    table: EditTable
    timely_filing_days: int
    plan_ref: str


@dataclass(frozen=True, slots=True)
class _Hit:
    rule_id: str
    lines: tuple[int, ...]
    summary: str
    evidence: tuple[Evidence, ...]
    amounts: tuple[LineAmount, ...] = ()
    rarc: str | None = None
    carc: str | None = None


def evaluate(
    claim: Claim,
    *,
    table: EditTable,
    timely_filing_days: int,
    plan_ref: str,
    history: Sequence[Claim] = (),
) -> tuple[Finding, ...]:
    """All findings on a claim, worst first, numbered F1, F2, ...

    Args:
        history: Claims that came before this one, any member; at most the latest MAX_HISTORY_CLAIMS of this
            claim's member are looked at. Voids are left out: they undo a claim, they bill nothing.
    """
    earlier = [other for other in history if other.member == claim.member and other.frequency is not Frequency.VOID]
    subject = Subject(claim, tuple(earlier[-MAX_HISTORY_CLAIMS:]), table, timely_filing_days, plan_ref)
    hits = [hit for rule in _RULES for hit in rule(subject)]
    order = list(table.rules)
    hits.sort(key=lambda hit: (-table.rules[hit.rule_id].severity, order.index(hit.rule_id), hit.lines))
    return tuple(_finding(f"F{number}", hit, table) for number, hit in enumerate(hits, start=1))


def _finding(flag_id: str, hit: _Hit, table: EditTable) -> Finding:
    spec = table.rules[hit.rule_id]
    return Finding(
        flag_id=flag_id,
        rule_id=spec.rule_id,
        code=spec.code,
        title=spec.title,
        severity=spec.severity,
        is_decisive=spec.is_decisive,
        carc=hit.carc or spec.carc,
        rarc=hit.rarc or spec.rarc,
        lines=hit.lines,
        summary=hit.summary,
        evidence=hit.evidence,
        amounts=hit.amounts,
        policy_sections=spec.policy_sections,
        action=spec.action,
        next_step=spec.next_step,
    )


# Duplicates


def check_duplicates(subject: Subject) -> Iterator[_Hit]:
    """R-DUP-EXACT and R-DUP-SUSPECT: a line billed before, on an earlier claim or above on the same one."""
    claim = subject.claim
    if claim.frequency is not Frequency.ORIGINAL:
        return  # a replacement or a void repeats its original on purpose
    matches: dict[tuple[str, int], list[tuple[ServiceLine, Claim, ServiceLine]]] = {}
    for position, line in enumerate(claim.lines):
        match = _find_duplicate(subject, position, line)
        if match is not None:
            rule_id, source_index, other, twin = match
            matches.setdefault((rule_id, source_index), []).append((line, other, twin))
    for (rule_id, _), pairs in sorted(matches.items()):
        yield _duplicate_hit(claim, rule_id, pairs)


def _find_duplicate(subject: Subject, position: int, line: ServiceLine) -> tuple[str, int, Claim, ServiceLine] | None:
    claim = subject.claim
    candidates = [(index, other, twin) for index, other in enumerate(subject.history) for twin in other.lines] + [
        (len(subject.history), claim, twin) for twin in claim.lines[:position]
    ]
    is_repeat = bool(set(line.modifiers) & subject.table.repeat_modifiers)
    for index, other, twin in candidates:
        if _is_same_service(claim, line, other, twin) and not (other is claim and is_repeat):
            return "R-DUP-EXACT", index, other, twin
    told_apart = subject.table.twin_modifiers
    if set(line.modifiers) & told_apart:
        return None
    for index, other, twin in candidates:
        if _is_similar_service(claim, line, other, twin) and not set(twin.modifiers) & told_apart:
            return "R-DUP-SUSPECT", index, other, twin
    return None


def _is_same_service(claim: Claim, line: ServiceLine, other: Claim, twin: ServiceLine) -> bool:
    return (
        claim.rendering_npi_of(line) == other.rendering_npi_of(twin)
        and line.procedure_code == twin.procedure_code
        and sorted(line.modifiers) == sorted(twin.modifiers)
        and (line.date_from, line.date_to) == (twin.date_from, twin.date_to)
        and (line.units, line.unit_basis) == (twin.units, twin.unit_basis)
        and line.charge_cents == twin.charge_cents
        and line.place_of_service == twin.place_of_service
    )


def _is_similar_service(claim: Claim, line: ServiceLine, other: Claim, twin: ServiceLine) -> bool:
    return (
        line.procedure_code == twin.procedure_code
        and _days_overlap(line, twin)
        and (claim.billing_npi == other.billing_npi or claim.rendering_npi_of(line) == other.rendering_npi_of(twin))
    )


def _duplicate_hit(claim: Claim, rule_id: str, pairs: list[tuple[ServiceLine, Claim, ServiceLine]]) -> _Hit:
    lines = tuple(line.line_number for line, _, _ in pairs)
    other = pairs[0][1]
    where = "an earlier line of this claim" if other is claim else f"claim {other.claim_id}"
    if rule_id == "R-DUP-EXACT":
        verb = "bills" if len(lines) == 1 else "bill"
        summary = (
            f"{_lines_text(lines)} {verb} again what {where} billed:"
            " same provider, day, place, code, modifiers, units and charge."
        )
    else:
        relation = "resembles" if len(lines) == 1 else "resemble"
        differences = sorted({what for line, _, twin in pairs for what in _differences(claim, line, other, twin)})
        summary = (
            f"{_lines_text(lines)} {relation} a service that {where} billed for the same day"
            f" (differs in {', '.join(differences)})."
        )
    evidence = [Evidence("claim", f"line {line.line_number}", line_quote(line)) for line, _, _ in pairs]
    for _, source, twin in pairs:
        name = f"line {twin.line_number}" if source is claim else f"{source.claim_id} line {twin.line_number}"
        evidence.append(Evidence("claim" if source is claim else "history", name, line_quote(twin)))
    amounts = tuple(LineAmount(line.line_number, line.charge_cents) for line, _, _ in pairs)
    return _Hit(rule_id, lines, summary, tuple(evidence), amounts)


def _differences(claim: Claim, line: ServiceLine, other: Claim, twin: ServiceLine) -> Iterator[str]:
    for what, mine, theirs in (
        ("charge", line.charge_cents, twin.charge_cents),
        ("dates", (line.date_from, line.date_to), (twin.date_from, twin.date_to)),
        ("modifiers", sorted(line.modifiers), sorted(twin.modifiers)),
        ("place of service", line.place_of_service, twin.place_of_service),
        ("rendering provider", claim.rendering_npi_of(line), other.rendering_npi_of(twin)),
        ("units", (line.units, line.unit_basis), (twin.units, twin.unit_basis)),
    ):
        if mine != theirs:
            yield what


# Code pairs


def check_pairs(subject: Subject) -> Iterator[_Hit]:
    """R-PTP-NEVER and R-PTP-MODIFIER: the second code of a pair beside the first.

    The first code may stand on this claim or on an earlier one of the same provider and day.
    """
    claim = subject.claim
    for line in claim.lines:
        for edit in subject.table.pairs_of_column_2(line.procedure_code, line.date_from):
            partner = next(_partners(subject, line, edit), None)
            if partner is None or edit.modifier_indicator == 9:
                continue
            other, first = partner
            if edit.modifier_indicator == 1 and _is_separated(line, first, subject.table):
                continue
            yield _pair_hit(claim, line, other, first, edit)


def _partners(subject: Subject, line: ServiceLine, edit: PairEdit) -> Iterator[tuple[Claim, ServiceLine]]:
    claim = subject.claim
    for other in (claim, *subject.history):
        for first in other.lines:
            if (
                first.procedure_code == edit.column_1
                and _days_overlap(line, first)
                and claim.rendering_npi_of(line) == other.rendering_npi_of(first)
            ):
                yield other, first


def _is_separated(line: ServiceLine, first: ServiceLine, table: EditTable) -> bool:
    return bool({*line.modifiers, *first.modifiers} & table.separating_modifiers)


def _pair_hit(claim: Claim, line: ServiceLine, other: Claim, first: ServiceLine, edit: PairEdit) -> _Hit:
    is_own = other is claim
    where = f"line {first.line_number}" if is_own else f"claim {other.claim_id} line {first.line_number}"
    never = edit.modifier_indicator == 0
    reason = "the pair is never paid together" if never else "no modifier says that the two services were separate"
    lines = tuple(sorted({line.line_number, first.line_number})) if is_own else (line.line_number,)
    return _Hit(
        "R-PTP-NEVER" if never else "R-PTP-MODIFIER",
        lines,
        f"Code {edit.column_2} on line {line.line_number} is part of {edit.column_1} on {where}: {reason}.",
        (
            Evidence("edit_table", f"ptp {edit.column_1}/{edit.column_2}", edit.quote),
            Evidence("claim", f"line {line.line_number}", line_quote(line)),
            Evidence("claim" if is_own else "history", where.removeprefix("claim "), line_quote(first)),
        ),
        (LineAmount(line.line_number, line.charge_cents),),
    )


# Units


def check_units(subject: Subject) -> Iterator[_Hit]:
    """R-MUE: more units than a day (or a line) may hold. Lines that span several days have so many days' units."""
    for limit, lines in _unit_groups(subject):
        days = (lines[0].date_to - lines[0].date_from).days + 1
        allowed = limit.max_units * days
        billed = sum(line.units for line in lines)
        if billed <= allowed:
            continue
        rest, amounts = Decimal(allowed), []
        for line in lines:
            excess = max(line.units - rest, Decimal(0))
            rest = max(rest - line.units, Decimal(0))
            if excess > 0:
                # Rounded down: what is claimed back is never more than the excess was billed for.
                amounts.append(LineAmount(line.line_number, int(line.charge_cents * excess / line.units)))
        numbers = tuple(line.line_number for line in lines)
        per = "a line" if limit.adjudication == "line" else "a day"
        verb = "bills" if len(numbers) == 1 else "bill"
        yield _Hit(
            "R-MUE",
            numbers,
            f"{_lines_text(numbers)} {verb} {billed} units of {limit.code};"
            f" the limit is {limit.max_units} {per}{f' ({allowed} for {days} days)' if days > 1 else ''}.",
            (
                Evidence("edit_table", f"mue {limit.code}", limit.quote),
                *(Evidence("claim", f"line {line.line_number}", line_quote(line)) for line in lines),
            ),
            tuple(amounts),
        )


def _unit_groups(subject: Subject) -> Iterator[tuple[UnitLimit, list[ServiceLine]]]:
    groups: dict[object, tuple[UnitLimit, list[ServiceLine]]] = {}
    for line in subject.claim.lines:
        limit = subject.table.limit_of(line.procedure_code, line.date_from)
        if limit is None or line.unit_basis is UnitBasis.MINUTES:
            continue
        key = (
            line.line_number
            if limit.adjudication == "line"
            else (line.procedure_code, line.date_from, line.date_to, subject.claim.rendering_npi_of(line))
        )
        groups.setdefault(key, (limit, []))[1].append(line)
    yield from groups.values()


# Add-ons


def check_addons(subject: Subject) -> Iterator[_Hit]:
    """R-ADDON: an add-on code on a day without any of its primary codes, here or on an earlier claim."""
    for line in subject.claim.lines:
        primaries = subject.table.primaries.get(line.procedure_code)
        if not primaries or any(
            other.procedure_code in primaries and _days_overlap(line, other)
            for claim in (subject.claim, *subject.history)
            for other in claim.lines
        ):
            continue
        wanted = " or ".join(sorted(primaries))
        yield _Hit(
            "R-ADDON",
            (line.line_number,),
            f"Add-on code {line.procedure_code} on line {line.line_number} stands without {wanted} on that day.",
            (
                Evidence("edit_table", f"add-on {line.procedure_code}", f"{line.procedure_code},{wanted}"),
                Evidence("claim", f"line {line.line_number}", line_quote(line)),
            ),
            (LineAmount(line.line_number, line.charge_cents),),
        )


# Dates


def check_timely_filing(subject: Subject) -> Iterator[_Hit]:
    """R-TIMELY: an original claim received more than the plan's days after the service. The last day is in time."""
    claim, limit = subject.claim, subject.timely_filing_days
    if claim.frequency is not Frequency.ORIGINAL:
        return  # corrections have a limit of their own, counted from the first decision
    late = [line for line in claim.lines if (claim.received_date - line.date_from).days > limit]
    if not late:
        return
    numbers = tuple(line.line_number for line in late)
    days = max((claim.received_date - line.date_from).days for line in late)
    yield _Hit(
        "R-TIMELY",
        numbers,
        f"The claim was received {days} days after the service on {_lines_text(numbers, capital=False)};"
        f" the plan allows {limit}.",
        (
            Evidence("plan", subject.plan_ref, f"timely_filing_days={limit}"),
            Evidence("claim", "received", f"received {claim.received_date}"),
            *(Evidence("claim", f"line {line.line_number}", line_quote(line)) for line in late),
        ),
        tuple(LineAmount(line.line_number, line.charge_cents) for line in late),
    )


def check_service_dates(subject: Subject) -> Iterator[_Hit]:
    """R-DATE: a service that ends after the claim was received, hence in the future when it was billed."""
    claim = subject.claim
    ahead = [line for line in claim.lines if line.date_to > claim.received_date]
    if not ahead:
        return
    numbers = tuple(line.line_number for line in ahead)
    verb = "is" if len(numbers) == 1 else "are"
    yield _Hit(
        "R-DATE",
        numbers,
        f"{_lines_text(numbers)} {verb} dated {max(line.date_to for line in ahead)},"
        f" after the claim was received on {claim.received_date}.",
        (
            Evidence("claim", "received", f"received {claim.received_date}"),
            *(Evidence("claim", f"line {line.line_number}", line_quote(line)) for line in ahead),
        ),
        tuple(LineAmount(line.line_number, line.charge_cents) for line in ahead),
    )


# The claim's form


def is_valid_npi(npi: str) -> bool:
    """Ten digits whose Luhn sum under prefix 80840 is a multiple of ten.

    Source: CMS, Requirements for National Provider Identifier and NPI check digit.
    """
    if len(npi) != 10 or not npi.isascii() or not npi.isdecimal():
        return False
    return luhn_sum(_NPI_PREFIX + npi) % 10 == 0


def luhn_sum(digits: str) -> int:
    """Sum of the digits, every second one from the right doubled and cast to one digit."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total


def check_npis(subject: Subject) -> Iterator[_Hit]:
    """R-NPI: a billing or rendering provider identifier that is missing or fails its check digit."""
    claim = subject.claim
    if claim.billing_npi is None or not is_valid_npi(claim.billing_npi):
        yield _npi_hit("billing", claim.billing_npi, claim.lines, "N257")
    by_npi: dict[str, list[ServiceLine]] = {}
    for line in claim.lines:
        npi = line.rendering_npi or claim.rendering_npi
        if npi is not None and npi != claim.billing_npi and not is_valid_npi(npi):
            by_npi.setdefault(npi, []).append(line)
    for npi, lines in by_npi.items():
        yield _npi_hit("rendering", npi, lines, "N290")


def _npi_hit(role: str, npi: str | None, lines: Sequence[ServiceLine], rarc: str) -> _Hit:
    fault = "is missing" if npi is None else "fails its check digit"
    return _Hit(
        "R-NPI",
        tuple(line.line_number for line in lines),
        f"The {role} provider's NPI {fault}.",
        (Evidence("claim", f"{role} NPI", npi or ""),),
        tuple(LineAmount(line.line_number, line.charge_cents) for line in lines),
        rarc=rarc,
        carc="206" if npi is None else None,
    )


def check_total(subject: Subject) -> Iterator[_Hit]:
    """R-TOTAL: the stated total is not the sum of the lines. At stake is what it states too much."""
    claim = subject.claim
    excess = claim.total_charge_cents - claim.line_total_cents
    if excess == 0:
        return
    stated, summed = format_money(claim.total_charge_cents), format_money(claim.line_total_cents)
    yield _Hit(
        "R-TOTAL",
        (),
        f"The claim states a total of {stated}; its lines add up to {summed}.",
        (Evidence("claim", "total", f"total {stated}, lines {summed}"),),
        (LineAmount(None, excess),) if excess > 0 else (),
    )


def check_diagnosis_pointers(subject: Subject) -> Iterator[_Hit]:
    """R-DX-POINTER: a line that points at no diagnosis, or at one that the claim does not have."""
    claim = subject.claim
    count = len(claim.diagnoses)
    lost = [
        line
        for line in claim.lines
        if not line.diagnosis_pointers or any(pointer > count for pointer in line.diagnosis_pointers)
    ]
    if not lost:
        return
    numbers = tuple(line.line_number for line in lost)
    verb = "points" if len(numbers) == 1 else "point"
    yield _Hit(
        "R-DX-POINTER",
        numbers,
        f"{_lines_text(numbers)} {verb} at a diagnosis that is not on the claim, which has {count}.",
        tuple(Evidence("claim", f"line {line.line_number}", line_quote(line)) for line in lost),
    )


def check_prior_claim_ref(subject: Subject) -> Iterator[_Hit]:
    """R-PRIOR-REF: a replacement or void that does not say which claim it corrects."""
    claim = subject.claim
    if claim.frequency is Frequency.ORIGINAL or claim.prior_claim_ref is not None:
        return
    kind = "replaces" if claim.frequency is Frequency.REPLACEMENT else "voids"
    yield _Hit(
        "R-PRIOR-REF",
        (),
        f"The claim says that it {kind} an earlier one and does not name it.",
        (Evidence("claim", "frequency", f"frequency {claim.frequency.value}"),),
    )


_RULES: tuple[Callable[[Subject], Iterable[_Hit]], ...] = (
    check_duplicates,
    check_pairs,
    check_units,
    check_addons,
    check_timely_filing,
    check_service_dates,
    check_npis,
    check_total,
    check_diagnosis_pointers,
    check_prior_claim_ref,
)


def line_quote(line: ServiceLine) -> str:
    """A service line as evidence quotes it: one line of text with every field that a rule looks at."""
    return (
        f"line {line.line_number}: {day_range(line.date_from, line.date_to)} {line.code_with_modifiers}"
        f" {line.units} {line.unit_basis.value} {format_money(line.charge_cents)} pos {line.place_of_service}"
        f" dx {','.join(map(str, line.diagnosis_pointers)) or '-'}"
    )


def day_range(first: dt.date, last: dt.date) -> str:
    """`2026-09-14`, or `2026-09-14..2026-09-16`."""
    return f"{first}" if first == last else f"{first}..{last}"


def _days_overlap(one: ServiceLine, other: ServiceLine) -> bool:
    return one.date_from <= other.date_to and other.date_from <= one.date_to


def _lines_text(numbers: Sequence[int], *, capital: bool = True) -> str:
    """`Line 2`, `Lines 1 and 3`, `Lines 1, 2 and 3`."""
    word = ("Line" if capital else "line") + ("s" if len(numbers) > 1 else "")
    head, last = numbers[:-1], numbers[-1]
    return f"{word} {', '.join(map(str, head))} and {last}" if head else f"{word} {last}"

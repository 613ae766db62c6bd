"""Reads professional claims out of one 837P transaction set.

One walk over the segments reads every claim. x12sdk's typed models judge the same transaction set: where they accept
it and find the same claims, the reading is strict; where they do not, the file may still be usable, the reading is
lenient and a note says why. Names, addresses and birth dates do not leave this module.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

from pydantic import ValidationError
from x12sdk.models import X12Delimiters
from x12sdk.parsing import create_parser

from deployments.claims.dispositions import Reason
from deployments.claims.model import (
    MAX_DIAGNOSES,
    MAX_SERVICE_LINES,
    Claim,
    ClaimSource,
    Frequency,
    Parser,
    Pseudonymiser,
    ServiceLine,
    UnitBasis,
)
from deployments.claims.x12 import Segment, TransactionSet, X12Fault, parse_cents, parse_date, parse_decimal

# Larger sets are read by our own walk alone: the typed models take about a millisecond a segment.
MAX_STRICT_SEGMENTS = 5_000

_DIAGNOSIS_QUALIFIERS = frozenset({"ABK", "ABF", "BK", "BF"})
# Every segment that 005010X222A1 knows between ST and SE; those the walk has no use for are read past without a note.
KNOWN_SEGMENT_IDS = frozenset(
    [
        "ST",
        "BHT",
        "NM1",
        "N3",
        "N4",
        "PER",
        "REF",
        "HL",
        "PRV",
        "CUR",
        "SBR",
        "PAT",
        "DMG",
        "CLM",
        "DTP",
        "PWK",
        "CN1",
        "AMT",
        "K3",
        "NTE",
        "CR1",
        "CR2",
        "CRC",
        "HI",
        "HCP",
        "OI",
        "MOA",
        "CAS",
        "LX",
        "SV1",
        "SV5",
        "CR3",
        "QTY",
        "MEA",
        "PS1",
        "LIN",
        "CTP",
        "SVD",
        "LQ",
        "FRM",
        "SE",
    ]
)


@dataclass(slots=True)
class _RawLine:
    segment: Segment
    code: str
    modifiers: tuple[str, ...]
    charge_cents: int
    units: Decimal
    unit_basis: UnitBasis
    place_of_service: str
    pointers: tuple[int, ...]
    stated_number: str
    dates: tuple[dt.date, dt.date] | None = None
    rendering_npi: str | None = None


@dataclass(slots=True)
class _RawClaim:
    segment: Segment
    context: _Context
    claim_id: str = ""
    total_cents: int = 0
    place_of_service: str = ""
    frequency: str = "1"
    prior_claim_ref: str | None = None
    rendering_npi: str | None = None
    dates: tuple[dt.date, dt.date] | None = None
    diagnoses: list[str] = field(default_factory=list)
    lines: list[_RawLine] = field(default_factory=list)
    fault: X12Fault | None = None
    line_number: str = ""
    # Loops 2320 to 2330G describe other payers and their providers: not this claim's.
    is_in_other_payer: bool = False


@dataclass(slots=True)
class _Context:
    """What the hierarchy above a claim says: billing provider, subscriber, payer, dependent."""

    billing_npi: str | None = None
    subscriber_id: str = ""
    plan_code: str | None = None
    payer_id: str = ""
    dependent: tuple[str, ...] = ()

    def copy(self) -> _Context:
        return _Context(self.billing_npi, self.subscriber_id, self.plan_code, self.payer_id, self.dependent)


@dataclass(frozen=True, slots=True)
class ClaimReading:
    """One CLM of a transaction set: the claim, or the fault that refuses it. `claim_id` is empty when unknown."""

    claim_id: str
    segment: Segment
    claim: Claim | None
    fault: X12Fault | None


@dataclass(frozen=True, slots=True)
class TransactionReading:
    """All claims of a transaction set, in order, and notes on what was passed over."""

    claims: tuple[ClaimReading, ...]
    notes: tuple[X12Fault, ...]


def read_transaction(
    transaction: TransactionSet,
    *,
    pseudonymiser: Pseudonymiser,
    file: str,
    first_claim_index: int,
    received_date: dt.date | None,
) -> TransactionReading:
    """Read every claim of a closed 837P transaction set.

    Args:
        received_date: When the payer received the file. None: the set's creation date (BHT04), else the
            interchange's (ISA09).
    """
    raw_claims, notes = _Walk().run(transaction.segments)
    received = received_date or _creation_date(transaction)
    objection = _strict_objection(transaction, raw_claims)
    parser = Parser.X12_STRICT if objection is None else Parser.X12_LENIENT
    if objection is not None:
        notes.insert(0, objection)
    readings = []
    for index, raw in enumerate(raw_claims, start=first_claim_index):
        source = ClaimSource(file=file, claim_index=index, parser=parser)
        claim, fault = None, raw.fault
        if fault is None:
            try:
                claim = _build(raw, source, received, pseudonymiser, notes)
            except X12Fault as problem:
                fault = problem
        readings.append(ClaimReading(raw.claim_id, raw.segment, claim, fault))
    return TransactionReading(tuple(readings), tuple(notes))


class _Walk:
    """The state machine: HL, CLM and LX open loops, everything else fills the innermost one."""

    def __init__(self) -> None:
        self._context = _Context()
        self._receiver_id = ""
        self._claim: _RawClaim | None = None
        self._claims: list[_RawClaim] = []
        self._notes: list[X12Fault] = []
        self._handlers: dict[str, Callable[[Segment], None]] = {
            "HL": self._on_hl,
            "SBR": self._on_sbr,
            "NM1": self._on_nm1,
            "DMG": self._on_dmg,
            "CLM": self._on_clm,
            "REF": self._on_ref,
            "HI": self._on_hi,
            "LX": self._on_lx,
            "SV1": self._on_sv1,
            "DTP": self._on_dtp,
        }

    def run(self, segments: list[Segment]) -> tuple[list[_RawClaim], list[X12Fault]]:
        for segment in segments:
            if segment.id not in KNOWN_SEGMENT_IDS:
                self._notes.append(
                    X12Fault(Reason.UNKNOWN_SEGMENT, "A segment that an 837P does not have is passed over.", segment)
                )
            elif handler := self._handlers.get(segment.id):
                self._apply(handler, segment)
        return self._claims, self._notes

    def _apply(self, handler: Callable[[Segment], None], segment: Segment) -> None:
        try:
            handler(segment)
        except X12Fault as fault:
            if self._claim is not None and self._claim.fault is None:
                self._claim.fault = fault  # the first fault refuses the claim; the walk goes on to the next

    def _on_hl(self, segment: Segment) -> None:
        self._claim = None
        level = segment.get(3)
        if level == "20":
            self._context = _Context()
        elif level == "22":
            self._context = _Context(billing_npi=self._context.billing_npi)
        else:
            self._context = self._context.copy()
            self._context.dependent = ()

    def _on_sbr(self, segment: Segment) -> None:
        if self._claim is not None:
            self._claim.is_in_other_payer = True
        else:
            self._context.plan_code = segment.get(3) or None

    def _on_nm1(self, segment: Segment) -> None:
        entity, identifier = segment.get(1), segment.get(9)
        npi = identifier if segment.get(8) == "XX" and identifier else None
        if self._claim is not None:
            if entity == "82" and not self._claim.is_in_other_payer:
                self._set_rendering(npi)
        elif entity == "85":
            self._context.billing_npi = npi
        elif entity == "IL":
            self._context.subscriber_id = identifier
        elif entity == "PR":
            self._context.payer_id = identifier
        elif entity == "40":
            self._receiver_id = identifier
        elif entity == "QC":
            self._context.dependent = (segment.get(3), segment.get(4))

    def _set_rendering(self, npi: str | None) -> None:
        assert self._claim is not None
        if self._claim.lines:
            self._claim.lines[-1].rendering_npi = npi
        else:
            self._claim.rendering_npi = npi

    def _on_dmg(self, segment: Segment) -> None:
        if self._claim is None and self._context.dependent:
            self._context.dependent = (*self._context.dependent[:2], segment.get(2))

    def _on_clm(self, segment: Segment) -> None:
        claim = self._claim = _RawClaim(segment, self._context.copy())
        # Sloppy files leave loop 2010BB out; the receiver of the file is then the payer.
        claim.context.payer_id = claim.context.payer_id or self._receiver_id
        self._claims.append(claim)
        claim.claim_id = segment.require(1)
        claim.total_cents = _cents(segment, 2)
        place, _, frequency = (*segment.parts(5), "", "")[:3]
        claim.place_of_service, claim.frequency = place, frequency or "1"

    def _on_ref(self, segment: Segment) -> None:
        if self._claim is not None and not self._claim.is_in_other_payer and segment.get(1) == "F8":
            self._claim.prior_claim_ref = segment.get(2) or None

    def _on_hi(self, segment: Segment) -> None:
        if self._claim is None:
            return
        for index in range(1, len(segment.elements)):
            qualifier, code = (*segment.parts(index), "")[:2]
            if qualifier in _DIAGNOSIS_QUALIFIERS and code:
                self._claim.diagnoses.append(code.replace(".", "").upper())
        if len(self._claim.diagnoses) > MAX_DIAGNOSES:
            raise X12Fault(Reason.INVALID_VALUE, f"A claim has at most {MAX_DIAGNOSES} diagnoses.", segment)

    def _on_lx(self, segment: Segment) -> None:
        if self._claim is not None:
            self._claim.is_in_other_payer = False
            self._claim.line_number = segment.get(1)

    def _on_sv1(self, segment: Segment) -> None:
        if self._claim is None:
            return
        self._claim.is_in_other_payer = False
        if len(self._claim.lines) == MAX_SERVICE_LINES:
            raise X12Fault(Reason.INVALID_VALUE, f"A claim has at most {MAX_SERVICE_LINES} service lines.", segment)
        qualifier, code, *rest = (*segment.parts(1), "")
        if qualifier != "HC" or not code:
            raise X12Fault(Reason.INVALID_VALUE, "SV101 does not hold a procedure code under qualifier HC.", segment)
        units = parse_decimal(segment.require(4))
        if units is None or units <= 0:
            raise X12Fault(Reason.INVALID_VALUE, "SV104 is not a positive number of units.", segment)
        if segment.get(3) not in ("UN", "MJ", ""):
            raise X12Fault(Reason.INVALID_VALUE, "SV103 is neither UN nor MJ.", segment)
        self._claim.lines.append(
            _RawLine(
                segment=segment,
                code=code.upper(),
                modifiers=tuple(modifier.upper() for modifier in rest[:4] if modifier),
                charge_cents=_cents(segment, 2),
                units=units,
                unit_basis=UnitBasis(segment.get(3) or "UN"),
                place_of_service=segment.get(5) or self._claim.place_of_service,
                pointers=_pointers(segment),
                stated_number=self._claim.line_number,
            )
        )

    def _on_dtp(self, segment: Segment) -> None:
        if self._claim is None or segment.get(1) != "472":
            return
        start, _, end = segment.require(3).partition("-")
        dates = parse_date(start), parse_date(end or start)
        if dates[0] is None or dates[1] is None or dates[1] < dates[0]:
            raise X12Fault(Reason.INVALID_VALUE, "DTP03 is not a service date or an ordered range of dates.", segment)
        if self._claim.lines:
            self._claim.lines[-1].dates = (dates[0], dates[1])
        else:
            self._claim.dates = (dates[0], dates[1])


def _cents(segment: Segment, index: int) -> int:
    cents = parse_cents(segment.require(index))
    if cents is None:
        raise X12Fault(
            Reason.INVALID_VALUE, f"{segment.id}{index:02d} is not an amount with at most two decimal places.", segment
        )
    return cents


def _pointers(segment: Segment) -> tuple[int, ...]:
    pointers = [part for part in segment.parts(7) if part]
    if not all(part.isascii() and part.isdecimal() and 1 <= int(part) <= MAX_DIAGNOSES for part in pointers):
        raise X12Fault(Reason.INVALID_VALUE, f"SV107 holds a pointer that is not 1 to {MAX_DIAGNOSES}.", segment)
    return tuple(int(part) for part in pointers[:4])


def _creation_date(transaction: TransactionSet) -> dt.date | None:
    for segment in transaction.segments:
        if segment.id == "BHT":
            return parse_date(segment.get(4)) or transaction.interchange_date
    return transaction.interchange_date


def _build(
    raw: _RawClaim,
    source: ClaimSource,
    received: dt.date | None,
    pseudonymiser: Pseudonymiser,
    notes: list[X12Fault],
) -> Claim:
    """The claim of a complete reading.

    Raises:
        X12Fault: Something a claim must have is missing, or a value is not one.
    """
    context = raw.context
    for is_there, what in (
        (context.subscriber_id, "the subscriber's member id (NM109 in loop 2010BA)"),
        (context.payer_id, "the payer's id (NM109 in loop 2010BB or 1000B)"),
        (raw.diagnoses, "a diagnosis (HI)"),
        (raw.lines, "a service line (SV1)"),
        (received, "a date of receipt (BHT04 or ISA09)"),
    ):
        if not is_there:
            raise X12Fault(Reason.MISSING_SEGMENT, f"The claim lacks {what}.", raw.segment)
    assert received is not None
    if raw.frequency not in set(Frequency):
        raise X12Fault(Reason.INVALID_VALUE, "CLM05-3 is not a frequency code of 1, 7 or 8.", raw.segment)
    numbers = _line_numbers(raw, notes)
    try:
        return Claim(
            claim_id=raw.claim_id,
            member=pseudonymiser.member(context.subscriber_id, *context.dependent),
            billing_npi=context.billing_npi,
            rendering_npi=raw.rendering_npi,
            payer_id=context.payer_id,
            plan_code=context.plan_code,
            received_date=received,
            frequency=Frequency(raw.frequency),
            prior_claim_ref=raw.prior_claim_ref,
            diagnoses=tuple(raw.diagnoses),
            total_charge_cents=raw.total_cents,
            lines=tuple(_build_line(raw, line, number) for line, number in zip(raw.lines, numbers, strict=True)),
            source=source,
        )
    except ValidationError as error:
        raise X12Fault(Reason.INVALID_VALUE, first_complaint(error), raw.segment) from None


def _build_line(raw: _RawClaim, line: _RawLine, number: int) -> ServiceLine:
    dates = line.dates or raw.dates
    if dates is None:
        raise X12Fault(Reason.MISSING_SEGMENT, "A service line has no service date (DTP*472).", line.segment)
    try:
        return ServiceLine(
            line_number=number,
            procedure_code=line.code,
            modifiers=line.modifiers,
            units=line.units,
            unit_basis=line.unit_basis,
            charge_cents=line.charge_cents,
            date_from=dates[0],
            date_to=dates[1],
            place_of_service=line.place_of_service,
            diagnosis_pointers=line.pointers,
            rendering_npi=line.rendering_npi,
        )
    except ValidationError as error:
        raise X12Fault(Reason.INVALID_VALUE, first_complaint(error), line.segment) from None


def _line_numbers(raw: _RawClaim, notes: list[X12Fault]) -> list[int]:
    """LX01 of each line; 1, 2, 3... with a note where those are not distinct numbers."""
    stated = [line.stated_number for line in raw.lines]
    if len(set(stated)) == len(stated) and all(text.isascii() and text.isdecimal() and int(text) for text in stated):
        return [int(text) for text in stated]
    notes.append(X12Fault(Reason.LINES_RENUMBERED, "LX01 does not number the lines; their order does.", raw.segment))
    return list(range(1, len(stated) + 1))


def first_complaint(error: ValidationError) -> str:
    """The first thing pydantic objects to, by field and rule; never the value."""
    complaint = error.errors(include_input=False, include_context=False, include_url=False)[0]
    field_path = ".".join(str(part) for part in complaint["loc"]) or "the record"
    kind = "a check across fields fails" if complaint["type"] == "value_error" else complaint["type"].replace("_", " ")
    return f"{field_path[:120]}: {kind}."


def _strict_objection(transaction: TransactionSet, raw_claims: list[_RawClaim]) -> X12Fault | None:
    """Why x12sdk's typed models do not accept the set as we read it; None when they do."""
    if len(transaction.segments) > MAX_STRICT_SEGMENTS:
        return X12Fault(
            Reason.READ_LENIENTLY, f"More than {MAX_STRICT_SEGMENTS} segments: read without the typed models."
        )
    marks = transaction.delimiters
    model, segment = None, transaction.segments[0]
    try:
        parser = create_parser(
            transaction.code,
            transaction.version,
            X12Delimiters(
                element_separator=marks.element,
                component_separator=marks.component,
                repetition_separator=marks.repetition,
                segment_terminator=marks.terminator,
            ),
        )
        for segment in transaction.segments:
            model = parser.parse(segment.id, list(segment.elements))
    except ValidationError as error:
        return X12Fault(
            Reason.READ_LENIENTLY,
            f"The strict 837P model refuses it, and the lenient path read it: {first_complaint(error)}",
            None,
        )
    except Exception as error:
        # x12sdk raises what its lookups raise (KeyError, IndexError, ...): any of it means "not strictly valid".
        logging.getLogger(__name__).debug("strict parse failed with %s", type(error).__name__)
        return X12Fault(
            Reason.READ_LENIENTLY, f"The typed models stop at this segment ({type(error).__name__}).", segment
        )
    if model is None:
        return X12Fault(Reason.READ_LENIENTLY, "The typed models found no transaction set.", None)
    theirs = [
        (
            claim.patient_control_number,
            claim.charge,
            [line.sv1_segment.line_item_charge_amount for line in claim.service_lines],
        )
        for claim in model.claims()
    ]
    ours = [
        (raw.claim_id, Decimal(raw.total_cents) / 100, [Decimal(line.charge_cents) / 100 for line in raw.lines])
        for raw in raw_claims
        if raw.fault is None
    ]
    if theirs != ours:
        return X12Fault(Reason.READ_LENIENTLY, "The typed models read other claims than the segments show.", None)
    return None

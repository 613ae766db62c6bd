"""What a professional claim is, once it has been read. Frozen, strict, without names, addresses or birth dates.

Money is integer cents. The member is a keyed pseudonym: the raw identifier does not pass intake.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import json
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_SERVICE_LINES = 50  # X12 005010X222A1, loop 2400
MAX_DIAGNOSES = 12  # ... HI in loop 2300
MAX_MODIFIERS = 4  # ... SV101-3 to SV101-6
MAX_CHARGE_CENTS = 9_999_999_99
MIN_PSEUDONYM_KEY_BYTES = 16

Cents = Annotated[int, Field(ge=0, le=MAX_CHARGE_CENTS)]
Identifier = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$")]
ProcedureCode = Annotated[str, Field(pattern=r"^[A-Z0-9]{5}$")]
Modifier = Annotated[str, Field(pattern=r"^[A-Z0-9]{2}$")]
DiagnosisCode = Annotated[str, Field(pattern=r"^[A-Z0-9]{3,7}$")]
PlaceOfService = Annotated[str, Field(pattern=r"^[0-9]{2}$")]
DiagnosisPointer = Annotated[int, Field(ge=1, le=MAX_DIAGNOSES)]
Units = Annotated[Decimal, Field(gt=0, le=99_999, decimal_places=3)]
Pseudonym = Annotated[str, Field(pattern=r"^m-[0-9a-f]{20}$")]


class StrictModel(BaseModel):
    """Base of every record here: immutable, no coercion, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Frequency(StrEnum):
    """CLM05-3, the claim frequency type code."""

    ORIGINAL = "1"
    REPLACEMENT = "7"
    VOID = "8"


class UnitBasis(StrEnum):
    """SV103, what `units` counts."""

    UNITS = "UN"
    MINUTES = "MJ"


class Parser(StrEnum):
    """Which path read the claim."""

    X12_STRICT = "x12_strict"  # x12sdk's typed models
    X12_LENIENT = "x12_lenient"  # our own walk over the segments
    JSON_LINES = "json_lines"


class ClaimSource(StrictModel):
    """Where a claim was read. Not part of the claim's digest: the same claim in another file is the same claim."""

    file: str
    claim_index: int = Field(ge=1)
    parser: Parser


class ServiceLine(StrictModel):
    """One service line. `date_to` equals `date_from` for a single day."""

    line_number: int = Field(ge=1, le=999)
    procedure_code: ProcedureCode
    modifiers: tuple[Modifier, ...] = Field(default=(), max_length=MAX_MODIFIERS)
    units: Units
    unit_basis: UnitBasis = UnitBasis.UNITS
    charge_cents: Cents
    date_from: dt.date
    date_to: dt.date
    place_of_service: PlaceOfService
    diagnosis_pointers: tuple[DiagnosisPointer, ...] = Field(default=(), max_length=4)
    rendering_npi: Identifier | None = None

    @field_validator("units")
    @classmethod
    def _drop_trailing_zeros(cls, units: Decimal) -> Decimal:
        # "1", "1.0" and "1.000" are one claim with one digest.
        return units.quantize(Decimal(1)) if units == units.to_integral_value() else units.normalize()

    @model_validator(mode="after")
    def _dates_are_ordered(self) -> Self:
        if self.date_to < self.date_from:
            raise ValueError("date_to lies before date_from")
        return self

    @property
    def code_with_modifiers(self) -> str:
        return "-".join((self.procedure_code, *self.modifiers))


class Claim(StrictModel):
    """A professional claim.

    `claim_id` is the provider's own (CLM01); it is unique only for one billing provider.
    `total_charge_cents` is what the claim states (CLM02), which need not be the sum of its lines.
    An NPI is kept as it was sent: whether it is one is a rule's business.
    """

    claim_id: Annotated[Identifier, Field(max_length=38)]
    member: Pseudonym
    billing_npi: Identifier | None
    rendering_npi: Identifier | None = None
    payer_id: Identifier
    plan_code: Identifier | None = None
    received_date: dt.date
    frequency: Frequency = Frequency.ORIGINAL
    prior_claim_ref: Identifier | None = None
    diagnoses: tuple[DiagnosisCode, ...] = Field(min_length=1, max_length=MAX_DIAGNOSES)
    total_charge_cents: Cents
    lines: tuple[ServiceLine, ...] = Field(min_length=1, max_length=MAX_SERVICE_LINES)
    source: ClaimSource

    @model_validator(mode="after")
    def _line_numbers_are_unique(self) -> Self:
        numbers = [line.line_number for line in self.lines]
        if len(set(numbers)) != len(numbers):
            raise ValueError("a line number occurs twice")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the claim's content in canonical JSON, without its source."""
        return canonical_sha256(self.model_dump(mode="json", exclude={"source"}))

    @property
    def line_total_cents(self) -> int:
        return sum(line.charge_cents for line in self.lines)

    @property
    def service_start(self) -> dt.date:
        return min(line.date_from for line in self.lines)

    def line(self, line_number: int) -> ServiceLine:
        """The line of that number.

        Raises:
            KeyError: The claim has no such line.
        """
        for line in self.lines:
            if line.line_number == line_number:
                return line
        raise KeyError(line_number)

    def rendering_npi_of(self, line: ServiceLine) -> str | None:
        """Who rendered the line: the line's own provider, else the claim's, else the billing provider."""
        return line.rendering_npi or self.rendering_npi or self.billing_npi


class Pseudonymiser:
    """Turns a member identifier into a keyed pseudonym. The same key, tenant and identifier give the same one."""

    def __init__(self, key: bytes, tenant: str) -> None:
        if len(key) < MIN_PSEUDONYM_KEY_BYTES:
            raise ValueError(f"a pseudonym key has at least {MIN_PSEUDONYM_KEY_BYTES} bytes")
        self._key = key
        self._tenant = tenant

    def member(self, *identity: str) -> str:
        """Pseudonym of an identity: the member id, and for a dependent what tells it from its siblings."""
        message = json.dumps([self._tenant, *(part.strip().upper() for part in identity)]).encode()
        return "m-" + hmac.new(self._key, message, hashlib.sha256).hexdigest()[:20]


def canonical_json(value: object) -> str:
    """Sorted keys, no spaces, ASCII: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_sha256(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return text_sha256(canonical_json(value))


def text_sha256(text: str) -> str:
    """SHA-256 (hex) of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def format_money(cents: int) -> str:
    """`$1,234.56`; a negative amount is `-$1.00`."""
    dollars, rest = divmod(abs(cents), 100)
    return f"{'-' if cents < 0 else ''}${dollars:,}.{rest:02d}"

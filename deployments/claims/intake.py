"""Claims from a file: bytes in, claims and dispositions out. Synchronous and pure; files of 5 MB take seconds.

A transaction set is read whole or refused whole when it is cut: half of it now and all of it later would be a
duplicate of our own making. Within a whole set each claim stands or falls alone.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from deployments.claims.dispositions import MAX_NOTES_PER_FILE, Disposition, IntakeResult, Outcome, Reason
from deployments.claims.model import (
    MAX_DIAGNOSES,
    MAX_SERVICE_LINES,
    Cents,
    Claim,
    ClaimSource,
    DiagnosisCode,
    Frequency,
    Identifier,
    Parser,
    Pseudonymiser,
    ServiceLine,
    StrictModel,
)
from deployments.claims.x12 import (
    PROFESSIONAL_VERSION_PREFIX,
    Segment,
    TransactionSet,
    X12Fault,
    read_interchange,
)
from deployments.claims.x12_claims import first_complaint, read_transaction

MAX_FILE_BYTES = 5_000_000
MAX_CLAIMS_PER_FILE = 5_000
MAX_TRANSACTIONS_PER_FILE = 5_000

Format = Literal["auto", "x12", "jsonl"]
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class ClaimRecord(StrictModel):
    """A claim as one JSON line, schema `zoneserve.claim/1`. `member_id` is replaced by a pseudonym on reading."""

    schema_version: Literal["zoneserve.claim/1"]
    claim_id: Annotated[Identifier, Field(max_length=38)]
    member_id: Identifier
    billing_npi: Identifier | None = None
    rendering_npi: Identifier | None = None
    payer_id: Identifier
    plan_code: Identifier | None = None
    received_date: dt.date
    frequency: Frequency = Frequency.ORIGINAL
    prior_claim_ref: Identifier | None = None
    diagnoses: tuple[DiagnosisCode, ...] = Field(min_length=1, max_length=MAX_DIAGNOSES)
    total_charge_cents: Cents
    lines: tuple[ServiceLine, ...] = Field(min_length=1, max_length=MAX_SERVICE_LINES)


@dataclass(slots=True)
class _Ledger:
    """Collects the result of one file."""

    file: str
    num_claims: int = 0
    num_transactions: int = 0
    claims: list[Claim] = field(default_factory=list)
    dispositions: list[Disposition] = field(default_factory=list)
    num_notes: int = 0

    def refuse(self, fault: X12Fault, *, num_claims: int = 0, **where: int | str | None) -> None:
        self.dispositions.append(self._disposition(Outcome.REFUSED, fault, num_claims=num_claims, **where))

    def note(self, fault: X12Fault, **where: int | str | None) -> None:
        self.num_notes += 1
        if self.num_notes <= MAX_NOTES_PER_FILE:
            self.dispositions.append(self._disposition(Outcome.NOTED, fault, **where))

    def _disposition(self, outcome: Outcome, fault: X12Fault, **where: int | str | None) -> Disposition:
        segment: Segment | None = fault.segment
        values: dict[str, object] = {
            "file": self.file,
            "outcome": outcome,
            "reason": fault.reason,
            "detail": fault.detail,
            "segment_number": segment.number if segment else None,
            # An id is shown only when it looks like one: what stands in its place may be anything.
            "segment_id": segment.id if segment and segment.id.isalnum() and len(segment.id) <= 3 else None,
        }
        return Disposition.model_validate(values | where)

    def result(self) -> IntakeResult:
        if self.num_notes > MAX_NOTES_PER_FILE:
            hidden = self.num_notes - MAX_NOTES_PER_FILE
            fault = X12Fault(Reason.NOTES_SUPPRESSED, f"{hidden} further notes are not listed.")
            self.dispositions.append(self._disposition(Outcome.NOTED, fault))
        return IntakeResult(
            file=self.file,
            num_claims=self.num_claims,
            num_transactions=self.num_transactions,
            claims=tuple(self.claims),
            dispositions=tuple(self.dispositions),
        )


class ClaimIntake:
    """Reads files for one tenant.

    Args:
        pseudonymiser: Replaces member identifiers. The same key over time is what lets duplicates be found.
        received_date: When the files were received; None takes each file's own creation date.
    """

    def __init__(self, pseudonymiser: Pseudonymiser, *, received_date: dt.date | None = None) -> None:
        self._pseudonymiser = pseudonymiser
        self._received_date = received_date

    def read_file(self, path: Path) -> IntakeResult:
        """Read a file from disk; at most one byte over the limit is loaded.

        Raises:
            OSError: It cannot be opened or read.
        """
        with path.open("rb") as stream:
            return self.read_bytes(stream.read(MAX_FILE_BYTES + 1), name=path.name)

    def read_bytes(self, data: bytes, *, name: str, format: Format = "auto") -> IntakeResult:
        """Read the content of a file. Never raises on content: what cannot be read has a disposition."""
        ledger = _Ledger(name)
        try:
            text = _decode(data)
            if format == "jsonl" or (format == "auto" and _looks_like_json(text, name)):
                self._read_json_lines(text, ledger)
            else:
                self._read_x12(text, ledger)
        except X12Fault as fault:
            ledger.refuse(fault)
        return ledger.result()

    def _read_x12(self, text: str, ledger: _Ledger) -> None:
        if text.lstrip("\ufeff \t\r\n")[:3].upper() not in ("ISA", "GS*", "ST*"):
            raise X12Fault(Reason.NOT_A_CLAIM_FILE, "The file is neither X12 (no ISA, GS or ST) nor JSON lines.")
        interchange = read_interchange(text)
        ledger.num_transactions = len(interchange.transactions)
        ledger.num_claims = sum(transaction.num_claims for transaction in interchange.transactions)
        if ledger.num_claims > MAX_CLAIMS_PER_FILE:
            fault = X12Fault(Reason.TOO_MANY_CLAIMS, f"A file holds at most {MAX_CLAIMS_PER_FILE} claims.")
            ledger.refuse(fault, num_claims=ledger.num_claims)
            return
        if ledger.num_transactions > MAX_TRANSACTIONS_PER_FILE:
            limit = f"A file holds at most {MAX_TRANSACTIONS_PER_FILE} transaction sets."
            ledger.refuse(X12Fault(Reason.TOO_MANY_TRANSACTIONS, limit), num_claims=ledger.num_claims)
            return
        for note in interchange.notes:
            ledger.note(note)
        next_index = 1
        for transaction in interchange.transactions:
            self._read_transaction(transaction, next_index, ledger)
            next_index += transaction.num_claims

    def _read_transaction(self, transaction: TransactionSet, next_index: int, ledger: _Ledger) -> None:
        fault = _refusal_of(transaction)
        if fault is not None:
            _refuse_whole(transaction, fault, next_index, ledger)
            return
        if transaction.stated_segment_count != len(transaction.segments):
            fault = X12Fault(
                Reason.SEGMENT_COUNT_MISMATCH,
                f"SE01 does not state the {len(transaction.segments)} segments that the set has.",
                transaction.segments[-1],
            )
            ledger.note(fault, transaction_index=transaction.index)
        reading = read_transaction(
            transaction,
            pseudonymiser=self._pseudonymiser,
            file=ledger.file,
            first_claim_index=next_index,
            received_date=self._received_date,
        )
        for note in reading.notes:
            ledger.note(note, transaction_index=transaction.index)
        for index, item in enumerate(reading.claims, start=next_index):
            if item.claim is not None:
                ledger.claims.append(item.claim)
            else:
                assert item.fault is not None
                ledger.refuse(
                    item.fault,
                    num_claims=1,
                    transaction_index=transaction.index,
                    claim_index=index,
                    claim_id=item.claim_id or None,
                )

    def _read_json_lines(self, text: str, ledger: _Ledger) -> None:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        ledger.num_claims = len(lines)
        if len(lines) > MAX_CLAIMS_PER_FILE:
            fault = X12Fault(Reason.TOO_MANY_CLAIMS, f"A file holds at most {MAX_CLAIMS_PER_FILE} claims.")
            ledger.refuse(fault, num_claims=len(lines))
            return
        for index, (number, line) in enumerate(lines, start=1):
            source = ClaimSource(file=ledger.file, claim_index=index, parser=Parser.JSON_LINES)
            try:
                ledger.claims.append(self._claim_of_line(line, source))
            except X12Fault as fault:
                ledger.refuse(fault, num_claims=1, claim_index=index, line_number=number)

    def _claim_of_line(self, line: str, source: ClaimSource) -> Claim:
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            raise X12Fault(Reason.BAD_JSON, "The line is not a JSON value.") from None
        try:
            record = ClaimRecord.model_validate_json(line)
            values = {name: getattr(record, name) for name in Claim.model_fields if name not in ("member", "source")}
            return Claim(member=self._pseudonymiser.member(record.member_id), source=source, **values)
        except ValidationError as error:
            raise X12Fault(Reason.INVALID_VALUE, first_complaint(error)) from None


def _decode(data: bytes) -> str:
    if len(data) > MAX_FILE_BYTES:
        raise X12Fault(Reason.FILE_TOO_LARGE, f"A file has at most {MAX_FILE_BYTES:,} bytes.")
    if not data.strip():
        raise X12Fault(Reason.EMPTY_FILE, "The file is empty.")
    if b"\x00" in data:
        raise X12Fault(Reason.NOT_A_CLAIM_FILE, "The file is binary.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        # X12's extended character set is Latin-1 in practice; names are not kept, so a wrong guess costs nothing.
        return data.decode("latin-1")


def _looks_like_json(text: str, name: str) -> bool:
    return text.lstrip("\ufeff \t\r\n").startswith("{") or name.lower().endswith(_JSON_SUFFIXES)


def _refusal_of(transaction: TransactionSet) -> X12Fault | None:
    """Why a transaction set cannot be read at all; None when it can."""
    first, last = transaction.segments[0], transaction.segments[-1]
    if transaction.code != "837":
        return X12Fault(Reason.WRONG_TRANSACTION, "ST01 is not 837: this is no claim submission.", first)
    if transaction.version and not transaction.version.startswith(PROFESSIONAL_VERSION_PREFIX):
        return X12Fault(Reason.UNSUPPORTED_VERSION, "The version is not 005010X222: no professional claim.", first)
    if not transaction.is_closed:
        return X12Fault(Reason.TRUNCATED, "The transaction set ends without SE; this is the last segment read.", last)
    if not transaction.num_claims:
        return X12Fault(Reason.NO_CLAIMS, "The transaction set holds no CLM segment.", first)
    return None


def _refuse_whole(transaction: TransactionSet, fault: X12Fault, next_index: int, ledger: _Ledger) -> None:
    claims = [segment for segment in transaction.segments if segment.id == "CLM"]
    if not claims:
        ledger.refuse(fault, transaction_index=transaction.index)
    for index, claim in enumerate(claims, start=next_index):
        ledger.refuse(
            fault,
            num_claims=1,
            transaction_index=transaction.index,
            claim_index=index,
            claim_id=claim.get(1)[:38] or None,
        )

"""X12 837P as segments: delimiters, numbered segments, transaction sets, and the values of single elements.

Says nothing about claims; `x12_claims.py` reads those out of a transaction set.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from deployments.claims.dispositions import Reason

MAX_SEGMENT_CHARS = 4_096
MAX_SEGMENTS_PER_FILE = 400_000  # 5 MB of ordinary segments are half of it
PROFESSIONAL_VERSION_PREFIX = "005010X222"
_ISA_CHARS = 106  # fixed width; the last two are the component separator and the terminator
_ISA_ELEMENTS = 16
_ENVELOPE_IDS = frozenset({"ISA", "GS", "GE", "IEA", "TA1"})


class X12Fault(Exception):
    """Something in the file that cannot be read. The message is one sentence without any value."""

    def __init__(self, reason: Reason, detail: str, segment: Segment | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.segment = segment


@dataclass(frozen=True, slots=True)
class Delimiters:
    element: str = "*"
    component: str = ":"
    repetition: str = "^"
    terminator: str = "~"


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment: its number in the file (from 1), its id in capitals, its elements (`elements[0]` is the id)."""

    number: int
    id: str
    elements: tuple[str, ...]
    component: str = ":"

    def get(self, index: int) -> str:
        """Element `index` (from 1), stripped; empty when absent."""
        return self.elements[index].strip() if index < len(self.elements) else ""

    def parts(self, index: int) -> list[str]:
        """Components of element `index`, stripped; [""] when absent."""
        return [part.strip() for part in self.get(index).split(self.component)]

    def require(self, index: int) -> str:
        """Element `index`.

        Raises:
            X12Fault: It is absent or empty.
        """
        value = self.get(index)
        if not value:
            raise X12Fault(Reason.MISSING_VALUE, f"{self.id}{index:02d} is missing.", self)
        return value


@dataclass(slots=True)
class TransactionSet:
    """ST to SE. `is_closed` says that SE was seen before the file, the group or the interchange ended."""

    index: int
    code: str
    version: str
    interchange_date: dt.date | None
    delimiters: Delimiters
    segments: list[Segment] = field(default_factory=list)
    is_closed: bool = False

    @property
    def num_claims(self) -> int:
        return sum(segment.id == "CLM" for segment in self.segments)

    @property
    def stated_segment_count(self) -> int | None:
        """SE01; None when it is not a number or the set is not closed."""
        count = self.segments[-1].get(1) if self.is_closed else ""
        return int(count) if count.isdecimal() else None


@dataclass(slots=True)
class Interchange:
    """All transaction sets of a file, and notes on what lay around them."""

    transactions: list[TransactionSet] = field(default_factory=list)
    notes: list[X12Fault] = field(default_factory=list)


def read_interchange(text: str) -> Interchange:
    """Split a file into transaction sets.

    Tolerates: newlines between segments, ids in small letters, an ISA that is not 106 characters wide, no ISA or GS
    at all, several interchanges in a row, a missing GE or IEA. Each is noted.

    Raises:
        X12Fault: BAD_ENVELOPE when no delimiters can be found, NO_CLAIMS when there is no ST segment,
            FILE_TOO_LARGE when there are too many segments.
    """
    result = Interchange()
    current: TransactionSet | None = None
    group_version, interchange_date, open_envelopes = "", None, [""]
    for segment, delimiters in _segments(text.lstrip("\ufeff \t\r\n"), result.notes):
        if segment.id in _ENVELOPE_IDS:
            current = None
            _track_envelope(segment, open_envelopes)
            if segment.id == "ISA":
                interchange_date = _interchange_date(segment.get(9))
            elif segment.id == "GS":
                group_version = segment.get(8)
        elif segment.id == "ST":
            version = segment.get(3) or group_version
            current = TransactionSet(
                len(result.transactions) + 1, segment.get(1), version, interchange_date, delimiters, [segment]
            )
            result.transactions.append(current)
        elif current is None:
            result.notes.append(
                X12Fault(Reason.STRAY_SEGMENT, "A segment outside any transaction set is passed over.", segment)
            )
        else:
            current.segments.append(segment)
            if segment.id == "SE":
                current.is_closed, current = True, None
    if not result.transactions:
        raise X12Fault(Reason.NO_CLAIMS, "The file holds no transaction set (no ST segment).")
    if open_envelopes != ["", "seen"]:
        result.notes.append(
            X12Fault(Reason.INCOMPLETE_ENVELOPE, "The ISA/GS/GE/IEA envelope is missing or not closed.")
        )
    return result


def _track_envelope(segment: Segment, open_envelopes: list[str]) -> None:
    """A stack of what is open; ["", "seen"] when everything that was opened is closed again."""
    if open_envelopes[-1] == "seen":
        open_envelopes.pop()
    if segment.id in ("ISA", "GS"):
        open_envelopes.append(segment.id)
    elif segment.id in ("GE", "IEA") and open_envelopes[-1] == {"GE": "GS", "IEA": "ISA"}[segment.id]:
        open_envelopes.pop()
        if open_envelopes == [""]:
            open_envelopes.append("seen")


def _segments(text: str, notes: list[X12Fault]) -> Iterator[tuple[Segment, Delimiters]]:
    position, number, delimiters = 0, 0, _delimiters(text)
    while position < len(text):
        if number and text.startswith("ISA", position):  # a further interchange may have delimiters of its own
            delimiters = _delimiters(text[position:])
        end = text.find(delimiters.terminator, position)
        chunk = text[position : end if end >= 0 else len(text)].strip()
        position = end + 1 if end >= 0 else len(text)
        while position < len(text) and text[position].isspace():
            position += 1
        if not chunk:
            continue
        number += 1
        if number > MAX_SEGMENTS_PER_FILE:
            raise X12Fault(Reason.FILE_TOO_LARGE, f"A file has at most {MAX_SEGMENTS_PER_FILE:,} segments.")
        if len(chunk) > MAX_SEGMENT_CHARS:
            raise X12Fault(Reason.BAD_ENVELOPE, f"Segment {number} is longer than {MAX_SEGMENT_CHARS} characters.")
        elements = tuple(chunk.split(delimiters.element))
        segment = Segment(number, elements[0].strip().upper(), elements, delimiters.component)
        if end < 0:
            # What follows the last terminator was cut off somewhere: it is never taken for a whole segment.
            notes.append(X12Fault(Reason.STRAY_SEGMENT, "The last segment has no terminator and is not read.", segment))
            return
        yield segment, delimiters


def _delimiters(text: str) -> Delimiters:
    if text[:3].upper() != "ISA":
        terminator = "~" if "~" in text else "\n"
        return Delimiters(element=text[2:3] or "*", terminator=terminator)
    element = text[3:4]
    fixed = text[:_ISA_CHARS]
    if len(fixed) == _ISA_CHARS and fixed.count(element) == _ISA_ELEMENTS and fixed[103] == element:
        component, terminator, repetition = fixed[104], fixed[105], fixed[82]
    else:
        pieces = text[: 4 * _ISA_CHARS].split(element, _ISA_ELEMENTS) if element else []
        if len(pieces) <= _ISA_ELEMENTS or len(pieces[-1]) < 2:
            raise X12Fault(Reason.BAD_ENVELOPE, "The ISA segment is cut short: no delimiters can be read from it.")
        component, terminator, repetition = pieces[-1][0], pieces[-1][1], pieces[11][:1] or "^"
    marks = {element, component, terminator}
    if len(marks) < 3 or any(mark.isalnum() or mark == " " for mark in marks):
        raise X12Fault(Reason.BAD_ENVELOPE, "The ISA segment does not name three distinct delimiters.")
    return Delimiters(element, component, repetition, terminator)


def _interchange_date(value: str) -> dt.date | None:
    return parse_date("20" + value) if len(value) == 6 else None


def parse_date(value: str) -> dt.date | None:
    """CCYYMMDD as a date; None when it is none."""
    if len(value) != 8 or not value.isascii() or not value.isdecimal():
        return None
    try:
        return dt.date(int(value[:4]), int(value[4:6]), int(value[6:]))
    except ValueError:
        return None


def parse_cents(value: str) -> int | None:
    """A non-negative X12 decimal with at most two places, in cents; None when it is none."""
    amount = parse_decimal(value)
    if amount is None or amount < 0 or amount != amount.quantize(Decimal("0.01")):
        return None
    return int(amount * 100)


def parse_decimal(value: str) -> Decimal | None:
    """An X12 decimal of at most 18 characters, digits and one point; None when it is none."""
    if len(value) > 18 or not value.isascii() or not value.lstrip("-").replace(".", "", 1).isdecimal():
        return None
    try:
        return Decimal(value)
    except InvalidOperation:
        return None

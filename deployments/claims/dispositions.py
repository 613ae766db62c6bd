"""What became of the parts of a file that did not simply become a claim. A closed set of reasons, no silent loss.

A detail names segments, elements and fields, never their values: a disposition may be logged.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from deployments.claims.model import Claim, StrictModel

MAX_NOTES_PER_FILE = 200


class Outcome(StrEnum):
    REFUSED = "refused"  # what the disposition stands for was not reviewed
    NOTED = "noted"  # it was read; the note says what was passed over


class Reason(StrEnum):
    # the whole file
    EMPTY_FILE = "empty_file"
    FILE_TOO_LARGE = "file_too_large"
    NOT_A_CLAIM_FILE = "not_a_claim_file"
    BAD_ENVELOPE = "bad_envelope"
    # a transaction set
    WRONG_TRANSACTION = "wrong_transaction"
    UNSUPPORTED_VERSION = "unsupported_version"
    NO_CLAIMS = "no_claims"
    TOO_MANY_CLAIMS = "too_many_claims"
    TOO_MANY_TRANSACTIONS = "too_many_transactions"
    # a claim (a truncated transaction refuses each of its claims)
    TRUNCATED = "truncated"
    MISSING_SEGMENT = "missing_segment"
    MISSING_VALUE = "missing_value"
    INVALID_VALUE = "invalid_value"
    BAD_JSON = "bad_json"
    # notes
    READ_LENIENTLY = "read_leniently"
    UNKNOWN_SEGMENT = "unknown_segment"
    STRAY_SEGMENT = "stray_segment"
    INCOMPLETE_ENVELOPE = "incomplete_envelope"
    SEGMENT_COUNT_MISMATCH = "segment_count_mismatch"
    LINES_RENUMBERED = "lines_renumbered"
    NOTES_SUPPRESSED = "notes_suppressed"


class Disposition(StrictModel):
    """One refusal or note.

    `num_claims` is how many claims of the file it refuses (0 for a note, and where no claim could be made out).
    Indices and numbers count from 1; `segment_number` counts the segments of the file, `line_number` its lines.
    """

    file: str
    outcome: Outcome
    reason: Reason
    detail: str = Field(min_length=1, max_length=300)
    num_claims: int = Field(default=0, ge=0)
    transaction_index: int | None = None
    claim_index: int | None = None
    claim_id: str | None = None
    segment_number: int | None = None
    segment_id: str | None = None
    line_number: int | None = None


class IntakeResult(StrictModel):
    """Everything one file held: claims to review and dispositions for the rest.

    Raises:
        ValidationError: A claim or a transaction is accounted for by nothing, or twice: a bug of intake.
    """

    file: str
    num_claims: int = Field(ge=0)
    num_transactions: int = Field(ge=0)
    claims: tuple[Claim, ...]
    dispositions: tuple[Disposition, ...]

    @model_validator(mode="after")
    def _everything_is_accounted_for(self) -> Self:
        if len(self.claims) + sum(d.num_claims for d in self.refusals) != self.num_claims:
            raise ValueError("claims read and claims refused do not add up to the claims of the file")
        indices = Counter(claim.source.claim_index for claim in self.claims)
        indices.update(d.claim_index for d in self.refusals if d.claim_index is not None)
        if indices and max(indices.values()) > 1:
            raise ValueError("a claim is accounted for twice")
        if not self.claims and not self.refusals:
            raise ValueError("a file leaves at least one claim or one refusal")
        return self

    @property
    def refusals(self) -> tuple[Disposition, ...]:
        return tuple(d for d in self.dispositions if d.outcome is Outcome.REFUSED)

    @property
    def notes(self) -> tuple[Disposition, ...]:
        return tuple(d for d in self.dispositions if d.outcome is Outcome.NOTED)

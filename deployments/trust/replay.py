"""`zoneserve audit replay`: a review done again by a running deployment, held against its record in the audit log.

What a claim or a review says is never shown: names of fields and records, digests' names, and of a review's values
only the words that its schema lists.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.claims.intake import MAX_FILE_BYTES, ClaimIntake
from deployments.claims.model import Pseudonymiser, canonical_sha256
from deployments.claims.review_schema import review_schema
from deployments.local import Endpoint
from deployments.review_client import EncodedFile, submit
from deployments.trust.audit.chain import CHAIN_KEY_INFO, Fault, Record
from deployments.trust.audit.files import AuditDirectory
from deployments.trust.audit.verify import merged, verify
from deployments.trust.keyring import Keyring
from deployments.trust.review_record import (
    CONDITIONS,
    CONTENT_KEY_INFO,
    PSEUDONYM_KEY_INFO,
    RESULTS,
    keyed_digest,
    output_digest,
)
from deployments.trust.tokens import MAX_TOKEN_CHARS
from engine.block_hash import derive_key

VERIFY_TRIES = 5  # a line may be half written while its log is read
VERIFY_PAUSE_S = 0.2
MAX_REVIEW_BYTES = 1 << 20
# A model that was not reached or was late says nothing about what it would have said.
TRANSIENT_OUTCOMES = frozenset({"model_error", "model_timeout"})
NOT_COMPARED = ("created", "narrative_ref")  # of a stored review: when it was made, and what its file is called


class NotComparable(Exception):
    """The two runs cannot be held against each other; the message says why and repeats nothing of a claim."""


@dataclass(frozen=True, slots=True)
class RecordName:
    """Which record is meant, as `audit show` prints log and number."""

    stream: str
    seq: int

    @staticmethod
    def of(record: Record) -> RecordName:
        return RecordName(record.stream, record.seq)

    @staticmethod
    def parse(text: str) -> RecordName:
        """Of `LOG:SEQ`. Raises ValueError."""
        stream, _, seq = text.rpartition(":")
        if not (stream and seq.isascii() and seq.isdigit() and len(seq) <= 16):
            raise ValueError("a record is LOG:SEQ")
        return RecordName(stream, int(seq))

    def __str__(self) -> str:
        return f"{self.stream}:{self.seq}"


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it.

    Attributes:
        difference: The first of `RESULTS` that the records do not share; None where they share all.
        stored_difference: Where the stored review first differs from the replayed one; None where nowhere, or where
            none was given.
        is_stored_recorded: The stored review is the one that the record is of; None where none was given.
    """

    recorded: Record
    replayed: Record
    difference: str | None
    stored_difference: str | None = None
    is_stored_recorded: bool | None = None

    @property
    def is_identical(self) -> bool:
        return self.difference is None and self.stored_difference is None and self.is_stored_recorded is not False


def lines(result: Replay) -> Iterator[str]:
    """What is told of it, without a word of content."""
    recorded = RecordName.of(result.recorded)
    yield f"recorded as {recorded}, now {RecordName.of(result.replayed)}; the same: {', '.join(CONDITIONS)}"
    if result.is_identical:
        yield f"identical: {', '.join(RESULTS)}"
        return
    match result.difference:
        case None:
            yield "the replayed review is the one that was recorded"
        case "action" | "outcome" as name:
            yield f"different: {name}: {result.recorded.fields[name]} was recorded, now {result.replayed.fields[name]}"
        case "prompt_digest":
            yield "different: prompt_digest: other claims came before it in the call, or the plan's text is another"
        case name:
            yield f"different: {name}"
    if result.is_stored_recorded is False:
        yield "the stored review is not the one that was recorded"
    if result.stored_difference is not None:
        yield f"the stored review first differs at {result.stored_difference}"


class AuditedReviews:
    """The `review.complete` records of a directory of logs."""

    def __init__(self, directory: Path, keyring: Keyring, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._directory = directory
        self._keys = keyring.derive(CHAIN_KEY_INFO)
        self._sleep = sleep

    def of(self, review_id: str) -> list[Record]:
        """By time, oldest first.

        Raises:
            NotComparable: A log is not intact. AuditError: The directory cannot be read.
        """
        with closing(AuditDirectory(self._directory)) as directory:
            for left in reversed(range(VERIFY_TRIES)):
                result = verify(directory, self._keys)
                if result.counts.keys() != {Fault.TORN} or not left:
                    break
                self._sleep(VERIFY_PAUSE_S)
            if not result.is_intact:
                raise NotComparable("the audit logs are not intact, and prove nothing: see `zoneserve audit verify`")
            return [
                record
                for record in merged(directory, result)
                if record.event == "review.complete" and record.fields["review_id"] == review_id
            ]


def replay(
    review_id: str,
    *,
    reviews: AuditedReviews,
    keyring: Keyring,
    files: Sequence[EncodedFile],
    endpoint: Endpoint,
    record: RecordName | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Replay:
    """Do the review again and compare. The deployment reviews every claim of `files`, and audits each.

    Args:
        files: All files of the call that the review was part of, in their order: what came before a claim is part of
            its review.
        record: Which record of the review counts; None: the oldest.
        stored: The review as it was handed out.

    Raises:
        NotComparable: With the reason. ReviewClientError: The deployment does not answer. AuditError: The logs cannot
            be read.
    """
    if stored is not None and stored.get("review_id") != review_id:
        raise NotComparable("the stored review has another review_id")
    known = reviews.of(review_id)
    recorded = _chosen(known, record)
    claims = ClaimDigests(files, str(recorded.fields.get("tenant", "")), keyring)
    content_key, claim_digest = claims.recorded_as(recorded)
    events = submit(list(files), endpoint, plan=str(recorded.fields["plan"]))
    review = _review_of(events, review_id, claim_digest, claims)
    before = {RecordName.of(item) for item in known}
    new = [item for item in reviews.of(review["review_id"]) if RecordName.of(item) not in before]
    replayed = next((item for item in new if item.fields["output_digest"] == output_digest(content_key, review)), None)
    if replayed is None:
        raise NotComparable(
            "the replay left no record in these logs: they are not those of the deployment, or it has another master "
            "key by now"
        )
    difference = compare(recorded, replayed)
    if stored is None:
        return Replay(recorded, replayed, difference)
    # The file may have been renamed where it was written, and its own name is in it.
    as_recorded = {**stored, "narrative_ref": review["narrative_ref"]}
    is_recorded = output_digest(content_key, as_recorded) == recorded.fields["output_digest"]
    return Replay(recorded, replayed, difference, first_difference(stored, review), is_recorded)


def _chosen(known: Sequence[Record], record: RecordName | None) -> Record:
    chosen = [item for item in known if record is None or RecordName.of(item) == record]
    if not chosen:
        raise NotComparable(
            "the audit logs hold no record of this review"
            if record is None
            else f"{record} is no record of this review"
        )
    if missing := [name for name in (*CONDITIONS, *RESULTS, "claim_digest", "tenant") if name not in chosen[0].fields]:
        raise NotComparable(f"the record does not have {', '.join(missing)}")
    return chosen[0]


class ClaimDigests:
    """The claims of files as each master key of the ring makes them: a member's pseudonym, and so the claim's digest,
    follow the key."""

    def __init__(self, files: Sequence[EncodedFile], tenant: str, keyring: Keyring) -> None:
        self._by_key = {
            master_key: [
                claim.digest
                for file in files
                for claim in ClaimIntake(Pseudonymiser(derive_key(master_key, PSEUDONYM_KEY_INFO), tenant))
                .read_bytes(base64.b64decode(file["content_base64"])[: MAX_FILE_BYTES + 1], name=file["name"])
                .claims
            ]
            for master_key in keyring.keys
        }

    def recorded_as(self, record: Record) -> tuple[bytes, str]:
        """Content key and plain digest of the claim that the record is of.

        Raises:
            NotComparable: None of them is.
        """
        for master_key, digests in self._by_key.items():
            content_key = derive_key(master_key, CONTENT_KEY_INFO)
            for digest in digests:
                if keyed_digest(content_key, digest) == record.fields["claim_digest"]:
                    return content_key, digest
        num_claims = len(next(iter(self._by_key.values())))
        raise NotComparable(
            f"the claim of the record is not among the {num_claims} given: another file, a claim that has been "
            "changed, or a master key that has left the key file"
        )

    def same_claim(self, digest: str) -> frozenset[str]:
        """Each key's digest of the claim with this one under some key."""
        places = {place for digests in self._by_key.values() for place, found in enumerate(digests) if found == digest}
        return frozenset(digests[place] for digests in self._by_key.values() for place in places)


def _review_of(
    events: Iterable[Mapping[str, Any]], review_id: str, claim_digest: str, claims: ClaimDigests
) -> dict[str, Any]:
    """The replayed review of the claim, among those of the whole call."""
    same_claim = claims.same_claim(claim_digest)
    found = [
        event["review"]
        for event in events
        if event["type"] == "review" and event["review"]["provenance"]["claim_digest"] in same_claim
    ]
    if not found:
        raise NotComparable(
            "the deployment reviewed no such claim: the bearer key is another tenant's, or its master key another"
        )
    if any(review["provenance"]["claim_digest"] != claim_digest for review in found):
        raise NotComparable("the deployment has another master key by now: members have other pseudonyms")
    named = [review for review in found if review["review_id"] == review_id] or found
    if len(named) > 1:
        raise NotComparable(f"the files hold this claim {len(named)} times, and none of its reviews has this id by now")
    return dict(named[0])


def compare(recorded: Record, replayed: Record) -> str | None:
    """The first of `RESULTS` in which two records differ.

    Raises:
        NotComparable: They were made under other conditions, or a model did not answer.
    """
    other = [name for name in CONDITIONS if recorded.fields[name] != replayed.fields[name]]
    if other:
        raise NotComparable(f"not made under the same conditions: {', '.join(other)}")
    outcomes = {recorded.fields["outcome"], replayed.fields["outcome"]}
    if len(outcomes) > 1 and outcomes & TRANSIENT_OUTCOMES:
        raise NotComparable(
            f"the model did not answer in one of them: {recorded.fields['outcome']} was recorded, "
            f"{replayed.fields['outcome']} came now"
        )
    return next((name for name in RESULTS if recorded.fields[name] != replayed.fields[name]), None)


# -- files


def read_bearer_key(path: Path) -> str:
    """
    Raises:
        NotComparable: It cannot be read, or holds what is no key: an HTTP client would repeat it in its complaint.
    """
    try:
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise NotComparable(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise NotComparable(f"{path}: not a bearer key") from None
    if not key.isprintable() or " " in key or not 1 <= len(key) <= MAX_TOKEN_CHARS:
        raise NotComparable(f"{path}: not a bearer key")
    return key


def read_review(path: Path) -> dict[str, Any]:
    """
    Raises:
        NotComparable: It cannot be read, or is no review.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_REVIEW_BYTES + 1)
        if len(data) > MAX_REVIEW_BYTES:
            raise NotComparable(f"{path}: larger than {MAX_REVIEW_BYTES} bytes")
        document = json.loads(data)
        canonical_sha256(document)  # so that its digest can be made: no NaN, not too deep
    except OSError as error:
        raise NotComparable(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        raise NotComparable(f"{path}: not a review in JSON") from None
    if not isinstance(document, dict):
        raise NotComparable(f"{path}: not a review in JSON")
    return document


# -- two reviews


def first_difference(stored: Mapping[str, Any], replayed: Mapping[str, Any]) -> str | None:
    """Where two reviews first differ, in the order of a review's fields: `flags[0].status: confirmed, now refuted`.

    Ids that follow from all the rest come last. Values are told where both are words of the schema.
    """
    # `review_id` is among the first fields and differs wherever anything does.
    ordered = {name: replayed[name] for name in replayed if name not in ("review_id", "provenance")}
    ordered |= {name: replayed[name] for name in ("provenance", "review_id") if name in replayed}
    told = {name: value for name, value in stored.items() if name not in NOT_COMPARED}
    now = {name: value for name, value in ordered.items() if name not in NOT_COMPARED}
    return next(_differences(told, now, ""), None)


def _differences(stored: object, replayed: object, path: str) -> Iterator[str]:
    match stored, replayed:
        case dict(), dict():
            for name, value in replayed.items():
                inner = f"{path}.{name}".removeprefix(".")
                if name in stored:
                    yield from _differences(stored[name], value, inner)
                else:
                    yield f"{inner}: missing"
            if stored.keys() - replayed.keys():  # what it is called is nobody's word
                yield f"{path or 'the review'}: has a field that it should not have"
        case list(), list():
            for index, (old, new) in enumerate(zip(stored, replayed, strict=False)):
                yield from _differences(old, new, f"{path}[{index}]")
            if len(stored) != len(replayed):
                yield f"{path}: {len(stored)} entries, now {len(replayed)}"
        case _ if type(stored) is not type(replayed) or stored != replayed:
            yield f"{path}: {stored}, now {replayed}" if _is_word(stored) and _is_word(replayed) else path


def _is_word(value: object) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value in _words(review_schema()))


def _words(schema: object) -> frozenset[str]:
    """Everything that a schema lists as a value."""
    match schema:
        case {"enum": list(values)}:
            return frozenset(value for value in values if isinstance(value, str))
        case dict():
            return frozenset().union(*map(_words, schema.values()))
        case list():
            return frozenset().union(*map(_words, schema))
    return frozenset()

"""Two schemas: what the model may say about one claim, and what a finished review looks like.

The first is built for each request. Its constants and enums hold this claim's flags, lines and policy sections and
nothing else, so an answer that the decoder lets through cannot cite anything made up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

from jsonschema import Draft202012Validator

from deployments.claims.prompt import assessed
from deployments.claims.rules import Action, Finding

SCHEMA_VERSION = "zoneserve.review/1"

FlagStatus = Literal["confirmed", "suspected", "refuted"]
Level = Literal["low", "medium", "high"]

RISKS = ("none", "low", "medium", "high", "critical")
STATUSES: tuple[FlagStatus, ...] = ("confirmed", "suspected", "refuted")
LEVELS: tuple[Level, ...] = ("low", "medium", "high")
# With nothing flagged there is nothing to deny, adjust or investigate.
_CLEAN_RISKS = ("none", "low")
_CLEAN_ACTIONS = (Action.PAY.value, Action.PEND.value)

# Longest sentence for each number of assessed flags: about as many output tokens in all for one as for three.
_RATIONALE_CHARS = {1: 100, 2: 72, 3: 48}
_MIN_RATIONALE_CHARS = 20
# A sentence in plain ASCII: no quotes, no markup, no line breaks, hence nothing to escape or to inject.
_RATIONALE_BODY = "[A-Za-z0-9 ,;:$%()/.-]"

# Output tokens that everything but the rationales takes, with room: SmolLM2 takes 25, and 40 for each flag.
_FRAME_TOKENS = 32
_FLAG_FRAME_TOKENS = 48


class AnswerError(ValueError):
    """An answer that is not usable. `reason` is `invalid_json` or `schema_violation`."""

    def __init__(self, reason: Literal["invalid_json", "schema_violation"]) -> None:
        super().__init__(reason)
        self.reason: Literal["invalid_json", "schema_violation"] = reason


@dataclass(frozen=True, slots=True)
class Assessment:
    """The model's word on one flag. `line` is None where the flag concerns no line."""

    flag_id: str
    status: FlagStatus
    rationale: str
    line: int | None
    policy_section: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's word on the claim."""

    assessments: tuple[Assessment, ...]
    risk: str
    confidence: Level
    recommended_action: Action


def answer_schema(findings: Sequence[Finding]) -> dict[str, object]:
    """The JSON schema that constrains decoding for a claim with these findings, worst first.

    Uses what llguidance compiles: fixed property order, const, enum, prefixItems, pattern; nothing optional.
    """
    asked = assessed(findings)
    risks, actions = (RISKS, [action.value for action in Action]) if asked else (_CLEAN_RISKS, _CLEAN_ACTIONS)
    properties: dict[str, object] = {
        "risk": {"enum": list(risks)},
        "confidence": {"enum": list(LEVELS)},
        "recommended_action": {"enum": list(actions)},
    }
    if asked:
        items = [_assessment_schema(finding, _RATIONALE_CHARS[len(asked)]) for finding in asked]
        assessments = {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": len(items),
            "maxItems": len(items),
        }
        # First, so that risk and action are chosen after the reasons have been written.
        properties = {"assessments": assessments} | properties
    return _object(properties)


def _assessment_schema(finding: Finding, rationale_chars: int) -> dict[str, object]:
    least, most = _MIN_RATIONALE_CHARS - 3, rationale_chars - 3
    pattern = f"^[A-Z]{_RATIONALE_BODY}{{{least},{most}}}[A-Za-z0-9)%][.]$"
    properties: dict[str, object] = {
        "flag": {"const": finding.flag_id},
        # Before the status, for the same reason.
        "rationale": {"type": "string", "pattern": pattern},
        "status": {"enum": list(STATUSES)},
    }
    if finding.lines:
        properties["line"] = {"enum": list(finding.lines)}
    properties["policy_ref"] = {"enum": list(finding.policy_sections)}
    return _object(properties)


def _object(properties: dict[str, object]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def max_answer_tokens(findings: Sequence[Finding]) -> int:
    """Tokens within which every answer to `answer_schema` ends, at one token or less a character of rationale."""
    count = len(assessed(findings))
    return _FRAME_TOKENS + count * (_FLAG_FRAME_TOKENS + _RATIONALE_CHARS.get(count, 0))


def parse_answer(text: str, findings: Sequence[Finding]) -> Answer:
    """Read an answer, checked again here: whoever decoded it may not have been constrained.

    Raises:
        AnswerError: It is no JSON, or not an answer to this claim's schema.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise AnswerError("invalid_json") from None
    if not Draft202012Validator(answer_schema(findings)).is_valid(document):
        raise AnswerError("schema_violation")
    return Answer(
        assessments=tuple(
            Assessment(
                flag_id=item["flag"],
                status=item["status"],
                rationale=item["rationale"].strip(),
                line=item.get("line"),
                policy_section=item["policy_ref"],
            )
            for item in document.get("assessments", ())
        ),
        risk=document["risk"],
        confidence=document["confidence"],
        recommended_action=Action(document["recommended_action"]),
    )


@cache
def review_schema() -> dict[str, Any]:
    """The structured review, version 1: JSON Schema draft 2020-12, shipped as `review_v1.schema.json`."""
    text = (files(__package__) / "review_v1.schema.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))


@cache
def _review_validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(review_schema())
    return Draft202012Validator(review_schema())


def validate_review(review: Mapping[str, object]) -> None:
    """Check a finished review.

    Raises:
        ValueError: It does not follow the schema. The message names the place and the rule, never a value.
    """
    error = next(iter(_review_validator().iter_errors(review)), None)
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the review"
        raise ValueError(f"{place}: violates {error.validator}")

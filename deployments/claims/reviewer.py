"""Reviews one claim: rules, prompt, model, structured review, narrative. A claim is never lost to the model.

Whatever the model does (fails, is late, is cut, answers nonsense), the rules' review comes out and says that the
model abstained and why.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from deployments.claims.action import ActionDecision, decide_action, risk_category, risk_score
from deployments.claims.model import Claim, canonical_sha256
from deployments.claims.narrative import render_narrative
from deployments.claims.plan import Plan, load_plan
from deployments.claims.prompt import LabelledPrompt, assemble, slug
from deployments.claims.review_model import Generation, ReviewModel
from deployments.claims.review_schema import (
    SCHEMA_VERSION,
    Answer,
    AnswerError,
    Assessment,
    FlagStatus,
    answer_schema,
    max_answer_tokens,
    parse_answer,
    validate_review,
)
from deployments.claims.rules import Action, EditTable, Finding, Severity, amount_at_stake, evaluate, load_edit_table

MODEL_DEADLINE_S = 120.0
# How sure a finding is before anyone has looked, and what a contradiction or a refutation takes away.
_DECISIVE_CONFIDENCE = 0.98
_SUSPECTED_CONFIDENCE = 0.60
_CLEAN_CONFIDENCE = 0.90
_DISAGREEMENT_COST = 0.15

AbstainReason = Literal["model_error", "model_timeout", "output_cut", "invalid_json", "schema_violation"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model reviews, as the review records it. `revision` changes whenever its answers might."""

    id: str
    revision: str
    kv_profile: str = "plain"


@dataclass(frozen=True, slots=True)
class ReviewResult:
    """A finished review. `serving` holds what depends on the moment: times, and where it may be told, tokens by origin
    and bytes."""

    review: dict[str, Any]
    narrative_md: str
    serving: dict[str, Any]

    @property
    def file_stem(self) -> str:
        """Name for the files of this review, without a suffix."""
        return str(self.review["narrative_ref"]).removesuffix(".md")


class ClaimReviewer:
    """Reviews claims of any tenant under the plans it is given. Holds no state between reviews.

    Args:
        identity: Recorded in each review and part of its id.
        clock: The current time, aware; each review's `created`.
        rules: The edit table; None loads the one that ships.
        plans: Plan by name; None loads those that ship, by name.
        max_tokens: Upper bound on generated tokens, whatever the schema would allow.
        deadline_s: A model that takes longer has abstained.

    Raises:
        ValueError: A plan lacks a policy section that a rule cites.
    """

    def __init__(
        self,
        model: ReviewModel,
        *,
        identity: ModelIdentity,
        clock: Callable[[], dt.datetime],
        rules: EditTable | None = None,
        plans: Mapping[str, Plan] | None = None,
        max_tokens: int = 320,
        deadline_s: float = MODEL_DEADLINE_S,
    ) -> None:
        self._model = model
        self._identity = identity
        self._clock = clock
        self._table = rules or load_edit_table()
        self._plans = plans
        self._max_tokens = max_tokens
        self._deadline_s = deadline_s
        self._calls = itertools.count(1)
        for plan in (plans or {}).values():
            self._check(plan)

    async def review(
        self, claim: Claim, *, tenant: str, plan: str, history: Sequence[Claim] = (), file_stem: str | None = None
    ) -> ReviewResult:
        """Review one claim.

        Args:
            history: Claims received before it (see `history.with_history`).
            file_stem: Name for the review's files; by default made from the claim id, which two providers may share.

        Raises:
            ValueError: The tenant is no zone name, or there is no such plan.
        """
        book = self._plan(plan)
        findings = evaluate(
            claim,
            table=self._table,
            timely_filing_days=book.timely_filing_days,
            plan_ref=f"{book.name} filing limit",
            history=history,
        )
        prompt = assemble(claim, findings, history, tenant=tenant, plan=book)
        case = _Case(claim, findings, prompt, tenant, book, self._review_id(claim, tenant, book, prompt))
        generation, answer, abstained = await self._ask(case)
        review = self._compose(case, answer, abstained, file_stem or slug(claim.claim_id))
        validate_review(review)
        serving = _serving(generation)
        return ReviewResult(review, render_narrative(review, claim, self._table, serving), serving)

    def _plan(self, name: str) -> Plan:
        if self._plans is None:
            plan = load_plan(name)
            self._check(plan)
            return plan
        if name not in self._plans:
            raise ValueError(f"there is no plan {name!r}")
        return self._plans[name]

    def _check(self, plan: Plan) -> None:
        plan.require_sections(section for rule in self._table.rules.values() for section in rule.policy_sections)

    def _review_id(self, claim: Claim, tenant: str, plan: Plan, prompt: LabelledPrompt) -> str:
        """The same claim, history, rules, plan, prompt and model give the same id: delivered twice, reviewed once.

        History enters through the findings and the case text, both in the prompt.
        """
        parts = [tenant, plan.digest, claim.digest, self._table.digest, prompt.digest, *asdict(self._identity).values()]
        return canonical_sha256(parts)[:32]

    async def _ask(self, case: _Case) -> tuple[Generation | None, Answer | None, AbstainReason | None]:
        try:
            async with asyncio.timeout(self._deadline_s):
                generation = await self._model.generate(
                    case.prompt,
                    json_schema=answer_schema(case.findings),
                    max_tokens=min(self._max_tokens, max_answer_tokens(case.findings)),
                    # Two reviews of the same claim may run at once: the engine wants a name for each.
                    request_id=f"review-{case.review_id[:12]}-{next(self._calls)}",
                )
        except TimeoutError:
            return None, None, "model_timeout"
        except Exception as error:  # whatever keeps the model from answering, the rules' review goes out
            logger.warning("review %s: the model failed with %s", case.review_id, type(error).__name__)
            return None, None, "model_error"
        if generation.finish_reason != "stop":
            return generation, None, "output_cut"
        try:
            return generation, parse_answer(generation.text, case.findings), None
        except AnswerError as error:
            return generation, None, error.reason

    def _compose(
        self, case: _Case, answer: Answer | None, abstained: AbstainReason | None, file_stem: str
    ) -> dict[str, Any]:
        claim, findings = case.claim, case.findings
        said = {assessment.flag_id: assessment for assessment in answer.assessments} if answer else {}
        agreement = _agreement(findings, said)
        decision = decide_action(findings, answer.recommended_action if answer else None)
        score = risk_score(findings)
        return {
            "schema_version": SCHEMA_VERSION,
            "review_id": case.review_id,
            "claim_id": claim.claim_id,
            "claim_type": "professional",
            "tenant": case.tenant,
            "plan": case.plan.name,
            "zone": case.prompt.zone,
            "model": asdict(self._identity),
            "risk_category": risk_category(score),
            "risk_score": score,
            "confidence": _confidence(findings, answer, agreement),
            "flags": [_flag(finding, said.get(finding.flag_id), case.plan) for finding in findings],
            "projected_overpayment": _money(amount_at_stake(findings)),
            "recommended_action": decision.action.value,
            "action": _action(decision),
            "model_opinion": {"risk": answer.risk, "confidence": answer.confidence} if answer else None,
            "rules_model_agreement": agreement,
            "next_steps": _next_steps(findings, decision),
            "narrative_ref": f"{file_stem}.md",
            "provenance": {
                "claim_digest": claim.digest,
                "rules_digest": self._table.digest,
                "rules_revision": self._table.revision,
                "plan_digest": case.plan.digest,
                "prompt_digest": case.prompt.digest,
                "segments": [
                    {
                        "id": segment.id,
                        "zone": segment.zone,
                        "revision": segment.revision,
                        "source": segment.source,
                        "content_digest": segment.content_digest,
                    }
                    for segment in case.prompt.segments
                ],
                "tool_calls": [],
            },
            "abstained": abstained is not None,
            "abstained_reason": abstained,
            "created": self._clock().astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


@dataclass(frozen=True, slots=True)
class _Case:
    claim: Claim
    findings: tuple[Finding, ...]
    prompt: LabelledPrompt
    tenant: str
    plan: Plan
    review_id: str


def _flag(finding: Finding, said: Assessment | None, plan: Plan) -> dict[str, Any]:
    return {
        "id": finding.flag_id,
        "rule_id": finding.rule_id,
        "code": finding.code,
        "severity": finding.severity.label,
        "is_decisive": finding.is_decisive,
        "status": _status(finding, said),
        "lines": list(finding.lines),
        "summary": finding.summary,
        "evidence": [
            {"source": evidence.source, "ref": evidence.ref, "quote_sha256": evidence.quote_sha256}
            for evidence in finding.evidence
        ],
        "policy_refs": [asdict(plan.policy_ref(section)) for section in finding.policy_sections],
        "carc": finding.carc,
        "rarc": finding.rarc,
        "projected_overpayment": _money(finding.projected_overpayment_cents),
        "model": said
        and {
            "status": said.status,
            "rationale": said.rationale,
            "line": said.line,
            "policy_section": said.policy_section,
        },
    }


def _status(finding: Finding, said: Assessment | None) -> FlagStatus:
    """Decisive flags stand whatever the model says; of the others it may judge."""
    if finding.is_decisive:
        return "confirmed"
    return said.status if said is not None else "suspected"


def _agreement(findings: Sequence[Finding], said: Mapping[str, Assessment]) -> dict[str, Any]:
    contradicted, refuted = [], []
    for finding in findings:
        assessment = said.get(finding.flag_id)
        if assessment is None:
            continue
        if finding.is_decisive and assessment.status != "confirmed":
            contradicted.append(finding.flag_id)
        elif not finding.is_decisive and assessment.status == "refuted":
            refuted.append(finding.flag_id)
    return {
        "num_assessed": len(said),
        "num_agreed": len(said) - len(contradicted) - len(refuted),
        "contradicted": contradicted,
        "refuted": refuted,
    }


def _confidence(findings: Sequence[Finding], answer: Answer | None, agreement: Mapping[str, Any]) -> dict[str, Any]:
    """In the least certain flag; less where the model disagrees. Not calibrated: no outcomes to calibrate against."""
    value = min(
        (_DECISIVE_CONFIDENCE if finding.is_decisive else _SUSPECTED_CONFIDENCE for finding in findings),
        default=_CLEAN_CONFIDENCE,
    )
    value -= _DISAGREEMENT_COST * (len(agreement["contradicted"]) + len(agreement["refuted"]))
    return {"value": round(max(value, 0.0), 2), "basis": "both" if answer else "rules", "calibrated": False}


def _action(decision: ActionDecision) -> dict[str, Any]:
    return {
        "by_rules": decision.by_rules.value,
        "by_model": decision.by_model.value if decision.by_model else None,
        "raised_by_model": decision.raised_by_model,
        "needs_person": decision.needs_person,
    }


def _next_steps(findings: Sequence[Finding], decision: ActionDecision) -> list[dict[str, Any]]:
    """What the action as a whole asks for, then one step for each rule that found something, worst first."""
    steps: dict[str, list[str]] = {}
    if decision.by_rules is Action.ROUTE_SIU:
        grave = [finding.flag_id for finding in findings if finding.severity >= Severity.HIGH]
        grave = grave or [finding.flag_id for finding in findings]  # sent there for the amount
        steps["Send the claim to special investigations before any of it is paid."] = grave
    for finding in findings:
        steps.setdefault(finding.next_step, []).append(finding.flag_id)
    if not findings:
        return [{"text": "Pay the claim as billed.", "flags": []}]
    if decision.raised_by_model:
        text = "The model advises more care than the rules do: look at the suspected flags before deciding."
        steps[text] = [finding.flag_id for finding in findings if not finding.is_decisive]
    return [{"text": text, "flags": flags} for text, flags in steps.items()]


def _money(cents: int) -> dict[str, Any]:
    return {"cents": cents, "currency": "USD"}


def _serving(generation: Generation | None) -> dict[str, Any]:
    answered = generation or Generation(text="", finish_reason="error")
    reuse = {"prompt_tokens_by_origin": answered.prompt_tokens_by_origin, "pushed_bytes": answered.pushed_bytes}
    return {
        "finish_reason": answered.finish_reason,
        "prompt_tokens": answered.usage.prompt_tokens,
        "completion_tokens": answered.usage.completion_tokens,
        "ttft_s": answered.ttft_s,
        "e2e_s": answered.e2e_s,
        **{name: value for name, value in reuse.items() if value is not None},
    }

"""Risk and recommended action, computed from the rules' findings. Pure policy; the model can only add caution.

Nobody here denies: DENY_LINE and ROUTE_SIU are recommendations that the rules alone can make, and every action but PAY
waits for a person. A model's suggestion raises the action only where a suspected flag leaves something to weigh, and no
further than asking for records: with no flag, or with decisive ones alone, it is recorded and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.claims.rules import Action, Finding, Severity, amount_at_stake

# Chance that a flag of this severity is right and matters, as the risk score counts it. Judgement, not measurement.
_WEIGHT = {Severity.LOW: 0.10, Severity.MEDIUM: 0.30, Severity.HIGH: 0.60, Severity.CRITICAL: 0.85}
_SUSPECTED_SHARE = 0.6  # a suspected flag weighs this much of a decisive one
_CATEGORY_FROM = ((0.80, "critical"), (0.45, "high"), (0.15, "medium"))
_SIU_NUM_RULES = 2  # so many different decisive rules of high severity on one claim ...
_SIU_CENTS = 500_000  # ... or so much at stake
_HIGHEST_RAISE = Action.REQUEST_RECORDS


@dataclass(frozen=True, slots=True)
class ActionDecision:
    """The action and who it is from. `by_model` is None when there was no usable answer."""

    action: Action
    by_rules: Action
    by_model: Action | None

    @property
    def raised_by_model(self) -> bool:
        return self.action is not self.by_rules

    @property
    def needs_person(self) -> bool:
        return self.action is not Action.PAY


def risk_score(findings: Sequence[Finding]) -> float:
    """Chance that at least one flag is right and matters, the flags taken as independent; 0 to 1, two decimals."""
    clear = 1.0
    for finding in findings:
        clear *= 1 - _WEIGHT[finding.severity] * (1 if finding.is_decisive else _SUSPECTED_SHARE)
    return round(1 - clear, 2)


def risk_category(score: float) -> str:
    """none, low, medium, high or critical."""
    if score <= 0:
        return "none"
    return next((name for bound, name in _CATEGORY_FROM if score >= bound), "low")


def action_by_rules(findings: Sequence[Finding]) -> Action:
    """The most careful action that any finding asks for; SIU for several grave ones or a large amount."""
    grave = {finding.rule_id for finding in findings if finding.is_decisive and finding.severity >= Severity.HIGH}
    if len(grave) >= _SIU_NUM_RULES or amount_at_stake(findings) >= _SIU_CENTS:
        return Action.ROUTE_SIU
    return max((finding.action for finding in findings), key=lambda action: action.rank, default=Action.PAY)


def decide_action(findings: Sequence[Finding], suggestion: Action | None) -> ActionDecision:
    """Combine the rules' action with the model's suggestion."""
    by_rules = action_by_rules(findings)
    action = by_rules
    if suggestion is not None and not all(finding.is_decisive for finding in findings):
        action = max(by_rules, min(suggestion, _HIGHEST_RAISE, key=_rank), key=_rank)
    return ActionDecision(action, by_rules, suggestion)


def _rank(action: Action) -> int:
    return action.rank

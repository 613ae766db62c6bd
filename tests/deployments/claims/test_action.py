import itertools

import pytest

from deployments.claims.action import action_by_rules, decide_action, risk_category, risk_score
from deployments.claims.rules import Action, evaluate, load_edit_table
from tests.deployments.claims.builders import INVALID_NPI, RECEIVED, claim, line

LATE = RECEIVED.replace(year=2024)


def findings_of(*lines, history=(), **values):
    return evaluate(
        claim(*lines, **values), table=load_edit_table(), timely_filing_days=365, plan_ref="plan", history=history
    )


CLEAN = findings_of()
SUSPECTED = findings_of(line(1, "20610"), line(2, "96372"))
CLERICAL = findings_of(line(diagnosis_pointers=(2,)))
OVER_LIMIT = findings_of(line(1, "97110", units=9))
DUPLICATE = findings_of(history=[claim(claim_id="C-0")])
TWO_GRAVE = findings_of(line(1, "97110", units=9, day=LATE))
INVALID = findings_of(billing_npi=INVALID_NPI)
EXPENSIVE = findings_of(line(charge_cents=500_000, day=LATE))


@pytest.mark.parametrize(
    ("found", "category", "action"),
    [
        (CLEAN, "none", Action.PAY),
        (CLERICAL, "low", Action.PEND),
        (SUSPECTED, "medium", Action.REQUEST_RECORDS),
        (OVER_LIMIT, "high", Action.PAY_ADJUSTED),
        (DUPLICATE, "high", Action.DENY_LINE),
        (INVALID, "critical", Action.PEND),
        (TWO_GRAVE, "critical", Action.ROUTE_SIU),
        (EXPENSIVE, "high", Action.ROUTE_SIU),
    ],
)
def test_risk_and_action_follow_from_the_flags(found, category, action):
    assert risk_category(risk_score(found)) == category
    assert action_by_rules(found) is action
    assert decide_action(found, None).action is action


EVERY = [CLEAN, CLERICAL, SUSPECTED, OVER_LIMIT, DUPLICATE, INVALID, TWO_GRAVE]


@pytest.mark.parametrize(("found", "suggestion"), list(itertools.product(EVERY, Action)))
def test_the_model_never_lowers_an_action_and_never_denies(found, suggestion):
    decision = decide_action(found, suggestion)
    assert decision.action.rank >= decision.by_rules.rank
    if decision.raised_by_model:
        assert decision.action.rank <= Action.REQUEST_RECORDS.rank
    assert decision.by_model is suggestion
    assert decision.needs_person == (decision.action is not Action.PAY)


@pytest.mark.parametrize("found", [CLEAN, OVER_LIMIT, CLERICAL])
def test_without_a_suspected_flag_a_suggestion_changes_nothing(found):
    for suggestion in Action:
        assert not decide_action(found, suggestion).raised_by_model


def test_a_suspected_flag_lets_the_model_raise_to_asking_for_records():
    addon = findings_of(line(1, "90472"))
    assert action_by_rules(addon) is Action.PEND
    for suggestion in (Action.REQUEST_RECORDS, Action.DENY_LINE, Action.ROUTE_SIU):
        decision = decide_action(addon, suggestion)
        assert (decision.action, decision.raised_by_model) == (Action.REQUEST_RECORDS, True)
    assert not decide_action(addon, Action.PAY).raised_by_model


def test_more_flags_never_lower_the_risk():
    for found in (TWO_GRAVE, SUSPECTED, INVALID):
        scores = [risk_score(found[:count]) for count in range(len(found) + 1)]
        assert scores == sorted(scores)
        assert all(0 <= score <= 1 for score in scores)

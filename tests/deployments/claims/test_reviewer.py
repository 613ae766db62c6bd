import asyncio
import copy
import datetime as dt
from dataclasses import replace

import pytest

from deployments.claims.plan import load_plan
from deployments.claims.review_model import Generation
from deployments.claims.review_schema import validate_review
from deployments.claims.reviewer import ClaimReviewer, ModelIdentity
from deployments.claims.scripted_model import ScriptedReviewModel
from tests.deployments.claims.builders import claim, line

NOW = dt.datetime(2026, 10, 6, 9, 30, tzinfo=dt.timezone(dt.timedelta(hours=2)))
IDENTITY = ModelIdentity("scripted", "1")


def reviewer(model=None, **values):
    values = {"identity": IDENTITY, "clock": lambda: NOW} | values
    return ClaimReviewer(model or ScriptedReviewModel(), **values)


def review(subject=None, model=None, *, history=(), tenant="acme", plan="synthetic-ppo", **values):
    coroutine = reviewer(model, **values).review(subject or claim(), tenant=tenant, plan=plan, history=history)
    return asyncio.run(coroutine)


class FixedModel:
    """Says one thing, whatever it is asked."""

    def __init__(self, text, finish_reason="stop"):
        self._generation = Generation(text, finish_reason)

    async def generate(self, prompt, *, json_schema, max_tokens, request_id):
        return self._generation


def answer(*statuses, action="pay", line_number=None, policy="S4", risk="low"):
    items = ", ".join(
        f'{{"flag": "F{number}", "rationale": "The claim shows the units plainly.", "status": "{status}",'
        f' "line": {line_number or 1}, "policy_ref": "{policy}"}}'
        for number, status in enumerate(statuses, start=1)
    )
    return FixedModel(
        f'{{"assessments": [{items}], "risk": "{risk}", "confidence": "low", "recommended_action": "{action}"}}'
    )


OVER_LIMIT = claim(line(1, "97110", units=9))
ADD_ON = claim(line(1, "90472"))


def test_a_review_carries_what_the_schema_asks_for():
    result = review(OVER_LIMIT)
    assert result.review["created"] == "2026-10-06T07:30:00Z"
    assert result.review["zone"].startswith("tenant/acme/case/claim-")
    assert result.review["model"] == {"id": "scripted", "revision": "1", "kv_profile": "plain"}
    assert result.review["narrative_ref"] == "c-1.md"
    assert result.file_stem == "c-1"
    assert not result.review["abstained"]
    assert result.review["confidence"]["basis"] == "both"


def test_the_same_claim_has_the_same_review_twice():
    assert review(OVER_LIMIT).review == review(OVER_LIMIT).review


@pytest.mark.parametrize(
    "values",
    [
        {"tenant": "other"},
        {"identity": ModelIdentity("scripted", "2")},
        {"identity": ModelIdentity("scripted", "1", "int8")},
        {"history": (claim(line(1, "97110", units=9), claim_id="C-0"),)},
        {"subject": claim(line(1, "97110", units=10))},
        {"subject": claim(line(1, "97110", units=9), plan_code="UNPROMPTED")},
    ],
    ids=["tenant", "model revision", "kv profile", "history", "claim", "what the prompt leaves out"],
)
def test_the_review_id_follows_everything_a_review_depends_on(values):
    base = review(OVER_LIMIT).review["review_id"]
    assert review(**({"subject": OVER_LIMIT} | values)).review["review_id"] != base


def test_the_clock_is_no_part_of_the_review_id():
    later = review(OVER_LIMIT, clock=lambda: NOW + dt.timedelta(days=1))
    assert later.review["review_id"] == review(OVER_LIMIT).review["review_id"]


def test_each_call_has_a_request_id_of_its_own():
    model = ScriptedReviewModel()
    one = reviewer(model)

    async def twice():
        return await asyncio.gather(*(one.review(OVER_LIMIT, tenant="acme", plan="synthetic-ppo") for _ in range(2)))

    first, second = asyncio.run(twice())
    assert first.review == second.review
    assert len(set(model.request_ids)) == 2


def test_the_callers_bound_on_tokens_holds():
    model = ScriptedReviewModel()
    review(OVER_LIMIT, model, max_tokens=10)
    review(OVER_LIMIT, model, max_tokens=10_000)
    assert model.max_tokens[0] == 10
    assert 100 < model.max_tokens[1] < 320


# The model and the rules


def test_a_decisive_flag_stands_when_the_model_refutes_it():
    result = review(OVER_LIMIT, answer("refuted", action="pay")).review
    (flag,) = result["flags"]
    assert (flag["status"], flag["model"]["status"]) == ("confirmed", "refuted")
    assert result["rules_model_agreement"] == {
        "num_assessed": 1,
        "num_agreed": 0,
        "contradicted": ["F1"],
        "refuted": [],
    }
    assert result["recommended_action"] == "pay_adjusted"
    assert result["confidence"]["value"] < review(OVER_LIMIT, answer("confirmed")).review["confidence"]["value"]


@pytest.mark.parametrize("status", ["confirmed", "suspected", "refuted"])
def test_the_model_may_judge_a_suspected_flag_and_lowers_no_action_by_it(status):
    result = review(ADD_ON, answer(status, policy="S2")).review
    assert result["flags"][0]["status"] == status
    assert result["recommended_action"] == "pend"
    assert result["rules_model_agreement"]["refuted"] == (["F1"] if status == "refuted" else [])


def test_a_raise_is_recorded_and_becomes_a_next_step():
    result = review(ADD_ON, answer("confirmed", policy="S2", action="deny_line")).review
    assert result["recommended_action"] == "request_records"
    assert result["action"] == {
        "by_rules": "pend",
        "by_model": "deny_line",
        "raised_by_model": True,
        "needs_person": True,
    }
    assert "more care" in result["next_steps"][-1]["text"]


@pytest.mark.parametrize(
    "subject",
    [
        claim(line(1, "97110", units=9, day=dt.date(2024, 1, 5))),
        claim(line(1, "20610", charge_cents=1), line(2, "96372", charge_cents=600_000)),
    ],
    ids=["several grave flags", "a large amount"],
)
def test_a_claim_for_investigators_says_so_in_its_first_step(subject):
    result = review(subject).review
    assert result["recommended_action"] == "route_siu"
    assert "special investigations" in result["next_steps"][0]["text"]
    assert result["next_steps"][0]["flags"]


def test_the_models_risk_is_recorded_and_not_acted_on():
    result = review(OVER_LIMIT, answer("confirmed", risk="none")).review
    assert result["model_opinion"]["risk"] == "none"
    assert result["risk_category"] == "high"


def test_amounts_and_codes_are_the_rules_whoever_answers():
    keys = ("id", "rule_id", "code", "lines", "carc", "rarc", "projected_overpayment", "evidence", "policy_refs")
    by_model, by_rules = (
        [{key: flag[key] for key in keys} for flag in review(OVER_LIMIT, model).review["flags"]]
        for model in (ScriptedReviewModel(), ScriptedReviewModel(["raise"]))
    )
    assert by_model == by_rules


# The model fails


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ScriptedReviewModel(["raise"]), "model_error"),
        (ScriptedReviewModel(["hang"]), "model_timeout"),
        (ScriptedReviewModel(["cut"]), "output_cut"),
        (ScriptedReviewModel(["garbage"]), "invalid_json"),
        (ScriptedReviewModel(["invented"]), "schema_violation"),
        (FixedModel("", "abort"), "output_cut"),
        (FixedModel("{}"), "schema_violation"),
    ],
)
def test_a_claim_is_reviewed_by_the_rules_when_the_model_fails(model, reason):
    result = review(OVER_LIMIT, model, deadline_s=0.05)
    assert result.review["abstained"]
    assert result.review["abstained_reason"] == reason
    assert result.review["confidence"]["basis"] == "rules"
    assert result.review["model_opinion"] is None
    assert result.review["flags"][0]["model"] is None
    assert result.review["recommended_action"] == "pay_adjusted"
    assert "rests on the rules alone" in result.narrative_md
    assert {"finish_reason", "prompt_tokens", "completion_tokens", "ttft_s", "e2e_s"} <= set(result.serving)


@pytest.mark.parametrize(
    "reuse", [None, {"shared": 7, "decode_cache": 1234, "prefill_computed": 5, "prefill_cache": 0}]
)
def test_where_tokens_came_from_is_said_only_where_the_model_tells_it(reuse):
    class Told(ScriptedReviewModel):
        async def generate(self, prompt, **values):
            generation = await super().generate(prompt, **values)
            pushed_bytes = None if reuse is None else 77
            return replace(generation, prompt_tokens_by_origin=reuse, pushed_bytes=pushed_bytes)

    result = review(OVER_LIMIT, Told())
    footer = result.narrative_md.splitlines()[-1]
    assert footer.startswith(f"- prompt tokens {result.serving['prompt_tokens']}")
    if reuse is None:
        assert set(result.serving) == {"finish_reason", "prompt_tokens", "completion_tokens", "ttft_s", "e2e_s"}
        assert footer.split()[-1] == str(result.serving["prompt_tokens"])
        assert "cache" not in result.narrative_md
    else:
        assert (result.serving["prompt_tokens_by_origin"], result.serving["pushed_bytes"]) == (reuse, 77)
        assert footer.endswith(": 7 of shared text, 1234 cached on decode, 5 computed on prefill")


def test_an_abstained_review_of_a_clean_claim_is_still_one():
    result = review(claim(), ScriptedReviewModel(["raise"]))
    assert result.review["recommended_action"] == "pay"
    assert "rests on the rules alone" in result.narrative_md


def test_a_failing_model_loses_no_claim_of_a_batch():
    model = ScriptedReviewModel(["answer", "raise", "garbage", "cut"])
    one = reviewer(model)

    async def batch():
        claims = [claim(line(1, "97110", units=9), claim_id=f"C-{n}") for n in range(8)]
        return await asyncio.gather(*(one.review(item, tenant="acme", plan="synthetic-ppo") for item in claims))

    results = asyncio.run(batch())
    assert [result.review["claim_id"] for result in results] == [f"C-{n}" for n in range(8)]
    assert sum(result.review["abstained"] for result in results) == 6


def test_cancelling_a_review_cancels_it():
    async def run():
        task = asyncio.create_task(
            reviewer(ScriptedReviewModel(["hang"])).review(claim(), tenant="acme", plan="synthetic-ppo")
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


# Refusals


def test_a_bad_tenant_and_an_unknown_plan_are_refused():
    with pytest.raises(ValueError, match="zone path"):
        review(tenant="A/B")
    with pytest.raises(ValueError, match="there is no plan"):
        review(plan="nope")
    with pytest.raises(ValueError, match="there is no plan"):
        review(plan="nope", plans={"synthetic-ppo": load_plan("synthetic-ppo")})


def test_no_review_goes_out_that_its_schema_refuses():
    coroutine = reviewer().review(claim(), tenant="acme", plan="synthetic-ppo", file_stem="../escape")
    with pytest.raises(ValueError, match="narrative_ref"):
        asyncio.run(coroutine)


def with_change(document, path, value):
    changed = copy.deepcopy(document)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), "2"),
        (("surprise",), 1),
        (("risk_score",), 1.5),
        (("recommended_action",), "approve"),
        (("recommended_action",), "pay"),  # but a person is said to be needed
        (("flags", 0, "status"), "refuted"),  # though decisive
        (("flags", 0, "projected_overpayment", "cents"), 1.5),
        (("flags", 0, "evidence"), []),
        (("abstained",), True),  # without a reason
        (("abstained_reason",), "model_error"),  # without having abstained
        (("narrative_ref",), "../escape.md"),
        (("created",), "2026-10-06"),
    ],
)
def test_the_review_schema_refuses_what_does_not_fit(path, value):
    document = review(OVER_LIMIT).review
    validate_review(document)
    with pytest.raises(ValueError, match="violates"):
        validate_review(with_change(document, path, value))

import json
from random import Random

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from deployments.claims.review_schema import (
    AnswerError,
    answer_schema,
    max_answer_tokens,
    parse_answer,
    review_schema,
)
from deployments.claims.rules import Action, evaluate, load_edit_table
from deployments.claims.scripted_model import value_of
from tests.deployments.claims.builders import INVALID_NPI, RECEIVED, claim, line

BYTES = LLTokenizer("byte")
# The separators that the engine's grammar compiler fixes.
OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def findings_of(*lines, **values):
    return evaluate(claim(*lines, **values), table=load_edit_table(), timely_filing_days=365, plan_ref="plan")


NONE = findings_of()
ONE = findings_of(line(1, "97110", units=9))
PAIR = findings_of(line(3, "20610"), line(7, "96372"))
NO_LINES = findings_of(total_charge_cents=1)
MANY = findings_of(
    line(1, "97110", units=9, day=RECEIVED.replace(year=2024)),
    line(2, "96372", diagnosis_pointers=(9,)),
    line(3, "20610"),
    billing_npi=INVALID_NPI,
)
CASES = {"none": NONE, "one": ONE, "pair": PAIR, "no lines": NO_LINES, "many": MANY}


def accepts(schema, text):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=OPTIONS)
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("found", CASES.values(), ids=CASES)
def test_llguidance_compiles_the_schema_and_takes_its_answers(found):
    schema = answer_schema(found)
    Draft202012Validator.check_schema(schema)
    for seed in range(10):
        text = json.dumps(value_of(schema, Random(seed)))
        assert accepts(schema, text)
        answer = parse_answer(text, found)
        assert [item.flag_id for item in answer.assessments] == [item.flag_id for item in found[:3]]
        assert len(text) <= max_answer_tokens(found) * 4


def changed(found, *keys, value):
    document = value_of(answer_schema(found), Random(0))
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("assessments", 0, "flag"), "F2"),
        (("assessments", 0, "line"), 1),
        (("assessments", 0, "line"), "3"),
        (("assessments", 0, "policy_ref"), "S4"),
        (("assessments", 0, "status"), "denied"),
        (("assessments", 0, "rationale"), "Too short."),
        (("assessments", 0, "rationale"), "A sentence that stops in the middle ."),
        (("assessments", 0, "rationale"), "A [link](http://x) in it, long enough to be a sentence."),
        (("assessments", 0, "rationale"), "A line break\nin it, long enough to be a sentence."),
        (("assessments", 0, "rationale"), "A sentence that never ends " + "and goes on " * 12 + "."),
        (("assessments", 0, "extra"), 1),
        (("assessments",), []),
        (("risk",), "extreme"),
        (("recommended_action",), "approve"),
        (("extra",), 1),
    ],
)
def test_what_was_made_up_is_refused_by_decoder_and_parser_alike(keys, value):
    text = changed(PAIR, *keys, value=value)
    assert not accepts(answer_schema(PAIR), text)
    with pytest.raises(AnswerError, match="schema_violation"):
        parse_answer(text, PAIR)


def test_the_enums_hold_this_claims_references_and_nothing_else():
    (item,) = answer_schema(PAIR)["properties"]["assessments"]["prefixItems"]
    assert item["properties"]["flag"] == {"const": "F1"}
    assert item["properties"]["line"] == {"enum": [3, 7]}
    assert item["properties"]["policy_ref"] == {"enum": ["S2", "S3"]}
    (item,) = answer_schema(NO_LINES)["properties"]["assessments"]["prefixItems"]
    assert "line" not in item["properties"]


def test_a_clean_claim_leaves_little_to_say():
    schema = answer_schema(NONE)
    assert list(schema["properties"]) == ["risk", "confidence", "recommended_action"]
    assert schema["properties"]["recommended_action"] == {"enum": ["pay", "pend"]}


def test_reasons_come_before_verdicts():
    schema = answer_schema(PAIR)
    assert next(iter(schema["properties"])) == "assessments"
    names = list(schema["properties"]["assessments"]["prefixItems"][0]["properties"])
    assert names.index("rationale") < names.index("status")


def test_at_most_three_flags_are_assessed_and_answers_stay_short():
    assert len(MANY) > 3
    assert len(answer_schema(MANY)["properties"]["assessments"]["prefixItems"]) == 3
    for found in CASES.values():
        longest = max(len(json.dumps(value_of(answer_schema(found), Random(seed)))) for seed in range(50))
        assert longest <= 560  # about 4 characters a token
        assert max_answer_tokens(found) <= 320


@pytest.mark.parametrize("text", ["", "{", "Sure!", '{"risk": "none"', "[" * 100_000])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(AnswerError, match="invalid_json"):
        parse_answer(text, NONE)


@pytest.mark.parametrize("text", ["[]", "null", '{"risk": "none"}', "NaN"])
def test_what_is_no_answer_is_refused(text):
    with pytest.raises(AnswerError, match="schema_violation"):
        parse_answer(text, NONE)


def test_an_answer_is_read_into_types():
    text = changed(PAIR, "recommended_action", value="route_siu")
    assert parse_answer(text, PAIR).recommended_action is Action.ROUTE_SIU


def test_the_shipped_review_schema_is_a_valid_schema_without_open_objects():
    Draft202012Validator.check_schema(review_schema())

    def walk(node):
        if isinstance(node, dict):
            if node.get("type") == "object" and "properties" in node and "required" in node:
                assert node["additionalProperties"] is False
                assert set(node["required"]) == set(node["properties"])
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(review_schema())

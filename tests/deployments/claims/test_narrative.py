import asyncio
import datetime as dt
import re

import pytest

from deployments.claims.model import Frequency
from deployments.claims.narrative import escape
from deployments.claims.reviewer import ClaimReviewer, ModelIdentity
from deployments.claims.rules import load_edit_table
from deployments.claims.scripted_model import ScriptedReviewModel
from tests.deployments.claims.builders import INVALID_NPI, RECEIVED, claim, line


def narrative(subject, script=("answer",)):
    reviewer = ClaimReviewer(
        ScriptedReviewModel(script),
        identity=ModelIdentity("scripted", "1"),
        clock=lambda: dt.datetime(2026, 10, 6, tzinfo=dt.UTC),
    )
    return asyncio.run(reviewer.review(subject, tenant="acme", plan="synthetic-ppo")).narrative_md


BUSY = claim(
    line(1, "97110", units=9, charge_cents=123_456, day=RECEIVED.replace(year=2024)),
    line(2, "96372", diagnosis_pointers=(9,)),
    line(3, "20610"),
    billing_npi=INVALID_NPI,
    total_charge_cents=200_000,
)


def test_the_first_lines_say_what_and_how_bad():
    first, _, verdict, *_ = narrative(claim(line(1, "97110", units=9, charge_cents=45_000))).splitlines()
    assert first == "# Claim C-1: high risk, pay an adjusted amount"
    assert verdict == (
        "**More units are billed than a day may hold. $150.00 of what was billed is at stake. A person decides.** [F1]"
    )


def test_a_clean_claim_reads_as_clean():
    text = narrative(claim())
    assert text.startswith("# Claim C-1: no risk found, pay as billed\n")
    assert "Every rule passed" in text
    assert "## F" not in text


def test_every_sentence_of_a_flag_is_tied_to_it():
    text = narrative(BUSY)
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        flag_id = section.split()[0]
        if flag_id == "Next":
            continue
        body = section.split("\n\n## ")[0].split("\n", 1)[1]
        for paragraph in body.split("\n\n"):
            if paragraph.strip() and not paragraph.startswith(("*", "---", "- ", "1.")):
                assert paragraph.rstrip().endswith(f"[{flag_id}]"), paragraph
                assert not re.search(r"\. (?!\[)[A-Z][^\[]*$", paragraph.rstrip()), paragraph


def test_every_next_step_names_its_flags():
    steps = narrative(BUSY).split("## Next steps")[1].split("*The model")[0].strip().splitlines()
    assert len(steps) >= 4
    assert all(re.search(r" \[F[0-9]+(, F[0-9]+)*\]$", step) for step in steps)


def test_each_line_stands_in_the_table_with_its_charge_and_flags():
    text = narrative(BUSY)
    assert "| 1 | 2024-10-05 | 97110 | exercise therapy, quarter hour | 9 | $1,234.56 | F" in text
    assert "**Total as stated** | | **$2,000.00**" in text
    assert "**Sum of the lines** | | **$1,434.56**" in text


def test_the_models_words_are_marked_as_the_models():
    assert re.search(r"^> Model note \((confirmed|suspected|refuted)\): ", narrative(BUSY), re.MULTILINE)
    assert "Model note" not in narrative(BUSY, ["raise"])


@pytest.mark.parametrize("script", ["raise", "garbage", "cut", "invented"])
def test_an_abstention_says_why(script):
    assert "*The model took no part: the model" in narrative(BUSY, [script])


def test_nothing_from_the_claim_can_act_as_markup():
    hostile = "<script>[x](http://e)*|`#_"
    text = narrative(
        claim(claim_id=hostile, billing_npi="|<b>|", prior_claim_ref="[p](q)", frequency=Frequency.REPLACEMENT)
    )
    bare = re.sub(r"\\.", "", text)
    assert "<" not in bare
    assert "](" not in bare
    assert "`" not in bare
    # A pipe from the claim would add a cell: every row of the table has eight bars of its own.
    assert all(row.count("|") == 8 for row in bare.splitlines() if row.startswith("|"))


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("a*b", r"a\*b"), ("two\nlines", "two lines"), ("<b>", r"\<b\>"), ("a|b", r"a\|b"), ("plain.", "plain.")],
)
def test_escape_makes_markup_plain(text, escaped):
    assert escape(text) == escaped


def test_every_rule_has_words_for_the_verdict():
    from deployments.claims.narrative import _TITLES

    assert set(_TITLES) == set(load_edit_table().rules)


def test_the_footer_says_where_the_prompt_tokens_came_from():
    assert re.search(r"^- prompt tokens [1-9][0-9]*: [1-9][0-9]* computed on prefill$", narrative(BUSY), re.MULTILINE)

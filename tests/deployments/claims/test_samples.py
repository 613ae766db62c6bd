import asyncio
import datetime as dt
import json

import pytest
from x12sdk.io import X12ModelReader

from deployments.claims.generate_samples import DEFAULT_SEED, npi, scenarios, write_samples
from deployments.claims.history import with_history
from deployments.claims.intake import ClaimIntake
from deployments.claims.labels import compare, load_labels
from deployments.claims.model import Parser
from deployments.claims.review_schema import validate_review
from deployments.claims.reviewer import ClaimReviewer, ModelIdentity
from deployments.claims.rules import is_valid_npi, load_edit_table
from deployments.claims.scripted_model import ScriptedReviewModel
from tests.deployments.claims.builders import PSEUDONYMISER, SAMPLES

FILES = sorted(SAMPLES.glob("*.edi"))
LABELS = load_labels(SAMPLES / "labels.json")


def sample_claims():
    intake = ClaimIntake(PSEUDONYMISER)
    return [claim for path in FILES for claim in intake.read_file(path).claims]


def review_all(model):
    reviewer = ClaimReviewer(
        model,
        identity=ModelIdentity("scripted", "1"),
        clock=lambda: dt.datetime(2026, 10, 5, tzinfo=dt.UTC),
    )

    async def run():
        pairs = with_history(sample_claims())
        return await asyncio.gather(
            *(reviewer.review(c, tenant="acme", plan="synthetic-ppo", history=h) for c, h in pairs)
        )

    return asyncio.run(run())


def test_the_shipped_samples_are_what_the_seed_writes(tmp_path):
    write_samples(tmp_path, DEFAULT_SEED)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in SAMPLES.iterdir()}


def test_another_seed_writes_other_filler_under_the_same_labels(tmp_path):
    write_samples(tmp_path, DEFAULT_SEED + 1)
    assert (tmp_path / FILES[0].name).read_bytes() != FILES[0].read_bytes()
    assert load_labels(tmp_path / "labels.json") == LABELS


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "10-total.edi"], ids=lambda path: path.name)
def test_x12sdk_reads_the_samples_back_as_we_do(path):
    with X12ModelReader(str(path)) as reader:
        theirs = [claim for model in reader.models() for claim in model.claims()]
    ours = ClaimIntake(PSEUDONYMISER).read_file(path).claims
    assert [claim.source.parser for claim in ours] == [Parser.X12_STRICT] * len(ours)
    assert [(c.patient_control_number, c.charge * 100, c.billing_provider_npi) for c in theirs] == [
        (c.claim_id, c.total_charge_cents, c.billing_npi) for c in ours
    ]
    assert [[line.sv1_segment.service_unit_count for line in c.service_lines] for c in theirs] == [
        [line.units for line in c.lines] for c in ours
    ]


def test_every_planted_fault_is_flagged_and_no_clean_claim_is():
    report = compare(LABELS, [result.review for result in review_all(ScriptedReviewModel())])
    assert report.is_perfect, report
    assert report.num_claims == 23
    assert report.num_faults == 16


def test_the_comparison_sees_what_is_missed_and_what_is_spurious():
    reviews = [result.review for result in review_all(ScriptedReviewModel())]
    clean, faulty = reviews[0], reviews[5]
    clean["flags"], faulty["flags"] = faulty["flags"], []
    report = compare(LABELS, reviews[:-1])
    assert [fault[:2] for fault in report.missed] == [("SYNTH-0006", "R-DUP-EXACT")]
    assert [fault[:2] for fault in report.spurious] == [("SYNTH-0001", "R-DUP-EXACT")]
    assert report.unreviewed == ("SYNTH-0023",)
    assert not report.is_perfect


def test_labels_of_another_version_are_refused(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"labels_version": 99, "claims": []}))
    with pytest.raises(ValueError, match="labels version 99"):
        load_labels(path)


def test_the_samples_hold_every_rule_six_clean_claims_and_one_with_two_faults():
    planted = {fault["rule_id"] for label in LABELS for fault in label["faults"]}
    assert planted == set(load_edit_table().rules)
    assert sum(not label["faults"] for label in LABELS) >= 6
    assert any(len(label["faults"]) == 2 for label in LABELS)
    assert {len(claims) for claims in scenarios().values()} >= {1, 4}


@pytest.mark.parametrize("script", [("answer",), ("garbage",), ("cut",), ("raise",), ("invented",)])
def test_every_sample_review_validates_whatever_the_model_does(script):
    results = review_all(ScriptedReviewModel(script))
    assert len(results) == 23
    for result in results:
        validate_review(result.review)


def test_everything_in_the_samples_is_plainly_synthetic():
    assert is_valid_npi(npi(1))
    assert not is_valid_npi(npi(1, is_valid=False))
    for path in FILES:
        for row in path.read_text().splitlines():
            elements = row.rstrip("~").split("*")
            if elements[0] == "NM1":
                assert elements[3].startswith("SYNTH")
                if len(elements) > 9:
                    assert elements[9].startswith(("SYNTH", "9999"))

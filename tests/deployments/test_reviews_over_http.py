"""`POST /v1/reviews` against the real deployment: sample claims with their labels, and every kind of bad file."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.claims.labels import compare, load_labels
from deployments.claims.review_schema import validate_review
from deployments.review_client import SAMPLES
from tests.deployments.test_trust_over_http import records
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]


def post(deployment: Deployment, body: dict[str, Any], tenant: str = "alpha") -> httpx.Response:
    return httpx.post(f"{deployment.url}/v1/reviews", json=body, headers=deployment.headers(tenant), timeout=240.0)


def as_file(name: str, content: bytes) -> dict[str, str]:
    return {"name": name, "content_base64": base64.b64encode(content).decode()}


def test_all_sample_claims_are_reviewed_as_labelled(clean_deployment: Deployment) -> None:
    """Every planted fault flagged, none on the clean claims, every review valid; KV moved and prefixes reused."""
    paths = sorted(SAMPLES.glob("*.edi"))
    body = post(clean_deployment, {"files": [as_file(path.name, path.read_bytes()) for path in paths]}).json()
    reviews = [item["review"] for item in body["reviews"]]
    for review in reviews:
        validate_review(review)
        assert review["tenant"] == "alpha"
        assert review["zone"].startswith("tenant/alpha/case/")
    report = compare(load_labels(SAMPLES / "labels.json"), reviews)
    assert (report.missed, report.spurious, report.unreviewed) == ((), (), ())
    assert report.num_faults >= 12
    assert not [item for item in body["dispositions"] if item["outcome"] == "refused"]
    assert not any(review["abstained"] for review in reviews)
    serving = [item["serving"] for item in body["reviews"]]
    assert sum(item["pushed_bytes"] for item in serving) > 0
    origins = [item["prompt_tokens_by_origin"] for item in serving]
    assert all(sum(counts.values()) == item["prompt_tokens"] for counts, item in zip(origins, serving, strict=True))
    assert sum(counts["decode_cache"] + counts["prefill_cache"] for counts in origins) > 0


def test_a_review_gives_the_same_answer_again_and_reuses_its_own_case(clean_deployment: Deployment) -> None:
    body = {"x12": (SAMPLES / "05-units.edi").read_text()}
    first, second = (post(clean_deployment, body).json()["reviews"] for _ in range(2))
    by_id = {item["review"]["review_id"]: item for item in second}
    assert len(by_id) == len(first) > 0
    for item in first:
        again = by_id[item["review"]["review_id"]]
        assert _without_time(again["review"]) == _without_time(item["review"])
        assert again["serving"]["prompt_tokens_by_origin"]["decode_cache"] > 0


def test_a_review_streams_its_events(clean_deployment: Deployment) -> None:
    body = {"x12": (SAMPLES / "08-identifiers.edi").read_text(), "stream": True}
    headers = clean_deployment.headers("alpha")
    url = f"{clean_deployment.url}/v1/reviews"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120.0) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    kinds = [json.loads(line)["type"] for line in lines[:-1]]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "done"
    assert kinds.count("review") == json.loads(lines[0])["num_claims"] > 0


def _without_time(review: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in review.items() if key != "created"}


def _half(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: len(data) // 2]


BAD_FILES = {
    "cut in half": (_half(SAMPLES / "10-total.edi"), "refused", {"truncated", "bad_envelope"}),
    "unknown segment": (
        (SAMPLES / "10-total.edi").read_bytes().replace(b"CLM*", b"ZZZ*1*2~CLM*"),
        "noted",
        {"unknown_segment", "segment_count_mismatch", "read_leniently"},
    ),
    "binary garbage": (bytes(range(256)) * 40, "refused", {"not_a_claim_file"}),
    "empty": (b"", "refused", {"empty_file"}),
    "another transaction": (
        (SAMPLES / "10-total.edi").read_bytes().replace(b"ST*837*", b"ST*835*"), "refused", {"wrong_transaction"}
    ),
    "a bad JSON line": (b'{"claim_id": \n', "refused", {"bad_json", "not_a_claim_file"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_has_a_named_disposition_and_its_neighbour_is_reviewed(name: str, deployment: Deployment) -> None:
    content, outcome, reasons = BAD_FILES[name]
    good = SAMPLES / "02-clean-single.edi"
    response = post(deployment, {"files": [as_file("bad.edi", content), as_file(good.name, good.read_bytes())]})
    assert response.status_code == 200
    body = response.json()
    found = [item for item in body["dispositions"] if item["file"] == "bad.edi"]
    assert reasons & {item["reason"] for item in found if item["outcome"] == outcome}, found
    assert "SYNTH-0005" in {item["review"]["claim_id"] for item in body["reviews"]}
    assert httpx.get(f"{deployment.url}/health", timeout=20.0).status_code == 200


BAD_REVIEW_BODIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "two inputs": {"x12": "ISA", "claim": {}},
    "unknown key": {"x12": "ISA", "plann": "x"},
    "unknown plan": {"x12": "ISA", "plan": "no-such-plan"},
    "plan with a path": {"x12": "ISA", "plan": "../../etc"},
    "not base64": {"files": [{"name": "a", "content_base64": "%%%"}]},
    "no files": {"files": []},
    "wrong type": {"x12": 5},
}


@pytest.mark.parametrize("name", BAD_REVIEW_BODIES)
def test_a_bad_review_body_is_400_with_a_reason(name: str, deployment: Deployment) -> None:
    response = post(deployment, BAD_REVIEW_BODIES[name])
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(response.json()["error"]["message"]) > 5


CLAIM: dict[str, Any] = {
    "schema_version": "zoneserve.claim/1",
    "claim_id": "SYNTH-J1",
    "member_id": "SYNTHMEMBER1",
    "billing_npi": "9999000018",
    "payer_id": "SYNTHPAYER1",
    "received_date": "2026-10-05",
    "diagnoses": ["N390"],
    "total_charge_cents": 5200,
    "lines": [
        {
            "line_number": 1,
            "procedure_code": "99213",
            "units": "1",
            "charge_cents": 5200,
            "date_from": "2026-09-15",
            "date_to": "2026-09-15",
            "place_of_service": "11",
            "diagnosis_pointers": [1],
        }
    ],
}


def test_a_claim_as_json_is_reviewed(deployment: Deployment) -> None:
    body = post(deployment, {"claim": CLAIM}).json()
    assert body["dispositions"] == []
    (item,) = body["reviews"]
    validate_review(item["review"])
    assert (item["review"]["claim_id"], item["review"]["flags"]) == ("SYNTH-J1", [])


def test_a_review_names_the_arithmetic_that_ran_and_not_the_one_configured(deployment: Deployment) -> None:
    """The deployment asks for native in float32, which only torch computes."""
    assert deployment.config.engine.backend == "native"
    (item,) = post(deployment, {"claim": CLAIM}).json()["reviews"]
    digest, _, arithmetic = item["review"]["model"]["revision"].partition("-")
    assert (len(digest), arithmetic) == (16, "torch-float32-cpu")


def test_a_claim_as_json_without_lines_is_refused(deployment: Deployment) -> None:
    refused = post(deployment, {"claim": CLAIM | {"lines": []}}).json()
    assert refused["reviews"] == []
    assert [item["outcome"] for item in refused["dispositions"]] == ["refused"]


@pytest.mark.parametrize("stream", [False, True])
def test_more_claims_than_a_call_may_have_are_413_and_none_is_begun(stream: bool, deployment: Deployment) -> None:
    limit = deployment.config.claims.max_claims_per_call
    lines = "\n".join(json.dumps(CLAIM | {"claim_id": f"SYNTH-J{index}"}) for index in range(limit + 1))

    def begun() -> int:
        return len([record for record in records(deployment) if record.event == "zone.resolve"])

    before = begun()
    response = post(deployment, {"files": [as_file("many.jsonl", lines.encode())], "stream": stream})
    assert response.status_code == 413
    assert f"{limit + 1} claims in one call; at most {limit}" in response.json()["error"]["message"]
    assert begun() == before

"""What a claim or a prompt says is only in its answer: not in the audit log, in metrics, or in a log of Ray's."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.review_client import SAMPLES
from tests.deployments.test_reviews_over_http import CLAIM
from tests.deployments.test_trust_over_http import MODEL
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]

PROVIDER, MEMBER, NOTE = (f"{kind}{secrets.token_hex(6)}" for kind in ("MARKPROVIDER", "MARKMEMBER", "MARKNOTE"))
PROMPT, BEARER = (f"{kind}{secrets.token_hex(6)}" for kind in ("markprompt", "zs-markbearer"))
CLAIM_ID = f"SYNTH-{secrets.token_hex(6)}"
MARKERS = (PROVIDER, MEMBER, NOTE, PROMPT, BEARER, CLAIM_ID)
GOOD = (
    (SAMPLES / "05-units.edi").read_text()
    .replace("SYNTH CLINIC 2", PROVIDER)
    .replace("SYNTHMEMBER9*TANGO", f"{MEMBER}*{MEMBER}")
    .replace("SYNTHM00009", MEMBER)
    .replace("SYNTH-0011", CLAIM_ID)
    .replace("HI*ABK:K219*ABF:N390~", f"NTE*ADD*{NOTE}~\nHI*ABK:K219*ABF:N390~")
)  # fmt: skip
# What is refused is as private as what is taken.
FILES = {
    "good.edi": GOOD,
    "cut.edi": GOOD[: GOOD.index("LX*1") + 8],
    "odd.edi": GOOD.replace("CLM*", f"ZZZ*{NOTE}*{MEMBER}~\nCLM*"),
    f"{MEMBER}.jsonl": json.dumps(CLAIM | {"member_id": MEMBER, NOTE: PROVIDER, "diagnoses": [NOTE]}),
    "line.jsonl": json.dumps(CLAIM | {"member_id": MEMBER, "claim_id": CLAIM_ID}) + f"\n{{{NOTE}\n",
}


def post(deployment: Deployment, path: str, body: object, headers: dict[str, str]) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    return httpx.post(f"{deployment.url}{path}", content=content, headers=headers, timeout=120.0)


def speak(deployment: Deployment) -> list[httpx.Response]:
    """Every marker on every way in, good and bad."""
    headers = deployment.headers("alpha")
    files = [{"name": name, "content_base64": base64.b64encode(text.encode()).decode()} for name, text in FILES.items()]
    chat: dict[str, Any] = {
        "model": MODEL, "max_tokens": 2, "temperature": 0, "messages": [{"role": "user", "content": PROMPT}]
    }  # fmt: skip
    return [
        post(deployment, "/v1/reviews", {"files": files}, headers),
        post(deployment, "/v1/reviews", {"claim": {NOTE: MEMBER}, "plan": NOTE.lower()}, headers),
        post(deployment, "/v1/reviews", {"x12": GOOD, MEMBER: NOTE}, headers),
        post(deployment, "/v1/chat/completions", chat, headers),
        post(deployment, "/v1/chat/completions", chat | {"zone": f"tenant/{PROMPT}/case/x"}, headers),
        post(deployment, "/v1/chat/completions", chat | {"metadata": {"zoneserve.case": PROMPT}}, headers),
        post(deployment, "/v1/chat/completions", chat | {"response_format": {"type": PROMPT}, "user": PROMPT}, headers),
        post(deployment, "/v1/completions", {"model": PROMPT, "prompt": PROMPT}, headers),
        post(deployment, "/v1/completions", f'{{"prompt": "{PROMPT}"', headers),
        post(deployment, "/v1/completions", {}, {"Authorization": f"Bearer {BEARER}", "X-Zone": PROMPT}),
    ]


def written(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path, path.read_bytes()


def test_nothing_that_a_claim_or_a_prompt_says_is_logged_audited_or_counted(clean_deployment: Deployment) -> None:
    import ray

    deployment = clean_deployment
    reviewed, *others = speak(deployment)
    assert [response.status_code for response in others] == [400, 400, 200, 403, 403, 400, 404, 400, 401]
    answer = reviewed.json()
    assert CLAIM_ID in {item["review"]["claim_id"] for item in answer["reviews"]}  # it was said, and heard
    assert len([item for item in answer["dispositions"] if item["outcome"] == "refused"]) >= 3

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert deployment.config.trust.audit is not None
    places = [*written(deployment.config.trust.audit.dir), *written(logs)]
    places.append((Path("metrics"), httpx.get(f"{deployment.url}/metrics", timeout=20.0).content))
    found = [
        (path.name, marker)
        for path, data in places
        for marker in (*MARKERS, deployment.keys["alpha"])
        if marker.lower().encode() in data.lower()
    ]
    assert found == []

    def is_anywhere(text: str) -> bool:
        return any(text.encode() in data for _, data in places)

    # What may be there is: the search looks where it should.
    assert is_anywhere(answer["reviews"][0]["review"]["review_id"])
    assert is_anywhere('zoneserve_refusals_total{reason="forbidden"')
    assert any(path.is_relative_to(logs) and b"POST /v1/reviews" in data for path, data in places)

"""Usage and reviews of the real deployment tell a caller what was cached of its own text, and of nobody else's."""

from __future__ import annotations

import json
import secrets
from typing import Any

import httpx
import pytest

from deployments.review_client import SAMPLES
from tests.deployments.test_trust_over_http import MODEL, TEXT, hits, post
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]


def usage(deployment: Deployment, text: str, tenant: str, *, stream: bool = False) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "system", "content": text}], "temperature": 0, "max_tokens": 2
    }  # fmt: skip
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    response = post(deployment, "/v1/chat/completions", body, deployment.headers(tenant))
    assert response.status_code == 200, response.text
    if not stream:
        return dict(response.json()["usage"])
    *_, last, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    return dict(json.loads(last)["usage"])


def test_a_case_is_told_of_its_own_prefix_and_no_other_case_of_it(clean_deployment: Deployment) -> None:
    text = f"{secrets.token_hex(8)} {TEXT}"

    def cached(tenant: str, *, stream: bool = False) -> int:
        found = usage(clean_deployment, text, tenant, stream=stream)
        assert found["prompt_tokens_details"]["cached_tokens"] <= found["prompt_tokens"]
        return int(found["prompt_tokens_details"]["cached_tokens"])

    assert cached("alpha") == 0
    assert cached("alpha") == cached("alpha", stream=True) > len(text) / 10
    assert cached("beta") == 0
    assert cached("gamma") == cached("gamma", stream=True) == 0  # in no zone


def test_a_review_is_not_told_that_public_text_was_cached(clean_deployment: Deployment) -> None:
    """The shipped system text is public and lies in the caches once one review has run; so does the plan's."""
    body = {"x12": (SAMPLES / "02-clean-single.edi").read_text()}

    def review() -> httpx.Response:
        return post(clean_deployment, "/v1/reviews", body, clean_deployment.headers("alpha"))

    review()
    answers: list[httpx.Response] = []

    def again() -> httpx.Response:
        answers.append(review())
        return answers[-1]

    found = hits(clean_deployment, again)
    (item,) = answers[0].json()["reviews"]
    told, serving = item["serving"]["prompt_tokens_by_origin"], item["serving"]
    assert sum(told.values()) == serving["prompt_tokens"]
    assert told["shared"] > 0
    assert found == told["shared"] + told["decode_cache"] + told["prefill_cache"]  # what the operator sees
    assert f"{told['shared']} of shared text" in item["narrative_md"]

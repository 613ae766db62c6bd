"""Every sampling option and both endpoints over HTTP, with the prompt computed on decode and with it handed off."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]

MODEL = "smollm2-135m-instruct"
SHORT = "The capital of France is"
LONG = "France is a country in Europe. " * 20 + SHORT
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


class Endpoint:
    """Completions of one prompt; greedy unless told otherwise."""

    def __init__(self, deployment: Deployment, prompt: str) -> None:
        self._deployment = deployment
        self._prompt = prompt

    def _body(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"model": MODEL, "prompt": self._prompt, "temperature": 0, "max_tokens": 12} | options

    def choice(self, **options: Any) -> dict[str, Any]:
        response = httpx.post(
            f"{self._deployment.url}/v1/completions",
            json=self._body(options),
            headers=self._deployment.headers(),
            timeout=60.0,
        )
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return dict(choice)

    def text(self, **options: Any) -> str:
        return str(self.choice(**options)["text"])

    def events(self, **options: Any) -> list[dict[str, Any]]:
        with httpx.stream(
            "POST",
            f"{self._deployment.url}/v1/completions",
            json=self._body(options) | {"stream": True, "stream_options": {"include_usage": True}},
            headers=self._deployment.headers(),
            timeout=60.0,
        ) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


@pytest.fixture(params=[SHORT, LONG], ids=["computed on decode", "handed off"])
def endpoint(request: pytest.FixtureRequest, clean_deployment: Deployment) -> Endpoint:
    return Endpoint(clean_deployment, request.param)


def test_greedy_is_the_default_of_temperature_0_and_says_paris(endpoint: Endpoint) -> None:
    assert endpoint.text() == endpoint.text()
    assert "Paris" in endpoint.text()


def test_a_stream_is_the_whole_answer_in_pieces(endpoint: Endpoint) -> None:
    whole = endpoint.choice(logprobs=2)
    *chunks, usage = endpoint.events(logprobs=2)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * 11 + ["length"]
    streamed = [choice["logprobs"] for choice in choices]
    for name in ("tokens", "top_logprobs", "text_offset"):
        assert [value for part in streamed for value in part[name]] == whole["logprobs"][name]
    assert usage["usage"]["completion_tokens"] == 12


def test_logprobs_are_those_of_the_text(endpoint: Endpoint) -> None:
    choice = endpoint.choice(logprobs=1)
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top == {token: value}  # greedy: the chosen token is the likeliest
        assert value <= 0


def test_a_stop_string_ends_the_answer_before_it(endpoint: Endpoint) -> None:
    answer = endpoint.text()
    stop = answer[len(answer) // 2 :][:3]
    choice = endpoint.choice(stop=["never to be seen", stop])
    assert choice["text"] == answer[: answer.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    chunks = endpoint.events(stop=[stop])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == choice["text"]


def test_a_stop_string_in_the_first_token_leaves_nothing(endpoint: Endpoint) -> None:
    choice = endpoint.choice(stop=endpoint.choice(logprobs=0, max_tokens=1)["text"])
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_a_stop_token_ends_the_answer_unless_min_tokens_bars_it(endpoint: Endpoint, tokenizer: Any) -> None:
    (first,) = tokenizer.encode(endpoint.text(max_tokens=1))
    assert endpoint.choice(stop_token_ids=[first])["finish_reason"] == "stop"
    assert len(endpoint.choice(stop_token_ids=[first], min_tokens=5, logprobs=0)["logprobs"]["tokens"]) >= 5


def test_options_that_leave_one_candidate_are_greedy_at_any_temperature(endpoint: Endpoint) -> None:
    greedy = endpoint.text(max_tokens=4)  # further on, two candidates of this model tie, and ties are kept
    hot = {"temperature": 2.0, "seed": 11, "max_tokens": 4}
    assert endpoint.text(**hot, top_k=1) == greedy
    assert endpoint.text(**hot, top_p=1e-6) == greedy
    assert endpoint.text(**hot, min_p=1.0) == greedy
    assert endpoint.text(**hot) != greedy  # the control: the options did it


def test_a_seed_repeats_its_answer_and_another_gives_another(endpoint: Endpoint) -> None:
    hot = {"temperature": 1.5}
    assert endpoint.text(**hot, seed=1) == endpoint.text(**hot, seed=1)
    assert len({endpoint.text(**hot, seed=seed) for seed in range(4)}) > 1
    assert len({endpoint.text(**hot) for _ in range(4)}) > 1  # without one, each call draws its own


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_penalty_makes_the_answer_repeat_itself_less(name: str, clean_deployment: Deployment) -> None:
    for count in (8, 40):  # computed on decode, and handed off
        endpoint = Endpoint(clean_deployment, "yes no " * count)
        plain = endpoint.choice(logprobs=0, max_tokens=40)["logprobs"]["tokens"]
        penalised = endpoint.choice(logprobs=0, max_tokens=40, **{name: 2.0})["logprobs"]["tokens"]
        assert len(set(penalised)) > len(set(plain))


def test_ignore_eos_goes_on_where_the_answer_would_end(clean_deployment: Deployment) -> None:
    def finish(**options: Any) -> tuple[str, int]:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Write a thumbs-up emoji: "}],
            "temperature": 0,
            "max_tokens": 30,
        }
        response = httpx.post(
            f"{clean_deployment.url}/v1/chat/completions",
            json=body | options,
            headers=clean_deployment.headers(),
            timeout=60.0,
        ).json()
        return response["choices"][0]["finish_reason"], response["usage"]["completion_tokens"]

    reason, count = finish()
    assert reason == "stop"
    assert count < 20
    assert finish(ignore_eos=True) == ("length", 30)
    assert finish(min_tokens=20)[1] >= 20


def test_parts_of_a_character_have_their_bytes(clean_deployment: Deployment) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Write a thumbs-up emoji: "}],
        "temperature": 0,
        "max_tokens": 4,
        "logprobs": True,
    }
    choice = httpx.post(
        f"{clean_deployment.url}/v1/chat/completions",
        json=body,
        headers=clean_deployment.headers(),
        timeout=60.0,
    ).json()["choices"][0]
    data = bytes(byte for item in choice["logprobs"]["content"] for byte in item["bytes"])
    assert data.decode(errors="replace").startswith(choice["message"]["content"])
    assert any(item["token"] == "\ufffd" for item in choice["logprobs"]["content"])


def test_completions_refuse_what_they_cannot_serve(deployment: Deployment) -> None:
    def answer(**change: Any) -> tuple[int, str]:
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 2} | change
        response = httpx.post(f"{deployment.url}/v1/completions", json=body, headers=deployment.headers(), timeout=30.0)
        return response.status_code, response.json()["error"]["code"]

    assert answer(model="gpt-none") == (404, "model_not_found")
    for change in (
        {"prompt": ""}, {"prompt": []}, {"prompt": ["a", "b"]}, {"prompt": [10**6]}, {"prompt": [-1]},
        {"prompt": "claim " * 6000}, {"max_tokens": 0}, {"max_tokens": 10**9}, {"unknown": 1}, {"logprobs": 99},
        {"min_tokens": 3}, {"n": 9}, {"echo": True},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "sandwich"}}}},
    ):  # fmt: skip
        assert answer(**change) == (400, "invalid_request"), change
    assert httpx.get(f"{deployment.url}/health", timeout=20.0).status_code == 200


def test_every_documented_metric_is_exposed(clean_deployment: Deployment) -> None:
    """Those with labels appear with their first event: a handoff happens here, a fallback does not."""
    Endpoint(clean_deployment, LONG).choice()
    exposed = httpx.get(f"{clean_deployment.url}/metrics", timeout=20.0).text
    documented = set(re.findall(r"`(zoneserve_\w+?)(?:\{\w+\})?`", OPERATIONS.read_text()))
    assert len(documented) > 15
    families = set(re.findall(r"^# TYPE (\w+) ", exposed, re.MULTILINE))
    assert documented <= families | {name.removesuffix("_total") for name in families}


def test_a_handoff_shows_in_the_metrics(clean_deployment: Deployment) -> None:
    def value(name: str) -> float:
        exposed = httpx.get(f"{clean_deployment.url}/metrics", timeout=20.0).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in exposed.splitlines() if line.startswith(name))

    names = [
        "zoneserve_pushed_bytes_total", "zoneserve_handoff_seconds_count", 'zoneserve_handoffs_total{outcome="landed"',
        'zoneserve_prompt_tokens_total{origin="prefill_computed"', "zoneserve_time_to_first_token_seconds_count",
        "zoneserve_inter_token_latency_seconds_count", "zoneserve_request_queue_time_seconds_count",
    ]  # fmt: skip
    before = {name: value(name) for name in names}
    Endpoint(clean_deployment, LONG).choice()
    assert [name for name in names if value(name) <= before[name]] == []
    assert value("zoneserve_kv_blocks_quarantined") == 0

"""A real deployment: prefill and decode in separate actors, KV over NIXL, HTTP in front."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.affinity import can_pin
from load_tests.exposition import Exposition
from tests.conformance.greedy import NUM_OUTPUT_TOKENS
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]

MODEL = "smollm2-135m-instruct"


def chat(deployment: Deployment, text: str, tenant: str = "gamma", **extra: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 4}
    return httpx.post(
        f"{deployment.url}/v1/chat/completions", json=body | extra, headers=deployment.headers(tenant), timeout=120.0
    )


def counters(deployment: Deployment) -> Counter[str]:
    """Sums over replicas of every counter, by name and origin."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{deployment.url}/metrics", timeout=20.0).text):
        for sample in family.samples:
            origin = sample.labels.get("origin", "")
            sums[f"{sample.name}{'.' if origin else ''}{origin}"] += sample.value
    return sums


def test_disaggregated_output_equals_transformers_and_every_block_came_over_nixl(
    clean_deployment: Deployment, greedy_prompts, greedy_oracle
) -> None:
    """Fails where disaggregation silently does not happen: bytes, origins and recomputed tokens are exact."""
    threshold = clean_deployment.config.routing.local_prefill_max_tokens
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if len(prompt) > threshold}
    assert len(chosen) >= 10
    assert max(map(len, chosen.values())) == 3000
    before = clean_deployment.stats("prefill")
    for name, prompt in chosen.items():
        events = clean_deployment.generate(prompt, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
        tokens = tuple(token_id for event in events for token_id in event.token_ids)
        assert tokens == greedy_oracle[name], name
        provenance = events[-1].provenance
        assert provenance is not None
        assert provenance.fallback is None
        assert provenance.recomputed_tokens == 0
        assert provenance.origins == {
            "decode_cache": 0, "prefill_cache": 0, "prefill_computed": len(prompt), "decode_computed": 0
        }  # fmt: skip
        assert provenance.pushed_blocks == -(-len(prompt) // 16)
        assert provenance.pushed_bytes > 0
    pushed = clean_deployment.stats("prefill")["pushed_bytes"] - before["pushed_bytes"]
    blocks = sum(-(-len(prompt) // 16) for prompt in chosen.values())
    assert pushed == blocks * 30 * 2 * 3 * 64 * 16 * 4 > 0


def test_short_prompts_stay_on_decode_and_equal_transformers(
    clean_deployment: Deployment, greedy_prompts, greedy_oracle
) -> None:
    threshold = clean_deployment.config.routing.local_prefill_max_tokens
    chosen = {name: prompt for name, prompt in greedy_prompts.items() if len(prompt) <= threshold}
    for name, prompt in chosen.items():
        events = clean_deployment.generate(prompt, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
        assert tuple(token_id for event in events for token_id in event.token_ids) == greedy_oracle[name]
        provenance = events[-1].provenance
        assert provenance is not None
        assert provenance.origins["decode_computed"] == len(prompt)
        assert provenance.pushed_bytes == 0


def test_one_zone_shares_blocks_and_two_zones_share_none(clean_deployment: Deployment) -> None:
    text = f"Note {secrets.token_hex(8)}. " + "The plan pays for one office visit a day. " * 20
    messages = [{"role": "system", "content": text}]  # of its own: the template's would be in the cases' cache by now

    def hits(tenant: str) -> float:
        before = counters(clean_deployment)
        assert chat(clean_deployment, "", tenant, messages=messages).status_code == 200
        after = counters(clean_deployment)
        return after["zoneserve_prefix_cache_hits_total"] - before["zoneserve_prefix_cache_hits_total"]

    assert hits("alpha") == 0
    assert hits("alpha") > 0  # the control: sharing works at all
    assert hits("beta") == 0
    assert hits("beta") > 0
    assert hits("gamma") == 0  # ephemeral: nothing is ever kept
    assert hits("gamma") == 0


def test_prompt_tokens_by_origin_add_up(clean_deployment: Deployment) -> None:
    before = counters(clean_deployment)
    sizes = [
        chat(clean_deployment, text, "alpha").json()["usage"]["prompt_tokens"]
        for text in ("short", "A much longer prompt about claims. " * 30, "A much longer prompt about claims. " * 40)
    ]
    after = counters(clean_deployment)
    origins = ("decode_cache", "prefill_cache", "prefill_computed", "decode_computed")
    names = [f"zoneserve_prompt_tokens_total.{origin}" for origin in origins]
    assert sum(after[name] - before[name] for name in names) == sum(sizes)


def test_streaming_sends_one_token_a_chunk_and_the_same_text(clean_deployment: Deployment) -> None:
    text = "List three colours. " * 12
    whole = chat(clean_deployment, text, max_tokens=12).json()
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events = []
    with httpx.stream(
        "POST",
        f"{clean_deployment.url}/v1/chat/completions",
        json=body,
        headers=clean_deployment.headers(),
        timeout=60.0,
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert deltas[0]["content"]
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    usage = events[-1]["usage"]
    assert usage == whole["usage"]
    assert len([delta for delta in deltas if "content" in delta]) == usage["completion_tokens"]
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1] == "length"


@pytest.mark.parametrize(("caller", "role"), [("ProxyActor", "ingress"), ("zoneserve:ingress", "decode")])
def test_a_tokens_hops_go_over_grpc(caller: str, role: str, clean_deployment: Deployment) -> None:
    """Over Ray the answer would be the same, and cost three times as much."""
    assert chat(clean_deployment, "hi").status_code == 200
    handle = clean_deployment.handle(role)
    clean_deployment.wait_until(handle.running_replicas_populated, 10.0)
    replicas = handle._router._asyncio_router.request_router.curr_replicas.values()
    ports = {replica._replica_info.port for replica in replicas}
    (process,) = [p for p in psutil.Process().children(recursive=True) if caller in " ".join(p.cmdline())]
    peers = {c.raddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}
    assert ports
    assert ports <= peers


def test_n_choices_and_logprobs(clean_deployment: Deployment) -> None:
    body = chat(
        clean_deployment, "Say something.", n=3, temperature=1.0, seed=7, logprobs=True, top_logprobs=2, max_tokens=5
    ).json()
    again = chat(clean_deployment, "Say something.", n=3, temperature=1.0, seed=7, max_tokens=5).json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(texts)) > 1
    for choice in body["choices"]:
        for item in choice["logprobs"]["content"]:
            assert len(item["top_logprobs"]) == 2
            assert item["logprob"] <= item["top_logprobs"][0]["logprob"] <= 0


def test_constrained_output_validates(clean_deployment: Deployment) -> None:
    schema = {
        "type": "object",
        "properties": {"risk": {"enum": ["low", "high"]}, "line": {"type": "integer", "minimum": 1, "maximum": 3}},
        "required": ["risk", "line"],
        "additionalProperties": False,
    }
    for text in ("Rate this claim.", "Rate this claim. " * 40):  # local prefill, and through the handoff
        response = chat(
            clean_deployment,
            text,
            max_tokens=60,
            response_format={"type": "json_schema", "json_schema": {"name": "rating", "schema": schema}},
        )
        answer = json.loads(response.json()["choices"][0]["message"]["content"])
        assert answer["risk"] in ("low", "high")
        assert 1 <= answer["line"] <= 3


BAD_BODIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "gpt-none"}, 404, "model_not_found"),
    "empty messages": ({"messages": []}, 400, "invalid_request"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "invalid_request"),
    "unknown role": ({"messages": [{"role": "root", "content": "x"}]}, 400, "invalid_request"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "invalid_request"),
    "max_tokens huge": ({"max_tokens": 10**9}, 400, "invalid_request"),
    "prompt longer than the context": (
        {"messages": [{"role": "user", "content": "claim " * 6000}]}, 400, "invalid_request"
    ),
    "unknown key": ({"best_off": 3}, 400, "invalid_request"),
    "a string for a number": ({"temperature": "hot"}, 400, "invalid_request"),
    "temperature out of range": ({"temperature": 3.5}, 400, "invalid_request"),
    "n too large": ({"n": 1000}, 400, "invalid_request"),
    "schema of no type": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "sandwich"}}}},
        400,
        "invalid_request",
    ),
    "schema missing": ({"response_format": {"type": "json_schema"}}, 400, "invalid_request"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_input_is_refused_with_a_reason(name: str, deployment: Deployment) -> None:
    change, status, code = BAD_BODIES[name]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | change
    response = httpx.post(
        f"{deployment.url}/v1/chat/completions", json=body, headers=deployment.headers(), timeout=30.0
    )
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert len(response.json()["error"]["message"]) > 5
    assert httpx.get(f"{deployment.url}/health", timeout=20.0).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"", b"[1,2]", b"null", b"\xff\xfe\x00", b'{"model": NaN}', b"[" * 100_000])
def test_malformed_json_is_refused(content: bytes, deployment: Deployment) -> None:
    headers = deployment.headers() | {"Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/reviews"):
        response = httpx.post(f"{deployment.url}{path}", content=content, headers=headers, timeout=30.0)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic abc", "Bearer " + "x" * 5000])
def test_a_missing_or_wrong_key_is_401(header: str | None, deployment: Deployment) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/reviews"):
        response = httpx.post(f"{deployment.url}{path}", json={}, headers=headers, timeout=30.0)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_a_body_of_5_mb_is_413(deployment: Deployment) -> None:
    body = json.dumps({"x12": "A" * 5_000_000}).encode()
    headers = deployment.headers() | {"Content-Type": "application/json"}

    def pieces() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for content in (body, pieces()):  # with a declared length, and without one
        response = httpx.post(f"{deployment.url}/v1/reviews", content=content, headers=headers, timeout=60.0)
        assert response.status_code == 413
    assert httpx.get(f"{deployment.url}/health", timeout=20.0).status_code == 200


def test_unknown_paths_and_methods_have_the_error_shape(deployment: Deployment) -> None:
    response = httpx.get(f"{deployment.url}/v2/nothing", timeout=20.0)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    response = httpx.get(f"{deployment.url}/v1/completions", timeout=20.0)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


def test_client_sent_zones_are_stripped_and_counted(clean_deployment: Deployment) -> None:
    before = counters(clean_deployment)["zoneserve_stripped_client_parameters_total"]
    assert chat(clean_deployment, "hi", cache_salt="x", kv_transfer_params={"a": 1}, zone="public").status_code == 200
    assert counters(clean_deployment)["zoneserve_stripped_client_parameters_total"] - before == 3


def test_every_refusal_is_counted_with_its_reason(deployment: Deployment) -> None:
    def counted() -> Counter[str]:
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(httpx.get(f"{deployment.url}/metrics", timeout=20.0).text):
            for sample in family.samples:
                if sample.name == "zoneserve_refusals_total":
                    sums[sample.labels["reason"]] += int(sample.value)
                if sample.name == "zoneserve_requests_total":
                    sums[f"{sample.labels['route']} {sample.labels['status']}"] += int(sample.value)
        return sums

    before = counted()
    url = f"{deployment.url}/v1/completions"
    httpx.post(url, json={}, timeout=20.0)
    httpx.post(url, json={}, headers=deployment.headers(), timeout=20.0)
    httpx.post(url, json={"model": "none", "prompt": "x"}, headers=deployment.headers(), timeout=20.0)
    httpx.post(url, content=b"x" * 5_000_000, headers=deployment.headers(), timeout=20.0)
    httpx.get(f"{deployment.url}/elsewhere", timeout=20.0)
    after = counted()
    expected = ("invalid_api_key", "invalid_request", "model_not_found", "not_found")
    assert {reason: after[reason] - before[reason] for reason in expected} == dict.fromkeys(expected, 1)
    routes = {f"/v1/completions {status}": 1 for status in (400, 401, 404, 413)} | {"other 404": 1}
    assert {route: after[route] - before[route] for route in routes} == routes


def test_models_are_listed(deployment: Deployment) -> None:
    models = httpx.get(f"{deployment.url}/v1/models", headers=deployment.headers(), timeout=20.0).json()
    assert [model["id"] for model in models["data"]] == [MODEL]


def test_a_replica_says_outside_what_computes_and_that_it_is_not_what_was_configured(deployment: Deployment) -> None:
    """The deployment asks for native in float32, which only torch computes."""
    pools = httpx.get(f"{deployment.url}/health", timeout=20.0).json()["pools"]
    reason = "its KV cache is bfloat16, not float32"
    for (state,) in pools.values():
        assert set(state) == {"replica", "alive", "arithmetic", "backend_fallback"}
        assert (state["arithmetic"], state["backend_fallback"]) == ("torch-float32-cpu", reason)
    exposed = Exposition.parse(httpx.get(f"{deployment.url}/metrics", timeout=20.0).text)
    for role, pool in (("prefill", deployment.config.prefill), ("decode", deployment.config.decode)):
        assert exposed.total("zoneserve_engine_info", role=role, arithmetic="torch-float32-cpu") == 1
        assert exposed.total("zoneserve_backend_fallbacks_total", role=role, reason=reason) == 1
        assert exposed.total("zoneserve_replica_start_seconds", role=role) > 0
        assert exposed.total("zoneserve_pinned_cpus", role=role) == (len(pool.cpus) if can_pin(pool.cpus) else 0)

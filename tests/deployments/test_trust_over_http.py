"""Trust at the edge of a real deployment: tokens, contradictions, manifests, policy, and the audit log under faults."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from deployments.claims.model import text_sha256
from deployments.local import SIGNING_KEY_NAME
from deployments.review_client import SAMPLES
from deployments.trust.audit.chain import Record, chain_key
from deployments.trust.audit.files import AuditDirectory
from deployments.trust.audit.verify import merged, verify
from deployments.trust.keyring import read_keyring
from deployments.trust.manifest import Manifest, SharedSegment, publish, rfc3339
from deployments.trust.manifest_keys import read_signing_key
from deployments.trust.policy import DEFAULT_POLICY, load_policy
from load_tests.exposition import Exposition
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]

MODEL = "smollm2-135m-instruct"
TEXT = "The plan pays for one office visit a day and asks for a referral first. " * 8
RELOAD_TIMEOUT_S = 20.0


def post(deployment: Deployment, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> httpx.Response:
    return httpx.post(f"{deployment.url}{path}", json=body, headers=headers, timeout=120.0)


def chat(deployment: Deployment, headers: Mapping[str, str], text: str = "hi", **extra: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 2}
    return post(deployment, "/v1/chat/completions", body | extra, headers)


def metrics(deployment: Deployment) -> Exposition:
    return Exposition.parse(httpx.get(f"{deployment.url}/metrics", timeout=20.0).text)


def total(deployment: Deployment, counter: str, /, **labels: str) -> float:
    samples = metrics(deployment).samples
    return sum(v for n, found, v in samples if n == f"zoneserve_{counter}" and labels.items() <= found.items())


@contextmanager
def counted(deployment: Deployment, counter: str, num: int, /, **labels: str) -> Iterator[None]:
    """The counter goes up by exactly `num`."""
    before = total(deployment, counter, **labels)
    yield
    assert total(deployment, counter, **labels) - before == num


def hits(deployment: Deployment, call: Callable[[], httpx.Response]) -> float:
    """Prompt tokens of a successful call whose KV was found in a cache, on either side."""

    def found() -> float:
        by_origin = metrics(deployment).by_label("zoneserve_prompt_tokens_total", "origin")
        return by_origin["decode_cache"] + by_origin["prefill_cache"]

    before = found()
    response = call()
    assert response.status_code == 200, response.text
    return found() - before


def records(deployment: Deployment) -> list[Record]:
    """All audit records; fails where the logs do not verify."""
    assert deployment.config.trust.audit is not None
    keys = [chain_key(key) for key in read_keyring(deployment.config.trust.master_key_file).keys]
    with closing(AuditDirectory(deployment.config.trust.audit.dir)) as directory:
        result = verify(directory, keys)
        assert result.is_intact, result.findings
        return list(merged(directory, result))


def wait_for_record(deployment: Deployment, event: str, **fields: object) -> Record:
    def found() -> list[Record]:
        return [r for r in records(deployment) if r.event == event and fields.items() <= r.fields.items()]

    deployment.wait_until(lambda: bool(found()), RELOAD_TIMEOUT_S)
    return found()[-1]


class TestTokens:
    def test_a_token_of_the_issuer_opens_the_door(self, deployment: Deployment) -> None:
        assert chat(deployment, deployment.token_headers()).status_code == 200

    @pytest.mark.parametrize(
        ("reason", "claims"),
        [
            ("expired", {"exp": 1_000_000_000}),
            ("wrong_audience", {"aud": "others"}),
            ("wrong_issuer", {"iss": "https://other.example"}),
            ("bad_claim", {"tenant": "../beta"}),
            ("bad_signature", {"key": ec.generate_private_key(ec.SECP256R1())}),
        ],
    )
    def test_any_other_is_401_and_counted_and_audited_with_its_reason(
        self, reason: str, claims: dict[str, Any], deployment: Deployment
    ) -> None:
        time.sleep(1.0 - time.time() % 1.0)  # a new second: denials of others do not take this one's record
        with counted(deployment, "auth_denials_total", 3, reason=reason):
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/reviews"):
                response = post(deployment, path, {}, deployment.token_headers(**claims))
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
                assert reason not in response.text
        wait_for_record(deployment, "auth.deny", reason=reason)

    def test_a_tokens_cases_are_apart_and_each_finds_its_own(self, clean_deployment: Deployment) -> None:
        headers = clean_deployment.token_headers(cases=["case-1", "case-2"])

        def found(case: str) -> float:
            metadata = {"zoneserve.case": case}
            return hits(clean_deployment, lambda: chat(clean_deployment, headers, TEXT, metadata=metadata))

        assert found("case-1") == 0
        assert found("case-1") > 0
        assert found("case-2") == 0


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "a case of nobody's": ("not_its_case", {"metadata": {"zoneserve.case": "other"}}, {}),
    "a case that is no name": ("malformed_case", {"metadata": {"zoneserve.case": "../one"}}, {}),
    "more segments than texts": ("malformed_segments", {"metadata": {"zoneserve.segments": "a,b"}}, {}),
    "a zone of another tenant": ("claimed_zone", {"zone": "tenant/beta/case/one"}, {}),
    "no zone at all": ("claimed_zone", {"trust_zone": ["public"]}, {}),
    "a header with a zone of another tenant": ("claimed_zone", {}, {"X-Trust-Zone": "tenant/beta/plan/gold"}),
}


class TestContradictions:
    @pytest.mark.parametrize("name", CONTRADICTIONS)
    def test_what_contradicts_the_credential_is_403_counted_and_audited(
        self, name: str, deployment: Deployment
    ) -> None:
        reason, change, headers = CONTRADICTIONS[name]
        before = len([r for r in records(deployment) if r.event == "zone.deny"])
        with counted(deployment, "zone_denials_total", 1, reason=reason):
            response = chat(deployment, deployment.headers("alpha") | headers, **change)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
        assert "beta" not in response.text
        record = wait_for_record(deployment, "zone.deny", reason=reason, principal="alpha-reviewer")
        assert record.fields["policy_digest"] == load_policy(DEFAULT_POLICY).digest
        assert len([r for r in records(deployment) if r.event == "zone.deny"]) == before + 1

    def test_a_review_is_refused_likewise(self, deployment: Deployment) -> None:
        headers = deployment.headers("alpha") | {"X-Zone": "tenant/beta/case/one"}
        body = {"x12": (SAMPLES / "05-units.edi").read_text()}
        with counted(deployment, "zone_denials_total", 1, reason="claimed_zone"):
            assert post(deployment, "/v1/reviews", body, headers).status_code == 403

    @pytest.mark.parametrize("header", ["X-Cache-Salt", "X-Request-Disconnect-Disabled", "X-Zone"])
    def test_a_header_that_decides_nothing_is_counted(self, header: str, deployment: Deployment) -> None:
        with counted(deployment, "stripped_client_parameters_total", 1, name=header.lower()):
            assert chat(deployment, deployment.headers("alpha") | {header: "public"}).status_code == 200


class TestManifests:
    def test_text_is_shared_between_cases_while_a_manifest_lists_it_and_no_longer(
        self, clean_deployment: Deployment
    ) -> None:
        deployment = clean_deployment
        text = f"Contract of {secrets.token_hex(8)}. {TEXT}"
        cases = iter(range(100))

        def found(listed_as: str = "contract") -> float:
            case = f"shared-{next(cases)}"
            messages = [{"role": "system", "content": text}, {"role": "user", "content": "Is it paid?"}]
            extra = {"messages": messages, "metadata": {"zoneserve.segments": listed_as, "zoneserve.case": case}}
            return hits(deployment, lambda: chat(deployment, deployment.token_headers(cases=[case]), **extra))

        with counted(deployment, "segment_denials_total", 2, reason="not_listed"):
            assert (found(), found()) == (0, 0)  # in no manifest: each in its own case
        path = publish_for_alpha(deployment, {"contract": text}, f"contract-{secrets.token_hex(4)}")
        assert found() == 0
        assert found() > len(text) / 10
        assert found("another") == 0  # listed, but not under this name
        wait_for_record(deployment, "segment.label", zone="tenant/alpha/case/shared-3", num_shared=1)
        withdraw(deployment, path)
        assert found() == 0
        assert wait_for_record(deployment, "segment.deny", segment_id="another", zone="tenant/alpha/case/shared-4")

    def test_an_answer_to_shared_text_is_shared_with_nobody(self, clean_deployment: Deployment) -> None:
        """A schema can put any text into an answer: in the zone of the prompt it would lie open to the whole tenant."""
        deployment = clean_deployment
        text = f"Repeat {secrets.token_hex(8)}. {TEXT}"
        plan = f"answers-{secrets.token_hex(4)}"
        paths = [publish_for_alpha(deployment, {"contract": text}, plan)]

        def complete(case: str, prompt: str, listed_as: str, max_tokens: int) -> httpx.Response:
            body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
            metadata = {"zoneserve.segments": listed_as, "zoneserve.case": case}
            headers = deployment.token_headers(cases=[case])
            return post(deployment, "/v1/completions", body | {"metadata": metadata}, headers)

        answer = complete("writer", text, "contract", 64).json()["choices"][0]["text"]
        paths.append(publish_for_alpha(deployment, {"contract": text, "longer": text + answer}, plan, revision=2))
        shared = hits(deployment, lambda: complete("reader", text, "contract", 1))
        assert shared > 0
        assert hits(deployment, lambda: complete("reader", text + answer, "longer", 1)) == shared
        withdraw(deployment, *paths)

    def test_a_manifest_with_a_bad_signature_is_refused_counted_and_audited(self, deployment: Deployment) -> None:
        assert deployment.config.trust.manifests_dir is not None
        forged = deployment.config.trust.manifests_dir / "forged.json"
        good = next(deployment.config.trust.manifests_dir.glob("public.r*.json")).read_text()
        before = total(deployment, "manifest_refusals_total", reason="bad_signature")
        forged.write_text(good.replace('"revision":1', '"revision":2'))
        try:
            deployment.wait_until(
                lambda: total(deployment, "manifest_refusals_total", reason="bad_signature") == before + 1,
                RELOAD_TIMEOUT_S,
            )
            wait_for_record(deployment, "manifest.refuse", reason="bad_signature")
        finally:
            forged.unlink()


def publish_for_alpha(deployment: Deployment, texts: Mapping[str, str], plan: str, *, revision: int = 1) -> Path:
    """Share texts by id in a plan of tenant alpha's; returns once they are."""
    trust = deployment.config.trust
    assert trust.manifests_dir is not None
    assert trust.manifest_keys_file is not None
    now = time.time()
    manifest = Manifest(
        zone=f"tenant/alpha/plan/{plan}",
        revision=revision,
        approver="tests",
        effective=rfc3339(now),
        expires=rfc3339(now + 600),
        segments=tuple(SharedSegment(id=name, sha256=text_sha256(text), title=name) for name, text in texts.items()),
    )
    path = publish(
        trust.manifests_dir, manifest, read_signing_key(trust.manifest_keys_file.with_name(SIGNING_KEY_NAME))
    )
    wait_for_record(deployment, "manifest.load", zone=manifest.zone, revision=revision)
    return path


def withdraw(deployment: Deployment, *paths: Path) -> None:
    """Take the manifests of a zone away, the latest last; returns once it shares nothing."""
    zone = paths[0].name.partition(".r")[0].replace("..", "/")
    for path in paths:
        path.unlink()
    wait_for_record(deployment, "manifest.refuse", zone=zone, reason="withdrawn")


class TestPolicy:
    @pytest.fixture
    def policy_file(self, deployment: Deployment) -> Iterator[Path]:
        path = deployment.config.trust.policy_file
        assert path is not None
        yield path
        before = total(deployment, "policy_reloads_total", outcome="loaded")
        path.write_bytes(DEFAULT_POLICY.read_bytes())
        self.wait(deployment, "loaded", before)

    @staticmethod
    def wait(deployment: Deployment, outcome: str, before: float) -> None:
        deployment.wait_until(
            lambda: total(deployment, "policy_reloads_total", outcome=outcome) > before, RELOAD_TIMEOUT_S
        )

    def test_a_broken_file_is_refused_and_the_old_policy_stays(self, deployment: Deployment, policy_file: Path) -> None:
        before = total(deployment, "policy_reloads_total", outcome="refused")
        policy_file.write_text("version: 1\nrules: [{subject: '*', zone: public, allow: [fly]}]\n")
        self.wait(deployment, "refused", before)
        record = wait_for_record(deployment, "policy.refuse", reason="invalid")
        assert record.fields["policy_digest"] == load_policy(DEFAULT_POLICY).digest
        assert chat(deployment, deployment.headers("alpha")).status_code == 200

    def test_a_zone_that_the_policy_denies_is_not_cached_and_may_not_be_asked_for(
        self, clean_deployment: Deployment, policy_file: Path
    ) -> None:
        deployment = clean_deployment
        before = total(deployment, "policy_reloads_total", outcome="loaded")
        document = yaml.safe_load(DEFAULT_POLICY.read_text())
        rule = {"subject": {"tenant": "alpha"}, "zone": "tenant/alpha/case/*", "deny": ["write"]}
        policy_file.write_text(yaml.safe_dump(document | {"rules": [rule, *document["rules"]]}))
        self.wait(deployment, "loaded", before)
        headers = deployment.headers("alpha")
        with counted(deployment, "zone_denials_total", 2, reason="denied"):
            assert [hits(deployment, lambda: chat(deployment, headers, TEXT)) for _ in range(2)] == [0, 0]
        named = chat(deployment, headers, TEXT, metadata={"zoneserve.case": "one"})
        assert named.status_code == 403
        record = wait_for_record(deployment, "zone.deny", reason="denied", zone="tenant/alpha/case/one")
        assert (record.fields["verb"], record.fields["rule"]) == ("write", "0")
        assert record.fields["policy_digest"] == load_policy(policy_file).digest


def ingress_process() -> psutil.Process:
    (process,) = [p for p in psutil.Process().children(recursive=True) if "zoneserve:ingress" in " ".join(p.cmdline())]
    return process


class TestAudit:
    def test_a_review_leaves_a_record_of_all_that_decided_it_and_nothing_of_what_it_said(
        self, clean_deployment: Deployment
    ) -> None:
        body = {"x12": (SAMPLES / "05-units.edi").read_text()}
        answer = post(clean_deployment, "/v1/reviews", body, clean_deployment.headers("alpha")).json()
        text = f"My member id is {secrets.token_hex(16)}."
        assert chat(clean_deployment, clean_deployment.headers("alpha"), text).status_code == 200
        for item in answer["reviews"]:
            review = item["review"]
            record = wait_for_record(clean_deployment, "review.complete", review_id=review["review_id"])
            assert record.fields["zone"] == review["zone"]
            assert record.fields["rules_digest"] == review["provenance"]["rules_digest"]
            assert record.fields["policy_digest"] == load_policy(DEFAULT_POLICY).digest
            assert {"model_digest", "manifest_digest", "schema_digest", "prompt_digest", "output_digest"} <= set(
                record.fields
            )
            assert review["provenance"]["claim_digest"] not in record.fields.values()  # keyed
        assert clean_deployment.config.trust.audit is not None
        written = b"".join(path.read_bytes() for path in clean_deployment.config.trust.audit.dir.iterdir())
        said = [text, clean_deployment.keys["alpha"], *body["x12"].split("~")]
        said += [item["review"]["claim_id"] for item in answer["reviews"]]
        assert not [piece for piece in said if len(piece) > 8 and piece.encode() in written]

    def test_the_same_review_again_has_the_same_digests(self, clean_deployment: Deployment) -> None:
        body = {"x12": (SAMPLES / "08-identifiers.edi").read_text()}
        for _ in range(2):
            answer = post(clean_deployment, "/v1/reviews", body, clean_deployment.headers("alpha")).json()
        review_id = answer["reviews"][0]["review"]["review_id"]
        found = [r.fields for r in records(clean_deployment) if r.fields.get("review_id") == review_id]
        first, second = ({k: v for k, v in fields.items() if k != "request_id"} for fields in found[-2:])
        assert first == second
        assert found[-2]["request_id"] != found[-1]["request_id"]

    def test_private_work_is_refused_while_the_log_cannot_be_written_and_taken_again_after(
        self, clean_deployment: Deployment
    ) -> None:
        deployment = clean_deployment
        headers, review = deployment.headers("alpha"), {"x12": (SAMPLES / "05-units.edi").read_text()}
        assert total(deployment, "audit_writable", role="ingress") == 1
        assert deployment.config.trust.audit is not None
        process = ingress_process()
        newest = max(deployment.config.trust.audit.dir.glob("ingress-*.jsonl"), key=lambda path: path.stat().st_mtime)
        soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (newest.stat().st_size + 100, hard))  # in the middle of a record
        try:
            deployment.wait_until(lambda: chat(deployment, headers).status_code == 503, RELOAD_TIMEOUT_S)
            refused = [chat(deployment, headers), post(deployment, "/v1/reviews", review, headers)]
            assert [response.status_code for response in refused] == [503, 503]
            assert refused[0].json()["error"]["code"] == "audit_unavailable"
            assert int(refused[0].headers["Retry-After"]) >= 1
            assert chat(deployment, {}).status_code == 401
            assert httpx.get(f"{deployment.url}/v1/models", headers=headers, timeout=20.0).status_code == 200
            assert total(deployment, "audit_writable", role="ingress") == 0
            assert total(deployment, "refusals_total", reason="audit_unavailable") >= 3
        finally:
            process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
        deployment.wait_until(lambda: total(deployment, "audit_writable", role="ingress") == 1, RELOAD_TIMEOUT_S)
        assert chat(deployment, headers).status_code == 200
        assert post(deployment, "/v1/reviews", review, headers).status_code == 200
        assert total(deployment, "audit_lost_total") == 0
        records(deployment)

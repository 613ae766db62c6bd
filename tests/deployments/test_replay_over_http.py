"""`zoneserve audit replay` against the real deployment: what counts as the same review, and what it says where not."""

from __future__ import annotations

import base64
import copy
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from deployments.trust.audit import AuditEvent, AuditWriter, cli
from deployments.trust.audit.chain import Record
from deployments.trust.policy import DEFAULT_POLICY
from tests.deployments.test_reviews_over_http import CLAIM
from tests.deployments.test_trust_over_http import RELOAD_TIMEOUT_S, records, total
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]

CLAIMS = [
    CLAIM | {"claim_id": "SYNTH-R1", "member_id": "SYNTHREPLAY1"},
    CLAIM | {"claim_id": "SYNTH-R2", "member_id": "SYNTHREPLAY1"},  # the same service again: a duplicate of the first
]


def lines_of(*claims: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(claim).encode() + b"\n" for claim in claims)


@dataclass
class Reviewed:
    """A file that was reviewed, its second review as it was stored, and what replaying takes."""

    deployment: Deployment
    folder: Path
    review: dict[str, Any]

    @property
    def review_id(self) -> str:
        return str(self.review["review_id"])

    @property
    def audit_dir(self) -> Path:
        assert self.deployment.config.trust.audit is not None
        return self.deployment.config.trust.audit.dir

    @property
    def master_key_file(self) -> Path:
        assert self.deployment.config.trust.master_key_file is not None
        return self.deployment.config.trust.master_key_file

    def completed(self, review_id: str | None = None) -> list[Record]:
        return [
            record
            for record in records(self.deployment)
            if record.event == "review.complete" and record.fields["review_id"] == (review_id or self.review_id)
        ]

    def write(self, name: str, data: bytes | str) -> Path:
        path = self.folder / f"{secrets.token_hex(4)}-{name}"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def replay(
        self,
        *options: object,
        review_id: str | None = None,
        claim: bytes | None = None,
        directory: Path | None = None,
        master_key_file: Path | None = None,
        tenant: str = "alpha",
        url: str | None = None,
    ) -> tuple[int, str]:
        """Exit status and all that was said."""
        arguments = [
            "replay", review_id or self.review_id,
            "--dir", directory or self.audit_dir,
            "--master-key-file", master_key_file or self.master_key_file,
            "--claim", self.write("claims.jsonl", lines_of(*CLAIMS) if claim is None else claim),
            "--url", url or self.deployment.url,
            "--key-file", self.write("bearer", self.deployment.keys[tenant]),
        ]  # fmt: skip
        result = CliRunner().invoke(cli.audit_app, [str(item) for item in (*arguments, *options)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        said = result.stdout + result.stderr
        assert len(said.splitlines()) <= 5
        assert not [word for word in ("SYNTH", "replay1", self.deployment.keys[tenant]) if word in said]
        return result.exit_code, said

    def with_review(self, change: Callable[[dict[str, Any]], None]) -> tuple[int, str]:
        stored = copy.deepcopy(self.review)
        change(stored)
        return self.replay("--review", self.write("review.json", json.dumps(stored, indent=2)))


@pytest.fixture(scope="module")
def reviewed(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Reviewed:
    deployment.wait_for_recovery()
    content = base64.b64encode(lines_of(*CLAIMS)).decode()
    body = {"files": [{"name": "claims.jsonl", "content_base64": content}]}
    answer = httpx.post(
        f"{deployment.url}/v1/reviews", json=body, headers=deployment.headers("alpha"), timeout=120.0
    ).json()
    (review,) = [item["review"] for item in answer["reviews"] if item["review"]["claim_id"] == "SYNTH-R2"]
    assert review["flags"]
    return Reviewed(deployment, tmp_path_factory.mktemp("replay"), review)


def test_a_review_done_again_is_identical_and_audited_as_any(reviewed: Reviewed) -> None:
    before = len(reviewed.completed())
    code, said = reviewed.replay()
    assert (code, "identical: prompt_digest, " in said) == (0, True), said
    *_, recorded, replayed = reviewed.completed()
    assert len(reviewed.completed()) == before + 1
    assert recorded.fields["request_id"] != replayed.fields["request_id"]
    code, said = reviewed.with_review(lambda review: review.update(narrative_ref="renamed.md", created="another time"))
    assert (code, "identical: " in said) == (0, True), said


Change = Callable[[dict[str, Any]], Any]
TAMPERED: dict[str, tuple[Change, str]] = {
    "the action": (
        lambda review: review.update(recommended_action="pay"),
        "recommended_action: pay, now ",
    ),
    "the action, to no word of the schema": (
        lambda review: review.update(recommended_action="a secret word"),
        "recommended_action\n",
    ),
    "a sentence of the model": (
        lambda review: review["flags"][0]["model"].update(rationale="a secret word"),
        "flags[0].model.rationale\n",
    ),
    "an amount": (
        lambda review: review["flags"][0]["projected_overpayment"].update(cents=1),
        "flags[0].projected_overpayment.cents\n",
    ),
    "a flag taken away": (lambda review: review["flags"].pop(), "flags: "),
    "a field taken away": (lambda review: review["action"].pop("needs_person"), "action.needs_person: missing\n"),
    "a field put in": (
        lambda review: review["confidence"].update({"a secret word": 1}),
        "confidence: has a field that it should not have\n",
    ),
    "a number of another kind": (lambda review: review.update(abstained=0), "abstained\n"),
    "a digest": (
        lambda review: review["provenance"].update(plan_digest="0" * 64),
        "provenance.plan_digest\n",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_stored_review_that_was_tampered_with_differs_at_its_first_field(name: str, reviewed: Reviewed) -> None:
    change, where = TAMPERED[name]
    code, said = reviewed.with_review(change)
    assert code == 1
    assert "the replayed review is the one that was recorded\n" in said
    assert "the stored review is not the one that was recorded\n" in said
    assert f"the stored review first differs at {where}" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a review in JSON"),
        ("[]", "not a review in JSON"),
        ('{"review_id": NaN}', "not a review in JSON"),
        ("[" * 100_000, "not a review in JSON"),
        (json.dumps({"review_id": "0" * 32}), "another review_id"),
        ('"' + "x" * (1 << 20) + '"', "larger than"),
    ],
)
def test_what_is_no_review_or_another_is_not_compared(text: str, reason: str, reviewed: Reviewed) -> None:
    before = len(reviewed.completed())
    code, said = reviewed.replay("--review", reviewed.write("review.json", text))
    assert (code, reason in said) == (2, True), said
    assert len(reviewed.completed()) == before


@pytest.mark.parametrize(
    "change",
    [{"total_charge_cents": 5201}, {"claim_id": "SYNTH-R3"}, {"member_id": "SYNTHREPLAY2"}, {"plan_code": "X"}],
    ids=str,
)
def test_a_claim_that_was_changed_is_refused_before_anything_is_submitted(
    change: dict[str, Any], reviewed: Reviewed
) -> None:
    def resolved() -> int:
        return len([record for record in records(reviewed.deployment) if record.event == "zone.resolve"])

    before = resolved()
    code, said = reviewed.replay(claim=lines_of(CLAIMS[0], CLAIMS[1] | change))
    assert (code, "the claim of the record is not among the 2 given" in said) == (2, True), said
    assert resolved() == before


def test_a_claim_without_what_came_before_it_has_another_prompt(reviewed: Reviewed) -> None:
    code, said = reviewed.replay(claim=lines_of(CLAIMS[1]))
    assert (code, "different: prompt_digest: other claims came before it" in said) == (1, True), said


def test_the_files_of_a_call_may_be_several(reviewed: Reviewed) -> None:
    second = reviewed.write("second.jsonl", lines_of(CLAIMS[1]))
    code, said = reviewed.replay("--claim", second, claim=lines_of(CLAIMS[0]))
    assert (code, "identical" in said) == (0, True), said


def test_another_policy_cannot_be_compared(reviewed: Reviewed) -> None:
    deployment = reviewed.deployment
    path = deployment.config.trust.policy_file
    assert path is not None

    def change(data: bytes) -> None:
        before = total(deployment, "policy_reloads_total", outcome="loaded")
        path.write_bytes(data)
        deployment.wait_until(
            lambda: total(deployment, "policy_reloads_total", outcome="loaded") > before, RELOAD_TIMEOUT_S
        )

    document = yaml.safe_load(DEFAULT_POLICY.read_text())
    rule = {"subject": {"tenant": "nobody"}, "zone": "tenant/nobody/case/*", "allow": ["read"]}
    change(yaml.safe_dump(document | {"rules": [*document["rules"], rule]}).encode())
    try:
        for _ in range(2):  # the first leaves a record under this policy: the oldest still counts
            code, said = reviewed.replay()
            assert (code, said) == (2, "not comparable: not made under the same conditions: policy_digest\n")
        latest = reviewed.completed()[-1]
        code, said = reviewed.replay("--record", f"{latest.stream}:{latest.seq}")
        assert (code, f"recorded as {latest.stream}:{latest.seq}" in said) == (0, True), said
    finally:
        change(DEFAULT_POLICY.read_bytes())
    assert reviewed.replay()[0] == 0


def test_logs_that_are_not_intact_prove_nothing(reviewed: Reviewed, tmp_path: Path) -> None:
    (record, *_) = reviewed.completed()
    shutil.copytree(reviewed.audit_dir, tmp_path / "audit")
    (path,) = (tmp_path / "audit").glob(f"{record.stream}.*.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"outcome":"answered"', b'"outcome":"Answered"', 1))
    code, said = reviewed.replay(directory=tmp_path / "audit")
    assert (code, "not intact" in said) == (2, True), said
    code, said = reviewed.replay(master_key_file=reviewed.write("other.key", "ab" * 32))
    assert (code, "not intact" in said) == (2, True), said


def test_logs_of_another_deployment_are_told_apart(reviewed: Reviewed, tmp_path: Path) -> None:
    shutil.copytree(reviewed.audit_dir, tmp_path / "audit")
    code, said = reviewed.replay(directory=tmp_path / "audit")
    assert (code, "the replay left no record in these logs" in said) == (2, True), said


def test_a_review_that_no_log_holds_cannot_be_replayed(reviewed: Reviewed, tmp_path: Path) -> None:
    code, said = reviewed.replay(review_id="0" * 32)
    assert (code, said) == (2, "not comparable: the audit logs hold no record of this review\n")
    code, said = reviewed.replay("--record", "ingress-none:3")
    assert (code, said) == (2, "not comparable: ingress-none:3 is no record of this review\n")
    code, said = reviewed.replay(directory=tmp_path / "none")
    assert code == 2


def test_the_key_of_another_tenant_replays_nothing_of_this_one(reviewed: Reviewed) -> None:
    code, said = reviewed.replay(tenant="beta")
    assert (code, "the deployment reviewed no such claim" in said) == (2, True), said


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1", "nowhere"])
def test_a_deployment_that_does_not_answer_is_said(url: str, reviewed: Reviewed) -> None:
    code, said = reviewed.replay(url=url)
    assert (code, said.startswith("not comparable: ")) == (2, True), said


def test_a_review_from_before_a_rotation_is_found_under_its_own_key(reviewed: Reviewed) -> None:
    """The ring's newest key is not yet the deployment's."""
    ring = f"{secrets.token_hex(32)}\n{reviewed.master_key_file.read_text()}\n"
    code, said = reviewed.replay(master_key_file=reviewed.write("ring.key", ring))
    assert (code, "identical" in said) == (0, True), said


@pytest.fixture
def signed(reviewed: Reviewed) -> Iterator[Callable[..., str]]:
    """Puts a record of the review with other fields into the logs, signed as a replica would; gives its name."""
    master_key = bytes.fromhex(reviewed.master_key_file.read_text().strip())
    stream = f"ingress-test-{secrets.token_hex(4)}"
    with closing(AuditWriter(reviewed.audit_dir, stream, master_key)) as writer:

        def record(*without: str, **fields: str | int) -> str:
            before = len(reviewed.completed())
            kept = {name: value for name, value in reviewed.completed()[0].fields.items() if name not in without}
            writer.append(AuditEvent("review.complete", **(kept | fields)))
            deadline = time.monotonic() + RELOAD_TIMEOUT_S
            while len(reviewed.completed()) == before:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            return next(f"{r.stream}:{r.seq}" for r in reviewed.completed() if r.stream == stream)

        yield record


@pytest.mark.parametrize(
    ("fields", "expected", "said_at_least"),
    [
        ({"output_digest": "0" * 64}, 1, "different: output_digest\n"),
        ({"num_output_tokens": 1, "output_digest": "0" * 64}, 1, "different: num_output_tokens\n"),
        ({"action": "route_siu"}, 1, "different: action: route_siu was recorded, now "),
        ({"outcome": "output_cut"}, 1, "different: outcome: output_cut was recorded, now answered\n"),
        ({"outcome": "model_timeout"}, 2, "the model did not answer in one of them: model_timeout was recorded"),
        ({"model_digest": "0" * 64, "arithmetic": "native-avx2+torch"}, 2, "conditions: model_digest, arithmetic\n"),
        ({"manifest_digest": "0" * 64, "max_tokens": 1}, 2, "conditions: manifest_digest, max_tokens\n"),
        ({"schema_digest": "0" * 64, "rules_digest": "0" * 64}, 2, "conditions: schema_digest, rules_digest\n"),
        ({"claim_digest": "0" * 64}, 2, "the claim of the record is not among the 2 given"),
    ],
    ids=str,
)
def test_a_record_that_says_something_else_is_told_by_its_first_field(
    fields: dict[str, str | int], expected: int, said_at_least: str, reviewed: Reviewed, signed: Callable[..., str]
) -> None:
    code, said = reviewed.replay("--record", signed(**fields))
    assert (code, said_at_least in said) == (expected, True), said


def test_a_record_that_lacks_a_condition_is_not_compared(reviewed: Reviewed, signed: Callable[..., str]) -> None:
    code, said = reviewed.replay("--record", signed("policy_digest", "arithmetic", "tenant"))
    assert (code, said) == (2, "not comparable: the record does not have arithmetic, policy_digest, tenant\n")


def test_a_stored_review_that_came_out_again_but_was_not_recorded_is_told(
    reviewed: Reviewed, signed: Callable[..., str]
) -> None:
    stored = reviewed.write("review.json", json.dumps(reviewed.review))
    code, said = reviewed.replay("--record", signed(output_digest="0" * 64), "--review", stored)
    assert code == 1
    assert "different: output_digest\n" in said
    assert "the stored review is not the one that was recorded\n" in said
    assert "first differs" not in said


@pytest.mark.parametrize("key", [b"", b"two words", b"zs-a\nzs-b", "zs-ü".encode(), b"x" * 10_000])
def test_a_bearer_key_that_is_none_is_refused_and_not_repeated(key: bytes, reviewed: Reviewed) -> None:
    code, said = reviewed.replay("--key-file", reviewed.write("bearer", key))
    assert (code, said.endswith("not a bearer key\n")) == (2, True), said
    assert not key or key.decode()[3:] not in said


@pytest.mark.parametrize("record", ["", "5", "ingress:", "ingress:x", ":5"])
def test_a_record_is_named_by_log_and_number(record: str, reviewed: Reviewed) -> None:
    arguments = ["replay", "x", "--dir", "d", "--master-key-file", "m", "--claim", "c", "--url", "u", "--key-file", "k"]
    result = CliRunner().invoke(cli.audit_app, [*arguments, "--record", record])
    assert (result.exit_code, "LOG:SEQ" in result.stderr) == (2, True)

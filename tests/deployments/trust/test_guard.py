"""The ingress's guard over real files, a real audit log and real signatures; only Serve is missing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import operator
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from deployments.claims.model import text_sha256
from deployments.claims.prompt import LabelledPrompt, Segment
from deployments.config import AuditSection, ConfigError, JwtSection, TrustSection
from deployments.errors import AuditUnavailable, Forbidden, SignersUnavailable, Unauthorized
from deployments.metrics import PREFIX, IngressMetrics, exposition
from deployments.trust.audit.chain import Record, chain_key
from deployments.trust.audit.files import AuditDirectory, AuditError
from deployments.trust.audit.verify import merged, verify
from deployments.trust.guard import TrustGuard
from deployments.trust.in_force import TrustState
from deployments.trust.key_files import KeyFileError
from deployments.trust.manifest import Manifest, SharedSegment, publish, rfc3339
from deployments.trust.manifest_floors import FLOORS_NAME, FloorError
from deployments.trust.manifest_keys import create_signing_key, trust
from deployments.trust.policy import DEFAULT_POLICY, PolicyError
from deployments.trust.principals import Principal
from deployments.trust.tokens import KEYS_MIN_REFETCH_S
from deployments.trust.trail import MAX_AUTH_DENIALS_PER_S, AuditTrail
from engine.zone import EPHEMERAL, PUBLIC, Zone
from load_tests.exposition import Exposition
from tests.deployments.support import Clock

MASTER_KEY = b"m" * 32
PLAN, CASE = Zone.parse("tenant/acme/plan/gold"), Zone.parse("tenant/acme/case/c-1")
ANN = Principal("ann", "acme", CASE)
RUBRIC, SYSTEM = "Pay what the contract says.", "You review claims."


class Files:
    """A trust section's files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy, self.trusted = folder / "policy.yaml", folder / "trusted.yaml"
        self.policy.write_bytes(DEFAULT_POLICY.read_bytes())
        entry = {"sha256": hashlib.sha256(b"zs-key").hexdigest(), "principal": "ann", "tenant": "acme"}
        (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": [entry | {"zone": CASE.path}]}))
        self.signer = create_signing_key(folder / "signer.pem")
        trust(self.trusted, self.signer.public_key(), ["public", "tenant/acme/plan/*"])
        (folder / "manifests").mkdir()

    def section(self, **changes: Any) -> TrustSection:
        values: dict[str, Any] = {
            "keys_file": self.folder / "keys.yaml",
            "master_key_file": self.folder / "master.key",
            "policy_file": self.policy,
            "policy_reload_s": 3600.0,
            "manifests_dir": self.folder / "manifests",
            "manifest_keys_file": self.trusted,
            "audit": AuditSection(dir=self.folder / "audit"),
        }
        return TrustSection(**values | changes)

    def publish(self, zone: Zone, texts: dict[str, str], *, revision: int = 1, expires_in_s: float = 600) -> Path:
        now = time.time()
        manifest = Manifest(
            zone=zone.path,
            revision=revision,
            approver="tests",
            effective=rfc3339(now - 5),
            expires=rfc3339(now + expires_in_s),
            segments=tuple(SharedSegment(id=name, sha256=text_sha256(t), title=name) for name, t in texts.items()),
        )
        return publish(self.folder / "manifests", manifest, self.signer)

    def set_policy(self, **changes: Any) -> None:
        self.policy.write_text(yaml.safe_dump(yaml.safe_load(DEFAULT_POLICY.read_text()) | changes))

    def records(self) -> list[Record]:
        with closing(AuditDirectory(self.folder / "audit")) as directory:
            result = verify(directory, [chain_key(MASTER_KEY)])
            assert result.is_intact, result.findings
            return [r for r in merged(directory, result) if not r.event.startswith("audit.")]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@contextmanager
def guarding(section: TrustSection) -> Iterator[tuple[TrustGuard, IngressMetrics]]:
    metrics = IngressMetrics()
    with closing(TrustGuard(section, stream="ingress-1", master_key=MASTER_KEY, metrics=metrics)) as guard:
        yield guard, metrics


def total(metrics: IngressMetrics, counter: str, **labels: str) -> float:
    return Exposition.parse(exposition(metrics.registry)).total(PREFIX + counter, **labels)


def prompt(*segments: tuple[str, Zone, str]) -> LabelledPrompt:
    return LabelledPrompt(tuple(Segment(name, zone.path, text, "user", "1", "test") for name, zone, text in segments))


REVIEW = prompt(("system", PUBLIC, SYSTEM), ("rubric", PLAN, RUBRIC), ("case", CASE, "Claim 7."))


class TestAuthentication:
    def test_a_key_names_its_principal(self, files: Files) -> None:
        with guarding(files.section()) as (guard, _):
            assert asyncio.run(guard.authenticate("Bearer zs-key")) == ANN

    def test_a_token_names_its_principal_from_the_first_call_on(self, files: Files) -> None:
        signer = ec.generate_private_key(ec.SECP256R1())
        public = jwt.algorithms.ECAlgorithm.to_jwk(signer.public_key(), as_dict=True) | {"kid": "k"}
        (files.folder / "jwks.json").write_text(json.dumps({"keys": [public]}))
        section = JwtSection(jwks_file=files.folder / "jwks.json", issuer="id", audience="us", tenant_claim="org")
        claims = {"iss": "id", "aud": "us", "sub": "bob", "org": "other", "exp": int(time.time()) + 60}
        token = jwt.encode(claims, signer, algorithm="ES256", headers={"kid": "k"})
        with guarding(files.section(jwt=section)) as (guard, metrics):
            assert total(metrics, "jwks_fetches_total", outcome="loaded") == 1
            assert asyncio.run(guard.authenticate(f"Bearer {token}")) == Principal("bob", "other", EPHEMERAL)
            assert total(metrics, "jwks_fetches_total") == 1
        with guarding(files.section()) as (guard, _), pytest.raises(Unauthorized):  # static keys only
            asyncio.run(guard.authenticate(f"Bearer {token}"))

    def test_a_refusal_is_counted_and_audited_with_its_reason_and_says_none(self, files: Files) -> None:
        with guarding(files.section()) as (guard, metrics), pytest.raises(Unauthorized) as refusal:
            asyncio.run(guard.authenticate("Bearer zs-wrong"))
        assert "unknown_key" not in refusal.value.message
        assert total(metrics, "auth_denials_total", reason="unknown_key") == 1
        assert [r.fields for r in files.records() if r.event == "auth.deny"] == [{"reason": "unknown_key"}]

    def test_who_has_no_credential_cannot_fill_the_log(self, files: Files) -> None:
        clock = Clock()
        trail = AuditTrail(AuditTrail.open(files.section().audit, "ingress-1", MASTER_KEY)._writer, clock)
        for second in range(2):
            clock.now = second + 0.5
            for _ in range(3 * MAX_AUTH_DENIALS_PER_S):
                trail.note_auth_denial("no_credential")
        trail.close()
        assert [r.event for r in files.records()] == ["auth.deny"] * (2 * MAX_AUTH_DENIALS_PER_S)

    @pytest.mark.parametrize("age_s", [0, 20])
    def test_a_token_that_cannot_be_checked_now_is_503_and_says_when_to_come_back(
        self, age_s: int, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The caller's token may be good: a 401 would send it to log in again."""
        section = JwtSection(jwks_file=files.folder / "none.json", issuer="id", audience="us")
        token = jwt.encode({}, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256", headers={"kid": "k"})
        with guarding(files.section(jwt=section)) as (guard, metrics):
            monkeypatch.setattr(guard._jwks, "_clock", partial(operator.add, time.monotonic(), age_s))
            with pytest.raises(SignersUnavailable) as refusal:
                asyncio.run(guard.authenticate(f"Bearer {token}"))
        assert refusal.value.status == 503
        assert int(refusal.value.headers()["Retry-After"]) == pytest.approx(KEYS_MIN_REFETCH_S - age_s, abs=2)
        assert total(metrics, "auth_denials_total", reason="keys_unavailable") == 1
        assert [r.fields for r in files.records() if r.event == "auth.deny"] == [{"reason": "keys_unavailable"}]

    @pytest.mark.parametrize("url", ["https://[::1", "https://:443/keys"])
    def test_a_url_that_keys_cannot_come_from_is_a_fault_of_the_configuration(self, url: str, files: Files) -> None:
        section = JwtSection(jwks_url=url, issuer="id", audience="us")
        with pytest.raises(ConfigError, match=r"trust\.jwt\.jwks_url: "), guarding(files.section(jwt=section)):
            pass


class TestClientTexts:
    def test_listed_text_is_shared_and_the_rest_is_the_callers(self, files: Files) -> None:
        files.publish(PLAN, {"rubric": RUBRIC})
        with guarding(files.section()) as (guard, _):
            metadata = {"zoneserve.segments": "rubric"}
            grant = guard.scope(ANN, "chat-1").resolve([RUBRIC, "Claim 7."], metadata, [])
        assert grant.zones == (PLAN, CASE)
        by_event = {r.event: r.fields for r in files.records()}
        assert by_event["zone.resolve"]["zone"] == CASE.path
        assert by_event["segment.label"]["num_shared"] == 1
        assert by_event["zone.resolve"]["request_id"] == "chat-1"

    def test_text_of_another_tenants_plan_or_under_another_id_is_not_listed(self, files: Files) -> None:
        files.publish(PLAN, {"rubric": RUBRIC})
        bob = Principal("bob", "other", EPHEMERAL)
        with guarding(files.section()) as (guard, metrics):
            for principal, name in ((bob, "rubric"), (ANN, "policies")):
                scope = guard.scope(principal, "chat-1")
                grant = scope.resolve([RUBRIC], {"zoneserve.segments": name}, [])
                assert grant.zones == (principal.zone,)
        assert total(metrics, "segment_denials_total", reason="not_listed") == 2
        assert [r.fields["segment_id"] for r in files.records() if r.event == "segment.deny"] == ["rubric", "policies"]

    def test_a_contradiction_is_forbidden_counted_and_audited(self, files: Files) -> None:
        with guarding(files.section()) as (guard, metrics):
            with pytest.raises(Forbidden, match="not_its_case"):
                guard.scope(ANN, "chat-1").resolve(["x"], {"zoneserve.case": "c-2"}, [])
            with pytest.raises(Forbidden, match="claimed_zone"):
                guard.scope(ANN, "chat-2").require_no_contradiction(["tenant/other/plan/gold"])
            guard.scope(ANN, "chat-3").require_no_contradiction(["public"])
        assert total(metrics, "zone_denials_total") == 2
        denied = [r.fields for r in files.records() if r.event == "zone.deny"]
        assert [(f["reason"], f["request_id"], f["principal"]) for f in denied] == [
            ("not_its_case", "chat-1", "ann"),
            ("claimed_zone", "chat-2", "ann"),
        ]


class TestOurOwnPrompts:
    def test_listed_segments_keep_their_zones(self, files: Files) -> None:
        files.publish(PUBLIC, {"system": SYSTEM})
        files.publish(PLAN, {"rubric": RUBRIC})
        with guarding(files.section()) as (guard, metrics):
            assert guard.scope(ANN, "review-1").label(REVIEW).zones == (PUBLIC, PLAN, CASE)
        assert total(metrics, "segment_denials_total") == 0

    def test_an_unlisted_segment_goes_to_the_case_and_all_behind_it(self, files: Files) -> None:
        files.publish(PLAN, {"rubric": RUBRIC})
        with guarding(files.section()) as (guard, metrics):
            assert guard.scope(ANN, "review-1").label(REVIEW).zones == (CASE, CASE, CASE)
        assert total(metrics, "segment_denials_total", reason="not_listed") == 1
        (denied,) = [r.fields for r in files.records() if r.event == "segment.deny"]
        assert (denied["segment_id"], denied["zone"]) == ("system", CASE.path)

    def test_without_manifests_nothing_is_shared(self, files: Files) -> None:
        with guarding(files.section(manifests_dir=None, manifest_keys_file=None)) as (guard, _):
            assert set(guard.scope(ANN, "review-1").label(REVIEW).zones) == {CASE}

    def test_text_that_may_ask_for_no_zone_stays_in_none_and_all_behind_it(self, files: Files) -> None:
        mixed = prompt(("first", Zone.parse("tenant/acme/mixed"), RUBRIC), ("case", CASE, "Claim 7."))
        with guarding(files.section()) as (guard, metrics):
            assert guard.scope(ANN, "review-1").label(mixed).zones == (EPHEMERAL, EPHEMERAL)
        assert total(metrics, "segment_denials_total", reason="not_a_segment_zone") == 1

    @pytest.mark.parametrize(
        ("changes", "zones"),
        [
            ({"strict": True}, (PLAN, PLAN, CASE)),
            ({"rules": []}, (EPHEMERAL,) * 3),
            (
                {"rules": [{"subject": "*", "zone": "tenant/{tenant}/case/*", "allow": ["read", "write"]}]},
                (CASE, CASE, CASE),
            ),
        ],
    )
    def test_the_policy_has_the_last_word(self, changes: dict[str, Any], zones: tuple[Zone, ...], files: Files) -> None:
        files.publish(PUBLIC, {"system": SYSTEM})
        files.publish(PLAN, {"rubric": RUBRIC})
        files.set_policy(**changes)
        with guarding(files.section()) as (guard, _):
            assert guard.scope(ANN, "review-1").label(REVIEW).zones == zones


class TestReload:
    def state(self, files: Files) -> tuple[TrustState, IngressMetrics, AuditTrail, Clock]:
        metrics, clock = IngressMetrics(), Clock(time.time())
        trail = AuditTrail.open(files.section().audit, "ingress-1", MASTER_KEY)
        return TrustState(files.section(), trail, metrics, clock), metrics, trail, clock

    def events(self, files: Files, trail: AuditTrail) -> list[tuple[str, object]]:
        trail.close()
        return [(r.event, r.fields.get("reason", r.fields.get("revision"))) for r in files.records()]

    def test_manifests_come_change_expire_and_go_and_each_is_told_once(self, files: Files) -> None:
        state, metrics, trail, clock = self.state(files)
        assert state.in_force().manifests == {}
        first = files.publish(PLAN, {"rubric": RUBRIC})
        for _ in range(3):
            state.reload()
        assert state.in_force().is_shareable(PLAN, text_sha256(RUBRIC))
        assert total(metrics, "manifests_in_force") == 1
        second = files.publish(PLAN, {"rubric": RUBRIC + "!"}, revision=2, expires_in_s=60)
        state.reload()
        assert not state.in_force().is_shareable(PLAN, text_sha256(RUBRIC))
        before = state.in_force().manifest_digest
        clock.now += 100
        assert state.in_force().manifests == {}  # at once, without a reload
        assert state.in_force().manifest_digest != before
        state.reload()
        clock.now -= 100
        state.reload()
        first.unlink()
        second.unlink()
        state.reload()
        assert total(metrics, "manifests_in_force") == 0
        assert self.events(files, trail) == [
            ("policy.load", None),
            ("manifest.load", 1),
            ("manifest.load", 2),
            ("manifest.refuse", "expired"),
            ("manifest.load", 2),
            ("manifest.refuse", "withdrawn"),
        ]

    def test_a_refused_manifest_is_counted_once_and_again_when_it_comes_back(self, files: Files) -> None:
        state, metrics, trail, _ = self.state(files)
        path = files.folder / "manifests" / "a.json"
        for content in ("{", None, "["):
            path.write_text(content) if content else path.unlink()
            state.reload()
            state.reload()
        assert total(metrics, "manifest_refusals_total") == 2
        assert len(self.events(files, trail)) == 3

    def test_a_key_that_is_no_longer_trusted_takes_its_manifests_along(self, files: Files) -> None:
        files.publish(PLAN, {"rubric": RUBRIC})
        state, _, trail, _ = self.state(files)
        assert PLAN in state.in_force().manifests
        files.trusted.write_text("keys: []\n")
        state.reload()
        assert state.in_force().manifests == {}
        trail.close()

    def test_a_broken_file_of_trusted_keys_leaves_the_old_ones(self, files: Files) -> None:
        files.publish(PLAN, {"rubric": RUBRIC})
        state, metrics, trail, _ = self.state(files)
        files.trusted.write_text("keys: 5\n")
        state.reload()
        state.reload()
        assert PLAN in state.in_force().manifests
        assert total(metrics, "manifest_refusals_total", reason="unreadable") == 1
        trail.close()

    def test_a_restart_opens_no_way_back_to_an_older_revision(self, files: Files) -> None:
        section = files.section(state_dir=files.folder / "state")
        older, newer = (files.publish(PLAN, {"rubric": RUBRIC}, revision=revision) for revision in (1, 2))
        with guarding(section):
            pass
        newer.unlink()
        with guarding(section) as (guard, metrics):
            assert guard.scope(ANN, "review-1").label(REVIEW).zones == (CASE, CASE, CASE)
            assert total(metrics, "manifest_refusals_total", reason="rolled_back") == 1
        with guarding(files.section()) as (guard, metrics):  # in memory only: nothing is known of revision 2
            assert guard._state.in_force().is_shareable(PLAN, text_sha256(RUBRIC))
        assert older.exists()

    def test_floors_that_cannot_be_kept_are_told_once_and_kept_as_soon_as_they_can(self, files: Files) -> None:
        files.publish(PLAN, {"rubric": RUBRIC})
        (files.folder / "state").write_text("no folder")
        section = files.section(state_dir=files.folder / "state")
        metrics, clock = IngressMetrics(), Clock(time.time())
        with pytest.raises(FloorError):
            TrustState(section, AuditTrail(None), metrics, clock)
        (files.folder / "state").unlink()
        trail = AuditTrail.open(section.audit, "ingress-1", MASTER_KEY)
        state = TrustState(section, trail, metrics, clock)
        floors = files.folder / "state" / FLOORS_NAME
        kept = floors.read_bytes()
        floors.unlink()
        floors.mkdir()
        for _ in range(3):
            state.reload()
        assert state.in_force().is_shareable(PLAN, text_sha256(RUBRIC))
        assert total(metrics, "manifest_refusals_total", reason="floors_not_kept") == 1
        floors.rmdir()
        state.reload()
        assert floors.read_bytes() == kept
        assert self.events(files, trail) == [
            ("policy.load", None),
            ("manifest.load", 1),
            ("manifest.refuse", "floors_not_kept"),
        ]

    def test_a_broken_policy_leaves_the_old_one_and_is_told_once(self, files: Files) -> None:
        state, metrics, trail, _ = self.state(files)
        policy = state.in_force().policy
        files.policy.write_text("version: 1\nrules: 5\n")
        state.reload()
        state.reload()
        assert state.in_force().policy is policy
        files.set_policy(strict=True)
        state.reload()
        assert state.in_force().policy.strict
        assert total(metrics, "policy_reloads_total", outcome="refused") == 1
        assert total(metrics, "policy_reloads_total", outcome="loaded") == 2
        assert self.events(files, trail) == [("policy.load", None), ("policy.refuse", "invalid"), ("policy.load", None)]

    def test_a_running_guard_sees_a_change_by_itself(self, files: Files) -> None:
        with guarding(files.section(policy_reload_s=0.1)) as (guard, _):
            files.publish(PLAN, {"rubric": RUBRIC})
            deadline = time.monotonic() + 20
            while guard.scope(ANN, "chat-1").resolve([RUBRIC], {"zoneserve.segments": "rubric"}, []).zones != (PLAN,):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    @pytest.mark.parametrize(
        ("name", "kind"), [("policy.yaml", PolicyError), ("trusted.yaml", KeyFileError), ("keys.yaml", KeyFileError)]
    )
    def test_a_guard_does_not_begin_with_a_broken_file(self, name: str, kind: type[Exception], files: Files) -> None:
        (files.folder / name).write_text("5")
        with pytest.raises(kind), guarding(files.section()):
            pass


class TestAudit:
    def test_nothing_private_begins_while_the_log_cannot_be_written(self, files: Files) -> None:
        with guarding(files.section()) as (guard, _):
            guard.scope(ANN, "chat-1")
            guard._trail.close()
            with pytest.raises(AuditUnavailable):
                guard.scope(ANN, "chat-2")
            with pytest.raises(Unauthorized):  # and not a word on the log
                asyncio.run(guard.authenticate(None))

    def test_without_a_log_everything_else_is_the_same(self, files: Files) -> None:
        with guarding(files.section(audit=None)) as (guard, _):
            scope = guard.scope(ANN, "review-1")
            assert set(scope.label(REVIEW).zones) == {CASE}
            asyncio.run(scope.completed({}))
            assert guard.audit_metrics() is None
        assert not (files.folder / "audit").exists()

    def test_what_the_log_has_done_is_exposed(self, files: Files) -> None:
        with guarding(files.section()) as (guard, metrics):
            asyncio.run(
                guard.scope(ANN, "review-1").completed(
                    {"review_id": "r-1", "zone": CASE.path, "outcome": "answered", "output_digest": "0" * 64}
                )
            )
            exposed = Exposition.parse(exposition(metrics.registry, guard.audit_metrics()))
        assert exposed.total(PREFIX + "audit_appended_total") == 3  # audit.open, policy.load, review.complete
        assert exposed.total(PREFIX + "audit_writable") == 1
        (record,) = [r for r in files.records() if r.event == "review.complete"]
        assert (record.fields["principal"], record.fields["tenant"]) == ("ann", "acme")

    def test_two_guards_do_not_share_a_stream(self, files: Files) -> None:
        with guarding(files.section()), pytest.raises(AuditError, match="another process"), guarding(files.section()):
            pass

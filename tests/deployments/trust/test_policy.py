"""Policy: the first rule that matches decides, none means no, and a broken file changes nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.trust.policy import (
    DEFAULT_POLICY,
    MAX_POLICY_BYTES,
    MAX_RULES,
    DecisionReason,
    Policy,
    PolicyError,
    PolicyFault,
    PolicyStore,
    Reload,
    Verb,
    ZonePattern,
    load_policy,
)
from deployments.trust.principals import Principal
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneKind
from tests.deployments.support import write_yaml

ANN = Principal("ann", "acme", EPHEMERAL, frozenset({"reviewer"}))
BOB = Principal("bob", "rival", EPHEMERAL)
GOLD, SILVER = Zone.parse("tenant/acme/plan/gold"), Zone.parse("tenant/acme/plan/silver")
CASE, RIVAL_CASE = Zone.parse("tenant/acme/case/c"), Zone.parse("tenant/rival/case/c")
RIVAL_PLAN = Zone.parse("tenant/rival/plan/gold")
MIXED = Zone.parse("tenant/acme/mixed")

BAD_PARTS = [
    "", "..", ".", "a..b", "-a", "Acme", "ａｃｍｅ", "асme", "ac\u200bme", "acme%2e", "%61cme", "a\x00b", "a\n",
    " acme", "a b", "a/b", "a\\b", "~", "{case}", "{tenant}x", "**", "a*", "x" * 65, "x" * 10_000,
]  # fmt: skip


def rule_of(subject: object, zone: str, **verbs: list[str]) -> dict[str, object]:
    return {"subject": subject, "zone": zone, **verbs}


def document(*rules: object, **changes: object) -> dict[str, object]:
    return {"version": 1, "rules": list(rules)} | changes


def policy(*rules: object, **changes: object) -> Policy:
    return Policy.model_validate(document(*rules, **changes))


def allowed(of: Policy, principal: Principal, zone: Zone) -> set[str]:
    return {verb.value for verb in Verb if of.decide(principal, verb, zone).allowed}


# --- strategies ---

names = st.sampled_from(["acme", "rival", "c", "gold"])
tenants = st.sampled_from(["acme", "rival", "third"])
roles = st.sampled_from(["reviewer", "zone-admin"])
principals = st.builds(
    lambda name, tenant, held: Principal(name, tenant, EPHEMERAL, held), names, tenants, st.frozensets(roles)
)
zones = st.one_of(
    st.sampled_from([PUBLIC, EPHEMERAL]),
    st.builds(lambda tenant: Zone(ZoneKind.MIXED, tenant), tenants),
    st.builds(Zone, st.sampled_from([ZoneKind.PLAN, ZoneKind.CASE]), tenants, names),
)
verbs = st.sampled_from(list(Verb))
subjects = st.just("*") | st.one_of(
    st.fixed_dictionaries({"tenant": tenants}, optional={"principal": names, "role": roles}),
    st.fixed_dictionaries({"role": roles}),
)


def rules(tenant_parts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, object]]:
    patterns = st.just("public") | st.builds(
        "tenant/{}/{}/{}".format, tenant_parts, st.sampled_from(["plan", "case"]), names | st.just("*")
    )
    effects = st.builds(
        lambda effect, listed: {effect: sorted(listed)},
        st.sampled_from(["allow", "deny"]),
        st.sets(verbs.map(str), min_size=1),
    )
    return st.builds(lambda subject, zone, effect: rule_of(subject, zone) | effect, subjects, patterns, effects)


any_rules = rules(tenants | st.sampled_from(["*", "{tenant}"]))
own_rules = rules(st.just("{tenant}"))


def oracle(rule: dict[str, Any], principal: Principal, verb: Verb, zone: Zone) -> bool:
    """Whether a rule matches, in the plainest words."""
    subject = {} if rule["subject"] == "*" else rule["subject"]
    held = {"principal": [principal.name], "tenant": [principal.tenant], "role": principal.roles}
    parts, path = rule["zone"].replace("{tenant}", principal.tenant).split("/"), zone.path.split("/")
    return (
        verb.value in (rule.get("allow") or rule["deny"])
        and all(value in held[key] for key, value in subject.items())
        and len(parts) == len(path)
        and all(part in ("*", name) for part, name in zip(parts, path, strict=True))
    )


# --- decisions ---


@given(st.lists(any_rules, max_size=6), principals, verbs, zones)
def test_first_rule_that_matches_decides_and_none_means_no(
    listed: list[dict[str, Any]], principal: Principal, verb: Verb, zone: Zone
) -> None:
    decision = policy(*listed).decide(principal, verb, zone)
    matching = [index for index, rule in enumerate(listed) if oracle(rule, principal, verb, zone)]
    assert decision.rule == (matching[0] if matching else None)
    assert decision.allowed == bool(matching and "allow" in listed[matching[0]])
    expected = {(True, True): DecisionReason.ALLOWED, (True, False): DecisionReason.DENIED}
    assert decision.reason is expected.get((bool(matching), decision.allowed), DecisionReason.NO_RULE)
    assert (decision.verb, decision.zone, decision.policy_digest) == (verb, zone, policy(*listed).digest)


@given(st.lists(own_rules, max_size=8), principals, verbs, zones)
def test_policy_of_own_tenant_patterns_never_reaches_another_tenant(
    listed: list[object], principal: Principal, verb: Verb, zone: Zone
) -> None:
    decision = policy(*listed).decide(principal, verb, zone)
    assert not decision.allowed or zone == PUBLIC or zone.tenant == principal.tenant


@given(st.lists(any_rules, max_size=6), principals, verbs, zones)
def test_strict_policy_shares_nothing_between_tenants_whatever_its_rules(
    listed: list[object], principal: Principal, verb: Verb, zone: Zone
) -> None:
    strict, lenient = policy(*listed, strict=True), policy(*listed)
    decision = strict.decide(principal, verb, zone)
    if verb in (Verb.READ, Verb.WRITE) and zone.tenant != principal.tenant:
        assert (decision.allowed, decision.rule, decision.reason) == (False, None, DecisionReason.STRICT)
    else:
        same = lenient.decide(principal, verb, zone)
        assert (decision.allowed, decision.rule, decision.reason) == (same.allowed, same.rule, same.reason)
    assert decision.policy_digest == strict.digest != lenient.digest


@given(principals, verbs, zones)
def test_no_rules_allow_nothing(principal: Principal, verb: Verb, zone: Zone) -> None:
    assert not policy().decide(principal, verb, zone).allowed


@given(st.lists(any_rules, max_size=6), principals, verbs)
def test_zones_that_are_never_cached_are_never_allowed(listed: list[object], principal: Principal, verb: Verb) -> None:
    assert not any(policy(*listed).decide(principal, verb, zone).allowed for zone in (EPHEMERAL, MIXED))


def test_a_denial_before_an_allowance_takes_out_its_verbs_alone() -> None:
    of = policy(
        rule_of({"tenant": "acme", "principal": "ann"}, "tenant/{tenant}/plan/gold", deny=["read"]),
        rule_of("*", "tenant/{tenant}/plan/*", allow=["read", "pin"]),
    )
    assert allowed(of, ANN, GOLD) == {"pin"}
    assert allowed(of, ANN, SILVER) == {"read", "pin"}


def test_all_of_a_subject_must_hold() -> None:
    of = policy(rule_of({"tenant": "acme", "role": "reviewer"}, "tenant/*/case/*", allow=["purge"]))
    assert allowed(of, ANN, RIVAL_CASE) == {"purge"}
    assert allowed(of, Principal("ann", "acme", EPHEMERAL), CASE) == set()
    assert allowed(of, Principal("ann", "rival", EPHEMERAL, frozenset({"reviewer"})), CASE) == set()


def test_principal_of_a_rule_is_one_of_its_tenant_alone() -> None:
    of = policy(rule_of({"tenant": "acme", "principal": "ann"}, "public", allow=["pin"]))
    assert allowed(of, ANN, PUBLIC) == {"pin"}
    assert allowed(of, Principal("amy", "acme", EPHEMERAL), PUBLIC) == set()
    assert allowed(of, Principal("ann", "rival", EPHEMERAL), PUBLIC) == set()


# --- the shipped policy ---


def test_shipped_policy_gives_own_cases_and_the_reading_of_public_and_own_plans() -> None:
    shipped = load_policy(DEFAULT_POLICY)
    assert not shipped.strict
    assert allowed(shipped, ANN, CASE) == {"read", "write"}
    assert allowed(shipped, ANN, PUBLIC) == allowed(shipped, ANN, GOLD) == {"read"}
    for foreign in (RIVAL_CASE, RIVAL_PLAN, MIXED, EPHEMERAL):
        assert allowed(shipped, ANN, foreign) == set()
    assert allowed(shipped, BOB, RIVAL_CASE) == {"read", "write"}


def test_shipped_roles_pin_and_purge_what_is_theirs() -> None:
    shipped = load_policy(DEFAULT_POLICY)
    admin = Principal("ann", "acme", EPHEMERAL, frozenset({"zone-admin"}))
    operator = Principal("ann", "acme", EPHEMERAL, frozenset({"operator"}))
    theirs = {"pin", "purge"}
    assert [allowed(shipped, admin, zone) & theirs for zone in (GOLD, CASE, PUBLIC, RIVAL_PLAN, RIVAL_CASE)] == [
        theirs, theirs, set(), set(), set(),
    ]  # fmt: skip
    assert [allowed(shipped, operator, zone) & theirs for zone in (GOLD, CASE, PUBLIC)] == [set(), set(), theirs]
    assert all(not allowed(shipped, ANN, zone) & theirs for zone in (GOLD, CASE, PUBLIC))


@given(principals, verbs, zones)
def test_shipped_policy_reaches_no_other_tenant(principal: Principal, verb: Verb, zone: Zone) -> None:
    decision = load_policy(DEFAULT_POLICY).decide(principal, verb, zone)
    assert not decision.allowed or zone == PUBLIC or zone.tenant == principal.tenant


# --- zone paths and patterns ---


@pytest.mark.parametrize("part", BAD_PARTS)
def test_path_with_a_part_that_is_no_name_is_refused(part: str) -> None:
    for path in (
        part,
        f"tenant/{part}/case/c",
        f"tenant/acme/case/{part}",
        f"tenant/acme/{part}/c",
        f"{part}/a/case/c",
    ):
        with pytest.raises(ValueError):
            Zone.parse(path)
        with pytest.raises(ValueError, match=r"^a zone pattern is ") as refusal:
            ZonePattern.parse(path)
        assert len(str(refusal.value)) < 200
    with pytest.raises(ValueError):
        Zone.parse(f"tenant/{part}/mixed")


@pytest.mark.parametrize("path", ["*", "{tenant}", "tenant/*/plan/p", "tenant/{tenant}/case/c", "tenant/a/case/*"])
def test_pattern_is_no_zone(path: str) -> None:
    with pytest.raises(ValueError):
        Zone.parse(path)


@pytest.mark.parametrize(
    "text",
    ["*", "{tenant}", "tenant/*", "tenant/acme", "tenant/acme/*", "tenant/acme/*/*", "tenant/acme/mixed", "ephemeral",
     "tenant/acme/plan/{tenant}", "Public", "public/", "/public", "tenant//plan/p", "tenant/acme/plan/p/",
     "tenant/*/*/*"],
)  # fmt: skip
def test_pattern_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        ZonePattern.parse(text)


@given(zones.filter(lambda zone: zone.is_cacheable), zones)
def test_pattern_without_a_star_is_exactly_its_zone(written: Zone, zone: Zone) -> None:
    assert ZonePattern.parse(written.path).matches(zone, "third") == (written == zone)


# --- the file ---

GOOD_RULE = rule_of("*", "public", allow=["read"])
BAD_DOCUMENTS = [
    (None, "top level"),
    ([], "top level"),
    ({}, "version: Field required"),
    ({"version": 1}, "rules: Field required"),
    (document(version=2), "version"),
    (document(version="1"), "version"),
    (document(strict="yes"), "strict"),
    (document(colour="red"), "colour: Extra inputs"),
    (document(rules={}), "rules"),
    (document("*"), "rules.0"),
    (document(GOOD_RULE, GOOD_RULE | {"colour": 1}), "rules.1.colour: Extra inputs"),
    (document(rule_of("*", "public", allow=["read", "delete"])), "rules.0.allow.1: Input should be 'read', 'write'"),
    (document(rule_of("*", "public", deny=["READ"])), "rules.0.deny.0"),
    (document(rule_of("*", "public", allow=[True])), "rules.0.allow.0"),
    (document(rule_of("*", "public", allow=["*"])), "rules.0.allow.0"),
    (document(rule_of("*", "public", allow="read")), "rules.0.allow"),
    (document(rule_of("*", "public", allow=["read"] * 5)), "rules.0.allow"),
    (document(rule_of("*", "public", allow=["read"], deny=["write"])), "rules.0: a rule has either allow or deny"),
    (document(rule_of("*", "public")), "rules.0: a rule has either allow or deny"),
    (document(rule_of("*", "public", allow=[])), "rules.0: a rule has either allow or deny"),
    (document({"subject": "*", "allow": ["read"]}), "rules.0.zone: Field required"),
    (document({"zone": "public", "allow": ["read"]}), "rules.0.subject: Field required"),
    (document(rule_of("ann", "public", allow=["read"])), "rules.0.subject"),
    (document(rule_of({}, "public", allow=["read"])), "rules.0.subject: a subject is '*'"),
    (document(rule_of({"role": None}, "public", allow=["read"])), "rules.0.subject: a subject is '*'"),
    (document(rule_of(None, "public", allow=["read"])), "rules.0.subject"),
    (document(rule_of({"tenant": "*"}, "public", allow=["read"])), "rules.0.subject.tenant"),
    (document(rule_of({"tenant": 7}, "public", allow=["read"])), "rules.0.subject.tenant"),
    (document(rule_of({"role": "a..b"}, "public", allow=["read"])), "rules.0.subject.role"),
    (document(rule_of({"group": "g"}, "public", allow=["read"])), "rules.0.subject.group: Extra inputs"),
    (document(rule_of({"principal": "ann"}, "public", allow=["read"])), "named together with its tenant"),
    (document(rule_of("*", "tenant/../plan/p", allow=["read"])), "rules.0.zone: a zone pattern is"),
    (document(rule_of("*", "x" * 10_000, allow=["read"])), "rules.0.zone: a zone pattern is"),
    (document(*[GOOD_RULE] * (MAX_RULES + 1)), "rules: "),
]


@pytest.mark.parametrize(("content", "fault"), BAD_DOCUMENTS)
def test_file_that_says_something_else_is_refused_with_its_place(tmp_path: Path, content: object, fault: str) -> None:
    path = write_yaml(tmp_path / "policy.yaml", content)
    with pytest.raises(PolicyError) as refusal:
        load_policy(path)
    assert refusal.value.fault is PolicyFault.INVALID
    assert str(refusal.value).startswith(f"{path}: {fault}") or fault in str(refusal.value)
    assert len(str(refusal.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"rules: [", PolicyFault.NOT_YAML),
        (b"\xff\xfe\xfa", PolicyFault.NOT_YAML),
        (b"rules: " + b"[" * 2000, PolicyFault.NOT_YAML),
        (b"rules: !!python/name:os.system", PolicyFault.NOT_YAML),
        (b"version: 2024-13-45", PolicyFault.NOT_YAML),
        (b"version: 1\nstrict: true\nrules: []\nstrict: false\n", PolicyFault.NOT_YAML),
        (b"version: 1\nrules: []\n---\nversion: 1\n", PolicyFault.NOT_YAML),
        (b"#" * (MAX_POLICY_BYTES + 1), PolicyFault.TOO_LARGE),
    ],
)
def test_file_that_is_no_yaml_or_too_large_is_refused(tmp_path: Path, text: bytes, fault: PolicyFault) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(text)
    with pytest.raises(PolicyError, match=r"policy\.yaml: ") as refusal:
        load_policy(path)
    assert refusal.value.fault is fault


def test_key_that_stands_twice_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nrules:\n  - subject: '*'\n    zone: public\n    allow: [read]\n    allow: [purge]\n")
    with pytest.raises(PolicyError, match=r"\(line 3\): a key stands twice"):
        load_policy(path)


def test_as_many_rules_as_allowed_are_taken() -> None:
    assert len(policy(*[GOOD_RULE] * MAX_RULES).rules) == MAX_RULES


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file") as refusal:
        load_policy(tmp_path / "none.yaml")
    assert refusal.value.fault is PolicyFault.UNREADABLE


# --- its digest ---


def test_digest_does_not_depend_on_layout(tmp_path: Path) -> None:
    plain = write_yaml(tmp_path / "a.yaml", document(rule_of("*", "public", allow=["read", "pin"])))
    other = tmp_path / "b.yaml"
    other.write_text(
        "# a comment\nstrict: false\nrules:\n- allow: [pin, read, pin]\n  zone: 'public'\n  subject: '*'\nversion: 1\n"
    )
    assert load_policy(plain).digest == load_policy(other).digest
    assert len(load_policy(plain).digest) == 64


@given(st.lists(any_rules, max_size=4), st.lists(any_rules, max_size=4), st.booleans(), st.booleans())
def test_digests_are_equal_exactly_where_policies_are(
    one: list[object], other: list[object], one_strict: bool, other_strict: bool
) -> None:
    left, right = policy(*one, strict=one_strict), policy(*other, strict=other_strict)
    assert (left.digest == right.digest) == (left == right)


# --- reloading ---

READ_PUBLIC = document(GOOD_RULE)
READ_NOTHING = document()


def test_store_without_a_good_policy_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(PolicyError):
        PolicyStore(tmp_path / "none.yaml")
    with pytest.raises(PolicyError):
        PolicyStore(write_yaml(tmp_path / "bad.yaml", {"version": 1}))


def test_changed_file_takes_effect_at_the_next_look(tmp_path: Path) -> None:
    store = PolicyStore(write_yaml(tmp_path / "policy.yaml", READ_PUBLIC))
    assert store.reload() is Reload.UNCHANGED
    before = store.policy
    write_yaml(tmp_path / "policy.yaml", READ_NOTHING)
    assert store.reload() is Reload.LOADED
    assert allowed(store.policy, ANN, PUBLIC) == set()
    assert allowed(before, ANN, PUBLIC) == {"read"}  # a decision under way keeps the policy that it began with


@pytest.mark.parametrize("content", [b"rules: [", b"version: 1", b"x" * (MAX_POLICY_BYTES + 1), None])
def test_broken_file_is_refused_once_and_the_old_policy_stays(tmp_path: Path, content: bytes | None) -> None:
    path = write_yaml(tmp_path / "policy.yaml", READ_PUBLIC)
    good = path.read_bytes()
    store = PolicyStore(path)
    digest = store.policy.digest
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert [store.reload() for _ in range(3)] == [Reload.REFUSED, Reload.UNCHANGED, Reload.UNCHANGED]
    assert store.refusal is not None
    assert store.policy.digest == digest
    assert allowed(store.policy, ANN, PUBLIC) == {"read"}
    path.write_bytes(good)
    assert store.reload() is Reload.LOADED
    assert store.refusal is None


def test_change_that_leaves_size_and_time_stamp_is_seen(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "policy.yaml", document(rule_of("*", "public", allow=["read"])))
    store = PolicyStore(path)
    before = path.stat()
    path.write_text(path.read_text().replace("read", "pin") + "#")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert store.reload() is Reload.LOADED
    assert allowed(store.policy, ANN, PUBLIC) == {"pin"}


class StoreWalk(RuleBasedStateMachine):
    """A file that is edited, broken, removed and restored: what is in force is always the last good one seen."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = write_yaml(Path(self.folder.name) / "policy.yaml", READ_PUBLIC)
        self.store = PolicyStore(self.path)
        self.in_force = self.on_disk = policy(GOOD_RULE)
        self.is_good = True

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(listed=st.lists(any_rules, max_size=3), strict=st.booleans())
    def edit(self, listed: list[object], strict: bool) -> None:
        write_yaml(self.path, document(*listed, strict=strict))
        self.on_disk, self.is_good = policy(*listed, strict=strict), True

    @rule(content=st.sampled_from([b"rules: [", b"version: 1", b"\xff"]))
    def break_it(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self.is_good = False

    @rule()
    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.is_good = False

    @rule()
    def look(self) -> None:
        outcome = self.store.reload()
        if self.is_good:
            self.in_force = self.on_disk
            assert outcome is not Reload.REFUSED
        else:
            assert outcome is not Reload.LOADED
        assert (self.store.refusal is None) == self.is_good

    @invariant()
    def last_good_policy_is_in_force(self) -> None:
        assert self.store.policy == self.in_force
        assert self.store.policy.digest == self.in_force.digest


TestStoreWalk = StoreWalk.TestCase


def test_shipped_file_is_part_of_the_package() -> None:
    configured = Path(__file__).parents[3] / "pyproject.toml"
    assert '"trust/*.yaml"' in configured.read_text(encoding="utf-8")
    assert yaml.safe_load(DEFAULT_POLICY.read_text(encoding="utf-8"))["version"] == 1

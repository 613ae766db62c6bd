"""Keys, principals and the zone that a key gives."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust.key_files import KeyFileError
from deployments.trust.keyring import read_keyring
from deployments.trust.principals import (
    KEY_PREFIX,
    LOCAL_PRINCIPAL,
    MAX_BEARER_CHARS,
    MAX_CASES,
    MAX_KEY_FILE_BYTES,
    MAX_ROLES,
    Principal,
    Principals,
    create_missing_keys,
)
from engine.zone import EPHEMERAL, Zone
from tests.deployments.support import write_yaml

KEY = "zs-a-key"


def entry(key: str = KEY, **changes: object) -> dict[str, object]:
    return {"sha256": hashlib.sha256(key.encode()).hexdigest(), "principal": "ann", "tenant": "acme"} | changes


def principals(tmp_path: Path, *entries: dict[str, object]) -> Principals:
    return Principals.from_file(write_yaml(tmp_path / "keys.yaml", {"keys": list(entries)}))


def test_key_names_its_principal_tenant_and_zone(tmp_path: Path) -> None:
    known = principals(tmp_path, entry(zone="tenant/acme/case/c-1"), entry("zs-other", principal="bob"))
    ann = known.authenticate(f"Bearer {KEY}")
    assert ann is not None
    assert (ann.name, ann.tenant, ann.zone) == ("ann", "acme", Zone.parse("tenant/acme/case/c-1"))
    bob = known.authenticate("Bearer zs-other")
    assert bob is not None
    assert (bob.name, bob.zone) == ("bob", EPHEMERAL)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer  \t ",
        KEY,
        f"Basic {KEY}",
        f"Token {KEY}",
        f" Bearer {KEY}",
        f"Bearer{KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY} {KEY}",
        f"Bearer {KEY},{KEY}",
        f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}",
        "Bearer " + "x" * (MAX_BEARER_CHARS + 1),
        "Bearer ÿ\x00",
    ],
)
def test_header_without_the_key_names_nobody(tmp_path: Path, header: str | None) -> None:
    assert principals(tmp_path, entry()).authenticate(header) is None


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY} "])
def test_scheme_is_case_insensitive_and_space_is_forgiven(tmp_path: Path, header: str) -> None:
    assert principals(tmp_path, entry()).authenticate(header) is not None


def test_key_may_have_roles_and_several_cases(tmp_path: Path) -> None:
    known = principals(tmp_path, entry(roles=["reviewer", "zone-admin"], cases=["c-1", "c-2"]))
    ann = known.authenticate(f"Bearer {KEY}")
    assert ann is not None
    assert ann.roles == {"reviewer", "zone-admin"}
    assert ann.cases == {Zone.parse("tenant/acme/case/c-1"), Zone.parse("tenant/acme/case/c-2")}
    assert ann.zone == EPHEMERAL


def test_principal_owns_its_zone_and_its_cases_and_nothing_else() -> None:
    mine, other = Zone.parse("tenant/acme/case/c-1"), Zone.parse("tenant/acme/case/c-2")
    foreign = Zone.parse("tenant/rival/case/c-1")
    ann = Principal("ann", "acme", mine, cases=frozenset({other}))
    assert ann.owns(mine)
    assert ann.owns(other)
    not_hers = ("tenant/acme/case/c-3", foreign.path, "tenant/acme/plan/p", "tenant/acme/mixed", "public", "ephemeral")
    assert not any(ann.owns(Zone.parse(path)) for path in not_hers)
    plan = Zone.parse("tenant/acme/plan/p")
    assert not Principal("ann", "acme", plan, cases=frozenset({plan})).owns(plan)
    assert not Principal("ann", "acme", foreign, cases=frozenset({foreign})).owns(foreign)


def test_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(b"keys: []\n#" + b"#" * MAX_KEY_FILE_BYTES)
    with pytest.raises(KeyFileError, match=r"keys\.yaml: larger than"):
        Principals.from_file(path)


def test_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    assert principals(tmp_path).authenticate(f"Bearer {KEY}") is None


def test_every_digest_is_compared_whichever_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = principals(tmp_path, *(entry(f"zs-{index}") for index in range(5)))
    seen: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        seen.append(left)
        return left == right

    monkeypatch.setattr("deployments.trust.principals.hmac.compare_digest", compare)
    counts = []
    for key in ("zs-0", "zs-4", "zs-9"):
        seen.clear()
        known.authenticate(f"Bearer {key}")
        counts.append(len(seen))
    assert counts == [5, 5, 5]


@given(st.text(st.characters(codec="latin-1"), max_size=80))
def test_no_header_makes_authentication_fail(header: str) -> None:
    assert Principals({}).authenticate(header) is None


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"none\.yaml: No such file"):
        Principals.from_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text",
    ["keys: [", "\tkeys: []", "keys: !!python/name:os.system", "keys: 2024-13-45", "keys: " + "[" * 700],
)
def test_file_that_is_not_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KeyFileError, match=r"keys\.yaml: not YAML"):
        Principals.from_file(path)


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(KeyFileError, match=r"keys\.yaml: not YAML"):
        Principals.from_file(path)


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (None, "top level"),
        ([], "top level"),
        ({}, "keys: Field required"),
        ({"keys": {}}, "keys: Input should be a valid list"),
        ({"keys": [], "extra": 1}, "extra: Extra inputs"),
        ({"keys": [entry(colour="red")]}, "keys.0.colour: Extra inputs"),
        ({"keys": [entry(sha256="ab")]}, "keys.0.sha256"),
        ({"keys": [entry(sha256="A" * 64)]}, "keys.0.sha256"),
        ({"keys": [entry(sha256="a" * 64 + "\n")]}, "keys.0.sha256"),
        ({"keys": [entry(principal="Ann Smith")]}, "keys.0.principal"),
        ({"keys": [entry(tenant="")]}, "keys.0.tenant"),
        ({"keys": [entry(tenant="a/case/b")]}, "keys.0.tenant"),
        ({"keys": [entry(tenant="a..b")]}, "keys.0.tenant"),
        ({"keys": [entry(roles=["Reviewer"])]}, "keys.0.roles.0"),
        ({"keys": [entry(roles="reviewer")]}, "keys.0.roles"),
        ({"keys": [entry(roles=["r"] * (MAX_ROLES + 1))]}, "keys.0.roles"),
        ({"keys": [entry(cases=["tenant/other/case/c"])]}, "keys.0.cases.0"),
        ({"keys": [entry(cases=["c"] * (MAX_CASES + 1))]}, "keys.0.cases"),
        ({"keys": [entry(zone="nowhere")]}, "keys.0.zone: Value error, not a zone path"),
        ({"keys": [entry(zone="public")]}, "keys.0.zone"),
        ({"keys": [entry(zone="tenant/acme/plan/p")]}, "keys.0.zone"),
        ({"keys": [entry(zone="tenant/acme/mixed")]}, "keys.0.zone"),
        ({"keys": [entry(zone="tenant/other/case/c")]}, "ann: its zone belongs to another tenant"),
        ({"keys": [entry(), entry(principal="bob")]}, "bob: the same key is listed twice"),
    ],
)
def test_entry_that_cannot_be_trusted_is_refused_by_name(tmp_path: Path, document: object, fault: str) -> None:
    with pytest.raises(KeyFileError) as refusal:
        Principals.from_file(write_yaml(tmp_path / "keys.yaml", document))
    assert fault in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path / "keys.yaml"))


def test_master_key_is_the_newest_of_the_ring(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_text("  " + "0a" * 32 + "\n" + "0b" * 32, encoding="ascii")
    assert read_keyring(path).current == b"\n" * 32


class TestCreateMissingKeys:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        return tmp_path / "trust" / "keys.yaml", tmp_path / "trust" / "master.key", tmp_path / "client" / "key"

    def test_made_keys_open_the_deployment(self, paths: tuple[Path, Path, Path]) -> None:
        create_missing_keys(*paths)
        keys_file, master_key_file, client_key_file = paths
        key = client_key_file.read_text(encoding="utf-8").strip()
        assert key.startswith(KEY_PREFIX)
        principal = Principals.from_file(keys_file).authenticate(f"Bearer {key}")
        assert principal is not None
        assert principal.zone == EPHEMERAL
        assert principal.roles == {"zone-admin", "operator"}
        assert len(read_keyring(master_key_file).current) == 32
        assert key not in keys_file.read_text(encoding="utf-8")

    def test_only_the_owner_may_read_them(self, paths: tuple[Path, Path, Path]) -> None:
        create_missing_keys(*paths)
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}

    def test_a_leftover_that_others_may_read_does_not_lend_its_mode(self, paths: tuple[Path, Path, Path]) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            leftover = path.with_name(path.name + ".new")
            leftover.write_text("", encoding="utf-8")
            leftover.chmod(0o644)
        create_missing_keys(*paths)
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}

    def test_a_link_in_the_way_is_not_followed(self, paths: tuple[Path, Path, Path], tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("untouched", encoding="utf-8")
        paths[1].parent.mkdir(parents=True)
        paths[1].with_name(paths[1].name + ".new").symlink_to(target)
        create_missing_keys(*paths)
        assert target.read_text(encoding="utf-8") == "untouched"

    def test_doing_it_again_changes_nothing(self, paths: tuple[Path, Path, Path]) -> None:
        create_missing_keys(*paths)
        before = [path.read_bytes() for path in paths]
        create_missing_keys(*paths)
        assert [path.read_bytes() for path in paths] == before
        assert sorted(path.name for path in paths[0].parent.iterdir()) == ["keys.yaml", "master.key"]

    def test_entry_of_an_earlier_version_gets_the_roles_and_keeps_its_key(self, paths: tuple[Path, Path, Path]) -> None:
        keys_file, _, client_key_file = paths
        create_missing_keys(*paths)
        key = client_key_file.read_bytes()
        document = yaml.safe_load(keys_file.read_text(encoding="utf-8"))
        document["keys"][0].pop("roles")
        document["keys"].append(entry(roles=["reviewer"]))
        document["keys"].append(entry("zs-namesake", principal=LOCAL_PRINCIPAL, tenant="acme"))
        write_yaml(keys_file, document)
        create_missing_keys(*paths)
        known = Principals.from_file(keys_file)
        found = [known.find(name) for name in (key.decode().strip(), KEY, "zs-namesake")]
        assert [principal and set(principal.roles) for principal in found] == [
            {"zone-admin", "operator"},
            {"reviewer"},
            set(),
        ]
        assert client_key_file.read_bytes() == key
        assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600

    def test_roles_that_an_operator_chose_stay(self, paths: tuple[Path, Path, Path]) -> None:
        create_missing_keys(*paths)
        document = yaml.safe_load(paths[0].read_text(encoding="utf-8"))
        document["keys"][0]["roles"] = ["zone-admin"]
        write_yaml(paths[0], document)
        before = paths[0].read_bytes()
        create_missing_keys(*paths)
        assert paths[0].read_bytes() == before

    def test_keys_file_without_the_local_principal_stays_as_it_is(self, paths: tuple[Path, Path, Path]) -> None:
        create_missing_keys(*paths)
        write_yaml(paths[0], {"keys": [entry()]})
        before = [path.read_bytes() for path in paths]
        create_missing_keys(*paths)
        assert [path.read_bytes() for path in paths] == before

    def test_present_master_key_is_kept_when_the_others_are_made(self, paths: tuple[Path, Path, Path]) -> None:
        paths[1].parent.mkdir(parents=True)
        paths[1].write_text("ab" * 32, encoding="ascii")
        create_missing_keys(*paths)
        assert paths[1].read_text(encoding="ascii") == "ab" * 32
        assert paths[2].exists()

    def test_lost_client_key_is_replaced_and_other_principals_stay(self, paths: tuple[Path, Path, Path]) -> None:
        keys_file, _, client_key_file = paths
        create_missing_keys(*paths)
        lost = client_key_file.read_text(encoding="utf-8").strip()
        document = yaml.safe_load(keys_file.read_text(encoding="utf-8"))
        document["keys"].append(entry(zone="tenant/acme/case/c-1", roles=["reviewer"], cases=["c-2"]))
        write_yaml(keys_file, document)
        client_key_file.unlink()
        create_missing_keys(*paths)
        known = Principals.from_file(keys_file)
        kept = known.authenticate(f"Bearer {KEY}")
        assert kept is not None
        assert (kept.roles, kept.cases) == ({"reviewer"}, {Zone.parse("tenant/acme/case/c-2")})
        assert known.authenticate(f"Bearer {client_key_file.read_text(encoding='utf-8').strip()}") is not None
        assert known.authenticate(f"Bearer {lost}") is None

    def test_keys_file_that_cannot_be_read_is_not_overwritten(self, paths: tuple[Path, Path, Path]) -> None:
        paths[0].parent.mkdir(parents=True)
        paths[0].write_text("keys: [", encoding="utf-8")
        with pytest.raises(KeyFileError):
            create_missing_keys(*paths)
        assert paths[0].read_text(encoding="utf-8") == "keys: ["

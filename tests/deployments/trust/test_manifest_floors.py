"""Floors in a file: what is kept, what is refused, and that nothing lowers one."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust import manifest_floors
from deployments.trust.manifest_floors import FLOORS_NAME, FloorError, keep_floors, read_floors
from deployments.trust.manifest_set import Floor
from engine.zone import PUBLIC, Zone

PLAN = Zone.parse("tenant/acme/plan/gold")
OLD_KEY, NEW_KEY = "0" * 32, "1" * 32


def floor(revision: int, key_id: str = NEW_KEY) -> Floor:
    return Floor(revision, f"{revision:064x}", key_id)


def trust_all(key_id: str, zone: Zone) -> bool:
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / FLOORS_NAME


def test_floors_are_read_as_they_were_kept_by_their_owner_alone(path: Path) -> None:
    floors = {PUBLIC: floor(3), PLAN: floor(1)}
    keep_floors(path, floors, trust_all)
    assert read_floors(path) == floors
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_file_nothing_was_in_force(path: Path) -> None:
    assert read_floors(path) == {}


def test_nothing_is_written_where_nothing_is_raised(path: Path) -> None:
    keep_floors(path, {PLAN: floor(2)}, trust_all)
    before = path.stat()
    for floors in ({}, {PLAN: floor(1)}, {PLAN: floor(2)}):
        keep_floors(path, floors, trust_all)
    assert path.stat().st_ino == before.st_ino


def test_the_floor_of_a_key_that_is_withdrawn_gives_way(path: Path) -> None:
    """A stolen key's revision must not bar its successor's."""
    keep_floors(path, {PLAN: floor(900, OLD_KEY), PUBLIC: floor(7, OLD_KEY)}, trust_all)
    keep_floors(path, {PLAN: floor(2)}, lambda key_id, zone: key_id == NEW_KEY)
    assert read_floors(path) == {PLAN: floor(2), PUBLIC: floor(7, OLD_KEY)}


@given(st.lists(st.dictionaries(st.sampled_from([PUBLIC, PLAN]), st.integers(1, 9).map(floor)), max_size=6))
def test_in_whatever_order_processes_write_the_highest_stands(
    tmp_path_factory: pytest.TempPathFactory, states: list[dict[Zone, Floor]]
) -> None:
    path = tmp_path_factory.mktemp("floors") / FLOORS_NAME
    expected: dict[Zone, Floor] = {}
    for floors in states:
        keep_floors(path, floors, trust_all)
        for zone, found in floors.items():
            expected[zone] = max(found, expected.get(zone, found), key=lambda floor: floor.revision)
        assert read_floors(path) == expected


GOOD = (
    b'{"floors":{"public":{"key_id":"'
    + OLD_KEY.encode()
    + b'","revision":1,"sha256":"'
    + b"a" * 64
    + b'"}},"version":1}\n'
)
BROKEN = {
    "empty": b"",
    "not JSON": b"{",
    "another version": GOOD.replace(b'"version":1', b'"version":2'),
    "no zone": GOOD.replace(b"public", b"secret-zone"),
    "a revision of nothing": GOOD.replace(b'"revision":1', b'"revision":0'),
    "a revision as text": GOOD.replace(b'"revision":1', b'"revision":"1"'),
    "an unknown key": GOOD.replace(b'"version":1', b'"version":1,"x":1'),
    "no end of line": GOOD[:-1],
    "another spelling": GOOD.replace(b":1}", b": 1}"),
    "a zone twice": GOOD.replace(b'"public"', b'"public":{},"public"'),
    "not ASCII": GOOD.replace(b"public", b"publi\xc3\xa7"),
    "too deep": b"[" * 100_000,
}


def test_what_the_broken_ones_are_made_of_is_good(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(GOOD)
    assert read_floors(path) == {PUBLIC: Floor(1, "a" * 64, OLD_KEY)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_and_left_as_it_is(name: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(BROKEN[name])
    for act in (lambda: read_floors(path), lambda: keep_floors(path, {PLAN: floor(1)}, trust_all)):
        with pytest.raises(FloorError, match=FLOORS_NAME) as refusal:
            act()
        assert "secret" not in str(refusal.value)
    assert path.read_bytes() == BROKEN[name]


def test_the_file_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_floors, "MAX_FLOORS", 2)
    keep_floors(path, {PUBLIC: floor(1), PLAN: floor(1)}, trust_all)
    with pytest.raises(FloorError, match="more than 2 zones"):
        keep_floors(path, {Zone.parse("tenant/acme/plan/b"): floor(1)}, trust_all)
    assert len(json.loads(path.read_bytes())["floors"]) == 2
    path.write_bytes(b" " * (manifest_floors.MAX_FLOORS_FILE_BYTES + 1))
    with pytest.raises(FloorError, match="larger than"):
        read_floors(path)

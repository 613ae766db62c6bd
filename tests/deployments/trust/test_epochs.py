"""Epochs only rise: over restarts, between processes, with broken files and a full table."""

from __future__ import annotations

import logging
import multiprocessing
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.trust import epochs, key_files
from deployments.trust.epochs import MAX_EPOCH, EpochError, EpochStore, stamped
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan

GOLD, CASE = Zone.parse("tenant/acme/plan/gold"), Zone.parse("tenant/acme/case/c")
RIVAL = Zone.parse("tenant/rival/plan/gold")
ZONES = [PUBLIC, GOLD, CASE, RIVAL]


def in_memory() -> EpochStore:
    return EpochStore(None)


def test_zone_that_was_never_purged_has_epoch_0(tmp_path: Path) -> None:
    for store in (in_memory(), EpochStore(tmp_path / "state" / "epochs.json")):
        assert all(store.epoch_of(zone) == 0 for zone in ZONES)
        assert not store.refresh()


def test_a_purge_raises_one_zone_and_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "state" / "epochs.json"
    store = EpochStore(path)
    assert [store.raise_epoch(GOLD), store.raise_epoch(GOLD), store.raise_epoch(CASE)] == [1, 2, 1]
    for known in (store, EpochStore(path)):
        assert [known.epoch_of(zone) for zone in ZONES] == [0, 2, 1, 0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == '{"base":0,"version":1,"zones":{"tenant/acme/case/c":1,"tenant/acme/plan/gold":2}}\n'


def test_in_memory_they_rise_as_well() -> None:
    store = in_memory()
    assert [store.raise_epoch(GOLD), store.raise_epoch(GOLD), store.raise_epoch(RIVAL)] == [1, 2, 1]
    assert not store.refresh()


def test_spans_are_stamped_each_with_its_zones_epoch() -> None:
    store = in_memory()
    store.raise_epoch(GOLD)
    spans = (ZoneSpan(3, PUBLIC), ZoneSpan(5, GOLD), ZoneSpan(9, EPHEMERAL, 7))
    assert stamped(spans, store) == (ZoneSpan(3, PUBLIC, 0), ZoneSpan(5, GOLD, 1), ZoneSpan(9, EPHEMERAL, 0))
    assert stamped((), store) == ()


def test_another_process_is_heard_at_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "epochs.json"
    one, other = EpochStore(path), EpochStore(path)
    one.raise_epoch(GOLD)
    assert other.epoch_of(GOLD) == 0
    assert other.refresh()
    assert other.epoch_of(GOLD) == 1
    assert not other.refresh()
    assert one.raise_epoch(GOLD) == 2
    assert other.raise_epoch(GOLD) == 3  # it looks before it raises


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        b'{"base":0,"version":2,"zones":{}}\n',
        b'{"base":-1,"version":1,"zones":{}}\n',
        b'{"base":0.0,"version":1,"zones":{}}\n',
        b'{"base":true,"version":1,"zones":{}}\n',
        b'{"base":NaN,"version":1,"zones":{}}\n',
        b'{"base":0,"version":1,"zones":{"public":9007199254740992}}\n',
        b'{"base":0,"version":1,"zones":{"public":"1"}}\n',
        b'{"base":0,"version":1,"zones":{"tenant/../plan/p":1}}\n',
        b'{"base":0,"version":1,"zones":{"tenant//plan/p":1}}\n',
        b'{"base":0,"more":0,"version":1,"zones":{}}\n',
        b'{"base":0,"version":1,"zones":{"public":9,"public":1}}\n',
        b'{"base": 0, "version": 1, "zones": {}}\n',
        b'{"base":0,"version":1,"zones":{}}',
    ],
)
def test_broken_file_starts_nothing_raises_nothing_and_lowers_nothing(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "epochs.json"
    store = EpochStore(path)
    store.raise_epoch(GOLD)
    path.write_bytes(content)
    with pytest.raises(EpochError, match="not a file of epochs"):
        EpochStore(path)
    with pytest.raises(EpochError):
        store.raise_epoch(GOLD)
    with caplog.at_level(logging.ERROR):
        assert not store.refresh()
        assert not store.refresh()
    assert len(caplog.records) == 1
    assert store.refusal is not None
    assert store.epoch_of(GOLD) == 1
    assert path.read_bytes() == content
    path.unlink()
    assert not store.refresh()
    assert store.refusal is None
    assert store.epoch_of(GOLD) == 1


def test_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "epochs.json"
    EpochStore(path).raise_epoch(GOLD)
    monkeypatch.setattr(epochs, "MAX_EPOCH_FILE_BYTES", path.stat().st_size)
    EpochStore(path)
    monkeypatch.setattr(epochs, "MAX_EPOCH_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(EpochError, match="larger than"):
        EpochStore(path)


def test_full_table_that_can_be_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "epochs.json"
    zones = {f"tenant/{'t' * 64}/case/{index:064d}": MAX_EPOCH - 1 for index in range(epochs.MAX_ZONES)}
    path.write_bytes(epochs._write(epochs._Epochs(0, zones)))
    assert EpochStore(path).raise_epoch(Zone.parse(min(zones))) == MAX_EPOCH


def test_older_file_brings_no_epoch_down(tmp_path: Path) -> None:
    path = tmp_path / "epochs.json"
    store = EpochStore(path)
    store.raise_epoch(GOLD)
    backup = path.read_bytes()
    store.raise_epoch(GOLD)
    store.raise_epoch(CASE)
    path.write_bytes(backup)
    store.refresh()
    assert [store.epoch_of(GOLD), store.epoch_of(CASE)] == [2, 1]
    assert store.raise_epoch(GOLD) == 3
    assert EpochStore(path).epoch_of(CASE) == 1


def test_full_table_raises_every_zone_above_all_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "MAX_ZONES", 2)
    path = tmp_path / "epochs.json"
    store = EpochStore(path)
    for zone in (GOLD, GOLD, GOLD, CASE):
        store.raise_epoch(zone)
    assert store.raise_epoch(CASE) == 2  # it has an entry already
    assert store.raise_epoch(RIVAL) == 4
    for known in (store, EpochStore(path)):
        assert {known.epoch_of(zone) for zone in ZONES} == {4}
    assert store.raise_epoch(GOLD) == 5
    assert store.epoch_of(CASE) == 4


def test_epoch_that_cannot_be_higher_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epochs.json"
    path.write_bytes(epochs._write(epochs._Epochs(0, {GOLD.path: MAX_EPOCH})))
    store = EpochStore(path)
    with pytest.raises(EpochError, match="cannot be higher"):
        store.raise_epoch(GOLD)
    assert store.epoch_of(GOLD) == MAX_EPOCH
    assert store.raise_epoch(CASE) == 1


@pytest.mark.parametrize("call", ["fsync", "replace", "flock"])
def test_epoch_that_cannot_be_kept_is_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "epochs.json"
    store = EpochStore(path)
    store.raise_epoch(GOLD)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target = {
            "fsync": "deployments.trust.key_files.os.fsync",
            "replace": "deployments.trust.key_files.Path.replace",
            "flock": "deployments.trust.key_files.fcntl.flock",
        }[call]
        patch.setattr(target, fail)
        with pytest.raises(EpochError, match=r"epochs\.json: No space left"):
            store.raise_epoch(GOLD)
    assert store.epoch_of(GOLD) == 1
    assert path.read_bytes() == before
    assert not [item.name for item in tmp_path.iterdir() if item.name.endswith(".new")]
    assert store.raise_epoch(GOLD) == 2


def test_lock_that_another_holds_is_waited_for_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "epochs.json"
    store = EpochStore(path)
    monkeypatch.setattr(key_files, "LOCK_TIMEOUT_S", 0.02)
    with key_files.locked(path), pytest.raises(EpochError, match="another process holds its lock"):
        store.raise_epoch(GOLD)
    assert store.raise_epoch(GOLD) == 1


def _raise_often(path: Path, zone_path: str, times: int) -> None:
    store = EpochStore(path)
    for _ in range(times):
        store.raise_epoch(Zone.parse(zone_path))


def test_no_purge_of_processes_at_the_same_time_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "epochs.json"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_raise_often, args=(path, zone.path, 15)) for zone in (GOLD, GOLD, CASE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    known = EpochStore(path)
    assert [known.epoch_of(GOLD), known.epoch_of(CASE)] == [30, 15]


class Walk(RuleBasedStateMachine):
    """Three zones in tables of two: whoever raises, merges or starts anew, nobody sees an epoch fall."""

    tables = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.known = [epochs._Epochs() for _ in range(3)]
        self.seen = [dict.fromkeys(ZONES, 0) for _ in range(3)]
        self.limit = epochs.MAX_ZONES
        epochs.MAX_ZONES = 2

    def teardown(self) -> None:
        epochs.MAX_ZONES = self.limit

    @rule(table=tables, zone=st.sampled_from(ZONES))
    def raises(self, table: int, zone: Zone) -> None:
        before = self.known[table].of(zone.path)
        self.known[table] = self.known[table].raised(zone.path)
        assert self.known[table].of(zone.path) > before

    @rule(table=tables, other=tables)
    def merges(self, table: int, other: int) -> None:
        merged = self.known[table].joined(self.known[other])
        for zone in ZONES:
            assert merged.of(zone.path) >= self.known[other].of(zone.path)
        self.known[table] = merged

    @invariant()
    def nothing_falls(self) -> None:
        for table, seen in zip(self.known, self.seen, strict=True):
            assert len(table.zones) <= 2
            for zone in ZONES:
                assert table.of(zone.path) >= seen[zone]
                seen[zone] = table.of(zone.path)


TestWalk = Walk.TestCase


@given(st.dictionaries(st.sampled_from([zone.path for zone in ZONES]), st.integers(0, MAX_EPOCH)), st.integers(0, 9))
def test_what_is_joined_with_itself_says_the_same(zones: dict[str, int], base: int) -> None:
    one = epochs._Epochs(base, zones)
    assert all(one.joined(one).of(zone.path) == one.of(zone.path) for zone in ZONES)

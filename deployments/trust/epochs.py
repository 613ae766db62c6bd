"""How often each zone was purged, kept across restarts. No epoch goes down: not by a restart, a broken file or an older
one, nor because the table is full."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from deployments.claims.model import StrictModel, canonical_json
from deployments.trust.key_files import locked, replace_file
from engine.zone import Zone, ZoneSpan

logger = logging.getLogger("ray.serve.zoneserve.trust")

EPOCHS_NAME = "epochs.json"  # in trust.state_dir
MAX_ZONES = 10_000  # with an epoch of their own
MAX_EPOCH = 2**53 - 1  # what every JSON reader holds exactly
MAX_EPOCH_FILE_BYTES = 4 << 20


class EpochError(Exception):
    """Epochs that cannot be read or kept; the message names the file and the fault, and no content."""


_Epoch = Annotated[int, Field(ge=0, le=MAX_EPOCH)]


class _EpochFile(StrictModel):
    version: Literal[1] = 1
    base: _Epoch
    zones: dict[str, _Epoch] = Field(max_length=MAX_ZONES)

    @field_validator("zones")
    @classmethod
    def _are_zones(cls, zones: dict[str, int]) -> dict[str, int]:
        for path in zones:
            Zone.parse(path)
        return zones


@dataclass(frozen=True, slots=True)
class _Epochs:
    """`base` holds for each zone that has no epoch of its own."""

    base: int = 0
    zones: Mapping[str, int] = field(default_factory=dict)

    def of(self, path: str) -> int:
        return max(self.base, self.zones.get(path, 0))

    def raised(self, path: str) -> _Epochs:
        """With the zone's epoch one higher, or where the table is full, every zone's above all there were."""
        if path in self.zones or len(self.zones) < MAX_ZONES:
            raised = _Epochs(self.base, {**self.zones, path: self.of(path) + 1})
        else:
            raised = _Epochs(max(self.base, *self.zones.values()) + 1)
        if raised.of(path) > MAX_EPOCH:
            raise EpochError("an epoch cannot be higher")
        return raised

    def joined(self, other: _Epochs) -> _Epochs:
        """The higher epoch of each zone, without entries that `base` says already."""
        base = max(self.base, other.base)
        paths = self.zones.keys() | other.zones.keys()
        zones = {path: epoch for path in paths if (epoch := max(self.of(path), other.of(path))) > base}
        if len(zones) > MAX_ZONES:
            return _Epochs(max(zones.values()))
        return _Epochs(base, zones)


class EpochStore:
    """The epochs as this process knows them. Safe to call from any thread; reading waits for nothing."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: A file that processes share; made at the first purge. None: kept in memory only.

        Raises:
            EpochError: The file is there and cannot be used: nobody knows what was purged.
        """
        self._path = path
        self._lock = threading.Lock()
        self._refusal: str | None = None
        self._epochs = _read(path) if path is not None else _Epochs()

    def epoch_of(self, zone: Zone) -> int:
        """Number of purges that the zone has seen, or a higher one."""
        return self._epochs.of(zone.path)

    @property
    def refusal(self) -> str | None:
        """Why the file as it stands tells nothing; None where it does."""
        return self._refusal

    def raise_epoch(self, zone: Zone) -> int:
        """The zone's new epoch, which is on the medium when this returns. Blocks on the file.

        Raises:
            EpochError: It cannot be kept; this process goes on with the old one.
        """
        try:
            with self._lock, nullcontext() if self._path is None else locked(self._path):
                known = self._epochs if self._path is None else self._epochs.joined(_read(self._path))
                raised = known.raised(zone.path)
                if self._path is not None:
                    replace_file(self._path, _write(raised), mode=0o600)
                self._epochs = raised
                return raised.of(zone.path)
        except OSError as error:
            raise EpochError(f"{self._path}: {error.strerror or error}") from error

    def refresh(self) -> bool:
        """Take over what other processes have raised. True where that was something. Blocks on the file.

        A file that is broken or gone changes nothing and shows in `refusal`; raises nothing.
        """
        if self._path is None:
            return False
        try:
            with self._lock:
                before = self._epochs
                self._epochs = before.joined(_read(self._path))
                self._refusal = None
                return self._epochs != before
        except EpochError as error:
            if self._refusal != str(error):
                logger.error("the epochs stay as they were: %s", error)
            self._refusal = str(error)
            return False


def stamped(spans: Iterable[ZoneSpan], store: EpochStore) -> tuple[ZoneSpan, ...]:
    """The spans, each with its zone's epoch."""
    return tuple(replace(span, epoch=store.epoch_of(span.zone)) for span in spans)


def _write(epochs: _Epochs) -> bytes:
    return canonical_json({"version": 1, "base": epochs.base, "zones": dict(epochs.zones)}).encode() + b"\n"


def _read(path: Path) -> _Epochs:
    """What the file holds; no file: nothing was purged yet."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_EPOCH_FILE_BYTES + 1)
    except FileNotFoundError:
        return _Epochs()
    except OSError as error:
        raise EpochError(f"{path}: {error.strerror or error}") from error
    if len(data) > MAX_EPOCH_FILE_BYTES:
        raise EpochError(f"{path}: larger than {MAX_EPOCH_FILE_BYTES} bytes")
    try:
        document = _EpochFile.model_validate(json.loads(data.decode("ascii")))
    except (ValidationError, ValueError, RecursionError):
        raise EpochError(f"{path}: not a file of epochs") from None
    epochs = _Epochs(document.base, document.zones)
    if _write(epochs) != data:  # no zone twice, no second spelling
        raise EpochError(f"{path}: not a file of epochs in canonical form")
    return epochs

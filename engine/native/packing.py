"""A checkpoint's weights as the kernels read them, in one file that every replica maps.

File, little-endian: `_HEADER`, the SHA-256 of all else, matrices (tiles) and vectors (float32) each at a multiple
of 4,096, and last a JSON table of them. The checksum is there against damage, not attackers; it
is verified at each open, which takes 50 ms for 100 MB and reads the pages that are wanted anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from engine.checkpoint import Checkpoint
from engine.errors import NativeUnavailable
from engine.model_config import ModelConfig
from engine.native import tiles
from engine.native.abi import TILE_COLUMNS, TILES, Kind, Matrix
from engine.native.cache import file_lock, private_directory
from engine.native.mapping import forget_cached_pages, map_file

MAGIC = b"ZSPACKED"
FORMAT_VERSION = 1
ALIGNMENT = 4096
PACK_TIMEOUT_S = 600.0
MAX_HEAD_DIM = 256

_HEADER = struct.Struct("<8sQQ")  # magic, version, offset of the table
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_DATA_START = _HEADER.size + _CHECKSUM_BYTES
_VECTOR = "FLOAT32"

logger = logging.getLogger(__name__)


def unsupported_reason(config: ModelConfig, *, dtype: str, device: str) -> str | None:
    """Why the kernels cannot run a model of this shape; None where they can."""
    if torch.device(device).type != "cpu":
        return f"device {device!r} is not the CPU"
    if dtype != "bfloat16":
        return f"its KV cache is bfloat16, not {dtype}"
    for name, size in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_heads x head_dim", config.q_size),
    ):
        if size % TILE_COLUMNS:
            return f"{name} {size} is not a multiple of {TILE_COLUMNS}"
    if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
    return None


def open_packed(checkpoint: Checkpoint, cache_dir: Path) -> PackedWeights:
    """The packed weights, mapped from the cache; packed first where the cache does not hold them intact.

    Of several processes one packs while the others wait. A cache that cannot be written, or that others can
    write, costs a log line: the weights are then packed into memory of this process.

    Raises:
        NativeUnavailable: The kernels have no form for a weight.
        CheckpointError: A weight cannot be read.
    """
    path = cache_dir / f"{checkpoint.weights_digest}.packed"
    try:
        private_directory(cache_dir)
        found = _find(path, checkpoint)
        if found is not None:
            return found
        with file_lock(path.with_suffix(".lock"), PACK_TIMEOUT_S):
            return _find(path, checkpoint, is_locked=True) or _pack_to(path, checkpoint)
    except (OSError, _UnfitFile) as error:
        logger.warning("the packed weights cannot be stored and stay in memory of this process (%s)", error)
    with os.fdopen(os.memfd_create("zoneserve-packed"), "w+b") as file:
        _write(file, checkpoint)
        return _map(file, checkpoint, "memory")


class PackedWeights:
    """Packed weights in memory that is mapped read-only and shared. Addresses hold as long as this object does.

    `origin`: `cache` (found), `packed` (written now) or `memory` (could not be written).
    """

    def __init__(self, data: memoryview, entries: Mapping[str, _Entry], origin: str) -> None:
        self.origin = origin
        self.entries = entries
        self._bytes = np.frombuffer(data, np.uint8)
        self._address: int = self._bytes.ctypes.data

    @property
    def num_bytes(self) -> int:
        return len(self._bytes)

    def matrix(self, name: str) -> Matrix:
        entry = self.entries[name]
        return Matrix(self._address + entry.offset, entry.rows, entry.columns, Kind[entry.kind], 0)

    def vector(self, name: str) -> int | None:
        """Address of a vector's float32 values; None where the model has none of this name."""
        entry = self.entries.get(name)
        return None if entry is None else self._address + entry.offset

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What the kernels take the weights for: float32 by transformers names, dequantised at each access."""
        return _Tensors(self)

    def groups(self, name: str) -> tiles.Groups:
        """A matrix out of its tiles."""
        entry = self.entries[name]
        kind = Kind[entry.kind]
        records = self._values(entry, TILES[kind]).reshape(tiles.tile_grid(entry.rows, entry.columns))
        return tiles.from_tiles(kind, records, entry.rows)

    def values(self, name: str) -> tiles.Array:
        """A vector, or a matrix dequantised; float32 of their own memory."""
        entry = self.entries[name]
        if entry.kind == _VECTOR:
            return self._values(entry, np.dtype("<f4")).copy()
        return tiles.values_of(self.groups(name))

    def _values(self, entry: _Entry, dtype: np.dtype[Any]) -> tiles.Array:
        return self._bytes[entry.offset : entry.offset + entry.num_bytes].view(dtype)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row of the table. `kind`: a `Kind`'s name, or FLOAT32 of a vector, which has one column."""

    name: str
    kind: str
    rows: int
    columns: int
    offset: int
    num_bytes: int

    def fits(self, file_bytes: int) -> bool:
        if self.kind == _VECTOR:
            wanted = 4 * self.rows
        elif self.kind in Kind.__members__:
            grid_rows, grid_columns = tiles.tile_grid(self.rows, self.columns)
            wanted = grid_rows * grid_columns * TILES[Kind[self.kind]].itemsize
        else:
            return False
        within = _DATA_START <= self.offset <= file_bytes - self.num_bytes
        return self.num_bytes == wanted and self.offset % ALIGNMENT == 0 and within


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed
        self._names = [part for name in packed.entries for part in _parts_of(name)]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._packed.entries:
            return torch.from_numpy(self._packed.values(name))
        fused = _fused_name(name)
        if fused is None or fused not in self._packed.entries:
            raise KeyError(name)
        gate, up = tiles.separated(self._packed.groups(fused))
        return torch.from_numpy(tiles.values_of(gate if ".gate_proj." in name else up))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _UnfitFile(Exception):
    """A cache file that is not what it should be. The message says how."""


def _find(path: Path, checkpoint: Checkpoint, *, is_locked: bool = False) -> PackedWeights | None:
    """None where there is no file, or an unfit one, of which whoever holds the lock writes a log line."""
    try:
        with path.open("rb") as file:
            return _map(file, checkpoint, "cache")
    except FileNotFoundError:
        return None
    except (OSError, _UnfitFile) as error:
        if is_locked:
            logger.warning("%s is not usable and the weights are packed again (%s)", path, error)
        return None


def _pack_to(path: Path, checkpoint: Checkpoint) -> PackedWeights:
    part = path.with_suffix(".part")  # of this process alone, which holds the lock
    try:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w+b") as file:
            _write(file, checkpoint)
            forget_cached_pages(file.fileno())
            packed = _map(file, checkpoint, "packed")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return packed


def _map(file: IO[bytes], checkpoint: Checkpoint, origin: str) -> PackedWeights:
    try:
        data = map_file(file.fileno())
    except ValueError as error:
        raise _UnfitFile(str(error)) from None
    return PackedWeights(data, _read_table(data, checkpoint), origin)


def _read_table(data: memoryview, checkpoint: Checkpoint) -> dict[str, _Entry]:
    if len(data) < _DATA_START:
        raise _UnfitFile(f"it has {len(data)} bytes")
    magic, version, table_offset = _HEADER.unpack_from(data)
    if magic != MAGIC or version != FORMAT_VERSION:
        raise _UnfitFile(f"it is {magic!r} of version {version}, not {MAGIC!r} of version {FORMAT_VERSION}")
    digest = hashlib.sha256(data[_DATA_START:])
    digest.update(data[: _HEADER.size])
    if digest.digest() != data[_HEADER.size : _DATA_START]:
        raise _UnfitFile("its checksum does not hold")
    try:
        return _parse_table(bytes(data[table_offset:]), table_offset, checkpoint)
    except (TypeError, ValueError) as error:
        raise _UnfitFile(f"its table is not one ({error})") from None


def _parse_table(table: bytes, table_offset: int, checkpoint: Checkpoint) -> dict[str, _Entry]:
    weights_digest, rows = json.loads(table)
    entries = {entry.name: entry for entry in (_Entry(*row) for row in rows)}
    shapes = {entry.name: (entry.rows, entry.columns) for entry in entries.values()}
    if weights_digest != checkpoint.weights_digest or shapes != _packed_shapes(checkpoint.config):
        raise _UnfitFile("it holds another model")
    if not all(entry.fits(table_offset) for entry in entries.values()):
        raise _UnfitFile("its table is inconsistent")
    return entries


def _write(file: IO[bytes], checkpoint: Checkpoint) -> None:
    digest = hashlib.sha256()
    file.write(bytes(_DATA_START))

    def append(data: bytes | memoryview) -> None:
        file.write(data)
        digest.update(data)

    def align() -> int:
        append(bytes(-file.tell() % ALIGNMENT))
        return file.tell()

    rows = []
    for name, (num_rows, num_columns) in _packed_shapes(checkpoint.config).items():
        kind, values = _packed(checkpoint, name)
        rows.append(astuple(_Entry(name, kind, num_rows, num_columns, align(), values.nbytes)))
        append(values.data.cast("B"))
    table = json.dumps([checkpoint.weights_digest, rows]).encode()
    table_offset = align()
    append(table)
    header = _HEADER.pack(MAGIC, FORMAT_VERSION, table_offset)
    digest.update(header)
    file.seek(0)
    file.write(header + digest.digest())
    file.flush()


def _packed(checkpoint: Checkpoint, name: str) -> tuple[str, tiles.Array]:
    """An entry's kind and its bytes."""
    parts = _parts_of(name)
    if len(parts) == 1 and len(checkpoint.config.tensor_shapes()[name]) == 1:
        return _VECTOR, np.ascontiguousarray(checkpoint.tensors[name].float().numpy())
    groups = [_groups(checkpoint, part) for part in parts]
    whole = groups[0] if len(groups) == 1 else tiles.interleaved(*groups)
    if whole is None:
        bits = [group.kind.code_bits for group in groups]
        raise NativeUnavailable(f"{parts[0]} has {bits[0]}-bit weights and {parts[1]} has {bits[1]}-bit ones")
    return whole.kind.name, tiles.to_tiles(whole).view(np.uint8)


def _groups(checkpoint: Checkpoint, name: str) -> tiles.Groups:
    blocks = checkpoint.quantised(name)
    exact = None if blocks is None else tiles.from_blocks(blocks)
    return exact or tiles.from_values(name, checkpoint.tensors[name].float().numpy())


def _packed_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of every entry, in the order of the file."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in config.tensor_shapes().items():
        rows, columns = shape if len(shape) == 2 else (shape[0], 1)
        fused = _fused_name(name)
        if fused is None:
            shapes[name] = (rows, columns)
        else:
            shapes[fused] = (2 * rows, columns)
    return shapes


def gate_up_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate_up_proj.weight"


def _fused_name(name: str) -> str | None:
    """The entry that a gate or up matrix is part of; None for anything else."""
    for part in (".mlp.gate_proj.", ".mlp.up_proj."):
        if part in name:
            return name.replace(part, ".mlp.gate_up_proj.")
    return None


def _parts_of(name: str) -> tuple[str, ...]:
    """Tensors that an entry is made of."""
    if ".gate_up_proj." not in name:
        return (name,)
    return name.replace(".gate_up_proj.", ".gate_proj."), name.replace(".gate_up_proj.", ".up_proj.")

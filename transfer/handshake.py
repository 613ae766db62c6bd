"""What two pools must agree on before bytes may move between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from uuid import uuid4

from engine.kv_cache import KVCacheLayout
from transfer import wire
from transfer.protocol import HandshakeRefused, KVPool, PeerIncompatible

HANDSHAKE_VERSION = 1
MODE = "push"  # who moves the bytes; a pull pool must not meet a push pool
MAX_HANDSHAKE_BYTES = 256 * 1024
MAX_COMPATIBILITY_FIELDS = 32
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}-[0-9a-f]{32}", re.ASCII)
_LAYOUT_FIELDS = tuple(item.name for item in fields(KVCacheLayout))


@dataclass(frozen=True, slots=True)
class Handshake:
    """One agent as its peers see it. `compatibility`: further named facts that must be equal on both sides."""

    name: str
    layout: KVCacheLayout
    num_blocks: int
    address: int
    memory: str
    device_id: int
    compatibility: Mapping[str, str] = field(default_factory=dict)
    metadata: bytes = b""
    mode: str = MODE

    @staticmethod
    def of(name: str, pool: KVPool, compatibility: Mapping[str, str], metadata: bytes) -> Handshake:
        return Handshake(
            name=name,
            layout=pool.layout,
            num_blocks=pool.num_blocks,
            address=pool.address,
            memory=pool.memory,
            device_id=pool.device_id,
            compatibility=dict(sorted(compatibility.items())),
            metadata=metadata,
        )

    def encode(self) -> bytes:
        layout = asdict(self.layout)
        return wire.pack(
            [
                HANDSHAKE_VERSION,
                self.name,
                self.mode,
                [layout[name] for name in _LAYOUT_FIELDS],
                self.num_blocks,
                self.address,
                self.memory,
                self.device_id,
                dict(self.compatibility),
                self.metadata,
            ]
        )

    @staticmethod
    def decode(data: bytes) -> Handshake:
        """
        Raises:
            HandshakeRefused: Malformed.
            PeerIncompatible: Of another version of this format.
        """
        try:
            return _decode(wire.unpack_record(data, 10, MAX_HANDSHAKE_BYTES))
        except ValueError as error:  # MalformedMessage, or a layout that no cache can have
            raise HandshakeRefused(f"malformed handshake: {error}") from None

    def require_compatible(self, theirs: Handshake) -> None:
        """
        Raises:
            PeerIncompatible: Names the first field that differs.
        """
        if self.mode != theirs.mode:
            raise PeerIncompatible("mode", self.mode, theirs.mode)
        for name in _LAYOUT_FIELDS:
            ours, other = getattr(self.layout, name), getattr(theirs.layout, name)
            if ours != other:
                raise PeerIncompatible(f"layout.{name}", ours, other)
        for name in sorted({*self.compatibility, *theirs.compatibility}):
            mine, yours = self.compatibility.get(name), theirs.compatibility.get(name)
            if mine != yours:
                raise PeerIncompatible(name, mine, yours)


def new_agent_name(role: str) -> str:
    """`role-<uuid4>`: a restarted process is a new incarnation, never mistaken for the old one.

    Raises:
        ValueError: The role is not 1-64 of [a-z0-9_-].
    """
    name = f"{role}-{uuid4().hex}"
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"not a role: {role!r}")
    return name


def _decode(record: list[object]) -> Handshake:
    version, name, mode, layout, num_blocks, address, memory, device_id, compatibility, metadata = record
    if version != HANDSHAKE_VERSION:
        raise PeerIncompatible("handshake_version", HANDSHAKE_VERSION, version)
    if type(layout) is not list or len(layout) != len(_LAYOUT_FIELDS):
        raise wire.MalformedMessage("not a layout")
    if type(name) is not str or _NAME.fullmatch(name) is None:
        raise wire.MalformedMessage("not an agent name")
    if memory not in ("DRAM", "VRAM"):
        raise wire.MalformedMessage("not a kind of memory")
    values = dict(zip(_LAYOUT_FIELDS, layout, strict=True))
    dtype, slab_order = (wire.as_str(values.pop(field)) for field in ("dtype", "slab_order"))
    shape = {key: wire.as_int(value, 1, 2**20) for key, value in values.items()}
    return Handshake(
        name=name,
        layout=KVCacheLayout(dtype=dtype, slab_order=slab_order, **shape),
        num_blocks=wire.as_int(num_blocks, 1, 2**31 - 1),
        address=wire.as_int(address, 0, 2**64 - 1),
        memory=wire.as_str(memory),
        device_id=wire.as_int(device_id, 0, 1024),
        compatibility=wire.as_str_map(compatibility, MAX_COMPATIBILITY_FIELDS),
        metadata=wire.as_bytes(metadata, MAX_HANDSHAKE_BYTES),
        mode=wire.as_str(mode),
    )

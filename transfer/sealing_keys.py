"""The keys that several processes seal and open with, while they are changed under way. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.block_hash import derive_key

MIN_KEY_BYTES = 32
MAX_KEYS = 8
KEY_ID_BYTES = 8


class SealingKeys:
    """Keys newest first: the newest seals, any opens.

    Processes learn of a new key one after the other. So it opens at once, and where the key that seals now is still
    among them, that one goes on sealing for `settle_s`: by then everybody can open what the new one seals.
    """

    def __init__(
        self, keys: Sequence[bytes], id_info: bytes, clock: Callable[[], float], settle_s: float = 0.0
    ) -> None:
        """
        Args:
            id_info: What the ids of keys are derived with; each use of a master key has ids of its own.
            clock: Seconds.

        Raises:
            ValueError: As `set_keys`.
        """
        self._id_info = id_info
        self._clock = clock
        self._settle_s = settle_s
        self._keys: dict[bytes, bytes] = {}
        self._before = b""  # id of the key that seals until `_settled_at_s`
        self._settled_at_s = 0.0
        self.set_keys(keys)

    def set_keys(self, keys: Sequence[bytes]) -> None:
        """Take these keys, newest first, in place of those before.

        Raises:
            ValueError: None, more than `MAX_KEYS`, or one shorter than `MIN_KEY_BYTES`; nothing has changed.
        """
        if not 1 <= len(keys) <= MAX_KEYS:
            raise ValueError(f"1 to {MAX_KEYS} keys are needed")
        if any(len(key) < MIN_KEY_BYTES for key in keys):
            raise ValueError(f"a key needs at least {MIN_KEY_BYTES} bytes")
        sealing = self.sealing[0] if self._keys else b""
        newest = next(iter(self._keys), b"")
        self._keys = {derive_key(key, self._id_info, KEY_ID_BYTES): key for key in keys}
        if next(iter(self._keys)) != newest:
            self._before, self._settled_at_s = sealing, self._clock() + self._settle_s

    @property
    def sealing(self) -> tuple[bytes, bytes]:
        """Id and key to seal with now."""
        is_settled = self._clock() >= self._settled_at_s
        key_id = self._before if self._before in self._keys and not is_settled else next(iter(self._keys))
        return key_id, self._keys[key_id]

    def opening(self, key_id: bytes) -> bytes | None:
        """The key with this id, if it is one of ours."""
        return self._keys.get(key_id)

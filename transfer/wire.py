"""Bounded msgpack: the only way bytes of a peer become objects here. Plain types only, never pickle."""

from __future__ import annotations

from typing import cast

import msgpack  # type: ignore[import-untyped]

MAX_MESSAGE_BYTES = 4 * 2**20
_MAX_ITEMS = 262_144


class MalformedMessage(ValueError):
    """Not msgpack, too large, or not of the shape that was asked for."""


def pack(value: object) -> bytes:
    """Msgpack of plain types; the same value gives the same bytes."""
    return cast(bytes, msgpack.packb(value, use_bin_type=True))


def unpack_record(data: bytes, num_fields: int, max_bytes: int = MAX_MESSAGE_BYTES) -> list[object]:
    """The array of exactly `num_fields` values that `data` holds.

    Raises:
        MalformedMessage: Anything else.
    """
    if len(data) > max_bytes:
        raise MalformedMessage(f"longer than {max_bytes} bytes")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=max_bytes,
            max_bin_len=max_bytes,
            max_array_len=_MAX_ITEMS,
            max_map_len=1024,
            max_ext_len=0,
        )
    except Exception as error:  # the unpacker raises many kinds; to us they are one
        raise MalformedMessage(f"not msgpack ({type(error).__name__})") from None
    if type(value) is not list or len(value) != num_fields:
        raise MalformedMessage(f"not a record of {num_fields} fields")
    return value


def as_str(value: object, max_chars: int = 256) -> str:
    if type(value) is not str or len(value) > max_chars:
        raise MalformedMessage(f"not a string of at most {max_chars} characters")
    return value


def as_bytes(value: object, max_bytes: int) -> bytes:
    if type(value) is not bytes or len(value) > max_bytes:
        raise MalformedMessage(f"not at most {max_bytes} bytes")
    return value


def as_int(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise MalformedMessage(f"not an integer in [{low}, {high}]")
    return value


def as_ints(value: object, low: int, high: int, max_items: int) -> tuple[int, ...]:
    if type(value) is not list or len(value) > max_items:
        raise MalformedMessage(f"not a list of at most {max_items} integers")
    return tuple(as_int(item, low, high) for item in value)


def as_str_map(value: object, max_items: int) -> dict[str, str]:
    if type(value) is not dict or len(value) > max_items:
        raise MalformedMessage(f"not a map of at most {max_items} entries")
    return {as_str(key): as_str(item) for key, item in value.items()}

"""Text as the detectors read it: look-alikes are ASCII, invisible characters are gone, offsets lead back."""

from __future__ import annotations

import re
import unicodedata
from array import array
from dataclasses import dataclass
from functools import lru_cache

_HAS_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1b\x7f]")

# What NFKD leaves alone and a reader takes for the ASCII character. Dashes, digits and spaces go by their category.
_LOOK_ALIKES = {
    ord(look_alike): character
    for character, look_alikes in {
        "-": "\u2212\u2043\u02d7\u2796\u30fc",
        ".": "\u00b7\u2022\u2027\u30fb\u3002\u06d4",
        "/": "\u2044\u2215\u29f8\u2571",
        "*": "\u2217\u204e\u2731\u066d",
        "~": "\u223c\u02dc\u301c",
        ":": "\u2236\ua789\u02d0\u0589",
        "|": "\u2223\u2502\u00a6\u01c0",
        '"': "\u201c\u201d\u201e\u2033\u00ab\u00bb",
        "'": "\u2018\u2019\u02bc\u2032",
        "@": "\ufe6b",
        # Cyrillic and Greek letters that print as Latin ones.
        "A": "АΑ",
        "B": "ВΒ",
        "C": "СϹ",
        "D": "Ꭰ",
        "E": "ЕΕ",
        "H": "НΗ",
        "I": "ІΙ",
        "J": "Ј",
        "K": "КΚ",
        "M": "МΜ",
        "N": "Ν",
        "O": "ОΟ",
        "P": "РΡ",
        "S": "Ѕ",
        "T": "ТΤ",
        "X": "ХΧ",
        "Y": "ҮΥ",
        "Z": "Ζ",
        "a": "аα",
        "c": "сϲ",
        "d": "ԁ",
        "e": "е",
        "h": "һ",
        "i": "іιı",
        "j": "ј",
        "n": "ո",
        "o": "оο",
        "p": "рρ",
        "s": "ѕ",
        "u": "υ",
        "v": "ѵν",
        "w": "ԝ",
        "x": "х",
        "y": "у",
    }.items()
    for look_alike in look_alikes
}
_BY_CATEGORY = {"Pd": "-", "Zs": " ", "Zl": "\n", "Zp": "\n", "Mn": "", "Me": "", "Cf": ""}
_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # by category not invisible, in print they are


@dataclass(frozen=True, slots=True)
class Reading:
    """A text and, unless each character is its own, the index of the character that each came from."""

    text: str
    origins: array[int] | None = None
    has_invisible: bool = False

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """The span of the text as it was given that gave the non-empty span [start, end)."""
        if self.origins is None:
            return start, end
        return self.origins[start], self.origins[end - 1] + 1


def readings(text: str) -> tuple[Reading, ...]:
    """The text without its invisible characters; where it has any, also with a hyphen for each.

    An invisible character may stand inside a number or be what parts it.
    """
    plain = read(text)
    return (plain, read(text, invisible="-")) if plain.has_invisible else (plain,)


def read(text: str, *, invisible: str = "") -> Reading:
    """NFKC as far as ASCII goes: compatibility decomposition without the marks, then the look-alikes."""
    if text.isascii() and not _HAS_CONTROL.search(text):
        return Reading(text)
    parts: list[str] = []
    origins = array("Q")
    has_invisible = False
    for index, character in enumerate(text):
        seen = _seen_as(character)
        if not seen:
            has_invisible = True
            seen = invisible
        parts.append(seen)
        origins.extend([index] * len(seen))
    return Reading("".join(parts), origins, has_invisible)


@lru_cache(maxsize=4096)
def _seen_as(character: str) -> str:
    return "".join(map(_seen_part, unicodedata.normalize("NFKD", character)))


def _seen_part(part: str) -> str:
    if ord(part) in _LOOK_ALIKES:
        return _LOOK_ALIKES[ord(part)]
    digit = unicodedata.digit(part, None)
    if digit is not None:
        return str(digit)
    category = unicodedata.category(part)
    if part in _BLANK_LETTERS or (category == "Cc" and not part.isspace()):
        return ""
    return _BY_CATEGORY.get(category, part)

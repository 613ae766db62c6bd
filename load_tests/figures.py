"""What every comparison here shares: turns, medians with least and greatest, percentiles, sections of a document.

Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Spread = dict[str, float]
"""`median`, `min`, `max` and `n` of a figure that was measured several times."""


def turns(contenders: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(repeat, contender): each once a repeat, and every other repeat backwards, so that a machine that grows
    slower or faster in a repeat favours nobody."""
    for repeat in range(repeats):
        ordered = contenders if repeat % 2 == 0 else contenders[::-1]
        for contender in ordered:
            yield repeat, contender


def spread(values: Iterable[float]) -> Spread:
    """
    Raises:
        ValueError: There are no values.
    """
    listed = list(values)
    if not listed:
        raise ValueError("a spread needs a value")
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed), "n": len(listed)}


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def fill(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name:begin -->` and `<!-- name:end -->` of a document.

    Raises:
        ValueError: It does not have both, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found_begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path}: no {begin} before a {end}")
    path.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")

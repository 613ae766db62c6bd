"""From labelled text to labelled tokens: each token gets the join of everything up to its last character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.zone import EPHEMERAL, Zone, ZoneSpan


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Characters [start, end) of a rendered prompt that belong to `zone`."""

    start: int
    end: int
    zone: Zone


def label_tokens(
    offsets: Sequence[tuple[int, int]], spans: Sequence[TextSpan], *, scaffold: Zone
) -> tuple[ZoneSpan, ...]:
    """Zone spans over tokens, monotone.

    Args:
        offsets: Character range of each token in the rendered prompt, ascending.
        spans: Labelled text, ascending, not overlapping. Characters outside every span are template
            scaffold: they add nothing to the join.
        scaffold: Zone before the first span begins.

    A token that straddles two spans gets the join of both.

    Raises:
        ValueError: The spans are not in order, so a private one could be passed over.
    """
    bounds = [bound for span in spans for bound in (span.start, span.end)]
    if any(before > after for before, after in pairwise(bounds)):
        raise ValueError("labelled spans must be ascending and must not overlap")
    labelled: list[ZoneSpan] = []
    joined = scaffold
    upcoming = 0
    for index, (start, end) in enumerate(offsets):
        while upcoming < len(spans) and spans[upcoming].start < max(end, start + 1):
            joined = joined.join(spans[upcoming].zone)
            upcoming += 1
        if labelled and labelled[-1].zone == joined:
            labelled[-1] = ZoneSpan(index + 1, joined)
        else:
            labelled.append(ZoneSpan(index + 1, joined))
    return tuple(labelled)


def unlabelled(num_tokens: int, zone: Zone = EPHEMERAL) -> tuple[ZoneSpan, ...]:
    """The whole prompt in one zone: the default of no."""
    return (ZoneSpan(num_tokens, zone),)


def with_private_end(spans: tuple[ZoneSpan, ...], private: Zone) -> tuple[ZoneSpan, ...]:
    """The spans with the last token, and so all that is generated after it, joined with `private`."""
    *before, last = spans
    joined = last.zone.join(private)
    if joined == last.zone:
        return spans
    begin = before[-1].end if before else 0
    kept = (ZoneSpan(last.end - 1, last.zone),) if last.end - 1 > begin else ()
    return (*before, *kept, ZoneSpan(last.end, joined))

"""Deterministic detectors of protected health information. They veto a publication; they never grant one.

A finding says which detector and where, never what. Every detector takes time linear in the text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from deployments.trust.phi.patterns import PATTERN_DETECTORS
from deployments.trust.phi.reading import readings

MAX_FINDINGS = 100  # of one detector in one text; the first one is a veto already


class Detector(Protocol):
    """Something that finds spans in a text whose look-alike characters are already ASCII."""

    @property
    def name(self) -> str: ...

    def find(self, text: str) -> Iterable[tuple[int, int]]:
        """Spans [start, end) of `text`, not empty."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Characters [start, end) of the text as it was given."""

    start: int
    end: int
    detector: str


DETECTORS: tuple[Detector, ...] = PATTERN_DETECTORS


def scan(text: str, detectors: Sequence[Detector] = DETECTORS) -> tuple[Finding, ...]:
    """What the detectors find, in order of place; at most `MAX_FINDINGS` for each detector and reading of the text."""
    found = {
        Finding(*reading.origin(start, end), detector.name)
        for reading in readings(text)
        for detector in detectors
        for start, end in islice(detector.find(reading.text), MAX_FINDINGS)
    }
    return tuple(sorted(found))


def positions(text: str, findings: Iterable[Finding]) -> Iterator[tuple[int, int]]:
    """Line and column of each finding's start, both from 1; a line ends at a line feed."""
    line_ends = [index for index, character in enumerate(text) if character == "\n"]
    for finding in findings:
        line = bisect_left(line_ends, finding.start)
        yield line + 1, finding.start - (line_ends[line - 1] if line else -1)

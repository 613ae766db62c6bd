"""Presidio's entity recognition as one more detector, where the extra `presidio` is installed. It only vetoes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Protocol

# What names a person. Dates, places and organisations are in every policy text and would veto all of them.
ENTITIES = (
    "PERSON",
    "US_SSN",
    "US_ITIN",
    "US_PASSPORT",
    "US_DRIVER_LICENSE",
    "US_MBI",
    "PHONE_NUMBER",
    "EMAIL_ADDRESS",
)
MIN_SCORE = 0.6


class DetectorError(Exception):
    """A detector could not run. A publication that it should have seen is refused."""


class _Result(Protocol):
    start: int
    end: int


class Analyzer(Protocol):
    """`presidio_analyzer.AnalyzerEngine`, as far as it is used here."""

    def get_supported_entities(self, language: str | None = None) -> list[str]: ...

    def analyze(self, text: str, language: str, entities: list[str], score_threshold: float) -> Iterable[_Result]: ...


class PresidioDetector:
    """English. Raises DetectorError where the analyzer fails."""

    name = "presidio"

    def __init__(self, analyzer: Analyzer) -> None:
        self._analyzer = analyzer

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        try:
            known = set(self._analyzer.get_supported_entities("en"))
            wanted = [entity for entity in ENTITIES if entity in known]
            results = list(self._analyzer.analyze(text, "en", wanted, score_threshold=MIN_SCORE))
        except Exception as error:  # whatever it is, the text has not been looked at
            raise DetectorError(f"presidio failed with {type(error).__name__}") from None
        for result in sorted(results, key=lambda result: result.start):
            if result.start < result.end:
                yield result.start, result.end


def load_presidio() -> PresidioDetector | None:
    """The detector, or None where presidio is not installed.

    Raises:
        DetectorError: It is installed and does not start, for want of a language model for example.
    """
    try:
        module = importlib.import_module("presidio_analyzer")
    except ModuleNotFoundError as error:
        if error.name == "presidio_analyzer":
            return None
        raise DetectorError(f"presidio does not start: {error.name} is missing") from None
    try:
        return PresidioDetector(module.AnalyzerEngine())
    except (Exception, SystemExit) as error:  # spaCy's download of a missing model ends the process
        raise DetectorError(f"presidio does not start: {type(error).__name__}") from None

"""Compares flags with planted faults: what was missed, what was flagged without cause."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELS_VERSION = 1

Fault = tuple[str, str, tuple[int, ...]]  # claim id, rule id, lines


@dataclass(frozen=True, slots=True)
class LabelReport:
    """`missed`: planted and not flagged. `spurious`: flagged and not planted. `unreviewed`: claims without a review."""

    num_claims: int
    num_faults: int
    missed: tuple[Fault, ...]
    spurious: tuple[Fault, ...]
    unreviewed: tuple[str, ...]

    @property
    def is_perfect(self) -> bool:
        return not (self.missed or self.spurious or self.unreviewed)


def load_labels(path: Path) -> list[dict[str, Any]]:
    """The claims of a labels file.

    Raises:
        ValueError: It is of another version.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["labels_version"] != LABELS_VERSION:
        raise ValueError(f"{path.name}: labels version {document['labels_version']}, not {LABELS_VERSION}")
    claims: list[dict[str, Any]] = document["claims"]
    return claims


def compare(labels: Sequence[Mapping[str, Any]], reviews: Iterable[Mapping[str, Any]]) -> LabelReport:
    """Compare structured reviews with labels, by claim id, rule id and lines."""
    planted = {
        (label["claim_id"], fault["rule_id"], tuple(fault["lines"])) for label in labels for fault in label["faults"]
    }
    flagged: set[Fault] = set()
    reviewed = set()
    for review in reviews:
        reviewed.add(review["claim_id"])
        flagged.update((review["claim_id"], flag["rule_id"], tuple(flag["lines"])) for flag in review["flags"])
    return LabelReport(
        num_claims=len(labels),
        num_faults=len(planted),
        missed=tuple(sorted(planted - flagged)),
        spurious=tuple(sorted(flagged - planted)),
        unreviewed=tuple(label["claim_id"] for label in labels if label["claim_id"] not in reviewed),
    )

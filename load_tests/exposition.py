"""Reads a Prometheus text exposition far enough to subtract two of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SAMPLE = re.compile(
    r"^(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)(?:\{(?P<labels>.*)\})?"
    r"\s+(?P<value>[+-]?(?:[0-9.]\S*|NaN|Inf))(?:\s|$)"
)
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Exposition:
    """Samples of one scrape: (name, labels, value)."""

    samples: tuple[tuple[str, Mapping[str, str], float], ...]

    @classmethod
    def parse(cls, text: str) -> Exposition:
        """Lines that are no samples are skipped."""
        found = [match for line in text.splitlines() if not line.startswith("#") and (match := _SAMPLE.match(line))]
        return cls(tuple((m["name"], dict(_LABEL.findall(m["labels"] or "")), float(m["value"])) for m in found))

    def total(self, name: str, **labels: str) -> float:
        """Sum over all samples of `name` that carry these labels; 0 when there is none."""
        return sum(
            value
            for sample_name, sample_labels, value in self.samples
            if sample_name == name and labels.items() <= sample_labels.items()
        )

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Sums of `name`, by the value of one label."""
        sums: dict[str, float] = {}
        for sample_name, labels, value in self.samples:
            if sample_name == name and label in labels:
                sums[labels[label]] = sums.get(labels[label], 0.0) + value
        return sums

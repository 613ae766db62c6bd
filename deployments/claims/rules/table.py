"""The edit table: code pairs, unit limits, add-ons and the rules' own parameters, read from CSV and JSON files."""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, TypeVar, cast

from deployments.claims.rules.findings import Action, Severity

# Raised whenever a rule's code changes what it flags: results with another revision are not comparable.
RULES_REVISION = 1

_FILES = ("codes.csv", "mue_limits.csv", "ptp_edits.csv", "rules.csv", "table.json")

Adjudication = Literal["line", "day"]
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class Period:
    """Days on which an entry holds, both ends included; `last` None means until further notice."""

    first: dt.date
    last: dt.date | None

    def covers(self, day: dt.date) -> bool:
        return self.first <= day and (self.last is None or day <= self.last)


@dataclass(frozen=True, slots=True)
class PairEdit:
    """`column_2` is not paid beside `column_1`. Indicator 0: never; 1: unless a modifier separates them; 9: no edit."""

    column_1: str
    column_2: str
    modifier_indicator: Literal[0, 1, 9]
    period: Period

    @property
    def quote(self) -> str:
        last = self.period.last or ""
        return f"{self.column_1},{self.column_2},{self.modifier_indicator},{self.period.first},{last}"


@dataclass(frozen=True, slots=True)
class UnitLimit:
    """At most `max_units` of `code` by one provider: on one line, or on one day over all lines."""

    code: str
    max_units: int
    adjudication: Adjudication
    period: Period

    @property
    def quote(self) -> str:
        return f"{self.code},{self.max_units},{self.adjudication},{self.period.first},{self.period.last or ''}"


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """What the table says about a rule; what it checks is code in `edits.py`."""

    rule_id: str
    code: str
    severity: Severity
    is_decisive: bool
    carc: str
    rarc: str | None
    policy_sections: tuple[str, ...]
    action: Action
    title: str
    next_step: str


@dataclass(frozen=True, slots=True)
class EditTable:
    """Everything `edits.py` looks up. `digest` covers every file and RULES_REVISION.

    Modifiers that tell two services of one day apart: `separating` those of a code pair, `twin` two of the same code
    (without 25 and its like, which speak of another service), `repeat` one done again on purpose.
    """

    revision: str
    digest: str
    rules: dict[str, RuleSpec]
    labels: dict[str, str]
    primaries: dict[str, frozenset[str]]
    pairs: dict[str, tuple[PairEdit, ...]]
    limits: dict[str, tuple[UnitLimit, ...]]
    separating_modifiers: frozenset[str]
    repeat_modifiers: frozenset[str]
    twin_modifiers: frozenset[str]

    def pairs_of_column_2(self, code: str, day: dt.date) -> list[PairEdit]:
        """Edits in force on `day` under which `code` is the one not paid."""
        return [edit for edit in self.pairs.get(code, ()) if edit.period.covers(day)]

    def limit_of(self, code: str, day: dt.date) -> UnitLimit | None:
        """The unit limit of `code` in force on `day`."""
        return next((limit for limit in self.limits.get(code, ()) if limit.period.covers(day)), None)


@cache
def load_edit_table() -> EditTable:
    """The synthetic table that ships in this package."""
    folder = files(__package__) / "data"
    return parse_edit_table({name: (folder / name).read_text(encoding="utf-8") for name in _FILES})


def parse_edit_table(texts: dict[str, str]) -> EditTable:
    """Build a table from the texts of its five files, by name.

    Raises:
        ValueError: A row names an unknown value, or two rows of a kind overlap in time. The message names it.
    """
    settings = json.loads(texts["table.json"])
    codes = _rows(texts["codes.csv"])
    pairs = [_pair(row) for row in _rows(texts["ptp_edits.csv"])]
    limits = [_limit(row) for row in _rows(texts["mue_limits.csv"])]
    _refuse_overlaps(((edit.column_1, edit.column_2), edit.period) for edit in pairs)
    _refuse_overlaps(((limit.code,), limit.period) for limit in limits)
    return EditTable(
        revision=settings["revision"],
        digest=_digest(texts),
        rules={row["rule_id"]: _rule(row) for row in _rows(texts["rules.csv"])},
        labels={row["code"]: row["label"] for row in codes},
        primaries={row["code"]: frozenset(row["primary_codes"].split()) for row in codes if row["primary_codes"]},
        pairs=_grouped((edit.column_2, edit) for edit in pairs),
        limits=_grouped((limit.code, limit) for limit in limits),
        separating_modifiers=frozenset(settings["separating_modifiers"]),
        repeat_modifiers=frozenset(settings["repeat_modifiers"]),
        twin_modifiers=frozenset(settings["twin_modifiers"]),
    )


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), strict=True))


def _period(row: dict[str, str]) -> Period:
    return Period(
        dt.date.fromisoformat(row["effective"]),
        dt.date.fromisoformat(row["deleted"]) if row["deleted"] else None,
    )


def _pair(row: dict[str, str]) -> PairEdit:
    indicator = int(row["modifier_indicator"])
    if indicator not in (0, 1, 9):
        raise ValueError(f"pair {row['column_1']}/{row['column_2']}: modifier indicator {indicator}")
    return PairEdit(row["column_1"], row["column_2"], cast(Literal[0, 1, 9], indicator), _period(row))


def _limit(row: dict[str, str]) -> UnitLimit:
    if row["adjudication"] not in ("line", "day"):
        raise ValueError(f"unit limit {row['code']}: adjudication {row['adjudication']!r}")
    return UnitLimit(row["code"], int(row["max_units"]), cast(Adjudication, row["adjudication"]), _period(row))


def _rule(row: dict[str, str]) -> RuleSpec:
    return RuleSpec(
        rule_id=row["rule_id"],
        code=row["code"],
        severity=Severity[row["severity"].upper()],
        is_decisive={"yes": True, "no": False}[row["is_decisive"]],
        carc=row["carc"],
        rarc=row["rarc"] or None,
        policy_sections=tuple(row["policy_sections"].split()),
        action=Action(row["action"]),
        title=row["title"],
        next_step=row["next_step"],
    )


def _refuse_overlaps(entries: Iterable[tuple[tuple[str, ...], Period]]) -> None:
    seen: dict[tuple[str, ...], list[Period]] = {}
    for key, period in entries:
        for other in seen.setdefault(key, []):
            if other.covers(period.first) or period.covers(other.first):
                raise ValueError(f"two entries for {'/'.join(key)} overlap in time")
        seen[key].append(period)


def _grouped(items: Iterable[tuple[str, _Entry]]) -> dict[str, tuple[_Entry, ...]]:
    groups: dict[str, tuple[_Entry, ...]] = {}
    for key, value in items:
        groups[key] = (*groups.get(key, ()), value)
    return groups


def _digest(texts: dict[str, str]) -> str:
    digest = hashlib.sha256(f"rules-revision {RULES_REVISION}\n".encode())
    for name in sorted(texts):
        content = texts[name].encode()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()

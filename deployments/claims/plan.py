"""A plan as claims are reviewed under it: limits, rubric and policy pack, versioned and addressed by digest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from deployments.claims.model import canonical_sha256, text_sha256

_SECTION = re.compile(r"^(S[0-9]{1,2}) ([^.]{1,60})\.", re.MULTILINE)
_PLAN_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """A section of a policy pack, as a review cites it."""

    id: str
    revision: str
    section: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`sections` maps a section id (`S1`) to its title. `rubric` and `policies` are prompt text, byte for byte."""

    name: str
    title: str
    timely_filing_days: int
    rubric: str
    rubric_revision: str
    policies: str
    policy_pack_id: str
    policy_pack_revision: str
    sections: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything above."""
        return canonical_sha256(
            {
                "name": self.name,
                "timely_filing_days": self.timely_filing_days,
                "rubric": [self.rubric_revision, text_sha256(self.rubric)],
                "policies": [self.policy_pack_id, self.policy_pack_revision, text_sha256(self.policies)],
            }
        )

    def policy_ref(self, section: str) -> PolicyRef:
        """Reference to a section of this plan's pack.

        Raises:
            KeyError: The pack has no such section.
        """
        if section not in self.sections:
            raise KeyError(section)
        return PolicyRef(self.policy_pack_id, self.policy_pack_revision, section)

    def require_sections(self, sections: Iterable[str]) -> None:
        """Check that rules cite only what the pack has.

        Raises:
            ValueError: A section is missing; the message names it.
        """
        missing = sorted(set(sections) - set(self.sections))
        if missing:
            raise ValueError(f"plan {self.name}: the policy pack has no section {', '.join(missing)}")


@cache
def load_plan(name: str) -> Plan:
    """A plan that ships in this package.

    Raises:
        ValueError: There is no such plan, or its files do not fit together.
    """
    folder = files(__package__) / "plans"
    if not _PLAN_NAME.fullmatch(name) or not (folder / name / "plan.json").is_file():
        raise ValueError(f"there is no plan {name!r}")
    folder = folder / name
    return parse_plan(
        json.loads((folder / "plan.json").read_text(encoding="utf-8")),
        rubric=(folder / "rubric.md").read_text(encoding="utf-8"),
        policies=(folder / "policy_pack.md").read_text(encoding="utf-8"),
    )


def parse_plan(settings: dict[str, Any], *, rubric: str, policies: str) -> Plan:
    """Build a plan from the content of its three files.

    Raises:
        ValueError: A section occurs twice, or the filing limit is not a positive number of days.
    """
    found = _SECTION.findall(policies)
    sections = dict(found)
    if len(sections) != len(found) or not sections:
        raise ValueError(f"plan {settings['plan']}: the policy pack has no sections, or one twice")
    if settings["timely_filing_days"] < 1:
        raise ValueError(f"plan {settings['plan']}: timely_filing_days must be at least 1")
    return Plan(
        name=settings["plan"],
        title=settings["title"],
        timely_filing_days=settings["timely_filing_days"],
        rubric=rubric,
        rubric_revision=settings["rubric_revision"],
        policies=policies,
        policy_pack_id=settings["policy_pack_id"],
        policy_pack_revision=settings["policy_pack_revision"],
        sections=sections,
    )

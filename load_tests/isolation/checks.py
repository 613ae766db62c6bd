"""A statement that the audit makes, with whether it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """`is_control`: it holds when the audit can see; the others hold when there is nothing to be seen."""

    name: str
    holds: bool
    found: str
    wanted: str
    is_control: bool = False

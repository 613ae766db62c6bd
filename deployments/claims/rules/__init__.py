"""Deterministic checks of a claim over a versioned edit table. They own the flags and the amounts."""

from deployments.claims.rules.edits import evaluate, is_valid_npi
from deployments.claims.rules.findings import Action, Evidence, Finding, LineAmount, Severity, amount_at_stake
from deployments.claims.rules.table import EditTable, RuleSpec, load_edit_table

__all__ = [
    "Action",
    "EditTable",
    "Evidence",
    "Finding",
    "LineAmount",
    "RuleSpec",
    "Severity",
    "amount_at_stake",
    "evaluate",
    "is_valid_npi",
    "load_edit_table",
]

"""Short ways to a claim, for tests."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import deployments.claims
from deployments.claims.model import Claim, ClaimSource, Parser, Pseudonymiser, ServiceLine

SAMPLES = Path(deployments.claims.__file__).parent / "samples"
RECEIVED = dt.date(2026, 10, 5)
VALID_NPI = "9999000018"
OTHER_NPI = "9999000026"
INVALID_NPI = "9999000019"
PSEUDONYMISER = Pseudonymiser(b"0123456789abcdef", "acme")


def line(number: int = 1, code: str = "99213", **values: Any) -> ServiceLine:
    day = values.pop("day", RECEIVED - dt.timedelta(days=20))
    units = Decimal(str(values.pop("units", 1)))
    defaults: dict[str, Any] = {
        "line_number": number,
        "procedure_code": code,
        "units": units,
        "charge_cents": 10_000,
        "date_from": day,
        "date_to": day,
        "place_of_service": "11",
        "diagnosis_pointers": (1,),
    }
    return ServiceLine(**(defaults | values))


def claim(*lines: ServiceLine, **values: Any) -> Claim:
    lines = lines or (line(),)
    defaults: dict[str, Any] = {
        "claim_id": "C-1",
        "member": PSEUDONYMISER.member(values.pop("member_id", "M1")),
        "billing_npi": VALID_NPI,
        "payer_id": "PAYER",
        "received_date": RECEIVED,
        "diagnoses": ("I10",),
        "total_charge_cents": sum(item.charge_cents for item in lines),
        "lines": lines,
        "source": ClaimSource(file="f", claim_index=1, parser=Parser.JSON_LINES),
    }
    return Claim(**(defaults | values))

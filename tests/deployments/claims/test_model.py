import datetime as dt
from decimal import Decimal

import pytest
from pydantic import ValidationError

from deployments.claims.model import ClaimSource, Parser, Pseudonymiser, format_money
from tests.deployments.claims.builders import claim, line


@pytest.mark.parametrize(
    "values",
    [
        {"total_charge_cents": -1},
        {"total_charge_cents": 1.5},
        {"diagnoses": ()},
        {"claim_id": ""},
        {"claim_id": "with\nnewline"},
        {"claim_id": "x" * 39},
        {"member": "DOE123"},
        {"received_date": "2026-10-05"},
        {"unknown": 1},
        {"lines": (line(1), line(1))},
    ],
)
def test_a_claim_refuses_what_is_not_one(values):
    with pytest.raises(ValidationError):
        claim(**values)


def test_a_line_refuses_dates_in_the_wrong_order():
    with pytest.raises(ValidationError, match="date_to lies before"):
        line(date_from=dt.date(2026, 2, 2), date_to=dt.date(2026, 2, 1))


def test_a_claim_is_immutable():
    with pytest.raises(ValidationError):
        claim().claim_id = "other"


def test_the_digest_covers_content_and_not_the_source():
    one = claim()
    elsewhere = claim(source=ClaimSource(file="other.edi", claim_index=9, parser=Parser.X12_LENIENT))
    assert one.digest == elsewhere.digest
    assert one.digest != claim(line(charge_cents=10_001)).digest
    assert one.digest != claim(claim_id="C-2").digest


@pytest.mark.parametrize("text", ["1", "1.0", "1.000"])
def test_units_written_differently_are_one_claim(text):
    assert claim(line(units=text)).digest == claim(line(units=1)).digest


@pytest.mark.parametrize(("text", "plain"), [("10", "10"), ("1.50", "1.5"), ("100.0", "100")])
def test_units_never_come_out_in_scientific_notation(text, plain):
    assert str(line(units=text).units) == plain
    assert line(units=text).units == Decimal(text)


def test_a_pseudonym_depends_on_key_tenant_and_identity():
    base = Pseudonymiser(b"k" * 16, "acme")
    assert base.member("M1") == Pseudonymiser(b"k" * 16, "acme").member(" m1 ")
    others = {
        base.member("M2"),
        base.member("M1", "CHILD"),
        Pseudonymiser(b"K" * 16, "acme").member("M1"),
        Pseudonymiser(b"k" * 16, "other").member("M1"),
    }
    assert len(others) == 4
    assert base.member("M1") not in others
    assert "M1" not in base.member("M1").upper()


def test_a_short_pseudonym_key_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        Pseudonymiser(b"short", "acme")


@pytest.mark.parametrize(
    ("cents", "text"),
    [(123456, "$1,234.56"), (0, "$0.00"), (5, "$0.05"), (-100, "-$1.00"), (100000000, "$1,000,000.00")],
)
def test_money_is_written_with_separators_and_two_places(cents, text):
    assert format_money(cents) == text

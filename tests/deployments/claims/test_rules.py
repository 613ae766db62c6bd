import datetime as dt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.claims.model import Frequency, UnitBasis
from deployments.claims.rules import amount_at_stake, evaluate, is_valid_npi, load_edit_table
from deployments.claims.rules.edits import luhn_sum
from deployments.claims.rules.table import parse_edit_table
from tests.deployments.claims.builders import INVALID_NPI, OTHER_NPI, RECEIVED, VALID_NPI, claim, line

TABLE = load_edit_table()


def findings(subject, *history, days=365):
    return evaluate(subject, table=TABLE, timely_filing_days=days, plan_ref="plan", history=history)


def rule_ids(subject, *history, days=365):
    return [finding.rule_id for finding in findings(subject, *history, days=days)]


def only(subject, *history):
    (finding,) = findings(subject, *history)
    return finding


def on(day):
    return RECEIVED - dt.timedelta(days=day)


def test_a_plain_claim_has_no_findings():
    assert rule_ids(claim()) == []


# NPI

nine_digits = st.integers(0, 10**9 - 1).map(lambda number: f"{number:09d}")


@given(nine_digits)
def test_exactly_one_of_ten_check_digits_is_valid(body):
    assert sum(is_valid_npi(f"{body}{digit}") for digit in range(10)) == 1


@given(nine_digits, st.integers(0, 9), st.integers(1, 9))
def test_every_single_wrong_digit_is_caught(body, position, shift):
    npi = f"{body}{-luhn_sum('80840' + body + '0') % 10}"
    assert is_valid_npi(npi)
    wrong = (int(npi[position]) + shift) % 10
    assert not is_valid_npi(f"{npi[:position]}{wrong}{npi[position + 1 :]}")


def test_the_published_example_is_valid():
    assert is_valid_npi("1234567893")  # CMS, NPI check digit examples


@pytest.mark.parametrize("text", ["", "123456789", "12345678930", "123456789X", "١٢٣٤٥٦٧٨٩٣", " 1234567893"])
def test_what_is_not_ten_ascii_digits_is_no_npi(text):
    assert not is_valid_npi(text)


@pytest.mark.parametrize(
    ("values", "rarc", "carc"),
    [
        ({"billing_npi": INVALID_NPI}, "N257", "207"),
        ({"billing_npi": None}, "N257", "206"),
        ({"rendering_npi": INVALID_NPI}, "N290", "207"),
    ],
)
def test_an_invalid_npi_is_flagged_by_its_role(values, rarc, carc):
    finding = only(claim(**values))
    assert (finding.rule_id, finding.rarc, finding.carc) == ("R-NPI", rarc, carc)
    assert finding.projected_overpayment_cents == 10_000


def test_one_invalid_npi_in_both_roles_is_flagged_once():
    assert rule_ids(claim(billing_npi=INVALID_NPI, rendering_npi=INVALID_NPI)) == ["R-NPI"]


def test_a_lines_own_invalid_npi_flags_that_line_alone():
    finding = only(claim(line(1), line(2, "85025", rendering_npi=INVALID_NPI)))
    assert finding.lines == (2,)
    assert finding.projected_overpayment_cents == 10_000


# Pairs


def pair(first_values=None, second_values=None, first="20610", second="96372"):
    return claim(line(1, first, **(first_values or {})), line(2, second, **(second_values or {})))


def test_a_pair_with_indicator_1_is_suspected_without_a_modifier():
    finding = only(pair())
    assert (finding.rule_id, finding.lines, finding.is_decisive) == ("R-PTP-MODIFIER", (1, 2), False)
    assert finding.amounts[0].line_number == 2


@pytest.mark.parametrize("modifier", sorted(TABLE.separating_modifiers))
def test_each_separating_modifier_on_either_line_lifts_a_pair_with_indicator_1(modifier):
    assert rule_ids(pair(second_values={"modifiers": (modifier,)})) == []
    assert rule_ids(pair(first_values={"modifiers": (modifier,)})) == []


def test_another_modifier_lifts_nothing():
    assert rule_ids(pair(second_values={"modifiers": ("76",)})) == ["R-PTP-MODIFIER"]


@pytest.mark.parametrize("modifiers", [(), ("59",), ("XU",)])
def test_no_modifier_lifts_a_pair_with_indicator_0(modifiers):
    subject = pair(second_values={"modifiers": modifiers}, first="80053", second="80048")
    assert only(subject).rule_id == "R-PTP-NEVER"


def test_indicator_9_is_no_edit():
    assert rule_ids(pair(first="97140", second="97110")) == []


@pytest.mark.parametrize(
    "values", [{"day": on(19)}, {"rendering_npi": OTHER_NPI}], ids=["another day", "another provider"]
)
def test_a_pair_needs_the_same_day_and_provider(values):
    assert rule_ids(pair(second_values=values)) == []


def test_the_order_of_the_lines_does_not_matter():
    assert only(claim(line(1, "96372"), line(2, "20610"))).amounts[0].line_number == 1


def test_the_first_code_may_stand_on_an_earlier_claim():
    earlier = claim(line(1, "20610"), claim_id="C-0")
    finding = only(claim(line(1, "96372")), earlier)
    assert (finding.rule_id, finding.lines) == ("R-PTP-MODIFIER", (1,))
    assert ("history", "C-0 line 1") in [(item.source, item.ref) for item in finding.evidence]
    assert rule_ids(claim(line(1, "96372")), claim(line(1, "20610"), member_id="M2")) == []


@pytest.mark.parametrize(("day", "is_flagged"), [("2025-12-31", True), ("2026-01-01", False), ("2023-12-31", False)])
def test_a_pair_holds_only_while_it_is_in_force(day, is_flagged):
    date = dt.date.fromisoformat(day)
    subject = claim(line(1, "99213", day=date), line(2, "36415", day=date))
    assert ("R-PTP-MODIFIER" in rule_ids(subject, days=2000)) == is_flagged


def pair_reference(lines):
    """What the pair rule must find, said another way: every (second, first) pair, one pair at a time."""
    flagged = set()
    for second in lines:
        for edit in (edit for edits in TABLE.pairs.values() for edit in edits):
            firsts = [first for first in lines if first.procedure_code == edit.column_1]
            firsts = [first for first in firsts if first.date_from == second.date_from]
            if edit.column_2 != second.procedure_code or not edit.period.covers(second.date_from) or not firsts:
                continue
            is_lifted = bool({*second.modifiers, *firsts[0].modifiers} & TABLE.separating_modifiers)
            if edit.modifier_indicator == 0 or (edit.modifier_indicator == 1 and not is_lifted):
                flagged.add((edit.modifier_indicator, second.line_number))
    return flagged


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["11042", "97597", "20610", "96372", "80053", "80048", "93000", "93005", "99214"]),
            st.sampled_from([(), ("59",), ("25",), ("76",)]),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_pair_rule_agrees_with_a_plain_reading_of_the_table(rows):
    lines = [line(n, code, modifiers=mods, day=on(day)) for n, (code, mods, day) in enumerate(rows, start=1)]
    found = {
        (0 if finding.rule_id == "R-PTP-NEVER" else 1, finding.amounts[0].line_number)
        for finding in findings(claim(*lines))
        if finding.rule_id.startswith("R-PTP")
    }
    assert found == pair_reference(lines)


# Units


@pytest.mark.parametrize(("units", "is_flagged"), [(6, False), ("6.001", True), (7, True)])
def test_units_are_flagged_from_the_first_above_the_limit(units, is_flagged):
    assert rule_ids(claim(line(1, "97110", units=units))) == (["R-MUE"] if is_flagged else [])


def test_units_of_one_day_are_summed_over_lines():
    subject = claim(line(1, "97110", units=4), line(2, "97110", modifiers=("59",), units=4, charge_cents=8_001))
    finding = only(subject)
    assert finding.lines == (1, 2)
    # Two of the second line's four units are in excess; half of 8,001 cents, rounded down.
    assert [(amount.line_number, amount.cents) for amount in finding.amounts] == [(2, 4_000)]


def test_units_of_two_days_or_two_providers_are_not_summed():
    assert rule_ids(claim(line(1, "97110", units=4), line(2, "97110", units=4, day=on(19)))) == []
    subject = claim(line(1, "97110", units=4), line(2, "97110", modifiers=("XP",), units=4, rendering_npi=OTHER_NPI))
    assert rule_ids(subject) == []


def test_a_line_limit_looks_at_each_line_alone():
    lines = [line(n, "20610", units=2, modifiers=(side,)) for n, side in ((1, "LT"), (2, "RT"))]
    assert rule_ids(claim(*lines)) == []
    assert only(claim(line(1, "20610", units=3))).lines == (1,)


def test_a_range_of_days_has_the_limit_once_a_day():
    def of(units):
        return claim(line(1, "97110", units=units, date_from=on(20), date_to=on(19)))

    assert rule_ids(of(12)) == []
    assert rule_ids(of(13)) == ["R-MUE"]


def test_minutes_are_not_units():
    assert rule_ids(claim(line(1, "97110", units=90, unit_basis=UnitBasis.MINUTES))) == []


@given(st.integers(1, 40), st.integers(0, 10**7))
def test_the_amount_for_excess_units_is_never_more_than_their_share(units, charge):
    found = findings(claim(line(1, "97110", units=units, charge_cents=charge)))
    excess = max(units - 6, 0)
    assert sum(finding.projected_overpayment_cents for finding in found) == charge * excess // units


# Duplicates


def test_the_same_line_on_an_earlier_claim_is_an_exact_duplicate():
    finding = only(claim(), claim(claim_id="C-0"))
    assert (finding.rule_id, finding.is_decisive, finding.projected_overpayment_cents) == ("R-DUP-EXACT", True, 10_000)
    assert "C-0" in finding.summary


def test_the_same_line_twice_on_one_claim_is_an_exact_duplicate():
    assert only(claim(line(1, "71046"), line(2, "71046"))).lines == (2,)


@pytest.mark.parametrize("modifier", ["76", "77", "91"])
def test_a_repeat_modifier_makes_a_second_service(modifier):
    assert rule_ids(claim(line(1, "71046"), line(2, "71046", modifiers=(modifier,)))) == []
    lines = [line(n, "71046", modifiers=(modifier,)) for n in (1, 2)]
    assert rule_ids(claim(*lines)) == []


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"charge_cents": 9_999}, "charge"),
        ({"units": 2, "code": "71046"}, "units"),
        ({"modifiers": ("25",)}, "modifiers"),
        ({"place_of_service": "22"}, "place of service"),
        ({"rendering_npi": OTHER_NPI}, "rendering provider"),
    ],
)
def test_a_line_that_differs_a_little_is_a_suspected_duplicate(values, what):
    code = values.pop("code", "99213")
    finding = only(claim(line(1, code, **values)), claim(line(1, code), claim_id="C-0"))
    assert (finding.rule_id, finding.is_decisive) == ("R-DUP-SUSPECT", False)
    assert f"differs in {what}" in finding.summary


@pytest.mark.parametrize(
    "other",
    [
        {"member_id": "M2"},
        {"frequency": Frequency.VOID, "prior_claim_ref": "X"},
        {"billing_npi": OTHER_NPI},
    ],
    ids=["another member", "a void", "another group"],
)
def test_what_is_no_duplicate_is_not_flagged(other):
    assert rule_ids(claim(), claim(claim_id="C-0", **other)) == []
    assert rule_ids(claim(), claim(line(day=on(21)), claim_id="C-0")) == []


def test_two_sides_of_the_body_are_two_services():
    lines = [line(n, "20610", modifiers=(side,), charge_cents=n) for n, side in ((1, "LT"), (2, "RT"))]
    assert rule_ids(claim(*lines)) == []


def test_a_replacement_is_no_duplicate_of_its_original():
    replacement = claim(frequency=Frequency.REPLACEMENT, prior_claim_ref="C-0")
    assert rule_ids(replacement, claim(claim_id="C-0")) == []


def test_lines_that_repeat_one_claim_are_one_finding():
    lines = (line(1), line(2, "85025"))
    finding = only(claim(*lines), claim(*lines, claim_id="C-0"))
    assert finding.lines == (1, 2)
    assert len(finding.evidence) == 4


# Dates


@pytest.mark.parametrize(("days", "is_flagged"), [(364, False), (365, False), (366, True)])
def test_the_last_day_of_the_filing_limit_is_in_time(days, is_flagged):
    assert rule_ids(claim(line(day=on(days)))) == (["R-TIMELY"] if is_flagged else [])


def test_the_filing_limit_is_the_plans():
    assert rule_ids(claim(line(day=on(91))), days=90) == ["R-TIMELY"]
    assert rule_ids(claim(line(day=on(90))), days=90) == []


def test_only_the_late_lines_are_at_stake():
    finding = only(claim(line(1, day=on(400)), line(2, "85025", day=on(300))))
    assert finding.lines == (1,)
    assert finding.projected_overpayment_cents == 10_000


def test_a_correction_has_no_first_filing_limit():
    assert rule_ids(claim(line(day=on(400)), frequency=Frequency.REPLACEMENT, prior_claim_ref="C-0")) == []


@pytest.mark.parametrize(("days", "is_flagged"), [(0, False), (-1, True)])
def test_a_service_after_the_day_of_receipt_is_flagged(days, is_flagged):
    assert rule_ids(claim(line(day=on(days)))) == (["R-DATE"] if is_flagged else [])


# Form


def test_a_total_above_the_lines_puts_the_difference_at_stake():
    finding = only(claim(total_charge_cents=10_500))
    assert (finding.rule_id, finding.lines, finding.projected_overpayment_cents) == ("R-TOTAL", (), 500)
    assert "$105.00" in finding.summary
    assert only(claim(total_charge_cents=9_000)).projected_overpayment_cents == 0


@pytest.mark.parametrize("pointers", [(), (2,), (1, 2)])
def test_a_pointer_without_its_diagnosis_is_flagged(pointers):
    assert rule_ids(claim(line(diagnosis_pointers=pointers))) == ["R-DX-POINTER"]


def test_an_add_on_needs_its_primary_on_the_day_here_or_before():
    addon = claim(line(1, "90472"))
    assert rule_ids(addon) == ["R-ADDON"]
    assert rule_ids(claim(line(1, "90471"), line(2, "90472"))) == []
    assert rule_ids(addon, claim(line(1, "90471"), claim_id="C-0")) == []
    assert rule_ids(addon, claim(line(1, "90471", day=on(30)), claim_id="C-0")) == ["R-ADDON"]


@pytest.mark.parametrize("frequency", [Frequency.REPLACEMENT, Frequency.VOID])
def test_a_correction_must_name_its_original(frequency):
    assert rule_ids(claim(frequency=frequency)) == ["R-PRIOR-REF"]
    assert rule_ids(claim(frequency=frequency, prior_claim_ref="C-0")) == []


# All together


def random_claim(rng, number):
    codes = sorted(TABLE.labels)
    lines = [
        line(
            n,
            rng.choice(codes),
            units=rng.randint(1, 12),
            modifiers=rng.choice([(), (), ("25",), ("59",), ("76",)]),
            day=on(rng.choice([20, 20, 21, 366, -1])),
            diagnosis_pointers=rng.choice([(1,), (1,), (2,)]),
        )
        for n in range(1, rng.randint(2, 6))
    ]
    return claim(
        *lines,
        claim_id=f"C-{number}",
        billing_npi=rng.choice([VALID_NPI, OTHER_NPI, INVALID_NPI]),
        total_charge_cents=10_000 * len(lines) + rng.choice([0, 0, 700]),
    )


@pytest.mark.parametrize("seed", range(5))
def test_findings_are_numbered_worst_first_and_never_ask_for_more_than_was_billed(seed):
    rng = Random(seed)
    history = []
    for number in range(40):
        subject = random_claim(rng, number)
        found = findings(subject, *history)
        assert found == findings(subject, *history)
        assert [finding.flag_id for finding in found] == [f"F{n}" for n in range(1, len(found) + 1)]
        severities = [finding.severity for finding in found]
        assert severities == sorted(severities, reverse=True)
        billed = max(subject.total_charge_cents, subject.line_total_cents)
        assert 0 <= amount_at_stake(found) <= billed
        for finding in found:
            assert set(finding.lines) <= {item.line_number for item in subject.lines}
            assert finding.evidence
            assert finding.projected_overpayment_cents <= billed
            assert len(finding.summary) <= 400
        history.append(subject)


def test_a_line_counts_once_in_the_amount_at_stake():
    found = findings(claim(line(1, "97110", units=7, day=on(400), charge_cents=7_000)))
    assert {finding.rule_id for finding in found} == {"R-MUE", "R-TIMELY"}
    assert amount_at_stake(found) == 7_000


# The table


def texts():
    folder = "deployments.claims.rules"
    from importlib.resources import files

    data = files(folder) / "data"
    return {item.name: item.read_text() for item in data.iterdir() if item.name.endswith((".csv", ".json"))}


def test_the_digest_follows_every_file_of_the_table():
    base = texts()
    digests = {parse_edit_table(base).digest}
    for name in base:
        digests.add(parse_edit_table(base | {name: base[name].replace("\n", "\n\n", 1) + "\n"}).digest)
    assert len(digests) == len(base) + 1
    assert parse_edit_table(base).digest == TABLE.digest


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("ptp_edits.csv", "20610,96372,1,2025-01-01,\n", "20610/96372 overlap"),
        ("ptp_edits.csv", "20610,99213,5,2025-01-01,\n", "modifier indicator 5"),
        ("mue_limits.csv", "97110,9,day,2025-01-01,\n", "97110 overlap"),
        ("mue_limits.csv", "99999,9,week,2025-01-01,\n", "99999: adjudication"),
    ],
)
def test_a_table_with_a_bad_row_is_refused_by_name(name, row, message):
    base = texts()
    with pytest.raises(ValueError, match=message):
        parse_edit_table(base | {name: base[name] + row})

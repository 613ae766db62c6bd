import datetime as dt
import json
import re
from random import Random

import pytest
from pydantic import ValidationError

from deployments.claims import x12_claims
from deployments.claims.dispositions import MAX_NOTES_PER_FILE, Disposition, IntakeResult, Outcome, Reason
from deployments.claims.generate_samples import scenarios
from deployments.claims.intake import MAX_CLAIMS_PER_FILE, MAX_FILE_BYTES, MAX_TRANSACTIONS_PER_FILE, ClaimIntake
from deployments.claims.model import Frequency, Parser
from deployments.claims.x12 import MAX_SEGMENTS_PER_FILE
from tests.deployments.claims.builders import PSEUDONYMISER, SAMPLES

INTAKE = ClaimIntake(PSEUDONYMISER)
FOUR_CLAIMS = (SAMPLES / "01-clean-visits.edi").read_text()
ONE_CLAIM = (SAMPLES / "02-clean-single.edi").read_text()

RECORD = {
    "schema_version": "zoneserve.claim/1",
    "claim_id": "J-1",
    "member_id": "SYNTHM1",
    "billing_npi": "9999000018",
    "payer_id": "SYNTHPAYER1",
    "received_date": "2026-10-05",
    "diagnoses": ["I10"],
    "total_charge_cents": 12000,
    "lines": [
        {
            "line_number": 1,
            "procedure_code": "99213",
            "units": "1",
            "charge_cents": 12000,
            "date_from": "2026-09-15",
            "date_to": "2026-09-15",
            "place_of_service": "11",
            "diagnosis_pointers": [1],
        }
    ],
}


def read(text, name="file.edi"):
    return INTAKE.read_bytes(text.encode() if isinstance(text, str) else text, name=name)


def only_refusal(result):
    (refusal,) = result.refusals
    return refusal


# What can be read


def test_a_file_with_several_claims_yields_each_in_order():
    result = read(FOUR_CLAIMS)
    assert [claim.claim_id for claim in result.claims] == ["SYNTH-0001", "SYNTH-0002", "SYNTH-0003", "SYNTH-0004"]
    assert [claim.source.claim_index for claim in result.claims] == [1, 2, 3, 4]
    assert result.num_claims == 4
    assert not result.dispositions


def test_the_values_of_a_claim_are_those_of_its_segments():
    _, second, third, _ = read(FOUR_CLAIMS).claims
    assert second.total_charge_cents == 23_500
    assert second.billing_npi == "9999000018"
    assert second.payer_id == "SYNTHPAYER1"
    assert second.plan_code == "SYNTHPPO"
    assert second.received_date == dt.date(2026, 10, 5)
    assert second.frequency is Frequency.ORIGINAL
    visit, injection, drug = second.lines
    assert (visit.procedure_code, visit.modifiers, visit.charge_cents) == ("99214", ("25",), 17_500)
    assert (injection.line_number, injection.place_of_service) == (2, "11")
    assert (drug.procedure_code, int(drug.units), drug.diagnosis_pointers) == ("J1100", 8, (1,))
    assert drug.date_from == drug.date_to == dt.date(2026, 9, 15)
    assert len(third.diagnoses) == 2


def test_no_name_address_birth_date_or_member_id_is_kept():
    text = "".join(claim.model_dump_json() for claim in read(FOUR_CLAIMS).claims)
    for secret in ("SYNTHMEMBER", "SYNTHM0", "SYNTHVILLE", "BRAVO", "1970"):
        assert secret in FOUR_CLAIMS or secret in ("BRAVO", "1970")
        assert secret not in text


def test_a_dependent_is_another_member_than_the_subscriber():
    as_subscriber = FOUR_CLAIMS.replace("SYNTHM00003", "SYNTHM00001")
    first, _, dependent, _ = read(as_subscriber).claims
    assert first.member != dependent.member
    assert read(as_subscriber).claims[2].member == dependent.member


def test_a_received_date_from_outside_wins_over_the_files_own():
    intake = ClaimIntake(PSEUDONYMISER, received_date=dt.date(2026, 11, 1))
    assert intake.read_bytes(ONE_CLAIM.encode(), name="f").claims[0].received_date == dt.date(2026, 11, 1)


def test_a_correction_names_the_claim_it_corrects():
    (claim,) = INTAKE.read_file(SAMPLES / "12-correction.edi").claims
    assert claim.frequency is Frequency.REPLACEMENT
    assert claim.prior_claim_ref == "SYNTH-0005"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("NM1*82*1*SYNTHDOC*RENDER****XX*9999000134~", ""), None),
        (("", ""), "9999000134"),
    ],
)
def test_the_rendering_provider_is_read_where_there_is_one(change, expected):
    text = (SAMPLES / "08-identifiers.edi").read_text().replace(*change)
    assert read(text).claims[1].rendering_npi == expected


def test_a_lines_own_rendering_provider_is_the_lines_alone():
    text = ONE_CLAIM.replace("LX*2~", "NM1*82*1*SYNTHDOC*LINE****XX*9999000208~\nLX*2~")
    (claim,) = read(text).claims
    assert [item.rendering_npi for item in claim.lines] == ["9999000208", None]
    assert claim.rendering_npi is None


def test_another_payers_loops_do_not_leak_into_the_claim():
    other = (
        "SBR*S*18*******CI~AMT*D*10~OI***Y***Y~NM1*IL*1*SYNTHOTHER*X****MI*OTHERMEMBER~N3*1 OAK ST~"
        "N4*SYNTHVILLE*OH*450010001~NM1*PR*2*OTHER PAYER*****PI*OTHERPAYER~REF*F8*OTHERREF~NM1*82*1~"
    )
    plain = read(ONE_CLAIM).claims[0]
    (claim,) = read(ONE_CLAIM.replace("LX*1~", other + "LX*1~")).claims
    assert claim.digest == plain.digest


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_line_ends_between_segments_do_not_matter(ending):
    text = FOUR_CLAIMS.replace("~\n", "~" + ending)
    assert [claim.digest for claim in read(text).claims] == [claim.digest for claim in read(FOUR_CLAIMS).claims]


def test_other_delimiters_are_taken_from_the_isa_segment():
    text = FOUR_CLAIMS.replace("*", "|").replace(":", ">").replace("~\n", "\n")
    result = read(text)
    assert [claim.digest for claim in result.claims] == [claim.digest for claim in read(FOUR_CLAIMS).claims]
    assert {claim.source.parser for claim in result.claims} == {Parser.X12_STRICT}


def test_two_interchanges_in_one_file_keep_their_own_delimiters():
    result = read(ONE_CLAIM + FOUR_CLAIMS.replace("*", "|"))
    assert len(result.claims) == result.num_claims == 5
    assert not result.dispositions


# The lenient path


def test_a_total_that_does_not_add_up_is_read_leniently_and_noted():
    result = INTAKE.read_file(SAMPLES / "10-total.edi")
    (claim,) = result.claims
    assert claim.source.parser is Parser.X12_LENIENT
    assert claim.total_charge_cents == claim.line_total_cents + 10_000
    assert [note.reason for note in result.notes] == [Reason.READ_LENIENTLY]


def test_an_unknown_segment_is_passed_over_with_a_note_that_names_it():
    text = ONE_CLAIM.replace("LX*1~", "ZZ9*SECRET~\nLX*1~")
    result = read(text)
    (note,) = [note for note in result.notes if note.reason is Reason.UNKNOWN_SEGMENT]
    segments = [part.strip() for part in text.split("~")]
    assert segments[note.segment_number - 1] == "ZZ9*SECRET"
    assert note.segment_id == "ZZ9"
    assert note.outcome is Outcome.NOTED
    assert result.claims[0].digest == read(ONE_CLAIM).claims[0].digest
    assert result.claims[0].source.parser is Parser.X12_LENIENT


def test_a_wrong_segment_count_is_noted():
    reasons = [note.reason for note in read(re.sub(r"\nSE[*][0-9]+[*]", "SE*99*", ONE_CLAIM)).notes]
    assert Reason.SEGMENT_COUNT_MISMATCH in reasons


@pytest.mark.parametrize("cut", ["IEA*", "GE*"])
def test_a_missing_trailer_after_whole_transactions_is_only_noted(cut):
    result = read(FOUR_CLAIMS[: FOUR_CLAIMS.index(cut)])
    assert len(result.claims) == 4
    assert [note.reason for note in result.notes] == [Reason.INCOMPLETE_ENVELOPE]


def test_a_file_without_any_envelope_is_read():
    result = read(FOUR_CLAIMS[FOUR_CLAIMS.index("ST*") : FOUR_CLAIMS.index("GE*")])
    assert len(result.claims) == 4
    assert Reason.INCOMPLETE_ENVELOPE in {note.reason for note in result.notes}


def test_an_isa_segment_of_the_wrong_width_is_read():
    narrow = FOUR_CLAIMS.replace("SYNTHSENDER    *", "SYNTHSENDER*", 1).replace("SYNTHPAYER1    *", "SYNTHPAYER1*", 1)
    assert len(read(narrow).claims) == 4


def test_lines_without_numbers_are_numbered_by_their_order():
    result = read(ONE_CLAIM.replace("LX*1~\n", "").replace("LX*2~\n", ""))
    assert [item.line_number for item in result.claims[0].lines] == [1, 2]
    assert Reason.LINES_RENUMBERED in {note.reason for note in result.notes}


def test_the_receiver_stands_in_for_a_missing_payer():
    text = ONE_CLAIM.replace("NM1*PR*2*SYNTH HEALTH PLAN*****PI*SYNTHPAYER1~\n", "")
    assert read(text).claims[0].payer_id == "SYNTHPAYER1"


def test_notes_are_bounded_and_the_rest_is_counted():
    result = read(ONE_CLAIM.replace("LX*1~", "ZZ9*1~" * (MAX_NOTES_PER_FILE + 50) + "LX*1~"))
    assert len(result.notes) == MAX_NOTES_PER_FILE + 1
    assert result.notes[-1].reason is Reason.NOTES_SUPPRESSED


def test_a_strict_parse_that_reads_other_claims_is_not_trusted(monkeypatch):
    class Empty:
        def claims(self):
            return iter(())

    class OtherParser:
        def parse(self, name, fields):
            return Empty()

    monkeypatch.setattr(x12_claims, "create_parser", lambda *_: OtherParser())
    result = read(ONE_CLAIM)
    assert result.claims[0].source.parser is Parser.X12_LENIENT
    assert "other claims" in result.notes[0].detail


# Whole files that cannot be read


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_FILE),
        (b" \r\n\t ", Reason.EMPTY_FILE),
        (Random(1).randbytes(4096), Reason.NOT_A_CLAIM_FILE),
        (bytes(range(1, 256)) * 8, Reason.NOT_A_CLAIM_FILE),
        (b"%PDF-1.7 and so on", Reason.NOT_A_CLAIM_FILE),
        (FOUR_CLAIMS.replace("SYNTH CLINIC", "SYNTH\0CLINIC").encode(), Reason.NOT_A_CLAIM_FILE),
        (b"ISA", Reason.BAD_ENVELOPE),
        (b"ISA*00*short~", Reason.BAD_ENVELOPE),
        (b"ISA" + b"x" * 4000, Reason.BAD_ENVELOPE),
        (FOUR_CLAIMS[: FOUR_CLAIMS.index("GS*")].encode(), Reason.NO_CLAIMS),
        (b"ST*" + b"x" * 5000 + b"~", Reason.BAD_ENVELOPE),
        (b"x" * (MAX_FILE_BYTES + 1), Reason.FILE_TOO_LARGE),
        (FOUR_CLAIMS.encode() + b" " * MAX_FILE_BYTES, Reason.FILE_TOO_LARGE),
    ],
)
def test_a_file_that_is_no_claim_file_is_refused_with_its_reason(data, reason):
    result = read(data)
    refusal = only_refusal(result)
    assert refusal.reason is reason
    assert not result.claims
    assert refusal.file == "file.edi"


def test_the_size_limit_is_named():
    assert "5,000,000" in only_refusal(read(b"x" * (MAX_FILE_BYTES + 1))).detail


def test_reading_from_disk_stops_at_the_limit(tmp_path):
    path = tmp_path / "big.edi"
    path.write_bytes(FOUR_CLAIMS.encode() + b" " * (2 * MAX_FILE_BYTES))
    assert only_refusal(INTAKE.read_file(path)).reason is Reason.FILE_TOO_LARGE


def test_a_remittance_is_refused_as_the_wrong_transaction():
    text = FOUR_CLAIMS.replace("ST*837*", "ST*835*").replace("GS*HC*", "GS*HP*")
    refusals = read(text).refusals
    assert {refusal.reason for refusal in refusals} == {Reason.WRONG_TRANSACTION}
    assert {(refusal.segment_id, refusal.segment_number) for refusal in refusals} == {("ST", 3)}


def test_an_institutional_claim_is_refused_by_its_version():
    refusals = read(ONE_CLAIM.replace("005010X222A1", "005010X223A2")).refusals
    assert [refusal.reason for refusal in refusals] == [Reason.UNSUPPORTED_VERSION]


def test_a_transaction_without_claims_is_refused():
    start, end = ONE_CLAIM.index("CLM*"), ONE_CLAIM.index("\nSE*")
    assert only_refusal(read(ONE_CLAIM[:start] + ONE_CLAIM[end:])).reason is Reason.NO_CLAIMS


def test_too_many_claims_are_refused_together_and_counted():
    text = ONE_CLAIM.replace("~\nSE*", "~" + "CLM*X*1~" * MAX_CLAIMS_PER_FILE + "SE*")
    refusal = only_refusal(read(text))
    assert refusal.reason is Reason.TOO_MANY_CLAIMS
    assert refusal.num_claims == MAX_CLAIMS_PER_FILE + 1


def test_too_many_transactions_are_refused_together():
    refusal = only_refusal(read("ST*837*1~" * (MAX_TRANSACTIONS_PER_FILE + 1)))
    assert refusal.reason is Reason.TOO_MANY_TRANSACTIONS


def test_too_many_segments_are_refused_together():
    assert only_refusal(read("ST*837*1~" + "A~" * MAX_SEGMENTS_PER_FILE)).reason is Reason.FILE_TOO_LARGE


# Cut files


def test_a_file_cut_in_half_refuses_each_of_its_claims():
    result = read(FOUR_CLAIMS[: len(FOUR_CLAIMS) // 2])
    assert not result.claims
    assert result.num_claims > 1
    assert [refusal.claim_index for refusal in result.refusals] == list(range(1, result.num_claims + 1))
    assert {refusal.reason for refusal in result.refusals} == {Reason.TRUNCATED}
    assert all(refusal.segment_number and refusal.claim_id for refusal in result.refusals)


def test_a_cut_transaction_does_not_take_a_whole_one_with_it():
    start, end = FOUR_CLAIMS.index("ST*"), FOUR_CLAIMS.index("GE*")
    both = FOUR_CLAIMS[:end] + FOUR_CLAIMS[start:end]
    result = read(both[: both.rindex("SV1")])
    assert len(result.claims) == 4
    assert result.num_claims == 8
    assert [refusal.claim_index for refusal in result.refusals] == [5, 6, 7, 8]


@pytest.mark.parametrize("seed", range(12))
def test_wherever_a_file_is_cut_everything_is_accounted_for(seed):
    rng = Random(seed)
    for _ in range(8):
        result = read(FOUR_CLAIMS[: rng.randrange(len(FOUR_CLAIMS))])
        assert len(result.claims) in (0, 4)
        assert result.claims or result.refusals


@pytest.mark.parametrize("seed", range(10))
def test_damaged_files_never_raise_and_never_lose_a_claim(seed):
    rng = Random(seed)
    for _ in range(6):
        data = bytearray(FOUR_CLAIMS.encode())
        for _ in range(rng.randint(1, 12)):
            position = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[position] = rng.randrange(1, 256)
                case 1:
                    del data[position : position + rng.randint(1, 60)]
                case 2:
                    data[position:position] = rng.choice([b"~", b"*", b":", b"CLM*", b"~SE*1*1~", b"~HL*1~"])
                case 3:
                    data[position:position] = data[position : position + 80]
        result = read(bytes(data))  # IntakeResult itself checks that claims and refusals add up
        assert result.claims or result.refusals


def test_a_last_segment_without_its_terminator_is_not_taken_for_whole():
    end = FOUR_CLAIMS.index("~", FOUR_CLAIMS.index("\nSE*"))
    result = read(FOUR_CLAIMS[:end])
    assert not result.claims
    assert {refusal.reason for refusal in result.refusals} == {Reason.TRUNCATED}
    assert result.notes[0].segment_id == "SE"


def disposition(index):
    return Disposition(
        file="f", outcome=Outcome.REFUSED, reason=Reason.TRUNCATED, detail="Cut.", num_claims=1, claim_index=index
    )


@pytest.mark.parametrize(
    ("num_claims", "dispositions"),
    [(2, [disposition(1)]), (0, []), (2, [disposition(1), disposition(1)]), (1, [disposition(1), disposition(2)])],
    ids=["one lost", "nothing said", "one twice", "one too many"],
)
def test_a_result_that_does_not_account_for_its_claims_cannot_be_made(num_claims, dispositions):
    with pytest.raises(ValidationError):
        IntakeResult(file="f", num_claims=num_claims, num_transactions=1, claims=(), dispositions=tuple(dispositions))


# Single claims that cannot be read


@pytest.mark.parametrize(
    ("old", "new", "reason", "segment_id"),
    [
        ("CLM*SYNTH-0001*153*", "CLM*SYNTH-0001*1.5.3*", Reason.INVALID_VALUE, "CLM"),
        ("CLM*SYNTH-0001*153*", "CLM*SYNTH-0001*153.001*", Reason.INVALID_VALUE, "CLM"),
        ("CLM*SYNTH-0001*153*", "CLM*SYNTH-0001*-153*", Reason.INVALID_VALUE, "CLM"),
        ("CLM*SYNTH-0001*153*", "CLM*SYNTH-0001**", Reason.MISSING_VALUE, "CLM"),
        ("CLM*SYNTH-0001*", "CLM**", Reason.MISSING_VALUE, "CLM"),
        ("11:B:1*", "11:B:5*", Reason.INVALID_VALUE, "CLM"),
        ("SV1*HC:99213*120*UN*1*", "SV1*HC:99213*120*UN*0*", Reason.INVALID_VALUE, "SV1"),
        ("SV1*HC:99213*120*UN*1*", "SV1*HC:99213*120*UN**", Reason.MISSING_VALUE, "SV1"),
        ("SV1*HC:99213*120*UN*1*", "SV1*HC:99213*120*XX*1*", Reason.INVALID_VALUE, "SV1"),
        ("SV1*HC:99213*120*UN*1*", "SV1*ZZ:99213*120*UN*1*", Reason.INVALID_VALUE, "SV1"),
        ("SV1*HC:99213*120*UN*1*", "SV1*HC:9921*120*UN*1*", Reason.INVALID_VALUE, "SV1"),
        ("SV1*HC:99213*120*UN*1***1~", "SV1*HC:99213*120*UN*1***13~", Reason.INVALID_VALUE, "SV1"),
        ("DTP*472*D8*20260915~", "DTP*472*D8*20260931~", Reason.INVALID_VALUE, "DTP"),
        ("DTP*472*D8*20260915~", "DTP*472*RD8*20260915-20260914~", Reason.INVALID_VALUE, "DTP"),
        ("DTP*472*D8*20260915~", "DTP*431*D8*20260915~", Reason.MISSING_SEGMENT, "SV1"),
        ("MI*SYNTHM00001~", "MI~", Reason.MISSING_SEGMENT, "CLM"),
    ],
)
def test_one_unreadable_claim_is_refused_and_the_others_are_read(old, new, reason, segment_id):
    assert old in FOUR_CLAIMS
    result = read(FOUR_CLAIMS.replace(old, new, 1))
    refusal = only_refusal(result)
    assert (refusal.reason, refusal.segment_id, refusal.claim_index) == (reason, segment_id, 1)
    assert [claim.claim_id for claim in result.claims] == ["SYNTH-0002", "SYNTH-0003", "SYNTH-0004"]


def test_a_claim_without_diagnosis_or_lines_is_refused():
    without = "\n".join(row for row in ONE_CLAIM.split("\n") if not row.startswith("HI*"))
    assert only_refusal(read(without)).reason is Reason.MISSING_SEGMENT
    without = "\n".join(row for row in ONE_CLAIM.split("\n") if not row.startswith(("LX*", "SV1*", "DTP*")))
    assert only_refusal(read(without)).reason is Reason.MISSING_SEGMENT


def test_more_lines_than_x12_allows_are_refused():
    body = "LX*1~SV1*HC:99213*1*UN*1***1~DTP*472*D8*20260915~" * 51
    refusal = only_refusal(read(ONE_CLAIM.replace("LX*1~", body + "LX*1~", 1)))
    assert refusal.reason is Reason.INVALID_VALUE
    assert "50" in refusal.detail


def test_details_never_quote_the_file():
    damaged = FOUR_CLAIMS.replace("*153*", "*SECRETAMOUNT*").replace("MI*SYNTHM00002~", "MI*" + "M" * 90 + "~")
    result = read(damaged.replace("LX*1~", "SECRETSEGMENT~LX*1~", 1))
    assert len(result.refusals) == 1
    text = "".join(disposition.model_dump_json() for disposition in result.dispositions)
    assert "SECRET" not in text
    assert "MMMM" not in text


# JSON lines


def json_lines(*records):
    return "\n".join(item if isinstance(item, str) else json.dumps(item) for item in records)


def test_a_json_line_is_the_same_claim_as_its_x12():
    (claim,) = read(json_lines(RECORD), "claims.jsonl").claims
    assert claim.source.parser is Parser.JSON_LINES
    assert claim.lines[0].charge_cents == 12_000
    assert "SYNTHM1" not in claim.model_dump_json()


@pytest.mark.parametrize("name", ["claims.jsonl", "claims.txt"])
def test_json_lines_are_known_by_name_or_by_content(name):
    assert len(read(json_lines(RECORD, RECORD), name).claims) == 2


def test_a_bad_json_line_is_refused_by_its_number_and_the_others_are_read():
    result = read(json_lines(RECORD, "", "{not json", RECORD), "claims.jsonl")
    refusal = only_refusal(result)
    assert (refusal.reason, refusal.line_number, refusal.claim_index) == (Reason.BAD_JSON, 3, 2)
    assert [claim.source.claim_index for claim in result.claims] == [1, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": "zoneserve.claim/2"},
        {"total_charge_cents": "12000"},
        {"total_charge_cents": 120.5},
        {"surprise": 1},
        {"lines": []},
        {"received_date": "05.10.2026"},
        {"diagnoses": ["i10"]},
        {"lines": [RECORD["lines"][0], RECORD["lines"][0]]},
    ],
)
def test_a_json_line_that_is_no_claim_is_refused(change):
    refusal = only_refusal(read(json_lines(RECORD | change), "c.jsonl"))
    assert refusal.reason is Reason.INVALID_VALUE
    assert refusal.line_number == 1


@pytest.mark.parametrize("line", ["[]", "1", "null", '"text"', "[" * 100_000])
def test_json_that_is_no_object_is_refused(line):
    assert only_refusal(read(line, "c.jsonl")).reason in (Reason.BAD_JSON, Reason.INVALID_VALUE)


def test_every_sample_claim_is_read_under_its_own_id():
    for name, claims in scenarios().items():
        assert [claim.claim_id for claim in INTAKE.read_file(SAMPLES / name).claims] == [
            claim.claim_id for claim in claims
        ]

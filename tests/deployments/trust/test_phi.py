"""Detectors of health information: what each finds, what it must leave alone, look-alikes, and the time it may take."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from re import _constants as node  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import deployments.claims
from deployments.claims.rules.edits import is_valid_npi
from deployments.trust.phi import MAX_FINDINGS, Finding, positions, scan
from deployments.trust.phi.patterns import PATTERN_DETECTORS
from deployments.trust.phi.presidio import ENTITIES, DetectorError, PresidioDetector, load_presidio
from deployments.trust.phi.reading import read, readings

CLAIMS = Path(deployments.claims.__file__).parent
SHIPPED = sorted([*CLAIMS.glob("plans/**/*.*"), *CLAIMS.glob("prompts/**/*.*")])

# Every identifier here is made up: 9999... is no assigned NPI, 555-01xx no assigned line, example.com nobody's domain.
FOUND = {
    "mbi": ["1EG4-TE5-MK73", "1EG4TE5MK73", "1eg4 te5 mk73", "id_1EG4TE5MK73;", "9AA0A00AA00"],
    "ssn": [
        "123-45-6789",
        "123 45 6789",
        "123.45.6789",
        "123 - 45 - 6789",
        "SSN: 123456789",
        "ssn=123-456789",
        '"ssn": "123456789"',
        "Social Security Number is 123456789",
        "| SSN | 123456789 |",
        "<ssn>123456789</ssn>",
        "soc. sec. no. 123456789",
    ],
    "npi": ["9999000018", "1234567893", "NPI 1234567893.", "808401234567893"],
    "identifier": [
        "MRN 4711",
        "MRN: A-000123",
        "Member ID: SYNTHM00001",
        '"memberId": "A123456"',
        "member_id,00012345",
        "Subscriber number W123456789",
        "subscriber's ID is 123 456 789",
        "claim number 2026-000123",
        "Claim # 12345",
        "payer claim control number: 0123456789",
        "Patient Account No. 99887",
        "Medicaid ID\n  99123456",
        "medical record number: 00-12-34",
        "HICN 123456789A",
    ],
    "birth_date": [
        "DOB 9/30/1974",
        "D.O.B.: 09-30-74",
        "Date of birth: 1974-09-30",
        '"birthDate": "1974-09-30"',
        '"birthDate": "1974-09"',
        '<birthDate value="1974-09-30"/>',
        "birth date 19740930",
        "birthday 09301974",
        "born September 30, 1974",
        "born on 30th of September 1974",
        "born: 30 Sept. 1974",
        "date_of_birth=1974.9.30",
    ],
    "phone": [
        "(555) 555-0100",
        "555-555-0100",
        "555.555.0100",
        "1 555 555 0100",
        "+1-555-555-0100",
        "(555)5550100",
        "+44 20 7946 0958",
        "Phone: 5555550100",
        "tel. 555-0100",
        '"telephone": "5555550100"',
    ],
    "email": ["jo@example.com", "jo.bloggs+x@mail.example.com.", "<jo_b@example.org>", "x" * 200 + "@example.com"],
    "address": [
        "405 OAK ST",
        "405 Oak St., Apt 2",
        "12 Main Street\n",
        "12 main street, springfield",
        "1200 N. 5th Avenue Suite 300",
        "77-12 Martin Luther King Blvd.",
        "9 Elm Court",
        "P.O. Box 123",
        "PO BOX 9",
        "Springfield, OH 45001",
        "SPRINGFIELD, OH  45001-0001",
        "ZIP code: 45001",
    ],
    "x12_person": [
        "NM1*IL*1*DOE*JANE****MI*M1~",
        "NM1*QC*1*DOE~",
        "NM1*IL*1******MI*M1~",
        "NM1|IL|1|DOE|JANE",
        "nm1*il*1*doe",
        "DMG*D8*19740930*F~",
        "N3*405 OAK ST~",
        "N4*SPRINGFIELD*OH*45001~",
        "REF*SY*123456789~",
        "REF*1W*M00001~",
        "REF*EA*A17~",
        "CLM*C-1*153***11:B:1~",
        "PER*IC*JO*TE*5555550100~",
    ],
    "fhir_person": [
        '{"resourceType": "Patient", "name": [{"family": "Doe"}]}',
        '{"birthDate": "1974", "resourceType":"RelatedPerson"}',
        '{\\"resourceType\\": \\"Patient\\", \\"identifier\\": []}',
        "resourceType: Patient\ntelecom:\n- value: x",
        '<Patient xmlns="http://hl7.org/fhir"><name><family value="Doe"/></name></Patient>',
        '{"resourceType": "Patient", "address": [{"city": "X"}]}',
    ],
    "fhir_reference": ['"reference": "Patient/12345"', "RelatedPerson/a1b2c3"],
}

# What plan texts and templates do say.
LEFT_ALONE = [
    "A first claim is received within 365 days of the service. Later claims are not paid.",
    "S4 Units. Units over the daily limit of a code are not paid.",
    "Established patient: 99211-99215. New patient: 99202-99205.",
    "Modifier 25, 59 or XE, XP, XS, XU; add-on codes 99417 and +99417.",
    "Effective 2026-10-01, revised 10/15/2026.",
    "The member ID is in NM109 of loop 2010BA; the claim number in CLM01; REF02 where REF01 is EA.",
    "Records must name the member ID, the date of birth and the claim number.",
    "Provide the MRN. 99213 needs a time note.",
    "for the 1 st visit and 2 or more street drugs",
    "Adults born on or after 1945 and born between 1945 and 1965.",
    "Children born before 2020 are covered.",
    "45 CFR 164.312(a)-(e), Pub. L. 104-191, 42 U.S.C. 1320d",
    "Limits: $1,234.56 a year; $99,999.00 for 12 months.",
    "ICD-10 codes E11.65, N39.0, S72.001A and Z00.00; HCPCS G0402, J1100.",
    "sha256 3680ab955da754d845209d17c49355e5c195c88070035df59ed890ac343e847e",
    "NDC 00002-8215-01 and version 005010X222A1",
    "REF*EA*~ is empty; NM1*IL*1***~ names nobody; DMG*D8**~; N3*~; N4*~",
    '{"resourceType": "Organization", "name": "Plan", "address": []}',
    "The Patient resource has a name and a birthDate.",
    "Section 4 of the contract; patient/family education takes 30 minutes a day on the way.",
    "Write to the plan @ the address in section 3.",
    "000-12-3456 666-12-3456 900-12-3456 123-00-4567 123-45-0000",
    "1EG4-TE5-MK7 1SG4-TE5-MK73 0EG4-TE5-MK73 1EG4TE5MK731 1EGATE5MK73",
    "1234567890 9999000019 12345678931",
]


def detectors_of(text: str) -> set[str]:
    return {finding.detector for finding in scan(text)}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FOUND.items() for text in texts])
def test_each_detector_finds_its_own(name: str, text: str) -> None:
    assert name in detectors_of(text)
    assert name in detectors_of(f"Before it,\n{text}\nand after it.")


def test_every_detector_has_examples() -> None:
    assert {detector.name for detector in PATTERN_DETECTORS} == set(FOUND)


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_texts_without_a_person_pass(text: str) -> None:
    assert scan(text) == ()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_texts_pass(path: Path) -> None:
    assert scan(path.read_text(encoding="utf-8")) == ()


def test_there_are_shipped_texts_to_look_at() -> None:
    assert {path.name for path in SHIPPED} >= {"system.md", "rubric.md", "policy_pack.md", "plan.json"}


@pytest.mark.parametrize("path", sorted((CLAIMS / "samples").glob("*.edi")), ids=lambda path: path.name)
def test_every_segment_of_a_person_in_the_sample_claims_is_found(path: Path) -> None:
    segments = path.read_text(encoding="utf-8").split("\n")
    people = [line for line in segments if line.startswith(("NM1*IL*1*", "NM1*QC*1*", "DMG*", "N3*", "N4*", "CLM*"))]
    assert people
    assert [line for line in people if "x12_person" not in detectors_of(line)] == []


def test_finding_says_where_and_never_what() -> None:
    text = "one\ntwo SSN: 123-45-6789\n"
    (finding,) = scan(text)
    assert finding == Finding(13, 24, "ssn")
    assert text[finding.start : finding.end] == "123-45-6789"
    assert list(positions(text, [finding])) == [(2, 10)]
    assert "6789" not in repr(finding)


def test_positions_count_lines_and_columns_from_one() -> None:
    text = "a\n\nbc\r\nd"
    at = [Finding(index, index + 1, "x") for index in range(len(text))]
    assert list(positions(text, at)) == [(1, 1), (1, 2), (2, 1), (3, 1), (3, 2), (3, 3), (3, 4), (4, 1)]


# --- look-alikes ---

DIGITS = [[str(digit) for digit in range(10)]] + [
    [chr(first + digit) for digit in range(10)] for first in (0xFF10, 0x0660, 0x0966, 0x1D7CE, 0x1D7F6)
]
DASHES = list("-‐‑‒–—―−－﹣")
BLANKS = [" ", "\u00a0", "\u2007", "\u2009", "\u202f", "\u3000"]
INVISIBLE = ["", "", "", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u034f", "\x00", "\u3164"]
STYLES = {**{str(digit): [style[digit] for style in DIGITS] for digit in range(10)}, "-": DASHES, " ": BLANKS}
STYLES |= {"S": ["S", "s", "Ѕ", "Ｓ", "𝐒"], "N": ["N", "n", "Ν", "Ｎ"], "M": ["M", "М"], "K": ["K", "К", "\u212a"]}
STYLES |= {"E": ["E", "Е", "é"], ".": [".", "．", "․"], "@": ["@", "＠"], "*": ["*", "＊", "∗"], ":": [":", "："]}


@st.composite
def disguised(draw: st.DrawFn) -> tuple[str, str, str]:
    """Detector, the plain text, and the same text to a reader's eye."""
    name, plain = draw(
        st.sampled_from(
            [
                ("ssn", "123-45-6789"),
                ("ssn", "123 45 6789"),
                ("ssn", "SSN: 123456789"),
                ("mbi", "1EG4-TE5-MK73"),
                ("npi", "1234567893"),
                ("phone", "555-555-0100"),
                ("x12_person", "NM1*IL*1*DOE"),
                ("email", "jo@example.com"),
            ]
        )
    )
    shown = "".join(
        draw(st.sampled_from(STYLES.get(character, [character]))) + draw(st.sampled_from(INVISIBLE))
        for character in plain
    )
    return name, plain, shown


@given(disguised(), st.text(alphabet="ab \n–é", max_size=8))
def test_look_alikes_and_invisible_characters_hide_nothing(case: tuple[str, str, str], before: str) -> None:
    name, _, shown = case
    text = f"{before} {shown} end"
    spans = [(f.start, f.end) for f in scan(text) if f.detector == name]
    assert spans, text
    start, end = spans[0]
    assert len(before) < start + 1 <= end <= len(before) + 1 + len(shown)


@pytest.mark.parametrize(
    "text",
    [
        "１２３－４５－６７８９",
        "123–45–6789",
        "123\u00a045\u00a06789",
        "12\u200b3-4\u200b5-67\u200b89",
        "123\u200b45\u200b6789",
        "123\u00ad45\u00ad6789",
        "①②③-④⑤-⑥⑦⑧⑨",
        "¹²³-⁴⁵-⁶⁷⁸⁹",
        "1\u03362\u03363\u0336-45-6789",
    ],
)
def test_disguised_social_security_number_is_found_over_its_whole_length(text: str) -> None:
    found = [finding for finding in scan(f"é {text}.") if finding.detector == "ssn"]
    assert (found[0].start, found[0].end) in {(2, 2 + len(text)), (2, 2 + len(text) - 1)}


@given(st.text())
def test_readings_keep_the_order_and_lead_back_into_the_text(text: str) -> None:
    for reading in readings(text):
        places = [reading.origin(index, index + 1) for index in range(len(reading.text))]
        assert places == sorted(places)
        assert all(0 <= start < end <= len(text) for start, end in places)


@given(st.text())
@example("a\u0301\u200b①")
def test_reading_of_a_reading_changes_nothing(text: str) -> None:
    once = read(text).text
    assert read(once).text == once


@given(st.text(alphabet=st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), max_size=200))
def test_ascii_reads_as_itself(text: str) -> None:
    assert read(text).text == text


@given(st.text())
def test_any_text_gives_spans_within_it(text: str) -> None:
    for finding in scan(text):
        assert 0 <= finding.start < finding.end <= len(text)


# --- numbers ---


@given(st.integers(1, 999), st.integers(0, 99), st.integers(0, 9999), st.sampled_from(["-", " ", ".", "–"]))
def test_social_security_number_is_found_just_where_one_may_be_issued(
    area: int, group: int, serial: int, separator: str
) -> None:
    text = f"<{area:03}{separator}{group:02}{separator}{serial:04}>"
    is_issued = area not in (0, 666) and area < 900 and group > 0 and serial > 0
    assert ("ssn" in detectors_of(text)) is is_issued


@given(st.integers(0, 10**10 - 1))
def test_ten_digits_are_an_npi_just_when_their_check_digit_holds(number: int) -> None:
    assert ("npi" in detectors_of(f"[{number:010}]")) is is_valid_npi(f"{number:010}")


MBI_LETTERS = "ACDEFGHJKMNPQRTUVWXY"
MBI_CHARACTERS = ["123456789", MBI_LETTERS, MBI_LETTERS + "0123456789", "0123456789"]
MBI_CHARACTERS += [MBI_LETTERS, MBI_LETTERS + "0123456789", "0123456789"]
MBI_CHARACTERS += [MBI_LETTERS, MBI_LETTERS, "0123456789", "0123456789"]


@given(st.tuples(*(st.sampled_from(characters) for characters in MBI_CHARACTERS)), st.integers(0, 10), st.data())
def test_beneficiary_identifier_is_found_and_no_letter_of_another_kind(
    characters: tuple[str, ...], place: int, data: st.DataObject
) -> None:
    assert "mbi" in detectors_of("".join(characters))
    others = sorted(set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") - set(MBI_CHARACTERS[place]))
    wrong = [*characters]
    wrong[place] = data.draw(st.sampled_from(others))
    assert "mbi" not in detectors_of("".join(wrong))


# --- time ---

MAX_STEPS_AT_ONE_START = 250_000


def num_ways(tree: Any) -> int:
    """How many ways a backtracking matcher may try a parsed pattern at one start. Fails on an unbounded repeat."""
    total = 1
    for operation, argument in tree:
        total *= num_ways_of(operation, argument)
    return total


def num_ways_of(operation: Any, argument: Any) -> int:
    if operation in (node.MAX_REPEAT, node.MIN_REPEAT, node.POSSESSIVE_REPEAT):
        low, high, repeated = argument
        assert high is not node.MAXREPEAT
        assert high <= 100
        once = num_ways(repeated)
        return 1 if operation is node.POSSESSIVE_REPEAT else sum(once**count for count in range(low, high + 1))
    if operation is node.SUBPATTERN:
        return num_ways(argument[3])
    if operation is node.BRANCH:
        return sum(map(num_ways, argument[1]))
    if operation in (node.ASSERT, node.ASSERT_NOT):
        assert num_ways(argument[1]) <= MAX_STEPS_AT_ONE_START
        return 1
    assert operation in (node.LITERAL, node.NOT_LITERAL, node.IN, node.ANY, node.AT, node.GROUPREF), operation
    return 1


@pytest.mark.parametrize(
    "pattern",
    [pattern for d in PATTERN_DETECTORS for pattern in (*d.patterns, *([d.requires] if d.requires else []))],
    ids=lambda pattern: pattern.pattern.strip()[:30],
)
def test_pattern_takes_a_bounded_number_of_steps_at_each_start(pattern: re.Pattern[str]) -> None:
    flags = pattern.flags & ~re.UNICODE if pattern.flags & re.ASCII else pattern.flags
    tree = _parser.parse(pattern.pattern, flags)
    assert num_ways(tree) * tree.getwidth()[1] <= MAX_STEPS_AT_ONE_START


def test_bound_sees_a_pattern_that_is_not_linear() -> None:
    with pytest.raises(AssertionError):
        num_ways(_parser.parse(r"\s*x"))
    assert num_ways(_parser.parse(r"(?:a{1,9}b?){1,9}")) > MAX_STEPS_AT_ONE_START


REPEATED = [
    " ",
    "\n",
    "1",
    "a",
    "-",
    "*",
    "0 ",
    "1 a ",
    "1-",
    "member id ",
    "ssn ",
    "ssn:",
    "NM1*IL*",
    "N3*1",
    '"name',
    "@",
]
REPEATED += ["a@", "a.", "+1", "(555", "born ", "dob 1/", "1 Oak ", "\u200b", "é", "1\u200b", "patient/a", "1 A St "]


@pytest.mark.parametrize("part", REPEATED)
def test_long_repetition_is_scanned_to_its_end(part: str) -> None:
    """A quadratic pattern would take 4 * 10^10 steps here and run into the time limit of any test."""
    text = part * (200_000 // len(part)) + " 123-45-6789 "
    assert "ssn" in detectors_of(text)


def test_findings_are_bounded() -> None:
    assert len(scan("jo@example.com " * 1000)) == MAX_FINDINGS


# --- presidio ---


class Result:
    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end


class Analyzer:
    """As AnalyzerEngine where the extra is installed; here it is not."""

    def __init__(self, results: list[Result] | None = None, error: Exception | None = None) -> None:
        self.results, self.error = results or [], error
        self.entities: list[str] = []

    def get_supported_entities(self, language: str | None = None) -> list[str]:
        return ["PERSON", "DATE_TIME", "US_SSN"]

    def analyze(self, text: str, language: str, entities: list[str], score_threshold: float) -> list[Result]:
        self.entities = entities
        if self.error is not None:
            raise self.error
        return self.results


def test_presidio_is_absent_here_and_is_no_detector_then() -> None:
    assert load_presidio() is None


def test_presidio_finds_beside_the_patterns_and_is_asked_for_what_it_knows_of_persons() -> None:
    analyzer = Analyzer([Result(9, 13), Result(0, 4)])
    assert scan("Jane saw John", [PresidioDetector(analyzer)]) == (
        Finding(0, 4, "presidio"),
        Finding(9, 13, "presidio"),
    )
    assert analyzer.entities == ["PERSON", "US_SSN"]
    assert set(analyzer.entities) <= set(ENTITIES)


def test_presidio_that_fails_is_a_refusal_without_the_text() -> None:
    with pytest.raises(DetectorError) as refusal:
        scan("Jane", [PresidioDetector(Analyzer(error=RuntimeError("Jane")))])
    assert str(refusal.value) == "presidio failed with RuntimeError"
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import a_library_that_is_missing", "a_library_that_is_missing is missing"),
        ("def AnalyzerEngine(): raise SystemExit(1)", "SystemExit"),
        ("def AnalyzerEngine(): raise OSError('no model')", "OSError"),
    ],
)
def test_presidio_that_is_there_and_does_not_start_is_a_refusal(
    source: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "presidio_analyzer.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(DetectorError, match=fault):
            load_presidio()
    finally:
        sys.modules.pop("presidio_analyzer", None)

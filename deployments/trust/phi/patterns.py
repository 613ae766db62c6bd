"""The detectors that are patterns.

Repeats are bounded, and possessive where a shorter match would serve nothing: each start costs a bounded number of
steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deployments.claims.rules.edits import is_valid_npi

_FLAGS = re.ASCII | re.IGNORECASE
_GAP = r"[-\s./]"  # what may part the groups of a number


@dataclass(frozen=True, slots=True)
class PatternDetector:
    """Finds the group `value` of its patterns, or the whole match. `is_real` has the last word on the digits."""

    name: str
    patterns: tuple[re.Pattern[str], ...]
    is_real: Callable[[str], bool] | None = None
    requires: re.Pattern[str] | None = None  # nothing is found in a text that does not have it

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        if self.requires is not None and not self.requires.search(text):
            return
        for pattern in self.patterns:
            group = "value" if "value" in pattern.groupindex else 0
            for match in pattern.finditer(text):
                if self.is_real is None or self.is_real(re.sub(r"[^0-9]", "", match[group])):
                    yield match.span(group)


def _compile(*patterns: str, flags: int = _FLAGS) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern, flags | re.VERBOSE) for pattern in patterns)


# From a label to its value: a few words such as `number is`, then punctuation, but never the end of a sentence.
_LINK = r"""
    (?: (?:[^\w\n.]|_){0,6}+
        (?:ids?|identifier|nos?\.?|num|number|nbr|code|value|is|was|on|of|dated) (?![a-z0-9]) ){0,3}+
    (?: [^\w.] | _ | \.(?!\s) ){0,40}+
"""


def _labelled(label: str, value: str) -> str:
    return rf"(?<![a-z0-9]) (?:{label}) {_LINK} (?P<value>{value})"


# CMS: positions 1, 4, 7, 10, 11 are digits, 2, 5, 8, 9 letters, 3 and 6 either; no S, L, O, I, B, Z; no leading zero.
_MBI_LETTER = "[AC-HJKMNP-RT-Y]"
_MBI_EITHER = "[0-9AC-HJKMNP-RT-Y]"
_MBI = rf"""
    (?<![A-Z0-9]) [1-9]{_MBI_LETTER}{_MBI_EITHER}[0-9] {_GAP}?+ {_MBI_LETTER}{_MBI_EITHER}[0-9] {_GAP}?+
    {_MBI_LETTER}{{2}}[0-9]{{2}} (?![A-Z0-9])
"""


def _is_issued_ssn(digits: str) -> bool:
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


_SSN = (
    rf"(?<![0-9]) [0-9]{{3}}{_GAP}{{1,3}}+[0-9]{{2}}{_GAP}{{1,3}}+[0-9]{{4}} (?![0-9])",
    _labelled(
        r"ssns? | ss\s?[\#] | ss\s(?:no\.? | number) | soc(?:ial|\.)?[\s_-]?sec(?:urity|\.)? | tax\s?id",
        rf"[0-9](?:{_GAP}{{0,3}}+[0-9]){{8}} (?![0-9])",
    ),
)

_NPI = r"(?<![0-9]) (?:80840(?=[0-9]{10}(?![0-9])))?+ (?P<value>[0-9]{10}) (?![0-9])"

_IDENTIFIER = r"""
    (?!nm1[0-9]{2}(?![a-z0-9]))  # the name of an X12 element
    (?: (?=(?:[a-z-]{0,12}+[0-9]){3}) [a-z0-9][a-z0-9-]{3,39}+ | [0-9](?:[-\s./]{0,2}+[0-9]){3,20}+ )
"""
_HOLDER = r"""
    (?: member | subscriber | beneficiary | insured | enrollee | recipient | policy[\s_-]?+holder | patient | dependent
      | guarantor | medicaid | medicare | claim | encounter | account | chart | medical[\s_-]?+record
      | health[\s_-]?+plan | authorization | referral )
    (?:'?s)?+ [\s_.-]{0,3}+
    (?: (?:account|control|record|policy|card|plan|reference|tracking|group|claim|beneficiary) [\s_.-]{0,3}+ ){0,2}+
    (?: [\#] | (?:ids?|identifiers?|identification|numbers?|nos?|num|nbr) (?![a-z]) \.?+ )
"""
_LABELLED_IDENTIFIER = (
    _labelled(_HOLDER, _IDENTIFIER),
    _labelled(r"(?: mrn | mbi | hicn? | icn | dcn | tcn ) (?![a-z])", _IDENTIFIER),
)

_MONTH = r"(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]{0,6}+"
_YEAR = r"(?:18|19|20)[0-9]{2}"
_DATE = rf"""
    (?: {_YEAR}[-/.\s]?+(?:0?[1-9]|1[0-2])(?:[-/.\s]?+(?:[0-2]?[0-9]|3[01]))?
      | [0-3]?[0-9][-/.\s]{{1,2}}+[0-3]?[0-9][-/.,\s]{{1,3}}+(?:{_YEAR}|[0-9]{{2}})
      | [01][0-9][0-3][0-9]{_YEAR}
      | {_MONTH}\.?+[\s-]{{0,3}}+(?:[0-9]{{1,2}}(?:st|nd|rd|th)?+[\s,-]{{1,3}}+)?{_YEAR}
      | [0-9]{{1,2}}(?:st|nd|rd|th)?+[\s-]{{0,3}}+(?:of\s)?{_MONTH}[\s,.-]{{0,3}}+{_YEAR} )
    (?![0-9])
"""
_BIRTH_DATE = _labelled(r"d\.?+o\.?+b\.?+ | date[\s_-]?+of[\s_-]?+birth | birth[\s_-]?+(?:date|day) | born", _DATE)

_AREA_CODE = r"(?<![0-9]) (?: \+?1[-.\s/]{0,2}+ )?+ \(?+ [2-9][0-9]{2}"
_PHONE = (
    rf"{_AREA_CODE} \)?+ [-.\s/]{{0,3}}+ [2-9][0-9]{{2}} [-.\s/]{{1,3}}+ [0-9]{{4}} (?![0-9])",
    rf"{_AREA_CODE} (?:\)|[-.\s/]) [-.\s/]{{0,2}}+ [2-9][0-9]{{6}} (?![0-9])",
    r"\+[1-9](?:[-.\s()]{0,2}+[0-9]){7,14}+ (?![0-9])",
    _labelled(r"(?:tele)?phones? | tel\.?+ | fax | facsimile | cell | mobile", r"[0-9](?:[-.\s()/]{0,3}+[0-9]){6,14}+"),
)

_EMAIL = r"[\w.%+'-]{1,64}+ @ [\w-]{1,63}+ \.\w"

# Case tells `405 Oak St` from `the 1 st visit`: words that English uses otherwise must stand among capitals.
_NUMBER = r"(?<![\w.,-]) [0-9]{1,6}+(?:-[0-9]{1,5}+)?+[A-Za-z]?+,?+\s{1,3}+"
_STREET = (
    rf"""{_NUMBER} (?:[\w'.-]{{1,30}}+\s{{1,3}}+){{1,4}}?
        (?i: street | avenue | ave | boulevard | blvd | road | rd | lane | ln | parkway | pkwy | highway | hwy )
        (?![\w'])
        (?= \.?+[ \t]{{0,3}}+ (?: [^\w \t] | [A-Z0-9] | (?i:apt|unit|suite|ste|fl|floor)\b | \Z ) )""",
    rf"""{_NUMBER} (?:[A-Z0-9][\w'.-]{{0,29}}+\s{{1,3}}+){{1,4}}?
        (?: St | ST | Drive | DRIVE | Dr | DR | Court | COURT | Ct | CT | Place | PLACE | Pl | PL | Way | WAY | Circle
          | CIRCLE | Cir | CIR | Terrace | TERRACE | Ter | TER | Trail | TRAIL | Trl | TRL | Square | SQUARE | Sq | SQ
          | Loop | LOOP | Plaza | PLAZA | Pike | PIKE | Alley | ALLEY | Row | ROW | Walk | WALK ) (?![\w'])""",
    r"(?<![A-Za-z0-9]) (?i: p\.?\s?o\.?\s?box | post\soffice\sbox ) \s{0,3}+[\#]?\s{0,3}+[0-9]{1,7}",
    r"""(?<!\w) [A-Z][A-Za-z'.-]{1,30}+,[ ]{0,2}+
        (?: A[KLRZ] | C[AOT] | D[CE] | FL | G[AU] | HI | I[ADLN] | K[SY] | LA | M[ADEINOST] | N[CDEHJMVY] | O[HKR]
          | P[AR] | RI | S[CD] | T[NX] | UT | V[AIT] | W[AIVY] ) [ ]{1,3}+ [0-9]{5}(?:-?[0-9]{4})? (?![0-9])""",
    r"(?<!\w) (?i: zip | postal ) [\s_-]?+ (?i:code)? \W{0,6}+ (?P<value>[0-9]{5}(?:-?[0-9]{4})?) (?![0-9])",
)

# Separators as the interchange header may set them. A segment's name alone is no finding: it carries content.
_SEPARATOR = r"(?P<s>[*|^\x1d])"
_CONTENT = r"[^*|^~\s\x1c-\x1f]"
_WITH_DIGIT = r"(?=[^*|^~\n\x1c-\x1f0-9]{0,60}+[0-9])"
_X12 = (
    rf"(?<![A-Z0-9]) NM1{_SEPARATOR}(?:IL|QC|QD|GB|S1|74)(?P=s)[12]?+(?P=s){{1,8}}+{_CONTENT}",
    rf"(?<![A-Z0-9]) DMG{_SEPARATOR}[A-Z0-9]{{0,3}}+(?P=s)[0-9]{{6,8}}",
    rf"(?<![A-Z0-9]) N3{_SEPARATOR}{_WITH_DIGIT}{_CONTENT}{{1,40}}+[ ]{{1,3}}+{_CONTENT}",
    rf"(?<![A-Z0-9]) N4{_SEPARATOR}[^*|^~\n]{{1,30}}+(?P=s)[A-Z]{{2}}(?P=s)[0-9]{{5}}",
    rf"(?<![A-Z0-9]) REF{_SEPARATOR}(?:SY|1W|0F|EJ|EA|IG|F8|D9|G1|9F|9A|Y4|1K|1L|23)(?P=s){_WITH_DIGIT}{_CONTENT}",
    rf"(?<![A-Z0-9]) CLM{_SEPARATOR}{_CONTENT}{{1,38}}+(?P=s)[0-9]",
    rf"(?<![A-Z0-9]) PER{_SEPARATOR}[A-Z0-9]{{2}}(?P=s)[^*|^~\n]{{0,60}}+(?P=s)(?:TE|HP|WP|CP|FX)(?P=s)[0-9(+]",
)

_QUOTE = r"""\\{0,3}+["']?+"""
_FHIR_PERSON = (
    rf"resourceType{_QUOTE}\s{{0,20}}+[:=]\s{{0,20}}+{_QUOTE}(?:Patient|RelatedPerson|Person)(?!\w)"
    r" | <(?:\w{1,10}:)?(?:Patient|RelatedPerson|Person)[\s>]"
)
_FHIR_FIELD = r"name|birthDate|identifier|telecom|address|family|given"
_FHIR = (
    rf"(?<![\w-]) (?:{_FHIR_FIELD}){_QUOTE}\s{{0,20}}+: ",
    rf"<(?:\w{{1,10}}:)?(?:{_FHIR_FIELD})[\s>]",
)
_FHIR_REFERENCE = r"(?<![\w]) (?:Patient|RelatedPerson|Person)/(?=(?:[a-z.-]{0,12}+[0-9]){3})[a-z0-9.-]{3,64}+"

PATTERN_DETECTORS = (
    PatternDetector("mbi", _compile(_MBI)),
    PatternDetector("ssn", _compile(*_SSN), _is_issued_ssn),
    PatternDetector("npi", _compile(_NPI), is_valid_npi),
    PatternDetector("identifier", _compile(*_LABELLED_IDENTIFIER)),
    PatternDetector("birth_date", _compile(_BIRTH_DATE)),
    PatternDetector("phone", _compile(*_PHONE)),
    PatternDetector("email", _compile(_EMAIL, flags=re.IGNORECASE)),
    PatternDetector("address", _compile(*_STREET, flags=re.ASCII)),
    PatternDetector("x12_person", _compile(*_X12)),
    PatternDetector("fhir_person", _compile(*_FHIR), requires=_compile(_FHIR_PERSON)[0]),
    PatternDetector("fhir_reference", _compile(_FHIR_REFERENCE)),
)

"""Writes the synthetic sample claims: 837P files with planted faults, and `labels.json` with what was planted.

    python -m deployments.claims.generate_samples --seed 7 OUT

The seed draws filler (names, streets, members, diagnoses, charges); the scenarios are fixed. Same seed, same bytes.
Everything is synthetic: names and ids start with SYNTH, and NPIs with 9, which no assigned NPI does.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from deployments.claims.labels import LABELS_VERSION
from deployments.claims.rules import load_edit_table
from deployments.claims.rules.edits import luhn_sum

DEFAULT_SEED = 7
RECEIVED = dt.date(2026, 10, 5)
PLAN_CODE = "SYNTHPPO"
PAYER_ID = "SYNTHPAYER1"

_STREETS = ("OAK", "ELM", "BIRCH", "CEDAR", "MAPLE")
_GIVEN = ("ALPHA", "BRAVO", "DELTA", "ECHO", "GOLF", "HOTEL", "KILO", "LIMA", "OSCAR", "TANGO")
_DIAGNOSES = ("E1165", "I10", "J069", "K219", "M545", "N390", "R5383", "Z0000")
# Usual charge of a code, in cents; each provider asks up to a tenth more.
_CHARGES = {
    "11042": 18_000,
    "20610": 14_500,
    "36415": 1_800,
    "71046": 9_500,
    "80048": 4_200,
    "80053": 6_100,
    "85025": 3_300,
    "90471": 3_500,
    "90472": 2_400,
    "90686": 4_000,
    "93000": 7_200,
    "93005": 3_900,
    "96372": 4_800,
    "97110": 5_200,
    "97140": 5_000,
    "97597": 11_000,
    "99203": 16_500,
    "99213": 12_000,
    "99214": 17_500,
    "J1100": 150,
}


@dataclass(frozen=True, slots=True)
class SampleLine:
    code: str
    modifiers: tuple[str, ...] = ()
    units: int = 1
    days_before_receipt: int = 20
    charge_cents: int | None = None  # None: the code's usual charge times units
    pointers: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class SampleClaim:
    """One scenario. `faults` maps a rule id to the line numbers that it must flag."""

    number: int
    member: int
    lines: tuple[SampleLine, ...]
    faults: dict[str, tuple[int, ...]] = field(default_factory=dict)
    provider: int = 1
    frequency: str = "1"
    prior_claim_ref: str | None = None
    total_surplus_cents: int = 0
    rendering_npi: str | None = None
    is_dependent: bool = False

    @property
    def claim_id(self) -> str:
        return f"SYNTH-{self.number:04d}"


def npi(number: int, *, is_valid: bool = True) -> str:
    """A synthetic NPI: 9999, the number in five digits, the check digit (or the one after it)."""
    body = f"9999{number:05d}"
    check = -luhn_sum("80840" + body + "0") % 10
    return f"{body}{check if is_valid else (check + 1) % 10}"


def scenarios() -> dict[str, tuple[SampleClaim, ...]]:
    """File name -> claims, in order of receipt: files are read in the order of their names."""
    line = SampleLine
    visit_and_blood = (line("99213"), line("85025"))
    return {
        "01-clean-visits.edi": (
            SampleClaim(1, 1, visit_and_blood),
            SampleClaim(2, 2, (line("99214", ("25",)), line("96372"), line("J1100", units=8))),
            SampleClaim(3, 3, (line("90471"), line("90472", units=2), line("90686")), is_dependent=True),
            SampleClaim(4, 4, (line("97140", units=2), line("97110", units=3)), provider=2),
        ),
        "02-clean-single.edi": (SampleClaim(5, 5, (line("11042"), line("97597", ("59",))), provider=3),),
        "03-duplicates.edi": (
            SampleClaim(6, 1, visit_and_blood, {"R-DUP-EXACT": (1, 2)}),
            SampleClaim(7, 2, (line("99214", charge_cents=21_000),), {"R-DUP-SUSPECT": (1,)}),
            SampleClaim(8, 4, (line("97140", ("76",), units=2, days_before_receipt=19),), provider=2),
        ),
        "04-pairs.edi": (
            SampleClaim(9, 6, (line("80053"), line("80048"), line("36415")), {"R-PTP-NEVER": (1, 2)}),
            SampleClaim(10, 7, (line("20610"), line("96372")), {"R-PTP-MODIFIER": (1, 2)}, provider=2),
        ),
        "05-units.edi": (
            SampleClaim(11, 9, (line("97110", units=9),), {"R-MUE": (1,)}, provider=2),
            SampleClaim(12, 10, (line("36415", units=2), line("36415", ("91",), units=2)), {"R-MUE": (1, 2)}),
        ),
        "06-late.edi": (
            SampleClaim(13, 11, (line("99203", days_before_receipt=402),), {"R-TIMELY": (1,)}, provider=3),
        ),
        "07-on-the-last-day.edi": (SampleClaim(14, 11, (line("99213", days_before_receipt=365),), provider=3),),
        "08-identifiers.edi": (
            SampleClaim(15, 12, (line("99213"),), {"R-NPI": (1,)}, provider=9),
            SampleClaim(
                16,
                13,
                (line("99214"), line("85025")),
                {"R-NPI": (1, 2)},
                provider=9,
                rendering_npi=npi(13, is_valid=False),
                is_dependent=True,
            ),
        ),
        "09-form.edi": (
            SampleClaim(17, 14, (line("99213", days_before_receipt=-4),), {"R-DATE": (1,)}, provider=3),
            SampleClaim(18, 15, (line("90472", units=1), line("90686")), {"R-ADDON": (1,)}, provider=3),
            SampleClaim(19, 16, (line("85025", pointers=(3,)), line("80053")), {"R-DX-POINTER": (1,)}, provider=3),
            SampleClaim(20, 17, (line("99214"),), {"R-PRIOR-REF": ()}, provider=3, frequency="7"),
        ),
        # Its total does not add up, which the typed X12 models refuse: this file is read leniently.
        "10-total.edi": (
            SampleClaim(21, 18, (line("93000"), line("71046")), {"R-TOTAL": ()}, total_surplus_cents=10_000),
        ),
        "11-two-faults.edi": (
            SampleClaim(
                22,
                19,
                (line("97110", units=8, days_before_receipt=398), line("97140", units=2, days_before_receipt=398)),
                {"R-MUE": (1,), "R-TIMELY": (1, 2)},
                provider=2,
            ),
        ),
        "12-correction.edi": (
            SampleClaim(
                23, 5, (line("11042"), line("97597", ("59",))), provider=3, frequency="7", prior_claim_ref="SYNTH-0005"
            ),
        ),
    }


class _Writer:
    """Writes one interchange. Draws all filler from one generator, in the order of writing."""

    def __init__(self, rng: Random, control_number: int) -> None:
        self._rng = rng
        self._control = control_number
        self._segments: list[str] = []

    def write(self, groups: Sequence[tuple[int, Sequence[SampleClaim]]]) -> str:
        """The file of (billing provider, claims) groups, one transaction set, a newline after each segment."""
        day, control = RECEIVED.strftime("%Y%m%d"), self._control
        self._add(
            *("ISA", "00", " " * 10, "00", " " * 10, "ZZ", "SYNTHSENDER".ljust(15), "ZZ", PAYER_ID.ljust(15)),
            *(day[2:], "0900", "^", "00501", f"{control:09d}", "0", "T", ":"),
        )
        self._add("GS", "HC", "SYNTHSENDER", PAYER_ID, day, "0900", str(control), "X", "005010X222A1")
        start = len(self._segments)
        self._add("ST", "837", f"{control:04d}", "005010X222A1")
        self._add("BHT", "0019", "00", f"SYNTHBATCH{control:04d}", day, "0900", "CH")
        self._add("NM1", "41", "2", "SYNTH CLEARINGHOUSE", "", "", "", "", "46", "SYNTHSENDER")
        self._add("PER", "IC", "SYNTH CONTACT", "TE", "5555550100")
        self._add("NM1", "40", "2", "SYNTH HEALTH PLAN", "", "", "", "", "46", PAYER_ID)
        hl = 0
        for provider, claims in groups:
            parent = hl = hl + 1
            self._provider(hl, provider, claims[0])
            for claim in claims:
                hl = self._claim(hl + 1, parent, claim)
        self._add("SE", str(len(self._segments) - start + 1), f"{control:04d}")
        self._add("GE", "1", str(control))
        self._add("IEA", "1", f"{control:09d}")
        return "".join(f"{segment}~\n" for segment in self._segments)

    def _add(self, *elements: str) -> None:
        self._segments.append("*".join(elements))

    def _address(self) -> None:
        self._add("N3", f"{self._rng.randint(1, 999)} {self._rng.choice(_STREETS)} ST")
        self._add("N4", "SYNTHVILLE", "OH", "450010001")

    def _provider(self, hl: int, provider: int, claim: SampleClaim) -> None:
        is_valid = not ("R-NPI" in claim.faults and claim.rendering_npi is None)
        self._add("HL", str(hl), "", "20", "1")
        name = f"SYNTH CLINIC {provider}"
        self._add("NM1", "85", "2", name, "", "", "", "", "XX", npi(provider, is_valid=is_valid))
        self._address()
        self._add("REF", "EI", f"99{provider:07d}")

    def _claim(self, hl: int, parent: int, claim: SampleClaim) -> int:
        """Subscriber, dependent where there is one, claim and lines; returns the last HL number used."""
        self._subscriber(hl, parent, claim)
        if claim.is_dependent:
            self._add("HL", str(hl + 1), str(hl), "23", "0")
            self._add("PAT", "19")
            self._person("QC", claim, born=2016)
            hl += 1
        lines = [self._priced(line) for line in claim.lines]
        total = sum(line.charge_cents or 0 for line in lines) + claim.total_surplus_cents
        self._add("CLM", claim.claim_id, _amount(total), "", "", f"11:B:{claim.frequency}", "Y", "A", "Y", "Y")
        if claim.prior_claim_ref:
            self._add("REF", "F8", claim.prior_claim_ref)
        first, second = Random(f"dx {claim.member}").sample(_DIAGNOSES, 2)  # noqa: S311 - filler, not a secret
        self._add("HI", f"ABK:{first}", f"ABF:{second}")
        if claim.rendering_npi:
            self._add("NM1", "82", "1", "SYNTHDOC", "RENDER", "", "", "", "XX", claim.rendering_npi)
        for number, line in enumerate(lines, start=1):
            day = RECEIVED - dt.timedelta(days=line.days_before_receipt)
            self._add("LX", str(number))
            pointers = ":".join(map(str, line.pointers))
            code = ":".join(("HC", line.code, *line.modifiers))
            self._add("SV1", code, _amount(line.charge_cents or 0), "UN", str(line.units), "", "", pointers)
            self._add("DTP", "472", "D8", day.strftime("%Y%m%d"))
        return hl

    def _subscriber(self, hl: int, parent: int, claim: SampleClaim) -> None:
        self._add("HL", str(hl), str(parent), "22", "1" if claim.is_dependent else "0")
        self._add("SBR", "P", "" if claim.is_dependent else "18", PLAN_CODE, "", "", "", "", "", "CI")
        self._person("IL", claim, born=1970)
        self._add("NM1", "PR", "2", "SYNTH HEALTH PLAN", "", "", "", "", "PI", PAYER_ID)

    def _person(self, entity: str, claim: SampleClaim, *, born: int) -> None:
        # What tells a person from others must not depend on the order of writing.
        own = Random(f"{entity} {claim.member}")  # noqa: S311 - filler, not a secret
        given = own.choice(_GIVEN)
        identity = ("MI", f"SYNTHM{claim.member:05d}") if entity == "IL" else ()
        self._add(
            "NM1", entity, "1", f"SYNTHMEMBER{claim.member}", given, *(("", "", "", *identity) if identity else ())
        )
        self._address()
        birth = dt.date(born, 1, 1) + dt.timedelta(days=own.randint(0, 3_000))
        self._add("DMG", "D8", birth.strftime("%Y%m%d"), own.choice("FM"))

    def _priced(self, line: SampleLine) -> SampleLine:
        return replace(line, charge_cents=line.charge_cents or _CHARGES[line.code] * line.units)


def _amount(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}".removesuffix(".00")


def write_samples(folder: Path, seed: int = DEFAULT_SEED) -> None:
    """Write every file of `scenarios()` and `labels.json` into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(seed)  # noqa: S311 - filler, not a secret
    labels = []
    for control, (name, claims) in enumerate(scenarios().items(), start=1):
        text = _Writer(rng, control).write(_by_provider(claims))
        (folder / name).write_text(text, encoding="ascii", newline="\n")
        labels += [_label(name, index, claim) for index, claim in enumerate(claims, start=1)]
    document = {
        "labels_version": LABELS_VERSION,
        "seed": seed,
        "rules_digest": load_edit_table().digest,
        "claims": labels,
    }
    (folder / "labels.json").write_text(json.dumps(document, indent=1) + "\n", encoding="ascii", newline="\n")


def _by_provider(claims: Sequence[SampleClaim]) -> list[tuple[int, list[SampleClaim]]]:
    """Runs of claims of one billing provider, in order; an invalid NPI opens a run of its own."""
    runs: list[tuple[int, list[SampleClaim]]] = []
    for claim in claims:
        starts_anew = "R-NPI" in claim.faults or (runs and "R-NPI" in runs[-1][1][0].faults)
        if runs and runs[-1][0] == claim.provider and not starts_anew:
            runs[-1][1].append(claim)
        else:
            runs.append((claim.provider, [claim]))
    return runs


def _label(name: str, index: int, claim: SampleClaim) -> dict[str, object]:
    faults = [{"rule_id": rule_id, "lines": list(lines)} for rule_id, lines in sorted(claim.faults.items())]
    return {"claim_id": claim.claim_id, "file": name, "claim_index": index, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the synthetic sample claims and their labels.")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    arguments = parser.parse_args()
    write_samples(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()

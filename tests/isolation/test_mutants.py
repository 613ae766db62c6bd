"""The mutants keep up with the code, and the script that tries them tells a survivor from a kill."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from tests.isolation import mutants
from tests.isolation.mutant_table import MUTANTS, Hop, Mutant
from tests.isolation.mutants import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutation_applies_to_the_code_as_it_stands(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    changed = mutant.apply(source)
    assert changed != source
    if mutant.file.endswith(".py"):
        ast.parse(changed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_test_that_guards_a_hop_is_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, *_, name = test.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test


def test_every_hop_has_a_mutant_and_every_mutant_a_name_of_its_own() -> None:
    assert {mutant.hop for mutant in MUTANTS} == set(Hop)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


JOINS = "tests/engine/test_zone.py::test_joins_follow_the_table"
NO_SPANS = "tests/engine/test_zone.py::test_no_spans_mean_ephemeral"
KILLED = next(mutant for mutant in MUTANTS if mutant.name == "two_cases_join_in_the_first")


TRIED = {
    "": replace(KILLED, tests=(JOINS,)),
    "SURVIVED": replace(KILLED, tests=(NO_SPANS,)),
    f"SURVIVED {NO_SPANS}": replace(KILLED, tests=(JOINS, NO_SPANS)),
    "two_cases_join_in_the_first: its text stands 0 times in engine/zone.py": replace(KILLED, old="no such text"),
    "pytest ended with 4": replace(KILLED, new="(", tests=(JOINS,)),
}


def test_only_a_mutant_that_all_its_tests_notice_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (ROOT / KILLED.file).read_bytes()
    outcomes = mutants.try_all(list(TRIED.values()))
    assert [outcome.fault.split("\n")[0] for outcome in outcomes] == list(TRIED)
    assert [len(outcome.killed_by) for outcome in outcomes] == [1, 0, 1, 0, 0]
    assert (ROOT / KILLED.file).read_bytes() == before
    for num_tried, code in ((1, 0), (2, 1)):
        monkeypatch.setattr(mutants, "try_all", lambda chosen: outcomes[: len(chosen)])
        assert mutants.main([], list(TRIED.values())[:num_tried]) == code


def test_tests_that_fail_by_themselves_kill_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main([], [replace(KILLED, tests=("tests/engine/test_zone.py::test_none",))]) == 2
    assert "fail without a mutant" in capsys.readouterr().out


def test_what_was_not_imported_from_the_copy_was_not_tested(tmp_path: Path) -> None:
    with pytest.raises(mutants.MutantError, match="not imported from the copy"):
        mutants.run_tests(tmp_path, ["none"], "engine.zone")

"""Takes the zone out of each hop in turn and demands that tests notice: `python -m tests.isolation.mutants`.

Each mutant of `mutant_table` is applied to a copy of the tree, never to the tree itself, and the tests that guard its
hop run there. They must pass without the mutant, and each of them must fail with it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import cache_from_source
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from tests.isolation.mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("engine", "transfer", "cluster", "deployments", "load_tests", "tests")
NUM_WORKERS = 2
RUN_TIMEOUT_S = 120.0
MAX_OUTPUT_CHARS = 2000
REPORT_WIDTH = 160
_NOT_THE_COPY = 64  # pytest's own codes end at 5
# Imported once, in the process that each run is forked from: most of what a run would take. Nothing of ours.
_PRELOADED = ["pytest", "hypothesis", "torch", "transformers", "ray.serve", "fastapi", "httpx", "jwt", "jsonschema"]
_forks = get_context("forkserver")


class MutantError(Exception):
    """The experiment itself is faulty: a mutation that does not apply, or tests that fail without it."""


@dataclass(frozen=True)
class Outcome:
    """One mutant's. `fault`: why it does not count as killed; empty where it does."""

    mutant: Mutant
    killed_by: tuple[str, ...]
    fault: str
    seconds: float


def make_copy(folder: Path) -> Path:
    """The tree's Python, data files and pytest's settings in a new folder."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(folder: Path, tests: Sequence[str], module: str = "engine") -> tuple[int, str]:
    """Exit code and output of pytest in a copy. `module` is what was tested: it must have come from there.

    Raises:
        MutantError: It did not, or the run does not end in time.
    """
    output = folder / "output.txt"
    output.touch()  # also where the process ends before it begins
    process = _forks.Process(target=_run_pytest, args=(folder, output, tests, module))
    process.start()
    process.join(RUN_TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise MutantError(f"the tests ran longer than {RUN_TIMEOUT_S:.0f} s")
    if process.exitcode == _NOT_THE_COPY:
        raise MutantError(f"{module} was not imported from the copy")
    assert process.exitcode is not None
    return process.exitcode, output.read_text()


def _run_pytest(folder: Path, output: Path, tests: Sequence[str], module: str) -> NoReturn:
    """In a process of its own. The project may be installed as editable: the copy comes first all the same."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in COPIED]:
        del sys.modules[name]
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() not in (ROOT, folder))]
    sys.dont_write_bytecode = True  # the file of a mutant may have the size and the time stamp of another
    import pytest

    options = ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "-o", f"timeout={RUN_TIMEOUT_S / 2}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that were imported before pytest ran
    code = pytest.main([*options, *tests])
    sys.exit(code if _is_from(folder, module) else _NOT_THE_COPY)


def _is_from(folder: Path, module: str) -> bool:
    try:
        file = importlib.import_module(module).__file__
    except Exception:  # a mutant that cannot be imported: `code` says so
        return True
    return file is not None and Path(file).resolve().is_relative_to(folder.resolve())


def try_mutant(mutant: Mutant, folder: Path) -> Outcome:
    """Apply, run, take back."""
    started_s = time.monotonic()
    path = folder / mutant.file
    original = path.read_text()
    try:
        path.write_text(mutant.apply(original))
        Path(cache_from_source(str(path))).unlink(missing_ok=True)  # its time stamp may be that of the mutant
        code, output = run_tests(folder, mutant.tests, mutant.module)
    except (MutantError, ValueError) as error:
        return Outcome(mutant, (), str(error), time.monotonic() - started_s)
    finally:
        path.write_text(original)
    killed_by = tuple(test for test in mutant.tests if _has_failed(test, output))
    return Outcome(mutant, killed_by, _fault(mutant, killed_by, code, output), time.monotonic() - started_s)


def _has_failed(test: str, output: str) -> bool:
    """True where the test, or one of its cases, stands in pytest's summary of failures."""
    return any(line == f"FAILED {test}" or line.startswith((f"FAILED {test}[", f"FAILED {test} - "))
               for line in output.splitlines())  # fmt: skip


def _fault(mutant: Mutant, killed_by: tuple[str, ...], code: int, output: str) -> str:
    if code == 0:
        return "SURVIVED"
    if code != 1:  # a mutant that cannot be imported shows nothing
        return f"pytest ended with {code}\n{output[-MAX_OUTPUT_CHARS:]}"
    missing = [test for test in mutant.tests if test not in killed_by]
    return f"SURVIVED {', '.join(missing)}" if missing else ""


def try_all(mutants: Sequence[Mutant]) -> list[Outcome]:
    """Every mutant's outcome, in order.

    Raises:
        MutantError: The tests do not pass without any mutant.
    """
    _forks.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="zoneserve-mutants-") as name:
        copies = [make_copy(Path(name) / "0")]
        code, output = run_tests(copies[0], sorted({test for mutant in mutants for test in mutant.tests}))
        if code != 0:
            raise MutantError(f"the tests fail without a mutant (pytest ended with {code}):\n{output[-4000:]}")
        copies += [Path(shutil.copytree(copies[0], Path(name) / str(n))) for n in range(1, NUM_WORKERS)]
        free: SimpleQueue[Path] = SimpleQueue()
        for copy in copies:
            free.put(copy)
        with ThreadPoolExecutor(NUM_WORKERS) as workers:
            return list(workers.map(partial(_in_a_copy, free), mutants))


def _in_a_copy(free: SimpleQueue[Path], mutant: Mutant) -> Outcome:
    folder = free.get()
    try:
        return try_mutant(mutant, folder)
    finally:
        free.put(folder)


def report(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table("hop", "mutant", "killed by", "seconds")
    for outcome in outcomes:
        tests = "\n".join(test.rpartition("::")[2] for test in outcome.killed_by)
        table.add_row(outcome.mutant.hop, outcome.mutant.name, outcome.fault or tests, f"{outcome.seconds:.1f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """0 where every mutant is killed, 1 where one survives, 2 where nothing could be tried."""
    parser = argparse.ArgumentParser(prog="python -m tests.isolation.mutants", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", help="this mutant; may be given again")
    parser.add_argument("--list", action="store_true", help="show the mutants and the tests that guard them")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not options.only or mutant.name in options.only]
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    if options.list:
        for mutant in chosen:
            console.print(f"{mutant.name} ({mutant.hop}, {mutant.file})", *mutant.tests, sep="\n    ", markup=False)
        return 0
    started_s = time.monotonic()
    try:
        outcomes = try_all(chosen)
    except MutantError as error:
        console.print(str(error), markup=False)
        return 2
    report(outcomes, console)
    num_alive = sum(bool(outcome.fault) for outcome in outcomes)
    hops = len({mutant.hop for mutant in chosen})
    console.print(
        f"{len(chosen)} mutants at {hops} hops, {num_alive} not killed, {time.monotonic() - started_s:.0f} s",
        highlight=False,
    )
    return 1 if num_alive else 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # before anything numeric starts
    sys.exit(main())

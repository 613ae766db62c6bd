"""`make audit-isolation`: does anything of one tenant's prompts show in another's, on a local deployment over HTTP?

Parts: timing (Kolmogorov-Smirnov on TTFT), attack (a search for a member id), interference (a flood against a floor).
Each has a control that must see sharing where it is right, so a deployment that caches nothing does not pass either.
Prints tables and, last, one line of JSON; the file has the samples too. Status 0 only if every check holds. A correct
deployment fails now and then by chance, as often as the output says: look at the figures, do not draw again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from load_tests.isolation import attack, interference, timing
from load_tests.isolation.checks import Check
from load_tests.isolation.system import AuditError, System, shipped_system, small_system
from load_tests.local import ServerError
from load_tests.peers.environments import draw_chart
from load_tests.peers.record import machine

OUT = Path("out")
CHART_ENVIRONMENTS = Path("out/peers")
SYSTEMS = (("shipped", shipped_system, ("timing", "attack")), ("small", small_system, ("interference",)))
PARTS = [part for _, _, parts in SYSTEMS for part in parts]
NUM_SAMPLES = 250
SEED = 20260101


def run_part(part: str, system: System, num_samples: int, seed: int) -> tuple[dict[str, Any], Any, list[Check]]:
    """(figures, raw samples, checks), drawn from the seed and the part's name. Interference has counts, no samples."""
    rng = random.Random(f"{seed}/{part}")
    started = time.monotonic()
    samples: Any = None
    if part == "timing":
        samples = timing.measure(system, rng, num_samples)
        figures, checks = timing.judge(samples)
    elif part == "attack":
        searches = attack.measure(system, rng, num_samples)
        samples = attack.raw(searches)
        figures, checks = attack.judge(searches)
    else:
        figures = interference.measure(system, rng)
        checks = interference.judge(figures)
    return figures | {"seconds": round(time.monotonic() - started, 1)}, samples, checks


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any], list[Check]]:
    """(figures, raw samples, checks) of the parts asked for, each system started once for all of its parts."""
    figures: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    checks: list[Check] = []
    for name, start, its_parts in SYSTEMS:
        parts = [part for part in its_parts if part in options.parts]
        if not parts:
            continue
        with start(options.out / "isolation" / name) as system:
            for part in parts:
                figures[part], taken, found = run_part(part, system, options.samples, options.seed)
                checks += found
                if taken is not None:
                    samples[part] = taken
                say(f"{part}: {figures[part]['seconds']:.0f} s")
    return figures, samples, checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="of each arm")
    parser.add_argument("--seed", type=int, default=SEED, help="of prompts, ids and orders")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(f"seed {options.seed}, {options.samples} samples an arm", highlight=False)
    try:
        figures, samples, checks = run(options, lambda line: console.print(line, highlight=False, style="dim"))
    except (AuditError, ServerError, httpx.HTTPError) as error:
        console.print(f"audit-isolation: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": options.seed,
        "machine": machine(),
        **figures,
        "checks": [asdict(check) for check in checks],
        "holds": all(check.holds for check in checks),
    }
    report_file = options.out / "isolation.json"
    report_file.write_text(json.dumps(report | {"samples_s": samples}) + "\n", encoding="utf-8")
    _print(console, figures, checks)
    if samples and (reason := draw_chart(CHART_ENVIRONMENTS, "load_tests.isolation.chart", report_file)):
        console.print(f"no chart: {reason}", markup=False, highlight=False, soft_wrap=True)
    print(json.dumps(report))
    return 0 if report["holds"] else 1


def _print(console: Console, figures: Mapping[str, Any], checks: list[Check]) -> None:
    table = Table("check", "found", "wanted", "")
    for check in checks:
        name = f"control: {check.name}" if check.is_control else check.name
        table.add_row(name, check.found, check.wanted, "holds" if check.holds else "FAILS")
    console.print(table)
    for line in chance_lines(figures):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def chance_lines(figures: Mapping[str, Any]) -> list[str]:
    """How often a deployment that leaks nothing fails by chance."""
    lines = []
    if "timing" in figures:
        lines.append(f"by chance alone the cross-zone p is below {timing.ALPHA:g} in {timing.ALPHA:.0%} of runs")
    if "attack" in figures:
        found = figures["attack"]
        lines.append(
            f"the AUC of two arms that do not differ has a standard error of {found['auc_standard_error']:.3f}: "
            f"it leaves {attack.AUC_BAND[0]:g} to {attack.AUC_BAND[1]:g} in {found['chance_outside_band']:.1%} of runs"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())

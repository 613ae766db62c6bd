"""`make bench-modes`: prefill and decode apart against one pool on both cores, under the same open-loop load.

Rounds alternate between the two; each has a server of its own and sends, at each load level, the requests that the
other is sent in its round. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from load_tests.exposition import Exposition
from load_tests.figures import fill, percentile, spread, turns
from load_tests.local import ROOT, Server, ServerError, local_server
from load_tests.mixed_load import WEIGHTS, Answer, plan_arrivals, send_plan

OUT = Path("out")
CONFIGS = ROOT / "deployments" / "configs"
MODES = {"disaggregated": CONFIGS / "local.yaml", "monolithic": CONFIGS / "local-monolithic.yaml"}
MIN_ROUNDS = 3
TTFT_OBJECTIVE_S = 0.5
ITL_OBJECTIVE_S = 0.05  # of a sequence's 99th percentile gap; of a review's mean gap
WARM_UP_RATE_PER_S = 2.0
WARM_UP_S = 8.0
WARM_UP_SEED = 0
SETTLE_S = 1.0
SECTION = "modes"

Figures = dict[str, float]
FIGURES = {
    "goodput_per_s": "goodput, sequences/s",
    "good_share": "share that meets both objectives",
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "itl_p50_ms": "ITL p50, ms",
    "itl_p99_ms": "ITL p99, ms",
    "queue_mean_ms": "queue time at the engine, mean ms",
    "handoffs": "prompts handed off",
    "failed": "sequences that failed",
}


def is_good(answer: Answer) -> bool:
    """Whole, and inside both objectives."""
    if answer.fault is not None or answer.ttft_s > TTFT_OBJECTIVE_S:
        return False
    return not answer.gaps_s or percentile(answer.gaps_s, 0.99) <= ITL_OBJECTIVE_S


def figures_of(answers: Sequence[Answer], before: Exposition, after: Exposition, seconds: float) -> Figures:
    """Figures of one load level. `seconds`: over which requests arrived; rates are by it."""
    whole = [answer for answer in answers if answer.fault is None]
    num_good = sum(map(is_good, whole))
    gaps_s = [gap for answer in whole if answer.kind != "review" for gap in answer.gaps_s]

    def gained(name: str) -> float:
        return after.total(name) - before.total(name)

    num_queued = gained("zoneserve_request_queue_time_seconds_count")
    return {
        "goodput_per_s": num_good / seconds,
        "good_share": num_good / max(len(answers), 1),
        "output_tokens_per_s": sum(answer.num_tokens for answer in whole) / seconds,
        "ttft_p50_ms": percentile([answer.ttft_s for answer in whole], 0.5) * 1e3,
        "ttft_p99_ms": percentile([answer.ttft_s for answer in whole], 0.99) * 1e3,
        "itl_p50_ms": percentile(gaps_s, 0.5) * 1e3,
        "itl_p99_ms": percentile(gaps_s, 0.99) * 1e3,
        "queue_mean_ms": gained("zoneserve_request_queue_time_seconds_sum") / max(num_queued, 1) * 1e3,
        "handoffs": gained("zoneserve_handoff_seconds_count"),
        "failed": len(answers) - len(whole),
    }


def measure(server: Server, rates: Sequence[float], seconds: float, seed: int) -> list[Figures]:
    """One load level after another on a server that is up; each ends when its last answer is there."""
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=30.0) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

        def scrape() -> Exposition:
            return Exposition.parse(client.get("/metrics").raise_for_status().text)

        warm_up = plan_arrivals(WARM_UP_SEED, rate_per_s=WARM_UP_RATE_PER_S, duration_s=WARM_UP_S, model=model)
        asyncio.run(send_plan(server, warm_up))
        levels = []
        for level, rate in enumerate(rates):
            time.sleep(SETTLE_S)
            before = scrape()
            plan = plan_arrivals(seed * 100 + level, rate_per_s=rate, duration_s=seconds, model=model)
            answers = asyncio.run(send_plan(server, plan))
            time.sleep(SETTLE_S)  # the last counters move just after the last byte
            levels.append(figures_of(answers, before, scrape(), seconds))
        return levels


def arithmetics(exposition: Exposition) -> dict[str, str]:
    """What each pool computes with, by role."""
    return {
        labels["role"]: labels["arithmetic"]
        for name, labels, value in exposition.samples
        if name == "zoneserve_engine_info" and value
    }


def start_seconds(exposition: Exposition) -> dict[str, float]:
    """Start of each engine's process to its readiness, by role."""
    return exposition.by_label("zoneserve_replica_start_seconds", "role")


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All rounds."""
    levels: dict[str, list[list[Figures]]] = {mode: [] for mode in MODES}
    starts: dict[str, list[float]] = {}
    engines: dict[str, dict[str, str]] = {}
    for round_index, mode in turns(list(MODES), options.rounds):
        with local_server(options.out / "modes" / mode, config=MODES[mode]) as server:
            exposition = Exposition.parse(httpx.get(f"{server.url}/metrics", timeout=30.0).text)
            engines[mode] = arithmetics(exposition)
            for role, seconds in start_seconds(exposition).items():
                starts.setdefault(f"{mode} {role}", []).append(seconds)
            levels[mode].append(measure(server, options.rates, options.seconds, options.seed + round_index))
        console.print(f"round {round_index + 1} of {options.rounds}, {mode}: done", highlight=False)
    return {
        "objectives": {"ttft_s": TTFT_OBJECTIVE_S, "itl_p99_s": ITL_OBJECTIVE_S},
        "mix": WEIGHTS,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "engines": engines,
        "start_s": {name: spread(values) for name, values in starts.items()},
        "levels": [
            {
                "arrivals_per_s": rate,
                **{
                    mode: {name: spread([of_round[index][name] for of_round in rounds]) for name in FIGURES}
                    for mode, rounds in levels.items()
                },
            }
            for index, rate in enumerate(options.rates)
        ],
    }


def cells(figures: Mapping[str, Mapping[str, float]], name: str) -> str:
    value = figures[name]
    return f"{value['median']:.4g} ({value['min']:.4g} - {value['max']:.4g})"


def section(report: Mapping[str, Any]) -> str:
    """The report as Markdown, for `docs/benchmarks.md`."""
    mix = ", ".join(f"{kind} {weight}" for kind, weight in report["mix"].items())
    objectives = report["objectives"]
    lines = [
        f"Open loop, Poisson arrivals for {report['seconds']:g} s a level, {mix} by weight, no prompt twice; "
        f"{report['rounds']} rounds of each mode in turn, a fresh server each; medians with min and max. "
        f"Objectives: TTFT at most {objectives['ttft_s'] * 1e3:g} ms, 99th percentile gap of a sequence at most "
        f"{objectives['itl_p99_s'] * 1e3:g} ms (of a review, its mean gap).",
        "",
    ]
    for level in report["levels"]:
        lines += [
            f"| {level['arrivals_per_s']:g} requests/s | {' | '.join(MODES)} |",
            "|---|---:|---:|",
            *(
                f"| {text} | {' | '.join(cells(level[mode], name) for mode in MODES)} |"
                for name, text in FIGURES.items()
            ),
            "",
        ]
    ready = ", ".join(f"{name} {cells(report['start_s'], name)}" for name in report["start_s"])
    lines.append(f"Process start to ready, seconds: {ready}.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0, 6.0], help="arrivals a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals at each level")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--docs", type=Path, help="a document with the markers `modes:begin` and `modes:end`")
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        report = run(options, console)
    except (ServerError, httpx.HTTPError) as error:
        console.print(f"bench-modes: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    _print_table(console, report)
    line = json.dumps(report)
    (options.out / "bench-modes.json").write_text(line + "\n", encoding="utf-8")
    if options.docs is not None:
        fill(options.docs, SECTION, section(report))
    print(line)
    return 0


def _print_table(console: Console, report: Mapping[str, Any]) -> None:
    for level in report["levels"]:
        table = Table(f"{level['arrivals_per_s']:g} requests/s", *MODES)
        for name, text in FIGURES.items():
            table.add_row(text, *(cells(level[mode], name) for mode in MODES))
        console.print(table)
    for mode, engines in report["engines"].items():
        console.print(f"{mode}: {engines}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())

"""`make bench-isolation`: what trust zones and the audit log cost, on a local deployment over HTTP.

Zones: the same calls of several tenants' agents with zones, under a strict policy (nothing shared between tenants), and
without zones (one caller, one case: everybody's text lies together). Rounds take the three in turn, a fresh server
each. Hit rate is by counters, prompt tokens whose KV was found over all prompt tokens.
Audit: a deployment with the audit log and one without are up together, and each in turn answers the same requests.
Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.table import Table

from deployments.trust.policy import DEFAULT_POLICY
from load_tests.claim_chats import CASES, TENANTS, Call, plan_calls, sample_claims
from load_tests.exposition import Exposition
from load_tests.figures import Spread, fill, percentile, spread, turns
from load_tests.local import Server, ServerError, local_server
from load_tests.mixed_load import Answer, Arrival, send_plan
from load_tests.peers.record import machine

OUT = Path("out")
PARTS = ("zones", "audit")
ZONES, STRICT, NONE = "with zones", "strict", "without zones"
MODES = (ZONES, STRICT, NONE)
TOGETHER = "together"  # the principal whose one case holds everybody's text
PRINCIPALS = (
    *({"principal": tenant, "tenant": tenant, "cases": list(CASES)} for tenant in TENANTS),
    {"principal": TOGETHER, "tenant": "all", "zone": "tenant/all/case/all"},
)
WARM_UP_SEED, WARM_UP_S = 0, 6.0
SETTLE_S = 1.0
CACHED_ORIGINS = ("decode_cache", "prefill_cache")
SECTION = "isolation"

AUDITED, UNAUDITED = "with audit log", "without"
BURST = 24  # calls of one turn, all at once
SHORT_BURST = 48  # fewer than `routing.max_inflight_requests`
SHORT_TOKENS = 4
SHORT_TEXT = "Is a referral on file for this visit?"

FIGURES = {
    "hit_rate": "hit rate, share of prompt tokens",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "output_tokens_per_s": "output tokens/s",
    "failed": "calls that failed",
}
Figures = dict[str, float]


def arrivals(calls: Sequence[Call], server: Server, mode: str, model: str) -> list[Arrival]:
    """The calls as `mode` sends them: only caller and labels differ."""
    sent = []
    for call in calls:
        body = call.body(model)
        if mode == NONE:
            headers = server.headers_of(TOGETHER)
        else:
            headers = server.headers_of(call.tenant)
            body["metadata"] = {"zoneserve.case": call.case}
            if call.segments:
                body["metadata"]["zoneserve.segments"] = call.segments
        sent.append(Arrival(call.at_s, "chat", "/v1/chat/completions", body, headers))
    return sent


def figures_of(answers: Sequence[Answer], before: Exposition, after: Exposition, seconds: float) -> Figures:
    """`seconds`: over which calls arrived."""
    origins = [exposition.by_label("zoneserve_prompt_tokens_total", "origin") for exposition in (before, after)]
    gained = {origin: count - origins[0].get(origin, 0.0) for origin, count in origins[1].items()}
    whole = [answer for answer in answers if answer.fault is None]
    return {
        "hit_rate": sum(gained.get(origin, 0.0) for origin in CACHED_ORIGINS) / max(sum(gained.values()), 1.0),
        "ttft_p50_ms": percentile([answer.ttft_s for answer in whole], 0.5) * 1e3,
        "ttft_p99_ms": percentile([answer.ttft_s for answer in whole], 0.99) * 1e3,
        "output_tokens_per_s": sum(answer.num_tokens for answer in whole) / seconds,
        "failed": len(answers) - len(whole),
    }


def strict_policy(directory: Path) -> Path:
    """The shipped policy, strict."""
    directory.mkdir(parents=True, exist_ok=True)
    policy = yaml.safe_load(DEFAULT_POLICY.read_text(encoding="utf-8")) | {"strict": True}
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump(policy, sort_keys=False), encoding="utf-8")
    return path


def model_of(server: Server) -> str:
    answer = httpx.get(f"{server.url}/v1/models", headers=server.headers, timeout=30.0).raise_for_status()
    return str(answer.json()["data"][0]["id"])


def scrape(server: Server) -> Exposition:
    time.sleep(SETTLE_S)  # the last counters move just after the last byte
    return Exposition.parse(httpx.get(f"{server.url}/metrics", timeout=30.0).raise_for_status().text)


def run_zones(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    claims = sample_claims()
    found: dict[str, list[Figures]] = {mode: [] for mode in MODES}
    for round_index, mode in turns(MODES, options.rounds):
        directory = options.out / "bench-isolation" / mode.replace(" ", "-")
        trust = {"policy_file": str(strict_policy(directory).absolute())} if mode == STRICT else {}
        with local_server(directory, principals=PRINCIPALS, trust=trust) as server:
            model = model_of(server)
            warm_up = plan_calls(WARM_UP_SEED, rate_per_s=options.rate, duration_s=WARM_UP_S, claims=claims)
            asyncio.run(send_plan(server, arrivals(warm_up, server, mode, model)))
            calls = plan_calls(
                options.seed + round_index, rate_per_s=options.rate, duration_s=options.seconds, claims=claims
            )
            before = scrape(server)
            answers = asyncio.run(send_plan(server, arrivals(calls, server, mode, model)))
            found[mode].append(figures_of(answers, before, scrape(server), options.seconds))
        console.print(f"round {round_index + 1} of {options.rounds}, {mode}: done", highlight=False)
    return {
        "arrivals_per_s": options.rate,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "tenants": len(TENANTS),
        "modes": {
            mode: {name: spread(figures[name] for figures in rounds) for name in FIGURES}
            for mode, rounds in found.items()
        },
    }


def bursts(seed: int, turn: int, claims: Sequence[str]) -> dict[str, list[Call]]:
    """The loads of one turn, all calls of a load at one moment: claims, and the short calls that a log costs most."""
    calls = plan_calls(seed * 1000 + turn + 1, rate_per_s=BURST, duration_s=2.0, claims=claims)[:BURST]
    short = [
        Call(0.0, TENANTS[index % len(TENANTS)], CASES[index // len(TENANTS)],
             ({"role": "user", "content": f"{turn}-{index}. {SHORT_TEXT}"},), SHORT_TOKENS, index)
        for index in range(SHORT_BURST)
    ]  # fmt: skip
    return {"claims": [replace(call, at_s=0.0) for call in calls], "short calls": short}


def run_audit(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    claims = sample_claims()
    per_s: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, list[float]] = {}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                local_server(
                    options.out / "bench-isolation" / name.replace(" ", "-"), principals=PRINCIPALS, trust=trust
                )
            )
            for name, trust in ((AUDITED, {}), (UNAUDITED, {"audit": None}))
        }
        model = model_of(servers[AUDITED])
        for turn, name in turns(list(servers), 1 + options.turns):  # the first warms up
            for load, calls in bursts(options.seed, turn, claims).items():
                sent = arrivals(calls, servers[name], ZONES, model)
                started = time.perf_counter()
                answers = asyncio.run(send_plan(servers[name], sent))
                seconds = time.perf_counter() - started
                if faults := sorted({answer.fault for answer in answers if answer.fault is not None}):
                    raise ServerError(f"{name}, {load}: {', '.join(faults)}")
                if turn:
                    per_s.setdefault(load, {}).setdefault(name, []).append(len(calls) / seconds)
    for load, found in per_s.items():
        ratios[load] = [a / b for a, b in zip(found[AUDITED], found[UNAUDITED], strict=True)]
    console.print("audit log: done", highlight=False)
    return {
        load: {
            "calls_per_s": {name: spread(values) for name, values in found.items()},
            "audited_over_unaudited": spread(ratios[load]),
        }
        for load, found in per_s.items()
    }


def cell(found: Spread) -> str:
    return f"{found['median']:.4g} ({found['min']:.4g} - {found['max']:.4g})"


def section(report: Mapping[str, Any]) -> str:
    """The report as Markdown, for `docs/benchmarks.md`."""
    lines: list[str] = []
    if "zones" in report:
        found = report["zones"]
        lines += [
            f"Agents of {found['tenants']} tenants, {found['arrivals_per_s']:g} calls/s for {found['seconds']:g} s, "
            f"the same in each mode; {found['rounds']} rounds in turn, a fresh server each; medians with min and max.",
            "",
            f"| | {' | '.join(MODES)} |",
            f"|---|{'---:|' * len(MODES)}",
            *(
                f"| {text} | {' | '.join(cell(found['modes'][mode][name]) for mode in MODES)} |"
                for name, text in FIGURES.items()
            ),
            "",
        ]
    if "audit" in report:
        lines += [
            f"| calls/s | {AUDITED} | {UNAUDITED} | ratio |",
            "|---|---:|---:|---:|",
            *(
                f"| {load} | {cell(found['calls_per_s'][AUDITED])} | {cell(found['calls_per_s'][UNAUDITED])} "
                f"| {cell(found['audited_over_unaudited'])} |"
                for load, found in report["audit"].items()
            ),
        ]
    return "\n".join(lines).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rate", type=float, default=1.5, help="calls a second")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each mode")
    parser.add_argument("--turns", type=int, default=8, help="of each deployment, for the audit log's price")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--docs", type=Path, help="a document with the markers `isolation:begin` and `isolation:end`")
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "seed": options.seed}
    try:
        if "zones" in options.parts:
            report["zones"] = run_zones(options, console)
        if "audit" in options.parts:
            report["audit"] = run_audit(options, console)
    except (ServerError, httpx.HTTPError) as error:
        console.print(f"bench-isolation: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    line = json.dumps(report)
    (options.out / "bench-isolation.json").write_text(line + "\n", encoding="utf-8")
    _print_tables(console, report)
    if options.docs is not None:
        fill(options.docs, SECTION, section(report))
    print(line)
    return 0


def _print_tables(console: Console, report: Mapping[str, Any]) -> None:
    if "zones" in report:
        modes = report["zones"]["modes"]
        table = Table(f"{report['zones']['arrivals_per_s']:g} calls/s", *MODES)
        for name, text in FIGURES.items():
            table.add_row(text, *(cell(modes[mode][name]) for mode in MODES))
        console.print(table)
    if "audit" in report:
        table = Table("calls/s", AUDITED, UNAUDITED, "ratio")
        for load, found in report["audit"].items():
            per_s = found["calls_per_s"]
            table.add_row(load, cell(per_s[AUDITED]), cell(per_s[UNAUDITED]), cell(found["audited_over_unaudited"]))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())

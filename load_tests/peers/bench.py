"""`make bench-peers`: ours against every peer, at engine level, in memory and through HTTP.

Prints tables and, last, one line of JSON; writes out/peers/report.json and report.png.

    python -m load_tests.peers.bench --only decode_b1_c512 prefill_512 --contenders ours vllm --repeats 3 --skip-http
    python -m load_tests.peers.bench --from-report --docs docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.model_store import resolve
from engine.tokenizer import Tokenizer
from load_tests.figures import fill
from load_tests.peers.contenders import Settings, contenders
from load_tests.peers.convert import convert
from load_tests.peers.engine_runs import run_engine, run_memory
from load_tests.peers.environments import draw_chart
from load_tests.peers.http_runs import run_http
from load_tests.peers.record import machine, markdown, terminal_tables
from load_tests.peers.servers import LABELS as SERVERS
from load_tests.peers.workloads import WORKLOADS, Prompts, judge, select

OUT = Path("out/peers")
MEMORY_KV_TOKENS = 32_768
MEMORY_REPEATS = 3
MEMORY_CONTENDERS = ("ours", "vllm")
MODEL = "smollm2"
SECTION = "peers"
_WORD = re.compile(r" [a-z]{3,}")
TEXTS = (
    "The claim was denied because",
    "A reviewer of medical claims first checks whether the member was eligible on the date of service, and then",
    "The capital of France is",
)


def words(tokenizer: Tokenizer) -> list[int]:
    """Ids of plain words that are one token each: text made of them is cut into the same tokens again."""
    ids = range(len(tokenizer.special_token_ids), tokenizer.vocab_size)
    return [token for token in ids if _WORD.fullmatch(tokenizer.decode([token]))]


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    gguf = resolve(MODEL)
    settings = Settings(
        gguf=gguf,
        directory=convert(gguf, options.out / "model-bf16").absolute(),
        out=options.out,
        threads=options.threads,
        backend=options.backend,
    )
    tokenizer = Tokenizer.from_path(gguf)
    prompts = Prompts(words(tokenizer), options.seed)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": " ".join(["python -m load_tests.peers.bench", *sys.argv[1:]]),
        "settings": {"threads": options.threads, "backend": options.backend, "repeats": options.repeats},
    }
    wanted = options.contenders
    listed = {name: each for name, each in contenders(settings).items() if name in wanted}
    report["contenders"] = {name: {"label": each.label} for name, each in listed.items()}
    if not options.skip_engine:
        texts = {text: tokenizer.encode(text) for text in TEXTS}
        report |= run_engine(
            listed,
            select(options.only),
            settings=settings,
            repeats=options.repeats,
            prompts=prompts,
            texts=texts,
            say=say,
        )
    if not options.skip_memory:
        report["memory"] = _memory(settings, options, prompts, say)
    if not options.skip_http:
        names = [name for name in SERVERS if name.removesuffix("_monolithic") in wanted]
        report["http"] = run_http(
            names, settings=settings, repeats=options.http_repeats or options.repeats, rate_per_s=options.rate,
            prompts=prompts, tokenizer=tokenizer, seed=options.seed, say=say,
        )  # fmt: skip
    return report


def _memory(
    settings: Settings, options: argparse.Namespace, prompts: Prompts, say: Callable[[str], None]
) -> dict[str, Any]:
    everyone = contenders(settings, MEMORY_KV_TOKENS)
    listed = {name: everyone[name] for name in MEMORY_CONTENDERS if name in options.contenders}
    repeats = min(MEMORY_REPEATS, options.repeats)
    return run_memory(listed, settings=settings, repeats=repeats, prompts=prompts, say=say)


def main() -> int:
    options = _options()
    # A request to end unwinds like Ctrl-C: servers that stand stopped are woken and ended, workers too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console()

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True, style="dim")

    report_file = options.out / "report.json"
    options.out.mkdir(parents=True, exist_ok=True)
    report = json.loads(report_file.read_text(encoding="utf-8")) if options.from_report else run(options, say)
    report["targets"] = list(judge(report))
    line = json.dumps(report)
    report_file.write_text(line + "\n", encoding="utf-8")
    for table in terminal_tables(report):
        console.print(table)
    for name, reason in _missing(report).items():
        say(f"missing: {name}: {reason}")
    if reason := draw_chart(options.out, "load_tests.peers.chart", report_file):
        say(f"no chart: {reason}")
    if options.docs is not None:
        fill(options.docs, SECTION, markdown(report))
    print(line)
    return 0


def _missing(report: Mapping[str, Any]) -> dict[str, str]:
    found = {name: each["missing"] for name, each in report["contenders"].items() if "missing" in each}
    return found | {f"server of {name}": why for name, why in report.get("http", {}).get("missing", {}).items()}


def _options() -> argparse.Namespace:
    names = ["ours", "vllm", "llama_cpp", "llama_cpp_q4_0", "transformers"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", default=[], choices=[each.name for each in WORKLOADS], metavar="WORKLOAD")
    parser.add_argument("--contenders", nargs="+", default=names, choices=names)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender at each workload")
    parser.add_argument("--http-repeats", type=int, default=0, help="turns of each server; 0: as --repeats")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals a second of the second load; 0: without it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="native", help="ours")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip-engine", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-http", action="store_true")
    parser.add_argument("--from-report", action="store_true", help="measure nothing, take the report of the last run")
    parser.add_argument("--docs", type=Path, help="a document with the markers, to put the table of record into")
    options = parser.parse_args()
    if options.repeats < 1 or options.http_repeats < 0 or options.rate < 0:
        parser.error("repeats must be at least 1, a rate not negative")
    return options


if __name__ == "__main__":
    sys.exit(main())

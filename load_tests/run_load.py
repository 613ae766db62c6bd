"""`make load`: a local deployment under mixed chat and review load, headless. Any failed request fails the run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from load_tests.local import ROOT, ServerError, local_server

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
OUT = Path("out/load")
EXPECTED = ("chat", "chat, streamed", "review")
SUMMARY = "summary.json"
DRAIN_S = 120  # a review of a whole file may be under way when the time is up
START_UP_S = 60
TIMED_OUT = 124  # as timeout(1) has it

Entry = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    console = Console()
    try:
        with local_server(options.out) as server:
            console.print(f"{options.users} users for {options.seconds} s at {server.url}", highlight=False)
            status = _run_locust(server.url, server.key_file, options)
    except ServerError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    entries = read_summary(options.out / SUMMARY)
    faults = find_faults(entries, status)
    _print_summary(console, entries, options.out)
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    print(json.dumps({"load": entries, "faults": faults}))
    return 1 if faults else 0


def _run_locust(url: str, key_file: Path, options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / SUMMARY).unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--host", url, "--bearer-key-file", str(key_file)),
        *("--users", str(options.users), "--spawn-rate", "2", "--run-time", f"{options.seconds}s"),
        *("--stop-timeout", str(DRAIN_S), "--exit-code-on-error", "1", "--loglevel", "WARNING"),
        *("--csv", str(options.out / "load"), "--html", str(options.out / "report.html")),
        *("--summary-json", str(options.out / SUMMARY)),
    ]
    limit_s = options.seconds + DRAIN_S + START_UP_S
    with (options.out / "locust.log").open("wb") as log:
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return TIMED_OUT


def read_summary(path: Path) -> list[Entry]:
    """What the locustfile wrote when the run ended; nothing when it wrote no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def find_faults(entries: Sequence[Entry], status: int) -> list[str]:
    """Why the run is no success."""
    faults = [
        f"{entry['name']}: {entry['failures']} of {entry['requests']} failed" for entry in entries if entry["failures"]
    ]
    served = {entry["name"] for entry in entries if entry["type"] == "POST" and entry["requests"] > entry["failures"]}
    faults += [f"{name}: no request succeeded" for name in EXPECTED if name not in served]
    if status and not faults:
        faults.append(f"locust ended with status {status}; see locust.log")
    return faults


def _print_summary(console: Console, entries: Sequence[Entry], out: Path) -> None:
    table = Table("", "what", "count", "failed", "per second", "p50 ms", "p95 ms", "worst ms")
    for entry in sorted(entries, key=lambda entry: (entry["name"], entry["type"])):
        cells = ("type", "name", "requests", "failures", "per_second", "p50_ms", "p95_ms", "max_ms")
        table.add_row(*(str(entry[cell]) for cell in cells))
    console.print(table)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

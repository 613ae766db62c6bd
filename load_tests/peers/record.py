"""What the report looks like: tables for the terminal, Markdown for the table of record."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from load_tests.figures import Spread
from load_tests.peers.servers import LABELS as SERVER_LABELS
from load_tests.peers.workloads import WORKLOADS, ratio

HTTP_FIGURES = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tpot_p50_ms": "time per output token p50, ms",
    "tpot_p99_ms": "time per output token p99, ms",
    "itl_p50_ms": "ITL p50, ms",
    "itl_p99_ms": "ITL p99, ms",
}
MEMORY_FIGURES = {"peak_mib": "peak resident, MiB", "pss_mib": "proportional share at the end, MiB"}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in fields.items()}
    memory_kib = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    flags = [
        flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in cpu.get("flags", "").split()
    ]
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "family": f"family {cpu.get('cpu family', '?')} model {cpu.get('model', '?')}",
        "flags": flags,
        "cores": cpuinfo.count("\nprocessor") + cpuinfo.startswith("processor"),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


Row = tuple[str, Mapping[str, Spread], str]
"""(label, spreads by contender, format of a value)"""


def engine_rows(report: Mapping[str, Any]) -> list[Row]:
    found = report.get("engine", {})
    return [(each.label, found[each.name], ".4g") for each in WORKLOADS if each.name in found]


def memory_rows(report: Mapping[str, Any]) -> list[Row]:
    found = report.get("memory", {})
    return [(label, found[name], ".0f") for name, label in MEMORY_FIGURES.items() if found.get(name)]


def http_rows(report: Mapping[str, Any], load: str) -> list[Row]:
    found = report.get("http", {}).get(load, {})
    return [(label, found[name], ".4g") for name, label in HTTP_FIGURES.items() if name in found]


def sections(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, str], list[Row]]]:
    """(title, labels of the contenders by name, rows), those that have rows."""
    labels = {name: each["label"] for name, each in report.get("contenders", {}).items()}
    rate = report.get("http", {}).get("arrivals_per_s")
    candidates = (
        ("Engine, tokens/s", labels, engine_rows(report)),
        ("Memory of one process", labels, memory_rows(report)),
        ("HTTP, 16 streams at once, 512 tokens in and 128 out", SERVER_LABELS, http_rows(report, "burst")),
        (
            f"HTTP, 16 streams at {rate} a second, 512 tokens in and 128 out",
            SERVER_LABELS,
            http_rows(report, "poisson"),
        ),
    )
    for title, all_labels, rows in candidates:
        present = {name: label for name, label in all_labels.items() if any(name in row[1] for row in rows)}
        if rows:
            yield title, present, rows


def cell(spreads: Mapping[str, Spread], name: str, form: str) -> str:
    """`median (min-max)`, and how many times it ours has; a dash where it was not measured."""
    if name not in spreads:
        return "-"
    value = spreads[name]
    text = f"{value['median']:{form}} ({value['min']:{form}}-{value['max']:{form}})"
    factor = ratio(spreads, "ours", name)
    return text if name == "ours" or factor is None else f"{text} {factor:.2f}x"


def terminal_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    for title, labels, rows in sections(report):
        table = Table(title, *labels.values())
        for label, spreads, form in rows:
            table.add_row(label, *(cell(spreads, name, form) for name in labels))
        yield table
    table = Table("ours against", "peer", "measured", "wanted", "")
    for label, peer, measured, wanted, verdict in target_rows(report):
        table.add_row(label, peer, measured, wanted, verdict)
    yield table


def target_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    for target in report["targets"]:
        measured = "-" if target["ratio"] is None else f"{target['ratio']:.2f}x"
        wanted = f"at {'most' if target['is_ceiling'] else 'least'} {target['bound']}x"
        verdict = {True: "pass", False: "miss", None: "not measured"}[target["passed"]]
        yield target["label"], target["peer"], measured, wanted, verdict


def markdown(report: Mapping[str, Any]) -> str:
    """The section of `docs/benchmarks.md`."""
    host, settings = report["machine"], report["settings"]
    lines = [
        f"Taken {report['date']} on {host['cpu']} ({host['family']}; {', '.join(host['flags'])}), "
        f"{host['cores']} cores, {host['memory_gib']} GiB, Linux {host['kernel']}, Python {host['python']}, "
        f"with `{report['command']}`: {settings['threads']} threads each, backend `{settings['backend']}`, "
        f"{settings['repeats']} turns. "
        "Each cell: median (least-greatest), then how many times that ours has, of the medians.",
        "",
    ]
    for title, labels, rows in sections(report):
        cells = [[label, *(cell(spreads, name, form) for name in labels)] for label, spreads, form in rows]
        lines += [*_table([title, *labels.values()], cells), ""]
    lines += [
        *_table(["Ours against", "peer", "measured", "wanted", ""], [list(row) for row in target_rows(report)]),
        "",
    ]
    lines += list(_notes(report))
    return "\n".join(lines)


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    for each in report.get("contenders", {}).values():
        if "version" in each:
            yield f"- {each['label']}: {each['version']}, {each['description']}."
        if "missing" in each:
            yield f"- {each['label']}: missing: {_one_line(each['missing'])}."
    for name, reason in report.get("http", {}).get("missing", {}).items():
        yield f"- {SERVER_LABELS[name]}: missing: {_one_line(reason)}."
    for name, prefixes in report.get("agreement", {}).items():
        label = report["contenders"][name]["label"]
        tokens = ", ".join(str(count) for count in prefixes.values())
        yield f"- Greedy tokens of {label} that are ours before the first that is not, of 32: {tokens}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [_line(head), rule, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]

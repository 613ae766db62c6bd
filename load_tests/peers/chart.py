"""The report as a picture: runs in an environment that has matplotlib and nothing of ours.

python -m load_tests.peers.chart out/peers/report.json out/peers/report.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#8d96a3", "#66a182", "#2e4057")


def draw(report: dict[str, Any], target: Path) -> None:
    """One panel a workload: tokens a second of each contender, median with least and greatest."""
    panels = [(name.replace("_", " "), spreads) for name, spreads in report.get("engine", {}).items()]
    burst = report.get("http", {}).get("burst", {}).get("output_tokens_per_s")
    if burst:
        panels.append(("HTTP, 16 streams, output", burst))
    if not panels:
        raise SystemExit("the report has nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 2.6 * rows), squeeze=False)
    names = list(dict.fromkeys(name for _, spreads in panels for name in spreads))
    for axis, (title, spreads) in zip(axes.flat, panels, strict=False):
        present = [name for name in names if name in spreads][::-1]
        medians = [spreads[name]["median"] for name in present]
        below = [spreads[name]["median"] - spreads[name]["min"] for name in present]
        above = [spreads[name]["max"] - spreads[name]["median"] for name in present]
        colours = [COLOURS[names.index(name) % len(COLOURS)] for name in present]
        axis.barh(present, medians, xerr=[below, above], color=colours, error_kw={"elinewidth": 1, "capsize": 3})
        axis.set_title(f"{title}, tokens/s", fontsize=10)
        axis.tick_params(labelsize=8)
        for position, (value, name) in enumerate(zip(medians, present, strict=True)):
            high = spreads[name]["max"]
            axis.annotate(f"{value:.0f}", (high, position), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    host = report["machine"]
    figure.suptitle(f"{host['cpu']}, {host['cores']} cores, {report['date']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))

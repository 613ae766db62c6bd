"""The audit's samples as a picture: runs in an environment that has matplotlib and nothing of ours.

python -m load_tests.isolation.chart out/isolation.json out/isolation.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#1b6ca8", "#d1495b")
Panel = tuple[str, Mapping[str, Sequence[float]]]
"""(title, TTFT in seconds by what the legend calls it)"""


def panels(report: Mapping[str, Any]) -> Iterator[Panel]:
    """Two of each part that the report has: where sharing is right, and across tenants."""
    if arms := report["samples_s"].get("timing"):
        same, cross = report["timing"]["same_zone"], report["timing"]["cross_zone"]
        names = list(arms)
        yield f"Same zone (control): KS p {same['ks_p']:.2g}", {name: arms[name] for name in names[:2]}
        yield f"Another tenant: KS p {cross['ks_p']:.2g}", {name: arms[name] for name in names[2:]}
    if searches := report["samples_s"].get("attack"):
        found = report["attack"]
        for condition, title in (("same_zone", "Id search in one's own case (control)"),
                                 ("cross_zone", "Id search by another tenant")):  # fmt: skip
            tried = searches[condition]
            yield (
                f"{title}: AUC {found[condition]['auc']:.3f}",
                {"right id": [each["right_s"] for each in tried], "wrong id": [each["wrong_s"] for each in tried]},
            )


def draw(report: Mapping[str, Any], target: Path) -> None:
    """An ECDF an arm. The time axis ends at the slowest 1 % of a panel, so that one straggler does not flatten it."""
    drawn = list(panels(report))
    if not drawn:
        raise SystemExit("the report has nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(drawn) // 2, 2, figsize=(11, 3.6 * (len(drawn) // 2)), squeeze=False)
    for axis, (title, arms) in zip(axes.flat, drawn, strict=True):
        for colour, style, (name, ttft_s) in zip(COLOURS, ("-", "--"), arms.items(), strict=True):
            label = f"{name} (n = {len(ttft_s)})"
            axis.ecdf([value * 1e3 for value in ttft_s], color=colour, linestyle=style, linewidth=1.6, label=label)
        values = sorted(value * 1e3 for ttft_s in arms.values() for value in ttft_s)
        axis.set_xlim(0.9 * values[0], 1.05 * values[int(0.99 * (len(values) - 1))])
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("TTFT at the client, ms")
        axis.set_ylabel("share of samples")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=9, loc="lower right", frameon=False)
    host = report["machine"]
    figure.suptitle(f"{host['cpu']}, {host['cores']} cores, {report['date']}, seed {report['seed']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))

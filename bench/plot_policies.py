"""Draw what ``idle_policies.py --json`` wrote: idle CPU and timer lateness of each policy, as SVG and PNG.

python bench/plot_policies.py FIGURES.json PLOT.svg     (needs matplotlib)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def plot(rows: list[dict], path: str) -> None:
    """Idle CPU of each policy, by number of vCPUs; a second panel has the guest's timer lateness."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("the plot needs matplotlib: pip install matplotlib")
    matplotlib.use("svg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["policy"] for row in rows))
    kinds = list(dict.fromkeys((row["cpus"], row["engine"]) for row in rows))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for number, (cpus, engine) in enumerate(kinds):
        picked = {row["policy"]: row for row in rows if (row["cpus"], row["engine"]) == (cpus, engine)}
        for panel, value in zip(
            panels, (lambda row: row["idle"], lambda row: row["timer"] and row["timer"][0]), strict=True
        ):
            points = [(value(picked[name]), at) for at, name in enumerate(names) if name in picked]
            points = [(x, at) for x, at in points if x]
            height = 0.8 / len(kinds)
            panel.barh([at + (number + 0.5) * height - 0.4 for _, at in points], [x for x, _ in points], height,
                       label=f"{cpus} vCPU, {engine} engine")  # fmt: skip
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for panel, title in zip(
        panels, ("host CPU of an idle guest, % of one CPU", "lateness of its timer, p50, µs"), strict=True
    ):
        panel.set_xscale("log")
        panel.set_title(title)
        panel.grid(axis="x", alpha=0.3)
    panels[0].axvline(1, color="black", linewidth=0.8)
    panels[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    figure.savefig(Path(path).with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", metavar="FIGURES.json")
    parser.add_argument("plot", metavar="PLOT.svg")
    args = parser.parse_args()
    plot(json.loads(Path(args.figures).read_text()), args.plot)


if __name__ == "__main__":
    main()

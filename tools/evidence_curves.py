"""What compute buys, as pictures: one for each set, from the rows that are there."""

from pathlib import Path
from typing import Any

import numpy as np
from evidence_table import finished_arms

_SHOWN = {"linear": "linear probe", "finetuned_10": "10 % of the labels"}
_WITHOUT = {"linear": ("random_linear", "random start"), "finetuned_10": ("scratch_10", "from scratch")}


def draw(rows: Path, folder: Path) -> list[Path]:
    """A picture evidence_SET.png in `folder` of every set that has finished arms; those written."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    written = []
    for name, arms in finished_arms(rows).items():
        figure, axes = pyplot.subplots(1, len(_SHOWN), figsize=(5 * len(_SHOWN), 3.8), squeeze=False)
        for (measure, title), place in zip(_SHOWN.items(), axes[0], strict=True):
            for number, recipe in enumerate(dict.fromkeys(recipe for recipe, _ in arms)):
                of_recipe = {
                    compute: found
                    for (one, compute), found in arms.items()
                    if one == recipe and all(measure in row for row in found)
                }
                if of_recipe:
                    _line(place, of_recipe, measure, recipe, f"C{number}")
            place.set(xlabel="FLOPs of pretraining", ylabel="accuracy, %", title=title, xscale="log")
            if place.has_data():
                place.legend(fontsize="small")
        figure.suptitle(name)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"evidence_{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
        written.append(path)
    return written


def _line(axes: Any, arms: dict[float, list[dict[str, Any]]], measure: str, label: str, color: str) -> None:
    """A recipe: mean and standard deviation over seeds at every compute, and what it is without pretraining."""
    flops = [rows[0]["flops"] for rows in arms.values()]
    values = [[100 * row[measure] for row in rows] for rows in arms.values()]
    means = [float(np.mean(one)) for one in values]
    spreads = [float(np.std(one, ddof=1)) if len(one) > 1 else 0.0 for one in values]
    axes.errorbar(flops, means, yerr=spreads, color=color, marker="o", capsize=3, label=label)
    key, words = _WITHOUT[measure]
    level = float(np.mean([100 * row[key] for row in next(iter(arms.values()))]))
    axes.axhline(level, color=color, linestyle=":", label=f"{label}, {words}")

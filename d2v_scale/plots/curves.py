"""The curves of a run: loss and health on one panel."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_scale.plots.groups import GROUPS, LAYER, Group, line_labels, names_of
from d2v_scale.tracking.record import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_LINES_IN_LEGEND_INSIDE = 3
"""A legend of more lines stands below its panel, where it covers nothing."""


def series(records: Sequence[dict[str, Any]], name: str, axis: str = "step") -> tuple[list[float], list[float]]:
    """Positions on `axis` (step, samples or hours) and values of one name, for the records that have it."""
    chosen = [(float(r[axis]), float(r[name])) for r in records if name in r and axis in r]
    return [x for x, _ in chosen], [y for _, y in chosen]


def finish_axes(axes: "Axes", group: Group, values: Sequence[float], lines: int) -> None:
    """Scale, title, grid and legend of a panel on which `values` are drawn by so many named `lines`."""
    if group.log and any(value > 0 for value in values):
        axes.set_yscale("log", nonpositive="mask")
    elif values and min(values) == max(values) == 0:
        axes.set_ylim(0, 1)  # around zero, matplotlib would go below it
    axes.set_title(group.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(which="both", labelsize=8)
    if lines > _LINES_IN_LEGEND_INSIDE:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    elif lines > 0:
        axes.legend(fontsize=7, framealpha=0.5)


def plot_health(run_dir: Path, path: Path | None = None) -> Path | None:
    """Draw every group that has values, over steps, to plots/health.png. None: there are no records yet.

    Points that are not finite are marked at the bottom of their axes: they are what one is looking for.
    """
    from matplotlib.figure import Figure

    records = read_records(run_dir)
    panels = [(group, names) for group in GROUPS if len(names := names_of(records, group)) >= group.least]
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.4), layout="constrained")
    figure.suptitle(f"{run_dir.resolve().name}: step {records[-1]['step']}, {records[-1].get('hours', 0):.2f} h")
    for index, (group, names) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, records, group, names)
        axes.set_xlabel("step" if index >= len(panels) - columns else "")
    path = path or run_dir / "plots" / "health.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two drawings may overlap, and readers never see half a picture.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    return path


def _draw(axes: "Axes", records: Sequence[dict[str, Any]], group: Group, names: list[str]) -> None:
    import math

    drawn: list[float] = []
    layers = [name for name in names if LAYER in name]
    labels = line_labels(names)
    for name in names:
        x, y = series(records, name)
        finite = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        marker = "o" if len(finite) < 15 else ""
        axes.plot(
            [a for a, _ in finite],
            [b for _, b in finite],
            marker=marker,
            markersize=3,
            linewidth=1.2,
            label=labels[name] if name not in layers[1:-1] else None,
            color=_colour_of_depth(layers.index(name), len(layers)) if name in layers else "black" if layers else None,
        )
        broken = [a for a, b in zip(x, y, strict=True) if not math.isfinite(b)]
        if broken:
            axes.plot(broken, [0.02] * len(broken), "x", color="red", transform=axes.get_xaxis_transform())
        drawn += [b for _, b in finite]
    shown = [name for name in names if name not in layers[1:-1]]
    finish_axes(axes, group, drawn, len(shown) if len(names) > 1 else 0)


def _colour_of_depth(index: int, depth: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](index / max(1, depth - 1))


def main() -> int:
    """Draw one run directory's panel and have MLflow keep it: what `RunTracker` starts."""
    from d2v_scale.tracking.events import append_event

    run_dir = Path(sys.argv[1])
    os.nice(10)
    if plot_health(run_dir) is not None:
        append_event(run_dir, "artifact", path="plots/health.png", folder="plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The curves of a run: loss and health on one panel."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from d2v_scale.finetuning.metric_names import METRICS
from d2v_scale.tracking.record import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes


LAYER = "/layer_"
"""In the name of a value that there is one of for every layer."""


class Group(NamedTuple):
    """Values that are drawn on one pair of axes."""

    title: str
    names: tuple[str, ...]
    """Names, or beginnings of names that end in `*`."""
    log: bool = False


GROUPS = (
    Group("loss", ("loss", "held_out_loss", "loss/*", "held_out_loss/*")),
    Group("share of held-out targets explained", ("held_out_explained*",)),
    Group("k-NN and probe accuracy", ("knn_accuracy*", "probe*")),
    Group("fine-tuned, on held-out samples", tuple(f"test/{metric}" for kind in METRICS.values() for metric in kind)),
    Group("spread (mean std over channels)", ("target_std*", "prediction_std*", "stem_std*")),
    Group("effective rank", ("target_rank*", "prediction_rank*")),
    Group("mean cosine", ("target_cosine*", "prediction_cosine*")),
    Group("teacher", ("student_teacher_*", "teacher_update_norm", "teacher_norm"), log=True),
    Group("gradient norm", ("grad_norm", "grad_norm/*"), log=True),
    Group("update-to-weight ratio", ("update_ratio/*",), log=True),
    Group("attention entropy, share of the widest", ("attention_entropy*",)),
    Group("likeness (CKA) of student and teacher", ("cka*",)),
    Group("learning rate", ("lr", "lr/*")),
    Group("EMA decay", ("decay",)),
    Group("per second", ("samples_per_second", "tokens_per_second", "audio_seconds_per_second"), log=True),
    Group("model FLOPs utilisation", ("mfu*",)),
    Group("share of time or memory", ("*_wait_share", "host_cpu_share", "host_memory_used_share", "data/padding")),
    Group("memory, GiB", ("host_memory_gib", "device_memory_gib", "device_memory_peak_gib")),
    Group("seconds", ("ema_seconds", "ema_wait_seconds", "checkpoint_stall_seconds", "step_seconds"), log=True),
    Group("skipped and lost", ("skipped*", "data/lost")),
)
_LINES_IN_LEGEND_INSIDE = 3
"""A legend of more lines stands below its panel, where it covers nothing."""


def series(records: Sequence[dict[str, Any]], name: str, axis: str = "step") -> tuple[list[float], list[float]]:
    """Positions on `axis` (step, samples or hours) and values of one name, for the records that have it."""
    chosen = [(float(r[axis]), float(r[name])) for r in records if name in r and axis in r]
    return [x for x, _ in chosen], [y for _, y in chosen]


def names_of(records: Sequence[dict[str, Any]], group: Group) -> list[str]:
    """The recorded names that belong to a group: in the group's order, then in order of first appearance."""
    seen = {name: None for record in records for name in record}

    def belongs(name: str, wanted: str) -> bool:
        return (
            name == wanted
            or (wanted.endswith("*") and name.startswith(wanted[:-1]))
            or (wanted.startswith("*") and name.endswith(wanted[1:]))
        )

    return list(dict.fromkeys(name for wanted in group.names for name in seen if belongs(name, wanted)))


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
    panels = [(group, names) for group in GROUPS if (names := names_of(records, group))]
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
            label=name if name not in layers[1:-1] else None,
            color=_colour_of_depth(layers.index(name), len(layers)) if name in layers else "black" if layers else None,
        )
        broken = [a for a, b in zip(x, y, strict=True) if not math.isfinite(b)]
        if broken:
            axes.plot(broken, [0.02] * len(broken), "x", color="red", transform=axes.get_xaxis_transform())
        drawn += [b for _, b in finite]
    shown = [name for name in names if name not in layers[1:-1]]
    finish_axes(axes, group, drawn, 0 if names == [group.title] else len(shown))


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

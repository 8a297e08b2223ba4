"""Pictures of how samples and layers relate: nearest neighbours, and similarity of layers."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from d2v_scale.data2vec.statistics import linear_cka
from d2v_scale.evaluation.knn import nearest
from d2v_scale.plots.drawing import Sample
from d2v_scale.plots.samples import log_spectrogram, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_neighbours(
    features_nd: Tensor,
    samples: Sequence[Sample],
    labels: Sequence[str],
    path: Path,
    *,
    queries: int = 8,
    neighbours: int = 5,
) -> Path:
    """Each row: a sample and the others nearest to it by cosine similarity, framed green if of the same label, red if
    of another.

    The sample's own title says how many others have its label, so how many green ones there could be.
    """
    from matplotlib.figure import Figure

    queries = min(queries, len(samples))
    neighbours = min(neighbours, len(samples) - 1)
    chosen = torch.linspace(0, len(samples) - 1, queries).round().long()
    similarity, index = nearest(features_nd, features_nd[chosen], neighbours + 1)
    columns = neighbours + 1
    is_text = isinstance(samples[0], str)
    figure = Figure(figsize=((2.6 if is_text else 1.5) * columns, 1.5 * queries + 0.4), layout="constrained")
    for row, query in enumerate(chosen.tolist()):
        found = [(i, s) for i, s in zip(index[row].tolist(), similarity[row].tolist(), strict=True) if i != query]
        for column, (item, score) in enumerate([(query, 1.0), *found[:neighbours]]):
            axes = figure.add_subplot(queries, columns, row * columns + column + 1)
            _draw_sample(axes, samples[item])
            others = f"({list(labels).count(labels[item]) - 1} more)" if labels[item] else ""
            title = f"{labels[item]} {others if column == 0 else f' {score:.2f}'}".strip()
            axes.set_title(title, fontsize=8, fontweight="bold" if column == 0 else "normal", pad=2)
            alike = "#2a9d4a" if labels[item] == labels[query] else "#c8402f"
            colour = alike if column and labels[query] and labels[item] else "black"
            for spine in axes.spines.values():
                spine.set_visible(True)
                spine.set_color(colour)
                spine.set_linewidth(2.0)
    title = f"left: a sample; then its nearest of {len(samples) - 1} others (green: same label) and their cosine"
    figure.suptitle(f"{title}{_agreement(features_nd, labels, neighbours)}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _agreement(features_nd: Tensor, labels: Sequence[str], neighbours: int) -> str:
    """How many of all samples' nearest neighbours have their label, and how many would by chance; empty: no labels."""
    agreed = same_labels(features_nd, labels, neighbours)
    if agreed is None:
        return ""
    return f"\nof all samples' {neighbours} nearest: same label {agreed[0]:.0%}, chance {agreed[1]:.0%}".replace(
        "%", " %"
    )


def same_labels(features_nd: Tensor, labels: Sequence[str], neighbours: int) -> tuple[float, float] | None:
    """Of the nearest neighbours of all samples that have a label, among each other: the share that has the same one,
    and the share of all others that have it. None: fewer than two samples have one."""
    known = [place for place, label in enumerate(labels) if label]
    if len(known) < 2:
        return None
    features_nd = features_nd[known]
    _, numbers = np.unique(np.array([labels[place] for place in known]), return_inverse=True)
    label_n = torch.from_numpy(numbers)
    _, index_nk = nearest(features_nd, features_nd, min(neighbours, len(known) - 1) + 1)
    # A sample is its own nearest, but for equal ones, where another may stand first.
    others_nk = index_nk != torch.arange(len(known))[:, None]
    alike_nk = (label_n[index_nk] == label_n[:, None]) & others_nk
    pairs_nn = label_n[:, None] == label_n
    chance = (pairs_nn.sum().item() - len(known)) / (len(known) * (len(known) - 1))
    return alike_nk.sum().item() / others_nk.sum().item(), chance


def _draw_sample(axes: "Axes", sample: Sample) -> None:
    axes.set_xticks([], [])
    axes.set_yticks([], [])
    if isinstance(sample, str):
        shown = textwrap.fill(textwrap.shorten(sample, 380, placeholder=" …"), 40)
        place = {"va": "top", "transform": axes.transAxes, "parse_math": False}
        # Clipped: 40 wide characters would reach over the frame, and the layout make room for them.
        text = axes.text(0.03, 0.95, shown, fontsize=6.5, clip_on=True, **place)  # type: ignore[arg-type]
        text.set_in_layout(False)
    elif sample.dim() == 1:
        axes.imshow(log_spectrogram(sample), origin="lower", aspect="auto", cmap="magma")
    else:
        axes.imshow(to_image(sample), interpolation="nearest")


def plot_cka(rows_lnd: Tensor, columns_lnd: Tensor, path: Path, *, row_name: str, column_name: str) -> Path:
    """Heat map of the linear CKA of every layer of one model with every layer of another, on the same N samples."""
    from matplotlib.figure import Figure

    values = np.array([[float(linear_cka(x_nd, y_nd)) for y_nd in columns_lnd] for x_nd in rows_lnd])
    figure = Figure(figsize=(1.8 + 0.45 * len(columns_lnd), 1.6 + 0.42 * len(rows_lnd)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", vmin=0, vmax=1, cmap="viridis")
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if value < 0.6 else "black",
            )
    axes.set_xticks(range(len(columns_lnd)), [str(layer + 1) for layer in range(len(columns_lnd))])
    axes.set_yticks(range(len(rows_lnd)), [str(layer + 1) for layer in range(len(rows_lnd))])
    axes.set_xlabel(f"layer of the {column_name}")
    axes.set_ylabel(f"layer of the {row_name}")
    axes.set_title(f"{rows_lnd.shape[1]} samples, mean over positions", fontsize=8)
    figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path

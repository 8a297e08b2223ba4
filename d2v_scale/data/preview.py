"""Pictures of what a step holds: a contact sheet, waveforms or token blocks, with the masks drawn on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data.batch import Batch

_HIDDEN = (0.85, 0.1, 0.3)
_SHADE = 0.7


def draw(batch: Batch, path: Path, decode: Callable[[list[int]], str] | None = None, samples: int = 6) -> Path:
    """Write a PNG of the first samples of a batch and of the masks of their clones.

    `decode` turns ids into text for a batch of tokens. What the student does not see is shaded.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = min(samples, len(batch.inputs))
    path.parent.mkdir(parents=True, exist_ok=True)
    if batch.modality == "vision":
        shown = min(batch.clones, 4)
        figure = Figure(figsize=(1.6 * (1 + shown), 1.7 * rows))
        _images(figure, batch, rows, shown)
    else:
        figure = Figure(figsize=(11, 1.3 * rows))
        (_waves if batch.modality == "speech" else _tokens)(figure, batch, rows, *([decode] if decode else []))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


def _images(figure: Any, batch: Batch, rows: int, shown: int) -> None:
    masked_rt = batch.masked_rt.cpu().numpy()
    side = round(masked_rt.shape[1] ** 0.5)
    for row in range(rows):
        image = batch.inputs[row].cpu().numpy().transpose(1, 2, 0)
        low, high = image.min(), image.max()
        image = np.repeat((image - low) / max(high - low, 1e-6), 3 if image.shape[2] == 1 else 1, axis=2)
        for column in range(1 + shown):
            axes = figure.add_subplot(rows, 1 + shown, row * (1 + shown) + column + 1)
            axes.imshow(image if column == 0 else _shaded(image, masked_rt[row * batch.clones + column - 1], side))
            axes.set_axis_off()
            if column == 0:
                axes.set_title(_short(batch.keys[row]), fontsize=7)


def _shaded(image: NDArray[np.float32], masked_t: NDArray[np.bool_], side: int) -> NDArray[np.float32]:
    scale = image.shape[0] // side
    hidden = np.kron(masked_t.reshape(side, side), np.ones((scale, scale), dtype=bool))[..., None]
    return np.where(hidden, (1 - _SHADE) * image + _SHADE * np.array(_HIDDEN), image)


def _waves(figure: Any, batch: Batch, rows: int) -> None:
    masked_rt = batch.masked_rt.cpu().numpy()
    for row in range(rows):
        axes = figure.add_subplot(rows, 1, row + 1)
        wave = batch.inputs[row].cpu().numpy()
        seconds = len(wave) / 16000
        axes.plot(np.linspace(0, seconds, len(wave)), wave, linewidth=0.4, color="0.2")
        _spans(axes, masked_rt[row * batch.clones], seconds)
        axes.set_ylabel(_short(batch.keys[row]), fontsize=6, rotation=0, ha="right")
        axes.set_xlim(0, seconds)
        axes.tick_params(labelsize=6)
    figure.supxlabel("seconds", fontsize=7)


def _spans(axes: Any, masked_t: NDArray[np.bool_], length: float) -> None:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], masked_t.astype(int), [0]))))
    for start, stop in edges.reshape(-1, 2) * (length / len(masked_t)):
        axes.axvspan(start, stop, color=_HIDDEN, alpha=0.25, linewidth=0)


def _tokens(figure: Any, batch: Batch, rows: int, decode: Callable[[list[int]], str] | None = None) -> None:
    shown = 120
    for row in range(rows):
        axes = figure.add_subplot(rows, 1, row + 1)
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.text(0, 1, _short(batch.keys[row]), fontsize=6, color="0.5")
        ids = batch.inputs[row, :shown].tolist()
        hidden = batch.masked_rt[row * batch.clones, :shown].tolist()
        x, y = 0.0, 0.82
        for token, is_hidden in zip(ids, hidden, strict=True):
            piece = decode([token]) if decode is not None else str(token)
            width = 0.0072 * (len(piece) + 1)
            if x + width > 1:
                x, y = 0.0, y - 0.2
            if y < 0:
                break
            box = {"facecolor": _HIDDEN, "alpha": 0.35, "pad": 0.6, "linewidth": 0} if is_hidden else None
            axes.text(x, y, piece.replace("$", r"\$"), fontsize=7, family="monospace", bbox=box)
            x += width


def _short(key: str) -> str:
    return key if len(key) <= 28 else f"...{key[-25:]}"

"""Arrays in pictures: lines of one axis, an image of two, images next to each other of three and four."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.plots.drawing import Drawing
from d2v_scale.plots.samples import grid_figure, plot_pca, show, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HIDDEN = (0.91, 0.58, 0.36)
_FRAMES = 4
"""Slices of the first axis that are shown of three axes."""


class ArrayDrawing(Drawing):
    """Arrays, their hidden patches in colour."""

    def masks(self, batch: Batch, masked_bmt: np.ndarray, decode: Callable[[int], str] | None) -> "Figure":
        """Of one axis a row a sample, with a band for each clone; of more a column a sample: its values, and below
        them once more for each clone."""
        del decode
        samples, clones, _ = masked_bmt.shape
        if batch.inputs.dim() == 3:
            figure = grid_figure(samples, 1, side=1.2, width=11)
            for row in range(samples):
                _draw_lines(figure.add_subplot(samples, 1, row + 1), batch.inputs[row], masked_bmt[row])
            return figure
        figure = grid_figure(clones + 1, samples, side=1.8)
        for sample in range(samples):
            array = batch.inputs[sample]
            show(figure.add_subplot(clones + 1, samples, sample + 1), to_image(as_image(array)))
            for clone in range(clones):
                masked = torch.from_numpy(masked_bmt[sample, clone].reshape(batch.grid))
                axes = figure.add_subplot(clones + 1, samples, (clone + 1) * samples + sample + 1)
                show(axes, _hide(array, masked))
        return figure

    def sample(self, batch: Batch, row: int, decode: Callable[[list[int]], str] | None) -> Tensor:
        """An image (1 or 3, H, W): of one axis its channels below each other."""
        del decode
        return as_image(batch.inputs[row])

    def features(
        self, batch: Batch, states_btd: Tensor, valid_bt: Tensor | None, labels: list[str], place: Callable[[str], Path]
    ) -> list[Path]:
        """Of two axes, principal components as colours."""
        del valid_bt, labels
        if len(batch.grid) != 2:
            return []
        images = torch.stack([as_image(array) for array in batch.inputs[: len(states_btd)]])
        return [plot_pca(images, states_btd, place("pca"), grid=batch.grid)]


def as_image(array: Tensor) -> Tensor:
    """(C, E_1 ... E_n) as an image (1 or 3, H, W): a line as its channels below each other, of two axes as it is (three
    channels are colours, of others the mean), of three some slices of the first axis beside each other, of four those
    of the middle of the first."""
    if array.dim() == 2:
        return array[None]
    if array.dim() == 5:
        array = array[:, array.shape[1] // 2]
    if array.dim() == 4:
        extent = array.shape[1]
        chosen = np.unique(np.linspace(0, extent - 1, min(_FRAMES, extent)).round().astype(int)).tolist()
        array = torch.cat([array[:, frame] for frame in chosen], dim=-1)
    return array if array.shape[0] == 3 else array.mean(dim=0, keepdim=True)


def _hide(array: Tensor, masked: Tensor) -> np.ndarray:
    """The picture of an array, hidden patches in colour."""
    for axis, extent in enumerate(array.shape[1:]):
        masked = masked.repeat_interleave(extent // masked.shape[axis], dim=axis)
    hidden = as_image(masked[None].float())[0].numpy()[..., None] > 0
    return np.where(hidden, np.array(_HIDDEN), to_image(as_image(array)))


def _draw_lines(axes: "Axes", array: Tensor, masked_mt: np.ndarray) -> None:
    """Every channel as a line, and a band for each clone."""
    lines = array.float().cpu().numpy()
    steps = lines.shape[1]
    axes.plot(np.arange(steps) + 0.5, lines.T, linewidth=0.6)
    limit = 1.05 * float(np.abs(lines).max(initial=1e-6))
    axes.set_ylim(-limit, limit)
    axes.autoscale(False)
    axes.set_xlim(0, steps)
    axes.set_yticks([], [])
    axes.tick_params(labelsize=7)
    clones = len(masked_mt)
    for clone, masked_t in enumerate(masked_mt):
        top, height = limit - clone * 2 * limit / clones, 2 * limit / clones
        spans = np.where(masked_t, 1.0, np.nan)[None]
        extent = (0.0, float(steps), top - 0.94 * height, top)
        axes.imshow(spans, extent=extent, aspect="auto", cmap="Oranges", alpha=0.5, vmin=0, vmax=1.6)

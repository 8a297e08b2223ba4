"""Images in pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.plots.drawing import Drawing
from d2v_scale.plots.samples import grid_figure, plot_pca, show, to_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIDDEN = (0.91, 0.58, 0.36)


class ImageDrawing(Drawing):
    """Images, their hidden patches in colour."""

    def masks(self, batch: Batch, masked_bmt: np.ndarray, decode: Callable[[int], str] | None) -> "Figure":
        """A column a sample: the image, and below it one for each clone."""
        del decode
        samples, clones, _ = masked_bmt.shape
        figure = grid_figure(clones + 1, samples, side=1.6)
        for sample in range(samples):
            image = to_image(batch.inputs[sample])
            show(figure.add_subplot(clones + 1, samples, sample + 1), image)
            for clone in range(clones):
                axes = figure.add_subplot(clones + 1, samples, (clone + 1) * samples + sample + 1)
                show(axes, _hide(image, masked_bmt[sample, clone].reshape(batch.grid)))
        return figure

    def sample(self, batch: Batch, row: int, decode: Callable[[list[int]], str] | None) -> Tensor:
        """(C, H, W)."""
        del decode
        return batch.inputs[row]

    def features(
        self, batch: Batch, states_btd: Tensor, valid_bt: Tensor | None, labels: list[str], place: Callable[[str], Path]
    ) -> list[Path]:
        """Principal components as colours."""
        del valid_bt, labels
        return [plot_pca(batch.inputs[: len(states_btd)], states_btd, place("pca"), grid=batch.grid)]


def _hide(image: np.ndarray, masked_hw: np.ndarray) -> np.ndarray:
    rows, columns = masked_hw.shape
    hidden = np.kron(masked_hw, np.ones((image.shape[0] // rows, image.shape[1] // columns)))[..., None] > 0
    return np.where(hidden, np.array(_HIDDEN), image)

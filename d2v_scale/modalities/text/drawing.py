"""Texts in pictures."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from d2v_scale.batch import Batch
from d2v_scale.plots.drawing import Drawing
from d2v_scale.plots.samples import grid_figure, valid_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class TextDrawing(Drawing):
    """Tokens, the hidden ones in colour."""

    def masks(self, batch: Batch, masked_bmt: np.ndarray, decode: Callable[[int], str] | None) -> "Figure":
        """A row a sample, with a line for each clone."""
        samples = len(masked_bmt)
        figure = grid_figure(samples, 1, side=0.9, width=11)
        for row in range(samples):
            axes = figure.add_subplot(samples, 1, row + 1)
            _draw_tokens(axes, batch.inputs[row, : valid_length(batch, row)].tolist(), masked_bmt[row], decode)
        return figure

    def sample(self, batch: Batch, row: int, decode: Callable[[list[int]], str] | None) -> str:
        """Its words, or the ids of its tokens."""
        ids: list[int] = (batch.inputs[row] if batch.valid is None else batch.inputs[row, batch.valid[row]]).tolist()
        return decode(ids) if decode else " ".join(map(str, ids))


def _draw_tokens(axes: "Axes", ids: Sequence[int], masked_mt: np.ndarray, decode: Callable[[int], str] | None) -> None:
    shown = min(len(ids), 40)
    axes.imshow(masked_mt[:, :shown], aspect="auto", cmap="Oranges", vmin=0, vmax=1.6, interpolation="nearest")
    axes.set_yticks([], [])
    names = [decode(token) if decode else str(token) for token in ids[:shown]]
    axes.set_xticks(range(shown), names, rotation=60, ha="right", fontsize=6)

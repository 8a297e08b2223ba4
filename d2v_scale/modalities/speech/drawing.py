"""Recordings in pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.plots.drawing import Drawing
from d2v_scale.plots.samples import draw_waveform, grid_figure, plot_similarity, valid_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RecordingDrawing(Drawing):
    """Waveforms, their hidden spans in colour."""

    def masks(self, batch: Batch, masked_bmt: np.ndarray, decode: Callable[[int], str] | None) -> "Figure":
        """A row a sample, with a band for each clone."""
        del decode
        samples, clones, _ = masked_bmt.shape
        figure = grid_figure(samples, 1, side=1.2, width=11)
        for row in range(samples):
            axes = figure.add_subplot(samples, 1, row + 1)
            draw_waveform(axes, batch.inputs[row], valid_length(batch, row))
            seconds = batch.inputs.shape[1] / SAMPLE_RATE
            low, high = axes.get_ylim()
            for clone in range(clones):
                top, height = high - clone * (high - low) / clones, (high - low) / clones
                extent = (0.0, seconds, top - 0.94 * height, top)
                spans = np.where(masked_bmt[row, clone], 1.0, np.nan)[None]
                axes.imshow(spans, extent=extent, aspect="auto", cmap="Oranges", alpha=0.5, vmin=0, vmax=1.6)
        return figure

    def sample(self, batch: Batch, row: int, decode: Callable[[list[int]], str] | None) -> Tensor:
        """(samples,)."""
        del decode
        return batch.inputs[row] if batch.valid is None else batch.inputs[row, batch.valid[row]]

    def features(
        self, batch: Batch, states_btd: Tensor, valid_bt: Tensor | None, labels: list[str], place: Callable[[str], Path]
    ) -> list[Path]:
        """How alike the frames of the first recording are."""
        frames = states_btd.shape[1] if valid_bt is None else int(valid_bt[0].sum())
        wave = batch.inputs[0] if batch.valid is None else batch.inputs[0, : int(batch.valid[0].sum())]
        title = f"teacher's frames: {labels[0]}, {wave.shape[0] / SAMPLE_RATE:.2f} s"
        return [plot_similarity(wave, states_btd[0, :frames], place("similarity"), title=title)]

"""Arrays of any kind in pictures, as they are stored."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from d2v_scale.plots.samples import grid_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHANNELS = 16
_FRAMES = 6
_PIXELS = 512


def plot_arrays(arrays: list[NDArray], names: list[str], path: Path) -> Path:
    """A row for each array (C, axis_1 ... axis_n): of one axis lines, one a channel; of two a picture a channel, or one
    in colour where there are three; of three or four such pictures at places along the first axes."""
    pictures = [_lines_or_pictures(array) for array in arrays]
    columns = max(map(len, pictures))
    figure = grid_figure(len(arrays), columns, side=1.6, width=max(8.0, 1.8 * columns))
    for row, (array, name, shown) in enumerate(zip(arrays, names, pictures, strict=True)):
        for column, (title, values) in enumerate(shown):
            axes = figure.add_subplot(len(arrays), columns, row * columns + column + 1)
            axes.set_title(f"{name} {array.shape} {title}".strip() if column == 0 else title, fontsize=6)
            axes.tick_params(labelsize=6)
            _draw_lines(axes, values) if array.ndim == 2 else _draw_picture(axes, values)
    return save(figure, path, "arrays as they are stored")


def _lines_or_pictures(array: NDArray) -> list[tuple[str, NDArray]]:
    """Titles and values: (C, T) lines, or (H, W) and (H, W, 3) pictures."""
    values = array.astype(np.float64)
    if values.ndim == 2:
        return [("", values)]
    if values.ndim == 3:
        if len(values) == 3:
            return [("", np.moveaxis(values, 0, -1))]
        return [(f"channel {channel + 1}", one) for channel, one in enumerate(values[:_FRAMES])]
    while values.ndim > 4:  # of the last of the axes that no picture has, the middle
        values = values[:, :, values.shape[2] // 2]
    frames = np.unique(np.linspace(0, values.shape[1] - 1, _FRAMES).astype(int))
    return [(f"at {frame}", _lines_or_pictures(values[:, frame])[0][1]) for frame in frames]


def _draw_lines(axes: "Axes", values_ct: NDArray) -> None:
    every = max(1, values_ct.shape[1] // (4 * _PIXELS))
    steps = np.arange(0, values_ct.shape[1], every)
    for values_t in values_ct[:_CHANNELS]:
        axes.plot(steps, values_t[::every], linewidth=0.7)
    axes.margins(x=0)


def _draw_picture(axes: "Axes", values: NDArray) -> None:
    """From the 1st to the 99th percentile of what is there; what is missing stays blank."""
    every = [max(1, side // _PIXELS) for side in values.shape[:2]]
    values = values[:: every[0], :: every[1]]
    low, high = np.nanpercentile(values, [1, 99]) if np.isfinite(values).any() else (0.0, 1.0)
    values = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    axes.imshow(values, aspect="auto" if values.ndim == 2 else "equal", cmap="magma", interpolation="nearest")
    axes.set_xticks([], [])
    axes.set_yticks([], [])

"""Pictures of samples: what is masked, and what the teacher sees in them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.model.stem_config import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLUSTERS = 8
_ENOUGH_TO_CENTRE = 12


def plot_masks(
    batch: Batch,
    kind: Kind,
    path: Path,
    *,
    samples: int = 6,
    clones: int = 4,
    decode: Callable[[int], str] | None = None,
) -> Path:
    """Draw the masks of the first samples and clones on the samples themselves.

    `kind`: of the stem that reads them. `decode`: a token id to its text, for a text batch.
    """
    samples = min(samples, batch.inputs.shape[0])
    clones = min(clones, batch.clones)
    masked_bmt = batch.masked_rt.reshape(-1, batch.clones, batch.masked_rt.shape[1])[:samples, :clones].cpu().numpy()
    real = 1.0 if batch.valid is None else float(batch.valid[:samples].float().mean())
    share = masked_bmt.mean() / max(real, 1e-9)
    figure = modalities.class_of(kind).build_drawing().masks(batch, masked_bmt, decode)
    return save(figure, path, f"masks: {share:.0%} of the positions hidden, {clones} of {batch.clones} clones")


def plot_pca(images_bchw: Tensor, features_btd: Tensor, path: Path, *, grid: tuple[int, ...], samples: int = 8) -> Path:
    """The first three principal components of the teacher's patch features as red, green and blue.

    Components over all patches of all samples together, so that one colour means one thing in the whole picture. What
    all samples have in common at a position (the position itself) is subtracted, where there are enough of them.
    """
    samples = min(samples, images_bchw.shape[0])
    features_btd = features_btd.float()
    if features_btd.shape[0] >= _ENOUGH_TO_CENTRE:
        features_btd = features_btd - features_btd.mean(dim=0)
    rgb_btc = principal_colours(features_btd)
    figure = grid_figure(2, samples, side=1.5)
    for index in range(samples):
        show(figure.add_subplot(2, samples, index + 1), to_image(images_bchw[index]))
        colours = rgb_btc[index].reshape(*grid, 3).cpu().numpy()
        show(figure.add_subplot(2, samples, samples + index + 1), colours)
    return save(figure, path, "teacher's patch features: three principal components as colours")


def principal_colours(features_btd: Tensor) -> Tensor:
    """(B, T, 3) in [0, 1]: the three leading principal components, cut at the 2nd and 98th percentile."""
    flat_nd = features_btd.reshape(-1, features_btd.shape[-1]).float()
    flat_nd = flat_nd - flat_nd.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat_nd, full_matrices=False)
    scores = flat_nd @ directions[:3].T
    low, high = (torch.quantile(scores, q, dim=0) for q in (0.02, 0.98))
    colours = ((scores - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    return colours.reshape(*features_btd.shape[:2], -1)


def plot_similarity(waveform_s: Tensor, features_td: Tensor, path: Path, *, title: str = "") -> Path:
    """Under a waveform: the cosine similarity of every frame with every other, and the cluster each frame falls in.

    `features_td`: the teacher's output for the frames of `waveform_s` (16 kHz), padding cut off from both.
    """
    from sklearn.cluster import KMeans

    frames_td = features_td.float().cpu()
    # What all frames share (position, level) would hide what tells them apart.
    centred_td = torch.nn.functional.normalize(frames_td - frames_td.mean(dim=0), dim=-1)
    seconds = waveform_s.shape[0] / SAMPLE_RATE
    clusters = KMeans(min(_CLUSTERS, len(frames_td)), n_init=4, random_state=0).fit_predict(centred_td.numpy())
    figure = grid_figure(1, 1, side=7, width=6)
    wave, track, matrix = figure.subplots(3, 1, height_ratios=(1.2, 0.35, 6))
    draw_waveform(wave, waveform_s, waveform_s.shape[0])
    wave.set_xlim(0, seconds)
    track.imshow(
        clusters[None], extent=(0, seconds, 0, 1), aspect="auto", cmap="tab10", vmin=0, vmax=9, interpolation="nearest"
    )
    track.set_yticks([], [])
    track.set_ylabel("cluster", fontsize=7, rotation=0, ha="right", va="center")
    image = matrix.imshow(
        (centred_td @ centred_td.T).numpy(),
        extent=(0, seconds, seconds, 0),
        cmap="magma",
        vmin=-0.5,
        vmax=1,
        aspect="auto",
    )
    matrix.set_xlabel("seconds")
    matrix.set_ylabel("seconds")
    figure.colorbar(image, ax=matrix, label="cosine similarity (centred)", fraction=0.04)
    return save(figure, path, title or "teacher's frames: similarity with one another")


def to_image(image_chw: Tensor) -> np.ndarray:
    """(H, W, 3) in [0, 1] from a normalised image: stretched between its extremes."""
    image = image_chw.float().cpu()
    image = (image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-6)
    return image.permute(1, 2, 0).expand(-1, -1, 3).numpy()


def log_spectrogram(waveform_s: Tensor, bands: int = 96) -> np.ndarray:
    """(bands, frames): log power up to 6 kHz, 25 ms windows every 10 ms; a picture, not a feature."""
    window = torch.hann_window(400)
    if waveform_s.shape[0] < 400:
        waveform_s = torch.nn.functional.pad(waveform_s, (0, 400 - waveform_s.shape[0]))
    spectrum = torch.stft(waveform_s.float().cpu(), 512, 160, 400, window, return_complex=True).abs()
    return spectrum[:192].clamp(min=1e-4).log().reshape(bands, -1, spectrum.shape[1]).mean(dim=1).numpy()


def valid_length(batch: Batch, row: int) -> int:
    return batch.inputs.shape[1] if batch.valid is None else int(batch.valid[row].sum())


def draw_waveform(axes: "Axes", waveform_s: Tensor, valid: int) -> None:
    wave = waveform_s[:valid].float().cpu().numpy()
    width = max(1, len(wave) // 1500)  # samples a column of the picture
    columns = wave[: len(wave) // width * width].reshape(-1, width)
    seconds = (np.arange(len(columns)) + 0.5) * width / SAMPLE_RATE
    axes.fill_between(seconds, columns.min(axis=1), columns.max(axis=1), linewidth=0.3, color="#3a3f4b")
    limit = 1.05 * float(np.abs(wave).max(initial=1e-6))
    axes.set_ylim(-limit, limit)
    axes.autoscale(False)
    axes.set_xlim(0, waveform_s.shape[0] / SAMPLE_RATE)
    axes.set_yticks([], [])
    axes.tick_params(labelsize=7)


def grid_figure(rows: int, columns: int, side: float, width: float | None = None) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width or side * columns, side * rows + 0.4), layout="constrained")


def show(axes: "Axes", image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_axis_off()


def save(figure: "Figure", path: Path, title: str) -> Path:
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path

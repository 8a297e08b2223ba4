"""All pictures of one encoder on one labelled batch: what it hides, what it sees, what it finds alike."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.data.batch import Batch, Layout
from d2v_scale.data2vec import masking
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.evaluation.features import mean_over_positions
from d2v_scale.plots.relations import Sample, plot_cka, plot_neighbours
from d2v_scale.plots.samples import SAMPLE_RATE, plot_masks, plot_pca, plot_similarity


def draw_gallery(
    folder: Path,
    batch: Batch,
    labels: Sequence[str],
    teacher_lbtd: Sequence[Tensor],
    valid_bt: Tensor | None,
    *,
    masks: MaskingConfig,
    seed: int,
    step: int,
    student_lbtd: Sequence[Tensor] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> list[Path]:
    """Draw what fits the modality into `folder`; returns the files.

    `teacher_lbtd`, `student_lbtd`: outputs of the main blocks on the whole batch, nothing masked. `masks`: how the run
    masks; the pictures show the masks of these samples at `step`. `decode`: token ids to text.
    """
    teacher = [x_btd.float().cpu() for x_btd in teacher_lbtd]
    valid_bt = None if valid_bt is None else valid_bt.cpu()
    batch = batch.to(torch.device("cpu"))
    word = None if decode is None else (lambda token: decode([token]))
    paths = [plot_masks(masked(batch, valid_bt, masks, seed, step), folder / "masks.png", decode=word)]
    pooled = torch.stack([mean_over_positions(x_btd, valid_bt) for x_btd in teacher])
    features = torch.nn.functional.layer_norm(pooled[-4:], pooled.shape[-1:]).mean(dim=0)
    # Pooled features share a large part; without it the cosines would all be near 1.
    features = features - features.mean(dim=0)
    samples = [_sample(batch, row, decode) for row in range(len(labels))]
    paths.append(plot_neighbours(features, samples, labels, folder / "neighbours.png"))
    if batch.modality == "vision":
        paths.append(plot_pca(batch.inputs, teacher[-1], folder / "pca.png"))
    if batch.modality == "speech":
        frames = teacher[-1].shape[1] if valid_bt is None else int(valid_bt[0].sum())
        wave = batch.inputs[0] if batch.valid is None else batch.inputs[0, : int(batch.valid[0].sum())]
        title = f"teacher's frames: {labels[0]}, {wave.shape[0] / SAMPLE_RATE:.2f} s"
        paths.append(plot_similarity(wave, teacher[-1][0, :frames], folder / "similarity.png", title=title))
    other = (
        pooled if student_lbtd is None else torch.stack([mean_over_positions(x, valid_bt) for x in _cpu(student_lbtd)])
    )
    name = "teacher" if student_lbtd is None else "student"
    paths.append(plot_cka(pooled, other, folder / "cka.png", row_name="teacher", column_name=name))
    return paths


def masked(batch: Batch, valid_bt: Tensor | None, config: MaskingConfig, seed: int, step: int) -> Batch:
    """The batch with the masks its samples would get in training at `step`."""
    positions = batch.masked_rt.shape[1]
    side = round(positions**0.5)
    masks = masking.collate(
        config,
        length=None if batch.modality == "vision" else positions,
        grid=(side, side) if batch.modality == "vision" else None,
        sample_ids=batch.sample_ids.numpy(),
        valid_lengths=None if valid_bt is None else valid_bt.sum(dim=1).numpy(),
        seed=seed,
        step=step,
    )
    masked_rt = torch.from_numpy(masks.masked_rt)
    return replace(batch, masked_rt=masked_rt, layout=Layout.of(masked_rt))


def _cpu(layers: Sequence[Tensor]) -> list[Tensor]:
    return [x_btd.float().cpu() for x_btd in layers]


def _sample(batch: Batch, row: int, decode: Callable[[list[int]], str] | None) -> Sample:
    if batch.modality == "vision":
        return batch.inputs[row]
    sample = batch.inputs[row] if batch.valid is None else batch.inputs[row, batch.valid[row]]
    if batch.modality == "speech":
        return sample
    ids: list[int] = sample.tolist()
    return decode(ids) if decode else " ".join(map(str, ids))

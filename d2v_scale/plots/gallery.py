"""All pictures of one encoder on one batch: what it hides, what it sees, what it finds alike.

A run collects a `Gallery` in its ranks and has it drawn by a process of its own, the program in this file.
"""

import os
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch, Layout
from d2v_scale.data2vec import masking
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.evaluation.features import mean_over_layers
from d2v_scale.evaluation.knn import whitened
from d2v_scale.modalities.text.tokenizer import open_tokenizer
from d2v_scale.model.stem_config import Kind
from d2v_scale.plots.relations import plot_cka, plot_neighbours
from d2v_scale.plots.samples import plot_masks

FIRST = 16
"""Samples of which every position is held: what all of them share at a position can be told from the rest."""
_LAST_LAYERS = 4
_BATCH_FIELDS = ("modality", "inputs", "valid", "masked_rt", "sample_ids", "keys", "grid", "extra_tokens", "real_bt")


@dataclass(kw_only=True)
class Gallery:
    """What the pictures are drawn from, on the CPU. N samples, L main blocks."""

    batch: Batch
    """The samples, nothing masked."""
    kind: Kind
    """Of the stem that reads them."""
    labels: list[str]
    valid_bt: Tensor | None
    """True where a position is real; None: all are."""
    teacher_lnd: Tensor
    """Outputs of the encoder's blocks, mean over the valid positions, float32."""
    first_btd: Tensor
    """The last block's output for the first samples (`FIRST`), float32."""
    masks: MaskingConfig
    equal_counts: bool = True
    """Whether all rows mask equally many (2.0)."""
    seed: int
    step: int
    tokenizer: str | None = None
    """Of text."""
    encoder: Literal["teacher", "student"] = "teacher"
    """Whose outputs `teacher_lnd` and `first_btd` are: the student's, where no teacher follows it."""
    student_lnd: Tensor | None = None
    """As `teacher_lnd`; None: its layers are compared with one another only."""
    suffix: str = ""
    """Of the names of files: of a run with several stems, which each have their pictures."""

    def save(self, path: Path) -> None:
        """Write it, for another process to draw."""
        held: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        held["batch"] = {name: getattr(self.batch, name) for name in _BATCH_FIELDS}
        held["masks"] = asdict(self.masks)
        torch.save(held, path)

    @classmethod
    def load(cls, path: Path) -> "Gallery":
        """What `save` wrote."""
        held = torch.load(path, weights_only=True)
        batch = Batch(**held.pop("batch"))
        return cls(batch=batch, masks=MaskingConfig(**held.pop("masks")), **held)


def draw_gallery(folder: Path, gallery: Gallery) -> list[Path]:
    """Draw what fits the modality into `folder`; returns the files."""
    batch, labels, valid_bt = gallery.batch, gallery.labels, gallery.valid_bt
    tokenizer = open_tokenizer(Path(gallery.tokenizer)) if gallery.tokenizer else None
    decode, word = (tokenizer.decode, tokenizer.piece) if tokenizer else (None, None)
    shown = masked(batch, valid_bt, gallery.masks, gallery.seed, gallery.step, gallery.equal_counts)

    def place(name: str) -> Path:
        return folder / f"{name}{gallery.suffix}.png"

    paths = [plot_masks(shown, gallery.kind, place("masks"), decode=word)]
    features = mean_over_layers(gallery.teacher_lnd[-_LAST_LAYERS:])
    features, _ = whitened(features, features)  # as for the k-NN accuracy
    drawing = modalities.class_of(gallery.kind).build_drawing()
    samples = [drawing.sample(batch, row, decode) for row in range(len(labels))]
    paths.append(plot_neighbours(features, samples, labels, place("neighbours")))
    first_btd = gallery.first_btd
    paths += drawing.features(batch, first_btd, valid_bt, labels, place)
    layers = gallery.teacher_lnd
    pairs = [(gallery.encoder, layers)] + ([] if gallery.student_lnd is None else [("student", gallery.student_lnd)])
    for name, other in pairs:  # how alike layers are, and how near two networks are, are two questions
        path = place(f"layers_{gallery.encoder}_{name}")
        paths.append(plot_cka(layers, other, path, row_name=gallery.encoder, column_name=name))
    return paths


def masked(
    batch: Batch, valid_bt: Tensor | None, config: MaskingConfig, seed: int, step: int, equal_counts: bool = True
) -> Batch:
    """The batch with the masks its samples would get in training at `step`."""
    masks = masking.collate(
        config,
        grid=batch.extents,
        sample_ids=batch.sample_ids.numpy(),
        valid_lengths=None if valid_bt is None else _reach(batch, valid_bt, config).numpy(),
        seed=seed,
        step=step,
        equal_counts=equal_counts,
        real_bt=None if batch.real_bt is None else batch.real_bt.numpy(),
    )
    masked_rt = torch.from_numpy(masks.masked_rt)
    return replace(batch, masked_rt=masked_rt, layout=Layout.of(masked_rt, batch.real_bt))


def _reach(batch: Batch, valid_bt: Tensor, config: MaskingConfig) -> Tensor:
    """How far each sample reaches as `masking.collate` counts it: along every axis for `blocks`, else positions.

    Values that are missing within it do not shorten it; where they are its last, it is drawn as if it ended before.
    """
    if config.kind != "blocks":
        return _last(valid_bt)
    planes = valid_bt.view(len(valid_bt), *batch.extents)
    along = (
        planes.movedim(axis, 1).flatten(1).unflatten(1, (extent, -1)) for axis, extent in enumerate(batch.extents, 1)
    )
    return torch.stack([_last(real_bnx.any(dim=2)) for real_bnx in along], dim=1)


def _last(real_bn: Tensor) -> Tensor:
    """(B,): the number of the last true one, from 1; 0 where there is none."""
    return (real_bn * torch.arange(1, real_bn.shape[1] + 1)).amax(dim=1)


def main() -> int:
    """Draw saved galleries into a run directory's plots and have MLflow keep them: what `RunTracker` starts. One that
    cannot be drawn is in the log, and the others are drawn."""
    from d2v_scale.tracking.events import append_event

    run_dir, *saved = map(Path, sys.argv[1:])
    os.nice(10)
    failed = 0
    for one in saved:
        try:
            paths = draw_gallery(run_dir / "plots", Gallery.load(one))
        except Exception:
            traceback.print_exc()
            failed += 1
            continue
        finally:
            one.unlink(missing_ok=True)
        for path in paths:
            append_event(run_dir, "artifact", path=str(path.relative_to(run_dir)), folder="plots")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

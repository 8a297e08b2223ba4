"""All pictures of a run: curves, masks, what the teacher sees, neighbours, layers."""

from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import UserError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.interop.exporting import pick_modality
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.plots.curves import plot_health
from d2v_scale.plots.gallery import FIRST, Gallery, draw_gallery


def draw(run: Path, data: str | None, samples: int, modality: str | None = None) -> list[Path]:
    """All pictures of a run."""
    health = plot_health(run)
    paths = [] if health is None else [health]
    teacher = FrozenEncoder.load(run)
    recipe = teacher.recipe
    shards = data or recipe.evaluation.test
    if shards is None:
        raise UserError("The recipe names no labelled shards.", "Give some with --data.")
    labelled = LabelledSet(shards, pick_modality(recipe, modality), recipe.data, recipe.model, samples, samples)
    batch, labels_b = next(iter(labelled))
    moved = batch.to(teacher.device)
    names = labelled.classes or []
    valid_bt = teacher.valid_positions(moved)

    def pooled(states: list[Tensor]) -> Tensor:
        return torch.stack([mean_over_positions(x_btd, valid_bt) for x_btd in states]).cpu()

    with torch.no_grad():
        teacher_states = teacher.hidden_states(moved)
        student_states = FrozenEncoder.load(run, "student").hidden_states(moved)
    gallery = Gallery(
        batch=batch,
        kind=recipe.model.kind(batch.modality),
        labels=[names[label] if label < len(names) else str(label) for label in labels_b.tolist()],
        valid_bt=None if valid_bt is None else valid_bt.cpu(),
        teacher_lnd=pooled(teacher_states),
        first_btd=teacher_states[-1][:FIRST].cpu(),
        masks=recipe.masking_of(batch.modality),
        equal_counts=recipe.model.visible_only,
        seed=recipe.seed,
        step=teacher.step,
        tokenizer=str(labelled.tokenizer) if labelled.tokenizer else None,
        student_lnd=pooled(student_states),
    )
    return paths + draw_gallery(run / "plots", gallery)

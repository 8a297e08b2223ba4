"""All pictures of a run: curves, masks, what the teacher sees, neighbours, layers."""

from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import UserError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.evaluation.online import LabelNames
from d2v_scale.interop.exporting import pick_modality
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.plots.curves import plot_health
from d2v_scale.plots.gallery import FIRST, Gallery, draw_gallery


def draw(run: Path, data: str | None, samples: int, modality: str | None = None) -> tuple[list[Path], list[str]]:
    """All pictures of a run, of every stem or of `modality` alone; returns the files, and what could not be drawn and
    why. Raises UserError where no stem has pictures."""
    health = plot_health(run)
    paths = [] if health is None else [health]
    teacher, student = FrozenEncoder.load(run), FrozenEncoder.load(run, "student")
    stems = teacher.recipe.model.modalities
    if modality is not None or len(stems) < 2:
        stem = pick_modality(teacher.recipe, modality)
        return paths + draw_gallery(run / "plots", _gallery(teacher, student, stem, data, samples)), []
    without = []
    for stem in stems:
        try:
            paths += draw_gallery(run / "plots", _gallery(teacher, student, stem, data, samples))
        except UserError as error:
            without.append(f"{stem}: {error}")
    if len(without) == len(stems):
        raise UserError(" ".join(without))
    return paths, without


def _gallery(teacher: FrozenEncoder, student: FrozenEncoder, stem: str, data: str | None, samples: int) -> Gallery:
    """Of a stem's first samples of these shards. Raises UserError."""
    recipe = teacher.recipe
    named = recipe.evaluation.of(stem)
    shards = data or named.test or named.held_out
    if shards is None:
        raise UserError("The recipe names no labelled shards.", "Give some with --data.")
    labelled = LabelledSet(shards, stem, recipe.data, recipe.model, samples, samples, require_labels=False)
    found = next(iter(labelled), None)
    if found is None:
        raise labelled.nothing_readable()
    batch, labels_b = found
    moved = batch.to(teacher.device)
    tokenizer = str(labelled.tokenizer) if labelled.tokenizer else None
    names = LabelNames(labelled.classes or [], tokenizer)
    valid_bt = teacher.valid_positions(moved)

    def pooled(states: list[Tensor]) -> Tensor:
        return torch.stack([mean_over_positions(x_btd, valid_bt) for x_btd in states]).cpu()

    with torch.no_grad():
        teacher_states, student_states = teacher.hidden_states(moved), student.hidden_states(moved)
    # Of a run without a teacher that follows its student, both are the student.
    of_teacher = teacher.weights == "teacher"
    return Gallery(
        batch=batch,
        kind=recipe.model.kind(batch.modality),
        labels=[names.of(label) for label in labels_b.tolist()],
        valid_bt=None if valid_bt is None else valid_bt.cpu(),
        teacher_lnd=pooled(teacher_states),
        first_btd=teacher_states[-1][:FIRST].cpu(),
        masks=recipe.masking_of(batch.modality),
        equal_counts=recipe.model.visible_only,
        seed=recipe.seed,
        step=teacher.step,
        tokenizer=tokenizer,
        encoder="teacher" if of_teacher else "student",
        student_lnd=pooled(student_states) if of_teacher else None,
        suffix=f"_{stem}" if len(recipe.model.modalities) > 1 else "",
    )

"""Draw the pictures of a run into its plots folder: curves, masks, what the teacher sees, neighbours, layers.

python tools/draw.py runs/vit [--data 'test/*.tar']
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.evaluation.features import mean_over_positions
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.interop.exporting import pick_modality
from d2v_scale.plots.curves import plot_health
from d2v_scale.plots.gallery import FIRST, Gallery, draw_gallery
from d2v_scale.tracking.events import append_event


def main() -> int:
    """Parse arguments, draw, print the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory; its newest checkpoint is drawn")
    parser.add_argument("--data", help="labelled shards; default: the recipe's evaluation.test")
    parser.add_argument("--samples", type=int, default=200, help="samples among which neighbours are looked for")
    parser.add_argument("--modality", help="which one, where the run has several")
    arguments = parser.parse_args()
    try:
        paths = draw(arguments.run, arguments.data, arguments.samples, arguments.modality)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for path in paths:
        print(path)
        append_event(arguments.run, "artifact", path=str(path.relative_to(arguments.run)), folder="plots")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())

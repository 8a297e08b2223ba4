"""Student and teacher with a target, without a program around them, and their checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_models

from d2v_scale.checkpoint import Checkpoint, training
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.recipe import Recipe, to_dict


def engines(
    name: str, target: dict[str, Any], precision: str = "fp32", further: Sequence[TargetConfig] = ()
) -> tuple[Any, Any, Recipe]:
    """Engines of a tiny model at ZeRO-1 in one process, and their recipe."""
    clones = 2 if name.startswith("v2") else 1
    objective = ObjectiveConfig(
        masking=MaskingConfig(clones=clones), target=TargetConfig(**target), further_targets=list(further)
    )
    recipe = Recipe(model=tiny_models.model(name), objective=objective)
    numbers = ds_config.RecipeNumbers(precision=precision)  # type: ignore[arg-type]
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, groups.single_process())
    student.module.train()
    return student, teacher, recipe


def saved(root: Path, student: Any, teacher: Any, recipe: Recipe | None = None) -> Checkpoint:
    """A checkpoint of them below `root`, which says their `recipe` where one is given."""
    writer = CheckpointWriter.create(root)
    extra = {} if recipe is None else {"recipe": to_dict(recipe)}
    writer.save(1, training.pieces(student, teacher), training.state(student, teacher), extra)
    assert writer.finish()
    return Checkpoint.open(root / "step-00000001")

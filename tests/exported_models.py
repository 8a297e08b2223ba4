"""Checkpoints of small models with random weights, and the tools that export and import them."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import tiny_models
import torch

from d2v_scale.checkpoint import write_single
from d2v_scale.data.config import DataConfig, VisionData
from d2v_scale.data2vec.config import LossConfig, ObjectiveConfig
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import Recipe, to_dict


def tool(name: str) -> ModuleType:
    return importlib.import_module(f"d2v_scale.commands.{name}")


def checkpoint_of(name: str, tmp_path: Path) -> Path:
    """A checkpoint whose student and teacher have different random weights."""
    objective = ObjectiveConfig(target=tiny_models.target_of(name))
    if name.startswith("v1_vision"):
        objective.loss = LossConfig(beta=2.0, reduction="mean_channels")
    return checkpoint_of_recipe(Recipe(name=name, model=tiny_models.model(name), objective=objective), tmp_path)


def checkpoint_of_recipe(recipe: Recipe, tmp_path: Path) -> Path:
    """Likewise, of any recipe."""
    torch.manual_seed(0)
    parts = recipe.parts()
    with undivided():
        shapes = {n: p.shape for n, p in Student(recipe.model).named_parameters()}
    student = {n: 0.3 * torch.randn(shape) + (n.endswith("norm1.weight")) for n, shape in shapes.items()}
    teacher = {n: t + 0.1 * torch.randn_like(t) for n, t in student.items() if parts.role(n) == "averaged"}
    teacher |= {n: t for n, t in student.items() if parts.role(n) == "copied"}
    extra = {"recipe": json.loads(json.dumps(to_dict(recipe)))}
    write_single(tmp_path / "run" / "checkpoints", student, teacher, extra)
    return tmp_path / "run"


def tuned(name: str, task: TaskConfig, tmp_path: Path, evaluation_crop: float = 0.875) -> Path:
    """A run directory with a fine-tuned model of random weights."""
    torch.manual_seed(0)
    recipe = Recipe(
        name=name,
        model=tiny_models.model(name),
        task=task,
        data=DataConfig(vision=VisionData(evaluation_crop=evaluation_crop)),
        objective=ObjectiveConfig(target=tiny_models.target_of(name)),
    )
    shapes = {n: p.shape for n, p in TaskModel(recipe.model, task).named_parameters()}
    student = {n: 0.3 * torch.randn(shape) + (n.endswith("norm1.weight")) for n, shape in shapes.items()}
    extra = {"recipe": json.loads(json.dumps(to_dict(recipe))), "classes": ["ant", "bee", "cow"]}
    write_single(tmp_path / "run" / "checkpoints", student, None, extra)
    return tmp_path / "run"

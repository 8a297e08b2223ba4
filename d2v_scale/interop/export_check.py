"""The same input through our encoder and an exported folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.checkpoint import Checkpoint, open_any
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.predictor import TaskPredictor
from d2v_scale.interop.encoder_source import EncoderSource, recipe_of
from d2v_scale.interop.exporting import ChosenWeights
from d2v_scale.interop.huggingface import model_of, row_of
from d2v_scale.interop.importing import open_source
from d2v_scale.interop.keymap import import_tensors
from d2v_scale.interop.task_heads import auto_class
from d2v_scale.recipe import Recipe

LARGEST_DIFFERENCE = 1e-4
LARGEST_RELATIVE_DIFFERENCE = 0.02
"""With weights in float16, which have 11 bits: an error of 1 / 2048 in each at most."""
Pairs = list[tuple[Tensor, Tensor]]
"""Outputs of our model, and of what was exported."""


def limit_of(half: bool) -> float:
    """What outputs may differ by: absolutely, or relative with weights in float16."""
    return LARGEST_RELATIVE_DIFFERENCE if half else LARGEST_DIFFERENCE


def largest(pairs: Pairs, *, relative: bool) -> float:
    """Largest absolute difference; or, relative, the largest norm of the difference of a pair in the norm of ours."""
    # torch's max, which passes a NaN on wherever it stands.
    found = [(a - b).norm() / a.norm() if relative else (a - b).abs().max() for a, b in pairs]
    return float(torch.stack(found).max())


def exported_pairs(
    checkpoint: Checkpoint, task: TaskConfig | None, folder: Path, modality: str, weights: Literal["teacher", "student"]
) -> Pairs:
    """Outputs of a checkpoint and of a Hugging Face folder made of it: of all blocks, or logits."""
    if task is not None:
        return [logit_pair(TaskPredictor.load(checkpoint.path), folder, modality)]
    return output_pairs(FrozenEncoder.load(checkpoint.path, weights), folder, modality, checkpoint)


@torch.no_grad()
def output_pairs(encoder: FrozenEncoder, folder: Path, modality: str, checkpoint: Checkpoint) -> Pairs:
    """The outputs of all main blocks (and the final norm) at valid positions, of ours and of an exported folder.

    Loads the folder as a user would, through `AutoModel`; a modelling file in it is the one written by this package.
    """
    from transformers import AutoModel

    config = encoder.recipe.model
    exported: Any = AutoModel.from_pretrained(folder, trust_remote_code=True).eval().float()
    batch, arguments = row_of(config, modality).sample(model_of(config, modality), modality)
    ours = [states.cpu() for states in encoder.hidden_states(batch.to(encoder.device))]
    theirs = exported(**arguments, output_hidden_states=True)
    extra = modalities.of(config, modality).extra_tokens
    before = len(theirs.hidden_states) - len(ours)
    pairs = [(mine, theirs.hidden_states[before + i][:, extra:]) for i, mine in enumerate(ours)]
    if config.backbone.final_norm:
        chosen = ChosenWeights(checkpoint, "student" if encoder.weights == "student" else "teacher")
        weight, bias = chosen("final_norm.weight"), chosen("final_norm.bias")
        normed = F.layer_norm(ours[-1], ours[-1].shape[-1:], weight, bias, config.backbone.norm_eps)
        pairs.append((normed, theirs.last_hidden_state[:, extra:]))
    valid = encoder.valid_positions(batch)
    return [(_at(valid, mine), _at(valid, other)) for mine, other in pairs]


@torch.no_grad()
def logit_pair(predictor: TaskPredictor, folder: Path, modality: str) -> tuple[Tensor, Tensor]:
    """Both logits, at valid positions."""
    import transformers

    config = predictor.recipe.model
    loader = getattr(transformers, auto_class(predictor.task, config, modality))
    exported: Any = loader.from_pretrained(folder, trust_remote_code=True).eval().float()
    batch, arguments = row_of(config, modality).sample(config.of(modality), modality)
    ours, theirs = predictor.logits(batch.to(predictor.device)).cpu(), exported(**arguments).logits
    valid = predictor.model.encoder.valid_positions(batch) if predictor.task.kind == "ctc" else None
    return _at(valid, ours), _at(valid, theirs)


def _at(valid_bt: Tensor | None, x_btd: Tensor) -> Tensor:
    return x_btd if valid_bt is None else x_btd[valid_bt.cpu()]


@torch.no_grad()
def pairs_of_ours(checkpoint: Path, folder: Path, weights: Literal["teacher", "student"]) -> Pairs:
    """The last block's outputs of every stem, or the logits, of a checkpoint and of an export under our own names."""
    config = recipe_of(open_any(checkpoint)).model
    if recipe_of(open_any(checkpoint)).task is None:
        encoders = FrozenEncoder.load(checkpoint, weights), FrozenEncoder.load(folder)
        return [_states(*encoders, modality) for modality in config.modalities]
    [modality] = config.modalities
    batch, _ = row_of(config, modality).sample(config.of(modality), modality)
    predictors = TaskPredictor.load(checkpoint), TaskPredictor.load(folder)
    ours, theirs = (one.logits(batch.to(one.device)).cpu() for one in predictors)
    valid = predictors[0].model.encoder.valid_positions(batch) if predictors[0].task.kind == "ctc" else None
    return [(_at(valid, ours), _at(valid, theirs))]


@torch.no_grad()
def reference_pairs(checkpoint: Path, folder: Path, modality: str) -> Pairs:
    """The last block's outputs of the student, and of a file in the reference's names as we import it."""
    encoder = FrozenEncoder.load(checkpoint, "student")
    [file] = folder.glob("checkpoint.pt*")
    source = open_source(file)
    ours, _ = import_tensors(source.keymap, source.student)
    reference = source.reference
    recipe = Recipe(name=folder.name, model=reference.model, objective=reference.objective)
    again = FrozenEncoder.of(EncoderSource(file, recipe, ours.get), "student", encoder.device)
    return [_states(encoder, again, modality, reference.modality)]


def _states(encoder: FrozenEncoder, again: FrozenEncoder, modality: str, there: str = "") -> tuple[Tensor, Tensor]:
    """`there`: what the stem is called in the other one."""
    config = encoder.recipe.model
    batch, _ = row_of(config, modality).sample(config.of(modality), modality)
    batch = batch.to(encoder.device)
    valid = encoder.valid_positions(batch)
    ours = encoder.hidden_states(batch)[-1].cpu()
    theirs = again.hidden_states(replace(batch, modality=there or modality))[-1].cpu()
    return _at(valid, ours), _at(valid, theirs)

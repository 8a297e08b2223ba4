"""How long recipes run on the same set for the same compute: FLOPs of a step, and steps for a number of FLOPs."""

import dataclasses

import numpy as np

from d2v_scale.data.config import SAMPLE_RATE, SourceConfig
from d2v_scale.data.shard_set import find_shards
from d2v_scale.errors import DataError
from d2v_scale.planning.flops import SampleCost, cost_of
from d2v_scale.recipe import Recipe


def mean_length(recipe: Recipe, shards: str) -> float:
    """Mean length of a training sample of `shards`: samples of audio, tokens of a row (with <s>), or 1 for an image."""
    modality = recipe.model.modalities[0]
    if modality == "vision":
        return 1.0
    found = find_shards(SourceConfig(shards=shards, modality=modality))
    if not found.indexed:
        raise DataError(f"The shards of {shards!r} have no index.", "Make one with tools/index_shards.py.")
    length_n = np.concatenate([found.members(k).length_n for k in range(len(found.paths))])
    length_n = length_n[length_n > 0]  # 0: nothing of it is a row; -1: it could not be read
    if len(length_n) == 0:
        raise DataError(f"No sample of {shards!r} has a length.", "See tools/inspect_shards.py.")
    if modality == "speech":
        return float(length_n.clip(max=round(recipe.data.speech.max_seconds * SAMPLE_RATE)).mean())
    assert recipe.model.text is not None
    block = recipe.model.text.max_positions - 1
    if recipe.data.text.packing == "continuous":
        return float(block + 1)
    return float(1 + length_n.sum() / (-(-length_n // block)).sum())


def sample_cost_on(recipe: Recipe, shards: str) -> SampleCost:
    """FLOPs of a sample of mean length of `shards`; see planning/flops.py for what is counted."""
    modality, length = recipe.model.modalities[0], mean_length(recipe, shards)
    if modality == "speech":
        return cost_of(recipe, modality, seconds=length / SAMPLE_RATE)
    if modality == "text":
        assert recipe.model.text is not None
        text = dataclasses.replace(recipe.model.text, max_positions=max(2, round(length)))
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, text=text))
    return cost_of(recipe, modality)


def step_flops(recipe: Recipe, shards: str) -> float:
    """FLOPs of one optimizer step of the recipe on `shards`, student and teacher."""
    per_unit = {
        "samples": 1.0,
        "tokens": mean_length(recipe, shards),
        "seconds": mean_length(recipe, shards) / SAMPLE_RATE,
    }
    return recipe.global_batch_size / per_unit[recipe.batch_unit] * sample_cost_on(recipe, shards).total


def steps_for(recipe: Recipe, shards: str, flops: float) -> int:
    """Optimizer steps of the recipe on `shards` that come nearest to this many FLOPs; at least 1."""
    return max(1, round(flops / step_flops(recipe, shards)))


def stretched(recipe: Recipe, steps: int) -> tuple[str, ...]:
    """Arguments of train.py for a run of `steps`: warm-up and the teacher's annealing keep their share of the run."""
    share = steps / recipe.optim.max_steps
    return (
        f"--optim.warmup_steps={int(recipe.optim.warmup_steps * share)}",
        f"--objective.ema.anneal_steps={max(1, round(recipe.objective.ema.anneal_steps * share))}",
    )

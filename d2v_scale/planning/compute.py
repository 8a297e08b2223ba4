"""How long recipes run on the same sets for the same compute: FLOPs of a step, and steps for a number of FLOPs."""

from dataclasses import replace

import numpy as np

from d2v_scale import modalities
from d2v_scale.data.config import SAMPLE_RATE, SourceConfig
from d2v_scale.data.source import mixing_weights, open_source
from d2v_scale.errors import DataError
from d2v_scale.modalities.costs import Lengths
from d2v_scale.planning.flops import SampleCost, lengths_of, sample_cost
from d2v_scale.recipe import Recipe
from d2v_scale.shards.one_content import reading
from d2v_scale.shards.shard_set import find_shards


def mean_size(recipe: Recipe, source: SourceConfig, name: str) -> float | None:
    """Mean size of a training sample that the stem `name` reads from a source: samples of audio, tokens of a row (with
    <s>); None where all are of one size. Raises DataError for shards without an index."""
    stem = modalities.of(recipe.model, name)
    if stem.fixed_grid is not None:
        return None
    shards = source.shards
    found = reading(find_shards(replace(source, modality=name)), stem.content)
    if not found.indexed:
        raise DataError(f"The shards of {shards!r} have no index.", "Make one with `d2v index`.")
    length_n = np.concatenate([found.members(k).length_n for k in range(len(found.paths))])
    length_n = length_n[length_n > 0]  # 0: nothing of it is a row; -1: it could not be read
    if len(length_n) == 0:
        raise DataError(f"No sample of {shards!r} has a length.", "See `d2v inspect`.")
    return stem.mean_size(recipe.data, length_n)


def mean_sample(recipe: Recipe, source: SourceConfig) -> tuple[SampleCost, float]:
    """FLOPs of a sample of mean size of a source (of paired samples with all parts), see planning/flops.py for what is
    counted; and its size in the unit that the source's batches are counted in."""
    sizes = {stem: mean_size(recipe, source, stem) for stem in source.stems}
    each = {stem: lengths_of(recipe, stem, size) for stem, size in sizes.items()}
    lengths = Lengths.together(each) if len(each) > 1 else each[source.modality]
    teacher, targets = recipe.teacher.model, recipe.built_targets()
    reads_states = recipe.objective.reads_states(*source.stems)
    model, parts = recipe.model, recipe.parts()
    cost = sample_cost(model, source.modality, lengths, parts, targets, teacher, reads_states=reads_states)
    size = float(lengths.positions) if len(each) > 1 else sizes[source.modality] or 1.0
    units = {"samples": 1.0, "tokens": size, "seconds": size / SAMPLE_RATE}
    return cost, units[source.batch_unit or recipe.batch_unit]


def step_flops(recipe: Recipe) -> float:
    """FLOPs of an optimizer step of the recipe, student and teacher: where each reads one of several sources, of the
    mean of many. Raises DataError for shards without an index."""
    data = recipe.data
    flops = []
    for source in data.sources:
        cost, size = mean_sample(recipe, source)
        flops.append((source.batch_size or recipe.global_batch_size) / size * cost.total)
    if data.mixing == "together":
        return sum(flops)
    shares = [weight ** (1 / data.temperature) for weight in _weights(recipe)]
    return sum(share * one for share, one in zip(shares, flops, strict=True)) / sum(shares)


def _weights(recipe: Recipe) -> list[float]:
    """How much each source comes; shards are opened where `repeat` has their batches counted."""
    data = recipe.data
    if all(source.repeat is None for source in data.sources):
        return [source.weight for source in data.sources]
    sizes = [
        (source.batch_size or recipe.global_batch_size, source.batch_unit or recipe.batch_unit)
        for source in data.sources
    ]
    opened = [open_source(data, k, recipe.model, recipe.seed, 0, 1) for k in range(len(data.sources))]
    return mixing_weights(data, opened, sizes)


def steps_for(recipe: Recipe, flops: float) -> int:
    """Optimizer steps of the recipe that come nearest to this many FLOPs; at least 1."""
    return max(1, round(flops / step_flops(recipe)))


def stretched(recipe: Recipe, steps: int) -> tuple[str, ...]:
    """Arguments of train.py for a run of `steps`: warm-up, decay and the teacher's annealing keep their
    share of the run."""
    share = steps / recipe.optim.max_steps
    decay = recipe.optim.decay_from
    return (
        f"--optim.warmup_steps={int(recipe.optim.warmup_steps * share)}",
        f"--objective.ema.anneal_steps={max(1, round(recipe.objective.ema.anneal_steps * share))}",
        *(() if decay is None else (f"--optim.decay_from={int(decay * share)}",)),
    )

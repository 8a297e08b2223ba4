"""Which samples of a stem are looked at while training."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch.distributed as dist
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.config import SourceConfig
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import DataError
from d2v_scale.evaluation.config import EvaluationSet
from d2v_scale.recipe import Recipe
from d2v_scale.shards.shard_set import find_shards

log = logging.getLogger(__name__)

_OF_TRAINING = 16


@dataclass(frozen=True)
class Samples:
    """Batches with labels (-1: none)."""

    batches: list[tuple[Batch, Tensor]]
    tokenizer: str | None
    """Of text."""
    trained_on: bool
    redrawn: list[list[Batch]] = field(default_factory=list)
    """The same batches under other masks, all of them again and again."""


def named_for(recipe: Recipe, stem: str) -> EvaluationSet:
    """What the recipe names for a stem, without shards that are named for all stems and hold what others read alone:
    these are said."""
    named = recipe.evaluation.of(stem)
    if stem in recipe.evaluation.sets:
        return named
    of_others = [one.name for one in fields(named) if _is_of_others(recipe, stem, getattr(named, one.name))]
    for key in of_others:
        log.info(
            "evaluation.%s holds nothing that %s reads: evaluation.sets.%s.%s may name some.", key, stem, stem, key
        )
    return replace(named, **dict.fromkeys(of_others))


def _is_of_others(recipe: Recipe, stem: str, shards: str | None) -> bool:
    """Whether shards hold nothing that the stem reads, but what another one does. What cannot be found is not judged:
    whoever reads it says so."""
    try:
        index = find_shards(SourceConfig(shards=shards)).index if shards else None
    except DataError:
        return False
    held = index.contents if index is not None else []
    read = [modalities.of(recipe.model, name).content for name in recipe.model.modalities]
    return bool(set(held) & set(read)) and modalities.of(recipe.model, stem).content not in held


def samples_without_labels(
    recipe: Recipe, stem: str, named: EvaluationSet, limit: int, *, masked: bool, views: int = 1
) -> Samples | None:
    """Up to `limit` samples of the held-out shards that are `named` for a stem, or else a few of the first training
    shard that it reads.

    `masked`: as a training step would mask them, always alike; then held-out ones under `views` masks each or more,
    where all can be read as often. None, and a message why, where training shards cannot be read like this on every
    rank (no index, say). Raises DataError where named shards cannot. Collective: all ranks must call; all get the same.
    """
    shards = named.held_out or named.test
    source = next((one for one in recipe.data.sources if stem in one.stems), None)
    if shards is None and source is None:
        return None
    found, problem = None, None
    try:
        read = _set_of(recipe, stem, shards, source, limit, masked)
        found = Samples(read.read(), str(read.tokenizer) if read.tokenizer else None, shards is None)
        if masked and shards is not None:
            found.redrawn.extend(_redrawn(read, -(-views // recipe.masking_of(stem).clones) - 1))
    except DataError as error:
        problem = error
    batches = [] if found is None else found.batches
    try:
        again = [] if found is None else [(batch, batch.sample_ids) for one in found.redrawn for batch in one]
        require_same([*batches, *again], shards or (source.shards if source else ""))
    except DataError as error:
        problem = problem or error
    if problem is not None and shards is not None:
        raise problem
    if problem is not None:
        whose = f" of {stem}" if len(recipe.model.modalities) > 1 else ""
        log.info("No samples%s to look at while training: %s Or name some with evaluation.held_out.", whose, problem)
        return None
    if found is not None:
        keys = [batch.keys for batch, _ in batches]
        found.redrawn[:] = [one for one in found.redrawn if [batch.keys for batch in one] == keys]
    return found


def _redrawn(read: LabelledSet, times: int) -> Iterator[list[Batch]]:
    """The batches of a set under masks that are drawn anew, so many times."""
    for step in range(1, times + 1):
        read.step = step
        yield [batch for batch, _ in read.read()]


def require_same(batches: Sequence[tuple[Batch, Tensor]], shards: str) -> None:
    """Raises DataError, on every rank, unless all have read the same samples. Collective: all ranks must call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = [batch.keys for batch, _ in batches]
    everyone: list[list[tuple[str, ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if others:
        raise DataError(
            f"Ranks 0 and {others[0]} read different samples of {shards!r}.",
            "Their logs say what was lost; every node needs the whole set.",
        )


def _set_of(
    recipe: Recipe, stem: str, shards: str | None, source: SourceConfig | None, limit: int, masked: bool
) -> LabelledSet:
    """`shards`: the named ones; None: the first of the training `source` alone, as a large set would all be read for
    its index."""
    found = None
    if not shards:
        assert source is not None
        found = find_shards(replace(source, modality=stem)).one(0)
        shards, limit = source.shards, min(limit, _OF_TRAINING)
    masks = recipe.masking_of(stem)
    clones = masks.clones if masked else 1
    return LabelledSet(
        shards,
        stem,
        recipe.data,
        recipe.model,
        batch_size=max(1, recipe.evaluation.batch_size // clones),
        limit=limit,
        require_labels=False,
        masking=masks if masked else None,
        compat=recipe.objective.compat,
        min_seconds=modalities.of(recipe.model, stem).shortest_seconds(recipe.data),
        found=found,
    )

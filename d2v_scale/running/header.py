"""What a run says of itself before its first step: model, data, batch, ranks, and where everything is written."""

from typing import Any

import torch
import torch.distributed as dist

from d2v_scale.data.source import Source
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.parallel.groups import Topology
from d2v_scale.recipe import Recipe
from d2v_scale.redaction import redact
from d2v_scale.running import arithmetic
from d2v_scale.running.loop import AnyRun, last_step
from d2v_scale.shards.content import length_of, plural

_LABEL = 8
"""Columns of the first word of a line."""


def header(run: AnyRun[Any]) -> list[str]:
    """The lines, at most 80 columns but for paths and what has many sources. Collective: all ranks must call."""
    recipe, topology = run.recipe, run.topology
    parameters = _parameters(run)
    lines = [("model", f"{_model(recipe)}, {_short(parameters)} parameters")]
    lines += [("data", _data(recipe, source, k)) for k, source in enumerate(run.loader.sources)]
    lines += [
        ("batch", f"{_batch(recipe, topology)}; {_steps(run)}"),
        ("ranks", _ranks(run)),
        *(("compute", why) for why in [arithmetic.told(run.directory, run.student.precision)] if why),
        ("run", redact(str(run.directory))),
        ("look", redact(f"d2v report {run.directory}")),
    ]
    return [f"{label:{_LABEL}s}{text}" for label, text in lines]


def _steps(run: AnyRun[Any]) -> str:
    end, horizon = last_step(run), run.recipe.optim.max_steps
    text = f"{end:,} steps" if end == horizon else f"{end:,} of {horizon:,} steps (--stop_at)"
    return f"{text}, {run.step:,} are done" if run.step else text


def _model(recipe: Recipe) -> str:
    model, name = recipe.model, recipe.name or "unnamed recipe"
    stems = " + ".join(model.modalities)
    blocks = f"{model.backbone.depth} blocks of width {model.backbone.width}"
    if recipe.task is not None:
        return f"{name}: {recipe.task.kind} on {stems}, {blocks}"
    return f"{name}: data2vec {'2.0' if model.visible_only else '1.0'}, {stems}, {blocks}"


def _parameters(run: AnyRun[Any]) -> int:
    """Of what is trained and its heads, over all slices and stages."""
    topology, count = run.topology, 0
    for parameter in run.student.module.parameters():
        whole = getattr(parameter, "ds_numel", parameter.numel())  # at ZeRO-3 a parameter itself is empty
        count += whole * (topology.tensor_size if getattr(parameter, "tensor_model_parallel", False) else 1)
    if topology.pipeline_size > 1:
        counted = torch.tensor(count, device=topology.device)
        dist.all_reduce(counted, group=topology.pipeline_group)
        count = int(counted)
    return count


def _data(recipe: Recipe, source: Source | StreamedSource, number: int) -> str:
    given = recipe.data.sources[number]
    shards = f"{source.name}: " if len(recipe.data.sources) > 1 else ""
    shards += redact(given.shards)
    count = len(source.shards.paths)
    if isinstance(source, StreamedSource):
        return f"{shards}: {count} shards without an index, read as a stream"
    size = given.batch_size or recipe.global_batch_size
    unit = given.batch_unit or recipe.batch_unit
    samples = int(source.shards.samples_s.sum())
    paired = len(given.stems) > 1
    what = f"samples of {' + '.join(given.stems)}" if paired else plural(source.stem.content)
    parts = [f"{samples:,} {what} in {count:,} shard{'s' if count > 1 else ''}"]
    length = length_of(source.stem.content)
    if not paired and length.shown is not None and (total := int(source.shards.length_s.sum())) > 0:
        parts.append(_amount(total / length.shown[2], length.shown[1]))
    text = f"{shards}: {', '.join(parts)}"
    if recipe.data.sources_of_step() == len(recipe.data.sources):  # else the share of steps is drawn
        per_epoch = source.batches_per_epoch(size, unit)
        if per_epoch > 0:
            text += f"; {recipe.optim.max_steps / per_epoch:,.3g} epochs planned"
    return text


def _amount(amount: float, unit: str) -> str:
    if unit == "s":
        return f"{amount / 3600:,.1f} h" if amount >= 3600 else f"{amount / 60:,.1f} min"
    return f"{_short(amount)} {unit}"


def _batch(recipe: Recipe, topology: Topology) -> str:
    shares = topology.data_parallel_size * recipe.rounds
    own = {(s.batch_size or recipe.global_batch_size, s.batch_unit or recipe.batch_unit) for s in recipe.data.sources}
    if len(own) > 1:
        together = "all sources in every step, " if recipe.data.sources_of_step() > 1 else ""
        return f"{together}each source's own, in {shares} micro-batches"
    [(size, unit)] = own
    of_each = f" of each of {recipe.data.sources_of_step()} sources" if recipe.data.sources_of_step() > 1 else ""
    whole = f"{size:,g} {unit}{of_each} a step"
    if shares == 1:
        return whole
    return f"{whole} = {topology.data_parallel_size} x {recipe.rounds} micro-batches of {size / shares:,.4g}"


def _ranks(run: AnyRun[Any]) -> str:
    recipe, topology = run.recipe, run.topology
    parts = [f"{topology.world_size}"]
    if topology.model_size > 1:
        parts.append(
            f"data {topology.data_parallel_size} x tensor {topology.tensor_size} x pipeline {topology.pipeline_size}"
        )
    parts += [
        f"ZeRO-{run.student.stage}",
        run.student.precision,
        f"on {topology.device.type.upper().replace('CUDA', 'GPU')}",
    ]
    if recipe.task is None:
        parts.append(f"teacher on the {recipe.teacher.placement}")
    return ", ".join(parts)


def _short(number: float) -> str:
    """With three digits and a letter: 93.8 M."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"

"""FLOPs of a training sample, counted from the recipe alone.

Convention: 2 FLOPs per multiply-add of matrix products, convolutions and attention (both products, all pairs of
positions); norms, activations and softmax are not counted. In the last block of 1.0 what follows attention counts at
the positions that are read (`Layered.read`). The backward pass is 2 times the forward pass, except that the layer which
reads the raw input computes no gradient of it (1 time). Recomputation is no useful work and not part of these numbers
(`SampleCost.recomputed`). Layer drop is not subtracted: a dropped block counts as run.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2v_scale import modalities
from d2v_scale.data2vec import masking
from d2v_scale.data2vec.targets import Target
from d2v_scale.modalities.costs import Lengths
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import LayerKind, LayerSpec
from d2v_scale.model.stem_config import parts_of
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.layers import describe
from d2v_scale.recipe import Recipe

_DRAWN = 64
"""Masks that the mean number of masked positions is taken over, where it varies."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """FLOPs per sample of one layer: the student's over all of the sample's rows, the teacher's once."""

    layer: LayerSpec
    forward: float
    """Student, forward."""
    backward: float
    """Student, backward, without recomputation."""
    teacher: float
    """Teacher, forward. 0 where the teacher is given the student's values or does not run the layer."""

    @property
    def total(self) -> float:
        """Everything a training step does in this layer, for one sample."""
        return self.forward + self.backward + self.teacher

    def on_each(self, tensor: int) -> float:
        """What of `total` each of `tensor` tensor-parallel ranks computes."""
        return self.total / tensor if self.layer.sliced else self.total


@dataclass(frozen=True)
class SampleCost:
    """FLOPs of one training sample: student forward and backward, and the teacher's forward."""

    layers: tuple[LayerCost, ...]
    apart: tuple[LayerCost, ...] = ()
    """Layers of a teacher that is another model than the student, whose own have no teacher's part then."""

    def _sum(self, *kinds: LayerKind) -> float:
        return sum(one.forward + one.backward for one in self.layers if one.layer.kind in kinds)

    @cached_property
    def student(self) -> float:
        """Student's blocks, prenet included: forward and backward."""
        return self._sum("block")

    @cached_property
    def decoder(self) -> float:
        """Predictor, or 2.0 decoder: forward and backward."""
        return self._sum("predictor")

    @cached_property
    def stem(self) -> float:
        """Stems of both worlds; what the teacher shares counts once."""
        return self.student_stem + self._teacher("features", "context")

    @cached_property
    def student_stem(self) -> float:
        """The student's own stem: forward and backward."""
        return self._sum("features", "context")

    @cached_property
    def teacher(self) -> float:
        """Teacher's blocks, forward."""
        return self._teacher("block")

    def _teacher(self, *kinds: LayerKind) -> float:
        return sum(one.teacher for one in (*self.layers, *self.apart) if one.layer.kind in kinds)

    @cached_property
    def targets(self) -> float:
        """What makes targets of taps, and their states."""
        return sum(one.teacher for one in self.layers if one.layer.kind == "predictor")

    @property
    def apart_blocks(self) -> int:
        """Blocks of a teacher that is another model."""
        return sum(one.layer.kind == "block" for one in self.apart)

    @property
    def total(self) -> float:
        """Student, teacher, targets, decoder and stem."""
        return self.student + self.teacher + self.targets + self.decoder + self.stem

    @property
    def student_only(self) -> float:
        """Without what the teacher computes."""
        return self.student + self.decoder + self.student_stem

    @property
    def recomputed(self) -> float:
        """What activation checkpointing adds: the student's blocks forward once more."""
        return sum(one.forward for one in self.layers if one.layer.kind == "block")


@dataclass(frozen=True)
class Utilisation:
    """Model FLOPs utilisation, as a fraction of the peak."""

    total: float
    """Counting the teacher as useful work."""
    student_only: float
    """Counting what is trained."""


def mfu(cost: SampleCost, samples_per_second: float, devices: int, peak_flops: float) -> Utilisation:
    """Useful FLOP/s of all devices over their peak. `samples_per_second` over all devices, `peak_flops` of one."""
    rate = samples_per_second / (devices * peak_flops)
    return Utilisation(total=cost.total * rate, student_only=cost.student_only * rate)


def lengths_of(recipe: Recipe, modality: str, size: float | None = None) -> Lengths:
    """Lengths of the longest sample the recipe allows; `size`: of one of this size (`Modality.extent`). Of paired
    samples every part is as long as it may be."""
    if len(stems := parts_of(modality)) > 1:
        return Lengths.together({stem: lengths_of(recipe, stem) for stem in stems})
    model, config = recipe.model, recipe.masking_of(modality)
    stem = modalities.of(model, modality)
    inputs, grid = stem.extent(recipe.data, size)
    positions = math.prod(grid)
    ids = np.arange(1 if model.visible_only else _DRAWN)
    masks = masking.collate(config, grid=grid, sample_ids=ids, seed=0, step=0)
    counted_rt = masks.masked_rt
    masked = float(counted_rt.sum(1).mean())
    return Lengths(
        inputs=inputs,
        grid=grid,
        kept=positions - round(masked) if model.visible_only else positions,
        masked=masked,
        extra=stem.extra_tokens,
        clones=config.clones,
    )


def cost_of(recipe: Recipe, modality: str, size: float | None = None) -> SampleCost:
    """FLOPs of one sample of `modality` as the recipe trains it; `size` as in `lengths_of`."""
    return sample_cost(
        recipe.model,
        modality,
        lengths_of(recipe, modality, size),
        recipe.parts(),
        recipe.built_targets(),
        recipe.teacher.model,
        reads_states=recipe.objective.reads_states(*parts_of(modality)),
    )


def sample_cost(
    model: ModelConfig,
    modality: str,
    lengths: Lengths,
    parts: TeacherParts,
    targets: Sequence[Target] | Mapping[str, Sequence[Target]] = (),
    teacher: ModelConfig | None = None,
    *,
    reads_states: bool = False,
) -> SampleCost:
    """FLOPs of one sample, layer by layer in the order of `describe`, which is what a pipeline is cut from. `targets`:
    those of the stem, or of all stems by their names; none: one of the model's width that costs nothing. `teacher`: one
    that is another model; None: the student's. `reads_states`: whether the loss reads the student's states at all
    positions (`ObjectiveConfig.reads_states`)."""
    by_stem = targets if isinstance(targets, Mapping) else {modality: targets}
    alone = len(parts_of(modality)) == 1
    masked_alone = lengths.masked if alone and not (model.visible_only or model.compile) else None
    student_reads = None if reads_states else masked_alone
    taught = by_stem.get(modality, ())
    by_position = bool(taught) and all(target.is_by_position for target in taught)
    teacher_reads = masked_alone if by_position and lengths.clones == 1 and teacher is None else None

    def run(of: ModelConfig, lengths: Lengths, reads: tuple[float | None, float | None]) -> list[LayerCost]:
        found = []
        for layer in describe(of, modality):
            is_last = layer.main == of.backbone.depth - 1
            here = reads if is_last else (None, None)
            found.append(_layer(of, lengths, parts, layer, by_stem.get(layer.stem, ()), here))
        return found

    own = run(model, lengths, (student_reads, teacher_reads))
    if teacher is None:
        return SampleCost(tuple(own))
    its = run(teacher, replace(lengths, extra=modalities.of(teacher, modality).extra_tokens), (None, None))
    return SampleCost(
        tuple(one if one.layer.kind == "predictor" else replace(one, teacher=0.0) for one in own),
        tuple(replace(one, forward=0.0, backward=0.0) for one in its if one.layer.kind != "predictor"),
    )


def _layer(
    model: ModelConfig,
    lengths: Lengths,
    parts: TeacherParts,
    layer: LayerSpec,
    targets: Sequence[Target],
    reads: tuple[float | None, float | None],
) -> LayerCost:
    """`reads`: positions of a row at which student and teacher compute all of a block; None: at all of them."""
    rows, modality = lengths.clones, layer.stem
    if modality:
        lengths = lengths.of(modality)
    match layer.kind:
        case "block":
            student = rows * block_forward(model, lengths.kept + lengths.extra, reads[0])
            return _cost(layer, student, block_forward(model, lengths.positions + lengths.extra, reads[1]))
        case "features":
            first, *others = modalities.of(model, modality).feature_flops(lengths)
            own = 0.0 if parts.role(layer.name) == "absent" else 1.0
            return LayerCost(
                layer=layer,
                forward=first + sum(others),
                backward=first + 2 * sum(others),
                teacher=own * (first + sum(others)),
            )
        case "context":
            once = modalities.of(model, modality).context_flops(lengths)
            return _cost(layer, rows * once, once)
        case "predictor":
            widths = [target.width for target in targets] or [model.backbone.width]
            made = lengths.positions * sum(target.flops() for target in targets)
            return _cost(layer, rows * sum(_predictor(model, modality, lengths, widths)), made)
        case _:
            return _cost(layer, 0.0, 0.0)


def _cost(layer: LayerSpec, forward: float, teacher: float) -> LayerCost:
    return LayerCost(layer=layer, forward=forward, backward=2 * forward, teacher=teacher)


def block_forward(model: ModelConfig, length: int, read: float | None = None) -> float:
    """FLOPs of one block's forward over one row of `length` positions, of which `read` (None: all) pass what follows
    attention."""
    width, ffn = model.backbone.width, model.backbone.ffn
    linears = 2 * length * 3 * width * width + 2 * (length if read is None else read) * (width + 2 * ffn) * width
    attention = 2 * (2 * length * length * width)
    return linears + attention


def _predictor(model: ModelConfig, modality: str, lengths: Lengths, widths: list[int]) -> Iterator[float]:
    """Forward of the predictor's layers over one row, with a projection for each of these widths of targets."""
    spec, width = model.of(modality).predictor, model.backbone.width
    masked = lengths.masked
    if spec.kind in ("linear", "mlp"):
        yield 2.0 * masked * projection_weights(width, spec.kind == "mlp", widths)
        return
    axes = model.decoder_dimensions(modality, len(lengths.grid))
    # An even kernel makes one position too many along every axis.
    wider = (spec.kernel + 1) % 2
    made = lengths.positions + wider if axes == 1 else math.prod(extent + wider for extent in lengths.grid)
    inputs = width
    for _ in range(spec.layers):
        yield 2.0 * made * spec.width * (inputs // spec.groups) * spec.kernel**axes
        inputs = spec.width
    yield 2.0 * masked * projection_weights(spec.width, spec.proj_layers == 2, widths)


def projection_weights(inputs: int, two: bool, widths: Sequence[int]) -> float:
    """Weights of a projection for each of these widths: one linear, or `two`."""
    return sum(2 * inputs * (inputs + outputs) if two else inputs * outputs for outputs in widths)

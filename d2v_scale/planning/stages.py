"""Where a pipeline is cut, and how long its stages wait for each other.

The main blocks are dealt out in contiguous runs. What comes before them (stem, position bias, prenet) is always the
first stage's, what comes after (final norm, predictor) the last stage's.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2v_scale import modalities
from d2v_scale.errors import ConfigError
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import LayerSpec
from d2v_scale.networks.layers import describe
from d2v_scale.planning import flops
from d2v_scale.recipe import Recipe

_EQUAL = 1 + 1e-9
"""Sums of the same numbers in another order count as equal."""


@dataclass(frozen=True)
class StageSplit:
    """Which main blocks each stage of a pipeline holds, and what a training sample costs there."""

    blocks: tuple[range, ...]
    """Numbers of the main blocks (`LayerSpec.main`) of each stage."""
    costs: tuple[float, ...]
    """FLOPs of a sample on each rank of each stage: student forward and backward, and teacher forward."""

    @property
    def shares(self) -> tuple[float, ...]:
        """What each stage's ranks compute, as a part of all that is computed."""
        total = sum(self.costs)
        return tuple(cost / total for cost in self.costs)

    def stage_of(self, name: str) -> int:
        """The stage that holds a layer or parameter."""
        first, _, rest = name.partition(".")
        if first == "blocks":
            block = int(rest.partition(".")[0])
            return next(stage for stage, blocks in enumerate(self.blocks) if block in blocks)
        return 0 if first == "stems" else len(self.blocks) - 1

    def idle(self, micro_batches: int) -> tuple[float, ...]:
        """Share of a step that each stage waits, predicted from its FLOPs; communication is taken to cost nothing.

        The step lasts as long as one micro-batch through all stages and the others through the costliest one, which is
        exact for equal stages and an upper bound for the 1F1B schedule with others.
        """
        whole = sum(self.costs) + (micro_batches - 1) * max(self.costs)
        return tuple(1 - micro_batches * cost / whole for cost in self.costs)

    def bubble(self, micro_batches: int) -> float:
        """Mean of `idle`; `even_bubble` when all stages cost the same."""
        return sum(self.idle(micro_batches)) / len(self.costs)


def even_bubble(stages: int, micro_batches: int) -> float:
    """Share of a step that each of some equal stages waits: (p - 1) / (m + p - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def stage_blocks(recipe: Recipe, stages: int, tensor: int) -> StageSplit:
    """The main blocks of each stage, so that the ranks of the costliest stage compute as little as possible.

    `tensor`: the tensor-parallel ranks that divide every block; what is no block each of them runs whole. A recipe of
    several modalities shares its blocks; their samples' costs are added. Raises ConfigError when there are more stages
    than main blocks. Pure: forms no process group.
    """
    depth = recipe.model.backbone.depth
    if not 1 <= stages <= depth:
        raise ConfigError(
            "parallel.pipeline",
            f"{stages} stages cannot share {depth} main blocks",
            f"Each stage needs at least one: give 1 to {depth}.",
        )
    costs, parameters = [0.0] * depth, [0.0] * depth
    for modality in recipe.sequences:
        layers = flops.cost_of(recipe, modality).layers
        for main, one in zip(_main_blocks([one.layer for one in layers]), layers, strict=True):
            costs[main] += one.on_each(tensor)
    for main, layer, modality in _distinct_layers(recipe.model):
        parameters[main] += _parameters(recipe.model, layer, modality) / (tensor if layer.sliced else 1)
    blocks = split(costs, stages, parameters)
    return StageSplit(tuple(blocks), tuple(sum(costs[i] for i in stage) for stage in blocks))


def split(costs: Sequence[float], stages: int, memory: Sequence[float] | None = None) -> list[range]:
    """Cut `costs` into contiguous non-empty groups whose largest sum is as small as can be.

    Of all such cuts, one whose largest sum of `memory` is smallest; of these, the most even one (least squares).
    Exact, by dynamic programming in O(stages * n^2).
    """
    assert 1 <= stages <= len(costs), f"{stages} stages of {len(costs)} items"
    cost = _sums(costs)
    held = _sums(memory) if memory is not None else lambda first, last: 0.0
    least = _best(len(costs), stages, cost, max)[0] * _EQUAL
    lightest = _best(len(costs), stages, lambda i, j: held(i, j) if cost(i, j) <= least else None, max)[0] * _EQUAL

    def square(first: int, last: int) -> float | None:
        fits = cost(first, last) <= least and held(first, last) <= lightest
        return cost(first, last) ** 2 if fits else None

    return _best(len(costs), stages, square, operator.add)[1]


def _sums(values: Sequence[float]) -> Callable[[int, int], float]:
    before = [0.0, *itertools.accumulate(values)]
    return lambda first, last: before[last] - before[first]


def _best(
    count: int,
    stages: int,
    weight: Callable[[int, int], float | None],
    combine: Callable[[float, float], float],
) -> tuple[float, list[range]]:
    """The cut of range(count) with the least combined `weight(first, last)` of its groups; None: not allowed."""
    cuts: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}
    for _ in range(stages):
        longer: dict[int, tuple[float, list[range]]] = {}
        for last in range(1, count + 1):
            for first, (so_far, groups) in cuts.items():
                own = weight(first, last) if first < last else None
                if own is None:
                    continue
                total = combine(so_far, own)
                if last not in longer or total < longer[last][0]:
                    longer[last] = (total, [*groups, range(first, last)])
        cuts = longer
    return cuts[count]


def _main_blocks(layers: Sequence[LayerSpec]) -> list[int]:
    """The main block that each layer of a list goes with: the last one reached, and the first before any is."""
    reached = itertools.accumulate((layer.main for layer in layers), max)
    return [max(main, 0) for main in reached]


def _distinct_layers(model: ModelConfig) -> list[tuple[int, LayerSpec, str]]:
    """Every layer of a model once, with the main block it goes with and a stem whose samples pass it."""
    found: dict[str, tuple[int, LayerSpec, str]] = {}
    for modality in model.modalities:
        layers = describe(model, modality)
        found |= {layer.name: (main, layer, modality) for main, layer in zip(_main_blocks(layers), layers, strict=True)}
    return list(found.values())


def encoder_weights(model: ModelConfig) -> float:
    """Weights of all stems and blocks, as `_parameters` counts them: less than a part in 200 below all parameters."""
    layers = (one for one in _distinct_layers(model) if one[1].kind != "predictor")
    return sum(_parameters(model, layer, modality) for _, layer, modality in layers)


def _parameters(model: ModelConfig, layer: LayerSpec, modality: str) -> float:
    """Weights of a layer's matrices, tables and kernels; biases and norms are left out."""
    width, spec = model.backbone.width, model.of(modality).predictor
    stem = modalities.of(model, modality)
    match layer.kind:
        case "block":
            return 4 * width**2 + 2 * width * model.backbone.ffn
        case "features":
            return stem.feature_weights()
        case "context":
            return stem.context_weights()
        case "predictor" if spec.kind in ("linear", "mlp"):
            return (4 if spec.kind == "mlp" else 1) * width**2
        case "predictor":
            taps = spec.kernel ** model.decoder_dimensions(modality, stem.axes)
            convolutions = taps * spec.width * (width + (spec.layers - 1) * spec.width) / spec.groups
            last = spec.width * width if spec.proj_layers == 1 else 2 * spec.width * (spec.width + width)
            return convolutions + last
    return 0.0

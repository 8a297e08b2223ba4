"""Cuts of the layer list: the best there is, whole, and the bubble that a simulated schedule has."""

import itertools

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.networks.layers import describe
from d2v_scale.networks.stack import Student
from d2v_scale.planning import flops, stages
from d2v_scale.recipe import Recipe

# Whole numbers: sums are exact, so that equal cuts are equal.
COSTS = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=9)
CUT = COSTS.flatmap(lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs))))
CUT_WITH_MEMORY = CUT.flatmap(
    lambda cut: st.tuples(
        st.just(cut[0]),
        st.just(cut[1]),
        st.lists(st.integers(0, 9).map(float), min_size=len(cut[0]), max_size=len(cut[0])),
    )
)


def recipe_of(name: str) -> Recipe:
    return command_line.parse([f"--recipe={name}"])[0]


def every_cut(count: int, groups: int) -> list[list[range]]:
    cuts = itertools.combinations(range(1, count), groups - 1)
    return [[range(a, b) for a, b in itertools.pairwise([0, *cut, count])] for cut in cuts]


def largest(values: list[float], cut: list[range]) -> float:
    return max(sum(values[i] for i in group) for group in cut)


@given(CUT)
def test_groups_are_contiguous_not_empty_and_complete(case: tuple[list[float], int]) -> None:
    costs, groups = case
    found = stages.split(costs, groups)
    assert len(found) == groups
    assert all(len(group) > 0 for group in found)
    assert [i for group in found for i in group] == list(range(len(costs)))


@given(CUT_WITH_MEMORY)
def test_no_cut_is_better(case: tuple[list[float], int, list[float]]) -> None:
    costs, groups, memory = case
    found = stages.split(costs, groups, memory)

    def judged(cut: list[range]) -> tuple[float, float, float]:
        squares = sum(sum(costs[i] for i in group) ** 2 for group in cut)
        return largest(costs, cut), largest(memory, cut), squares

    assert judged(found) == min(judged(cut) for cut in every_cut(len(costs), groups))


@given(CUT, st.floats(0.1, 10))
def test_more_stages_or_cheaper_layers_never_cost_more(case: tuple[list[float], int], factor: float) -> None:
    costs, groups = case
    most = largest(costs, stages.split(costs, groups))
    if groups < len(costs):
        assert largest(costs, stages.split(costs, groups + 1)) <= most
    scaled = [cost * factor for cost in costs]
    assert largest(scaled, stages.split(scaled, groups)) == pytest.approx(factor * most)


@pytest.mark.parametrize("name", ["d2v1_text_base", "d2v2_speech_large", "d2v2_vision_huge14", "d2v2_text_large_a"])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_stages_of_a_recipe_add_up_to_the_sample(name: str, count: int) -> None:
    recipe = recipe_of(name)
    found = stages.stage_blocks(recipe, count, 1)
    assert [i for stage in found.blocks for i in stage] == list(range(recipe.model.backbone.depth))
    total = flops.cost_of(recipe, recipe.model.modalities[0]).total
    assert sum(found.costs) == pytest.approx(total)
    assert sum(found.shares) == pytest.approx(1)


def test_a_stage_with_more_to_do_beside_its_blocks_gets_fewer() -> None:
    recipe = recipe_of("d2v2_vision_large")
    recipe.model.predictor.width = 2048  # A decoder that costs several blocks.
    found = stages.stage_blocks(recipe, 4, 1)
    assert len(found.blocks[-1]) < len(found.blocks[0])
    assert max(found.shares) < 0.3


def test_what_no_tensor_parallel_rank_is_spared_weighs_more() -> None:
    """Stem and decoder, which every rank runs whole, counted as if they were divided like the blocks."""
    recipe = recipe_of("d2v2_vision_large")
    recipe.model.predictor.width = 2048
    alone, divided = (stages.stage_blocks(recipe, 4, tensor) for tensor in (1, 4))
    assert len(divided.blocks[-1]) < len(alone.blocks[-1])
    cost = flops.cost_of(recipe, "vision")
    blocks = sum(one.total for one in cost.layers if one.layer.kind == "block")
    assert sum(divided.costs) == pytest.approx(blocks / 4 + cost.total - blocks)


def test_of_equal_cuts_the_one_that_spares_the_embeddings() -> None:
    """25 equal blocks on 4 stages: one stage has a block more, and it is not the one with the token table."""
    recipe = recipe_of("d2v1_text_base")
    recipe.model.backbone.depth = 25
    recipe.model.compile = True  # else the last block computes less
    found = stages.stage_blocks(recipe, 4, 1)
    assert len(found.blocks[0]) < min(len(blocks) for blocks in found.blocks[1:])


def test_several_modalities_add_up() -> None:
    recipe = recipe_of("d2v2_vision_base")
    recipe.objective.masking.kind, recipe.model.predictor.kind = "random", "conv"
    vision = stages.stage_blocks(recipe, 2, 1)
    speech = recipe_of("d2v2_speech_base")
    recipe.model.speech = speech.model.speech
    both = stages.stage_blocks(recipe, 2, 1)
    assert sum(both.costs) == pytest.approx(sum(vision.costs) + flops.cost_of(recipe, "speech").total)


@pytest.mark.parametrize("count", [0, 13])
def test_more_stages_than_layers_is_refused_with_the_numbers(count: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.pipeline: {count} stages cannot share 12 main blocks.*1 to 12"):
        stages.stage_blocks(recipe_of("d2v1_vision_base"), count, 1)


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
@pytest.mark.usefixtures("world_of_one")
def test_parameters_on_paper_are_those_of_the_model(name: str) -> None:
    model = tiny_models.model(name)
    with torch.device("meta"):
        student = Student(model)
    for layer in describe(model, tiny_models.modality_of(name)):
        real = sum(
            parameter.numel()
            for key, parameter in student.named_parameters()
            if key.startswith(f"{layer.name}.") and parameter.dim() > 1 and not key.endswith((".cls", ".mask_token"))
        )
        assert stages._parameters(model, layer, tiny_models.modality_of(name)) == (
            0 if layer.kind == "bias" else real
        ), layer


def simulated(costs: list[float], micro_batches: int) -> float:
    """How long a step takes with one forward, one backward (twice as long) and free communication."""
    count = len(costs)
    orders = []
    for stage in range(count):
        warm_up = min(micro_batches, count - 1 - stage)
        order = [("forward", i) for i in range(warm_up)]
        for i in range(micro_batches):
            order += [("forward", warm_up + i)] * (warm_up + i < micro_batches) + [("backward", i)]
        orders.append(order)
    ended: dict[tuple[str, int, int], float] = {}
    clock, done = [0.0] * count, [0] * count
    while any(done[stage] < len(orders[stage]) for stage in range(count)):
        for stage in range(count):
            if done[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][done[stage]]
            neighbour = stage - 1 if kind == "forward" else stage + 1
            needed = (kind, i, neighbour)
            if 0 <= neighbour < count and needed not in ended:
                continue
            start = max(clock[stage], ended.get(needed, 0.0))
            clock[stage] = start + costs[stage] * (1 if kind == "forward" else 2) / 3
            ended[kind, i, stage] = clock[stage]
            done[stage] += 1
    return max(clock)


@given(st.integers(1, 8), st.integers(1, 32))
@settings(deadline=None)
def test_equal_stages_wait_as_the_formula_says(count: int, micro_batches: int) -> None:
    split = stages.StageSplit(tuple(range(i, i + 1) for i in range(count)), (1.0,) * count)
    busy = micro_batches / simulated([1.0] * count, micro_batches)
    assert split.bubble(micro_batches) == pytest.approx(1 - busy, abs=1e-9)
    assert stages.even_bubble(count, micro_batches) == pytest.approx(1 - busy, abs=1e-9)


@given(st.lists(st.floats(1, 1.5), min_size=1, max_size=8), st.integers(1, 32))
@settings(deadline=None)
def test_uneven_stages_wait_no_longer_than_predicted(costs: list[float], micro_batches: int) -> None:
    split = stages.StageSplit(tuple(range(i, i + 1) for i in range(len(costs))), tuple(costs))
    whole = simulated(costs, micro_batches)
    busy = micro_batches * sum(costs) / len(costs) / whole
    assert 1 - busy <= split.bubble(micro_batches) + 1e-9
    assert split.bubble(micro_batches) < 1 - busy + 0.12
    assert split.bubble(micro_batches) >= stages.even_bubble(len(costs), micro_batches) - 1e-9

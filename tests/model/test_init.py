"""Initial weights: a pure function of (seed, name), with the published distributions."""

import math
import time

import numpy as np
import pytest
import tiny_models
import torch

from d2v_scale.modalities import published_parts
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import InitRule, initial_tensor, initialize
from d2v_scale.networks.stack import Student, Teacher

pytestmark = pytest.mark.usefixtures("world_of_one")


def both(config: ModelConfig, name: str, seed: int = 1) -> tuple[Student, Teacher]:
    student, teacher = Student(config), Teacher(config, tiny_models.target_of(name), published_parts(config))
    initialize(teacher, seed)
    initialize(student, seed)
    return student, teacher


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_weights_do_not_depend_on_construction_order_or_the_global_generator(name: str) -> None:
    config = tiny_models.model(name)
    student, teacher = both(config, name)
    torch.manual_seed(99)
    again, _ = both(config, name)
    other, _ = both(config, name, seed=2)
    weights = dict(student.named_parameters())
    assert all(torch.equal(weights[key], value) for key, value in again.named_parameters())
    for key, value in teacher.named_parameters():
        assert torch.equal(weights[key], value), key
    assert any(not torch.equal(weights[key], value) for key, value in other.named_parameters())


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_the_teacher_has_exactly_the_parameters_of_its_roles(name: str) -> None:
    config = tiny_models.model(name)
    parts = published_parts(config)
    student, teacher = both(config, name)
    expected = {key for key, _ in student.named_parameters() if parts.role(key) != "absent"}
    assert {key for key, _ in teacher.named_parameters()} == expected


def test_a_copy_built_in_another_order_draws_the_same_tensor() -> None:
    rule = InitRule("normal", 0.02)
    first = initial_tensor("a.weight", (7, 5), rule, seed=3)
    initial_tensor("b.weight", (1000,), rule, seed=3)
    assert torch.equal(first, initial_tensor("a.weight", (7, 5), rule, seed=3))
    assert not torch.equal(first, initial_tensor("b.weight", (7, 5), rule, seed=3))


@pytest.mark.parametrize(
    ("rule", "mean", "std", "low", "high"),
    [
        (InitRule("normal", 0.02), 0.0, 0.02, -0.2, 0.2),
        (InitRule("uniform", 0.0, 1.0), 0.5, 1 / math.sqrt(12), 0.0, 1.0),
        # Cut at one standard deviation: the effective one is 0.54 of it.
        (InitRule("truncated", 0.02, 0.02), 0.0, 0.0108, -0.02, 0.02),
        (InitRule("constant", 0.5), 0.5, 0.0, 0.5, 0.5),
    ],
)
def test_rules_have_their_moments(rule: InitRule, mean: float, std: float, low: float, high: float) -> None:
    tensor = initial_tensor("x", (200, 500), rule, seed=0)
    assert tensor.mean() == pytest.approx(mean, abs=4 * std / math.sqrt(tensor.numel()) + 1e-8)
    assert tensor.std() == pytest.approx(std, rel=0.01, abs=1e-8)
    assert tensor.min() >= low
    assert tensor.max() <= high


def test_pad_rows_are_zero_and_beit_divides_output_weights_by_depth() -> None:
    student, _ = both(tiny_models.model("v1_text"), "v1_text")
    assert not student.stems["text"].features.tokens.weight[1].any()
    assert not student.stems["text"].features.positions.weight[1].any()
    student, _ = both(tiny_models.model("v1_vision"), "v1_vision")
    for i, block in enumerate(student.blocks):
        bound = 0.02 / math.sqrt(2 * (i + 1))
        assert 0.9 * bound < block.ffn.fc2.weight.abs().max() <= bound
        assert 0.9 * bound < block.attention.out.weight.abs().max() <= bound
        assert 0.018 < block.ffn.fc1.weight.abs().max() <= 0.02
        assert torch.equal(block.scale1, torch.full_like(block.scale1, 0.1))


def test_the_tables_and_the_blocks_have_the_spread_that_is_asked_for() -> None:
    config = tiny_models.model("v1_text")
    assert config.text is not None
    config.text.position_std, config.text.token_std, config.backbone.init_std = 0.002, 0.04, 0.07
    student = Student(config)
    initialize(student, 1)
    features = student.stems["text"].features
    assert features.tokens.weight[2:].std().item() == pytest.approx(0.04, rel=0.1)
    assert features.positions.weight[2:].std().item() == pytest.approx(0.002, rel=0.1)
    block = student.blocks[0]
    for weight in (block.ffn.fc1.weight, block.attention.out.weight):
        assert weight.std().item() == pytest.approx(0.07, rel=0.1)


@pytest.mark.parametrize(("std", "cut"), [(0.02, 0.02), (0.02, 0.04), (0.5, 2.0), (0.02, 2.0)])
def test_a_truncated_normal_is_the_normal_given_that_it_is_inside(std: float, cut: float) -> None:
    drawn = np.sort(initial_tensor("w", (500, 400), InitRule("truncated", std, cut), 3).double().flatten().numpy())
    assert abs(drawn).max() <= np.float32(cut)
    inside = math.erf(cut / std / math.sqrt(2))
    expected = np.array([math.erf(x / std / math.sqrt(2)) / inside for x in drawn]) / 2 + 0.5
    empirical = (np.arange(len(drawn)) + 0.5) / len(drawn)
    assert abs(expected - empirical).max() < 1.95 / math.sqrt(len(drawn)), "Kolmogorov-Smirnov at 0.1 %"


def test_a_truncated_normal_costs_no_more_than_three_plain_ones() -> None:
    def cost(rule: InitRule) -> float:
        spent = []
        for _ in range(7):
            before = time.thread_time()
            initial_tensor("w", (1000, 1000), rule, 1)
            spent.append(time.thread_time() - before)
        return min(spent)

    assert cost(InitRule("truncated", 0.02, 0.02)) < 3 * cost(InitRule("normal", 0.02))

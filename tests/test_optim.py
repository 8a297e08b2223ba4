"""Schedules and Adam against the reference's formulas."""

import math

import pytest
import torch

from d2v_scale.errors import ConfigError
from d2v_scale.optim import (
    OptimConfig,
    check_end_is_open,
    epsilon,
    learning_rate,
    make_optimizer,
    parameter_groups,
    scheduled,
    set_rates,
)


def test_cosine_starts_at_zero_peaks_after_warmup_and_ends_at_min_lr():
    config = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10, max_steps=110)
    assert learning_rate(config, 0) == 0.0
    assert learning_rate(config, 5) == pytest.approx(5e-4)
    assert learning_rate(config, 10) == pytest.approx(1e-3)
    assert learning_rate(config, 60) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(config, 110) == pytest.approx(1e-5)


def test_tri_stage_decays_exponentially_as_published():
    config = OptimConfig(lr=5e-4, schedule="tri_stage", max_steps=400_000)
    assert learning_rate(config, 0) == pytest.approx(5e-6)
    assert learning_rate(config, 12_000) == pytest.approx(5e-4)
    assert learning_rate(config, 371_999) == pytest.approx(5e-4)
    assert learning_rate(config, 386_000) == pytest.approx(5e-5)
    assert learning_rate(config, 400_000) == pytest.approx(5e-6)


def test_polynomial_and_constant_after_warmup():
    assert learning_rate(OptimConfig(lr=1.0, schedule="constant", warmup_steps=4, max_steps=8), 7) == 1.0
    assert learning_rate(OptimConfig(lr=1.0, schedule="polynomial", warmup_steps=0, max_steps=8), 6) == 0.25


def fairseq_adam(values, gradients, config):
    """The reference's update, written out: decoupled decay, epsilon beside the uncorrected root."""
    weight, m, v = values.clone().double(), torch.zeros(1).double(), torch.zeros(1).double()
    beta1, beta2 = config.betas
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        weight = weight - config.lr * config.weight_decay * weight
        step = config.lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        weight = weight - step * m / (v.sqrt() + config.eps)
    return weight


def test_fairseq_epsilon_placement_matches_the_written_out_update():
    config = OptimConfig(lr=1e-2, schedule="constant", eps=1e-2, eps_placement="fairseq", max_steps=100)
    torch.manual_seed(0)
    start, gradients = torch.randn(5), [torch.randn(5) * 0.01 for _ in range(7)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer([{"params": [weight], "weight_decay": config.weight_decay}], config)
    for completed, gradient in enumerate(gradients):
        weight.grad = gradient.clone()
        set_rates(optimizer, config, completed)
        optimizer.step()
    expected = fairseq_adam(start, gradients, config)
    torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=0)
    assert epsilon(OptimConfig(eps=1e-6), 0) == 1e-6


def test_beit_decays_matrices_mask_token_and_table_only():
    named = [
        ("blocks.0.ffn.fc1.weight", (4, 4)),
        ("blocks.0.ffn.fc1.bias", (4,)),
        ("blocks.0.attention.q_bias", (2, 2)),
        ("stems.vision.context.cls", (1, 1, 4)),
        ("stems.vision.context.mask_token", (1, 1, 4)),
        ("stems.vision.bias.table", (9, 2)),
        ("blocks.0.scale1", (4,)),
    ]
    parameters = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in named]
    decayed, plain = parameter_groups(parameters, OptimConfig(decay_on="matrices"))
    assert len(decayed["params"]) == 3
    assert len(plain["params"]) == 4
    assert plain["weight_decay"] == 0.0
    (everything,) = parameter_groups(parameters, OptimConfig(decay_on="all"))
    assert len(everything["params"]) == 7


def test_a_stems_own_parameters_learn_at_its_rate_and_shared_ones_at_that_of_all() -> None:
    names = ["stems.vision.features.patch.weight", "predictors.vision.proj.weight", "blocks.0.ffn.fc1.weight"]
    names += ["stems.vision2.features.patch.weight", "predictors.shared.proj.weight"]
    named = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in names]
    config = OptimConfig(lr=1e-2, schedule="constant", lr_scale={"vision": 0.25})
    plain, scaled = parameter_groups(named, config)
    assert plain.keys() == parameter_groups(named, OptimConfig())[0].keys()
    assert [len(plain["params"]), len(scaled["params"])] == [3, 2]
    optimizer = make_optimizer([plain, scaled], config)
    assert set_rates(optimizer, config, 5) == 1e-2
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.25e-2]
    assert scheduled(config, 1e-2, 0) == {"lr": 1e-2, "lr/vision": 0.25e-2}
    assert scheduled(OptimConfig(), 1e-2, 0) == {"lr": 1e-2}


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_factor_on_the_rate_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr_scale\.vision"):
        OptimConfig(lr_scale={"vision": scale}).check()


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps"):
        OptimConfig(warmup_steps=10, max_steps=10).check()


@pytest.mark.parametrize("scale", [[0.01, 0.0], [0.01], [-0.1, 0.01]])
def test_a_decay_to_zero_is_refused_before_it_ends_the_run_in_its_last_phase(scale):
    with pytest.raises(ConfigError, match="phase_scale"):
        OptimConfig(schedule="tri_stage", max_steps=100, phase_scale=scale).check()


def test_tri_stage_with_a_learning_rate_of_zero_stays_at_zero():
    config = OptimConfig(lr=0.0, schedule="tri_stage", max_steps=100)
    config.check()
    assert {learning_rate(config, step) for step in range(101)} == {0.0}


def test_wsd_is_flat_until_its_decay_which_falls_as_one_minus_the_root() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, schedule="wsd", warmup_steps=4, decay_from=10, max_steps=26)
    assert [learning_rate(config, n) for n in (0, 2, 4, 10)] == [0, 0.5, 1.0, 1.0]
    assert learning_rate(config, 14) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(config, 26) == pytest.approx(0.1)
    undecided = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=4, max_steps=26)
    assert learning_rate(undecided, 25) == 1.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (OptimConfig(decay_from=10), "which has no such step"),
        (OptimConfig(schedule="wsd", decay_from=10, max_steps=10), "the run at 10"),
        (OptimConfig(schedule="wsd", decay_from=3, warmup_steps=5, max_steps=10), "warm-up ends at step 5"),
        (OptimConfig(weight_decay_end=-0.1), "weight_decay_end"),
    ],
)
def test_a_decay_that_cannot_be_is_refused(config: OptimConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.check()


def test_the_end_of_a_run_is_open_until_its_decay_has_begun() -> None:
    flat, decays = ({"schedule": "wsd", "decay_from": begin} for begin in (None, 10))
    assert check_end_is_open(flat, decays, 10)
    assert check_end_is_open(decays, {**decays, "decay_from": 20}, 10)
    assert not check_end_is_open({"schedule": "cosine"}, decays, 0)
    assert not check_end_is_open({**flat, "weight_decay_end": 0.4}, decays, 0)
    with pytest.raises(ConfigError, match="is 10, and the run is at step 11"):
        check_end_is_open(flat, decays, 11)
    with pytest.raises(ConfigError, match="was 10, and the run is at step 11"):
        check_end_is_open(decays, flat, 11)


def test_weight_decay_follows_a_cosine_in_the_groups_that_have_one() -> None:
    config = OptimConfig(weight_decay=0.04, weight_decay_end=0.4, decay_on="matrices", max_steps=100)
    named = [
        ("blocks.0.fc.weight", torch.nn.Parameter(torch.ones(2, 2))),
        ("b.bias", torch.nn.Parameter(torch.ones(2))),
    ]
    optimizer = make_optimizer(parameter_groups(named, config), config)
    found = []
    for completed in (0, 50, 100):
        set_rates(optimizer, config, completed)
        found.append([group["weight_decay"] for group in optimizer.param_groups])
    assert found == [[pytest.approx(0.04), 0.0], [pytest.approx(0.22), 0.0], [pytest.approx(0.4), 0.0]]
    assert scheduled(config, 1e-3, 100) == {"lr": 1e-3, "weight_decay": pytest.approx(0.4)}

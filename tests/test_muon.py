"""Muon: what is orthogonalised, how far a step goes, and which parameters it takes."""

import pytest
import torch

from d2v_scale.errors import ConfigError
from d2v_scale.muon import MatrixOptimizer, as_matrices, from_matrices, orthogonalized
from d2v_scale.optim import MuonConfig, OptimConfig, make_optimizer, parameter_groups, set_rates

CONFIG = OptimConfig(
    lr=1e-2, schedule="constant", betas=(0.9, 0.95), weight_decay=0.1, muon=MuonConfig(), decay_on="matrices"
)


def made(values: dict[str, torch.Tensor]) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    named = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    return named, make_optimizer(parameter_groups(named.items(), CONFIG), CONFIG)


def step(named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    for _, parameter in sorted(named.items()):
        parameter.grad = torch.randn(parameter.shape)
    set_rates(optimizer, CONFIG, number)
    optimizer.step()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 8), (1, 8, 40)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), 5))
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert not orthogonalized(torch.zeros(shape), 5).any()


def test_a_matrix_takes_the_steps_of_torchs_muon() -> None:
    """torch iterates in bf16, we in the type of the weights."""
    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    named, optimizer = made({"blocks.0.ffn.fc1.weight": start})
    other = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon(
        [other], lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for number in range(4):
        step(named, optimizer, number)
        other.grad = named["blocks.0.ffn.fc1.weight"].grad
        theirs.step()
    moved = (other - start).norm()
    assert (named["blocks.0.ffn.fc1.weight"] - other).norm() < 0.02 * moved


def test_an_update_has_the_root_mean_square_that_moonlight_found_of_adamw() -> None:
    start = torch.zeros(24, 40)
    named, optimizer = made({"blocks.0.ffn.fc1.weight": start})
    step(named, optimizer, 0)
    size = float(named["blocks.0.ffn.fc1.weight"].square().mean().sqrt())
    assert size / CONFIG.lr == pytest.approx(0.2, rel=0.15)


def test_what_is_no_matrix_of_a_block_or_decoder_takes_the_steps_of_adamw() -> None:
    torch.manual_seed(2)
    values = {"blocks.0.norm1.weight": torch.ones(8), "stems.text.features.tokens.weight": torch.randn(9, 8)}
    values["predictors.text.proj.bias"] = torch.zeros(8)
    named, optimizer = made({**values, "blocks.0.ffn.fc1.weight": torch.randn(8, 8)})
    plain = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    config = OptimConfig(**{**vars(CONFIG), "muon": None})
    adamw = make_optimizer(parameter_groups(plain.items(), config), config)
    for number in range(3):
        step(named, optimizer, number)
        set_rates(adamw, config, number)
        for name, parameter in plain.items():
            parameter.grad = named[name].grad
        adamw.step()
    assert all(torch.equal(named[name], parameter) for name, parameter in plain.items())
    assert isinstance(optimizer, MatrixOptimizer)
    (kept,) = [optimizer.state[p] for p in named.values() if "exp_avg_sq" not in optimizer.state[p]]
    assert set(kept) == {"step", "exp_avg"}


def test_queries_keys_and_values_and_groups_of_convolutions_are_matrices_of_their_own() -> None:
    torch.manual_seed(3)
    heads, size, width = 4, 2, 8
    q, k, v = torch.randn(3, heads * size, width)
    fused = torch.stack([x.view(heads, size, width) for x in (q, k, v)], dim=1).reshape(3 * heads * size, width)
    assert torch.equal(as_matrices(fused, (heads, 3)), torch.stack([q, k, v]))
    assert torch.equal(from_matrices(as_matrices(fused, (heads, 3)), (heads, 3), fused.shape), fused)
    convolution = torch.randn(6, 4, 3, 3)
    matrices = as_matrices(convolution, (1, 3))
    assert torch.equal(matrices, torch.stack([part.reshape(2, 36) for part in convolution.chunk(3)]))
    assert torch.equal(from_matrices(matrices, (1, 3), convolution.shape), convolution)


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"iterations": 0}, {"lr_scale": -1.0}])
def test_settings_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"optim\\.muon\\.{next(iter(wrong))}"):
        OptimConfig(muon=MuonConfig(**wrong)).check()

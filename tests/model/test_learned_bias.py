"""In compiled blocks the ALiBi scale learns from each block by itself, as much as from a bias that all blocks share."""

import dataclasses
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.model.block import Block
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.learned_bias import LearnedBias
from d2v_scale.model.position_bias import AlibiBias, add_padding, distances
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student

pytestmark = pytest.mark.usefixtures("world_of_one")

POSITIONS = torch.tensor([[0, 1, 4, 5, 9, 30], [2, 3, 4, 11, 12, 13]])


def student(config: ModelConfig, compiled: bool) -> Student:
    made = Student(dataclasses.replace(config, compile=compiled))
    initialize(made, 1)
    for block in made.modules():
        if compiled and isinstance(block, Block):
            forward: Any = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
            block.forward = forward  # type: ignore[method-assign]
    return made


def gradients(made: Student, padded: bool, name: str = "v2_speech") -> dict[str, Tensor]:
    batch = tiny_models.batch(name, 2, 2, padded)
    assert isinstance(made.enter(batch)[0].attention_bias, LearnedBias) == made.config.compile
    torch.manual_seed(3)
    made(batch, Draw(1, 0)).predictions_nd.sin().sum().backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("padded", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_compiled_blocks_give_every_parameter_the_gradient_of_a_shared_bias(padded: bool, checkpointing: bool) -> None:
    torch._dynamo.reset()
    config = dataclasses.replace(tiny_models.model("v2_speech"), activation_checkpointing=checkpointing)
    expected = gradients(student(config, compiled=False), padded)
    found = gradients(student(config, compiled=True), padded)
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    assert expected["stems.speech.bias.scale"].abs().min() > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rows", [1, 2])
def test_queries_keys_values_and_scale_learn_the_same(dropout: float, rows: int) -> None:
    """Against the math kernel with a shared bias, in fp64, with the same weights dropped; one scale is cut at 0."""
    alibi = AlibiBias(4)
    positions_rs = POSITIONS[:rows]
    valid_rs = positions_rs < 13
    with torch.no_grad():
        alibi.scale.copy_(torch.tensor([0.5, 1.0, -0.1, 2.0]))
    torch.manual_seed(1)
    leaves = [torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = []
    for shared in (True, False):
        added = add_padding(alibi(positions_rs), valid_rs, torch.float64)
        assert added is not None
        learned = LearnedBias(added.detach(), alibi.slopes(), positions_rs)
        total = torch.zeros((), dtype=torch.float64)
        torch.manual_seed(5)
        for block in range(3):
            q, k, v = (x * (1.0 + block) for x in leaves)
            bias = added if shared else learned.of_block()
            total = total + F.scaled_dot_product_attention(q, k, v, bias, dropout).sin().sum()
        found.append(torch.autograd.grad(total, [*leaves, alibi.scale]))
    assert found[0][3][2] == 0
    assert found[0][3][[0, 1, 3]].abs().min() > 1e-4
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_blocks_of_a_deep_model_are_summed_in_fp32() -> None:
    """Autograd adds the gradients of a shared bias in bf16, block by block."""
    alibi = AlibiBias(4)
    initialize(alibi, 1)
    per_block = [torch.randn(2, 4, 6, 6).add(1.0).bfloat16() for _ in range(24)]
    weight = distances(POSITIONS)[:, None].double()
    slope_h = alibi.slopes().detach().double()
    exact = -slope_h * sum((one.double() * weight).sum((0, 2, 3)) for one in per_block)
    errors = []
    for shared in (True, False):
        added = alibi(POSITIONS).bfloat16()
        learned = LearnedBias(added.detach(), alibi.slopes(), POSITIONS)
        uses = [added * 1.0 if shared else learned.of_block() for _ in per_block]
        torch.autograd.backward(uses, per_block)
        assert alibi.scale.grad is not None
        errors.append(float((alibi.scale.grad.double() - exact).norm() / exact.norm()))
        alibi.scale.grad = None
    assert errors[1] < 1e-6
    assert errors[0] > 100 * errors[1]


def test_only_what_learns_in_compiled_blocks_of_one_stem_without_extra_tokens_is_of_a_block() -> None:
    def kind(name: str, compiled: bool = True, learns: bool = True) -> type:
        made = Student(dataclasses.replace(tiny_models.model(name), compile=compiled))
        made.requires_grad_(learns)
        return type(made.enter(tiny_models.batch(name, 2, 1 if name.startswith("v1") else 2, False))[0].attention_bias)

    assert kind("v2_speech") is LearnedBias
    assert {kind("v2_speech", compiled=False), kind("v2_speech", learns=False)} == {Tensor}
    assert {kind("v2_speech+2"), kind("v1_vision")} == {Tensor}
    with torch.no_grad():
        assert kind("v2_speech") is Tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_blocks_learn_the_same_scale_on_a_gpu(padded: bool) -> None:
    """With PyTorch's own compiler, in fp32."""
    found = []
    for compiled in (False, True):
        made = Student(dataclasses.replace(tiny_models.model("v2_speech"), compile=compiled))
        initialize(made, 1)
        made.cuda()
        for block in made.modules():
            if compiled and isinstance(block, Block):
                block.compile_forward()
        batch = tiny_models.batch("v2_speech", 2, 2, padded).to(torch.device("cuda"))
        made(batch, Draw(1, 0)).predictions_nd.sin().sum().backward()
        found.append(made.stems["speech"].bias.scale.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)

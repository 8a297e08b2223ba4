"""The ALiBi scale learns from each block by itself, some rows at a time, as from a bias that all blocks share."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.model import cpu_attention, learned_bias
from d2v_scale.model.block import Block
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.learned_bias import LearnedBias, pieces_of
from d2v_scale.model.position_bias import AlibiBias, add_padding, distances
from d2v_scale.networks import layered
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student

pytestmark = pytest.mark.usefixtures("world_of_one")

POSITIONS = torch.tensor([[0, 1, 4, 5, 9, 30], [2, 3, 4, 11, 12, 13]])


def student(config: ModelConfig) -> Student:
    made = Student(config)
    initialize(made, 1)
    for block in made.modules():
        if config.compile and isinstance(block, Block):
            forward: Any = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
            block.forward = forward  # type: ignore[method-assign]
    return made


def gradients(made: Student, batch: Batch, kind: type) -> dict[str, Tensor]:
    assert type(made.enter(batch)[0].attention_bias) is kind
    torch.manual_seed(3)
    made(batch, Draw(1, 0)).predictions_nd.sin().sum().backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


@pytest.fixture
def shared_bias() -> Iterator[pytest.MonkeyPatch]:
    """In it, all blocks share one bias that learns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layered, "AlibiBias", NoBias)
        yield patch


class NoBias:
    """What no bias is an instance of."""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gradient_bytes", [1, 1 << 20])
@pytest.mark.parametrize(("padded", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_every_parameter_gets_the_gradient_of_a_shared_bias(
    padded: bool,
    checkpointing: bool,
    gradient_bytes: int,
    compiled: bool,
    shared_bias: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all rows at once, and with each row by itself."""
    torch._dynamo.reset()
    config = tiny_models.model("v2_speech")
    # Rows by themselves draw other weights to drop.
    backbone = dataclasses.replace(config.backbone, attention_dropout=0.0)
    config = dataclasses.replace(config, backbone=backbone, activation_checkpointing=checkpointing)
    batch = tiny_models.batch("v2_speech", 2, 2, padded)
    expected = gradients(student(config), batch, Tensor)
    shared_bias.undo()
    monkeypatch.setattr(learned_bias, "GRADIENT_BYTES", gradient_bytes)
    found = gradients(student(dataclasses.replace(config, compile=compiled)), batch, LearnedBias)
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    assert expected["stems.speech.bias.scale"].abs().min() > 0
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * largest + 1e-7, msg=name)


@given(rows=st.integers(1, 200), most=st.integers(0, 250))
def test_pieces_are_equal_and_keep_to_the_limit(rows: int, most: int) -> None:
    """`most` rows are as large as the limit; a row that is larger is by itself."""
    bias = torch.zeros(1, 4, 6, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned_bias, "GRADIENT_BYTES", most * bias.nbytes)
        pieces = pieces_of(rows, bias)
    assert rows % pieces == 0
    assert rows // pieces <= max(1, most)
    assert (pieces == 1) == (rows <= max(1, most))
    if rows & (rows - 1) == 0:
        assert pieces & (pieces - 1) == 0


def test_no_gradient_of_a_bias_is_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch's attention returns as one, in eager blocks of eight rows."""
    sizes: list[int] = []
    backward = learned_bias._OfRows.backward

    def counted(ctx: Any, grad_rhss: Tensor) -> Any:
        sizes.append(grad_rhss.nbytes)
        return backward(ctx, grad_rhss)

    monkeypatch.setattr(learned_bias._OfRows, "backward", staticmethod(counted))
    batch = tiny_models.batch("v2_speech", 4, 2, True)
    bias = student(tiny_models.model("v2_speech")).enter(batch)[0].attention_bias
    assert isinstance(bias, LearnedBias)
    assert len(bias.added_rhss) == 8
    monkeypatch.setattr(learned_bias, "GRADIENT_BYTES", bias.added_rhss.nbytes // 4)
    made = student(tiny_models.model("v2_speech"))
    gradients(made, batch, LearnedBias)
    assert set(sizes) == {bias.added_rhss.nbytes // 4}
    assert len(sizes) == 4 * sum(isinstance(module, Block) for module in made.modules())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 3])
def test_row_by_row_on_a_cpu_the_scale_learns_the_same(dropout: float, rows: int) -> None:
    """Against a bias with a gradient of its own, with the same weights dropped."""
    torch.manual_seed(0)
    length = cpu_attention.SHORTEST_WITHOUT_DROPOUT
    alibi = AlibiBias(4)
    initialize(alibi, 1)
    positions_rs = torch.stack([torch.randperm(2 * length)[:length].sort().values for _ in range(rows)])
    leaves = [torch.randn(3, 4, length, 8, requires_grad=True) for _ in range(3)]
    added = alibi(positions_rs)
    learned = LearnedBias(added.detach(), alibi.slopes(), distances(positions_rs), 1)
    found = []
    for bias in (added, learned):
        torch.manual_seed(5)
        qkv_rsh3d = torch.stack(leaves, 3).transpose(1, 2)
        total = cpu_attention.attend(qkv_rsh3d, bias, dropout).sin().sum()
        found.append(torch.autograd.grad(total, [*leaves, alibi.scale]))
    assert found[0][3].abs().min() > 1e-3
    for ours, expected, atol in zip(found[1], found[0], (1e-5, 1e-5, 1e-5, 2e-4), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=atol)


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
        learned = LearnedBias(added.detach(), alibi.slopes(), distances(positions_rs), 1)
        total = torch.zeros((), dtype=torch.float64)
        torch.manual_seed(5)
        for block in range(3):
            q, k, v = (x * (1.0 + block) for x in leaves)
            bias = added if shared else learned.of_pieces()[0]
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
        learned = LearnedBias(added.detach(), alibi.slopes(), distances(POSITIONS), 1)
        uses = [added * 1.0 if shared else learned.of_pieces()[0] for _ in per_block]
        torch.autograd.backward(uses, per_block)
        assert alibi.scale.grad is not None
        errors.append(float((alibi.scale.grad.double() - exact).norm() / exact.norm()))
        alibi.scale.grad = None
    assert errors[1] < 1e-6
    assert errors[0] > 100 * errors[1]


def test_only_what_learns_in_blocks_of_one_stem_without_extra_tokens_is_of_a_block() -> None:
    def kind(name: str, learns: bool = True) -> type:
        made = Student(tiny_models.model(name))
        made.requires_grad_(learns)
        return type(made.enter(tiny_models.batch(name, 2, 1 if name.startswith("v1") else 2, False))[0].attention_bias)

    assert kind("v2_speech") is LearnedBias
    assert kind("v2_speech", learns=False) is Tensor
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

"""The CPU's own versions compute what PyTorch's operators do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.model import cpu_ops, norm_gelu

pytestmark = pytest.mark.skipif(not cpu_ops.applies(torch.zeros(1)), reason="this PyTorch has no oneDNN")


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_same(ours: list[Tensor], reference: list[Tensor]) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.shape == theirs.shape
        largest = theirs.abs().amax() if theirs.numel() else 0.0
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5 * max(float(largest), 1e-3))


@pytest.mark.parametrize("shape", [(5, 7, 24), (1, 24), (0, 24)])
def test_linear(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape), torch.randn(10, 24), torch.randn(10)
    for kept in (2, 3):
        assert_same(gradients(cpu_ops.linear, *inputs[:kept]), gradients(F.linear, *inputs[:kept]))


def test_linear_of_rows_that_are_a_view_with_gaps() -> None:
    x, weight = torch.randn(4, 9, 24)[:, 2:5], torch.randn(10, 24)
    assert_same([cpu_ops.linear(x, weight)], [F.linear(x, weight)])


def test_dropout_drops_its_share_scales_the_rest_and_repeats_with_the_seed() -> None:
    x = torch.ones(1000, 1001)
    torch.manual_seed(3)
    dropped = cpu_ops.dropout(x, 0.1, True)
    assert abs((dropped == 0).float().mean().item() - 0.1) < 2e-3
    assert abs(dropped.mean().item() - 1) < 2e-3
    # No column or row is treated otherwise than the others.
    assert (dropped == 0).float().mean(0).std() < 0.012
    torch.manual_seed(3)
    assert torch.equal(cpu_ops.dropout(x, 0.1, True), dropped)
    assert torch.equal(cpu_ops.dropout(x, 0.1, False), x)
    assert cpu_ops.dropout(x, 0.0, True) is x or torch.equal(cpu_ops.dropout(x, 0.0, True), x)


def test_norm_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_gelu, "_ROWS", 8)
    x, weight, bias = torch.randn(3, 7, 24), torch.randn(24), torch.randn(24)

    def plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.gelu(F.layer_norm(x, (24,), weight, bias, 1e-5))

    assert_same(gradients(lambda *a: norm_gelu.norm_gelu(*a, 1e-5), x, weight, bias), gradients(plain, x, weight, bias))
    assert_same(gradients(lambda x: norm_gelu.norm_gelu(x, None, None, 1e-5), x), gradients(plain, x))

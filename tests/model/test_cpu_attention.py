"""The CPU's own attention computes what PyTorch's does."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.model import cpu_attention, cpu_ops

pytestmark = pytest.mark.skipif(not cpu_ops.applies(torch.zeros(1)), reason="this PyTorch has no oneDNN")


def inputs(rows: int = 3, heads: int = 2, length: int = 20, dim: int = 8) -> list[Tensor]:
    """q, k and v as views of one tensor with gaps, as a block cuts them."""
    qkv = torch.randn(rows, length, heads * 3 * dim, requires_grad=True)
    return list(qkv.view(rows, length, heads, 3, dim).permute(3, 0, 2, 1, 4).unbind(0))


def own(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    return cpu_attention.attend(torch.stack((q, k, v), 3).transpose(1, 2), bias, dropout)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)


@pytest.mark.parametrize("bias_shape", [None, (1, 2, 20, 20), (3, 2, 20, 20), (1, 1, 20, 20), (3, 1, 1, 20)])
def test_values_and_gradients_are_pytorchs(bias_shape: tuple[int, ...] | None) -> None:
    q, k, v = inputs()
    leaves = [q, k, v]
    bias = None
    if bias_shape is not None:
        bias = torch.randn(bias_shape, requires_grad=True)
        leaves.append(bias)
    weights = torch.randn(3, 20, 2, 8)
    found = []
    for attend in (own, plain):
        out = attend(q, k, v, bias, 0.0)
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)])
    for ours, reference in zip(*found, strict=True):
        assert ours.shape == reference.shape
        assert torch.allclose(ours, reference, rtol=0, atol=1e-5)


def test_padded_keys_get_nothing_and_a_row_without_valid_keys_gives_zeros() -> None:
    q, k, v = inputs()
    bias = torch.zeros(3, 1, 1, 20)
    bias[0, ..., 15:] = -math.inf
    bias[1] = -math.inf
    out = own(q, k, v, bias, 0.0)
    assert torch.allclose(out, plain(q, k, v, bias, 0.0), atol=1e-6)
    assert not out[1].any()
    (grad_v,) = torch.autograd.grad(out.sum(), [v])
    assert not grad_v[0, :, 15:].any()


def test_dropout_drops_its_share_alike_in_both_passes() -> None:
    length = 400
    q, k = torch.zeros(2, 1, 1, length, length)
    v = torch.eye(length)[None, None].requires_grad_()
    torch.manual_seed(1)
    # Equal logits and one-hot values: the output is the weights, 1 / length or nothing.
    out = own(q.requires_grad_(), k, v, None, 0.25)[0, :, 0]
    assert abs((out == 0).float().mean().item() - 0.25) < 0.01
    assert abs(out.sum(1).mean().item() - 1) < 0.01
    pick = torch.zeros_like(out)
    pick[7] = 1
    (grad_v,) = torch.autograd.grad((out * pick).sum(), [v])
    assert torch.allclose(grad_v[0, 0].diagonal(), out[7])


def test_used_in_training_over_long_rows_with_dropout_or_a_bias_that_learns() -> None:
    length = cpu_attention.SHORTEST
    long = torch.zeros(1, 1, length, 4, requires_grad=True)
    assert cpu_attention.applies(long, None, 0.1)
    assert not cpu_attention.applies(long[:, :, 1:], None, 0.1)
    assert not cpu_attention.applies(long.detach(), None, 0.1)
    assert not cpu_attention.applies(long, torch.ones(1, 1, 1, length, dtype=torch.bool), 0.1)
    with torch.no_grad():
        assert not cpu_attention.applies(long, None, 0.1)
    longer = torch.zeros(1, 1, cpu_attention.SHORTEST_WITHOUT_DROPOUT, 4, requires_grad=True)
    bias = torch.zeros(1, 1, 1, 1)
    for learns in (True, False):
        assert cpu_attention.applies(longer, bias.clone().requires_grad_(learns), 0.0) == learns
        assert cpu_attention.applies(longer, bias.clone().requires_grad_(learns), 0.1)
    assert not cpu_attention.applies(longer, None, 0.0)
    assert not cpu_attention.applies(longer[:, :, 1:], bias.requires_grad_(), 0.0)

"""Attention of the student on a CPU, row by row while its weights are in cache.

PyTorch's fused kernel for CPUs knows neither dropout nor a bias that learns: there it makes every intermediate result
of all rows, one after the other. Here those of one row (H, S, S) are written over again for the next, and only the
weights, and what dropout does to them, are kept. Queries, keys and values are read where the product of `qkv` has put
them.
"""

import math
from typing import Any

import torch
from torch import Tensor

from d2v_scale.model import cpu_ops
from d2v_scale.model.cpu_ops import keep_factor
from d2v_scale.model.learned_bias import LearnedBias

SHORTEST = 64
"""Fewest positions for which this was faster with dropout; below, calls for each row take longer than they save."""
SHORTEST_WITHOUT_DROPOUT = 144
"""The same with a bias that learns and no dropout."""


def applies(q_rhsd: Tensor, attention_bias: Tensor | LearnedBias | None, dropout: float) -> bool:
    """Whether `attend` is used: in training over long rows, where `cpu_ops` applies, without a bool mask, and with
    something that PyTorch's fused kernel does not know."""
    if isinstance(attention_bias, LearnedBias):
        learns, attention_bias = True, attention_bias.added_rhss
    else:
        learns = attention_bias is not None and attention_bias.requires_grad
    trained = torch.is_grad_enabled() and q_rhsd.requires_grad
    masked = attention_bias is not None and attention_bias.dtype != torch.float32
    length = q_rhsd.shape[2]
    long = length >= SHORTEST if dropout else learns and length >= SHORTEST_WITHOUT_DROPOUT
    return trained and not masked and long and cpu_ops.applies(q_rhsd)


def attend(qkv_rsh3d: Tensor, attention_bias: Tensor | LearnedBias | None, dropout: float) -> Tensor:
    """softmax(q k / sqrt(d) + bias) v of queries, keys and values (R, S, H, 3, d), with dropout on the weights; returns
    (R, S, H, d).

    `attention_bias` fp32, broadcast to (R, H, S, S), with or without gradient. Call only where `applies`.
    """
    if isinstance(attention_bias, LearnedBias):
        added, slope_h, distances_rss, _ = attention_bias
        return _Attend.apply(qkv_rsh3d, added, dropout, slope_h, distances_rss)
    return _Attend.apply(qkv_rsh3d, attention_bias, dropout, None, None)


def parts(qkv_rsh3d: Tensor) -> tuple[Tensor, ...]:
    """(R, H, S, d) of queries, keys and values, as views."""
    return qkv_rsh3d.permute(3, 0, 2, 1, 4).unbind(0)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_rsh3d: Tensor,
        bias: Tensor | None,
        dropout: float,
        slope_h: Tensor | None,
        distances_rss: Tensor | None,
    ) -> Tensor:
        q_rhsd, k_rhsd, v_rhsd = parts(qkv_rsh3d)
        rows, heads, length, dim = q_rhsd.shape
        scale = dim**-0.5
        weights_rhss = q_rhsd.new_empty(rows, heads, length, length)
        keep_rhss = keep_factor(weights_rhss.shape, dropout) if dropout else None
        out_rshd = q_rhsd.new_empty(rows, length, heads, dim)
        scratch_hss = torch.empty_like(weights_rhss[0])
        softmax = torch.softmax if bias is None or not _excludes_all(bias) else _safe_softmax
        for row in range(rows):
            added = scratch_hss if bias is None else bias[row % bias.shape[0]]
            keys_hds = k_rhsd[row].transpose(1, 2)
            beta = 0 if bias is None else 1
            torch.baddbmm(added, q_rhsd[row], keys_hds, beta=beta, alpha=scale, out=scratch_hss)
            weights_hss = weights_rhss[row]
            softmax(scratch_hss, -1, out=weights_hss)
            if keep_rhss is not None:
                weights_hss = torch.mul(weights_hss, keep_rhss[row], out=scratch_hss)
            torch.bmm(weights_hss, v_rhsd[row], out=out_rshd[row].transpose(0, 1))
        ctx.save_for_backward(qkv_rsh3d, weights_rhss, keep_rhss, distances_rss)
        ctx.scale, ctx.bias_shape = scale, None if bias is None else bias.shape
        return out_rshd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rshd: Tensor) -> tuple[Tensor | None, ...]:
        qkv_rsh3d, weights_rhss, keep_rhss, distances_rss = ctx.saved_tensors
        q_rhsd, k_rhsd, v_rhsd = parts(qkv_rsh3d)
        rows, heads, _, _ = q_rhsd.shape
        grad_qkv = torch.empty_like(qkv_rsh3d, memory_format=torch.contiguous_format)
        grads_rhsd = parts(grad_qkv)
        grad_bias = grad_rshd.new_zeros(ctx.bias_shape) if ctx.needs_input_grad[1] else None
        grad_slope = grad_rshd.new_zeros(heads) if ctx.needs_input_grad[3] else None
        grad_weights_hss, other_hss = (torch.empty_like(weights_rhss[0]) for _ in range(2))
        for row in range(rows):
            grad_hsd, kept_hss = grad_rshd[row].transpose(0, 1), weights_rhss[row]
            torch.bmm(grad_hsd, v_rhsd[row].transpose(1, 2), out=grad_weights_hss)
            if keep_rhss is not None:
                grad_weights_hss *= keep_rhss[row]
                kept_hss = torch.mul(kept_hss, keep_rhss[row], out=other_hss)
            grad_q, grad_k, grad_v = (grad[row] for grad in grads_rhsd)
            torch.bmm(kept_hss.transpose(1, 2), grad_hsd, out=grad_v)
            grad_logits_hss = torch._softmax_backward_data(
                grad_weights_hss, weights_rhss[row], -1, torch.float32, grad_input=other_hss
            )
            if grad_bias is not None:
                grad_bias[row % ctx.bias_shape[0]] += grad_logits_hss.sum_to_size(ctx.bias_shape[1:])
            if grad_slope is not None:
                distances = distances_rss[row % len(distances_rss)].flatten()
                grad_slope -= torch.mv(grad_logits_hss.view(heads, -1), distances)
            torch.baddbmm(grad_q, grad_logits_hss, k_rhsd[row], beta=0, alpha=ctx.scale, out=grad_q)
            torch.baddbmm(grad_k, grad_logits_hss.transpose(1, 2), q_rhsd[row], beta=0, alpha=ctx.scale, out=grad_k)
        return grad_qkv, grad_bias, None, grad_slope, None


def _excludes_all(bias_rhss: Tensor) -> bool:
    """Whether some position may attend to none: its weights are zeros, as in PyTorch's attention."""
    return bool((bias_rhss.amax(-1) == -math.inf).any())


def _safe_softmax(logits: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(torch._safe_softmax(logits, dim))

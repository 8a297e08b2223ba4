"""Attention of the student on a CPU, head by head while its weights are in cache.

PyTorch's fused kernel for CPUs knows neither dropout nor a bias that learns, and multiplies slower than oneDNN.
"""

from typing import Any

import torch
from torch import Tensor

from d2v_scale.model import cpu_ops
from d2v_scale.model.cpu_ops import keep_factor, product
from d2v_scale.model.learned_bias import LearnedBias

SHORTEST = 144
"""Fewest positions for which this was faster with dropout; below, calls for each head take longer than they save."""
SHORTEST_WITHOUT_DROPOUT = 192
"""The same without dropout, with one thread: several divide the work on a head, and were slower at any length."""


def applies(q_rhsd: Tensor, attention_bias: Tensor | LearnedBias | None, dropout: float) -> bool:
    """Whether `attend` is used: in training over long rows, where `cpu_ops` applies, without a bool mask."""
    if isinstance(attention_bias, LearnedBias):
        attention_bias = attention_bias.added_rhss
    trained = torch.is_grad_enabled() and q_rhsd.requires_grad
    masked = attention_bias is not None and attention_bias.dtype != torch.float32
    length = q_rhsd.shape[2]
    long = length >= SHORTEST if dropout else length >= SHORTEST_WITHOUT_DROPOUT and torch.get_num_threads() == 1
    return trained and not masked and long and cpu_ops.applies(q_rhsd)


def attend(
    q_rhsd: Tensor, k_rhsd: Tensor, v_rhsd: Tensor, attention_bias: Tensor | LearnedBias | None, dropout: float
) -> Tensor:
    """softmax(q k / sqrt(d) + bias) v, (R, H, S, d) each, with dropout on the weights; returns (R, S, H, d).

    `attention_bias` fp32, broadcast to (R, H, S, S), with or without gradient. Call only where `applies`.
    """
    if isinstance(attention_bias, LearnedBias):
        added, slope_h, distances_rss, _ = attention_bias
        return _Attend.apply(q_rhsd, k_rhsd, v_rhsd, added, dropout, slope_h, distances_rss)
    return _Attend.apply(q_rhsd, k_rhsd, v_rhsd, attention_bias, dropout, None, None)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_rhsd: Tensor,
        k_rhsd: Tensor,
        v_rhsd: Tensor,
        bias: Tensor | None,
        dropout: float,
        slope_h: Tensor | None,
        distances_rss: Tensor | None,
    ) -> Tensor:
        rows, heads, length, dim = q_rhsd.shape
        scale = dim**-0.5
        weights_rhss = q_rhsd.new_empty(rows, heads, length, length)
        keep_rhss = keep_factor(weights_rhss.shape, dropout) if dropout else None
        out_rshd = q_rhsd.new_empty(rows, length, heads, dim)
        # Contiguous: oneDNN multiplies views with gaps element by element.
        q_rhsd, k_rhsd, v_rhsd = (x.contiguous() for x in (q_rhsd, k_rhsd, v_rhsd))
        for row in range(rows):
            for head in range(heads):
                logits = product(q_rhsd[row, head], k_rhsd[row, head]).mul_(scale)
                weights = weights_rhss[row, head]
                if bias is None:
                    torch.softmax(logits, -1, out=weights)
                else:
                    logits += bias[row % bias.shape[0], head % bias.shape[1]]
                    # Rows without any valid key give zeros, as in PyTorch's attention.
                    weights.copy_(torch._safe_softmax(logits, -1))
                kept = weights if keep_rhss is None else weights * keep_rhss[row, head]
                out_rshd[row, :, head] = product(kept, v_rhsd[row, head].t())
        ctx.save_for_backward(q_rhsd, k_rhsd, v_rhsd, weights_rhss, keep_rhss, distances_rss)
        ctx.scale, ctx.bias_shape = scale, None if bias is None else bias.shape
        return out_rshd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rshd: Tensor) -> tuple[Tensor | None, ...]:
        q_rhsd, k_rhsd, v_rhsd, weights_rhss, keep_rhss, distances_rss = ctx.saved_tensors
        rows, heads, _, _ = q_rhsd.shape
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q_rhsd, k_rhsd, v_rhsd))
        grad_bias = grad_rshd.new_zeros(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        grad_slope = grad_rshd.new_zeros(heads) if ctx.needs_input_grad[5] else None
        grad_rhsd = grad_rshd.transpose(1, 2).contiguous()
        for row in range(rows):
            for head in range(heads):
                weights, grad = weights_rhss[row, head], grad_rhsd[row, head]
                grad_weights = product(grad, v_rhsd[row, head])
                kept = weights
                if keep_rhss is not None:
                    keep = keep_rhss[row, head]
                    kept = weights * keep
                    grad_weights *= keep
                grad_v[row, head] = product(kept.t(), grad.t())
                grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32)
                if grad_bias is not None:
                    grad_bias[row % ctx.bias_shape[0], head % ctx.bias_shape[1]] += grad_logits.sum_to_size(
                        ctx.bias_shape[2:]
                    )
                if grad_slope is not None:
                    grad_slope[head] -= torch.dot(
                        grad_logits.flatten(), distances_rss[row % len(distances_rss)].flatten()
                    )
                grad_logits *= ctx.scale
                grad_q[row, head] = product(grad_logits, k_rhsd[row, head].t())
                grad_k[row, head] = product(grad_logits.t(), q_rhsd[row, head].t())
        return grad_q, grad_k, grad_v, grad_bias, None, grad_slope, None

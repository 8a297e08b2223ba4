"""GELU of a layer norm, on a CPU piece by piece while the values are in cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.model import cpu_ops
from d2v_scale.model.cpu_ops import pieces


class NormGelu(nn.LayerNorm):
    """GELU of the layer norm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return norm_gelu(x, self.weight, self.bias, self.eps)


def norm_gelu(x: Tensor, weight_c: Tensor | None, bias_c: Tensor | None, eps: float) -> Tensor:
    """GELU of the layer norm over the last dimension. On a CPU neither the normed values nor a second pass is kept."""
    if not cpu_ops.applies(x):
        return F.gelu(F.layer_norm(x, x.shape[-1:], weight_c, bias_c, eps))
    return _NormGelu.apply(x.reshape(-1, x.shape[-1]), weight_c, bias_c, eps).view(x.shape)


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nc: Tensor, weight_c: Tensor | None, bias_c: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x_nc, weight_c, bias_c)
        ctx.eps = eps
        out_nc = x_nc.new_empty(x_nc.shape)  # contiguous: GELU leaves an output of other strides unwritten
        for piece in pieces(x_nc.shape[0]):
            normed = F.layer_norm(x_nc[piece], x_nc.shape[1:], weight_c, bias_c, eps)
            torch.ops.aten.gelu.out(normed.contiguous(), out=out_nc[piece])
        return out_nc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nc: Tensor) -> tuple[Tensor | None, ...]:
        x_nc, weight_c, bias_c = ctx.saved_tensors
        affine = weight_c is not None
        grad_x = torch.empty_like(x_nc)
        grad_weight = torch.zeros_like(weight_c) if affine else None
        grad_bias = torch.zeros_like(bias_c) if affine else None
        for piece in pieces(x_nc.shape[0]):
            x = x_nc[piece]
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight_c, bias_c, ctx.eps)
            grad = torch.ops.aten.gelu_backward(grad_nc[piece], normed)
            grad_x[piece], weight_part, bias_part = torch.ops.aten.native_layer_norm_backward(
                grad, x, x.shape[1:], mean, rstd, weight_c, bias_c, [True, affine, affine]
            )
            if affine:
                grad_weight += weight_part
                grad_bias += bias_part
        return grad_x, grad_weight, grad_bias, None

"""Operations that PyTorch does slowly on a CPU, most of them in fp32, done faster. Elsewhere they are PyTorch's own.

oneDNN multiplies large matrices up to twice as fast as the BLAS that `F.linear` calls, on processors which that does
not know (AMD's), and about as fast on the others; small ones it multiplies slower. Its `_linear_pointwise` is the
operator that `torch.compile` puts in `F.linear`'s place. It makes every product but those of `multiply_by_blas`.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_ROWS = 2048
"""Rows handled at once where several operations follow each other: they stay in the cache."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def applies(x: Tensor) -> bool:
    """Whether this module's own versions are used for `x`: fp32 on a CPU, outside a compiled region."""
    return _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


SMALL, LARGE = 1 << 21, 1 << 25
"""Multiplications below which a product is small, and from which on it is large."""
_by_blas: frozenset[str] = frozenset()


def product_class(a_nk: Tensor, b_mk: Tensor) -> str:
    """What decides which library is faster: the size of a product, and which of its factors are transposed (neither in
    a forward pass, the second for the input's gradient, both for the weight's). Of the first oneDNN makes a copy then,
    which weighs more where it has more rows than the second: wide."""
    count = a_nk.shape[0] * a_nk.shape[1] * b_mk.shape[0]
    size = "small" if count < SMALL else "middle" if count < LARGE else "large"
    both = "both wide" if a_nk.shape[0] > b_mk.shape[0] else "both"
    transposed = ("neither", "second", both)[(b_mk.stride(1) != 1) + (a_nk.stride(1) != 1)]
    return f"{size} {transposed}"


def multiply_by_blas(classes: Collection[str]) -> None:
    """Have products of these `product_class`es made by the BLAS from now on, all others by oneDNN. Of this process."""
    global _by_blas
    _by_blas = frozenset(classes)


def product(a_nk: Tensor, b_mk: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """(N, K) times the transpose of (M, K), plus a bias: (N, M). Rows may be strided but may not overlap; no gradient.

    Call only where `applies`.
    """
    if _by_blas and product_class(a_nk, b_mk) in _by_blas:
        return blas_product(a_nk, b_mk, bias_m)
    return onednn_product(a_nk, b_mk, bias_m)


def onednn_product(a_nk: Tensor, b_mk: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """`product` by oneDNN, whatever its class."""
    return torch.ops.mkldnn._linear_pointwise(a_nk, b_mk, bias_m, "none", [], "")


def blas_product(a_nk: Tensor, b_mk: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """`product` as `F.linear` computes it, which DeepSpeed replaces."""
    return torch.mm(a_nk, b_mk.t()) if bias_m is None else torch.addmm(bias_m, a_nk, b_mk.t())


def pieces(count: int) -> Iterator[slice]:
    """`count` rows in slices of `PIECE_ROWS`."""
    return (slice(first, min(first + PIECE_ROWS, count)) for first in range(0, count, PIECE_ROWS))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nk: Tensor, weight_mk: Tensor, bias_m: Tensor | None) -> Tensor:
        # The parameter itself, not its values: ZeRO-3 puts them in place again before the backward pass.
        ctx.save_for_backward(x_nk, weight_mk)
        return product(x_nk, weight_mk, bias_m)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nm: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_nk, weight_mk = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = product(grad_nm, weight_mk.t()) if wants_x else None
        grad_weight = product(grad_nm.t(), x_nk.t()) if wants_weight else None
        return grad_x, grad_weight, grad_nm.sum(0) if wants_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., K) with weight (M, K) to (..., M)."""
    if not applies(x) or x.numel() == 0:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


class Linear(torch.nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


class SequenceConv(torch.nn.Conv1d):
    """`nn.Conv1d` with stride 1 over sequences whose channels come last.

    On a CPU as a convolution over images of height 1: oneDNN reads those in this layout, while sequences are copied to
    another one, in which small groups are several times slower.
    """

    def forward(self, x_rtc: Tensor) -> Tensor:
        """(R, T, C) to (R, T', M): T' = T, or one more for an even kernel with padding of half of it."""
        if x_rtc.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x_rtc.transpose(1, 2)).transpose(1, 2)
        rows_rc1t = x_rtc.contiguous()[:, None].permute(0, 3, 1, 2)
        padding = (0, int(self.padding[0]))
        out_rm1t = F.conv2d(rows_rc1t, self.weight[:, :, None], self.bias, padding=padding, groups=self.groups)
        return out_rm1t[:, :, 0].transpose(1, 2)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """`F.dropout`. On a CPU each element is decided by 16 random bits, so a rate is met to 1 / 131072."""
    if not training or rate == 0 or not applies(x):
        return F.dropout(x, rate, training)
    return x * keep_factor(x.shape, rate)


def keep_factor(shape: torch.Size, rate: float) -> Tensor:
    """0 with probability `rate`, else 1 / (1 - rate); fp32, from torch's global CPU generator."""
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    bits = words.view(torch.int16)[:count].view(shape)
    dropped = round(rate * 65536)
    return (bits >= dropped - 32768).to(torch.float32).mul_(65536 / (65536 - dropped))

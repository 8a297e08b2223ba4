"""The speech stem's convolutions on a CPU: matrix products over rows, and norm with GELU while values are in cache.

All samples of a batch are one list of rows, channels last. A window of a convolution with kernel k and stride s then
begins at every s-th row, and the values of s consecutive rows are one longer row of the same memory: no layout is ever
changed. For that every sample is padded to a number of rows that each layer's stride divides. What comes out of padding
is finite, reaches no frame that is kept, and gets no gradient.

Narrow stacks stay with PyTorch's convolution: there copying windows costs more than the products save, and its sums are
a little more exact.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.model import cpu_ops
from d2v_scale.model.cpu_ops import pieces, product

_NARROWEST = 128
"""Fewest channels for which this was faster."""


class FrameConv(nn.Conv1d):
    """Convolution without padding and bias, of (B, C, N) or, on a CPU, of `to_rows`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) to (B, M, N'), or rows (N, C) to rows (N / stride, M)."""
        if x.dim() == 2:
            return _Conv.apply(x, self.weight, self.stride[0])
        return super().forward(x)


def applies(x: Tensor, convs: nn.ModuleList) -> bool:
    """Whether the stack `convs` is computed over rows for `x`: where `cpu_ops` applies and all layers are wide."""
    return cpu_ops.applies(x) and all(conv.out_channels >= _NARROWEST for conv in convs)  # type: ignore[operator]


def to_rows(wave_bn: Tensor, convs: nn.ModuleList) -> tuple[Tensor, int, int]:
    """(B, samples) to rows (B * R, 1) that all of `convs` can pass; (rows, rows and frames of a sample after them)."""
    frames, strides = wave_bn.shape[1], 1
    for conv in convs:
        assert isinstance(conv, FrameConv)
        frames = (frames - conv.kernel_size[0]) // conv.stride[0] + 1
        strides *= conv.stride[0]
    kept = -(-wave_bn.shape[1] // strides)
    assert 0 < frames <= kept
    return F.pad(wave_bn, (0, kept * strides - wave_bn.shape[1])).reshape(-1, 1), kept, frames


def _windows(x_nc: Tensor, stride: int, kernel: int, piece: slice) -> Tensor:
    """Rows (windows of `piece`, kernel * C), contiguous: oneDNN multiplies views with gaps element by element.

    What windows at the end have beyond the last row is zero.
    """
    rows, channels = x_nc.shape
    wide = x_nc.view(rows // stride, stride * channels)
    if kernel == stride:
        return wide[piece]
    out = x_nc.new_empty(len(wide[piece]), kernel * channels)
    for view, column in _columns(wide, stride, kernel, piece):
        into = out[:, column]
        into[: len(view)] = view
        into[len(view) :] = 0
    return out


def _add_windows(grad_x: Tensor, grad_windows: Tensor, stride: int, kernel: int, piece: slice) -> None:
    """The transpose of `_windows`: add to rows what their windows hold."""
    rows, channels = grad_x.shape
    wide = grad_x.view(rows // stride, stride * channels)
    for view, column in _columns(wide, stride, kernel, piece):
        view += grad_windows[: len(view), column]


def _columns(wide: Tensor, stride: int, kernel: int, piece: slice) -> Iterator[tuple[Tensor, slice]]:
    """Views of wide rows that side by side are the windows of `piece`, and the columns each of them fills."""
    channels = wide.shape[1] // stride
    for shift, first in enumerate(range(0, kernel, stride)):
        width = min(stride, kernel - first) * channels
        yield wide[shift:][piece, :width], slice(first * channels, first * channels + width)


def _flat(weight_mck: Tensor) -> Tensor:
    """A convolution's weight as (outputs, kernel * inputs), taps outermost as in a window."""
    return weight_mck.permute(0, 2, 1).reshape(weight_mck.shape[0], -1)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nc: Tensor, weight_mck: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x_nc, weight_mck)
        ctx.stride = stride
        outputs, _, kernel = weight_mck.shape
        weight = _flat(weight_mck)
        out_nm = x_nc.new_empty(x_nc.shape[0] // stride, outputs)
        for piece in pieces(len(out_nm)):
            out_nm[piece] = product(_windows(x_nc, stride, kernel, piece), weight)
        return out_nm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nm: Tensor) -> tuple[Tensor | None, ...]:
        x_nc, weight_mck = ctx.saved_tensors
        outputs, channels, kernel = weight_mck.shape
        weight = _flat(weight_mck)
        grad_weight = torch.zeros_like(weight)
        grad_x = torch.zeros_like(x_nc) if ctx.needs_input_grad[0] else None
        for piece in pieces(len(grad_nm)):
            grad = grad_nm[piece]
            grad_weight += product(grad.t(), _windows(x_nc, ctx.stride, kernel, piece).t())
            if grad_x is not None:
                _add_windows(grad_x, product(grad, weight.t()), ctx.stride, kernel, piece)
        return grad_x, grad_weight.view(outputs, kernel, channels).permute(0, 2, 1).contiguous(), None

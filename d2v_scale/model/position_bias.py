"""Position biases on attention logits, for this rank's heads."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.model.init import ONES, ZEROS, InitRule, set_rule
from d2v_scale.model.parallel_linear import LocalHeads

_ROW_MULTIPLE = 8


class RelativeBias(nn.Module):
    """BEiT's relative-position table on a grid of patches with a CLS token, one for all blocks (spec 3.5).

    `grid`: rows of patches, and patches in a row.

    `owned`: whether the table is here, or comes with each call from the pipeline stage that has it.
    """

    index: Tensor

    def __init__(
        self, grid: tuple[int, int], heads: int, init_std: float = 0.0, *, extra: int = 1, owned: bool = True
    ) -> None:
        super().__init__()
        self.heads = LocalHeads.of(heads)
        self.parameter_shape = ((2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if extra else 0), heads)
        if owned:
            self.table = nn.Parameter(torch.empty(self.parameter_shape))
            set_rule(self.table, InitRule("normal", init_std) if init_std else ZEROS)
        self.register_buffer("index", relative_index(grid, extra), persistent=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The table."""
        return self.table

    def forward(self, table: Tensor | None = None) -> Tensor:
        """(1, local heads, n + T, n + T); the n extra tokens come first. `table`: another stage's, if none is owned."""
        table = self.heads.of_parameter(self.table if table is None else table, 1)
        size = self.index.shape[0]
        return F.embedding(self.index.flatten(), table).view(size, size, -1).permute(2, 0, 1).contiguous()[None]


def relative_index(grid: tuple[int, int], extra: int = 1) -> Tensor:
    """Row of the table for each pair (i, j) of patches on h x w: (d_row + h - 1) * (2w - 1) + d_col + w - 1 with
    d = i - j; the last three rows are CLS to any, any to CLS, CLS to CLS. Several extra tokens are alike in it; without
    any, the table ends with the patches."""
    height, width = grid
    row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    patches = (row[:, None] - row + height - 1) * (2 * width - 1) + column[:, None] - column + width - 1
    index = torch.empty(height * width + extra, height * width + extra, dtype=torch.int64)
    index[extra:, extra:] = patches
    distances = (2 * height - 1) * (2 * width - 1)
    index[:extra, :], index[:, :extra], index[:extra, :extra] = distances, distances + 1, distances + 2
    return index


class AlibiBias(nn.Module):
    """ALiBi with a learned scale >= 0 per head, the same for all blocks: -scale * slope * |i - j| (spec 3.6).

    `owned`: whether the scale is here, or comes with each call from the pipeline stage that has it.
    """

    exponents: Tensor

    def __init__(self, heads: int, *, owned: bool = True) -> None:
        super().__init__()
        self.heads = LocalHeads.of(heads)
        self.parameter_shape = (heads,)
        if owned:
            self.scale = nn.Parameter(torch.empty(self.parameter_shape))
            set_rule(self.scale, ONES)
        # Exponents instead of slopes: they are exact in bf16, to which an engine may cast every buffer.
        self.register_buffer("exponents", torch.tensor(slope_exponents(heads)), persistent=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The scale."""
        return self.scale

    def forward(self, positions_rs: Tensor, scale: Tensor | None = None) -> Tensor:
        """fp32 (R, local heads, S, S) for the original positions, int64 (R, S), that are left in each row.

        `scale`: another stage's, where none is owned.
        """
        return -self.slopes(scale)[None, :, None, None] * distances(positions_rs)[:, None]

    def slopes(self, scale: Tensor | None = None) -> Tensor:
        """fp32 (local heads,): what distances are multiplied with, before the sign. `scale`: see `forward`."""
        scale = self.heads.of_parameter(self.scale if scale is None else scale, 0).float().clamp(min=0)
        return scale * torch.exp2(-self.exponents.narrow(0, self.heads.first, self.heads.count).float())


def distances(positions_rs: Tensor) -> Tensor:
    """fp32 (R, S, S): |i - j| of the positions of each row, int64 (R, S)."""
    return (positions_rs[:, :, None] - positions_rs[:, None, :]).abs().float()


def slope_exponents(heads: int) -> list[float]:
    """-log2 of the ALiBi slopes: geometric for powers of two, else completed with every other one of twice as many."""
    power = 1 << (heads.bit_length() - 1)
    exponents = [8.0 * (i + 1) / power for i in range(power)]
    if power == heads:
        return exponents
    return exponents + slope_exponents(2 * power)[0::2][: heads - power]


def sincos_positions(width: int, grid: tuple[int, ...]) -> Tensor:
    """Fixed positions (T, width) on a grid of any number of axes: equal shares of the channels encode the axes, the
    last one first (of patches: the column, then the row), each as [sin, cos] of omega_i * position with
    omega_i = 10000^(-i / (width / (2 axes))) (spec 3.5). fp32, computed in fp64.

    With NumPy: while a module is built for ZeRO-3, `torch.arange` and its like give values rounded to bf16.
    """
    frequencies = width // (2 * len(grid))
    omega = np.exp(np.arange(frequencies) * (-math.log(10000.0) / frequencies))
    shares = []
    for position in reversed(np.indices(grid)):
        angles = position[..., None] * omega
        shares += [np.sin(angles), np.cos(angles)]
    # Channels that the axes cannot share equally stay 0.
    shares.append(np.zeros((*grid, width - 2 * len(grid) * frequencies)))
    table = np.concatenate(shares, axis=-1).reshape(math.prod(grid), width).astype(np.float32)
    # On the device that ZeRO-3 builds on.
    return torch.from_numpy(table).to(torch.empty(0).device)


def coded_positions(width: int, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """The values of `sincos_positions`, made on `device` in fp32 without a copy from the host: for grids that change
    from batch to batch."""
    frequencies = width // (2 * len(grid))
    omega = torch.exp(torch.arange(frequencies, device=device) * (-math.log(10000.0) / frequencies))
    shares = []
    for axis in reversed(range(len(grid))):
        place = torch.arange(grid[axis], device=device, dtype=torch.float32)
        shape = [1] * axis + [-1] + [1] * (len(grid) - axis)
        angles = place.view(shape) * omega
        shares += [x.expand(*grid, -1) for x in (angles.sin(), angles.cos())]
    shares.append(torch.zeros(*grid, width - 2 * len(grid) * frequencies, device=device))
    return torch.cat(shares, dim=-1).view(math.prod(grid), width)


def block_diagonal(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Position biases (1 or R, H, S_p, S_p) of parts that follow each other as one of the whole: 0 between parts, and
    within those whose bias is None. None: there is no bias. `sizes`: S_p."""
    known = [bias for bias in biases if bias is not None]
    if not known:
        return None
    rows = max(len(bias) for bias in known)
    heads, whole, before = known[0].shape[1], sum(sizes), 0
    strips = []
    for bias, size in zip(biases, sizes, strict=True):
        if bias is None:
            strips.append(known[0].new_zeros(rows, heads, size, whole))
        else:
            strips.append(F.pad(bias, (before, whole - before - size)).expand(rows, -1, -1, -1))
        before += size
    return torch.cat(strips, dim=2)


def add_padding(attention_bias: Tensor | None, valid_rs: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask that SDPA gets: the bias in `dtype`, -inf at padded keys; bool when there is padding but no bias."""
    if attention_bias is None:
        return None if valid_rs is None else valid_rs[:, None, None, :]
    attention_bias = attention_bias.to(dtype)
    if valid_rs is not None:
        attention_bias = attention_bias.masked_fill(~valid_rs[:, None, None, :], -math.inf)
    return aligned(attention_bias) if attention_bias.device.type == "cuda" else attention_bias


def aligned(bias_rhss: Tensor) -> Tensor:
    """The same values in rows that begin a multiple of 8 elements apart, differentiable.

    PyTorch's memory-efficient attention, which a bias that learns goes through on a GPU, asks for such rows: it would
    make them of another bias in every block, and keep each copy for the backward pass.
    """
    *outer, step = bias_rhss.stride()
    if step == 1 and all(stride % _ROW_MULTIPLE == 0 for stride in outer):
        return bias_rhss
    length = bias_rhss.shape[-1]
    return F.pad(bias_rhss, (0, -length % _ROW_MULTIPLE))[..., :length]

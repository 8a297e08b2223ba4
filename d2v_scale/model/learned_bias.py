"""How the learned ALiBi scale gets its gradient: from each block by itself, and never one of a whole bias.

A bias (R, H, S, S) that all blocks share gets a gradient of that size from each, which autograd adds to the sum of
those before: a block writes one and makes three passes more over that size, in the precision of the states, for one
number a head. Here each block's gradient becomes these numbers at once, in fp32, and it is made for some rows after
the other: at most `GRADIENT_BYTES` of it are there at a time, written, read once and gone. Row by row on a CPU
(`model.cpu_attention`) it is of one row.

Without any such gradient it could be done where no weights of attention are dropped: with P the weights, D the
distances and O' attention with log D added to the logits once more, P D V = r O' and r = sum P D is a quotient of two
normalisers. The published recipes with ALiBi drop weights, and a kernel does not drop the same ones in a second pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_scale.model import attention_kernels

GRADIENT_BYTES = 32 << 20
"""Of a gradient of the bias, unless one row has more: what an A100's or H100's L2 cache (40 and 50 MB) has room for."""


class LearnedBias(NamedTuple):
    """A bias that blocks add to their logits, and what learns from it in each."""

    added_rhss: Tensor
    """-slope * distance (R or 1, H, S, S), in the dtype of the states and -inf at padded keys; has no gradient."""
    slope_h: Tensor
    """fp32, of this rank's heads; has one."""
    distances_rss: Tensor
    """fp32 (R or 1, S, S), see `position_bias.distances`."""
    pieces: int
    """Into how many groups of rows a block's attention is divided."""

    def of_pieces(self) -> list[Tensor]:
        """What a block adds in each group of rows, (R', H, S, S) or (1, H, S, S); its gradient goes to `slope_h`."""
        added = _divided(self.added_rhss, self.pieces)
        distances = _divided(self.distances_rss, self.pieces)
        return [_OfRows.apply(a, self.slope_h, d) for a, d in zip(added, distances, strict=True)]


def attend(q_rhsd: Tensor, k_rhsd: Tensor, v_rhsd: Tensor, bias: LearnedBias, dropout: float) -> Tensor:
    """What `attention_kernels.attend` gives, group by group of rows, as (R, S, H, d)."""
    qkv = (x_rhsd.tensor_split(bias.pieces) for x_rhsd in (q_rhsd, k_rhsd, v_rhsd))
    pieces = zip(*qkv, bias.of_pieces(), strict=True)
    mixed = [attention_kernels.attend(q, k, v, added, dropout).transpose(1, 2) for q, k, v, added in pieces]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def pieces_of(rows: int, bias_rhss: Tensor) -> int:
    """Into how many equal groups of `rows` attention with this bias is divided, so that each keeps to `GRADIENT_BYTES`.

    A power of two where one divides the rows: each number of groups, and each remainder, is a graph of compiled blocks.
    """
    bytes_of_row = bias_rhss[0].numel() * bias_rhss.element_size()
    fewest = -(-rows // max(1, GRADIENT_BYTES // bytes_of_row))
    power = 1 << (fewest - 1).bit_length()
    return power if rows % power == 0 else next(n for n in range(fewest, rows + 1) if rows % n == 0)


def _divided(x: Tensor, pieces: int) -> tuple[Tensor, ...]:
    return (x,) * pieces if x.shape[0] == 1 else x.tensor_split(pieces)


class _OfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, added_rhss: Tensor, slope_h: Tensor, distances_rss: Tensor) -> Tensor:
        ctx.save_for_backward(distances_rss)
        return added_rhss.view_as(added_rhss)

    @staticmethod
    def backward(ctx: Any, grad_rhss: Tensor) -> tuple[None, Tensor, None]:
        (distances_rss,) = ctx.saved_tensors
        return None, -(grad_rhss.float() * distances_rss[:, None]).sum((0, 2, 3)), None

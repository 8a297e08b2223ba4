"""How the learned ALiBi scale gets its gradient in compiled blocks: from each block by itself.

A bias (R, H, S, S) that all blocks share gets a gradient of that size from each, which autograd adds to the sum of
those before: a block writes one and makes three passes more over that size, in the precision of the states, for one
number a head. Here each block's gradient becomes these numbers at once, in fp32: it is written, read once and gone.
Compiled, the distances are made while it is read. Run as they are, the same operations would keep a product of that
size in fp32 and pass over more than they save, so that blocks which are not compiled share a bias that learns.

Without any gradient of that size it could be done where no weights of attention are dropped: with P the weights, D the
distances and O' attention with log D added to the logits once more, P D V = r O' and r = sum P D is a quotient of two
normalisers. The published recipes with ALiBi drop weights, and a kernel does not drop the same ones in a second pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_scale.model.position_bias import distances


class LearnedBias(NamedTuple):
    """A bias that blocks add to their logits, and what learns from it in each."""

    added_rhss: Tensor
    """-slope * distance, in the dtype of the states and -inf at padded keys; has no gradient."""
    slope_h: Tensor
    """fp32, of this rank's heads; has one."""
    positions_rs: Tensor
    """int64 (R or 1, S): what the distances are between."""

    def of_block(self) -> Tensor:
        """`added_rhss` for one block, whose gradient goes to `slope_h`."""
        found: Tensor = _OfBlock.apply(*self)
        return found


class _OfBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, added_rhss: Tensor, slope_h: Tensor, positions_rs: Tensor) -> Tensor:
        ctx.save_for_backward(positions_rs)
        return added_rhss.view_as(added_rhss)

    @staticmethod
    def backward(ctx: Any, grad_rhss: Tensor) -> tuple[None, Tensor, None]:
        (positions_rs,) = ctx.saved_tensors
        return None, -(grad_rhss.float() * distances(positions_rs)[:, None]).sum((0, 2, 3)), None

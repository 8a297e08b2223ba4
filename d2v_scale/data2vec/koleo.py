"""KoLeo: what keeps the states of different samples apart (Sablayrolles et al. 2019, arXiv 1806.03198, eq. 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-8
"""Added to a distance: of two samples that are alike its logarithm would have no gradient."""


def koleo_sum(states_rd: Tensor, clones: int, group: int, present_b: Tensor | None = None) -> Tensor:
    """Sum over rows of -log of the distance to the nearest other one, of states brought to length 1; an fp32 scalar.

    `states_rd`: sample-major, R = B*M. A row is compared with those of the same clone, 0 to M-1, of the other samples
    in its group: `group` of them that follow each other, of the last one what is left. A row without any other counts
    nothing, as do samples that are not `present_b` (bool (B,); None: all are), which nobody is compared with.

    Divide by the number of rows over all ranks and micro-batches of the step. As samples of a step are shared out in
    their order, groups are the same at any number of ranks if every micro-batch holds a multiple of `group`.
    """
    samples = len(states_rd) // max(1, clones)
    unit_bmd = F.normalize(states_rd.float(), dim=-1).view(samples, clones, states_rd.shape[-1])
    there_b = unit_bmd.new_ones(samples, dtype=torch.bool) if present_b is None else present_b
    found = []
    for first in range(0, samples, group):
        unit_mgd, there_g = unit_bmd[first : first + group].transpose(0, 1), there_b[first : first + group]
        others_gg = (there_g[:, None] & there_g).fill_diagonal_(False)
        with torch.no_grad():
            alike_mgg = (unit_mgd @ unit_mgd.transpose(1, 2)).masked_fill(~others_gg, -torch.inf)
            nearest_mg = alike_mgg.argmax(dim=2)
        nearest_mgd = unit_mgd.gather(1, nearest_mg[..., None].expand_as(unit_mgd))
        apart_mg = -torch.log((unit_mgd - nearest_mgd).square().sum(dim=2).clamp(min=_LEAST**2).sqrt() + _LEAST)
        found.append(torch.where(others_gg.any(dim=1), apart_mg, 0.0).sum())
    return torch.stack(found).sum() if found else unit_bmd.sum()

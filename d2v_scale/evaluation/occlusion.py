"""Which parts of a sample its representation rests on: each is left out in turn, and the change is measured.

A 2.0 encoder encodes subsets: no block sees what is left out, and nothing stands in its place. What the stem's
convolutions brought of it to its neighbours stays (speech). A 1.0 encoder cannot leave anything out.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.batch import Batch, Layout
from d2v_scale.errors import UserError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.model.pooling import mean_over_positions

MOST_BLOCKS = 64
"""Parts that a sample is divided into at most."""


def blocks_of(extents: tuple[int, ...], most: int = MOST_BLOCKS) -> Tensor:
    """int64 (T,): the part that each position is of, in cubes of the smallest side that gives at most so many."""
    side = 1
    while math.prod(-(-extent // side) for extent in extents) > most:
        side += 1
    counts = [-(-extent // side) for extent in extents]
    number = torch.zeros(extents, dtype=torch.int64)
    for axis, (extent, count) in enumerate(zip(extents, counts, strict=True)):
        place = torch.arange(extent) // side
        number = number * count + place.view([-1 if one == axis else 1 for one in range(len(extents))])
    return number.flatten()


def require_subsets(encoder: FrozenEncoder) -> None:
    """Raises UserError for an encoder that cannot leave positions out."""
    if not encoder.recipe.model.visible_only:
        raise UserError(
            f"{encoder.source} is a 1.0 encoder: a hidden position leaves a mask embedding in its place, so that "
            "nothing can be left out.",
            "Occlusion is drawn of 2.0 encoders (model.visible_only).",
        )


@torch.no_grad()
def importance(encoder: FrozenEncoder, batch: Batch, most: int = MOST_BLOCKS) -> Tensor:
    """float32 (B, T): by how much the pooled output of the last block changes (1 - cosine) without the part that a
    position is of; NaN in padding. Raises UserError for a 1.0 encoder.

    `batch`: on the CPU, nothing masked.
    """
    require_subsets(encoder)
    part_t = blocks_of(batch.extents, most)
    real_bt = _real(encoder, batch)
    whole_bd = _pooled(encoder, batch, real_bt, torch.zeros_like(part_t, dtype=torch.bool))
    found_bt = torch.full(real_bt.shape, torch.nan)
    for part in range(int(part_t.max()) + 1):
        left_out_t = part_t == part
        if bool(left_out_t.all()):
            break
        change_b = 1 - F.cosine_similarity(_pooled(encoder, batch, real_bt, left_out_t), whole_bd)
        # Of a sample that has nothing else, nothing would be left.
        known_b = (real_bt & ~left_out_t).any(dim=1)
        found_bt[:, left_out_t] = torch.where(known_b, change_b, torch.nan)[:, None]
    return found_bt.masked_fill(~real_bt, torch.nan)


def _real(encoder: FrozenEncoder, batch: Batch) -> Tensor:
    valid_bt = encoder.valid_positions(batch.to(encoder.device))
    if valid_bt is None:
        return torch.ones(len(batch.inputs), batch.masked_rt.shape[1], dtype=torch.bool)
    return valid_bt.cpu()


def _pooled(encoder: FrozenEncoder, batch: Batch, real_bt: Tensor, left_out_t: Tensor) -> Tensor:
    """(B, D) of what is left."""
    masked_bt = left_out_t.expand(len(batch.inputs), -1)
    kept = replace(batch, masked_rt=masked_bt, layout=Layout.of(masked_bt)).to(encoder.device)
    states_bsd = encoder.model.features_of_visible(kept)
    return mean_over_positions(states_bsd.cpu(), real_bt[:, ~left_out_t])

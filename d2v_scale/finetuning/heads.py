"""What turns an encoder's states into the answers of a task."""

import math

import torch
from torch import Tensor, nn

from d2v_scale.model.init import InitRule, linear_rules
from d2v_scale.model.pooling import mean_over_positions

PROJECTION = 256
"""Channels that speech is pooled in (the SUPERB convention)."""
_PATCH_EPS = 1e-6


class PatchHead(nn.Module):
    """Mean of the real patches, norm, linear (spec 7.2)."""

    def __init__(self, width: int, outputs: int, scale: float) -> None:
        """`scale`: of the linear's first weights. 1.0 starts near zero."""
        super().__init__()
        self.norm = nn.LayerNorm(width, _PATCH_EPS)
        self.out = nn.Linear(width, outputs)
        # Cut at 2, which is timm's default and next to never reached.
        linear_rules(self.out, InitRule("truncated", 0.02 * scale, 2 * scale))

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, outputs)."""
        if valid_bt is None:
            pooled_bd = states_btd.mean(dim=1)
        else:
            pooled_bd = mean_over_positions(states_btd, valid_bt).to(states_btd.dtype)
        return self.out(self.norm(pooled_bd))


class TextHead(nn.Module):
    """The vector of <s>: dense, tanh, linear (spec 7.3)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, outputs)
        for linear in (self.dense, self.out):
            linear_rules(linear, InitRule("normal", 0.02))

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, outputs)."""
        del valid_bt
        return self.out(torch.tanh(self.dense(states_btd[:, 0])))


class SpeechHead(nn.Module):
    """Linear, mean over the real frames, linear."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, PROJECTION)
        self.out = nn.Linear(PROJECTION, outputs)

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, outputs)."""
        pooled_bd = mean_over_positions(self.dense(states_btd), valid_bt)
        return self.out(pooled_bd.to(self.out.weight.dtype))


class CtcHead(nn.Module):
    """A character, or the blank, at every frame (spec 7.1)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, outputs)
        bound = math.sqrt(6 / (width + outputs))
        linear_rules(self.out, InitRule("uniform", -bound, bound))

    def forward(self, states_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """(B, T, D) to (B, T, outputs)."""
        del valid_bt
        return self.out(states_btd)

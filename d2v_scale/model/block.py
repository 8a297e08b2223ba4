"""The Transformer block: pre-norm with layer scale (1.0 vision) or post-norm (all others), FFN output as a value."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.model import cpu_ops
from d2v_scale.model.attention import SelfAttention
from d2v_scale.model.config import Backbone
from d2v_scale.model.init import InitRule, set_rule
from d2v_scale.model.learned_bias import LearnedBias
from d2v_scale.model.parallel_linear import column_linear, local_share, own_draws, row_linear


class FeedForward(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: Backbone, *, fc1_rule: InitRule, fc2_rule: InitRule) -> None:
        super().__init__()
        local_share(config.ffn, "ffn")
        self.fc1 = column_linear(config.width, config.ffn, bias=True, rule=fc1_rule)
        self.fc2 = row_linear(config.ffn, config.width, rule=fc2_rule)
        self.dropout = config.activation_dropout

    def forward(self, x_rsd: Tensor) -> Tensor:
        """(R, S, D) to (R, S, D)."""
        hidden, _ = self.fc1(x_rsd)
        with own_draws(x_rsd.device, self.training and self.dropout > 0):
            hidden = cpu_ops.dropout(F.gelu(hidden), self.dropout, self.training)
        out, _ = self.fc2(hidden)
        return out


GRAPHS = 64
"""Graphs of a block's code that PyTorch may keep. Its own 8 are less than the student and the teacher of one stem need
(18 were counted: with and without a gradient, padding and drop path, of one row and of many, of one length and of all):
beyond them it runs further ones uncompiled."""


class Block(nn.Module):
    """One Transformer block. `depth_scale` divides the output weights at initialisation (beit: sqrt(2 i))."""

    compiled = False

    def __init__(self, config: Backbone, *, rule: InitRule, depth_scale: float = 1.0) -> None:
        super().__init__()
        out_rule = InitRule(rule.kind, rule.a / depth_scale, rule.b / depth_scale)
        self.norm_first = config.norm_first
        self.dropout = config.dropout
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = SelfAttention(config, qkv_rule=rule, out_rule=out_rule)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config, fc1_rule=rule, fc2_rule=out_rule)
        self.scaled = config.layer_scale > 0
        if self.scaled:
            self.scale1 = nn.Parameter(torch.empty(config.width))
            self.scale2 = nn.Parameter(torch.empty(config.width))
            for scale in (self.scale1, self.scale2):
                set_rule(scale, InitRule("constant", config.layer_scale))

    def compile_forward(self) -> None:
        """Run `forward` through torch.compile from now on. Hooks on the block, ZeRO-3's among them, stay outside."""
        import torch._dynamo.config as dynamo  # most of a second, which only those who compile need

        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
        self.forward = torch.compile(self.forward)  # type: ignore[method-assign]
        self.compiled = True

    def forward(
        self,
        x_rsd: Tensor,
        attention_bias: Tensor | LearnedBias | None,
        branch_scale_2r11: Tensor | None,
        read_n: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(states (R, S, D), FFN output before dropout and residual (R, S, D)).

        `branch_scale_2r11`: what drop path multiplies the two branches of each row with; None: nothing. `read_n`: flat
        positions r * S + s; what follows attention is computed there alone, and both results are (N, D).
        """
        length = x_rsd.shape[1]
        attended = self.attention(self.norm1(x_rsd) if self.norm_first else x_rsd, attention_bias, read_n)
        if read_n is not None:
            x_rsd = x_rsd.flatten(0, 1).index_select(0, read_n)
            if branch_scale_2r11 is not None:
                branch_scale_2r11 = branch_scale_2r11.squeeze(3).index_select(1, read_n // length)
        x_rsd = self._add_branch(x_rsd, attended, 0, branch_scale_2r11)
        if self.norm_first:
            tap_rsd = self.ffn(self.norm2(x_rsd))
            return self._add_branch(x_rsd, tap_rsd, 1, branch_scale_2r11), tap_rsd
        x_rsd = self.norm1(x_rsd)
        tap_rsd = self.ffn(x_rsd)
        return self.norm2(self._add_branch(x_rsd, tap_rsd, 1, branch_scale_2r11)), tap_rsd

    def _add_branch(self, x_rsd: Tensor, branch_rsd: Tensor, which: int, branch_scale_2r11: Tensor | None) -> Tensor:
        """The sum, after dropout of the branch; its layer scale and drop path are one factor, in the same pass."""
        branch_rsd = cpu_ops.dropout(branch_rsd, self.dropout, self.training)
        factor: Tensor | None = (self.scale2 if which else self.scale1) if self.scaled else None
        if branch_scale_2r11 is not None:
            dropped_r11 = branch_scale_2r11[which].to(x_rsd.dtype)
            factor = dropped_r11 if factor is None else factor * dropped_r11
        return x_rsd + branch_rsd if factor is None else torch.addcmul(x_rsd, branch_rsd, factor)


def beit_depth_scale(index: int) -> float:
    """Divisor of block `index`'s output weights in BEiT's initialisation: sqrt(2 i), i counted from 1."""
    return math.sqrt(2.0 * (index + 1))


def with_zero_gradient(block: nn.Module, states_rsd: Tensor) -> Tensor:
    """The states unchanged, and a gradient of zero for a block that is skipped.

    Without one, ZeRO-3 would apply the block's gradient of an earlier step again: it only overwrites gradient shards,
    it never clears them. One position is enough, and the order in which parameters are gathered stays the same.
    """
    states, _ = block(states_rsd[:1, :1].detach(), None, None)
    return states_rsd + 0.0 * states

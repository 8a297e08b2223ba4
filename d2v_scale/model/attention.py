"""Bidirectional self-attention over local heads."""

import torch
from torch import Tensor, nn

from d2v_scale.model import attention_kernels, cpu_attention, learned_bias
from d2v_scale.model.config import Backbone
from d2v_scale.model.init import ZEROS, InitRule
from d2v_scale.model.learned_bias import LearnedBias
from d2v_scale.model.parallel_linear import (
    column_linear,
    local_share,
    own_draws,
    row_linear,
    split_parameter,
)
from d2v_scale.muon import give_structure


class SelfAttention(nn.Module):
    """Multi-head attention with an optional additive bias. Rows of `qkv` are ordered [head][q|k|v][head_dim]."""

    def __init__(self, config: Backbone, *, qkv_rule: InitRule, out_rule: InitRule) -> None:
        super().__init__()
        self.heads = local_share(config.heads, "heads")
        self.head_dim = config.width // config.heads
        self.dropout = config.attention_dropout
        self.qkv = column_linear(config.width, 3 * config.width, bias=config.key_bias, rule=qkv_rule)
        give_structure(self.qkv, (config.heads, 3))
        self.out = row_linear(config.width, config.width, rule=out_rule)
        self.split_bias = not config.key_bias
        if self.split_bias:
            self.q_bias = split_parameter(config.width, ZEROS)
            self.v_bias = split_parameter(config.width, ZEROS)

    def forward(
        self, x_rsd: Tensor, attention_bias: Tensor | LearnedBias | None, read_n: Tensor | None = None
    ) -> Tensor:
        """(R, S, D) to (R, S, D), or to (N, D) at the flat positions `read_n`. `attention_bias`: see
        `Carry.attention_bias`."""
        rows, length, _ = x_rsd.shape
        qkv, _ = self.qkv(x_rsd, self._qkv_bias() if self.split_bias else None)
        dropout = self.dropout if self.training else 0.0
        with own_draws(x_rsd.device, dropout > 0):
            mixed_rshd = _attend(qkv.view(rows, length, self.heads, 3, self.head_dim), attention_bias, dropout)
        mixed = mixed_rshd.reshape(rows, length, self.heads * self.head_dim)
        out, _ = self.out(mixed if read_n is None else mixed.flatten(0, 1).index_select(0, read_n))
        return out

    def _qkv_bias(self) -> Tensor:
        """The bias of `qkv`, with zeros for the keys."""
        q_hd, v_hd = (bias.view(self.heads, self.head_dim) for bias in (self.q_bias, self.v_bias))
        return torch.stack((q_hd, torch.zeros_like(q_hd), v_hd), dim=1).flatten()


def _attend(qkv_rsh3d: Tensor, bias: Tensor | LearnedBias | None, dropout: float) -> Tensor:
    """(R, S, H, d) of queries, keys and values (R, S, H, 3, d)."""
    q_rhsd, k_rhsd, v_rhsd = cpu_attention.parts(qkv_rsh3d)
    if cpu_attention.applies(q_rhsd, bias, dropout):
        return cpu_attention.attend(qkv_rsh3d, bias, dropout)
    if isinstance(bias, LearnedBias):
        return learned_bias.attend(q_rhsd, k_rhsd, v_rhsd, bias, dropout)
    return attention_kernels.attend(q_rhsd, k_rhsd, v_rhsd, bias, dropout).transpose(1, 2)

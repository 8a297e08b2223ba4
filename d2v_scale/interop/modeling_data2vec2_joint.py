"""data2vec encoders for samples of several parts, 1.0 and 2.0, as Hugging Face models of their own.

This file and those that it imports travel with exported weights and need torch and transformers only. Inputs are what
the processor beside it makes: for each part, by its name, its values, NAME_mask where these may be padded, and
NAME_present (B,), 1 where a sample has this part. A part that no sample has is left out.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from .configuration_data2vec2 import Data2Vec2JointConfig
from .layers_data2vec2 import Attention, Block
from .modeling_data2vec2 import Data2Vec2PreTrainedModel, blocks_of, run_blocks
from .modeling_data2vec2_array import mean_of_patches
from .stems_data2vec2_joint import (
    RelativeTable,
    build_stem,
    fill_tokens,
    joined_bias,
    real_slots,
    tokens_first,
    with_padding,
)


@dataclass
class Data2Vec2JointOutput(ModelOutput):
    """`last_hidden_state` (B, n + T, D): the extra tokens of all parts, then their positions, in the order of
    `config.parts`. `attention_mask` (B, T): 1 at positions that are real. `pooler_output` (B, D): the mean of the last
    block's output over these. `hidden_states`: what comes into the blocks of the whole sequence, and out of each."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    attention_mask: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Data2Vec2JointModel(Data2Vec2PreTrainedModel):
    """The encoder. Behind the last block there is a norm where `config.final_norm`."""

    config_class = Data2Vec2JointConfig
    main_input_name = "inputs"

    def __init__(self, config):
        super().__init__(config)
        self.stems = nn.ModuleDict({part["name"]: build_stem(config, part) for part in config.parts})
        self.blocks = blocks_of(config)
        self.final_norm = nn.LayerNorm(config.width, config.layer_norm_eps) if config.final_norm else None
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        for parameter in fill_tokens(module):
            init.normal_(parameter, std=self.config.initializer_range)
        if isinstance(module, RelativeTable):
            init.zeros_(module.table)
        elif isinstance(module, Attention) and module.split_bias:
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, Block) and module.scale1 is not None:
            init.ones_(module.scale1)
            init.ones_(module.scale2)

    def forward(self, output_attentions=None, output_hidden_states=None, return_dict=None, **inputs):
        """`inputs`: NAME, NAME_mask and NAME_present of any of `config.parts`. Raises ValueError for others."""
        given = self._given_parts(inputs)
        states, slots, biases, sizes = [], [], [], []
        for name in given:
            stem: Any = self.stems[name]
            present = inputs.get(f"{name}_present")
            try:
                x, valid = stem(inputs[name], inputs.get(f"{name}_mask"))
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
            tokens, real = stem.extra_tokens, real_slots(valid, present, stem.extra_tokens, x)
            bias = self._bias(stem, x.shape[1] - tokens)
            own = with_padding(bias, real, x)
            x = F.dropout(x, self.config.hidden_dropout, self.training)
            for block in stem.prenet:
                x, _ = block(x, own)
            states.append(x)
            slots.append(real)
            biases.append(bias)
            sizes.append((tokens, x.shape[1] - tokens))
        x, real = tokens_first(states, sizes), None
        if any(one is not None for one in slots):
            whole = [x.new_ones(one.shape[:2], dtype=torch.bool) for one in states]
            real = tokens_first([w if s is None else s for w, s in zip(whole, slots, strict=True)], sizes)
        bias = with_padding(joined_bias(biases, sizes), real, x)
        x, hidden, attentions = run_blocks(self, x, bias, output_attentions, output_hidden_states)
        extra = sum(tokens for tokens, _ in sizes)
        positions = torch.ones_like(x[:, extra:, 0], dtype=torch.long) if real is None else real[:, extra:].long()
        output = Data2Vec2JointOutput(
            last_hidden_state=x if self.final_norm is None else self.final_norm(x),
            pooler_output=mean_of_patches(x[:, extra:], positions),
            attention_mask=positions,
            hidden_states=hidden,
            attentions=attentions,
        )
        return self._given(output, return_dict)

    def _given_parts(self, inputs):
        known = [part["name"] for part in self.config.parts]
        for key in inputs:
            if key.removesuffix("_mask").removesuffix("_present") not in known:
                raise ValueError(f"{key} is no input of this encoder, which has the parts {', '.join(known)}.")
        given = [name for name in known if inputs.get(name) is not None]
        if not given:
            raise ValueError(f"No part is given: give one of {', '.join(known)}.")
        return given

    def _bias(self, stem, positions):
        """(1, heads, n + T, n + T) within one part, 0 from and to extra tokens unless its table says; or None."""
        if not hasattr(stem, "bias"):
            return None
        bias, extra = stem.bias(positions)[None], stem.extra_tokens
        return bias if bias.shape[-1] == extra + positions else F.pad(bias, (extra, 0, extra, 0))

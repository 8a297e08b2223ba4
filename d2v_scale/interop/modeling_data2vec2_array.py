"""data2vec encoders for arrays along 1 to 4 axes, 1.0 and 2.0, as Hugging Face models of their own.

This file and those that it imports travel with exported weights and need torch and transformers only. Inputs are what
the processor beside it makes: `values` (B, C, E_1 ... E_n), always of `config.extents`, and `attention_mask` (B, T), 1
where a patch is neither padding nor misses a value. Patches are row-major; `config.extra_tokens` come before them.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from .configuration_data2vec2 import Data2Vec2ArrayConfig
from .layers_data2vec2 import Attention, Block
from .modeling_data2vec2 import Data2Vec2PreTrainedModel, blocks_of, label_loss, run_blocks


class ArrayFeatures(nn.Module):
    """Arrays (B, C, E_1 ... E_n) to patches (B, T, D). Of four axes, steps within a patch along the first are
    channels."""

    def __init__(self, config):
        super().__init__()
        self.first, *last = config.patch if len(config.patch) == 4 else (1, *config.patch)
        self.folds = len(config.patch) == 4
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(last) - 1]
        self.patch = conv(config.num_channels * self.first, config.width, tuple(last), tuple(last))

    def forward(self, values):
        values = values.to(self.patch.weight.dtype)
        if not self.folds:
            return self.patch(values).flatten(2).transpose(1, 2)
        samples, channels, extent, *others = values.shape
        split = values.reshape(samples, channels, extent // self.first, self.first, *others)
        folded = split.transpose(1, 2).reshape(-1, channels * self.first, *others)
        return self.patch(folded).flatten(2).transpose(1, 2).reshape(samples, -1, self.patch.out_channels)


class ArrayContext(nn.Module):
    """Hides patches (1.0), adds positions, prepends extra tokens, then a norm (2.0)."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.grid = config.grid
        self.cls = nn.Parameter(torch.zeros(1, config.extra_tokens, width)) if config.extra_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if config.mask_token else None
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.zeros(math.prod(self.grid), width)) if learned else None
        self.norm = nn.LayerNorm(width, config.layer_norm_eps) if config.context_norm else None

    def forward(self, x, bool_masked_pos):
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos: this encoder has no mask token.")
            x = torch.where(bool_masked_pos.bool()[..., None], self.mask_token.to(x.dtype), x)
        positions = sincos_positions(x.shape[-1], self.grid) if self.positions is None else self.positions
        x = x + positions.to(x)
        if self.cls is not None:
            x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1)
        return x if self.norm is None else self.norm(x)


def sincos_positions(width, grid):
    """(T, width): equal shares of the channels encode the axes, the last one first, each as sines, then cosines."""
    frequencies = width // (2 * len(grid))
    omega = torch.exp(torch.arange(frequencies, dtype=torch.float64) * (-math.log(10000.0) / frequencies))
    shares = []
    for axis in reversed(range(len(grid))):
        at = torch.arange(grid[axis], dtype=torch.float64)
        angles = at[:, None] * omega
        share = torch.cat((angles.sin(), angles.cos()), dim=1).float()
        share = share.view(*(size if i == axis else 1 for i, size in enumerate(grid)), -1)
        shares.append(share.expand(*grid, -1))
    # Channels that the axes cannot share equally stay 0.
    shares.append(torch.zeros(*grid, width - 2 * len(grid) * frequencies))
    return torch.cat(shares, dim=-1).reshape(math.prod(grid), width)


class Data2Vec2ArrayPreTrainedModel(Data2Vec2PreTrainedModel):
    """What models of arrays have in common."""

    config_class = Data2Vec2ArrayConfig
    main_input_name = "values"
    input_modalities = ("array",)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ArrayContext):
            for parameter in (module.cls, module.mask_token, module.positions):
                if parameter is not None:
                    init.normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, Attention) and module.split_bias:
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, Block) and module.scale1 is not None:
            init.ones_(module.scale1)
            init.ones_(module.scale2)


class Data2Vec2ArrayModel(Data2Vec2ArrayPreTrainedModel):
    """The encoder. `last_hidden_state` (B, n + T, D), n extra tokens first, is the last block's output, behind it a
    norm where `config.final_norm`; `pooler_output` (B, D) is the mean of the last block's output over real patches."""

    def __init__(self, config):
        super().__init__(config)
        self.features = ArrayFeatures(config)
        self.context = ArrayContext(config)
        self.blocks = blocks_of(config)
        self.final_norm = nn.LayerNorm(config.width, config.layer_norm_eps) if config.final_norm else None
        self.post_init()

    def get_input_embeddings(self):
        """The patches' projection."""
        return self.features.patch

    def forward(
        self,
        values,
        attention_mask=None,
        bool_masked_pos=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """`attention_mask` (B, T): 0 at patches that are padding or miss a value, which nothing attends to; None: all
        are real. `bool_masked_pos` bool (B, T): patches to hide (1.0)."""
        config = self.config
        wanted = (config.num_channels, *config.extents)
        if tuple(values.shape[1:]) != wanted:
            raise ValueError(f"values have the shape {tuple(values.shape)}; this encoder takes (arrays, {wanted}).")
        x = self.context(self.features(values), bool_masked_pos)
        x = F.dropout(x, config.hidden_dropout, self.training)
        bias = None if attention_mask is None else self._bias(attention_mask, x)
        x, states, attentions = run_blocks(self, x, bias, output_attentions, output_hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x if self.final_norm is None else self.final_norm(x),
            pooler_output=mean_of_patches(x[:, config.extra_tokens :], attention_mask),
            hidden_states=states,
            attentions=attentions,
        )
        return self._given(output, return_dict)

    def _bias(self, attention_mask, x):
        """(B, 1, 1, n + T): -inf at patches that are not real. A row without any attends to all of them: its numbers
        mean nothing, but are finite."""
        if tuple(attention_mask.shape[1:]) != (x.shape[1] - self.config.extra_tokens,):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; it is of patches: "
                f"(arrays, {x.shape[1] - self.config.extra_tokens})."
            )
        real = F.pad(attention_mask.bool(), (self.config.extra_tokens, 0), value=True)
        real = real | ~real.any(dim=1, keepdim=True)
        zeros = torch.zeros(x.shape[0], 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
        return zeros.masked_fill(~real[:, None, None, :], -math.inf)


def mean_of_patches(x, attention_mask):
    """(B, D) of (B, T, D), over real patches."""
    if attention_mask is None:
        return x.float().mean(1).to(x.dtype)
    real = attention_mask[..., None].float()
    return ((x.float() * real).sum(1) / real.sum(1).clamp(min=1)).to(x.dtype)


class Data2Vec2ForArrayClassification(Data2Vec2ArrayPreTrainedModel):
    """Mean of the real patches, norm, linear. There is no norm behind the encoder."""

    def __init__(self, config):
        config.final_norm = False
        super().__init__(config)
        self.data2vec2 = Data2Vec2ArrayModel(config)
        self.head_norm = nn.LayerNorm(config.width, 1e-6)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(
        self,
        values,
        attention_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """`labels`: classes (B,); of several labels (B, labels); of a regression (B,) or (B, labels)."""
        outputs = self.data2vec2(values, attention_mask, None, output_attentions, output_hidden_states, True)
        logits = self.classifier(self.head_norm(outputs.pooler_output))
        loss = None if labels is None else label_loss(self.config, logits, labels)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return self._given(output, return_dict)

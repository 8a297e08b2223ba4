"""data2vec 2.0 encoders for speech and vision, as a Hugging Face model of its own.

This file travels with exported weights and needs torch and transformers only. The architectures are not those of
`Data2VecAudioModel` (no ALiBi there) or of any image class (post-norm with fixed positions), so loading the weights
into one of them would be silently wrong.

Speech: 16 kHz waveforms, each normalised to zero mean and unit variance, in `input_values`. Vision: `pixel_values`;
position 0 of the output is the CLS token.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)

# What a class of another architecture would read from config.json: sizes that none can be built with.
NO_OTHER_CLASS = {"hidden_size": 1, "num_attention_heads": 2}


class Data2Vec2Config(PretrainedConfig):
    """Sizes of a data2vec 2.0 speech or vision encoder. `depth` counts all blocks."""

    model_type = "data2vec2"

    def __init__(
        self,
        modality="vision",
        width=768,
        depth=12,
        heads=12,
        ffn=3072,
        layer_norm_eps=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        image_size=224,
        patch_size=16,
        num_channels=3,
        conv_layers=(),
        pos_conv_depth=5,
        pos_conv_kernel=19,
        pos_conv_groups=16,
        alibi=True,
        vocab_size=32,
        classifier_proj_size=256,
        **kwargs,
    ):
        self.modality = modality
        self.width = width
        self.depth = depth
        self.heads = heads
        self.ffn = ffn
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.conv_layers = [list(layer) for layer in conv_layers]
        self.pos_conv_depth = pos_conv_depth
        self.pos_conv_kernel = pos_conv_kernel
        self.pos_conv_groups = pos_conv_groups
        self.alibi = alibi
        self.vocab_size = vocab_size
        self.classifier_proj_size = classifier_proj_size
        super().__init__(**{key: value for key, value in kwargs.items() if key not in NO_OTHER_CLASS})

    @property
    def hidden_size(self):
        """Channels of the output."""
        return self.width

    def to_dict(self):
        """As config.json has it."""
        return {**super().to_dict(), **NO_OTHER_CLASS}


class SpeechFeatures(nn.Module):
    """Waveform (B, samples) to frames (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        channels = [1, *(layer[0] for layer in config.conv_layers)]
        self.convs = nn.ModuleList(
            nn.Conv1d(inputs, layer[0], layer[1], layer[2], bias=False)
            for inputs, layer in zip(channels, config.conv_layers, strict=False)
        )
        self.conv_norms = nn.ModuleList(nn.LayerNorm(layer[0]) for layer in config.conv_layers)
        self.norm = nn.LayerNorm(channels[-1])
        self.proj = nn.Linear(channels[-1], config.width)

    def forward(self, wave):
        x = wave.to(self.proj.weight.dtype)[:, None]
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            x = F.gelu(norm(conv(x).transpose(1, 2))).transpose(1, 2)
        return self.proj(self.norm(x.transpose(1, 2)))


class SpeechContext(nn.Module):
    """Adds what the positional convolutions give, then a norm."""

    def __init__(self, config):
        super().__init__()
        width, kernel = config.width, config.pos_conv_kernel
        self.pos_convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.pos_conv_groups)
            for _ in range(config.pos_conv_depth)
        )
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x):
        positions = x
        for conv in self.pos_convs:
            positions = conv(positions.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            positions = F.gelu(F.layer_norm(positions, positions.shape[-1:], eps=1e-5))
        return self.norm(x + positions)


class AlibiScale(nn.Module):
    """-scale * slope * |i - j| for each head; the scale is learned and not negative."""

    def __init__(self, config):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.heads))

    def forward(self, length):
        heads = self.scale.shape[0]
        slopes = torch.tensor(alibi_slopes(heads), device=self.scale.device)
        at = torch.arange(length, device=self.scale.device)
        distance = (at[:, None] - at[None, :]).abs().float()
        return -(self.scale.float().clamp(min=0) * slopes)[:, None, None] * distance


def alibi_slopes(heads):
    """Geometric for a power of two, else completed with every other slope of twice as many heads."""
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[0::2][: heads - power]


class VisionFeatures(nn.Module):
    """Images (B, C, H, W) to patches (B, T, D), row by row."""

    def __init__(self, config):
        super().__init__()
        self.patch = nn.Conv2d(config.num_channels, config.width, config.patch_size, config.patch_size)

    def forward(self, images):
        return self.patch(images.to(self.patch.weight.dtype))


class VisionContext(nn.Module):
    """Adds fixed positions, prepends the CLS token, then a norm."""

    def __init__(self, config):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.norm = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, patches):
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)
        x = x + sincos_positions(x.shape[-1], rows, columns).to(x)
        return self.norm(torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1))


def sincos_positions(width, rows, columns):
    """(rows * columns, width): the first half of the channels encodes the column, the second the row."""
    omega = torch.exp(torch.arange(width // 4, dtype=torch.float64) * (-math.log(10000.0) / (width // 4)))

    def encode(count):
        angles = torch.arange(count, dtype=torch.float64)[:, None] * omega
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    column = encode(columns)[None].expand(rows, -1, -1)
    row = encode(rows)[:, None].expand(-1, columns, -1)
    return torch.cat((column, row), dim=-1).reshape(rows * columns, width).float()


class Attention(nn.Module):
    """Rows of `qkv` are ordered [head][q|k|v][head_dim]."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, bias):
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)
        self.dropout = config.activation_dropout

    def forward(self, x):
        return self.fc2(F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training))


class Block(nn.Module):
    """Post-norm Transformer block."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.norm1 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x, bias):
        x = self.norm1(x + F.dropout(self.attention(x, bias), self.dropout, self.training))
        return self.norm2(x + F.dropout(self.ffn(x), self.dropout, self.training))


class Data2Vec2Model(PreTrainedModel):
    """The encoder. `last_hidden_state` (B, T, D) is the last block's output; there is no norm after it."""

    config_class = Data2Vec2Config
    base_model_prefix = "data2vec2"

    def __init__(self, config):
        super().__init__(config)
        speech = config.modality == "speech"
        self.main_input_name = "input_values" if speech else "pixel_values"
        self.features = SpeechFeatures(config) if speech else VisionFeatures(config)
        self.context = SpeechContext(config) if speech else VisionContext(config)
        if speech and config.alibi:
            self.bias = AlibiScale(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, AlibiScale):
            nn.init.ones_(module.scale)
        elif isinstance(module, VisionContext):
            nn.init.normal_(module.cls)

    def frames_of(self, samples):
        """Frames that the convolutions make of this many samples."""
        for _, kernel, stride in self.config.conv_layers:
            samples = (samples - kernel) // stride + 1
        return samples

    def forward(
        self,
        pixel_values=None,
        input_values=None,
        attention_mask=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """`attention_mask` (speech): 1 where the waveform is real. Padded frames are not attended to; as in
        pretraining, the positional convolutions see them."""
        valid = None
        if self.config.modality == "speech":
            x = self.features(input_values)
            if attention_mask is not None:
                frames = self.frames_of(attention_mask.long().sum(-1)).clamp(min=1)
                valid = torch.arange(x.shape[1], device=x.device)[None] < frames[:, None]
        else:
            x = self.features(pixel_values)
        x = self.context(x)
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        bias = self.bias(x.shape[1])[None].to(x.dtype) if hasattr(self, "bias") else None
        if valid is not None:
            padded = ~valid[:, None, None, :]
            zeros = torch.zeros(1, 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
            bias = (zeros if bias is None else bias).masked_fill(padded, -math.inf)
        states = [x]
        for block in self.blocks:
            x = block(x, bias)
            states.append(x)
        hidden = tuple(states) if output_hidden_states else None
        if return_dict is False:
            return (x, hidden) if hidden is not None else (x,)
        return BaseModelOutput(last_hidden_state=x, hidden_states=hidden)


class Data2Vec2ForCTC(PreTrainedModel):
    """A character, or the blank (number `pad_token_id`), at every frame of speech."""

    config_class = Data2Vec2Config
    base_model_prefix = "data2vec2"
    main_input_name = "input_values"

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2Model(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    _init_weights = Data2Vec2Model._init_weights

    def forward(self, input_values=None, attention_mask=None, labels=None, output_hidden_states=None, **kwargs):
        """`labels`: characters (B, U), filled with -100."""
        outputs = self.data2vec2(
            input_values=input_values, attention_mask=attention_mask, output_hidden_states=output_hidden_states
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            mask = torch.ones_like(input_values) if attention_mask is None else attention_mask
            loss = F.ctc_loss(
                logits.float().log_softmax(-1).transpose(0, 1),
                labels.clamp(min=0),
                self.data2vec2.frames_of(mask.long().sum(-1)),
                (labels >= 0).sum(-1),
                blank=self.config.pad_token_id,
                reduction="sum",
                zero_infinity=True,
            )
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class Data2Vec2ForImageClassification(PreTrainedModel):
    """Mean of the patches, norm, linear."""

    config_class = Data2Vec2Config
    base_model_prefix = "data2vec2"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2Model(config)
        self.head_norm = nn.LayerNorm(config.width, 1e-6)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    _init_weights = Data2Vec2Model._init_weights

    def forward(self, pixel_values=None, labels=None, output_hidden_states=None, **kwargs):
        """`labels`: classes (B,)."""
        outputs = self.data2vec2(pixel_values=pixel_values, output_hidden_states=output_hidden_states)
        logits = self.classifier(self.head_norm(outputs.last_hidden_state[:, 1:].mean(1)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class Data2Vec2ForSequenceClassification(PreTrainedModel):
    """Speech: linear, mean over the real frames, linear."""

    config_class = Data2Vec2Config
    base_model_prefix = "data2vec2"
    main_input_name = "input_values"

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2Model(config)
        self.projector = nn.Linear(config.width, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    _init_weights = Data2Vec2Model._init_weights

    def forward(self, input_values=None, attention_mask=None, labels=None, output_hidden_states=None, **kwargs):
        """`labels`: classes (B,)."""
        outputs = self.data2vec2(
            input_values=input_values, attention_mask=attention_mask, output_hidden_states=output_hidden_states
        )
        x = self.projector(outputs.last_hidden_state)
        if attention_mask is not None:
            frames = self.data2vec2.frames_of(attention_mask.long().sum(-1))
            real = torch.arange(x.shape[1], device=x.device)[None] < frames[:, None]
            x = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        else:
            x = x.mean(1)
        logits = self.classifier(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

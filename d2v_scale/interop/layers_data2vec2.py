"""Blocks of data2vec encoders, and stems of 2.0 speech and vision; travels with exported weights."""

# mypy: allow-untyped-defs, allow-untyped-calls

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class SpeechFeatures(nn.Module):
    """Waveform (B, samples) to frames (B, T, D), and what is projected to them (B, T, channels)."""

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
        self.dropout = config.feat_proj_dropout

    def freeze_convolutions(self):
        """No gradient reaches what comes before the projection and its norm."""
        for parameter in [*self.convs.parameters(), *self.conv_norms.parameters()]:
            parameter.requires_grad = False

    def forward(self, wave):
        x = wave.to(self.proj.weight.dtype)[:, None]
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            x = F.gelu(norm(conv(x).transpose(1, 2))).transpose(1, 2)
        features = self.norm(x.transpose(1, 2))
        return F.dropout(self.proj(features), self.dropout, self.training), features


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
        return self.norm(self.placed(x))

    def placed(self, x):
        """Frames with their positions."""
        positions = x
        for conv in self.pos_convs:
            positions = conv(positions.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            positions = F.gelu(F.layer_norm(positions, positions.shape[-1:], eps=1e-5))
        return x + positions


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
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        self.grid = height // config.patch_size, width // config.patch_size
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.norm = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, patches, interpolate):
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)
        x = x + sincos_positions(x.shape[-1], rows, columns, self.grid if interpolate else None).to(x)
        return self.norm(torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1))


def sincos_positions(width, rows, columns, grid=None):
    """(rows * columns, width): the first half of the channels encodes the column, the second the row.

    With `grid`, the centres of the patches are laid over those of an image of so many rows and columns of patches; else
    patches count from 0.
    """
    omega = torch.exp(torch.arange(width // 4, dtype=torch.float64) * (-math.log(10000.0) / (width // 4)))

    def encode(count, over):
        at = torch.arange(count, dtype=torch.float64)
        if over is not None:
            at = (at + 0.5) * over / count - 0.5
        angles = at[:, None] * omega
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    rows_over, columns_over = grid or (None, None)
    column = encode(columns, columns_over)[None].expand(rows, -1, -1)
    row = encode(rows, rows_over)[:, None].expand(-1, columns, -1)
    return torch.cat((column, row), dim=-1).reshape(rows * columns, width).float()


class Attention(nn.Module):
    """Rows of `qkv` are ordered [head][q|k|v][head_dim]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.key_bias)
        self.out = nn.Linear(config.width, config.width)
        self.split_bias = not config.key_bias
        if self.split_bias:
            self.q_bias = nn.Parameter(torch.zeros(config.width))
            self.v_bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, x, bias, output_attentions=False):
        """`bias` (B or 1, heads or 1, T or 1, T) is added to the logits. The second result: weights (B, heads, T, T)
        where they are asked for or attention is `eager`, else None."""
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        if self.split_bias:
            q = q + self.q_bias.view(self.heads, 1, -1)
            v = v + self.v_bias.view(self.heads, 1, -1)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":
            logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = (logits if bias is None else logits + bias).softmax(-1, dtype=torch.float32).to(v.dtype)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
        else:
            # cuDNN before 9.26 gives NaN gradients with a bias on Hopper: pytorch/pytorch#196678.
            own = bias is not None and q.is_cuda
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if own else nullcontext():
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width)), weights


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)
        self.dropout = config.activation_dropout

    def forward(self, x):
        return self.fc2(F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training))


class Block(nn.Module):
    """Transformer block, post-norm, or of arrays pre-norm, too, and with layer scale; while training, a branch of
    `drop_path` of the rows is left out."""

    # What `gradient_checkpointing_enable` sets, and a function beside it.
    gradient_checkpointing = False

    def __init__(self, config, drop_path):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.drop_path = drop_path
        self.norm_first = config.norm_first
        self.norm1 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.ffn = FeedForward(config)
        self.scale1 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None

    def forward(self, x, bias, output_attentions=False):
        mixed, weights = self.attention(self.norm1(x) if self.norm_first else x, bias, output_attentions)
        x = x + self._dropped(mixed, self.scale1)
        if self.norm_first:
            return x + self._dropped(self.ffn(self.norm2(x)), self.scale2), weights
        x = self.norm1(x)
        return self.norm2(x + self._dropped(self.ffn(x), self.scale2)), weights

    def _dropped(self, x, scale):
        x = F.dropout(x, self.dropout, self.training)
        if scale is not None:
            x = x * scale
        if self.training and self.drop_path > 0:
            kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
            x = x * kept.to(x.dtype) / (1 - self.drop_path)
        return x

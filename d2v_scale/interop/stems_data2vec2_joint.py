"""Stems of data2vec encoders for samples of several parts, 1.0 and 2.0: patches, waves, tokens; travels with
exported weights."""

# mypy: allow-untyped-defs, allow-untyped-calls

import math
from types import SimpleNamespace

import torch
from torch import nn

from .layers_data2vec2 import AlibiScale, Block, SpeechContext, SpeechFeatures
from .modeling_data2vec2_array import ArrayFeatures, sincos_positions


class Patches(nn.Module):
    """Images and arrays. `mask` (B, T): 1 at patches that hold values; None: all do."""

    def __init__(self, part):
        super().__init__()
        self.shape = (part.num_channels, *part.extents)
        self.features = ArrayFeatures(part)
        self.context = PatchContext(part)
        if part.positions == "relative":
            self.bias = RelativeTable(part)

    def forward(self, inputs, mask):
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(f"has the shape {tuple(inputs.shape)}; this encoder takes (samples, {self.shape}).")
        x = self.context(self.features(inputs))
        return x, None if mask is None else mask.bool()


class PatchContext(nn.Module):
    """Adds positions, prepends extra tokens, then a norm (2.0)."""

    def __init__(self, part):
        super().__init__()
        self.grid = [extent // size for extent, size in zip(part.extents, part.patch, strict=True)]
        self.kind = part.positions
        self.cls = extra_tokens(part)
        learned = part.positions == "learned"
        self.positions = nn.Parameter(torch.zeros(math.prod(self.grid), part.width)) if learned else None
        self.norm = nn.LayerNorm(part.width, part.layer_norm_eps) if part.context_norm else None

    def forward(self, x):
        if self.kind != "relative":
            positions = sincos_positions(x.shape[-1], self.grid) if self.positions is None else self.positions
            x = x + positions.to(x)
        x = behind_tokens(self.cls, x)
        return x if self.norm is None else self.norm(x)


class RelativeTable(nn.Module):
    """A bias for each distance between patches on a grid, and three for extra tokens."""

    def __init__(self, part):
        super().__init__()
        height, width = (extent // size for extent, size in zip(part.extents, part.patch, strict=True))
        self.grid, self.extra = (height, width), part.extra_tokens
        rows = (2 * height - 1) * (2 * width - 1) + (3 if self.extra else 0)
        self.table = nn.Parameter(torch.zeros(rows, part.heads))

    def forward(self, length):
        """(heads, n + T, n + T)."""
        del length
        (height, width), extra = self.grid, self.extra
        at = torch.arange(height * width, device=self.table.device)
        row, column = at // width, at % width
        between = (row[:, None] - row + height - 1) * (2 * width - 1) + column[:, None] - column + width - 1
        index = between.new_empty(extra + len(at), extra + len(at))
        index[extra:, extra:] = between
        distances = (2 * height - 1) * (2 * width - 1)
        index[:extra, :], index[:, :extra], index[:extra, :extra] = distances, distances + 1, distances + 2
        return self.table[index].permute(2, 0, 1)


class Waves(nn.Module):
    """Recordings. `mask` (B, samples): 1 where the waveform is real; None: all of it is."""

    def __init__(self, part):
        super().__init__()
        self.convolutions = [(kernel, stride) for _, kernel, stride in part.conv_layers]
        self.features = SpeechFeatures(part)
        self.context = WaveContext(part)
        if part.alibi:
            self.bias = AlibiScale(part)

    def forward(self, inputs, mask):
        if inputs.dim() != 2:
            raise ValueError(f"has the shape {tuple(inputs.shape)}; this encoder takes waveforms (samples, length).")
        x, _ = self.features(inputs)
        valid = None
        if mask is not None:
            frames = mask.long().sum(-1)
            for kernel, stride in self.convolutions:
                frames = (frames - kernel) // stride + 1
            valid = torch.arange(x.shape[1], device=x.device)[None] < frames[:, None]
        return self.context(x, valid), valid


class WaveContext(SpeechContext):
    """Adds what the positional convolutions give, in 1.0 of frames without what is padding, prepends extra tokens, then
    a norm."""

    def __init__(self, part):
        super().__init__(part)
        self.blanks_padding = part.blanks_padding
        self.cls = extra_tokens(part)
        if not part.context_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]

    def forward(self, x, valid=None):
        if self.blanks_padding and valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
        return self.norm(behind_tokens(self.cls, self.placed(x)))


class Tokens(nn.Module):
    """Texts, as ids. `mask` is not needed: what is padding, its id says."""

    def __init__(self, part):
        super().__init__()
        self.pad_id, self.longest = part.pad_id, part.max_positions
        self.features = TokenFeatures(part)
        self.context = nn.Module()
        self.context.cls = extra_tokens(part)

    def forward(self, inputs, mask):
        if inputs.dim() != 2 or inputs.shape[1] > self.longest:
            raise ValueError(f"has the shape {tuple(inputs.shape)}; a text has {self.longest} tokens at most.")
        valid = inputs != self.pad_id
        return behind_tokens(self.context.cls, self.features(inputs, valid)), valid


class TokenFeatures(nn.Module):
    """Embeddings of tokens and of their positions, then a norm; in 1.0 padding is zero."""

    def __init__(self, part):
        super().__init__()
        self.pad_id, self.blanks_padding = part.pad_id, part.blanks_padding
        self.tokens = nn.Embedding(part.vocab_size, part.width, padding_idx=part.pad_id)
        # Positions count from pad_id + 1; padding has the one before.
        self.positions = nn.Embedding(part.max_positions + part.pad_id + 1, part.width, padding_idx=part.pad_id)
        self.norm = nn.LayerNorm(part.width)  # whatever layer_norm_eps of the blocks is

    def forward(self, ids, valid):
        positions = valid.cumsum(dim=1) * valid + self.pad_id
        x = self.norm(self.tokens(ids) + self.positions(positions))
        return x * valid[..., None] if self.blanks_padding else x


STEMS = {"patches": Patches, "waves": Waves, "tokens": Tokens}


def build_stem(config, settings):
    """The stem of a part, with its own blocks in `prenet`."""
    shared = ("width", "heads", "layer_norm_eps", "feat_proj_dropout")
    part = SimpleNamespace(**{name: getattr(config, name) for name in shared}, **settings)
    stem = STEMS[part.kind](part)
    stem.extra_tokens = part.extra_tokens
    stem.prenet = nn.ModuleList(Block(config, 0.0) for _ in range(part.prenet_depth))
    return stem


def extra_tokens(part):
    """(1, n, D) learned tokens, or None."""
    return nn.Parameter(torch.zeros(1, part.extra_tokens, part.width)) if part.extra_tokens else None


def behind_tokens(cls, x):
    """(B, n + T, D): the tokens, then positions."""
    return x if cls is None else torch.cat((cls.expand(x.shape[0], -1, -1), x), dim=1)


def with_padding(bias, real, x):
    """The bias (1, heads, S, S) or None with -inf at keys that are not real (B, S). A row without any attends to all
    of them: its numbers mean nothing, but are finite."""
    if real is None:
        return None if bias is None else bias.to(x.dtype)
    real = real | ~real.any(dim=1, keepdim=True)
    if bias is None:
        bias = torch.zeros(x.shape[0], 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    return bias.to(x.dtype).masked_fill(~real[:, None, None, :], -math.inf)


def joined_bias(biases, sizes):
    """Of parts with sizes (extra tokens, positions): 0 between parts, in the order of the whole sequence, in which all
    tokens come first. None: no part has one."""
    known = [bias for bias in biases if bias is not None]
    if not known:
        return None
    whole = sum(tokens + positions for tokens, positions in sizes)
    joined = known[0].new_zeros(1, known[0].shape[1], whole, whole)
    leading: list[int] = []
    rest: list[int] = []
    before = 0
    for bias, (tokens, positions) in zip(biases, sizes, strict=True):
        end = before + tokens + positions
        if bias is not None:
            joined[:, :, before:end, before:end] = bias
        leading += range(before, before + tokens)
        rest += range(before + tokens, end)
        before = end
    order = torch.tensor(leading + rest, device=joined.device)
    return joined.index_select(2, order).index_select(3, order)


def tokens_first(parts, sizes):
    """Tensors (B, n + T, ...) of parts as one, in which all extra tokens come first."""
    tokens = [x[:, :count] for x, (count, _) in zip(parts, sizes, strict=True)]
    return torch.cat([*tokens, *(x[:, count:] for x, (count, _) in zip(parts, sizes, strict=True))], dim=1)


def real_slots(valid, present, tokens, x):
    """bool (B, n + T): what of a part others may attend to. None: all of it."""
    if valid is None and present is None:
        return None
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if valid is not None:
        real[:, tokens:] = valid
    return real if present is None else real & present.bool()[:, None]


def fill_tokens(module):
    """Every extra token and learned position of a stem, as `init.normal_` wants them."""
    for name in ("cls", "positions"):
        if isinstance(found := getattr(module, name, None), nn.Parameter):
            yield found

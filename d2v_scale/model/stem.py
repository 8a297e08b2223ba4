"""The layers before the main blocks, of one stem: what all kinds have in common."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import BEIT, ZEROS, InitRule, set_rule
from d2v_scale.model.position_bias import AlibiBias, RelativeBias, coded_positions


class Stem(nn.Module):
    """Those layers of a stem that exist here. A subclass builds them; `prenet` is added by the stack."""

    features: nn.Module
    context: nn.Module
    bias: RelativeBias | AlibiBias
    hidden: "HiddenPart"
    prenet: nn.ModuleList

    def __init__(self, config: ModelConfig) -> None:
        """`config`: with this stem alone."""
        super().__init__()
        [stem] = config.stems.values()
        self.extra_tokens = stem.extra_token_count
        """Positions before those of the input (CLS)."""

    def valid_positions(self, inputs: Tensor, valid: Tensor) -> Tensor | None:
        """bool (B, T): positions that are not padding, from what of `inputs` is real. None: none is padding."""
        raise NotImplementedError

    def represent(self, inputs: Tensor, valid_bt: Tensor | None) -> Tensor:
        """Features (B, T, D) of inputs."""
        del valid_bt
        return self.features(inputs)

    def attention_bias(self, states_rsd: Tensor, visible_rs: Tensor | None, position: Tensor | None) -> Tensor:
        """The bias (1 or R, local heads, S, S) for these states, whose rows keep the positions `visible_rs` (None:
        all); 0 from and to extra tokens. `position`: another stage's parameter of it, where none is owned."""
        extra = self.extra_tokens
        if visible_rs is None:
            visible_rs = torch.arange(states_rsd.shape[1] - extra, device=states_rsd.device)[None]
        bias = self.bias(visible_rs, position)
        return F.pad(bias, (extra, 0, extra, 0)) if extra else bias

    def fine_tune(self, channel_mask: tuple[float, int] | None) -> None:
        """Get ready to be fine-tuned. `channel_mask`: share of channels in spans to hide, and a span's length."""
        del channel_mask


class ExtraTokens(nn.Module):
    """Part of a context: learned tokens before the positions of the input, `cls` of shape (1, n, D)."""

    cls: nn.Parameter

    def add_tokens(self, config: ModelConfig) -> None:
        """Build them, if the one stem of `config` has any. They start from N(0, 1) in 2.0."""
        [stem] = config.stems.values()
        if stem.extra_token_count:
            self.cls = nn.Parameter(torch.empty(1, stem.extra_token_count, config.backbone.width))
            normal = InitRule("normal", 1.0 if config.visible_only else 0.02)
            set_rule(self.cls, BEIT if config.init == "beit" else normal)

    def behind_tokens(self, x_rsd: Tensor) -> Tensor:
        """The tokens, then the positions: (R, S, D) to (R, n + S, D)."""
        if not hasattr(self, "cls"):
            return x_rsd
        return torch.cat((self.cls.expand(x_rsd.shape[0], -1, -1), x_rsd), dim=1)


class StemFeatures(nn.Module):
    """What features of all kinds have in common: a learned vector (D,) that is added to them, where samples of the stem
    may be parts of paired ones. It starts from zero."""

    modality: nn.Parameter

    def add_modality(self, config: ModelConfig) -> None:
        """Build it, if the one stem of `config` asks for it."""
        [stem] = config.stems.values()
        if stem.paired:
            self.modality = nn.Parameter(torch.empty(config.backbone.width))
            set_rule(self.modality, ZEROS)

    def with_modality(self, x_btd: Tensor) -> Tensor:
        """Features (B, T, D) with it."""
        return x_btd + self.modality.to(x_btd.dtype) if hasattr(self, "modality") else x_btd


class HiddenPart(nn.Module):
    """What the student sees of a part that is hidden altogether: where it would see positions, a learned vector with a
    fixed code of each position. These states ask what the other parts say of them, and hold nothing of the part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(width))
        set_rule(self.query, InitRule("normal", 0.02))

    def forward(
        self, states_rsd: Tensor, hidden_r: Tensor, visible_rs: Tensor | None, grid: tuple[int, ...], extra: int
    ) -> Tensor:
        """(R, n + S, D) of the context with the rows `hidden_r` replaced behind their n extra tokens. `visible_rs`: the
        positions on `grid` that rows keep; None: all. Without a hidden row it is part of the graph, as on every rank.
        """
        places_td = coded_positions(states_rsd.shape[-1], grid, states_rsd.device).to(states_rsd.dtype)
        places_rsd = places_td[None] if visible_rs is None else F.embedding(visible_rs, places_td)
        queries_rsd = F.pad(places_rsd + self.query.to(states_rsd.dtype), (0, 0, extra, 0))
        is_query_s = torch.arange(states_rsd.shape[1], device=states_rsd.device) >= extra
        return torch.where((hidden_r[:, None] & is_query_s)[..., None], queries_rsd, states_rsd)


Exists = Callable[[str], bool]
"""Whether a layer or parameter of a stem is to be built, by its name below the stem's."""

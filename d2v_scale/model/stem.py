"""The layers before the main blocks, of one stem: what all kinds have in common."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2v_scale.model.position_bias import AlibiBias, RelativeBias


class Stem(nn.Module):
    """Those layers of a stem that exist here. A subclass builds them; `prenet` is added by the stack."""

    features: nn.Module
    context: nn.Module
    bias: RelativeBias | AlibiBias
    prenet: nn.ModuleList
    extra_tokens = 0
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
        all). `position`: another stage's parameter of it, where none is owned."""
        if visible_rs is None:
            visible_rs = torch.arange(states_rsd.shape[1], device=states_rsd.device)[None]
        return self.bias(visible_rs, position)

    def fine_tune(self, channel_mask: tuple[float, int] | None) -> None:
        """Get ready to be fine-tuned. `channel_mask`: share of channels in spans to hide, and a span's length."""
        del channel_mask


Exists = Callable[[str], bool]
"""Whether a layer or parameter of a stem is to be built, by its name below the stem's."""

"""Targets that are the input itself."""

from typing import TYPE_CHECKING

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.average import refuse_layers
from d2v_scale.data2vec.targets.base import Place, Target
from d2v_scale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-6


class Input(Target):
    """`input`: the raw values at each position, normalised over the position (He et al. 2022, "norm_pix_loss"): pixels
    of a patch, samples of a frame.

    Not the features of the stem, which the student trains: with them as targets, constants would be learned.
    """

    reads_inputs = True

    def __init__(self, config: TargetConfig, place: Place) -> None:
        super().__init__(config, place)
        if place.input_width is None:
            raise ConfigError(
                "objective.target.kind",
                "is 'input', but this stem reads tokens, which have no values to regress.",
                "Choose another kind for it.",
            )
        self.width = self.raw_width = place.input_width

    def choose_layers(self, config: TargetConfig, place: Place) -> tuple[int, ...]:
        """None."""
        refuse_layers(config)
        return ()

    def raw(self, running_btd: "Tensor | None", inputs_btd: "Tensor | None") -> "Tensor":
        """Mean 0 and variance 1 over the values of a position; then `final_norm`."""
        from torch.nn import functional as F

        assert inputs_btd is not None
        return self._normalised(F.layer_norm(inputs_btd, inputs_btd.shape[-1:], eps=_EPS))

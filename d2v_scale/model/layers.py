"""What a layer is, which part of a list of them one stage holds, and what travels along it.

The student's stack and the teacher's are built and run from the same list (`networks/layers.py`), so that a pipeline
can be cut from it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from d2v_scale.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from d2v_scale.batch import Batch
    from d2v_scale.model.learned_bias import LearnedBias

LayerKind = Literal["features", "context", "bias", "block", "final_norm", "predictor"]


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what it is and where its parameters are."""

    kind: LayerKind
    name: str
    """Prefix of its parameter names."""
    index: int = -1
    """Blocks only: counted over prenet and main blocks; drop path and layer drop are keyed by it."""
    main: int = -1
    """Main blocks only: the number that `top_k_layers` counts."""
    stem: str = ""
    """Layers of one stem only: its name, which a sequence of several stems needs."""

    @property
    def sliced(self) -> bool:
        """Whether tensor-parallel ranks divide it. Other layers every rank has, and runs, whole."""
        return self.kind == "block"


@dataclass(frozen=True)
class Section:
    """A contiguous part of the list of layers: what one pipeline stage holds.

    It is named by its main blocks [first, last) of `depth`. The stem, with its prenet, belongs to the part that holds
    block 0; the final norm and the predictor to the part that holds the last block.
    """

    first: int
    last: int
    depth: int

    @classmethod
    def whole(cls, config: ModelConfig) -> "Section":
        """All layers."""
        return cls(0, config.backbone.depth, config.backbone.depth)

    @property
    def starts(self) -> bool:
        """Whether the input enters here."""
        return self.first == 0

    @property
    def ends(self) -> bool:
        """Whether predictions and targets leave here."""
        return self.last == self.depth

    def holds(self, layer: LayerSpec) -> bool:
        """Whether this layer is in the part."""
        if layer.main >= 0:
            return self.first <= layer.main < self.last
        return self.ends if layer.kind in ("final_norm", "predictor") else self.starts


def states_shape(config: ModelConfig, batch: "Batch", *, masked: bool) -> tuple[int, int, int]:
    """(R, S, D) of the states between blocks: of a student (`masked`), which may see visible positions only, or of a
    teacher, which sees every sample whole. Known on the host."""
    rows, length = batch.masked_rt.shape if masked else (batch.inputs.shape[0], batch.masked_rt.shape[1])
    if masked and config.visible_only:
        assert batch.layout.visible_rs is not None, "rows of a 2.0 batch must keep equal numbers of positions"
        length = batch.layout.visible_rs.shape[1]
    return rows, batch.extra_tokens + length, config.backbone.width


@dataclass
class Carry:
    """What travels from layer to layer of a stack. R rows, S positions in the blocks (extra tokens included)."""

    states_rsd: "Tensor"
    attention_bias: "Tensor | LearnedBias | None" = None
    """Added to the attention logits, broadcast to (R, local heads, S, S); bool (True: attend) where only padding is
    excluded; None: nothing is. A `LearnedBias` where its scale learns."""
    extra_tokens: int = 0
    """Leading positions that are not part of the input (CLS)."""
    positions: "tuple[Tensor, ...]" = ()
    """The parameters that position biases are made from, of each stem that has one, where a later part of the layers
    will need them."""
    valid_bt: "Tensor | None" = None
    """Of one stem's batch: bool (B, T), positions that are there, and no padding. None: all are."""
    parts: "tuple[Carry, ...]" = ()
    """Of paired samples, before their parts are one sequence: what travels of each. `states_rsd` means nothing then."""

    def become(self, other: "Carry") -> None:
        """Travel on as `other`."""
        self.states_rsd, self.attention_bias, self.extra_tokens = (
            other.states_rsd,
            other.attention_bias,
            other.extra_tokens,
        )
        self.positions, self.parts = other.positions, other.parts


class StudentOutput(NamedTuple):
    """What the student's forward gives."""

    predictions_nd: "Tensor"
    """At masked positions, row-major over (r, t)."""
    features_btd: "Tensor"
    """Stem features before masking, detached: what a teacher that shares them is given."""
    encoder_rsd: "Tensor"
    """Output of the encoder without extra tokens: all positions (1.0) or the visible ones, ascending (2.0). Without any
    (R, 0, D) where the last block ran at masked positions alone."""
    cls: "tuple[Tensor | None, ...]"
    """Of each stem the output (R, D) at its last extra token, the CLS token (2.0, where there is one)."""
    further: "tuple[Tensor, ...]" = ()
    """Predictions of further targets, each (N, W); of paired samples also all those of further parts."""

    @property
    def cls_rd(self) -> "Tensor | None":
        """Of the first stem, which usually is the only one."""
        return self.cls[0]

    @property
    def predictions(self) -> "tuple[Tensor, ...]":
        """Of all targets, the first one's first."""
        return (self.predictions_nd, *self.further)


def rows_of(x_btd: "Tensor", kept_rs: "Tensor | None", clones: int) -> "Tensor":
    """(B, T, D) to (B * clones, S, D): each sample's rows adjacent, only the positions `kept_rs` where given."""
    if kept_rs is None:
        return x_btd if clones == 1 else x_btd.repeat_interleave(clones, dim=0)
    import torch

    length, width = x_btd.shape[1:]
    first_r = torch.arange(kept_rs.shape[0], device=kept_rs.device) // clones * length
    index_n = (first_r[:, None] + kept_rs).flatten()
    return x_btd.reshape(-1, width).index_select(0, index_n).view(*kept_rs.shape, width)

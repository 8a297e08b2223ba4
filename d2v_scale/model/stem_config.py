"""What each kind of stem is made of, and what any stem may do differently from the others. Sizes only."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, get_args

from d2v_scale.errors import ConfigError
from d2v_scale.model.log_mel_config import LogMel

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["vision", "speech", "text", "array"]
"""What a stem is: a closed set. Where one is not handled, the type checker complains."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Count = TypeVar("Count", int, "Tensor")
"""An int, or an int64 tensor of any shape."""


_BETWEEN_PARTS = "+"
"""In the name of a sequence that several stems make together, which no stem's own name holds."""


def parts_of(sequence: str) -> list[str]:
    """The stems that make a sequence, in the order of their positions: of `vision+text` two, of `vision` one."""
    return sequence.split(_BETWEEN_PARTS)


def sequence_of(stems: Iterable[str]) -> str:
    """The name of the sequence that these stems make."""
    return _BETWEEN_PARTS.join(stems)


@dataclass(kw_only=True)
class OwnPredictor:
    """What the predictor of one stem does differently: `model.predictor` has the words. null: as there."""

    kind: Literal["linear", "mlp", "conv", "conv1d", "conv2d", "conv3d"] | None = None
    width: int | None = None
    kernel: int | None = None
    groups: int | None = None
    layers: int | None = None
    residual: bool | None = None
    proj_layers: int | None = None
    input_dropout: float | None = None
    noise_std: float | None = None
    final_norm: bool | None = None


@dataclass(kw_only=True)
class StemSettings:
    """What any stem may do differently from the others. null: as `model.backbone` and `model.predictor` say."""

    usual_extra_tokens: ClassVar[int] = 0
    """Of this kind in published models."""

    prenet_depth: int | None = None
    """Blocks of this stem before the main ones."""
    input_dropout: float | None = None
    """On the input of the first block (after this stem's norm)."""
    predictor: OwnPredictor | None = None
    """This stem's predictor."""
    extra_tokens: int | None = None
    """Learned tokens before the positions of the input, which have no position of their own and are never masked. The
    CLS term is of the last of them. null: as published (images 1, all others 0)."""

    paired: bool | None = None
    """Whether its samples may be parts of paired ones: a learned vector is added to its features, and another one, with
    the positions, stands for a part that is hidden altogether. null: where a source of several modalities reads it."""

    @property
    def extra_token_count(self) -> int:
        """`extra_tokens`, or as many as is usual."""
        return self.usual_extra_tokens if self.extra_tokens is None else self.extra_tokens


@dataclass(kw_only=True)
class SpeechStem(StemSettings):
    """Raw 16 kHz waveform to 20 ms frames (reference: wav2vec 2.0 feature encoder, layer-norm mode)."""

    kind: ClassVar[Kind] = "speech"

    conv_layers: list[tuple[int, int, int]] = field(
        default_factory=lambda: [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
    )
    """Convolutions as (channels, kernel, stride)."""
    pos_conv_depth: int = 5
    """Number of positional convolutions."""
    pos_conv_kernel: int = 19
    """Kernel of each positional convolution, frames."""
    pos_conv_groups: int = 16
    """Groups of each positional convolution."""
    alibi: bool = False
    """Add a learned-scale ALiBi bias to the attention logits (2.0)."""

    def check(self, width: int) -> None:
        """Raises `ConfigError` for sizes that do not fit together."""
        require_divisor("model.speech.pos_conv_groups", self.pos_conv_groups, "model.backbone.width", width)
        if not self.conv_layers:
            raise ConfigError("model.speech.conv_layers", "is empty", "Give (channels, kernel, stride) per layer.")

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Kernel and stride of each convolution, which say how many positions there are."""
        return [(kernel, stride) for _, kernel, stride in self.conv_layers]

    def lengths(self, samples: Count) -> list[Count]:
        """Positions after each convolution of so many samples of a waveform; there is no padding (spec 3.1)."""
        lengths: list[Count] = []
        for _, kernel, stride in self.conv_layers:
            samples = (samples - kernel) // stride + 1
            lengths.append(samples)
        return lengths

    def frames_of(self, samples: Count) -> Count:
        """Frames that the convolutions make of so many samples of a waveform."""
        return self.lengths(samples)[-1]


@dataclass(kw_only=True)
class VisionStem(StemSettings):
    """Images to patches."""

    kind: ClassVar[Kind] = "vision"
    usual_extra_tokens: ClassVar[int] = 1

    image_size: int | tuple[int, int] = 224
    """Side of the square input, or its height and width, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    channels: int = 3
    positions: Literal["relative", "sincos"] = "relative"
    """`relative`: one shared relative-position bias (1.0); `sincos`: fixed 2-D sine-cosine (2.0)."""
    relative_std: float = 0.0
    """Standard deviation of the relative-position table at initialisation. Published: 0, from which a short run never
    learns where patches are, since the optimizer moves the table by one learning rate a step."""

    def __post_init__(self) -> None:
        height, width = self.size
        if height == width:  # one way to write it, so that recipes compare
            self.image_size = height

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows of patches, and patches in a row."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    def check(self, width: int) -> None:
        """Raises `ConfigError` for sizes that do not fit together."""
        for pixels in self.size:
            require_divisor("model.vision.patch_size", self.patch_size, "model.vision.image_size", pixels)
        if self.positions == "sincos":
            require_divisor("model.vision.positions (sincos)", 4, "model.backbone.width", width)


@dataclass(kw_only=True)
class TextStem(StemSettings):
    """Token ids to embeddings with learned positions."""

    kind: ClassVar[Kind] = "text"

    vocab_size: int = 50265
    max_positions: int = 512
    """Longest sequence, tokens."""
    token_std: float = 0.02
    """Standard deviation of the token table at initialisation. Published: 0.02. What matters is its ratio to the
    learning rate, since the table's norm follows: the smaller, the sooner words leave their random start."""
    position_std: float = 0.02
    """Standard deviation of the position table at initialisation. Published: 0.02, as the tokens'. In a short run on
    little data less is better: positions are learned long before words, and targets then tell little else."""
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    mask_id: int = 50264

    def check(self, width: int) -> None:
        """Raises `ConfigError` for special tokens outside the vocabulary or with the same id."""
        del width
        ids = {name: getattr(self, name) for name in ("bos_id", "pad_id", "eos_id", "unk_id", "mask_id")}
        for name, value in ids.items():
            if not 0 <= value < self.vocab_size:
                raise ConfigError(
                    f"model.text.{name}", f"{value} is outside the vocabulary of {self.vocab_size}.", "Change one."
                )
        if len(set(ids.values())) < len(ids):
            raise ConfigError("model.text", f"two special tokens have the same id: {ids}.", "Give each its own.")


MOST_AXES = 4
"""After the channels."""
_MOST_POSITIONS = 1 << 20
"""Of a sample: far above what attention holds, and few enough to be counted and masked."""
_MOST_VALUES = 1 << 31
_LARGEST = 1e38
"""32-bit numbers hold this and its reciprocal."""


@dataclass(kw_only=True)
class ArrayAxis:
    """One axis of an array."""

    patch: int = 1
    """Steps of a patch along this axis."""
    extent: int = 1
    """Steps of the longest sample that is read, a multiple of `patch`. Shorter ones are padded, and what is padding is
    neither seen nor predicted."""
    longer: Literal["refuse", "crop"] = "refuse"
    """What becomes of members with more steps: `refuse`: they are lost, and counted; `crop`: `extent` steps from a
    random place are read (in evaluation, the middle)."""
    rate: float | None = None
    """Steps in one `unit`, so that sizes of masks may be given in it ('0.2 s')."""
    unit: str = "s"
    """What `rate` counts in. Of seconds there are milliseconds (ms), too."""

    @property
    def patches(self) -> int:
        """Of the longest sample."""
        return self.extent // self.patch


@dataclass(kw_only=True)
class ArrayStem(StemSettings):
    """Arrays (channels, axis_1 ... axis_n) of 1 to 4 axes to patches: `.npy` members, arrays in `.npz`, or what a
    `transform` makes of recordings."""

    kind: ClassVar[Kind] = "array"

    key: str | None = None
    """Name of the array in a `.npz`; null: the only one."""
    channels: int = 1
    axes: dict[str, ArrayAxis] = field(default_factory=dict)
    """By names of your own, in the order of the member's shape after its channels: {height: {patch: 16, extent: 224},
    width: {patch: 16, extent: 224}}."""
    positions: Literal["sincos", "learned"] = "sincos"
    """`sincos`: fixed sine-cosine over all axes, as of 2.0 images; `learned`: a vector for each position."""
    transform: Literal["none", "log", "log_mel"] = "none"
    """`log`: the natural logarithm of what is at least `log_floor`; below 0 there is none, and the sample is lost.
    `log_mel`: the shards hold recordings, which become arrays (1, bands, frames)."""
    log_floor: float = 1e-6
    """What smaller values count as under `log`."""
    log_mel: LogMel = field(default_factory=LogMel)
    """How, under `log_mel`."""
    normalise: Literal["none", "sample", "channel", "moments"] = "none"
    """After the transform. To mean 0 and variance 1 over what is read of a `sample`, or over each `channel` of it (what
    does not vary becomes 0); `moments`: by the fixed `mean` and `std`."""
    mean: list[float] = field(default_factory=list)
    """Of each channel, or one of all (`moments`)."""
    std: list[float] = field(default_factory=list)
    """Of each channel, or one of all (`moments`)."""
    missing: Literal["refuse", "mask"] = "refuse"
    """What NaN means. `refuse`: the sample is lost, and counted; `mask`: no patch that holds one is seen or predicted,
    and these patches are counted."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis of the longest sample."""
        return tuple(axis.patches for axis in self.axes.values())

    @property
    def patch(self) -> tuple[int, ...]:
        """Steps of a patch along each axis."""
        return tuple(axis.patch for axis in self.axes.values())

    @property
    def extents(self) -> tuple[int, ...]:
        """Steps along each axis of the longest sample."""
        return tuple(axis.extent for axis in self.axes.values())

    @property
    def patch_values(self) -> int:
        """Values of a patch, all channels."""
        return self.channels * math.prod(self.patch)

    @property
    def reads_recordings(self) -> bool:
        """Whether the shards hold recordings, of which `transform` makes the arrays."""
        return self.transform == "log_mel"

    @property
    def rates(self) -> list[float | None]:
        """Steps along each axis in one of its units; None where that is not known."""
        known = [axis.rate for axis in self.axes.values()]
        if self.reads_recordings and known[-1] is None and list(self.axes.values())[-1].unit == "s":
            known[-1] = self.log_mel.frames_a_second
        return known

    def check(self, width: int, key: str) -> None:
        """Raises `ConfigError` for sizes that do not fit together. `key`: where this section stands."""
        name = key.removeprefix("model.arrays.")
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in (*KINDS, "shared"):
            remedy = f"Use letters, digits and _, and none of {', '.join(KINDS)}, shared."
            raise ConfigError(key, "is no name of a stem of arrays", remedy)
        if not 1 <= len(self.axes) <= MOST_AXES:
            there = ", ".join(self.axes) or "none"
            raise ConfigError(
                f"{key}.axes", f"has {len(self.axes)} axes ({there})", f"Name 1 to {MOST_AXES}, in the member's order."
            )
        for called, axis in self.axes.items():
            if not re.fullmatch(r"[A-Za-z]\w*", called, re.ASCII):
                raise ConfigError(f"{key}.axes", f"names the axis {called!r}", "Use letters, digits and _.")
            where = f"{key}.axes.{called}"
            require_divisor(f"{where}.patch", axis.patch, f"{where}.extent", axis.extent)
            if not re.fullmatch(r"[^\W\d_]+", axis.unit):
                raise ConfigError(f"{where}.unit", f"is {axis.unit!r}", "Use letters only.")
        if math.prod(self.grid) < 2:
            raise ConfigError(f"{key}.axes", "make a single patch of a sample", "Give smaller patches, or more steps.")
        if (positions := math.prod(self.grid)) > _MOST_POSITIONS:
            remedy = "Give larger patches, or smaller extents (longer: crop reads a part)."
            raise ConfigError(f"{key}.axes", f"make {positions} patches of a sample", remedy)
        if (values := self.channels * math.prod(self.extents)) >= _MOST_VALUES:
            remedy = "Give fewer channels, or smaller extents (longer: crop reads a part)."
            raise ConfigError(key, f"makes {values} values of a sample", remedy)
        if self.positions == "sincos" and width < 2 * len(self.axes):
            raise ConfigError(
                "model.backbone.width",
                f"is {width}, too few for sine and cosine along {len(self.axes)} axes",
                f"Give at least {2 * len(self.axes)}.",
            )
        if self.log_floor < 1 / _LARGEST:
            shown = f"is {self.log_floor}, which 32-bit numbers take for 0"
            raise ConfigError(f"{key}.log_floor", shown, f"Give at least {1 / _LARGEST:g}.")
        self._check_moments(key)
        self._check_log_mel(key)

    def _check_log_mel(self, key: str) -> None:
        if not self.reads_recordings:
            if self.log_mel != LogMel():
                remedy = "Leave it out, or set transform to log_mel."
                raise ConfigError(f"{key}.log_mel", f"is set, but transform is {self.transform!r}", remedy)
            return
        if len(self.axes) != 2:
            there = ", ".join(self.axes)
            shown = f"has {len(self.axes)} axes ({there}), and log_mel makes two of a recording"
            raise ConfigError(f"{key}.axes", shown, "Name the one of its bands, then the one of time.")
        if self.channels != 1:
            shown = f"is {self.channels}, but log_mel makes one of a recording, its channels mixed"
            raise ConfigError(f"{key}.channels", shown, "Leave it out.")
        if self.key is not None:
            raise ConfigError(f"{key}.key", f"is {self.key!r}, but recordings are no .npz", "Leave it out.")
        (_, bands), (called, time) = self.axes.items()
        self.log_mel.check(f"{key}.log_mel", bands.extent)
        frames = self.log_mel.frames_a_second
        if time.unit == "s" and time.rate is not None and abs(time.rate - frames) > 1e-6 * frames:
            shown = f"is {time.rate:g}, but hop_ms {self.log_mel.hop_ms:g} makes {frames:g} steps of a second"
            raise ConfigError(f"{key}.axes.{called}.rate", shown, "Leave it out, or correct one of them.")

    def _check_moments(self, key: str) -> None:
        for name in ("mean", "std"):
            given = len(getattr(self, name))
            if self.normalise != "moments" and given:
                remedy = "Leave it out, or set normalise to moments."
                raise ConfigError(f"{key}.{name}", f"is set, but normalise is {self.normalise!r}", remedy)
            if self.normalise == "moments" and given not in (1, self.channels):
                remedy = f"Give one number, or one a channel: {self.channels}."
                raise ConfigError(f"{key}.{name}", f"has {given} values", remedy)
        if any(abs(mean) > _LARGEST for mean in self.mean):
            raise ConfigError(f"{key}.mean", f"is {self.mean}, too large for 32-bit numbers")
        if any(not 1 / _LARGEST <= std <= _LARGEST for std in self.std):
            raise ConfigError(f"{key}.std", f"is {self.std}, too small or too large for 32-bit numbers")


AnyStem = VisionStem | SpeechStem | TextStem | ArrayStem
OneStem = TypeVar("OneStem", bound=StemSettings)


def require_divisor(key: str, divisor: int, of_key: str, number: int) -> None:
    if divisor < 1 or number % divisor:
        raise ConfigError(key, f"{divisor} does not divide {of_key} {number}.", "Change one of them.")

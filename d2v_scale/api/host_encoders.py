"""Frozen encoders in the shape that others' benchmarks expect: X-ARES and S3PRL (SUPERB) for speech, timm for images.

None of these packages is imported: classes here have their interfaces. Weights stay as they are, whatever mode the
module is put into, and no gradients reach them; `.to(device)` moves them.
"""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.api.encoder import load_encoder
from d2v_scale.batch import Batch
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.data.labelled import unmasked
from d2v_scale.errors import DataError
from d2v_scale.evaluation.frozen import Weights
from d2v_scale.modalities.speech.decoder import normalize
from d2v_scale.model.stem_config import SpeechStem, VisionStem
from d2v_scale.shards.content import Content


class _Frozen(nn.Module):
    """An encoder of `d2v_scale.load_encoder`, and the kind of the stem that is used."""

    content: ClassVar[Content]
    stem_type: ClassVar[type]

    def __init__(self, path: str | PathLike[str], stem: str | None, weights: Weights) -> None:
        super().__init__()
        encoder = load_encoder(path, weights=weights, device="cpu")
        model = encoder.recipe.model
        fitting = [name for name in encoder.stems if isinstance(model.stems[name], self.stem_type)]
        chosen = fitting if stem is None else [name for name in fitting if name == stem]
        if len(chosen) != 1:
            said = f"has {', '.join(fitting) or 'none'}" if stem is None else f"has no such stem {stem!r}"
            raise DataError(
                f"{encoder!r} {said}, and one stem of {self.content}s is needed.",
                f"Give stem= one of {', '.join(fitting)}." if fitting else "Give another encoder.",
            )
        self.kind = modalities.of(model, chosen[0])
        self.recipe = encoder.recipe
        self.depth = encoder.depth
        self.output_dim = encoder.width
        self.network = encoder.frozen.model.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "_Frozen":
        """The mode, which changes nothing: the encoder has no dropout in either."""
        super().train(mode)
        self.network.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its results are."""
        return next(self.network.parameters()).device


class SpeechFrames(_Frozen):
    """What X-ARES asks of an audio encoder (0.1): `sampling_rate`, `output_dim`, `hop_size_in_ms`, and waves to frames.

    X-ARES takes the one class of a file whose name ends in `Encoder`, and makes it without arguments: derive one.
    """

    content = "recording"
    stem_type = SpeechStem
    sampling_rate = SAMPLE_RATE

    def __init__(
        self, path: str | PathLike[str], *, stem: str | None = None, weights: Weights = "teacher", layer: int = -1
    ) -> None:
        """`path`: as of `load_encoder`; `stem`: which one of several that read recordings; `layer`: of the main blocks.
        Raises DataError and CheckpointError."""
        super().__init__(path, stem, weights)
        settings = self.recipe.model.stems[self.kind.name]
        assert isinstance(settings, SpeechStem)
        self.samples_per_frame = math.prod(stride for _, _, stride in settings.conv_layers)
        milliseconds = 1000 * self.samples_per_frame / SAMPLE_RATE
        self.hop_size_in_ms = int(milliseconds) if milliseconds.is_integer() else milliseconds
        self.layer = layer
        self._settings = settings
        self._decoder = self.kind.build_decoder(self.recipe.data, None)

    def forward(self, audio: Tensor) -> Tensor:
        """Waves (B, n) or (n,) at 16 kHz to the layer's frames (B, T, D). Raises DataError for a wave that is none."""
        return self._states(list(audio[None] if audio.ndim == 1 else audio), [self.layer])[0]

    def _states(self, waves: Sequence[Tensor], layers: list[int]) -> list[Tensor]:
        """Of each layer (B, T, D), T of the longest wave; each wave is whole, and normalised as in training."""
        rows = [self._row(number, wave) for number, wave in enumerate(waves)]
        keys = tuple(map(str, range(len(rows))))
        batch = unmasked(self.kind, self._decoder, rows, torch.arange(len(rows)), keys)
        return self.network.features(batch.to(self.device), None, layers)

    def _row(self, number: int, wave: Tensor) -> NDArray[np.float32]:
        values: NDArray[np.float32] = wave.detach().float().cpu().numpy()
        if values.ndim != 1 or self._settings.frames_of(len(values)) < 1:
            raise DataError(
                f"Wave {number} has the shape {tuple(values.shape)}, which makes no frame.", "Leave it out."
            )
        if not np.isfinite(values).all():
            raise DataError(f"Wave {number} holds values that are not finite.", "Leave it out.")
        return normalize(values) if self.recipe.data.speech.normalize else values


class S3prlUpstream(SpeechFrames):
    """What S3PRL asks of an upstream (0.4): waves to a dictionary with `hidden_states`, the outputs of all blocks."""

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:  # type: ignore[override]
        """Waves (n,) of any lengths at 16 kHz to `hidden_states`, a list of (B, T, D), the first of the first block,
        and `last_hidden_state`. Frames beyond a wave's own are of its padding."""
        states = self._states(wavs, list(range(self.depth)))
        return {"hidden_states": states, "last_hidden_state": states[-1]}

    def get_downsample_rates(self, key: str) -> int:
        """Samples of a wave that one frame stands for."""
        del key
        return self.samples_per_frame


class ImageFeatures(_Frozen):
    """What timm's models without a classifier offer: `forward_features`, `forward_head`, `num_features`,
    `num_prefix_tokens` and a `pretrained_cfg`, of which `timm.data` makes the transform."""

    content = "image"
    stem_type = VisionStem
    num_prefix_tokens = 0
    num_classes = 0

    def __init__(
        self, path: str | PathLike[str], *, stem: str | None = None, weights: Weights = "teacher", layer: int = -1
    ) -> None:
        """`path`: as of `load_encoder`; `stem`: which one of several that read images; `layer`: of the main blocks.
        Raises DataError and CheckpointError."""
        super().__init__(path, stem, weights)
        settings, data = self.recipe.model.stems[self.kind.name], self.recipe.data.vision
        assert isinstance(settings, VisionStem)
        self.layer = layer
        self.num_features = self.head_hidden_size = self.embed_dim = self.output_dim
        grid = self.kind.fixed_grid
        assert grid is not None
        self.grid = grid
        self.input_size = (settings.channels, *settings.size)
        self.pretrained_cfg = self.default_cfg = {
            "input_size": self.input_size,
            "interpolation": "bicubic",
            "crop_pct": data.evaluation_crop,
            "mean": tuple(data.mean[: settings.channels]),
            "std": tuple(data.std[: settings.channels]),
            "num_classes": 0,
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to the layer's patches (B, T, D), without CLS. Raises DataError for another
        size."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_size:
            wanted = ", ".join(map(str, self.input_size))
            raise DataError(f"Images have the shape {tuple(x.shape)}.", f"Give (B, {wanted}), normalised.")
        batch = Batch(
            modality=self.kind.name,
            inputs=x.float(),
            valid=None,
            masked_rt=torch.zeros(len(x), math.prod(self.grid), dtype=torch.bool),
            sample_ids=torch.arange(len(x)),
            keys=tuple(map(str, range(len(x)))),
            grid=self.grid,
            extra_tokens=self.kind.extra_tokens,
        )
        return self.network.features(batch.to(self.device), None, [self.layer])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Patches (B, T, D) to their means (B, D); there is no classifier behind them."""
        del pre_logits
        return x.mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to vectors (B, D), those of `Encoder.embed`."""
        return self.forward_head(self.forward_features(x))

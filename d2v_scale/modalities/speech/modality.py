"""What recordings say of themselves."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.data2vec.block_sizes import Axis
from d2v_scale.errors import ConfigError
from d2v_scale.modalities.costs import INDEX_BYTES, NORM_BYTES, Lengths, Setting
from d2v_scale.modalities.recordings import RecordingModality
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import SpeechStem
from d2v_scale.model.teacher_parts import TeacherParts

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from d2v_scale.batch import Batch
    from d2v_scale.data.config import DataConfig
    from d2v_scale.modalities.speech.decoder import SpeechDecoder
    from d2v_scale.modalities.speech.drawing import RecordingDrawing
    from d2v_scale.modalities.speech.stem import WaveformStem
    from d2v_scale.model.layers import Section


class Speech(RecordingModality):
    """Waveforms to frames."""

    tasks = ("classify", "regress", "ctc")
    feature_bias = "features.proj.bias"

    @property
    def stem(self) -> SpeechStem:
        """Its section of the model's configuration."""
        return self.model.sole(SpeechStem)

    @classmethod
    def plain_model(cls, tokenizer: "Path | None") -> ModelConfig:
        """The published convolutions."""
        del tokenizer
        return ModelConfig(speech=SpeechStem())

    @property
    def named_axes(self) -> tuple[Axis, ...]:
        """Of frames; sizes along it may be given in seconds or milliseconds."""
        rate = SAMPLE_RATE / self.input_width
        return (Axis("time", {"s": rate, "ms": rate / 1000}),)

    def extent(self, data: "DataConfig", size: float | None = None) -> tuple[int, tuple[int, ...]]:
        """A recording of `data.speech.max_seconds`, or of `size` samples at 16 kHz."""
        inputs = round(data.speech.max_seconds * SAMPLE_RATE if size is None else size)
        frames = self.stem.frames_of(inputs)
        if frames < 2:
            raise ConfigError("seconds", f"{inputs / SAMPLE_RATE} s of audio are {frames} frames", "Give more.")
        return inputs, (frames,)

    def positions_of(self, length_n: "NDArray[np.int64]", data: "DataConfig") -> "NDArray[np.int64]":
        """Frames of what is read."""
        import torch

        shortest, longest = (round(x * SAMPLE_RATE) for x in (data.speech.min_seconds, data.speech.max_seconds))
        frames_n: NDArray[np.int64] = self.stem.frames_of(torch.from_numpy(length_n.clip(max=longest))).numpy()
        return frames_n * (length_n >= shortest)

    @property
    def input_width(self) -> int:
        """Samples from a frame to the next."""
        return math.prod(stride for _, _, stride in self.stem.conv_layers)

    def input_values(self, batch: "Batch") -> "Tensor":
        """The middle of what the convolutions see of each frame, which is next to that of the frames beside it."""
        import torch.nn.functional as F

        hop, frames = self.input_width, batch.masked_rt.shape[1]
        seen = 1
        for _, kernel, stride in reversed(self.stem.conv_layers):
            seen = (seen - 1) * stride + kernel
        first = max(0, (seen - hop) // 2)
        waves = batch.inputs.float()
        waves = F.pad(waves, (0, max(0, first + frames * hop - waves.shape[1])))
        return waves[:, first : first + frames * hop].reshape(waves.shape[0], frames, hop)

    @property
    def has_bias(self) -> bool:
        """ALiBi."""
        return self.stem.alibi

    def build_decoder(self, data: "DataConfig", tokenizer: "Path | None") -> "SpeechDecoder":
        """Resampling, normalisation, crop."""
        from d2v_scale.modalities.speech.decoder import SpeechDecoder

        del tokenizer
        return SpeechDecoder(data.speech, self.stem)

    def build_stem(self, exists: Callable[[str], bool], section: "Section") -> "WaveformStem":
        """Convolutions; masking, positional convolutions."""
        from d2v_scale.modalities.speech.stem import WaveformStem

        return WaveformStem(self.model, exists, section)

    def build_head(self, outputs: int) -> "nn.Module":
        """Mean over the real frames."""
        from d2v_scale.finetuning.heads import SpeechHead

        return SpeechHead(self.width, outputs)

    def add_published_parts(self, parts: TeacherParts) -> None:
        """Convolutions are the student's; 1.0 also shares its mask embedding and copies positional convolutions."""
        parts.shared.append(f"stems.{self.name}.features")
        if not self.model.visible_only:
            parts.shared.append(f"stems.{self.name}.context.mask_embedding")
            parts.copied.append(f"stems.{self.name}.context.pos_convs")

    def feature_flops(self, lengths: Lengths) -> list[float]:
        """The convolutions and the projection."""
        costs, inputs = [], 1
        after = self.stem.lengths(lengths.inputs)
        for (channels, kernel, _), length in zip(self.stem.conv_layers, after, strict=True):
            costs.append(2.0 * length * inputs * kernel * channels)
            inputs = channels
        return [*costs, 2.0 * after[-1] * inputs * self.width]

    def context_flops(self, lengths: Lengths) -> float:
        """The positional convolutions: in 2.0, too, they see every row at full length, blanks included."""
        kernel = self.stem.pos_conv_kernel
        made = lengths.positions + (kernel + 1) % 2
        return self.stem.pos_conv_depth * 2.0 * made * self.width * (self.width // self.stem.pos_conv_groups) * kernel

    def feature_weights(self) -> float:
        """The convolutions and the projection."""
        channels = [1, *(out for out, _, _ in self.stem.conv_layers)]
        kernels = [kernel for _, kernel, _ in self.stem.conv_layers]
        steps = zip(channels, channels[1:], kernels, strict=False)
        return sum(inputs * outputs * kernel for inputs, outputs, kernel in steps) + channels[-1] * self.width

    def context_weights(self) -> float:
        """The positional convolutions."""
        stem = self.stem
        return stem.pos_conv_depth * self.width**2 // stem.pos_conv_groups * stem.pos_conv_kernel

    def feature_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """Inputs of the convolutions, norms, activations and of the projection."""
        total = float(setting.itemsize * lengths.inputs)
        after = self.stem.lengths(lengths.inputs)
        for (channels, _, _), length in zip(self.stem.conv_layers, after, strict=True):
            total += length * (3 * setting.itemsize * channels + NORM_BYTES)
        total += length * (setting.itemsize * channels + NORM_BYTES)
        return setting.samples * total

    def context_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """The positional convolutions, masks, the choice of visible frames, the norm."""
        size, rows = setting.itemsize, setting.samples * lengths.clones
        inside, full = rows * (lengths.kept + lengths.extra), rows * lengths.positions
        convolutions = self.stem.pos_conv_depth * full * (3 * size * self.width + NORM_BYTES)
        chosen = 2 * INDEX_BYTES * inside if self.model.visible_only else 0.0
        is_normed = not (self.model.visible_only and self.model.backbone.norm_first)
        normed = inside * (size * self.width + NORM_BYTES) if is_normed else 0.0
        return convolutions + full + chosen + normed

    def bias_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """Distances, and on a GPU the bias."""
        length = lengths.kept + lengths.extra
        pairs = setting.samples * lengths.clones * length * length
        heads = self.model.backbone.heads / setting.tensor
        return 4 * pairs + (setting.itemsize * pairs * heads if setting.kernels == "cuda" else 0)

    @classmethod
    def build_drawing(cls) -> "RecordingDrawing":
        """Recordings."""
        from d2v_scale.modalities.speech.drawing import RecordingDrawing

        return RecordingDrawing()

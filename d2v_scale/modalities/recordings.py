"""What recordings say of themselves, whatever reads them: all that has to do with data, and nothing of networks."""

from dataclasses import replace
from typing import TYPE_CHECKING

from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.modalities.base import Modality

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from d2v_scale.batch import Batch
    from d2v_scale.data.config import DataConfig
    from d2v_scale.data.items import Lengths as SampleLengths
    from d2v_scale.data.items import Recordings
    from d2v_scale.shards.shard_set import ShardSet


class RecordingModality(Modality):
    """A stem that reads waveforms of 16 kHz."""

    content = "recording"
    unit = "seconds"
    cropped = True
    limit_key = "data.speech.max_seconds"
    throughput = ("audio_seconds", SAMPLE_RATE)
    usual_size = 5 * SAMPLE_RATE
    raw_name = "mean log-mel"

    def longest_read(self, data: "DataConfig") -> int:
        """Samples at 16 kHz."""
        return round(data.speech.max_seconds * SAMPLE_RATE)

    def mean_size(self, data: "DataConfig", length_n: "NDArray[np.int64]") -> float:
        """Samples at 16 kHz, cropped."""
        return float(length_n.clip(max=round(data.speech.max_seconds * SAMPLE_RATE)).mean())

    def noise(self, samples: int, size: int, generator: "torch.Generator") -> "Tensor":
        """Normal."""
        import torch

        return torch.randn(samples, size, generator=generator)

    def items(self, shards: "ShardSet", data: "DataConfig", lengths: "SampleLengths") -> "Recordings":
        """Whole recordings."""
        from d2v_scale.data.items import Recordings

        return Recordings(shards, data, lengths)

    def shortest_seconds(self, data: "DataConfig") -> float:
        """As training."""
        return data.speech.min_seconds

    def uncut(self, data: "DataConfig", longest: int) -> "DataConfig":
        """No recording is longer."""
        seconds = max(data.speech.max_seconds, longest / SAMPLE_RATE)
        return replace(data, speech=replace(data.speech, max_seconds=seconds))

    def raw_features(self, batch: "Batch") -> "Tensor":
        """Log-mel energies, averaged over the recording."""
        from d2v_scale.evaluation.raw import mean_log_mel

        return mean_log_mel(batch.inputs, batch.valid)

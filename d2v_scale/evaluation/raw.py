"""What a sample looks like without any model: the baselines that a representation must justify itself against."""

from collections.abc import Iterable

import torch
from torch import Tensor

from d2v_scale.data.batch import Batch
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.model.config import ModelConfig

RAW_NAMES = {"vision": "pixels", "speech": "mean log-mel", "text": "bag of tokens"}

_MELS = 80
_WINDOW, _HOP = 400, 160


def raw_features(batches: Iterable[tuple[Batch, Tensor]], model: ModelConfig) -> tuple[Tensor, Tensor]:
    """float32 (N, F) and int64 labels (N,): pixels, mean log-mel spectra or bags of tokens."""
    features, labels = [], []
    for batch, labels_b in batches:
        match batch.modality:
            case "vision":
                features.append(batch.inputs.flatten(1))
            case "speech":
                features.append(_mean_log_mel(batch))
            case "text":
                features.append(_bag_of_tokens(batch, model))
        labels.append(labels_b)
    return torch.cat(features), torch.cat(labels)


def _mean_log_mel(batch: Batch) -> Tensor:
    """(B, mels): log-mel energies of 25 ms windows every 10 ms, averaged over the recording."""
    from torchaudio.transforms import MelSpectrogram

    spectrum = MelSpectrogram(SAMPLE_RATE, n_fft=512, win_length=_WINDOW, hop_length=_HOP, n_mels=_MELS, center=False)
    valid = torch.ones_like(batch.inputs, dtype=torch.bool) if batch.valid is None else batch.valid
    rows = [spectrum(wave[real].clone()) for wave, real in zip(batch.inputs, valid, strict=True)]
    return torch.stack([(row + 1e-6).log().mean(dim=-1) for row in rows])


def _bag_of_tokens(batch: Batch, model: ModelConfig) -> Tensor:
    """(B, vocabulary): square roots of the tokens' relative frequencies, so that frequent words do not drown others."""
    assert model.text is not None
    counts = torch.zeros(len(batch.inputs), model.text.vocab_size)
    counts.scatter_add_(1, batch.inputs, (batch.inputs != model.text.pad_id).float())
    return (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).sqrt()

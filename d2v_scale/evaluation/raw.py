"""What a sample looks like without any model: the baselines that a representation must justify itself against."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.model.config import ModelConfig

_MELS = 80
_HASHED = 1024
"""Width that whitening is cheap for."""
_FFT, _WINDOW, _HOP = 512, 400, 160


def raw_features(batches: Iterable[tuple[Batch, Tensor]], model: ModelConfig) -> tuple[Tensor, Tensor]:
    """float32 (N, F) and int64 labels (N,): pixels, mean log-mel spectra or bags of tokens, as the stem says."""
    features, labels = [], []
    for batch, labels_b in batches:
        features.append(modalities.of(model, batch.modality).raw_features(batch))
        labels.append(labels_b)
    return torch.cat(features), torch.cat(labels)


def hashed(features_bd: Tensor, width: int = _HASHED) -> Tensor:
    """(B, width) that keeps inner products in expectation: every feature is added to one of the columns or taken from
    it, always the same (Weinberger et al. 2009). Features that are no wider come back as they are."""
    if features_bd.shape[1] <= width:
        return features_bd
    draw = torch.Generator().manual_seed(0)
    column_d = torch.randint(width, features_bd.shape[1:], generator=draw)
    sign_d = torch.randint(2, features_bd.shape[1:], generator=draw) * 2.0 - 1
    return torch.zeros(len(features_bd), width).index_add_(1, column_d, features_bd * sign_d)


def mean_log_mel(waves_bn: Tensor, valid_bn: Tensor | None) -> Tensor:
    """(B, mels): log-mel energies of 25 ms windows every 10 ms, averaged over the recording."""
    from torchaudio.transforms import MelSpectrogram

    spectrum = MelSpectrogram(SAMPLE_RATE, n_fft=_FFT, win_length=_WINDOW, hop_length=_HOP, n_mels=_MELS, center=False)
    valid_bn = torch.ones_like(waves_bn, dtype=torch.bool) if valid_bn is None else valid_bn
    waves = [wave[real].clone() for wave, real in zip(waves_bn, valid_bn, strict=True)]
    rows = [spectrum(F.pad(wave, (0, max(0, _FFT - len(wave))))) for wave in waves]
    return torch.stack([(row + 1e-6).log().mean(dim=-1) for row in rows])


def bag_of_tokens(tokens_bt: Tensor, vocab_size: int, pad_id: int) -> Tensor:
    """(B, vocabulary): square roots of the tokens' relative frequencies, so that frequent words do not drown others."""
    counts = torch.zeros(len(tokens_bt), vocab_size)
    counts.scatter_add_(1, tokens_bt, (tokens_bt != pad_id).float())
    return (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).sqrt()


def character_ngrams(texts: Sequence[str], width: int = 2048) -> Tensor:
    """(B, width): square roots of the relative frequencies of one to three characters in a row within words, hashed."""
    from sklearn.feature_extraction.text import HashingVectorizer

    counter = HashingVectorizer(
        analyzer="char_wb", ngram_range=(1, 3), n_features=width, norm="l1", alternate_sign=False
    )
    return torch.from_numpy(counter.transform(texts).toarray()).float().sqrt()

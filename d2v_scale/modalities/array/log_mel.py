"""Log-mel energies of recordings, read as any array is: shape first, then the part that is wanted."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_scale.modalities.speech.decoder import EXTENSIONS, decode
from d2v_scale.model.log_mel_config import LogMel
from d2v_scale.model.stem_config import ArrayStem
from d2v_scale.shards.reading import RawSample

_VALUES_AT_ONCE = 1 << 21
"""Of windows, filled up to a power of two: 41 s of the usual ones."""


class Spectrum:
    """The log-mel energies (1, bands, frames) of one recording, computed where they are read.

    They are computed in pieces that are counted from the recording's beginning, whatever part is read: sums over other
    numbers of windows differ in their last bits, and a part has the bits that it has in the whole.
    """

    def __init__(self, wave_n: NDArray[np.float32], config: LogMel, bands: int) -> None:
        """`wave_n`: of -1 ... 1 at `config.sample_rate`. Raises ValueError for less than one window."""
        frames = config.frames_of(len(wave_n))
        if frames < 1:
            seconds = len(wave_n) / config.sample_rate
            raise ValueError(f"is {seconds:.4g} s long, less than one window of {config.window_ms:g} ms")
        self.shape = (1, bands, frames)
        self._wave_n = wave_n
        self._config = config
        self._piece = max(1, _VALUES_AT_ONCE // (1 << (config.length - 1).bit_length()))

    def whole(self) -> NDArray[np.float32]:
        """All of it."""
        return self.slice(2, 0, self.shape[2])

    def slice(self, axis: int, start: int, stop: int) -> NDArray[np.float32]:
        """Bands (`axis` 1) or frames (2) from `start` to `stop`."""
        if axis != 2:
            return np.take(self.whole(), np.arange(start, stop), axis)
        first = start // self._piece * self._piece
        pieces = [self._energies(begin) for begin in range(first, stop, self._piece)]
        energies = np.concatenate(pieces)[start - first : stop - first]
        return np.ascontiguousarray(energies.T)[None]

    def _energies(self, begin: int) -> NDArray[np.float32]:
        """(frames, bands) of the piece that begins with this frame."""
        config, frames = self._config, min(self._piece, self.shape[2] - begin)
        first = begin * config.hop
        wave_n = self._wave_n[first : first + config.samples_of(frames)]
        return fbank(wave_n, config, self.shape[1])


def spectrum_of(sample: RawSample, stem: ArrayStem) -> Spectrum:
    """Of a sample's recording, read as the waveform stem reads it. Raises SampleFault where it has none, and ValueError
    where that cannot be decoded or is shorter than a window."""
    _, content = sample.member(EXTENSIONS)
    return Spectrum(decode(content, stem.log_mel.sample_rate), stem.log_mel, bands=stem.extents[0])


def fbank(wave_n: NDArray[np.float32], config: LogMel, bands: int) -> NDArray[np.float32]:
    """(frames, bands) of a waveform of at least one window, all at once: Kaldi's in torchaudio, without dither."""
    from torchaudio.compliance import kaldi

    options: dict[str, Any] = {
        "sample_frequency": config.sample_rate,
        # In the middle of a sample: Kaldi cuts the product off, which rounding may have brought below a whole number.
        "frame_shift": (config.hop + 0.5) * 1000 / config.sample_rate,
        "frame_length": (config.length + 0.5) * 1000 / config.sample_rate,
        "window_type": config.window,
        "num_mel_bins": bands,
        "low_freq": config.low_hz,
        "high_freq": config.highest_hz,
        "use_energy": False,
        "dither": 0.0,
    }
    with torch.no_grad():
        energies: torch.Tensor = kaldi.fbank(torch.from_numpy(wave_n)[None], **options)
    return energies.numpy()

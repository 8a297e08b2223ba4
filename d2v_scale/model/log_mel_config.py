"""How recordings become log-mel energies: sizes only. `modalities/array/log_mel.py` computes them."""

from dataclasses import dataclass
from typing import Literal

from d2v_scale.errors import ConfigError

_FEWEST_BANDS = 4
"""That Kaldi has filters for."""
_LONGEST_WINDOW_MS = 1000.0
_LOWEST_RATE, _HIGHEST_RATE = 1000, 1_000_000


@dataclass(kw_only=True)
class LogMel:
    """Recordings to log-mel energies (1, bands, frames), as Kaldi's fbank makes them of waveforms in -1 ... 1: of each
    window the mean is subtracted, then pre-emphasis of 0.97, the power spectrum, the logarithm of what is at least
    2^-23. Windows begin every `hop_ms` and lie within the recording; what is left behind the last one is not seen.
    There are as many bands as the first axis has steps. Defaults: as EAT."""

    sample_rate: int = 16_000
    """Samples a second that recordings are resampled to."""
    hop_ms: float = 10.0
    """From the beginning of a window to that of the next, milliseconds: a whole number of samples."""
    window_ms: float = 25.0
    """Length of a window, milliseconds."""
    window: Literal["hanning", "hamming", "povey", "blackman", "rectangular"] = "hanning"
    """Its shape; Kaldi's own is `povey`."""
    low_hz: float = 20.0
    """Where the lowest band begins."""
    high_hz: float | None = None
    """Where the highest band ends; null: half the sample rate."""

    @property
    def hop(self) -> int:
        """From a window to the next, samples."""
        return round(self.sample_rate * self.hop_ms / 1000)

    @property
    def length(self) -> int:
        """Of a window, samples."""
        return int(self.sample_rate * self.window_ms / 1000 + 1e-6)

    @property
    def highest_hz(self) -> float:
        """Where the highest band ends."""
        return self.sample_rate / 2 if self.high_hz is None else self.high_hz

    @property
    def frames_a_second(self) -> float:
        """Columns that a second becomes."""
        return self.sample_rate / self.hop

    def frames_of(self, samples: int) -> int:
        """Windows in so many samples."""
        return 0 if samples < self.length else 1 + (samples - self.length) // self.hop

    def samples_of(self, frames: int) -> int:
        """Samples that so many windows lie in."""
        return (frames - 1) * self.hop + self.length

    def check(self, key: str, bands: int) -> None:
        """Raises `ConfigError` for sizes that do not fit together. `key`: where this section stands."""
        rate, exact = self.sample_rate, self.sample_rate * self.hop_ms / 1000
        if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
            remedy = f"Give {_LOWEST_RATE} to {_HIGHEST_RATE} samples a second."
            raise ConfigError(f"{key}.sample_rate", f"is {rate}, which is no rate of sound", remedy)
        if self.hop < 1 or abs(exact - self.hop) > 1e-6:
            shown = f"is {self.hop_ms} ms, which are {exact:g} samples at {rate} a second"
            raise ConfigError(f"{key}.hop_ms", shown, "Give a whole number of samples.")
        if self.length < 2 or self.window_ms > _LONGEST_WINDOW_MS:
            shown = f"is {self.window_ms} ms, which are {self.length} samples at {rate} a second"
            remedy = f"Give at least 2 samples, and at most {_LONGEST_WINDOW_MS:g} ms."
            raise ConfigError(f"{key}.window_ms", shown, remedy)
        if self.highest_hz > rate / 2:
            raise ConfigError(f"{key}.high_hz", f"is {self.high_hz}", f"Give at most half of {rate} samples a second.")
        if self.low_hz >= self.highest_hz:
            shown = f"is {self.low_hz}, and the highest band ends at {self.highest_hz:g}"
            raise ConfigError(f"{key}.low_hz", shown, "Give less.")
        if bands < _FEWEST_BANDS:
            shown = f"make {bands} bands of a recording, the extent of the first axis"
            raise ConfigError(f"{key.removesuffix('.log_mel')}.axes", shown, f"Give at least {_FEWEST_BANDS}.")

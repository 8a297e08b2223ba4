"""Recordings: decode, resample, normalise over the whole file, crop."""

import bisect
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from d2v_scale.data.config import SAMPLE_RATE, SpeechData
from d2v_scale.errors import ConfigError
from d2v_scale.modalities.speech.resampling import length_at_16_khz, resampled
from d2v_scale.shards.reading import RawSample, Store
from d2v_scale.shards.rows import Row, Stacked
from d2v_scale.shards.stream import StreamStore

EXTENSIONS = ("flac", "wav", "ogg", "oga", "mp3", "opus", "aiff", "aif", "aifc", "au", "sph", "w64", "caf")
_LOWEST_RATE, _HIGHEST_RATE = 1000, 1_000_000
_BLOCK = 1 << 22
"""Values that are read at once, so that neither a long recording nor a header that lies costs much memory."""
_LOUDEST = float(1 << 32)
"""Some store integers of up to 32 bits as floating point. What is greater is no sound, and would leave none of the rest
when the recording is normalised."""
_NORM_EPS = 1e-5

Wave = NDArray[np.float32]


class _Sequential(soundfile.SoundFile):
    """A file that is read from its beginning on. soundfile seeks between reads, which fails where a FLAC does not say
    how long it is."""

    def seekable(self) -> bool:
        return False


def decode(content: bytes | memoryview, at: int = SAMPLE_RATE) -> Wave:
    """A file of any format that libsndfile reads, as mono float32 (n,) at 16 kHz, or `at` so many Hz. n is what is
    really there, whatever the header says. A long recording is never in memory at its own rate.

    Raises ValueError where it cannot be decoded, where there is nothing, and where a value is NaN, infinite or beyond
    all sound: one would cost a whole step.
    """
    rate, blocks = _blocks(content)
    return np.concatenate(list(resampled(blocks, rate, at)))


def _blocks(content: bytes | memoryview) -> tuple[int, Iterator[Wave]]:
    """The rate of a file, Hz, and what it holds, in mono pieces. Both raise as `decode` does."""
    if len(content) == 0:
        raise ValueError("is empty")
    with _named_errors(content):
        file = _Sequential(io.BytesIO(content))
    if not _LOWEST_RATE <= file.samplerate <= _HIGHEST_RATE:
        raise ValueError(f"has {file.samplerate} samples a second, which is no rate of sound")
    return file.samplerate, _mono_blocks(file, content)


def _mono_blocks(file: soundfile.SoundFile, content: bytes | memoryview) -> Iterator[Wave]:
    remaining, found, at_once = file.frames, 0, max(1, _BLOCK // file.channels)
    with file:
        while remaining > 0:
            wanted = min(remaining, at_once)
            with _named_errors(content):
                block = file.read(wanted, dtype="float32")
            if len(block):
                _require_sound(float(block.min()), float(block.max()))
                yield block.mean(axis=1) if block.ndim > 1 else block
            found, remaining = found + len(block), remaining - wanted
            if len(block) < wanted:
                break
    if found == 0:
        raise ValueError("has no samples")


def _require_sound(lowest: float, highest: float) -> None:
    """Raises ValueError for what `lowest` and `highest` of a recording cannot be; of NaN both are NaN."""
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError("it holds values that are not finite")
    if max(-lowest, highest) > _LOUDEST:
        raise ValueError(f"it holds values up to {max(-lowest, highest):.3g}, which is no sound")


@contextmanager
def _named_errors(content: bytes | memoryview) -> Iterator[None]:
    try:
        yield
    except soundfile.LibsndfileError as error:
        what = "is MP4 or AAC, which is not read" if bytes(content[4:8]) == b"ftyp" else "is not decoded by libsndfile"
        raise ValueError(f"{what}: {error.error_string}") from None


def measure(members: Mapping[str, bytes | memoryview]) -> int:
    """Samples at 16 kHz of the sample's recording, as `decode` gives them. Raises where it cannot be decoded."""
    content = next((data for extension, data in members.items() if extension in EXTENSIONS), None)
    if content is None:
        raise ValueError(f"has no .{', .'.join(EXTENSIONS)}")
    rate, blocks = _blocks(content)
    return length_at_16_khz(sum(map(len, blocks)), rate)


def normalize(wave: Wave) -> Wave:
    """Zero mean and unit variance over the whole recording (spec 3.1: before any crop; eps 1e-5 on the variance)."""
    centred = wave - wave.mean(dtype=np.float64).astype(np.float32)
    variance = np.dot(centred, centred) / max(1, len(centred))
    centred *= np.float32(1 / np.sqrt(variance + _NORM_EPS))
    return centred


class Frames(Protocol):
    """A stem's sizes, as far as a waveform's decoder asks for them."""

    def frames_of(self, samples: int, /) -> int:
        """Stretches of time that the stem makes of so many samples."""


class SpeechDecoder:
    """Samples to waveforms, waveforms to a batch."""

    draws = 1
    extensions: tuple[str, ...] = EXTENSIONS

    def __init__(self, config: SpeechData, stem: Frames) -> None:
        self._config = config
        self._stem = stem
        if self._stem.frames_of(round(config.min_seconds * SAMPLE_RATE)) < 1:
            enough = bisect.bisect_left(range(60 * SAMPLE_RATE), 1, key=stem.frames_of)
            raise ConfigError(
                "data.speech.min_seconds",
                f"{config.min_seconds} is shorter than one frame of the model",
                f"Give at least {math.ceil(1000 * enough / SAMPLE_RATE) / 1000:g}.",
            )

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """`length` samples of the recording from a random place; 0: as many as there are, up to `max_seconds`.

        0 is for streams, where lengths are not known beforehand: recordings that are too short are passed over. Raises
        DataStarved where a whole epoch is.
        """
        sample = store.read(shard, item)
        wave = self._whole(sample)
        if length == 0:
            while len(wave) < round(self._config.min_seconds * SAMPLE_RATE):
                assert isinstance(store, StreamStore), "plans know the lengths of indexed recordings"
                store.pass_over(f"shorter than data.speech.min_seconds={self._config.min_seconds}")
                sample = store.read(shard, item)
                wave = self._whole(sample)
            length = min(len(wave), round(self._config.max_seconds * SAMPLE_RATE))
        if len(wave) < length:
            raise sample.fault(f"is {len(wave)} samples long, its index says at least {length}")
        start = int(draws[0] * (len(wave) - length + 1))
        # A view of a long recording would keep all of it until the batch is full.
        return Row(sample.key, wave[start : start + length].copy())

    def part_row(self, sample: RawSample, draws: NDArray[np.float64]) -> tuple[Wave, bool]:
        """The recording, at most `max_seconds` of it from a random place; whether it is longer. Raises SampleFault for
        one that is shorter than `min_seconds`."""
        wave = self._whole(sample)
        if len(wave) < round(self._config.min_seconds * SAMPLE_RATE):
            raise sample.fault(f"is shorter than data.speech.min_seconds={self._config.min_seconds}")
        length = min(len(wave), round(self._config.max_seconds * SAMPLE_RATE))
        start = int(draws[0] * (len(wave) - length + 1))
        return wave[start : start + length].copy(), len(wave) > length

    def evaluation_row(self, sample: RawSample) -> Wave:
        """The recording from its beginning, at most `max_seconds`. Raises SampleFault where it is no frame long."""
        wave = self._whole(sample)[: round(self._config.max_seconds * SAMPLE_RATE)]
        if self._stem.frames_of(len(wave)) < 1:
            raise sample.fault(f"is {len(wave)} samples long, less than one frame of the model")
        return wave

    def stack(self, rows: list[Wave], longest: int | None = None) -> Stacked:
        """float32 (B, samples); shorter rows are filled with zeros and marked in `valid`. `longest`: samples."""
        lengths = np.array([len(row) for row in rows])
        least = 0 if longest is None else max(longest, len(self.blank()))
        longest = max(int(lengths.max()), least)
        if (lengths == longest).all():
            return Stacked(torch.from_numpy(np.stack(rows)), length=self._stem.frames_of(longest))
        inputs = np.zeros((len(rows), longest), dtype=np.float32)
        for k, row in enumerate(rows):
            inputs[k, : len(row)] = row
        valid = torch.from_numpy(np.arange(longest) < lengths[:, None])
        frames_b = np.array([self._stem.frames_of(int(length)) for length in lengths])
        return Stacked(torch.from_numpy(inputs), valid, length=self._stem.frames_of(longest), valid_lengths=frames_b)

    def blank(self) -> Wave:
        """A row of a batch that has none."""
        return np.zeros(max(SAMPLE_RATE // 2, round(self._config.min_seconds * SAMPLE_RATE)), dtype=np.float32)

    def _whole(self, sample: RawSample) -> Wave:
        _, content = sample.member(EXTENSIONS)
        wave = decode(content)
        return normalize(wave) if self._config.normalize else wave

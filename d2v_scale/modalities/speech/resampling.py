"""Waveforms of any rate to 16 kHz, or another: torchaudio's windowed sinc (Hann, 6 zero crossings, cut-off at 0.99)."""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_scale.data.config import SAMPLE_RATE

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_LARGEST_KERNEL = 1 << 20
_WEIGHTS_AT_ONCE = 1 << 21

Wave = NDArray[np.float32]


def length_at_16_khz(samples: int, rate: int) -> int:
    """Samples that `resample` makes of `samples` at `rate` by default: ceil(samples * 16000 / rate)."""
    return -(-samples * SAMPLE_RATE // rate)


def resample(wave_n: Wave, rate: int, to: int = SAMPLE_RATE) -> Wave:
    """From `rate` (Hz) to `to`, ceil(n * to / rate) samples."""
    if rate == to:
        return wave_n
    divisor = math.gcd(rate, to)
    before, after = rate // divisor, to // divisor
    # The kernel has a row for every phase, each as long as a period of phases: at 8001 Hz gigabytes.
    if after * (2 * _half_width(before, after) + before) <= _LARGEST_KERNEL:
        return _by_kernel(rate, to)(torch.from_numpy(wave_n)).numpy()
    return _by_output(wave_n, before, after)


def resampled(blocks: Iterable[Wave], rate: int, to: int = SAMPLE_RATE) -> Iterator[Wave]:
    """Consecutive pieces of a recording from `rate` (Hz) to `to`: together what `resample` makes of the whole (of a
    single piece the same bits), with two pieces in memory."""
    if rate == to:
        yield from blocks
        return
    divisor = math.gcd(rate, to)
    before, after = rate // divisor, to // divisor
    # In periods of `before` samples, which become `after`: what an output is made of on each side, what is held of the
    # recording and was made already.
    context, held_n, made = math.ceil(_half_width(before, after) / before) + 1, np.zeros(0, np.float32), 0
    for block in blocks:
        ready = len(held_n) // before - context
        if ready > made:
            yield resample(held_n[: (ready + context) * before], rate, to)[made * after : ready * after]
            kept = max(0, ready - context)
            held_n, made = held_n[kept * before :], ready - kept
        held_n = np.concatenate((held_n, block))
    yield resample(held_n, rate, to)[made * after :]


@lru_cache(maxsize=8)
def _by_kernel(rate: int, to: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(rate, to, lowpass_filter_width=_ZERO_CROSSINGS, rolloff=_ROLLOFF)


def _half_width(before: int, after: int) -> int:
    """Input samples on each side that an output is made of."""
    return math.ceil(_ZERO_CROSSINGS * before / (min(before, after) * _ROLLOFF))


def _by_output(wave_n: Wave, before: int, after: int) -> Wave:
    """The same sums, with the few weights of each output computed when it is its turn."""
    cutoff = min(before, after) * _ROLLOFF / before
    half = _half_width(before, after)
    padded_n = np.concatenate([np.zeros(half, np.float32), wave_n, np.zeros(half + 1, np.float32)])
    offset_w = np.arange(-half, half + 1)
    total = -(-len(wave_n) * after // before)
    made = []
    at_once = max(1, _WEIGHTS_AT_ONCE // len(offset_w))
    for first in range(0, total, at_once):
        output_m = np.arange(first, min(first + at_once, total), dtype=np.int64)
        nearest_m, rest_m = np.divmod(output_m * before, after)
        distance_mw = (offset_w - rest_m[:, None] / after) * cutoff
        inside_mw = np.abs(distance_mw) < _ZERO_CROSSINGS
        window_mw = np.cos(distance_mw * (math.pi / _ZERO_CROSSINGS / 2)) ** 2
        weight_mw = (np.sinc(distance_mw) * window_mw * inside_mw * cutoff).astype(np.float32)
        made.append(np.einsum("mw,mw->m", weight_mw, padded_n[nearest_m[:, None] + offset_w + half]))
    return np.concatenate(made).astype(np.float32, copy=False) if made else np.zeros(0, np.float32)

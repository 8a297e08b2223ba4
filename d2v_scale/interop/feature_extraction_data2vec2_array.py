"""What prepares arrays for an exported model as its training did. A copy of this file lies beside the weights, and
needs NumPy, torch and transformers only."""

# mypy: allow-untyped-defs, allow-untyped-calls

import math

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin

_LEAST_STD = 1e-30  # What varies less is constant.
_VALUES_AT_ONCE = 1 << 21  # Of windows, as in training: sums over other numbers of windows differ in their last bits.
_PREEMPHASIS = 0.97


class Data2Vec2ArrayProcessor(FeatureExtractionMixin):
    """Crop from the middle, transform, normalise, pad; masks of patches. `axes`, `patch`, `extents`, `longer`: names,
    steps of a patch, steps of every array, and what becomes of longer ones (`refuse` or `crop`), an axis each.

    `transform: log_mel` takes waveforms, of which it makes log-mel energies as Kaldi does. `log_mel`: their
    `sample_rate`, the samples from a window to the next (`hop`) and in one (`length`), its shape (`window`), and where
    the bands begin and end (`low_hz`, `high_hz`)."""

    model_input_names = ["values", "attention_mask"]  # noqa: RUF012  (as in every class of transformers)

    def __init__(
        self,
        num_channels=1,
        axes=("time",),
        patch=(1,),
        extents=(2,),
        longer=("refuse",),
        transform="none",
        log_floor=1e-6,
        log_mel=None,
        normalise="none",
        mean=(),
        std=(),
        missing="refuse",
        **kwargs,
    ):
        for name, value, known in (
            ("transform", transform, TRANSFORMS),
            ("normalise", normalise, ("none", "sample", "channel", "moments")),
            ("missing", missing, ("refuse", "mask")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; known are {', '.join(known)}.")
        self.num_channels = num_channels
        self.axes = list(axes)
        self.patch = list(patch)
        self.extents = list(extents)
        self.longer = list(longer)
        self.transform = transform
        self.log_floor = log_floor
        self.log_mel = log_mel
        self.normalise = normalise
        self.mean = list(mean)
        self.std = list(std)
        self.missing = missing
        super().__init__(**kwargs)

    def __call__(self, arrays, return_tensors=None, sampling_rate=None):
        """`values` float32 (B, C, E_1 ... E_n), zero in padding and patches that miss a value, and `attention_mask`
        int64 (B, T), 1 at all other patches.

        `arrays`: one (C, e_1 ... e_n), an array of several, or a list of them, whose extents may differ; numbers of any
        real type, NaN where a value is missing. Under `log_mel` waveforms (samples,) in -1 ... 1 instead, which have to
        be at `sampling_rate` samples a second. `return_tensors`: `pt` or `np`. Raises ValueError, which names the array
        by its place.
        """
        expected = self.log_mel["sample_rate"] if self.transform == "log_mel" else None
        if sampling_rate is not None and sampling_rate != expected:
            taken = "no waveforms" if expected is None else f"waveforms of {expected} samples a second: resample them"
            raise ValueError(f"sampling_rate is {sampling_rate}, but this encoder takes {taken}.")
        rows = [self._row(number, given) for number, given in enumerate(self._listed(arrays))]
        values = np.zeros((len(rows), self.num_channels, *self.extents), dtype=np.float32)
        real = np.zeros((len(rows), *self._grid(self.extents)), dtype=bool)
        for k, row in enumerate(rows):
            values[k][tuple(slice(held) for held in row.shape)] = row
            lacking = self._lacking(row)
            real[k][tuple(slice(held) for held in lacking.shape)] = ~lacking
        shown = real
        for axis, size in enumerate(self.patch):
            shown = shown.repeat(size, axis=1 + axis)
        # Padding is zero already; of a patch that misses a value, none is seen.
        np.copyto(values, 0.0, where=~shown[:, None])
        data = {"values": values, "attention_mask": real.reshape(len(rows), -1).astype(np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

    def _listed(self, arrays):
        """Each array by itself."""
        if isinstance(arrays, list | tuple) and not arrays:
            raise ValueError("There are no arrays: give at least one.")
        if isinstance(arrays, list | tuple) and not isinstance(arrays[0], list | tuple | int | float):
            return list(arrays)
        array = _numbers(arrays, "What is given")
        of_one = 1 if self.transform == "log_mel" else len(self.axes) + 1
        if array.ndim == of_one:
            return [array]
        if array.ndim == of_one + 1:
            if not len(array):
                raise ValueError("There are no arrays: give at least one.")
            return list(array)
        raise ValueError(f"What is given has the shape {array.shape}; give {self._wanted()}, or a list of such arrays.")

    def _wanted(self):
        if self.transform == "log_mel":
            return "waveforms (samples,)"
        return f"({self.num_channels} channels, {', '.join(self.axes)})"

    def _grid(self, extents):
        return [-(-extent // size) for extent, size in zip(extents, self.patch, strict=True)]

    def _row(self, number, given):
        """float32 (C, e_1 ... e_n), NaN where a value is missing."""
        name = f"Array {number}"
        array = _numbers(given, name)
        if self.transform == "log_mel":
            array = self._spectrum(array, name)
        if array.ndim != len(self.axes) + 1 or array.shape[0] != self.num_channels or 0 in array.shape:
            raise ValueError(f"{name} has the shape {array.shape}; this encoder takes {self._wanted()}.")
        cuts = [slice(None)]
        for axis, held, extent, longer in zip(self.axes, array.shape[1:], self.extents, self.longer, strict=True):
            if held > extent and longer == "refuse":
                raise ValueError(f"{name} has {held} steps along {axis}, more than {extent}: cut it.")
            start = int(0.5 * (max(0, held - extent) + 1))
            cuts.append(slice(start, start + min(extent, held)))
        with np.errstate(over="ignore"):
            values = array[tuple(cuts)].astype(np.float32)
        if np.isinf(values).any():
            raise ValueError(f"{name} holds values that are infinite, or too large for 32-bit numbers.")
        missing = int(np.isnan(values).sum())
        if missing and self.missing == "refuse":
            raise ValueError(f"{name} holds {missing} NaN of {values.size} values, and this encoder takes none.")
        if missing and self._lacking(values).all():
            raise ValueError(f"{name} has a NaN in every patch.")
        try:
            return self._normalised(TRANSFORMS[self.transform](self, values))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    def _spectrum(self, wave, name):
        """float32 (1, bands, frames), in the pieces that training makes it in."""
        if wave.ndim != 1 or wave.dtype.kind != "f":
            shown = f"is of type {wave.dtype} and shape {wave.shape}"
            raise ValueError(f"{name} {shown}; this encoder takes waveforms (samples,) of floating point in -1 ... 1.")
        wave = np.ascontiguousarray(wave, dtype=np.float32)
        if not np.isfinite(wave).all():
            raise ValueError(f"{name} holds values that are not finite.")
        hop, length = self.log_mel["hop"], self.log_mel["length"]
        if len(wave) < length:
            raise ValueError(f"{name} has {len(wave)} samples, less than a window of {length}.")
        frames = 1 + (len(wave) - length) // hop
        at_once = max(1, _VALUES_AT_ONCE // (1 << (length - 1).bit_length()))
        parts = []
        for begin in range(0, frames, at_once):
            last = min(begin + at_once, frames) - 1
            parts.append(_log_mel(torch.tensor(wave[begin * hop : last * hop + length]), self.log_mel, self.extents[0]))
        return torch.cat(parts).numpy().T[None]

    def _normalised(self, values):
        axes = tuple(range(1, values.ndim))
        if self.normalise == "none":
            return values
        if self.normalise == "moments":
            broad = (-1, *[1] * len(axes))
            mean, std = (np.array(x, dtype=np.float32).reshape(broad) for x in (self.mean, self.std))
            return values * (1 / std) + (-mean / std)
        return _standardised(values, (0, *axes) if self.normalise == "sample" else axes)

    def _lacking(self, values):
        """bool, patches along each axis: those in which a value is missing."""
        lacking = np.isnan(values).any(axis=0)
        lacking = np.pad(lacking, [(0, -held % size) for held, size in zip(lacking.shape, self.patch, strict=True)])
        pairs = [n for held, size in zip(lacking.shape, self.patch, strict=True) for n in (held // size, size)]
        return lacking.reshape(pairs).any(axis=tuple(range(1, 2 * len(self.patch), 2)))


def _numbers(given, name):
    """An array of real numbers. Raises ValueError."""
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        given = (given.float() if str(given.dtype) == "torch.bfloat16" else given).numpy()
    if np.ma.isMaskedArray(given):
        raise ValueError(f"{name} is a masked array: write NaN where it is masked (`array.filled(np.nan)`).")
    try:
        array = np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} is no array: its rows differ in length.") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds values of type {array.dtype}, which are no real numbers.")
    return array


def _standardised(values, axes):
    """Mean 0 and variance 1 over these axes, of what is not missing; constants become 0."""
    there = ~np.isnan(values)
    count = np.maximum(there.sum(axis=axes, keepdims=True), 1)
    mean = np.where(there, values, 0).sum(axis=axes, keepdims=True, dtype=np.float64) / count
    centred = values - mean.astype(np.float32)
    squares = np.square(np.where(there, centred, 0), dtype=np.float64)
    std = np.sqrt(squares.sum(axis=axes, keepdims=True) / count)
    return centred * np.where(std > _LEAST_STD, 1 / np.maximum(std, _LEAST_STD), 0).astype(np.float32)


def _unchanged(processor, values):
    del processor
    return values


def _log(processor, values):
    lowest = np.nanmin(values)
    if lowest < 0:
        raise ValueError(f"holds {lowest:g}, which has no logarithm.")
    return np.log(np.maximum(values, np.float32(processor.log_floor)))


def _log_mel(wave, settings, bands):
    """(frames, bands) of a waveform: Kaldi's fbank without dither, as torchaudio computes it."""
    length = settings["length"]
    windows = wave.unfold(0, length, settings["hop"])
    windows = windows - windows.mean(dim=1, keepdim=True)
    before = torch.cat([windows[:, :1], windows[:, :-1]], dim=1)
    windows = (windows - _PREEMPHASIS * before) * _WINDOWS[settings["window"]](length)
    padded = 1 << (length - 1).bit_length()
    power = torch.fft.rfft(torch.nn.functional.pad(windows, (0, padded - length))).abs().pow(2.0)
    filters = torch.nn.functional.pad(_mel_filters(settings, bands, padded), (0, 1))
    return torch.mm(power, filters.T).clamp(min=torch.finfo(torch.float32).eps).log()


def _mel_filters(settings, bands, padded):
    """(bands, padded / 2): triangles of equal width in mel."""
    low, high = (1127.0 * math.log(1.0 + settings[key] / 700.0) for key in ("low_hz", "high_hz"))
    step = (high - low) / (bands + 1)
    band = torch.arange(bands).unsqueeze(1)
    left, middle, right = (low + (band + k) * step for k in (0.0, 1.0, 2.0))
    mel = (1127.0 * (1.0 + settings["sample_rate"] / padded * torch.arange(padded / 2) / 700.0).log()).unsqueeze(0)
    return torch.min((mel - left) / (middle - left), (right - mel) / (right - middle)).clamp(min=0)


def _blackman(length):
    turn = 2 * math.pi / (length - 1) * torch.arange(length)
    return 0.42 - 0.5 * torch.cos(turn) + 0.08 * torch.cos(2 * turn)


_WINDOWS = {
    "hanning": lambda length: torch.hann_window(length, periodic=False),
    "hamming": lambda length: torch.hamming_window(length, periodic=False, alpha=0.54, beta=0.46),
    "povey": lambda length: torch.hann_window(length, periodic=False).pow(0.85),
    "blackman": lambda length: _blackman(length),
    "rectangular": lambda length: torch.ones(length),
}

TRANSFORMS = {"none": _unchanged, "log": _log, "log_mel": _unchanged}
"""By name: a function of the processor and the values (C, e_1 ... e_n) that are read. Raises ValueError."""

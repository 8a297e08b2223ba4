"""What prepares samples of several parts for an exported model as its training did. A copy of this file lies beside the
weights, and needs NumPy, Pillow, torch and transformers only."""

# mypy: allow-untyped-defs, allow-untyped-calls

import warnings

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerFast

from .feature_extraction_data2vec2_array import Data2Vec2ArrayProcessor

_NORM_EPS = 1e-5
_OF_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class Data2Vec2JointProcessor(FeatureExtractionMixin):
    """Crops, resizes, normalises, tokenises and pads each part by itself. `parts`: of each its `name`, what it is of
    (`kind`: image, recording, text or array), and how it is read."""

    def __init__(self, parts=(), tokenizer=None, **kwargs):
        self.parts = [dict(part) for part in parts]
        self.tokenizer = tokenizer
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """With the tokenizer beside it, where a part is text and there is one."""
        found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor = found[0] if isinstance(found, tuple) else found
        if any(part["kind"] == "text" for part in processor.parts):
            options = {name: kwargs[name] for name in _OF_HUB if name in kwargs}
            try:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **options)
            except (OSError, ValueError):  # none was exported
                tokenizer = None
            processor.tokenizer = tokenizer
        return found

    def save_pretrained(self, save_directory, **kwargs):
        """With the tokenizer."""
        saved = super().save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        return saved

    def to_dict(self):
        """As preprocessor_config.json has it."""
        tokenizer, self.tokenizer = self.tokenizer, None
        try:
            values = super().to_dict()
        finally:
            self.tokenizer = tokenizer
        values.pop("tokenizer", None)
        return values

    def __call__(self, samples=None, return_tensors=None, sampling_rate=None, **parts):
        """For each part that is given: NAME, where it may be padded NAME_mask, and NAME_present (B,), 1 where a sample
        has it.

        By name of a part a list with as many samples as the others, None where one does not have it, or one sample; in
        a mapping or as keyword arguments. Images: Pillow's, or uint8 arrays (H, W) or (H, W, 3). Recordings: waveforms
        (samples,) of floating point in -1 ... 1 at 16,000 samples a second, which `sampling_rate` may confirm. Texts:
        str, or arrays of token ids with </s>, without <s>; what is too long is cut, with a warning. Arrays: (channels,
        axis 1, ...), NaN where a value is missing. `return_tensors`: `pt` or `np`. Raises ValueError, which names part
        and sample.
        """
        given = {**(samples or {}), **parts}
        known = [part["name"] for part in self.parts]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{', '.join(unknown)} is no part of this encoder; it has {', '.join(known)}.")
        rates = {part["sample_rate"] for part in self.parts if part["name"] in given and "sample_rate" in part}
        if sampling_rate is not None and rates != {sampling_rate}:
            wanted = " and ".join(map(str, sorted(rates))) or "no recordings"
            raise ValueError(f"sampling_rate is {sampling_rate}, but this encoder takes {wanted}: resample them.")
        given = {name: _listed(given[name]) for name in known if given.get(name) is not None}
        counts = {name: len(values) for name, values in given.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            told = ", ".join(f"{count} of {name}" for name, count in counts.items()) or "none"
            raise ValueError(f"There are {told}: give as many samples of each part, None where one does not have it.")
        for number in range(next(iter(counts.values()))):
            if all(values[number] is None for values in given.values()):
                raise ValueError(f"Sample {number} has no part: leave it out.")
        data: dict[str, object] = {}
        for part in self.parts:
            name = part["name"]
            if name in given and any(value is not None for value in given[name]):
                data |= self._part(part, given[name])
        return BatchFeature(data, tensor_type=return_tensors)

    def _part(self, part, values):
        name, there = part["name"], [number for number, value in enumerate(values) if value is not None]
        rows = []
        for number in there:
            try:
                rows.append(_ROWS[part["kind"]](self, part, values[number]))
            except ValueError as error:
                raise ValueError(f"{name} of sample {number}: {error}") from None
        inputs, mask = _STACKS[part["kind"]](part, rows)
        found = {name: _spread(inputs, there, len(values), part.get("pad_id", 0))}
        if mask is not None:
            found[f"{name}_mask"] = _spread(mask, there, len(values), 0)
        found[f"{name}_present"] = _spread(np.ones(len(there), dtype=np.int64), there, len(values), 0)
        return found

    def _image(self, part, given):
        image = given
        if isinstance(given, np.ndarray):
            if given.dtype != np.uint8 or given.ndim not in (2, 3) or given.shape[2:] not in ((), (1,), (3,), (4,)):
                raise ValueError(f"an array of type {given.dtype} and shape {given.shape} is no image: give uint8.")
            image = Image.fromarray(given[..., 0] if given.shape[2:] == (1,) else given)
        if not isinstance(image, Image.Image):
            raise ValueError(f"{type(given).__name__} is no image: give one of Pillow's, or an array.")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB" if part["num_channels"] == 3 else "L")
        height, width = part["size"]
        across = min(image.width, image.height * width / height) * part["crop"]
        down = across * height / width
        left, top = (image.width - across) / 2, (image.height - down) / 2
        box = (left, top, left + across, top + down)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box), dtype=np.float32)
        mean, std = (255 * np.array(part[key], dtype=np.float32) for key in ("mean", "std"))
        return (pixels.reshape(height, width, -1) * (1 / std) + (-mean / std)).transpose(2, 0, 1)

    def _recording(self, part, given):
        wave = _numpy(given)
        if wave.ndim != 1 or wave.dtype.kind != "f":
            raise ValueError(f"an array of type {wave.dtype} and shape {wave.shape} is no waveform of floating point.")
        wave = wave.astype(np.float32)
        if len(wave) < part["shortest"]:
            raise ValueError(f"{len(wave)} samples are less than one frame, {part['shortest']}.")
        if not np.isfinite(wave).all():
            raise ValueError("holds values that are not finite.")
        if part["normalise"]:
            wave = wave - wave.mean(dtype=np.float64).astype(np.float32)
            wave = wave * np.float32(1 / np.sqrt(np.dot(wave, wave) / len(wave) + _NORM_EPS))
        return wave

    def _text(self, part, given):
        if isinstance(given, str):
            if self.tokenizer is None:
                raise ValueError("there is no tokenizer: give arrays of token ids.")
            ids = np.array(self.tokenizer(given, add_special_tokens=False)["input_ids"] + [part["eos_id"]])
        else:
            ids = _numpy(given)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
            raise ValueError("is no text, and no line of token ids.")
        if ids.min() < 0 or ids.max() >= part["vocab_size"] or (ids == part["pad_id"]).any():
            raise ValueError(f"holds ids that are none of {part['vocab_size']}, or of padding ({part['pad_id']}).")
        room = part["max_positions"] - 1
        if len(ids) > room:
            told = f"{part['name']}: {len(ids)} tokens are more than {room}; the rest is left out."
            warnings.warn(told, stacklevel=4)
            ids = np.concatenate([ids[: room - 1], [part["eos_id"]]])
        return np.concatenate([[part["bos_id"]], ids]).astype(np.int64)

    def _array(self, part, given):
        made = Data2Vec2ArrayProcessor(**part["reading"])([_numpy(given)])
        return made["values"][0], made["attention_mask"][0]


_ROWS = {
    "image": Data2Vec2JointProcessor._image,
    "recording": Data2Vec2JointProcessor._recording,
    "text": Data2Vec2JointProcessor._text,
    "array": Data2Vec2JointProcessor._array,
}


def _listed(given):
    """A list of samples; of a single one, itself: a text is no list of characters, an image none of its rows."""
    return list(given) if isinstance(given, list | tuple) else [given]


def _numpy(given):
    if np.ma.isMaskedArray(given):
        raise ValueError("is a masked array: fill it, of an array part with NaN.")
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    return np.asarray(given)


def _spread(rows, there, count, empty):
    """Rows of the samples `there` among all, `empty` in those of the others."""
    found = np.full((count, *rows.shape[1:]), empty, dtype=rows.dtype)
    found[there] = rows
    return found


def _stacked(part, rows):
    del part
    return np.stack(rows), None


def _lines(part, rows):
    """Of several lengths, padded behind."""
    lengths = np.array([len(row) for row in rows])
    inputs = np.full((len(rows), lengths.max()), part.get("pad_id", 0), dtype=rows[0].dtype)
    for line, row in zip(inputs, rows, strict=True):
        line[: len(row)] = row
    return inputs, (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)


def _masked(part, rows):
    del part
    values, masks = zip(*rows, strict=True)
    return np.stack(values), np.stack(masks)


_STACKS = {"image": _stacked, "recording": _lines, "text": _lines, "array": _masked}

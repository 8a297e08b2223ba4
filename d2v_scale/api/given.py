"""Samples as Python has them (a picture, a wave, a text, an array), as the bytes that a shard would hold of them.

So they go through the decoders of training and evaluation, with all their checks, and become the same values.
"""

import io
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.shards.content import Content
from d2v_scale.shards.reading import RawSample, SampleFault

READS: dict[Content, str] = {
    "image": "images: paths or bytes of files, PIL images, uint8 arrays (height, width) or (height, width, 3)",
    "recording": "recordings: paths or bytes of files, arrays (samples,) at 16 kHz, pairs of an array and its rate",
    "text": "texts: str, paths of files, pairs of str, arrays of token ids",
    "array": "arrays: (channels, axis 1, ...), paths or bytes of .npy and .npz files",
}
"""What is taken for a sample, by content."""

_WAVE_FORMATS = {"float32": "FLOAT", "float64": "DOUBLE", "int16": "PCM_16", "int32": "PCM_32"}
Members = dict[str, bytes]


class HeldSample(RawSample):
    """A sample of which the members are in memory."""

    def __init__(self, key: str, members: Members) -> None:
        self.shard = ""
        self.key = key
        self._held = members

    def member(self, extensions: tuple[str, ...]) -> tuple[str, memoryview]:
        """The first member with one of `extensions`, and its extension. Raises SampleFault."""
        found = next(((name, content) for name, content in self._held.items() if name in extensions), None)
        if found is None:
            raise self.fault(f"has no .{', .'.join(extensions)}")
        if not found[1]:
            raise self.fault("is empty")
        return found[0], memoryview(found[1])

    def members(self) -> Members:
        """All members, by extension."""
        return dict(self._held)

    def has(self, extension: str) -> bool:
        """True when the sample has such a member."""
        return extension in self._held

    def fault(self, reason: str) -> SampleFault:
        """What to raise when this sample cannot be used."""
        return SampleFault(self.shard, self.key, reason)


def members_of(content: Content, given: object) -> Members:
    """The members of a sample. Raises ValueError, which says what is taken, for what is none."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    for one in given if isinstance(given, tuple) else (given,):
        if np.ma.isMaskedArray(one):  # what is masked would be read as data
            raise ValueError("is a masked array: fill it (`array.filled(value)`; of an array stem with NaN)")
    match content:
        case "image":
            return _image(given)
        case "recording":
            return _recording(given)
        case "text":
            return _text(given)
        case "array":
            return _array(given)
    assert_never(content)


def _image(given: object) -> Members:
    from d2v_scale.modalities.vision.decoder import EXTENSIONS, eight_bit

    if isinstance(given, np.ndarray):
        channels = given.shape[2:]
        if given.dtype != np.uint8 or given.ndim not in (2, 3) or channels not in ((), (1,), (3,), (4,)):
            raise _refused("image", given)
        given = Image.fromarray(given[..., 0] if channels == (1,) else given)
    if isinstance(given, Image.Image):
        if given.width * given.height == 0:
            raise ValueError("has no pixels")
        image = eight_bit(ImageOps.exif_transpose(given))
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.convert("RGB")
        return {"png": _written(lambda file: image.save(file, "PNG", compress_level=1))}
    return _file("image", given, EXTENSIONS)


def _recording(given: object) -> Members:
    import soundfile

    from d2v_scale.modalities.speech.decoder import EXTENSIONS

    wave, rate = given if isinstance(given, tuple) and len(given) == 2 else (given, SAMPLE_RATE)
    if isinstance(wave, torch.Tensor):
        wave = wave.detach().cpu().numpy()
    if not isinstance(wave, np.ndarray):
        if isinstance(given, tuple):
            raise _refused("recording", given)
        return _file("recording", given, EXTENSIONS)
    if wave.ndim != 1 or wave.dtype.name not in _WAVE_FORMATS:
        raise _refused("recording", wave, "Mix channels to one, and scale other numbers to float32 in -1 ... 1.")
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer):
        raise ValueError(f"has the rate {rate!r}, which is no whole number of samples a second")
    if not 0 < rate < 1 << 31:
        raise ValueError(f"has {rate} samples a second, which is no rate of sound")
    form = _WAVE_FORMATS[wave.dtype.name]
    return {"wav": _written(lambda file: soundfile.write(file, wave, int(rate), format="WAV", subtype=form))}


def _text(given: object) -> Members:
    if isinstance(given, str):
        return {"txt": _encoded(given)}
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(text, str) for text in given):
        return {"txt": _encoded(given[0]), "txt2": _encoded(given[1])}
    if isinstance(given, np.ndarray):
        return {"npy": _npy(given)}
    if isinstance(given, bytes):
        raise _refused("text", given, "Decode them to str.")
    return _file("text", given, ("txt", "npy"))


def _array(given: object) -> Members:
    if isinstance(given, np.ndarray):
        return {"npy": _npy(given)}
    if isinstance(given, bytes):
        return {"npz" if given.startswith(b"PK") else "npy": given}
    return _file("array", given, ("npy", "npz"))


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair at character {error.start}") from None


def _npy(values: NDArray[Any]) -> bytes:
    if values.dtype.hasobject:
        raise ValueError(f"holds values of type {values.dtype}, which are no numbers: nothing is pickled")
    return _written(lambda file: np.save(file, values, allow_pickle=False))


def _written(write: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _file(content: Content, given: object, extensions: tuple[str, ...]) -> Members:
    """The bytes of a file, or given ones. What a file is called says little: decoders look into it."""
    if isinstance(given, bytes):
        return {extensions[0]: given}
    if not isinstance(given, str | PathLike):
        raise _refused(content, given)
    path = Path(given)  # type: ignore[arg-type]
    try:
        if not path.is_file():
            raise ValueError(f"is a folder, {str(path)!r}" if path.is_dir() else f"{str(path)!r} is no file")
        extension = path.suffix.lower().removeprefix(".")
        return {extension if extension in extensions else extensions[0]: path.read_bytes()}
    except OSError as error:
        raise ValueError(f"{str(path)[:80]!r} cannot be read: {error.strerror or error}") from None


def _refused(content: Content, given: object, remedy: str = "") -> ValueError:
    what = type(given).__name__
    if isinstance(given, np.ndarray):
        what = f"ndarray, {given.dtype} {given.shape}"
    return ValueError(f"is of type {what}; taken are {READS[content]}. {remedy}".rstrip())

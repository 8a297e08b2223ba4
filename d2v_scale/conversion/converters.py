"""Files and documents to shards that hold nothing which training would refuse: one job a shard."""

import hashlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import assert_never

import numpy as np

from d2v_scale.conversion.array_members import ArrayReading, array_members
from d2v_scale.conversion.folders import last_extension
from d2v_scale.conversion.measures import measure_of
from d2v_scale.data.config import SAMPLE_RATE, VisionData
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.text import decoder as text
from d2v_scale.modalities.text.tokenizer import Tokenizer, open_tokenizer
from d2v_scale.modalities.vision import decoder as vision
from d2v_scale.shards.content import Content, word_of
from d2v_scale.shards.shard_index import Measure
from d2v_scale.shards.shard_jobs import Part
from d2v_scale.shards.writing import Sample, is_written, write_shard

_RULES = 3
"""Raised where what is stored of the same inputs changes: shards that were written before are written again."""


@dataclass
class Item:
    """One sample to be made: a file, or a document's text."""

    name: str
    path: str | None = None
    content: str = ""
    label: int | None = None
    second: str | None = None
    """The other text of a pair."""
    score: float | None = None
    transcript: str | None = None
    place: str = ""
    """Where a document is from."""
    fault: str | None = None
    """Why there will be no sample."""


@dataclass
class Conversion:
    """How samples are made of items."""

    content: Content
    resize: int | None = None
    """Shorter side that larger images are shrunk to, pixels."""
    tokenizer: Path | None = None
    tokenizer_sha256: str | None = None
    ids: bool = False
    """Store token ids instead of text."""
    max_pixels: int = VisionData.max_pixels
    arrays: ArrayReading | None = None

    def measure(self) -> Measure:
        """What decides whether training can read a sample."""
        return measure_of(self.content, None if self.ids else self.tokenizer, self.max_pixels)


@dataclass
class NewShard:
    """One shard to be written, by any process: where it and what is known of it lie."""

    tar: Path

    @property
    def record(self) -> Path:
        """Where its `Part` is kept."""
        return self.tar.parent / ".make_shards" / f"{self.tar.stem}.json"

    def is_done(self) -> bool:
        """Whether it is there and complete."""
        return is_written(self.tar)

    def digest(self) -> str:
        """Of everything that it is made of."""
        raise NotImplementedError

    def run(self) -> Part:
        """Write it."""
        raise NotImplementedError


@dataclass
class Job(NewShard):
    """A shard of files or documents."""

    conversion: Conversion
    items: list[Item]

    def run(self) -> Part:
        skipped: dict[str, str] = {}
        measure = self.conversion.measure()
        entry = write_shard(self.tar, self._samples(measure, skipped), measure)
        return Part("", asdict(entry), skipped)

    def digest(self) -> str:
        # Put as earlier versions did, so that what they wrote is not written again.
        how = {("modality" if name == "content" else name): value for name, value in asdict(self.conversion).items()}
        if self.conversion.arrays is None:
            del how["arrays"]
        inputs = how | {"modality": word_of(self.conversion.content), "tokenizer": None, "rules": _RULES}
        state = hashlib.sha256(repr(inputs).encode())
        for item in self.items:
            state.update(repr((item, item.path and file_version(item.path))).encode("utf-8", "backslashreplace"))
        return state.hexdigest()

    def _samples(self, measure: Measure, skipped: dict[str, str]) -> Iterator[Sample]:
        ids = self.conversion.ids and self.conversion.tokenizer
        pieces = open_tokenizer(self.conversion.tokenizer) if ids and self.conversion.tokenizer else None
        for item in self.items:
            try:
                members = self._members(item, pieces)
                measure(members)
            except Exception as error:  # whatever a damaged file makes a decoder raise
                known = isinstance(error, ValueError)
                skipped[item.path or item.place or item.name] = (
                    str(error) if known else f"{type(error).__name__}: {error}"
                )
                continue
            sample: Sample = {"__key__": item.name, **members}
            if item.label is not None:
                sample["cls"] = item.label
            if item.score is not None:
                sample["score"] = str(item.score).encode()
            if item.transcript is not None:
                sample["txt"] = item.transcript
            yield sample

    def _members(self, item: Item, pieces: Tokenizer | None) -> dict[str, bytes]:
        if item.fault is not None:
            raise ValueError(item.fault)
        if item.path is None:
            return _document(item, pieces)
        file = Path(item.path).read_bytes()
        match self.conversion.content:
            case "recording":
                return recording_members(file)
            case "image":
                extension = item.path.rsplit(".", 1)[-1].lower()
                return image_members(file, extension, self.conversion.resize, self.conversion.max_pixels)
            case "array":
                return array_members(file, last_extension(Path(item.path)), self.conversion.arrays or ArrayReading())
            case "text":
                raise AssertionError("documents are items without a path")
        assert_never(self.conversion.content)


def file_version(path: str) -> tuple[int, int] | None:
    """Size and time of change: where they differ, it is not the file that was read before. None: it is not there."""
    try:
        stat = os.stat(path)
    except OSError:  # said when it is read
        return None
    return stat.st_size, stat.st_mtime_ns


def _document(item: Item, pieces: Tokenizer | None) -> dict[str, bytes]:
    parts = {"": item.content} | ({"2": item.second} if item.second is not None else {})
    for part in parts.values():
        text.require_text(part)
    if pieces is not None:
        return {f"npy{which}": _npy(pieces(part).astype(np.int32)) for which, part in parts.items()}
    return {f"txt{which}": part.encode() for which, part in parts.items()}


def _npy(ids: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, ids)
    return out.getvalue()


def image_members(content: bytes, extension: str, resize: int | None, max_pixels: int) -> dict[str, bytes]:
    """The file as it is, or shrunk, upright, to JPEG."""
    from PIL import Image

    image = vision.open_image(content, max_pixels)
    if resize is None or min(image.size) <= resize:
        return {extension: content}
    pixels = vision.upright(image, "RGB")
    scale = resize / min(pixels.size)
    width, height = (max(1, round(side * scale)) for side in pixels.size)
    out = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return {"jpg": out.getvalue()}


def recording_members(content: bytes) -> dict[str, bytes]:
    """16 kHz mono FLAC: the file as it is, where it is that."""
    import soundfile

    wave = speech.decode(content)
    info = soundfile.info(io.BytesIO(content))
    if (info.format, info.samplerate, info.channels, info.frames) == ("FLAC", SAMPLE_RATE, 1, len(wave)):
        return {"flac": content}
    # Some store floating point in the range of integers. What is louder than full scale is made softer, not cut off.
    peak = float(np.abs(wave).max())
    wave = wave / peak if peak > 1 else wave
    bits = next((bits for bits in (16, 24) if not _vanishes(wave, bits)), None)
    if bits is None:
        raise ValueError(f"is too quiet for a FLAC, or next to its peak of {peak:.3g}: most of it would be zero")
    out = io.BytesIO()
    soundfile.write(out, wave, SAMPLE_RATE, format="FLAC", subtype=f"PCM_{bits}")
    return {"flac": out.getvalue()}


def _vanishes(wave: speech.Wave, bits: int) -> bool:
    """Whether most of what is not zero is, when it is stored with so many bits a sample."""
    half_a_step = 2.0**-bits
    there, kept = np.count_nonzero(wave), np.count_nonzero(np.abs(wave) > half_a_step)
    return bool(kept < there / 2)


def finite_number(label: str) -> float:
    """A score. Raises ValueError for what is no number."""
    number = float(label)
    if not math.isfinite(number):
        raise ValueError(f"{label!r} is not finite")
    return number

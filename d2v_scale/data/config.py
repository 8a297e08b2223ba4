"""What is read, how it is cropped and augmented, and what happens when some of it is unreadable."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from d2v_scale.errors import ConfigError
from d2v_scale.model.stem_config import KINDS, parts_of

SAMPLE_RATE = 16_000
"""Samples of audio a second, of every waveform and every length."""


LETTERS = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"
"""English letters in the order of the published CTC models; with the five pieces before them, 32."""

_WINDOW_LIMIT = 256


@dataclass(kw_only=True)
class SourceConfig:
    """One set of shards. How several are mixed: `data.mixing`."""

    shards: str = ""
    """Path with {000000..000099}, glob, directory, index file (*.index.json), `pipe:` command or object-store URL."""
    modality: str = "vision"
    """Name of the stem that reads the shards: vision, speech, text, or one of model.arrays. They must hold what it
    reads. Several, as `[vision, text]` or `vision+text`: every sample is one sequence of its parts, members side by
    side, each read by its stem; a part that a sample does not have is counted, and the others go on without it."""
    hide_whole: float | None = None
    """Of several stems: probability with which each part of a sample is hidden from the student altogether, in each
    clone by itself, so that it is predicted from the others (never all of them). null: none ever is."""
    name: str = ""
    """Name in logs and checkpoints; empty: the modality, numbered where several sources share it."""
    weight: float = 1.0
    """`alternate`: relative share of the steps that read this source, before `temperature`. `together`: factor on its
    part of the loss."""
    repeat: float | None = None
    """How often this set comes while others' come once: its share of the steps also grows with its number of batches.
    All sources have it, or none; shards need an index. null: `weight` alone says."""
    batch_size: int | None = None
    """Size of this source's part of a step that reads it, in `batch_unit`; null: the recipe's `global_batch_size`."""
    batch_unit: Literal["samples", "seconds", "tokens"] | None = None
    """Unit of that size; null: the recipe's."""
    index: str | None = None
    """Index file (*.index.json) of shards that are not local; null: looked for beside the shards."""

    @property
    def stems(self) -> list[str]:
        """The stems that read it: one, or those of a sample's parts in their order."""
        return parts_of(self.modality)


@dataclass(kw_only=True)
class LeaveOut:
    """A range of a source's planned order that no step reads, as a rewind names it in spikes.jsonl.

    Both ends are positions: epoch, window, items of the window (batches, where they are bucketed by length).
    """

    source: str = ""
    """Name of the source."""
    begin: list[int] = field(default_factory=lambda: [0, 0, 0])
    """The first position that is left out."""
    end: list[int] = field(default_factory=lambda: [0, 0, 0])
    """The first one that is read again."""


@dataclass(kw_only=True)
class VisionData:
    """Images to inputs of one size. Defaults: the 1.0 and 2.0 ImageNet recipes without colour jitter."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a fraction of the image: smallest, largest (1.0: 0.08, 2.0: 0.2)."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of the random crop, as a multiple of the model's (of square inputs 1): smallest, largest."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Strength of the brightness, contrast and saturation jitter (1.0: 0.4 each). 0 is none."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of each channel, of pixels scaled to 0..1. The first values are used where the model has fewer channels."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of each channel, of pixels scaled to 0..1."""
    evaluation_crop: float = 0.875
    """Sides of the centre crop in evaluation as a fraction of the largest that fits the image (224 of 256)."""
    max_pixels: int = 100_000_000
    """Images with more pixels are refused undecoded: a decompression bomb would exhaust memory."""


@dataclass(kw_only=True)
class SpeechData:
    """Recordings to waveforms of 16 kHz, each normalised over the whole file before it is cropped."""

    min_seconds: float = 0.1
    """Shorter recordings are left out, seconds (published recipes: 2)."""
    max_seconds: float = 20.0
    """Longer recordings are cropped to this at a random place, seconds."""
    normalize: bool = True
    """Subtract the mean and divide by the standard deviation of the whole recording."""


@dataclass(kw_only=True)
class TextData:
    """Documents to blocks of token ids that start with <s>."""

    tokenizer: str | None = None
    """Sentencepiece model, tokenizer.json, vocab.json (merges.txt beside it), or a folder that holds one; null: the one
    named in the shards' index."""
    packing: Literal["continuous", "document"] = "continuous"
    """`continuous`: blocks run across documents (2.0); `document`: a block holds tokens of one document (1.0)."""


@dataclass(kw_only=True)
class DataConfig:
    """Sources, decoding, and the processes that do it."""

    sources: list[SourceConfig] = field(default_factory=list)
    """What is read. Their modalities are the stems that are trained."""
    mixing: Literal["alternate", "together"] = "alternate"
    """`alternate`: a step reads one source. `together`: every step has micro-batches of every source, as many of each,
    in turn; its loss is the sum over sources of `weight` times the mean over what is masked of the source."""
    temperature: float = 1.0
    """Above 1: source weights are flattened, each to the power 1/temperature (`alternate`)."""
    window_shards: int = 16
    """Shards that are shuffled together. More mixes better, and keeps more shards open and indexes in memory."""
    workers: int = 2
    """Decoding processes per rank; 0: decode in the training process."""
    prefetch: int = 4
    """Steps each worker prepares ahead."""
    timeout_s: float = 600.0
    """A step that takes longer to arrive ends the run, seconds (needs workers). A shard that is not local is given up
    after a third of it."""
    read_timeout_s: float = 120.0
    """Silence of a `pipe:` command or an object store after which a shard is fetched again, seconds."""
    read_retries: int = 2
    """Further attempts to fetch a shard before its samples count as lost."""
    cache_dir: str | None = None
    """Where shards that are not local are kept while they are read; null: a directory below the system's temporary
    one."""
    cache_gib: float = 64.0
    """Size of that cache, GiB; the shards used longest ago go first."""
    max_bad_ratio: float = 0.01
    """Share of unreadable samples above which the run ends."""
    leave_out: list[LeaveOut] = field(default_factory=list)
    """Ranges of the planned order that no step reads."""
    vision: VisionData = field(default_factory=VisionData)
    speech: SpeechData = field(default_factory=SpeechData)
    text: TextData = field(default_factory=TextData)

    FREE_TO_CHANGE: ClassVar[tuple[str, ...]] = tuple(
        f"data.{name}"
        for name in (
            "sources.*.shards",
            "sources.*.index",
            "workers",
            "prefetch",
            "timeout_s",
            "read_timeout_s",
            "read_retries",
            "cache_dir",
            "cache_gib",
            "max_bad_ratio",
        )
    )
    """Keys that a resumed run may change; `*` stands for a number. A set with other contents is refused by its
    fingerprint, wherever it lies."""

    def read_from(self, shards: str, modalities: list[str]) -> None:
        """Read `shards` instead of the recipe's sources: `PATTERN`, or for several stems
        `vision=PATTERN,speech=PATTERN`. Raises ConfigError."""
        is_known = bool(modalities)  # of a model that a checkpoint brings the stems are not
        modalities = modalities or [stem for source in self.sources for stem in source.stems]
        paired = [source.modality for source in self.sources if len(source.stems) > 1]
        # Of a kind that the model has no stem of, too: that is said as such.
        known = rf"(?:{'|'.join(map(re.escape, dict.fromkeys([*modalities, *KINDS])))})"
        known = rf"{known}(?:\+{known})*"
        names = known if is_known else r"[A-Za-z]\w*(?:\+[A-Za-z]\w*)*"
        parts = re.split(rf",(?=(?:{names})=)", shards)
        named = [re.fullmatch(rf"({names})=(.+)", part) for part in parts]
        if is_known:
            _refuse_unknown_stems([m[2] if m else part for m, part in zip(named, parts, strict=True)], modalities)
        if all(named):
            self.sources = [self._source_of(m[1], m[2]) for m in named if m]
            return
        if len(self.sources) == len(paired) == 1:
            self.sources = [self._source_of(paired[0], shards)]
            return
        if len(set(modalities)) != 1:
            raise ConfigError(
                "data",
                f"names no modality, but the model has {len(modalities)} stems",
                f"Write --data '{','.join(f'{name}=PATTERN' for name in dict.fromkeys(modalities) or KINDS[:2])}'.",
            )
        self.sources = [self._source_of(modalities[0], shards)]

    def _source_of(self, modality: str, shards: str) -> SourceConfig:
        """A source of these shards, mixed and batched as the recipe does it for this modality."""
        same = [source for source in self.sources if source.modality == modality]
        base = same[0] if same else SourceConfig(modality=modality)
        return replace(base, shards=shards, index=None, name="")

    def check_names(self, stems: Iterable[str]) -> None:
        """Raises ConfigError where a source is for a stem that is none of these names."""
        there = list(stems)
        for k, source in enumerate(self.sources):
            key = f"data.sources.{k}.modality"
            for name in source.stems:
                if name not in there:
                    shown = f"is {source.modality!r}, but the model has no stem {name!r}"
                    if len(source.stems) == 1:
                        shown = f"is {source.modality!r}, which the model has no stem for"
                    remedy = f"It has {', '.join(there)}: name shards with --data {there[0]}=PATTERN."
                    raise ConfigError(key, shown, remedy)
            if len(set(source.stems)) < len(source.stems):
                raise ConfigError(key, f"is {source.modality!r}, which names a stem twice", "Name each once.")
            self._check_hiding(k)

    def _check_hiding(self, number: int) -> None:
        source, key = self.sources[number], f"data.sources.{number}.hide_whole"
        if source.hide_whole is None:
            return
        if not 0 <= source.hide_whole <= 1:
            raise ConfigError(key, f"is {source.hide_whole}", "Give a probability, 0 to 1.")
        if len(source.stems) == 1:
            shown = f"is set, but {source.modality} alone has no other part that it could be predicted from"
            raise ConfigError(key, shown, "Leave it out, or name several stems in modality.")

    def check(self, modalities: Iterable[str]) -> None:
        """Raises ConfigError for what contradicts itself or the model's stems. Touches no file."""
        if not self.sources:
            raise ConfigError("data.sources", "is empty", "Name shards with --data or data.sources.")
        self.check_names(modalities)
        for k, source in enumerate(self.sources):
            if not source.shards:
                raise ConfigError(f"data.sources.{k}.shards", "is empty", "Name shards with --data.")
            if not source.weight > 0:
                raise ConfigError(f"data.sources.{k}.weight", f"is {source.weight}", "Give a number above 0.")
        repeated = [source.repeat is not None for source in self.sources]
        if any(repeated) and not all(repeated):
            key = f"data.sources.{repeated.index(False)}.repeat"
            raise ConfigError(key, "is not set, but another source's is", "Give all sources one, or none.")
        self.check_mixing()
        for k, left in enumerate(self.leave_out):
            if not len(left.begin) == len(left.end) == 3 or left.begin >= left.end:
                shown = f"is from {left.begin} to {left.end}"
                remedy = "Give two positions, as [EPOCH, WINDOW, ITEMS], the later one as end."
                raise ConfigError(f"data.leave_out.{k}", shown, remedy)
        names = self.source_names()
        if len(set(names)) < len(names):
            raise ConfigError("data.sources", f"have the same name twice: {', '.join(names)}")
        if not self.temperature > 0:
            raise ConfigError("data.temperature", f"is {self.temperature}", "Give a number above 0.")
        if not 1 <= self.window_shards <= _WINDOW_LIMIT:
            raise ConfigError(
                "data.window_shards",
                f"is {self.window_shards}",
                f"Give 1 to {_WINDOW_LIMIT}: every worker keeps the shards of a window open.",
            )
        if not 0 < self.vision.crop_scale[0] <= self.vision.crop_scale[1] <= 1:
            raise ConfigError("data.vision.crop_scale", f"is {self.vision.crop_scale}", "Give 0 < smallest <= largest.")
        if not 0 < self.speech.min_seconds <= self.speech.max_seconds:
            raise ConfigError("data.speech.min_seconds", "must be above 0 and at most data.speech.max_seconds")

    def check_mixing(self) -> None:
        """Raises ConfigError for what says how often a source is read, where every step reads all."""
        if self.mixing == "alternate":
            return
        remedy = "Leave it out: data.sources.*.weight is the factor on a source's loss."
        for k, source in enumerate(self.sources):
            if source.repeat is not None:
                shown = f"is {source.repeat:g}, but with data.mixing together every step reads every source"
                raise ConfigError(f"data.sources.{k}.repeat", shown, remedy)
        if self.temperature != 1:
            shown = f"is {self.temperature:g}, but with data.mixing together every step reads every source"
            raise ConfigError("data.temperature", shown, remedy)

    def observed(self) -> dict[str, str]:
        """What is measured by itself, with its stem: every source, of paired samples every part as SOURCE/STEM."""
        found: dict[str, str] = {}
        for name, source in zip(self.source_names(), self.sources, strict=True):
            if len(source.stems) == 1:
                found[name] = source.modality
            else:
                found |= {f"{name}/{stem}": stem for stem in source.stems}
        return found

    def sources_of_step(self) -> int:
        """How many sources a step reads."""
        return max(1, len(self.sources)) if self.mixing == "together" else 1

    def loss_weights(self) -> dict[str, float]:
        """Factors on the sources' parts of a step's loss, by their names; {}: a step has one part."""
        if self.mixing == "alternate":
            return {}
        return {name: source.weight for name, source in zip(self.source_names(), self.sources, strict=True)}

    @property
    def shards_kept(self) -> int:
        """Shards of a source that a process keeps open: a window, and the beginning of the next."""
        return self.window_shards + 48

    def source_names(self) -> list[str]:
        """One name per source."""
        names: list[str] = []
        given = {source.name for source in self.sources} | {source.modality for source in self.sources}
        for source in self.sources:
            same = sum(other.modality == source.modality and not other.name for other in self.sources)
            number = sum(name.startswith(source.modality) for name in names)
            while same > 1 and f"{source.modality}{number}" in given.union(names):
                number += 1  # another stem is called so
            names.append(source.name or (f"{source.modality}{number}" if same > 1 else source.modality))
        return names


def _refuse_unknown_stems(patterns: Iterable[str], stems: Iterable[str]) -> None:
    """Raises ConfigError where a pattern goes on or begins with `NAME=` of no stem, and is no path that is there."""
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:") or os.path.lexists(pattern):
            continue
        without_choices = re.sub(r"\{[^{}]*\}", "", pattern)
        first = pattern.partition("/")[0]
        begins = None if os.path.lexists(first) or "*" in first else re.match(r"([A-Za-z]\w*)=", pattern)
        found = re.search(r",([A-Za-z]\w*)=", without_choices) or begins
        if found:
            there = ", ".join(stems)
            raise ConfigError(
                "data", f"names shards for {found[1]!r}, which is no stem of the model", f"It has {there}."
            )

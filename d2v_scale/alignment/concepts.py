"""Samples with several members side by side (a picture, a recording, a text), grouped by what they are of: concepts.

A sample says its concept in `.json` (`{"concept": ..., "category": ...}`) or by its label (`.cls`). Where no sample
does, those that share a picture, a recording, an array or a caption are of one concept: a picture with five captions is
five samples and one concept. Shards are read whole, in order, and need no index.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

from d2v_scale.data.config import SourceConfig
from d2v_scale.errors import DataError
from d2v_scale.modalities.array import members as array
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.text import decoder as text
from d2v_scale.modalities.vision import decoder as vision
from d2v_scale.shards.content import Content, plural
from d2v_scale.shards.one_content import hidden_beside
from d2v_scale.shards.patterns import is_remote
from d2v_scale.shards.reading import RawSample, SampleFault, read_sample
from d2v_scale.shards.shard_index import Members, index_tar
from d2v_scale.shards.shard_set import find_shards

NAMED = 3
"""Of what was left out so many are named."""
SHARED = "shared"
"""What makes samples one concept: any equal member."""
FIELDS = ("label", "key", "text")
"""What names a concept or a category beside fields of `.json`: the class in `.cls`, the sample's key, its caption."""


def extensions_of(content: Content, held: Iterable[str]) -> tuple[str, ...]:
    """The members that a stem which reads `content` is given of a sample that holds `held`: beside a caption, `.npy` is
    an array and no text."""
    match content:
        case "image":
            return vision.EXTENSIONS
        case "recording":
            return speech.EXTENSIONS
        case "text":
            hidden = hidden_beside("text", ["array"] if "txt" in held else [])
            return tuple(one for one in (*text.EXTENSIONS, *text.SECOND_EXTENSIONS) if one not in hidden)
        case "array":
            return array.EXTENSIONS
    assert_never(content)


class Part(RawSample):
    """The members of a sample that one stem reads."""

    def __init__(self, whole: RawSample, content: Content) -> None:
        self.shard, self.key = whole.shard, whole.key
        self._whole = whole
        self._taken = extensions_of(content, [one for one in ("txt",) if whole.has(one)])

    def member(self, extensions: tuple[str, ...]) -> tuple[str, memoryview]:
        """The first of `extensions` that belongs to this part, and its extension. Raises SampleFault."""
        return self._whole.member(tuple(one for one in extensions if one in self._taken))

    def members(self) -> dict[str, bytes]:
        """All members of this part, by extension."""
        return {name: content for name, content in self._whole.members().items() if name in self._taken}

    def has(self, extension: str) -> bool:
        """True where this part has such a member."""
        return extension in self._taken and self._whole.has(extension)

    @property
    def there(self) -> bool:
        """Whether the sample has this part."""
        return any(self.has(extension) for extension in self._taken)

    def digest(self) -> str:
        """The same for equal bytes."""
        parts = sorted(self.members().items())
        return hashlib.sha256(b"".join(name.encode() + b"\0" + content for name, content in parts)).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a sample lies, and what it is of."""

    shard: int
    number: int
    key: str
    concept: str
    category: str | None
    caption: str | None
    """Its text, folded: letters of one case, single spaces."""
    digests: dict[Content, str] = field(default_factory=dict, compare=False)
    """Of each part that it has."""
    sizes: dict[Content, int] = field(default_factory=dict, compare=False)
    """Likewise, bytes."""


@dataclass
class ConceptSet:
    """The samples of one side."""

    name: str
    """The pattern of its shards."""
    shards: "Shards"
    places: list[Place]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Samples that are not in `places`: reason to keys."""
    tokenizer: Path | None = None
    """That its index names."""
    named_by: str = "key"
    """What says of which concept a sample is: `SHARED`, one of `FIELDS`, or a field of `.json`."""

    @property
    def concepts(self) -> list[str]:
        """In the order of their first samples."""
        return list(dict.fromkeys(place.concept for place in self.places))

    def only(self, wanted: Callable[[Place], bool]) -> "ConceptSet":
        """The same set with these samples alone."""
        kept = [place for place in self.places if wanted(place)]
        return replace(self, places=kept)


class Shards:
    """Samples of local tars by place, without an index of their own."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.members: list[Members] = []
        self.damage: list[str] = []
        for path in paths:
            if is_remote(path):
                raise DataError(f"{path} is not local.", "Copy the shards first.")
            found = index_tar(Path(path))
            self.members.append(found.members)
            self.damage += [f"{path}: {line}" for line in found.damage]

    def read(self, shard: int, number: int) -> RawSample:
        """One sample. Raises SampleFault."""
        try:
            with open(self.paths[shard], "rb") as stream:

                def read_at(start: int, size: int) -> bytes:
                    return os.pread(stream.fileno(), size, start)

                return read_sample(self.paths[shard], read_at, self.members[shard], number)
        except OSError as error:
            key = self.members[shard].key(number)
            raise SampleFault(self.paths[shard], key, f"cannot be read: {error.strerror or error}") from error


def read_set(pattern: str, contents: Iterable[Content], concept: str | None, category: str | None) -> ConceptSet:
    """Look at every sample of the shards that `pattern` names.

    `concept`, `category`: one of `FIELDS`, or a field of `.json`, of concepts also `SHARED`; None: `concept` of `.json`
    where any sample has it, else the label where any has one, else `SHARED`; `category` of `.json`, else the label
    where that is not the concept. Samples without what names the others' concepts, or that cannot be read, are left out
    and kept in `left_out`. Raises DataError where no sample is left, and where none has the category that is named.
    """
    found = find_shards(SourceConfig(shards=pattern))
    shards = Shards(found.paths)
    classes = found.index.classes if found.index is not None else []
    seen: list[_Seen] = []
    left_out: dict[str, list[str]] = {}
    for shard, members in enumerate(shards.members):
        for number in range(len(members)):
            try:
                seen.append(_look(shards.read(shard, number), shard, number, tuple(contents), classes))
            except SampleFault as error:
                left_out.setdefault("cannot be read", []).append(f"{error.fault.key} ({error.fault.reason})")
    if concept is None:
        have = [name for name in ("concept", "label") if any(one.value(name) is not None for one in seen)]
        concept = have[0] if have else SHARED
    if category is not None and seen and not any(one.value(category) for one in seen):
        raise DataError(f"No sample of {pattern!r} has a {category}.", "Say what names its category with --category.")
    if category is None:
        category = "category" if concept == "label" or any(one.value("category") for one in seen) else "label"
    groups = shared(seen) if concept == SHARED else []
    places = []
    for number, one in enumerate(seen):
        name = groups[number] if groups else one.value(concept)
        if name is None:
            left_out.setdefault(f"has no {concept}", []).append(one.key)
            continue
        kind = one.value(category)
        places.append(Place(one.shard, one.number, one.key, name, kind, one.caption, one.digests, one.sizes))
    if not places:
        first = next(iter(left_out.items()), None)
        why = f", the first: {first[1][0]} {first[0]}" if first else ""
        raise DataError(f"No sample of {pattern!r} is of a concept{why}.", "Say what names it with --concept.")
    tokenizer = found.tokenizer if found.tokenizer is not None and found.tokenizer.is_file() else None
    return ConceptSet(pattern, shards, places, left_out, tokenizer, concept)


def shared(seen: Sequence["_Seen | Place"]) -> list[str]:
    """Of every sample the key of the first one with which it shares a member, itself or through others."""
    first_with: dict[object, int] = {}
    first_of = list(range(len(seen)))

    def first(number: int) -> int:
        while first_of[number] != number:
            first_of[number] = number = first_of[first_of[number]]
        return number

    for number, one in enumerate(seen):
        for member in (*one.digests.items(), ("caption", one.caption)):
            if member[1] is not None:
                low, high = sorted((first(first_with.setdefault(member, number)), first(number)))
                first_of[high] = low
    # One key may be in several shards.
    taken = Counter(one.key for one in seen)
    names = [one.key if taken[one.key] == 1 else f"{one.key} ({one.shard}:{one.number})" for one in seen]
    return [names[first(number)] for number in range(len(seen))]


@dataclass
class _Seen:
    shard: int
    number: int
    key: str
    names: dict[str, str]
    label: str | None
    caption: str | None
    digests: dict[Content, str]
    sizes: dict[Content, int]

    def value(self, name: str) -> str | None:
        match name:
            case "label":
                return self.label
            case "key":
                return self.key
            case "text":
                return self.caption
        return self.names.get(name)


def _look(sample: RawSample, shard: int, number: int, contents: tuple[Content, ...], classes: list[str]) -> _Seen:
    names: dict[str, str] = {}
    if sample.has("json"):
        try:
            values = json.loads(bytes(sample.member(("json",))[1]))
        except ValueError as error:
            raise sample.fault(f"its .json cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise sample.fault("its .json is no table")
        names = {str(name): str(one) for name, one in values.items() if isinstance(one, str | int) and str(one).strip()}
    label = _text(sample, "cls")
    if label is not None and label.isdecimal() and int(label) < len(classes):
        label = classes[int(label)]
    caption = _text(sample, "txt")
    digests: dict[Content, str] = {}
    sizes: dict[Content, int] = {}
    for content in contents:
        part = Part(sample, content)
        if part.there:
            digests[content], sizes[content] = part.digest(), sum(map(len, part.members().values()))
    folded = caption and " ".join(caption.casefold().split())
    return _Seen(shard, number, sample.key, names, label, folded, digests, sizes)


def _text(sample: RawSample, extension: str) -> str | None:
    if not sample.has(extension):
        return None
    return bytes(sample.members()[extension]).decode("utf-8", "replace").strip() or None


@dataclass
class Split:
    """Training and held-out concepts that have nothing in common."""

    train: ConceptSet
    test: ConceptSet
    on_both_sides: dict[str, list[str]] = field(default_factory=dict)
    """Held-out concepts that were left out, since they are on both sides: what is, to the concepts."""
    same_shards: bool = False
    """Whether one set was split here: an encoder may have been trained on all of it."""


def split_concepts(whole: ConceptSet, share: float) -> Split:
    """Hold out so many concepts of one set, the same ones at every call whatever their order."""
    ordered = sorted(whole.concepts, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())
    held_out = set(ordered[: round(share * len(ordered))])
    train = whole.only(lambda place: place.concept not in held_out)
    return separated(train, whole.only(lambda place: place.concept in held_out), same_shards=True)


def separated(train: ConceptSet, test: ConceptSet, same_shards: bool = False) -> Split:
    """Leave out held-out concepts that are on the training side as well, under their name, with a caption, or with the
    very picture, recording or array. Names that are keys of two sets mean nothing to one another."""
    keys = not same_shards and {train.named_by, test.named_by} & {SHARED, "key"}
    names = set() if keys else set(train.concepts)
    captions = {place.caption for place in train.places if place.caption}
    digests = {digest for place in train.places for digest in place.digests.values()}
    found: dict[str, dict[str, None]] = {}
    for place in test.places:
        if place.concept in names:
            found.setdefault("the concept", {})[place.concept] = None
        elif place.caption in captions:
            found.setdefault("a caption", {})[place.concept] = None
        else:
            for content, digest in place.digests.items():
                if digest in digests:
                    found.setdefault(f"one of its {plural(content)}", {})[place.concept] = None
    seen = {concept for concepts in found.values() for concept in concepts}
    kept = test.only(lambda place: place.concept not in seen)
    return Split(train, kept, {what: list(concepts) for what, concepts in found.items()}, same_shards)


def open_split(
    data: str, test: str | None, share: float, contents: Iterable[Content], concept: str | None, category: str | None
) -> Split:
    """The sets that the command names: `data` and `test`, or a folder with `train` and `test` in it (folders, or shards
    and indexes of these names), or one set, of which a share of the concepts is held out. Raises DataError."""
    contents = tuple(contents)
    if test is None:
        sides = [_side(Path(data), side) for side in ("train", "test")]
        if all(sides):
            data, test = (str(side) for side in sides)
        elif any(sides):
            there = next(side for side in sides if side)
            remedy = f"Name both sides with --data and --test; or give --data {there}, to have it split."
            raise DataError(f"{data} holds {there} alone.", remedy)
    if test is None:
        return split_concepts(read_set(data, contents, concept, category), share)
    return separated(read_set(data, contents, concept, category), read_set(test, contents, concept, category))


def _side(folder: Path, side: str) -> Path | None:
    """One side of a set, where `folder` holds two."""
    candidates = [folder / side, folder / f"{side}.index.json"]
    found = next((path for path in candidates if path.exists()), None)
    if found is None and folder.is_dir() and any(folder.glob(f"{side}-*.tar")):
        return folder / f"{side}-*.tar"
    return found


def counted(reasons: dict[str, list[str]]) -> list[str]:
    """For people: reason, how many, and the first."""
    return [f"{reason}: {len(names)}, the first: {', '.join(names[:NAMED])}" for reason, names in reasons.items()]

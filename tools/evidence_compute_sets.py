"""The sets that `evidence.py --compute` learns from, cut into training and test parts, and parts of their labels."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evidence_sets import RECORDING, RealSet, fingerprint, folder_of, make_shards, prepare, recordings_of

from d2v_scale.conversion.measures import measure_of
from d2v_scale.data.config import SourceConfig
from d2v_scale.data2vec import stateless
from d2v_scale.model.stem_config import Kind
from d2v_scale.shards.shard_set import INDEX_SUFFIX, find_shards

FOLDS = 5
_PER_SHARD = 5000


@dataclass(frozen=True)
class CutSet:
    """A set, cut once or several times; a score is the mean over the cuts."""

    name: str
    kind: Kind
    title: str
    cuts: tuple[RealSet, ...]


def cifar(data: Path, out: Path) -> CutSet:
    """The training images of cifar10 and cifar10_large, and the test images of cifar10_large, which are none of these;
    without cifar10_large those of cifar10."""
    small, large = (folder_of(name, data, out) for name in ("cifar10", "cifar10_large"))
    if small is None or large is None:
        return CutSet("cifar", "vision", "CIFAR-10", (prepare(data, out, ["vision"])["vision"],))
    name = f"cifar10-{fingerprint(small)}-{fingerprint(large)}"
    joined = out / "joined" / name
    _link({"train": [small / "train", large / "train"], "test": [large / "test"]}, joined)
    shards = out / "shards" / f"compute-{name}"
    for split in ("train", "test"):
        _once("images", joined / split, shards, split)
    return CutSet("cifar", "vision", "CIFAR-10", (RealSet.in_folder("vision", "cifar10", shards),))


def digits(data: Path, out: Path) -> CutSet:
    """Spoken digits, five-fold: takes whose number leaves the fold's when divided by five are its test."""
    source = recordings_of(data, out)
    name = f"compute-digits-{fingerprint(source)}"
    cuts = []
    for fold in range(FOLDS):
        takes = rf"_\d*[{fold}{fold + FOLDS}]\.\w+$"
        cuts.append(_recordings(source, out / "shards" / f"{name}-{fold}", takes))
    return CutSet("digits", "speech", "spoken digits, five folds of takes", tuple(cuts))


def digits_speakers(data: Path, out: Path) -> CutSet:
    """The same, each speaker left out in turn."""
    source = recordings_of(data, out)
    speakers = sorted({path.stem.split("_")[1] for path in source.iterdir() if path.stem.count("_") == 2})
    name = f"compute-speaker-{fingerprint(source)}"
    cuts = [_recordings(source, out / "shards" / f"{name}-{one}", rf"_{re.escape(one)}_\d+\.\w+$") for one in speakers]
    return CutSet("digits_speakers", "speech", "spoken digits, speakers left out", tuple(cuts))


def news(data: Path, out: Path) -> CutSet:
    """News; every fifth row is test."""
    return CutSet("news", "text", "news topics", (prepare(data, out, ["text"])["text"],))


SETS: dict[str, Callable[[Path, Path], CutSet]] = {
    "cifar": cifar,
    "digits": digits,
    "digits_speakers": digits_speakers,
    "news": news,
}


def with_labels(real: RealSet, share: float, seed: int, folder: Path) -> str:
    """Index file of a set in `folder` of that share of each class's training samples, one at least, drawn by
    `seed`."""
    from d2v_scale.alignment.concepts import Shards  # which import torch
    from d2v_scale.shards.writing import Sample, write_set

    index = folder / f"train{INDEX_SUFFIX}"
    if index.is_file():
        return str(index)
    folder.mkdir(parents=True, exist_ok=True)
    found = find_shards(SourceConfig(shards=real.train))
    assert found.index is not None
    shards = Shards(found.paths)
    samples = [shards.read(shard, n) for shard, members in enumerate(shards.members) for n in range(len(members))]
    labels = [int(sample.members()["cls"]) for sample in samples]
    chosen: list[Sample] = []
    for number in chosen_rows(labels, share, seed):
        sample = samples[number]
        chosen.append({"__key__": sample.key, **sample.members()})
    tokenizer = None if found.tokenizer is None else Path(shutil.copy(found.tokenizer, folder))
    write_set(
        folder, "train", found.index.content, chosen, per_shard=_PER_SHARD, classes=found.index.classes,
        measure=measure_of(found.index.content, tokenizer), tokenizer=tokenizer,
    )  # fmt: skip
    return str(index)


def chosen_rows(labels: Sequence[int], share: float, seed: int) -> list[int]:
    """Which of the labelled rows: that share of every class, rounded, one at least, ascending."""
    random = stateless.numpy_generator(seed, "labels")
    label_n = np.asarray(labels)
    rows: list[int] = []
    for label in np.unique(label_n):
        of_class = random.permutation(np.flatnonzero(label_n == label))
        rows += of_class[: max(1, round(share * len(of_class)))].tolist()
    return sorted(rows)


def _recordings(source: Path, shards: Path, test: str) -> RealSet:
    for split, match in {"train": rf"^(?!.*{test})", "test": test}.items():
        _once("audio", source, shards, split, "--match", match, "--label", RECORDING)
    return RealSet.in_folder("speech", "fsdd", shards)


def _link(parts: dict[str, list[Path]], target: Path) -> None:
    """Folders of the same classes as one, its files links."""
    for split, folders in parts.items():
        for number, folder in enumerate(folders):
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                link = target / split / path.parent.name / f"{number}-{path.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(path.resolve())


def _once(command: str, source: Path, shards: Path, split: str, *options: str) -> None:
    if not (shards / f"{split}{INDEX_SUFFIX}").is_file():
        make_shards(command, str(source), *options, out=shards, split=split)

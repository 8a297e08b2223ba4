"""The sets of tools/evidence_joint.py: samples of a picture, a recording and a text, and shuffled ones."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evidence_sets import digit_recordings

from d2v_scale.alignment.concepts import Shards
from d2v_scale.conversion import demo
from d2v_scale.conversion.converters import recording_members
from d2v_scale.conversion.demo import concepts as known
from d2v_scale.conversion.demo.joint import VOCAB_SIZE, write_mixed
from d2v_scale.data.config import SourceConfig
from d2v_scale.errors import UserError
from d2v_scale.modalities.text.tokenizer_training import train
from d2v_scale.shards.shard_set import INDEX_SUFFIX, find_shards
from d2v_scale.shards.writing import Sample

_MEMBERS = ("png", "flac", "txt")
_HELD_OUT_PICTURES = 5
"""Every so manieth picture of a digit."""


@dataclass(frozen=True)
class JointSet:
    """Index files, and how its samples are named."""

    name: str
    train: str
    test: str
    shuffled: str
    """As `train`, every picture with the recording and the text of other samples."""
    concept: str
    """What names a concept, of which samples are averaged (`alignment.concepts`)."""
    label: str
    """What the probes tell apart."""
    interchangeable: bool
    """Whether any samples of a label might have been partners, so that which ones are says nothing."""

    @property
    def both(self) -> tuple[str, str]:
        """Training and held-out index."""
        return self.train, self.test


def concepts(data: Path, out: Path) -> JointSet:
    """The joint demo. Raises UserError without the extra that it needs."""
    del data
    if not known.have_openmoji():
        raise UserError("The concepts need the extra `joint`.", "pip install 'd2v_scale[joint]', or --sets digits.")
    folder = demo.write("joint", out / demo.ROOT)
    return _with_shuffled("concepts", folder, out, "concept", "category", interchangeable=False)


def digits(data: Path, out: Path) -> JointSet:
    """Handwritten digits of scikit-learn, each with one spoken by a human voice, and its name."""
    folder = out / "shards" / "digits"
    if not (folder / f"test{INDEX_SUFFIX}").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        drawn = known.of_digits()
        names = [concept.name for concept in drawn]
        tokenizer = folder / "tokenizer.model"
        train(names, tokenizer, vocab_size=VOCAB_SIZE, fewer=True)
        for prefix, recordings in digit_recordings(data, out).items():
            samples: list[Sample] = []
            for number, (label, path) in enumerate(recordings):
                of_digit = drawn[int(label)]
                held_out = [k % _HELD_OUT_PICTURES == 0 for k in range(len(of_digit.pictures))]
                pictures = [
                    png
                    for (_, png), out_of in zip(of_digit.pictures, held_out, strict=True)
                    if out_of is (prefix == "test")
                ]
                one: Sample = {"__key__": f"{path.stem}", "png": pictures[number % len(pictures)]}
                one |= recording_members(path.read_bytes())
                samples.append(one | {"txt": of_digit.name, "cls": int(label)})
            write_mixed(folder, prefix, samples, names, tokenizer)
    return _with_shuffled("digits", folder, out, "key", "label", interchangeable=True)


SETS: dict[str, Callable[[Path, Path], JointSet]] = {"concepts": concepts, "digits": digits}


def _with_shuffled(name: str, folder: Path, out: Path, concept: str, label: str, *, interchangeable: bool) -> JointSet:
    train_index, test_index = (str(folder / f"{split}{INDEX_SUFFIX}") for split in ("train", "test"))
    shuffled = out / "shards" / f"{name}-shuffled"
    if not (shuffled / f"train{INDEX_SUFFIX}").is_file():
        shuffled.mkdir(parents=True, exist_ok=True)
        write_shuffled(shuffled, train_index)
    dealt = str(shuffled / f"train{INDEX_SUFFIX}")
    return JointSet(name, train_index, test_index, dealt, concept, label, interchangeable)


def write_shuffled(folder: Path, index: str) -> None:
    """Write the samples of a small set with their parts dealt out anew, each kind of part by itself; label and facts
    are left out."""
    found = find_shards(SourceConfig(shards=index))
    assert found.index is not None
    assert found.tokenizer is not None
    shards = Shards(found.paths)
    samples: list[Sample] = []
    for shard, members in enumerate(shards.members):
        for number in range(len(members)):
            one = shards.read(shard, number)
            samples.append({"__key__": one.key, **one.members()})
    rng = np.random.default_rng(0)
    orders = {member: rng.permutation(len(samples)) for member in _MEMBERS}
    dealt: list[Sample] = [
        {"__key__": f"{number:06d}", **{member: samples[order[number]][member] for member, order in orders.items()}}
        for number in range(len(samples))
    ]
    tokenizer = Path(shutil.copy(found.tokenizer, folder))
    write_mixed(folder, "train", dealt, [], tokenizer)

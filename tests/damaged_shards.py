"""A set of shards damaged in more than twelve ways, one shard each, and how many samples each way costs.

By hand, from any set of images or recordings (the damaged one is a copy):

    python tests/damaged_shards.py shards/train.index.json damaged
    deepspeed d2v_scale/train.py --recipe demo_vision --data damaged/damaged.index.json --data.max_bad_ratio 0.5
"""

import io
import itertools
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.shards.content import WORDS
from d2v_scale.shards.shard_index import SetIndex, ShardEntry, index_shard
from d2v_scale.shards.writing import Sample, members_file, write_shard


class DamagedSet:
    """`build` writes it; `expected_lost` says by shard how many of its samples cannot be delivered in an epoch."""

    def __init__(self, directory: Path, modality: str, samples: Iterable[Sample], per_shard: int = 10) -> None:
        """Takes up to 17 times `per_shard` samples, which have a member `media` and a small label `cls`."""
        self.directory = directory
        self.modality: str = modality
        self.per_shard = per_shard
        self.entries: list[ShardEntry] = []
        self.expected_lost: dict[str, int] = {}
        self.disappearing: list[Path] = []
        """Files to delete once the run has begun."""
        self._samples = iter(samples)
        self._measure = speech.measure if modality == "speech" else None

    def build(self) -> Path:
        """Write the shards and their index; returns the index file."""
        self.shard("sound")
        self._damage_files()
        self._damage_samples()
        self._damage_pipes()
        tar = self.shard("disappears")
        self.disappearing.append(tar)
        self.expected_lost[str(tar)] = self.per_shard
        if self.modality == "vision":  # speech is planned from it, and cannot go on without
            tar = self.shard("index-unreadable")
            self.disappearing.append(members_file(tar))
            self.expected_lost[str(tar)] = self.per_shard
        index = self.directory / "damaged.index.json"
        SetIndex(content=WORDS[self.modality], shards=self.entries).save(index)
        return index

    def shard(self, name: str, samples: list[Sample] | None = None) -> Path:
        tar = self.directory / f"{name}.tar"
        self.entries.append(write_shard(tar, samples or self._take(), self._measure))
        return tar

    def _take(self) -> list[Sample]:
        taken = list(itertools.islice(self._samples, self.per_shard))
        assert len(taken) == self.per_shard, "too few samples"
        return taken

    def _damage_files(self) -> None:
        """What happens to files between the day they were indexed and the run."""
        tar = self.shard("truncated")
        os.truncate(tar, _member(tar, 15).offset + 100)
        self.expected_lost[str(tar)] = self.per_shard - 7

        tar = self.shard("header-bit")
        _flip_bit(tar, _member(tar, 6).offset + 3)
        self.expected_lost[str(tar)] = 1

        tar = self.shard("content-bit")
        _flip_bit(tar, _member(tar, 6).offset_data)
        self.expected_lost[str(tar)] = 1

        tar = self.shard("lost-sector")
        _overwrite(tar, _member(tar, 8).offset, bytes(1024))
        self.expected_lost[str(tar)] = 1

    def _damage_samples(self) -> None:
        """What was wrong with the samples before they were indexed."""
        samples = self._take()
        del samples[4][_media(samples[4])]
        self.expected_lost[str(self.shard("missing-member", samples))] = 1

        samples = self._take()
        samples[2][_media(samples[2])] = b""
        self.expected_lost[str(self.shard("zero-bytes", samples))] = 1

        samples = self._take()
        samples[2][_media(samples[2])] = samples[3][_media(samples[3])][:60]
        samples[5][_media(samples[5])] = b"this is nothing that can be decoded"
        self.expected_lost[str(self.shard("undecodable", samples))] = 2

        if self.modality == "vision":
            samples = self._take()
            samples[7][_media(samples[7])] = _bomb()
            self.expected_lost[str(self.shard("bomb", samples))] = 1

        tar = self.shard("cut-before-indexing")
        os.truncate(tar, _member(tar, 9).offset_data + 1)
        self.entries[-1] = index_shard(tar, members_file(tar), self.directory, self._measure)
        # Of five samples, the last lacks the end of a member.
        self.expected_lost[str(tar)] = 1

    def _damage_pipes(self) -> None:
        self._pipe("hanging-pipe", "sleep 1000; cat {tar}", self.per_shard)
        self._pipe("failing-pipe", "cat {tar}; exit 3", self.per_shard)
        self._pipe("short-pipe", "head -c 3000 {tar}", self.per_shard)
        self._pipe("slow-pipe", "sleep 0.2; cat {tar}", 0)

    def _pipe(self, name: str, command: str, lost: int) -> None:
        tar = self.shard(name)
        self.entries[-1].path = f"pipe:{command.format(tar=tar)}"
        self.expected_lost[self.entries[-1].path] = lost


def _media(sample: Sample) -> str:
    return next(name for name in sample if name not in ("__key__", "cls"))


def _member(tar: Path, number: int) -> tarfile.TarInfo:
    with tarfile.open(tar) as opened:
        return opened.getmembers()[number]


def _overwrite(tar: Path, offset: int, content: bytes) -> None:
    with tar.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def _flip_bit(tar: Path, offset: int) -> None:
    _overwrite(tar, offset, bytes([tar.read_bytes()[offset] ^ 4]))


def _bomb() -> bytes:
    content = io.BytesIO()
    Image.new("1", (20000, 20000)).save(content, "PNG")
    return content.getvalue()


def read_samples(index_file: Path) -> Iterator[Sample]:
    """The samples of a sound set, with a label where they have none."""
    for entry in SetIndex.load(index_file).shards:
        sample: Sample = {}
        with tarfile.open(index_file.parent / entry.path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if sample and sample["__key__"] != key:
                    yield {"cls": 0, **sample}
                    sample = {}
                stream = tar.extractfile(member)
                assert stream is not None
                sample |= {"__key__": key, extension: stream.read()}
        yield {"cls": 0, **sample}


if __name__ == "__main__":
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    made = DamagedSet(out.resolve(), SetIndex.load(source).modality, read_samples(source))
    made.build()
    print("expected to be lost in an epoch, by shard:")
    for shard, lost in made.expected_lost.items():
        print(f"{lost:4d}  {shard}")
    print("to be deleted while the run goes on:", *made.disappearing)

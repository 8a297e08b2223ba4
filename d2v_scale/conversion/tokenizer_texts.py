"""The texts that a tokenizer is trained on, from shards, files or a folder: `d2v tokenizer`."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from d2v_scale.conversion import text_files
from d2v_scale.conversion.folders import find_files
from d2v_scale.conversion.tables import Columns
from d2v_scale.conversion.text_files import Document, Reading
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.errors import DataError
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.modalities.text.tokenizer import open_tokenizer
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.patterns import expand, is_remote
from d2v_scale.shards.reading import SampleFault, read_sample
from d2v_scale.shards.shard_index import Members, index_tar
from d2v_scale.shards.shard_set import INDEX_SUFFIX, find_shards

_NAMED = 20


class Texts:
    """The texts of a source, and a count of its documents that are left out."""

    def __init__(self, source: str, reading: Reading, cache: ShardCache) -> None:
        """`cache`: where a shard that is not local is while it is read."""
        self._source = source
        self._cache = cache
        self._reading = reading
        self.used = 0
        self.left_out = 0

    def __iter__(self) -> Iterator[str]:
        """Raises DataError where there is nothing of the kind."""
        for document in self._documents():
            if document.fault is None:
                self.used += 1
                yield from document.texts
                continue
            self.left_out += 1
            if self.left_out <= _NAMED:
                print(f"left out {document.place}: {document.fault}", file=sys.stderr)

    def _documents(self) -> Iterator[Document]:
        path = Path(self._source)
        holds_shards = path.is_dir() and any(path.glob("*.tar"))
        if path.exists() and not holds_shards and (path.is_dir() or text_files.kind_of(path) in text_files.EXTENSIONS):
            found = find_files(path, text_files.EXTENSIONS, extension_of=text_files.kind_of)
            if found.left_out():
                print(found.left_out(), file=sys.stderr)
            return text_files.documents(found.files, self._reading)
        return self._of_shards()

    def _of_shards(self) -> Iterator[Document]:
        found = False
        listed = self._source.endswith(INDEX_SUFFIX)
        for name in find_shards(SourceConfig(shards=self._source)).paths if listed else expand(self._source):
            try:
                path = Path(self._cache.fetch(name) if is_remote(name) else name)
                contents = index_tar(path)
            except OSError as error:
                raise DataError(f"The shard {name} cannot be read: {error}.", "Restore it, or leave it out.") from error
            for damage in contents.damage:
                yield Document("", place=name, fault=damage)
            with path.open("rb") as stream:
                for number in range(len(contents.members)):
                    for document in _of_sample(name, stream, contents.members, number):
                        found = True
                        yield document
            if is_remote(name):
                self._cache.remove(name)
        if not found:
            raise DataError(f"The shards of {self._source!r} hold no .txt.", "Give shards of text.")


def _of_sample(shard: str, stream: BinaryIO, members: Members, number: int) -> Iterator[Document]:
    """The texts of a sample, which the index names if it cannot be had."""

    def read_at(start: int, size: int) -> bytes:
        stream.seek(start)
        return stream.read(size)

    if members.length_n[number] < 0:
        return
    try:
        held = read_sample(shard, read_at, members, number).members()
    except SampleFault as error:
        yield Document("", place=shard, fault=f"{error.fault.key}: {error.fault.reason}")
        return
    for extension in ("txt", "txt2"):
        if extension in held:
            yield text_files.checked(held[extension], f"{shard}: {members.key(number)}")


def train_on(arguments: argparse.Namespace) -> tuple[Texts, int]:
    """Train a tokenizer on the texts of a source; returns them, read, and its number of pieces. Raises DataError."""
    columns = Columns.parse(arguments.columns) if arguments.columns else None
    reading = Reading(split="line", columns=columns, encoding=arguments.encoding)
    with tempfile.TemporaryDirectory() as fetched:
        texts = Texts(arguments.source, reading, ShardCache.of(DataConfig(cache_dir=fetched)))
        tokenizer_training.train(
            islice(texts, arguments.limit),
            arguments.out,
            vocab_size=arguments.vocab_size,
            kind=arguments.kind,
            character_coverage=arguments.character_coverage,
            threads=arguments.threads,
        )
    return texts, open_tokenizer(arguments.out).size

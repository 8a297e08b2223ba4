"""Shards whose samples hold several contents, as one sees them who reads one of these, or several together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from d2v_scale.errors import DataError
from d2v_scale.shards.content import Content, plural, word_of
from d2v_scale.shards.shard_set import ShardSet

_OF_ARRAYS = ("npy", "npz")


def hidden_beside(content: Content, contents: list[Content]) -> frozenset[str]:
    """Extensions of members that belong to another of `contents`, which one who reads `content` would take for its own:
    a caption beside an array is `.txt`, and the array's `.npy` holds no token ids."""
    return frozenset(_OF_ARRAYS if content == "text" and "array" in contents else ())


def reading(shards: ShardSet, content: Content) -> ShardSet:
    """The same shards with the lengths of `content`, and what is lost of it. Unchanged where they hold nothing else, no
    such content, or have no index."""
    index = shards.index
    if index is None or not index.beside or content not in index.contents:
        return shards
    hidden = hidden_beside(content, index.contents)
    if content == index.content:
        return replace(shards, hidden=hidden)
    assert shards.column is None, "one content of a set of one content"
    column = index.beside.index(content)
    entries = [
        replace(entry, length=entry.length_beside[column], lost=entry.lost_beside[column]) for entry in shards.entries
    ]
    others = [other for other in index.contents if other != content]
    view = replace(index, content=content, beside=others)
    return replace(shards, entries=entries, index=view, column=column, hidden=hidden)


def reading_together(shards: ShardSet, contents: Sequence[Content]) -> ShardSet:
    """The same shards, of which samples are lost where not one of `contents` can be read. Unchanged where they have no
    index. Raises DataError where the index does not know one of these."""
    index = shards.index
    if index is None:
        return shards
    if unknown := [content for content in contents if content not in index.contents]:
        held = " with ".join(plural(content) for content in index.contents)
        words = ",".join(map(word_of, dict.fromkeys(contents)))
        raise DataError(
            f"{shards.index_file} is of shards that hold {held}, and has no lengths of {plural(unknown[0])}.",
            f"Make the index again with `d2v index --modality {words}`.",
        )
    columns = tuple(index.contents.index(content) - 1 for content in contents)
    entries = [
        replace(entry, lost=min(entry.lost if column < 0 else entry.lost_beside[column] for column in columns))
        for entry in shards.entries
    ]
    others = [other for other in index.contents if other != contents[0]]
    view = replace(index, content=contents[0], beside=others)
    return replace(shards, entries=entries, index=view, together=columns)


def part_lengths(shards: ShardSet, shard: int) -> NDArray[np.int64]:
    """(N, P): what the index says of the lengths of each of the contents that are read together; -1 where a sample does
    not have one, or it cannot be read. Raises DataError."""
    assert shards.together is not None
    return shards.lengths_of(shards.all_members(shard), shards.together)

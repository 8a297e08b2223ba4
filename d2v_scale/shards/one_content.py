"""Shards whose samples hold several contents, as one sees them who reads one of these."""

from dataclasses import replace

from d2v_scale.shards.content import Content
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

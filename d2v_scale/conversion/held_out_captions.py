"""Captions that are on both sides of a split: who has read them in training has seen the answer."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from d2v_scale.errors import DataError
from d2v_scale.files import atomic_file

_SUFFIX = ".captions.npy"


def require_apart(captions: dict[str, str], out: Path, prefix: str) -> None:
    """Raises DataError, which names the first, where another set in `out` than `prefix` has one of the `captions`, by
    place. Letters of either case and white space make no difference."""
    folder = out / ".make_shards"
    mine = {_number(caption): place for place, caption in captions.items()}
    for other in sorted(folder.glob(f"*{_SUFFIX}")):
        if other.name == f"{prefix}{_SUFFIX}":
            continue
        shared = [mine[number] for number in np.load(other, allow_pickle=False).tolist() if number in mine]
        if shared:
            first = min(shared, key=list(captions).index)
            name = other.name.removesuffix(_SUFFIX)
            raise DataError(
                f"{len(shared)} captions are also in the set {name!r} of {out}, the first is {captions[first]!r} of "
                f"{first}.",
                "Take these rows out of one of the tables, write to another OUT, or allow it with --shared_captions.",
            )


def note(captions: Iterable[str], out: Path, prefix: str) -> None:
    """Keep which captions the set `prefix` in `out` has, for `require_apart` of the others."""
    folder = out / ".make_shards"
    folder.mkdir(exist_ok=True)
    with atomic_file(folder / f"{prefix}{_SUFFIX}") as temporary, temporary.open("wb") as stream:
        np.save(stream, np.array(sorted(set(map(_number, captions))), dtype=np.uint64))


def _number(caption: str) -> int:
    folded = " ".join(caption.casefold().split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "big")

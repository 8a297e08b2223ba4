"""What shards hold, where nobody says it."""

import tarfile
from itertools import groupby

from webdataset.tariterators import base_plus_ext

from d2v_scale.errors import DataError
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.vision import decoder as vision
from d2v_scale.shards.array_files import open_npy
from d2v_scale.shards.content import Content, plural, word_of
from d2v_scale.shards.patterns import is_remote

_BEGINNING = 1 << 16
"""Bytes of a `.npy` that hold its header."""


def recognised(path: str, with_text: bool = False) -> list[Content]:
    """What the first sample of a shard holds: pictures, recordings or both with whatever stands beside them, else
    arrays (`.npz`, and `.npy` with more than one axis) or text (`.txt`, and ids in `.npy`).

    `with_text`: a `.txt` beside pictures, recordings or arrays is text that is trained on, and not only a label. Raises
    DataError where that is nothing, arrays and text without it, or where the shard is not local.
    """
    held = {} if is_remote(path) else _first_sample(path)
    main: list[Content] = []
    main += ["image"] if held.keys() & set(vision.EXTENSIONS) else []
    main += ["recording"] if held.keys() & set(speech.EXTENSIONS) else []
    is_beside = bool(main)
    if not main:
        main += ["array"] if "npz" in held or held.get("npy", 0) > 1 else []
        main += ["text"] if "txt" in held or held.get("npy") == 1 else []
    elif with_text and "txt" in held:
        main.append("text")
    if not main or (len(main) > 1 and not is_beside and not with_text):
        found = ", ".join(f".{extension}" for extension in held) or "nothing that was looked at"
        raise DataError(f"What {path} holds cannot be told from {found}.", "Say it with --modality.")
    return main


def describe(contents: list[Content]) -> str:
    """For people: what was recognised, and what to write where it is wrong."""
    held, words = " with ".join(map(plural, contents)), ",".join(map(word_of, contents))
    return f"the shards hold {held} (--modality {words})"


def _first_sample(path: str) -> dict[str, int]:
    """Extensions of the first sample's members, and the axes of its `.npy`; 0 of others."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if member.isfile() and not _hidden(member.name))
            named = ((*base_plus_ext(member.name), member) for member in files)
            for _, members in groupby((one for one in named if one[0] is not None), key=lambda one: one[0]):
                return {extension.lower(): _axes(tar, extension.lower(), member) for _, extension, member in members}
    except (OSError, EOFError, tarfile.TarError):  # said where it is indexed
        pass
    return {}


def _axes(tar: tarfile.TarFile, extension: str, member: tarfile.TarInfo) -> int:
    stream = tar.extractfile(member) if extension == "npy" else None
    if stream is None:
        return 0
    try:
        beginning = stream.read(_BEGINNING)
        return len(open_npy(lambda start, size: beginning[start : start + size], member.size).header.shape)
    except ValueError:
        return 0


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.removeprefix("./").split("/"))

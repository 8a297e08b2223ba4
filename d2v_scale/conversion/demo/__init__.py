"""Real data from installed packages, small enough for a laptop: what the demo recipes train on.

Every set has a training and a labelled held-out split. Writing is safe when several processes begin at once, and a
set that is complete is left alone.
"""

import fcntl
import importlib
import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from d2v_scale.files import open_as_usual

log = logging.getLogger(__name__)

ROOT = "demo_data"
VERSIONS = {"vision": "3", "speech": "3", "text": "3", "video": "3", "joint": "4"}
"""Of each set: another where what is written changes, so that an earlier one is written again."""


def write(modality: str, root: Path) -> Path:
    """Make sure that `root/modality` holds the demo shards of a modality (`SETS`); returns that directory.

    Raises DataError where a package is missing that the data come from.
    """
    target = root / modality
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{modality}.lock").open("w") as lock:
        # One process writes, the others wait for it here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(target):
            return target
        log.info("writing the %s demo shards to %s", modality, target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{modality}.", dir=root))
        try:
            importlib.import_module(f"d2v_scale.conversion.demo.{SETS[modality]}").write(temporary)
            (temporary / "VERSION").write_text(VERSIONS[modality])
            open_as_usual(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


SETS = {
    "vision": "digits",
    "speech": "spoken_words",
    "text": "python_docs",
    "video": "moving_digits",
    "joint": "joint",
}
"""The module that writes each, by the name of its folder."""


def is_complete(target: Path) -> bool:
    """True when the set was written to its end by this version."""
    from d2v_scale.shards.shard_set import INDEX_SUFFIX  # slow to import, and command lines name the sets

    version = target / "VERSION"
    splits = [(target / f"{split}{INDEX_SUFFIX}").is_file() for split in ("train", "test")]
    return all(splits) and version.is_file() and version.read_text() == VERSIONS[target.name]


def ensure(patterns: Iterable[str | None]) -> None:
    """Write the demo sets that `patterns` name (`.../demo_data/MODALITY/...`) and that are not there yet."""
    for pattern in patterns:
        if (named := named_set(pattern)) is not None:
            write(named.name, named.parent)


def named_set(pattern: str | None) -> Path | None:
    """The folder of the demo set that a pattern is in; None: it is in none."""
    parts = Path(pattern or "").parts
    if ROOT not in parts[:-1] or parts[at := parts.index(ROOT) + 1] not in SETS:
        return None
    return Path(*parts[: at + 1])

"""Raw files that `--data` names where shards belong: the command that makes shards of them, or the shards, made beside
the run."""

import fcntl
import hashlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_scale import modalities
from d2v_scale.errors import EXIT_REQUEUE, ConfigError, DataError, Verdict
from d2v_scale.programs.own_program import own_program
from d2v_scale.recipe import Recipe
from d2v_scale.shards.content import Content, plural
from d2v_scale.shards.shard_set import INDEX_SUFFIX, ShardSet, find_shards

if TYPE_CHECKING:
    from d2v_scale.conversion.recognising_files import Recognised
    from d2v_scale.data.config import SourceConfig

log = logging.getLogger(__name__)

_CONTENTS: dict[str, Content] = {"images": "image", "audio": "recording", "text": "text", "arrays": "array"}
"""What the commands of `d2v shards` make whose samples hold one content, always the same."""
_POLL_S = 0.2


class PreparationStopped(Verdict):
    """The program was asked to stop while it made shards. What is made is found again."""

    exit_code = EXIT_REQUEUE


def shards_or_command(source: "SourceConfig") -> ShardSet:
    """The shards of a source. Raises DataError where there are none; where it names raw files, with the command that
    makes shards of them."""
    try:
        return find_shards(source)
    except DataError:
        if source.index is not None or not os.path.exists(source.shards):
            raise  # before what knows raw files is imported, which takes torch along
        from d2v_scale.conversion.recognising_files import is_raw, recognise

        if not is_raw(source.shards):
            raise
        first = recognise(Path(source.shards))[0]
    out = f"{Path(source.shards).resolve().with_suffix('')}-shards"
    raise DataError(
        f"{source.shards} holds no shards, but {first.says}.",
        f"Make shards and train on them with --data {out}/{_index_of(first)}: `{first.typed(out)}`; or give --prepare, "
        "which makes them beside the run (on a cluster: sbatch slurm/make_shards.sh).",
    )


def prepare(recipe: Recipe, run_dir: str | None, asked_to_stop: Callable[[], bool]) -> None:
    """Make shards of the raw files that sources of `recipe` name, in `shards/` beside the run directory, and let the
    sources name these. The first rank that comes makes them, the others wait; what an earlier run made of the same
    files is found again.

    Raises DataError, ConfigError, and PreparationStopped. Not collective, but for the ranks of one node alone.
    """
    from d2v_scale.conversion.recognising_files import is_raw, recognise

    for source in recipe.data.sources:
        if source.index is not None or not is_raw(source.shards):
            continue
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
            raise ConfigError(
                "prepare",
                "is for one machine, and this run has several nodes",
                f"Make the shards first: sbatch slurm/make_shards.sh {source.shards} OUT.",
            )
        path = Path(source.shards).resolve()
        first = recognise(path)[0]
        stem = modalities.of(recipe.model, source.modality)
        _check_content(first, stem, source.shards)
        name = f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
        out = (Path(run_dir).resolve().parent if run_dir else Path("runs").resolve()) / "shards" / name
        more: list[str] = []
        if recipe.data.text.tokenizer is not None and stem.uses_tokenizer:
            more = ["--tokenizer", recipe.data.text.tokenizer]
        elif stem.most_pieces is not None:
            more = ["--vocab_size", str(min(stem.most_pieces, 16000)), "--fewer_pieces"]
        _make(own_program("shards", *first.arguments(str(out), more)), out, first, asked_to_stop)
        source.shards = str(out / _index_of(first))


def _check_content(found: "Recognised", stem: modalities.Modality, shards: str) -> None:
    content = _CONTENTS.get(found.command)
    if content not in (None, stem.content) or (content is not None and len(stem.parts) > 1):
        reads = " with ".join(plural(part.content) for part in stem.parts)
        raise ConfigError(
            "data",
            f"names {shards}, which holds {found.says}, but the stem {stem.name!r} reads {reads}",
            "Choose a recipe that reads them: d2v train --list_recipes.",
        )


def _make(command: list[str], out: Path, found: "Recognised", asked_to_stop: Callable[[], bool]) -> None:
    """Run the command unless another process has done so since this function was called."""
    called = time.time()
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".prepared").open("a") as lock:
        while not _locked(lock.fileno()):
            if asked_to_stop():
                raise PreparationStopped("asked to stop while another process made shards")
            time.sleep(_POLL_S)
        if os.fstat(lock.fileno()).st_mtime > called and (out / _index_of(found)).is_file():
            return
        log.info("making shards of %s: %s", found.says, found.typed(str(out)))
        process = subprocess.Popen(command)
        while process.poll() is None:
            if asked_to_stop():
                process.send_signal(signal.SIGINT)  # it ends its own workers
                process.wait()
                raise PreparationStopped(f"asked to stop while shards were made in {out}; the next start goes on")
            time.sleep(_POLL_S)
        if process.returncode:
            raise DataError(f"No shards could be made of {found.source}.", "The reason is above.")
        os.utime(lock.fileno())


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _index_of(found: "Recognised") -> str:
    options = list(found.options)
    prefix = options[options.index("--prefix") + 1] if "--prefix" in options else "train"
    return f"{prefix}{INDEX_SUFFIX}"

"""What a run directory says of its beginning: which weights, and whether training ever began.

A start that failed before its first step is no run: a corrected command begins anew in the same directory.
"""

import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_scale.errors import ConfigError
from d2v_scale.files import write_whole
from d2v_scale.run_files.committed import committed_steps, directory_name
from d2v_scale.tracking.mirror_state import EVENTS_FILE, MirrorState, state_locked
from d2v_scale.tracking.record import METRICS_FILE, SUPERSEDED_FILE, parse_lines

if TYPE_CHECKING:
    from d2v_scale.command_line import Options

log = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
DS_CONFIG_FILE = "ds_config.json"
START_FILE = "start.json"
MEMORY_FILE = "memory_run"
"""Beside the checkpoints: what copies of this beginning in the memory of nodes go by."""


def has_trained(run_dir: Path) -> bool:
    """Whether a step was ever taken in `run_dir`: there is a checkpoint or a record of one."""
    if any(committed_steps(run_dir / "checkpoints")):
        return True
    files = (run_dir / name for name in (METRICS_FILE, SUPERSEDED_FILE))
    return any(record["step"] > 0 for path in files if path.exists() for *_, record in parse_lines(path.read_bytes()))


def may_begin_anew(run_dir: Path) -> bool:
    """Whether nothing is lost if another run begins in `run_dir`: it holds none, or only a start that failed.

    A fine-tuning run's checkpoint of step 0 is as good as the encoder it was made from, while that exists.
    """
    if (run_dir / RECIPE_FILE).is_file() and not (run_dir / DS_CONFIG_FILE).is_file():
        return False  # somebody's recipe, not a run's
    return not has_trained(run_dir) and not (committed_steps(run_dir / "checkpoints") and _is_source_gone(run_dir))


def goes_on(run_dir: Path) -> bool:
    """Whether the run there continues from a checkpoint of its own: what it began from is read no more."""
    return bool(committed_steps(run_dir / "checkpoints")) and not may_begin_anew(run_dir)


def forget_failed_start(run_dir: Path) -> None:
    """Remove what a start that failed left behind of itself but for its logs. The run in MLflow stays as it ended, and
    the next one there is another."""
    log.warning("%s holds a start that failed before its first step: the run begins anew", run_dir)
    shutil.rmtree(run_dir / "checkpoints" / directory_name(0), ignore_errors=True)
    for name in (RECIPE_FILE, START_FILE, EVENTS_FILE, f"checkpoints/{MEMORY_FILE}"):
        (run_dir / name).unlink(missing_ok=True)
    with state_locked(run_dir):
        state = MirrorState.load(run_dir)
        if state.tracking_uri:
            fresh = MirrorState(
                tracking_uri=state.tracking_uri, job_key=uuid.uuid4().hex, generation=state.generation + 1
            )
            fresh.save(run_dir)


def note_start(run_dir: Path, options: "Options") -> None:
    """Keep in the run directory what the run begins from: until its first checkpoint a resumption needs it."""
    if committed_steps(run_dir / "checkpoints"):
        return
    if began_from_other_weights(run_dir, options) is not None:
        (run_dir / "checkpoints" / MEMORY_FILE).unlink(missing_ok=True)
    if options.init_from is None:
        (run_dir / START_FILE).unlink(missing_ok=True)
        return
    start = {
        "init_from": str(Path(options.init_from).resolve()),
        "given": options.init_from,
        "reset_teacher": options.reset_teacher,
    }
    write_whole(run_dir / START_FILE, json.dumps(start) + "\n")


def began_from_other_weights(run_dir: Path, options: "Options") -> str | None:
    """The weights that the run in `run_dir` began from, where `--init_from` names others; None where it does not."""
    start = start_of(run_dir)
    if options.init_from is None or start is None:
        return None
    # A link may lead elsewhere by now, or nowhere: the run does not read it again.
    same = options.init_from == start.get("given") or str(Path(options.init_from).resolve()) == start["init_from"]
    return None if same else start["init_from"]


def check_same_start(run_dir: Path, options: "Options") -> None:
    """Raises ConfigError when the run in `run_dir` has a checkpoint to go on from and began from other weights than
    `--init_from` names."""
    if options.init_from is None or not goes_on(run_dir):
        return
    if start_of(run_dir) is None:
        log.warning("%s continues from its own checkpoint: --init_from is not read", run_dir)
    elif (source := began_from_other_weights(run_dir, options)) is not None:
        raise ConfigError(
            "init_from",
            f"is {options.init_from}, but the run in {run_dir} began from {source} and has gone on since",
            "Choose another --run_dir, or leave it out to continue that run.",
        )


def began_from(run_dir: Path) -> tuple[str | None, bool]:
    """What a resumption has to begin from again, and whether with the student as teacher: (None, False) where the run
    goes on from a checkpoint or began from scratch."""
    start = start_of(run_dir)
    if start is None or has_trained(run_dir) or (committed_steps(run_dir / "checkpoints") and _is_source_gone(run_dir)):
        return None, False
    return start["init_from"], start["reset_teacher"]


def start_of(run_dir: Path) -> dict[str, Any] | None:
    """What the run began from; None where it began from scratch, or nobody can read it any more."""
    try:
        start = json.loads((run_dir / START_FILE).read_text())
        return start if {"init_from", "reset_teacher"} <= start.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_source_gone(run_dir: Path) -> bool:
    start = start_of(run_dir)
    return start is not None and not Path(start["init_from"]).exists()

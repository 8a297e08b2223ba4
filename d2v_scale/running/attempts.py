"""What a Slurm job does after its training ended: `python -m d2v_scale.running.attempts RUN_DIR SRUN_CODE`.

Prints `stop` or `requeue`, explains itself on stderr, and exits with the run's exit code. Each attempt is a line in
RUN_DIR/attempts.jsonl, so that a failure which comes back again and again ends instead of running for ever.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from d2v_scale.errors import (
    EXIT_BAD_INPUT,
    EXIT_COLLAPSE,
    EXIT_DATA_STARVED,
    EXIT_DONE,
    EXIT_LOST_PEER,
    EXIT_NON_FINITE,
    EXIT_REQUEUE,
    EXIT_SPIKE,
)
from d2v_scale.process.signals import StopReason
from d2v_scale.process.status import ATTEMPTS_FILE, Status, read_status
from d2v_scale.run_files.committed import committed_steps
from d2v_scale.tracking.timeline import TIMELINE_FILE

_FINAL = (EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_COLLAPSE, EXIT_SPIKE)
"""Another attempt would end the same way: it runs the same code on the same data from the same seed."""

STOPPED_BEFORE_START = "asked to stop before the start"
_ASKED_TO_STOP = (STOPPED_BEFORE_START, *(one.text for one in StopReason if one.exit_code == EXIT_REQUEUE))


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended. `step`: newest committed checkpoint after it, -1 if there is none."""

    exit_code: int
    reason: str
    step: int
    job: str = ""
    nodes: str = ""
    time: float = 0.0

    @property
    def was_asked_to_stop(self) -> bool:
        """A signal or the time limit, nothing that is wrong with the run."""
        return self.exit_code == EXIT_REQUEUE and self.reason.startswith(_ASKED_TO_STOP)


@dataclass(frozen=True)
class Decision:
    """`requeue` or not, and why, for the job's log."""

    requeue: bool
    why: str


def decide(history: list[Attempt], max_failures: int) -> Decision:
    """Whether the run of `history` (oldest first, the newest is the one that just ended) gets another attempt."""
    newest = history[-1]
    if newest.exit_code == EXIT_DONE:
        return Decision(False, "finished")
    if newest.exit_code in _FINAL:
        return Decision(False, f"not requeued, it would end the same way again: {newest.reason}")
    if newest.was_asked_to_stop:
        return Decision(True, f"{newest.reason}; continues from step {newest.step}")
    same = 0
    for attempt in reversed(history):
        if attempt.was_asked_to_stop:
            continue
        if (attempt.exit_code, attempt.step) != (newest.exit_code, newest.step):
            break
        same += 1
    if same >= max_failures:
        return Decision(False, f"not requeued after {same} equal failures without a new checkpoint: {newest.reason}")
    return Decision(True, f"failure {same} of {max_failures} without a new checkpoint: {newest.reason}")


def ended(status: Status | None, srun_code: int, step: int, whose: str = "srun's") -> Attempt:
    """The attempt that just ended. Without a status only srun's code (or that of `whose`) is left, and most of them
    mean nothing."""
    if status is not None:
        return Attempt(status.exit_code, status.reason, step)
    if srun_code in (*_FINAL, EXIT_DATA_STARVED):
        return Attempt(srun_code, f"ended with exit code {srun_code} before it could write status.json", step)
    return Attempt(EXIT_LOST_PEER, f"no status.json: a process was lost ({whose} exit code {srun_code})", step)


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, or of the copy in memory that the newest attempt went on from where that
    is newer; -1 if there is neither."""
    return max([*committed_steps(run_dir / "checkpoints"), _resumed(run_dir) or -1])


def _resumed(run_dir: Path) -> int:
    """The step that the newest attempt went on from; 0 if from none."""
    newest = 0
    with contextlib.suppress(OSError):
        for line in (run_dir / TIMELINE_FILE).read_text().splitlines():
            if '"begin"' in line:
                with contextlib.suppress(ValueError, KeyError):  # torn by a crash
                    newest = json.loads(line)["resumed"]
    return newest


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All earlier attempts, oldest first. A line cut off by a crash is left out."""
    attempts = []
    try:
        lines = (run_dir / ATTEMPTS_FILE).read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return attempts


def main() -> int:
    run_dir, srun_code = Path(sys.argv[1]), int(sys.argv[2])
    max_failures = int(os.environ.get("D2V_SCALE_MAX_FAILURES", "3"))
    attempt = ended(read_status(run_dir), srun_code, newest_checkpoint(run_dir))
    where = {"job": os.environ.get("SLURM_JOB_ID", ""), "nodes": os.environ.get("SLURM_JOB_NODELIST", "")}
    line = json.dumps(asdict(attempt) | where | {"time": time.time()})
    unrecorded: OSError | None = None
    earlier = read_attempts(run_dir)
    try:
        with (run_dir / ATTEMPTS_FILE).open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        unrecorded = error
        print(f"attempt not recorded: {error}", file=sys.stderr)
    decision = decide([*earlier, attempt], max_failures)
    if unrecorded is not None and decision.requeue and not attempt.was_asked_to_stop:
        # A full disk, most likely: failures that nobody counts would go on for ever.
        decision = Decision(False, f"not requeued, as attempts cannot be counted ({unrecorded}): {attempt.reason}")
    print("requeue" if decision.requeue else "stop")
    print(decision.why, file=sys.stderr)
    return attempt.exit_code


if __name__ == "__main__":
    sys.exit(main())

"""Following a run directory with a `Mirror`: beside a run, as the program `RunTracker` starts, or afterwards."""

import argparse
import fcntl
import os
import select
import sys
import time
from pathlib import Path

from d2v_scale.process.status import read_status
from d2v_scale.redaction import redact
from d2v_scale.tracking.events import append_event, earlier_starts, has_ended
from d2v_scale.tracking.mirror import Mirror, NotStored, Outdated
from d2v_scale.tracking.mirror_state import MirrorState, shown_uri

LOCK_FILE = ".mlflow.lock"
POLL_SECONDS = 1.0
BETWEEN_LAST_TURNS = 0.1
MAX_BACKOFF_SECONDS = 30.0


def quiet_libraries() -> None:
    """Keep MLflow's and its libraries' chatter (migrations, retries) out of the log."""
    import logging

    for name in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def follow(run_dir: Path, finish_timeout: float) -> bool:
    """Repeat the run directory until stdin closes or says so, then what is left; False if something stayed behind.

    One line on stdout the first time MLflow does not answer, none afterwards.
    """
    parent = os.getppid()
    starts = earlier_starts(run_dir)
    mirror: Mirror | None = None
    warned = False
    deadline: float | None = None
    wait = POLL_SECONDS
    while True:
        failed = False
        try:
            mirror = mirror or Mirror(run_dir)
            mirror.step()
            wait = POLL_SECONDS
        except Outdated:
            if os.getppid() != parent or earlier_starts(run_dir) != starts:
                return False  # another attempt has begun, whose own mirror goes on
            mirror = None  # the run went back to an earlier step, and has rewritten what the position is in
            continue
        except Exception as error:  # whatever MLflow or its store raises, the run goes on
            failed = True
            wait = min(MAX_BACKOFF_SECONDS, wait * 2)
            said = redact(f"{time.strftime('%F %T')} {type(error).__name__}: {error}")
            print(said, file=sys.stderr, flush=True)
            if not warned:
                warned = True
                _tell(_complaint(shown_uri(run_dir), error))
        if deadline is not None and mirror is not None and (not mirror.pending() or failed):
            return not mirror.pending() and not mirror.refused
        if deadline is not None and time.monotonic() > deadline:
            return False
        if deadline is not None:
            time.sleep(BETWEEN_LAST_TURNS)
        elif _told_to_finish(wait, parent):
            deadline = time.monotonic() + finish_timeout
            if os.getppid() != parent:
                note_sudden_end(run_dir, starts)


def note_sudden_end(run_dir: Path, starts: int) -> None:
    """The run is gone without a word: MLflow hears what status.json says of it, or that it failed; not where the next
    attempt has begun (`starts`: how many had when this one did)."""
    if earlier_starts(run_dir) == starts and not has_ended(run_dir):
        status = read_status(run_dir)
        append_event(run_dir, "status", status="failed" if status is None else status.outcome)


def catch_up(run_dir: Path) -> Mirror | None:
    """Send what the run directory holds and MLflow does not, once; raises what MLflow raises.

    None: a mirror is at work on this directory already (the run is in progress on this machine).
    """
    quiet_libraries()
    with (run_dir / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        mirror = Mirror(run_dir)
        mirror.step()
        if mirror.missing():
            # Its store was put back to an earlier state, perhaps; what it has is not added twice.
            mirror.send_all_again()
        return mirror


def pass_on(run_dir: Path) -> str:
    """Send what was added to a run that may be over, where MLflow has that run; a sentence on what became of it."""
    if not MirrorState.load(run_dir).run_id:
        return f"Recorded in {run_dir}, which MLflow does not have (`d2v sync` sends all of it)."
    quiet_libraries()
    with (run_dir / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"Recorded in {run_dir}, which is in progress and sends it to MLflow itself."
        try:
            Mirror(run_dir).step()
        except Exception as error:  # whatever MLflow or its store raises, what was measured is recorded
            why = redact(_reason(error))
            return f"Recorded in {run_dir}. MLflow does not take it ({why}): `d2v sync {run_dir}` sends it later."
    return f"Recorded in {run_dir}, and in MLflow as a nested run of it."


def _complaint(uri: str, error: Exception) -> str:
    if isinstance(error, NotStored):
        return f"MLflow at {uri} takes the records, but {error}; it is tried again."
    return (
        f"MLflow at {uri} does not take records ({_reason(error)}); metrics.jsonl has them all and they are sent when "
        "it answers."
    )


def _reason(error: Exception) -> str:
    text = str(error)
    if "Connection refused" in text:
        return "connection refused"
    if "Max retries exceeded" in text:  # the library's words for any failure to connect
        return "no connection"
    return text.splitlines()[0][:200] if text else type(error).__name__


def _tell(message: str) -> None:
    try:
        print(redact(message), flush=True)
    except OSError:  # the run is gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _told_to_finish(seconds: float, parent: int) -> bool:
    """Wait; True when the training process asked for the end or is gone."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) or os.getppid() != parent


def main() -> int:
    """Entry of the companion process that `RunTracker` starts."""
    parser = argparse.ArgumentParser(description="Follow a run directory and repeat its record to MLflow.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--finish-timeout", type=float, default=60.0)
    arguments = parser.parse_args()
    quiet_libraries()
    os.nice(10)
    with (arguments.run_dir / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the mirror of an attempt that just died may still be sending
        complete = follow(arguments.run_dir, arguments.finish_timeout)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

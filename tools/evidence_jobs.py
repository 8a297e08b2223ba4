"""Many small runs: side by side in processes of their own, each result in a file, nothing done twice."""

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from d2v_scale.errors import UserError
from d2v_scale.programs.run_quietly import run_quietly
from d2v_scale.tracking.record import read_records

ROOT = Path(__file__).resolve().parent.parent


class AnyJob(Protocol):
    """What has a result."""

    @property
    def name(self) -> str:
        """Of no other."""

    @property
    def result(self) -> Path:
        """Its file."""

    def is_done(self) -> bool:
        """Whether that file holds what this job would find."""


OneJob = TypeVar("OneJob", bound=AnyJob)


def run_all(jobs: Sequence[OneJob], work: Callable[[OneJob], dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """Do `work`, which writes the result, for all jobs that are not done yet; the results of all, in their order."""
    waiting = [job for job in jobs if not job.is_done()]
    print(f"{len(jobs)} results, {len(jobs) - len(waiting)} of them finished before", flush=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        running = {pool.submit(work, job): job for job in waiting}
        for number, future in enumerate(as_completed(running), 1):
            try:
                result = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            scores = ", ".join(f"{key} {result[key]:.3f}" for key in ("knn", "linear", "accuracy") if key in result)
            print(
                f"[{number}/{len(waiting)}] {running[future].name}: {scores} ({result['minutes']:.1f} min)", flush=True
            )
    return [json.loads(job.result.read_text()) for job in jobs]


def train_run(arguments: list[str], directory: Path, name: str) -> list[dict[str, Any]]:
    """Run train.py to its end (an interrupted run continues); its records. Raises UserError that says `name`."""
    command = [sys.executable, str(ROOT / "d2v_scale" / "train.py"), *arguments, f"--run_dir={directory}"]
    run_quietly(command, name, preexec_fn=end_with_parent)
    return read_records(directory)


def run_all_forked(
    jobs: Sequence[OneJob], work: Callable[[OneJob], dict[str, Any]], processes: int
) -> list[dict[str, Any]]:
    """As `run_all`, in processes forked from this one: of runs of seconds importing torch and DeepSpeed would take
    most. This process must have imported them and started nothing. Raises UserError that says which has failed."""
    waiting = [job for job in jobs if not job.is_done()]
    print(f"{len(jobs)} results, {len(jobs) - len(waiting)} of them finished before", flush=True)
    running: dict[int, OneJob] = {}
    for job in waiting:
        if len(running) == processes:
            _wait_for_one(running)
        running[fork(lambda job=job: work(job))] = job  # type: ignore[misc]
    while running:
        _wait_for_one(running)
    return [json.loads(job.result.read_text()) for job in jobs]


def fork(work: Callable[[], Any], log: Path | None = None) -> int:
    """Do `work` in a process forked from this one, what it writes in `log`; returns its id. Its exit code is 1 where
    `work` raises, 0 otherwise, but for one that it ends with itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        end_with_parent()
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train_forked(arguments: list[str], directory: Path, name: str) -> list[dict[str, Any]]:
    """As `train_run`, in a process forked from this one, which has no process group yet."""
    from d2v_scale.process.signals import StopFlag
    from d2v_scale.train import main

    directory.parent.mkdir(parents=True, exist_ok=True)
    log = directory.with_name(f"{directory.name}.log")  # not `with_suffix`: a name may hold a dot
    given = [*arguments, f"--run_dir={directory}"]
    code = os.waitstatus_to_exitcode(os.waitpid(fork(lambda: sys.exit(main(given, StopFlag.install())), log), 0)[1])
    if code:
        raise UserError(f"{name} ended with code {code}: {log.read_text()[-800:]}")
    return read_records(directory)


def _wait_for_one(running: dict[int, OneJob]) -> None:
    pid, status = os.wait()
    job = running.pop(pid)
    if status:
        for other in running:
            os.kill(other, signal.SIGTERM)
        raise UserError(f"{job.name} ended with code {os.waitstatus_to_exitcode(status)}.", "See above.")
    row = json.loads(job.result.read_text())
    print(f"{job.name}: k-NN {row['knn']:.3f}, linear {row['linear']:.3f} ({row['minutes']:.1f} min)", flush=True)


def end_with_parent() -> None:
    """Have the kernel terminate this process when the one that started it is gone, however it went (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

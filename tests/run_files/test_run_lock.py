"""Who may train in a run directory: programs on one node, of one job, on other nodes, with and without locks."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v_scale.errors import UserError
from d2v_scale.run_files import run_lock
from d2v_scale.run_files.run_lock import LOCK_FILE, Holder

HOLDER = """
import sys, time
from pathlib import Path
from d2v_scale.run_files.run_lock import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    yield
    run_lock.release()


def holder(run_dir: Path, seconds: float = 60, **job: str) -> subprocess.Popen[str]:
    """Another program that has the directory."""
    command = [sys.executable, "-c", HOLDER, str(run_dir), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **job})
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(run_dir: Path, **values: str) -> Holder:
    """What a process of another node has written."""
    one = dataclasses.replace(Holder.this_process(), pid=4711, host="n7", machine="another boot", token="theirs")
    one = dataclasses.replace(one, **values)
    (run_dir / LOCK_FILE).write_text(f"{one}\n{json.dumps(dataclasses.asdict(one))}\n")
    return one


@contextlib.contextmanager
def touching(path: Path) -> Iterator[None]:
    """A holder elsewhere lives."""
    end = threading.Event()

    def touch() -> None:
        while not end.wait(0.1):
            path.touch()

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def deny(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def lockf(file: int, command: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_a_second_program_is_refused_until_the_first_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same Slurm job, too: `srun -n 2` of a program that takes itself for the only one."""
    with holder(tmp_path, SLURM_JOB_ID="7") as first:
        try:
            for job in ("", "8", "7"):
                monkeypatch.setenv("SLURM_JOB_ID", job)
                with pytest.raises(UserError, match=rf"process {first.pid} on .*, Slurm job 7\. Wait"):
                    run_lock.lock(tmp_path, wait_s=0.6)
        finally:
            first.kill()
    run_lock.lock(tmp_path, wait_s=20)
    assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_a_requeued_job_waits_for_its_earlier_attempt_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path, 2, SLURM_JOB_ID="7"):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        run_lock.lock(tmp_path, wait_s=0)


def test_an_earlier_attempt_that_does_not_end_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "DYING_WAIT_S", 0.6)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with holder(tmp_path) as first:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(UserError, match="Slurm job 7"):
            run_lock.lock(tmp_path, wait_s=0)
        first.kill()


def check_from_outside(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDER.replace("sys.argv[1])", "sys.argv[1]), wait_s=0.6"), str(run_dir), "0"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UserError(done.stderr.strip().splitlines()[-1])


def test_what_is_released_is_free_at_once(tmp_path: Path) -> None:
    run_lock.lock(tmp_path)
    with pytest.raises(UserError, match="Another program"):
        check_from_outside(tmp_path)
    run_lock.release()
    assert (tmp_path / LOCK_FILE).read_text() == ""
    check_from_outside(tmp_path)


def test_a_number_that_was_given_again_is_not_the_holder(tmp_path: Path) -> None:
    me = Holder.this_process()
    assert me.lives
    assert not dataclasses.replace(me, started=me.started + 1).lives
    elsewhere(tmp_path, machine=me.machine)  # no such process here
    run_lock.lock(tmp_path, wait_s=0)


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has taken note
    assert run_lock._started(child.pid) is None
    child.wait()


@pytest.mark.parametrize("locks", ["local", "none"])
def test_a_living_holder_elsewhere_keeps_others_out_without_shared_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    """NFS with `nolock` gives the lock to every node."""
    monkeypatch.setattr(run_lock, "SILENT_S", 2.0)
    if locks == "none":
        deny(monkeypatch, errno.ENOLCK)
    theirs = elsewhere(tmp_path)
    with touching(tmp_path / LOCK_FILE):
        with pytest.raises(UserError, match=r"process 4711 on n7\. Wait .* If n7 is down, remove .*\.lock"):
            run_lock.lock(tmp_path, wait_s=2.5)
        assert theirs.token in (tmp_path / LOCK_FILE).read_text()
    # It died with its node: nobody touches the file any more.
    run_lock.lock(tmp_path, wait_s=60)
    assert theirs.token not in (tmp_path / LOCK_FILE).read_text()


def test_an_old_holder_elsewhere_is_not_waited_for(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    run_lock.lock(tmp_path, wait_s=0)


def test_the_lock_that_a_node_took_down_with_it_stops_its_own_job_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", 0.6)
    deny(monkeypatch, errno.EAGAIN)
    elsewhere(tmp_path, job="7")
    with pytest.raises(UserError, match="If n7 is down, remove"):
        run_lock.lock(tmp_path, wait_s=1.2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_lock.lock(tmp_path, wait_s=1.2)
    assert "earlier attempt of this job" in caplog.text


def test_of_two_that_come_at_once_where_there_are_no_locks_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(monkeypatch, errno.ENOLCK)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (elsewhere(tmp_path), sleep(0))[1])
    with pytest.raises(UserError, match="process 4711 on n7"):
        run_lock.lock(tmp_path)
    assert "theirs" in (tmp_path / LOCK_FILE).read_text()


def test_the_holder_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    run_lock.lock(tmp_path)
    before, end = (tmp_path / LOCK_FILE).stat().st_mtime_ns, time.monotonic() + 60
    while (tmp_path / LOCK_FILE).stat().st_mtime_ns == before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_record_of_an_earlier_version_leaves_it_to_the_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("process 1 on n7, Slurm job 3\n")
    run_lock.lock(tmp_path, wait_s=0)


def test_a_holder_of_another_host_is_not_near_where_machines_cannot_be_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Holder.this_process()
    assert own.is_near
    monkeypatch.setattr(run_lock, "this_system", lambda: "")
    assert not dataclasses.replace(own, machine="", host="another").is_near

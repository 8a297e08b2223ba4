"""Which faults the launcher answers by starting the ranks again, and how often."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2v_scale.process.status import write_status
from d2v_scale.running.attempts import Attempt, read_attempts
from d2v_scale.running.restarts import Restarts, kind_of, may_restart

CRASH, HANG, STARVED, LOST = (Attempt(code, why, 4) for code, why in ((1, "x"), (10, "hung"), (13, "y"), (14, "z")))


@pytest.mark.parametrize(
    ("attempt", "kind"), [(CRASH, "crash"), (HANG, "hang"), (STARVED, "data starvation"), (LOST, "lost process")]
)
def test_every_kind_of_fault_has_its_own_bound(attempt: Attempt, kind: str) -> None:
    assert kind_of(attempt) == kind
    assert may_restart([attempt], 2)[0]
    assert may_restart([attempt] * 2, 2)[0]
    restart, why = may_restart([attempt] * 3, 2)
    assert not restart
    assert why.startswith(f"{kind} number 3 without a new checkpoint, and --restarts is 2")


def test_faults_that_take_turns_are_bounded_too() -> None:
    history = [CRASH, LOST, HANG, CRASH, LOST, HANG]
    assert may_restart(history, 2)[0]
    assert not may_restart([*history, CRASH], 2)[0]


def test_a_new_checkpoint_begins_the_count_anew() -> None:
    further = Attempt(14, "z", 8)
    assert may_restart([LOST, LOST, further], 2)[0]
    assert may_restart([LOST, LOST, further, further], 2)[0]
    assert not may_restart([LOST, LOST, further, further, further], 2)[0]


@pytest.mark.parametrize("code", [2, 11, 12, 15])
def test_what_would_end_the_same_way_is_not_tried_again(code: int) -> None:
    assert may_restart([Attempt(code, "why", 4)], 9) == (False, "why")


def test_a_run_that_was_asked_to_stop_stays_stopped() -> None:
    assert not may_restart([Attempt(10, "SIGTERM received (rank 0), at step 4 of 9", 4)], 9)[0]


def make(tmp_path: Path, *arguments: str) -> tuple[Restarts, Path]:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    restarts = Restarts(1, tmp_path, arguments)
    Path(restarts.environment["D2V_SCALE_TELL_RUN_DIR"]).write_text(str(run_dir))
    return restarts, run_dir


def test_a_run_goes_on_in_the_directory_that_it_chose(tmp_path: Path) -> None:
    restarts, run_dir = make(tmp_path, "--recipe", "demo_vision")
    assert restarts.again(137, time.time()) == ["--run_dir", str(run_dir)]
    assert restarts.again(137, time.time()) is None
    assert [kind_of(one) for one in read_attempts(run_dir)] == ["lost process"] * 2


@pytest.mark.parametrize("argument", ["--run_dir=runs/a", "--resume"])
def test_a_run_whose_directory_is_given_keeps_its_arguments(argument: str, tmp_path: Path) -> None:
    assert make(tmp_path, argument, "runs/a")[0].again(1, time.time()) == []


def test_ranks_without_a_directory_are_told_none(tmp_path: Path) -> None:
    """A node may be lost before its ranks have chosen one: the next would train in a folder of the name `None`."""
    assert Restarts(1, tmp_path, ["--recipe", "demo_vision"]).further() == []


def test_what_an_earlier_attempt_said_is_no_word_on_this_one(tmp_path: Path) -> None:
    restarts, run_dir = make(tmp_path)
    write_status(run_dir, 11, "not finite")
    since = json.loads((run_dir / "status.json").read_text())["time"] + 1
    assert restarts.again(137, since) is not None
    assert restarts.again(137, since - 2) is None
    assert [one.exit_code for one in read_attempts(run_dir)] == [14, 11]


def test_ranks_that_never_had_a_directory_are_not_started_again(tmp_path: Path) -> None:
    assert Restarts(3, tmp_path, []).again(2, time.time()) is None


def test_a_checkpoint_that_can_still_become_whole_is_being_saved(tmp_path: Path) -> None:
    restarts, run_dir = make(tmp_path)
    temporary = run_dir / "checkpoints" / ".tmp-step-00000004-abc-1"
    assert not restarts.is_saving([1])
    temporary.mkdir(parents=True)
    (temporary / "rank-00001.safetensors").touch()
    assert not restarts.is_saving([1])  # it was killed while it wrote
    (temporary / "rank-00001.json").touch()
    assert restarts.is_saving([1])
    assert not restarts.is_saving([1, 2])
    assert not restarts.is_saving([0])
    temporary.rename(temporary.with_name("step-00000004"))
    assert not restarts.is_saving([1])


def test_attempts_that_cannot_be_counted_are_not_made(tmp_path: Path) -> None:
    restarts, run_dir = make(tmp_path)
    (run_dir / "attempts.jsonl").mkdir()
    assert restarts.again(137, time.time()) is None


LAUNCHER = """
import os, sys, tempfile
from pathlib import Path
from d2v_scale.parallel import local_ranks
from d2v_scale.running.restarts import Restarts
with tempfile.TemporaryDirectory() as folder:
    restarts = Restarts(1, Path(folder), sys.argv[2:])
    environment = {**os.environ, **restarts.environment}
    command = [sys.executable, *sys.argv[1:]]
    code = local_ranks.run(command, 2, environment, share_cores=True, again=restarts.again)
sys.exit(code)
"""
STAND_IN = Path(__file__).parents[1] / "stoppable_run.py"


def wait_for(path: Path, but: str = "") -> str:
    """What a file holds once it is there, and something else than `but`."""
    limit = time.monotonic() + 90
    while not path.exists() or (text := path.read_text()) in ("", but):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return text


@pytest.mark.parametrize(
    ("number", "kind", "strikes"),
    [
        pytest.param(signal.SIGKILL, "lost process", 1, marks=pytest.mark.slow),
        (signal.SIGSTOP, "hang", 1),
        (signal.SIGKILL, "lost process", 2),
    ],
)
def test_ranks_that_are_lost_or_stand_still_are_started_again_and_not_too_often(
    number: signal.Signals, kind: str, strikes: int, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--run_dir", str(run_dir), "--optim.max_steps", "60", "--step_seconds", "0.05"]
    env = {**os.environ, "WATCHDOG_S": "4", "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(STAND_IN), *arguments], env=env)
    pid = ""
    for _ in range(strikes):
        pid = wait_for(run_dir / "pid-1", but=pid)
        time.sleep(0.5)
        os.kill(int(pid), number)
    code = launcher.wait(120)
    assert [kind_of(one) for one in read_attempts(run_dir)] == [kind] * strikes
    if strikes > 1:
        assert code != 0
        return
    assert code == 0
    value = 0.0
    for step in range(60):
        value = 0.9 * value + (step * 7919) % 101
    saved = json.loads((run_dir / "checkpoints" / "step-00000060" / "COMMITTED").read_text())
    assert saved == [60, pytest.approx(value)]

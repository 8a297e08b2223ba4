"""Stopping real processes by real signals: one rank is told, all ranks save the same step."""

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import start_ranks, stop

from d2v_scale import errors
from d2v_scale.process import status
from d2v_scale.process.signals import Agreement, Stop, StopFlag, StopReason, worker_signals

PROGRAM = Path(__file__).parents[1] / "stoppable_run.py"


class Run:
    """The stand-in training program on `world_size` ranks, each in a session of its own."""

    def __init__(self, run_dir: Path, *, world_size: int, steps: int, step_s: float = 0.1, save_s: float = 0.0, **env):
        self.dir = run_dir
        options = ["--run_dir", str(run_dir), "--optim.max_steps", str(steps)]
        options += ["--step_seconds", str(step_s), "--save_seconds", str(save_s)]
        environment = {name: str(value) for name, value in env.items()}
        self.ranks = start_ranks(world_size, PROGRAM, *options, env=environment)

    def wait_for(self, name: str, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not (self.dir / name).exists():
            assert time.monotonic() < end, f"{name} did not appear"
            assert all(rank.poll() is None for rank in self.ranks), [rank.output() for rank in self.ranks]
            time.sleep(0.02)

    def codes(self, timeout_s: float = 60) -> list[int]:
        return [rank.wait(timeout_s) for rank in self.ranks]

    def status(self) -> status.Status:
        found = status.read_status(self.dir)
        assert found is not None
        return found

    def saved_steps(self) -> set[str]:
        return {path.read_text() for path in self.dir.glob("saved-*")}


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    runs = []

    def start(**kwargs) -> Run:
        runs.append(Run(tmp_path, **kwargs))
        return runs[-1]

    yield start
    for run in runs:
        stop(run.ranks)


def test_signal_to_one_rank_in_the_first_step_then_repeated_during_the_save_then_resume(start, tmp_path: Path) -> None:
    run = start(world_size=2, steps=8, step_s=0.5, save_s=1.5)
    run.wait_for("pid-1")
    run.ranks[1].send_signal(signal.SIGUSR1)
    run.wait_for("saving-0")
    for rank in run.ranks:
        rank.send_signal(signal.SIGUSR1)
        rank.send_signal(signal.SIGTERM)
        rank.send_signal(signal.SIGINT)
    assert run.codes() == [errors.EXIT_REQUEUE] * 2
    assert run.saved_steps() == {"2"}  # raised in step 1, agreed at the edge after
    found = run.status()
    assert (found.outcome, found.exit_code, found.step) == ("requeue", errors.EXIT_REQUEUE, 2)
    assert found.reason == "SIGUSR1 received (rank 1)"

    resumed = start(world_size=2, steps=8, step_s=0.05)
    assert resumed.codes() == [0, 0]
    assert (resumed.status().outcome, resumed.status().step) == ("done", 8)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    expected = 0.0
    for step in range(8):
        expected = 0.9 * expected + (step * 7919) % 101
    assert records[-1]["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_stop_signal_is_survived_until_the_save(start, number: signal.Signals) -> None:
    run = start(world_size=1, steps=1000, step_s=0.05, save_s=0.2)
    run.wait_for("pid-0")
    run.ranks[0].send_signal(number)
    assert run.codes() == [errors.EXIT_REQUEUE]
    assert number.name in run.status().reason
    assert (run.dir / "saved-0").exists()


def at_a_terminal(run_dir: Path, *prefix: str) -> tuple[subprocess.Popen[bytes], int]:
    """The stand-in as the foreground program of a terminal of its own; the terminal's other end."""
    ours, its = pty.openpty()
    command = [*prefix, sys.executable, str(PROGRAM), "--run_dir", str(run_dir), "--optim.max_steps", "40"]
    process = subprocess.Popen(
        [*command, "--step_seconds", "0.1", "--save_seconds", "0.2"],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=run_dir,  # nohup writes a file there
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    return process, ours


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """SIGHUP ended the run without a checkpoint, and whatever wrote to the terminal that was gone failed."""
    process, terminal = at_a_terminal(tmp_path)
    wait_for(tmp_path / "metrics.jsonl")
    os.close(terminal)
    assert process.wait(60) == errors.EXIT_REQUEUE
    assert (tmp_path / "saved-0").exists()
    found = status.read_status(tmp_path)
    assert found is not None
    assert "SIGHUP" in found.reason


def test_nohup_keeps_its_meaning(tmp_path: Path) -> None:
    process, terminal = at_a_terminal(tmp_path, "nohup")
    wait_for(tmp_path / "metrics.jsonl")
    os.close(terminal)
    assert process.wait(60) == errors.EXIT_DONE


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def test_wall_clock_limit_stops_like_a_signal(start) -> None:
    run = start(world_size=1, steps=1000, step_s=0.05, D2V_SCALE_DEADLINE=time.time())
    assert run.codes() == [errors.EXIT_REQUEUE]
    assert "wall-clock" in run.status().reason


def test_killed_rank_leaves_a_lost_peer(start) -> None:
    run = start(world_size=2, steps=1000, step_s=0.2)
    run.wait_for("metrics.jsonl")
    run.ranks[1].send_signal(signal.SIGKILL)
    assert run.codes() == [errors.EXIT_LOST_PEER, -signal.SIGKILL]
    assert (run.status().outcome, run.status().exit_code) == ("requeue", errors.EXIT_LOST_PEER)


def test_watchdog_names_the_stopped_rank_and_dumps_the_stacks_of_the_others(start) -> None:
    run = start(world_size=2, steps=1000, step_s=0.1, WATCHDOG_S=4)
    run.wait_for("metrics.jsonl")
    stopped = run.ranks[1]
    stopped.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert run.ranks[0].wait(60) == errors.EXIT_REQUEUE
    assert time.monotonic() - began < 20
    found = run.status()
    assert found.outcome == "requeue"
    assert f"rank 1 (process {stopped.pid} on {socket.gethostname()}) is stopped (SIGSTOP), state T" in found.reason
    (stacks,) = run.dir.glob("logs/hang-*/rank-00000.txt")
    assert "all_reduce" in stacks.read_text()
    assert not list(run.dir.glob("logs/hang-*/rank-00001.txt"))


def test_watchdog_forgives_a_rank_that_was_stopped_for_less_than_the_limit(start) -> None:
    run = start(world_size=2, steps=15, step_s=0.1, WATCHDOG_S=15)
    run.wait_for("metrics.jsonl")
    run.ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(2)
    run.ranks[1].send_signal(signal.SIGCONT)
    assert run.codes() == [0, 0]


def test_first_signal_stays_and_a_verdict_outweighs_it() -> None:
    flag = StopFlag()
    assert flag.raised() is None
    flag.up(StopReason.USR1)
    flag.up(StopReason.TERM)
    assert flag.raised() is StopReason.USR1
    flag.up(StopReason.DATA_STARVED)
    flag.up(StopReason.TERM)
    flag.up(StopReason.COLLAPSE)
    assert flag.raised() is StopReason.DATA_STARVED


def test_agreement_of_one_process_is_immediate() -> None:
    agreement = Agreement()
    assert agreement.agree(None) is None
    stop = agreement.agree(StopReason.NON_FINITE)
    assert stop == Stop(StopReason.NON_FINITE, 0)
    assert stop.exit_code == errors.EXIT_NON_FINITE
    agreement.barrier()


def test_every_reason_has_words_and_a_code() -> None:
    codes = {reason: reason.exit_code for reason in StopReason}
    assert all(reason.text for reason in StopReason)
    assert codes[StopReason.COLLAPSE] == errors.EXIT_COLLAPSE
    assert codes[StopReason.DATA_STARVED] == errors.EXIT_DATA_STARVED
    assert {codes[r] for r in (StopReason.TIME_LIMIT, StopReason.USR1, StopReason.TERM)} == {errors.EXIT_REQUEUE}


def test_data_worker_outlives_the_signals_of_its_rank() -> None:
    child = os.fork()
    if child == 0:
        worker_signals()
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os._exit(7 if signal.alarm(0) > 0 else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

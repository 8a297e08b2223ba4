"""`d2v train --restarts`: ranks that were lost, or stand still, are started again without leaving the job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2v_scale.conversion import demo
from d2v_scale.programs.own_program import own_program
from d2v_scale.tracking import read_records
from d2v_scale.tracking.account import read_account

STEPS = 12


def start(run_dir: Path, shards: Path, *more: str, fault: str = "") -> "subprocess.Popen[str]":
    settings = {
        "--ranks": "2",
        "--recipe": "demo_vision",
        "--run_dir": str(run_dir),
        "--data": str(shards / "train.index.json"),
        "--evaluation.train": "null",
        "--evaluation.test": "null",
        "--stop_at": str(STEPS),
        "--checkpoint.every": "4",
        "--global_batch_size": "8",
        "--tracking.enabled": "false",
        "--tracking.log_every": "1",
        "--tracking.plot_every": "null",
    }
    command = own_program("train", *more, *[text for pair in settings.items() for text in pair])
    env = {**os.environ, "D2V_FAULT": fault, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, env=env, stdout=sys.stderr, text=True)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(run_dir) if "loss" in record]


@pytest.mark.slow
def test_lost_ranks_are_started_again_within_thirty_percent_of_a_bare_start(tmp_path: Path) -> None:
    shards = demo.write("vision", tmp_path / "demo_data")
    assert start(tmp_path / "undisturbed", shards).wait(300) == 0
    # Each process of rank 1 dies in its seventh step: after steps 4 and 8 were saved.
    assert start(tmp_path / "run", shards, "--restarts", "1", fault="backward:1:7").wait(600) == 0
    attempts = read_account(tmp_path / "run")
    assert [(one.first, one.code) for one in attempts] == [(0, None), (4, None), (8, 0)]
    bare = attempts[0].seconds["start_up"]
    for one in attempts[1:]:
        assert one.seconds["held"] == 0
        assert one.seconds["restart"] + one.seconds["start_up"] < 1.3 * bare
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_rank_that_stands_still_costs_the_watchdogs_time_and_a_restart(tmp_path: Path) -> None:
    shards = demo.write("vision", tmp_path / "demo_data")
    limit = ("--hang_limit_minutes", "0.15")
    launcher = start(tmp_path / "run", shards, "--restarts", "1", *limit)
    begun = time.monotonic()
    while not (tmp_path / "run" / "checkpoints" / "step-00000004").exists():
        assert time.monotonic() - begun < 200
        time.sleep(0.05)
    ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGSTOP)
    assert launcher.wait(600) == 0
    [attempt] = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert attempt["exit_code"] == 10
    assert "rank 1" in attempt["reason"]
    assert losses(tmp_path / "run")[-1][0] == STEPS

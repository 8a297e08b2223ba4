"""`d2v train --meet`: a launcher on each of several nodes, which are three processes here; one is killed with its
ranks, and a spare node takes its place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2v_scale.conversion import demo
from d2v_scale.process.status import read_status
from d2v_scale.programs.own_program import own_program
from d2v_scale.running.attempts import read_attempts
from d2v_scale.tracking import read_records
from d2v_scale.tracking.account import read_account

STAND_IN = Path(__file__).parents[1] / "stoppable_run.py"
NODES = ("n1", "n2", "n3")
LAUNCHER = """
import os, sys
from pathlib import Path
from d2v_scale.agents import agent, joining
agent.BEAT_S = 0.3
command = [sys.executable, sys.argv[3]]
environment = {**os.environ, joining.LOST_NODE: "8"}
sys.exit(joining.join(Path(sys.argv[1]), sys.argv[2], 1, 2, command, sys.argv[4:], 1, environment))
"""


def meet(folder: Path) -> Path:
    folder.mkdir()
    (folder / "nodes").write_text("".join(f"{node} 127.0.0.1\n" for node in NODES))
    return folder


def wait_for(path: Path, launchers: "list[subprocess.Popen[bytes]]") -> None:
    limit = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < limit
        assert all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.05)


def test_a_spare_node_takes_the_place_of_one_that_is_lost(tmp_path: Path) -> None:
    """With the stand-in for the training program: rank 0's node, the first, whose launcher leads."""
    folder, run_dir = meet(tmp_path / "meet"), tmp_path / "run"
    arguments = [str(STAND_IN), "--run_dir", str(run_dir), "--optim.max_steps", "40", "--step_seconds", "0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAUNCHER, str(folder)]
    launchers = [subprocess.Popen([*command, node, *arguments], env=env) for node in NODES]
    try:
        wait_for(run_dir / "metrics.jsonl", launchers)  # both ranks have begun
        rank = int((run_dir / "pid-0").read_text())
        launchers[0].kill()
        assert [launcher.wait(90) for launcher in launchers] == [-signal.SIGKILL, 0, 0]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert not Path(f"/proc/{rank}").exists(), "ranks end with their launcher"
    status = read_status(run_dir)
    assert status is not None
    assert (status.outcome, status.step) == ("done", 40)
    assert status.excluded == {"n1": "its launcher or the node is gone"}
    assert [attempt.exit_code for attempt in read_attempts(run_dir)] == [14]
    plans = [json.loads(path.read_text()) for path in sorted(folder.glob("plan-*.json"))]
    assert [plan["active"] for plan in plans] == [["n1", "n2"], ["n3", "n2"], []]
    value = 0.0
    for step in range(40):
        value = 0.9 * value + (step * 7919) % 101
    saved = json.loads((run_dir / "checkpoints" / "step-00000040" / "COMMITTED").read_text())
    assert saved == [40, pytest.approx(value)]


def train(run_dir: Path, shards: Path, *options: str) -> list[str]:
    settings = {
        "--ranks": "1",
        "--recipe": "demo_vision",
        "--run_dir": str(run_dir),
        "--data": str(shards / "train.index.json"),
        "--evaluation.train": "null",
        "--evaluation.test": "null",
        "--stop_at": "24",
        "--checkpoint.every": "4",
        "--global_batch_size": "8",
        "--tracking.enabled": "false",
        "--tracking.log_every": "1",
        "--tracking.plot_every": "null",
    }
    return own_program("train", *[text for pair in settings.items() for text in pair], *options)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(run_dir) if "loss" in record]


@pytest.mark.slow
def test_training_goes_on_bitwise_on_a_spare_node_and_after_a_crash_on_all_of_them(tmp_path: Path) -> None:
    """One node is lost, then a rank of another one dies. Also what both cost beside a bare start of the same run."""
    shards = demo.write("vision", tmp_path / "demo_data")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    alone = train(tmp_path / "undisturbed", shards, "--ranks=2")
    assert subprocess.run(alone, env=env, stdout=sys.stderr, timeout=300, check=False).returncode == 0

    folder, run_dir = meet(tmp_path / "meet"), tmp_path / "run"
    options = ("--meet", str(folder), "--spares", "1", "--restarts", "2")
    launchers = []
    for node in NODES:
        # Each process of the spare's dies in its eleventh step: the first, and none after a checkpoint or two.
        fault = {"D2V_FAULT": "backward:1:11"} if node == "n3" else {}
        command = train(run_dir, shards, *options, "--node", node)
        launchers.append(subprocess.Popen(command, env=env | fault, stdout=sys.stderr))
    try:
        wait_for(run_dir / "checkpoints/step-00000008", launchers)
        launchers[1].kill()
        assert [launcher.wait(300) for launcher in launchers] == [0, -signal.SIGKILL, 0]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert losses(run_dir) == losses(tmp_path / "undisturbed")
    attempts = read_account(run_dir)
    assert [[*one.excluded] for one in attempts] == [[], ["n2"], ["n2"]]
    bare = attempts[0].seconds["start_up"]
    for one in attempts:
        print(f"{one.seconds['restart'] / bare:.2f} {one.seconds['start_up'] / bare:.2f} of a bare start", flush=True)
    assert attempts[-1].seconds["restart"] + attempts[-1].seconds["start_up"] < 1.3 * bare

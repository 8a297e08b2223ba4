"""State in the memory of nodes through the real training program: a run that lost ranks or a node goes on from there,
and ends as one that lost none.

Ranks are nodes with memory file systems of their own, which a launcher's LOCAL_WORLD_SIZE makes of them. Stage 0 stands
for two pipeline stages.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT, Rank, free_port, run_ranks, start_program
from test_kill import finish
from test_rewind import figures, rule, spikes
from test_spares import NODES, meet

from d2v_scale.checkpoint import find_newest_valid
from d2v_scale.conversion import demo
from d2v_scale.programs.own_program import own_program
from d2v_scale.tracking import read_records
from d2v_scale.tracking.account import read_account

STEPS, EVERY = 9, 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write("vision", tmp_path_factory.mktemp("shards"))


def arguments(run_dir: Path, shards: Path, stage: int, **more: Any) -> list[str]:
    settings = {
        "recipe": "demo_vision",
        "run_dir": run_dir,
        "data": shards / "train.index.json",
        "deepspeed_config": ROOT / "ds_configs" / f"zero{max(1, stage)}.json",
        "parallel.pipeline": 1 if stage else 2,
        "stop_at": STEPS,
        "global_batch_size": 8,
        "checkpoint.every": 5,
        "checkpoint.memory.every": EVERY,
        "checkpoint.memory.dir": "$NODE_MEMORY",
        "teacher.placement": "cpu",
        "evaluation.train": "null",
        "evaluation.test": "null",
        "tracking.enabled": "false",
        "tracking.plot_every": "null",
        "tracking.log_every": 1,
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def node_memory(run_dir: Path, node: int) -> Path:
    return run_dir.parent / f"{run_dir.name}-memory-{node}"


def train(
    run_dir: Path, shards: Path, stage: int, *, ranks: int = 2, per_node: int = 1, fault: str = "", **more: Any
) -> list[int]:
    """Exit codes; when one rank dies the others are killed."""
    base = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "D2V_FAULT": fault,
    }
    started: list[Rank] = []
    for rank in range(ranks):
        memory = node_memory(run_dir, rank // per_node)
        memory.mkdir(exist_ok=True)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node), "NODE_MEMORY": str(memory)}
        program = ROOT / "d2v_scale" / "train.py"
        started.append(start_program(program, *arguments(run_dir, shards, stage, **more), environment={**base, **own}))
    return finish(started, 300)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(run_dir) if "loss" in record]


def check_same(run_dir: Path, undisturbed: Path) -> None:
    """Losses, and every value of the last checkpoint."""
    assert losses(run_dir) == losses(undisturbed)
    (ours, _), (theirs, _) = (find_newest_valid(path / "checkpoints") for path in (run_dir, undisturbed))
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step
    assert ours.kinds() == theirs.kinds()
    for kind in ours.kinds():
        assert ours.names(kind) == theirs.names(kind)
        for name in ours.names(kind):
            assert torch.equal(ours.tensor(kind, name), theirs.tensor(kind, name))


def test_a_run_that_is_taken_back_to_its_copy_in_memory_takes_the_same_steps(tmp_path: Path, shards: Path) -> None:
    more = arguments(tmp_path / "run", shards, 3, stop_at=6, checkpoint__every=0)
    worker = Path(__file__).with_name("memory_run_worker.py")
    outputs = run_ranks(2, worker, str(tmp_path / "memory"), *more, env={"LOCAL_WORLD_SIZE": "1"})
    assert all(output.rstrip().endswith("the same") for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3, 0])
def test_killed_ranks_and_a_lost_node_cost_the_steps_since_the_last_copy(
    stage: int, tmp_path: Path, shards: Path
) -> None:
    assert train(tmp_path / "undisturbed", shards, stage) == [0, 0]
    run_dir = tmp_path / "run"
    # In the fourth step, when nothing is on disk; then in the sixth after that, with the node of rank 0 lost as well.
    assert -signal.SIGKILL in train(run_dir, shards, stage, fault="backward:1:4")
    assert -signal.SIGKILL in train(run_dir, shards, stage, fault="backward:1:6")
    shutil.rmtree(node_memory(run_dir, 0))
    assert train(run_dir, shards, stage) == [0, 0]
    assert [one.first for one in read_account(run_dir)] == [0, 2, 6]
    assert "came from" in (run_dir / "logs" / "rank-00000.log").read_text()
    check_same(run_dir, tmp_path / "undisturbed")
    assert not list(tmp_path.glob("run-memory-*/*/*")), "a run that is over leaves nothing in memory"


@pytest.mark.slow
def test_two_nodes_of_two_ranks_that_share_every_block(tmp_path: Path, shards: Path) -> None:
    several = {"ranks": 4, "per_node": 2, "parallel__tensor": 2}
    assert train(tmp_path / "undisturbed", shards, 1, **several) == [0] * 4
    assert -signal.SIGKILL in train(tmp_path / "run", shards, 1, fault="backward:3:8", **several)
    shutil.rmtree(node_memory(tmp_path / "run", 1))
    assert train(tmp_path / "run", shards, 1, **several) == [0] * 4
    assert [one.first for one in read_account(tmp_path / "run")] == [0, 6]
    check_same(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.slow
def test_damaged_and_full_memory_is_counted_and_the_disk_taken(tmp_path: Path, shards: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(tmp_path / "undisturbed", shards, 1) == [0, 0]
    # The first copy finds no room; the third is damaged on both nodes, and the second older than the disk's checkpoint.
    fault = "memory_write:0:1:enospc,backward:1:8"
    assert -signal.SIGKILL in train(run_dir, shards, 1, fault=fault)
    for path in tmp_path.glob("run-memory-*/*/*/*/step-00000006/rank-00001.safetensors"):
        path.write_bytes(path.read_bytes()[:-8] + b"damaged.")
    assert max(record.get("memory_copies_lost", 0) for record in read_records(run_dir)) == 1
    assert train(run_dir, shards, 1) == [0, 0]
    said = (run_dir / "logs" / "rank-00000.log").read_text() + (run_dir / "logs" / "rank-00001.log").read_text()
    assert said.count("is damaged: its checksum differs") == 2
    assert "The copy in memory of step 2 failed: OSError: [Errno 28]" in said
    assert [one.first for one in read_account(run_dir)] == [0, 5]
    assert max(record.get("memory_copies_lost", 0) for record in read_records(run_dir)) == 2
    check_same(run_dir, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_that_went_back_over_a_spike_goes_on_from_memory_as_if_it_had_not_been_killed(
    tmp_path: Path, shards: Path
) -> None:
    settings = {"stop_at": 24, "optim.warmup_steps": 2, **rule("rewind")}
    assert train(tmp_path / "undisturbed", shards, 1, **settings) == [0, 0]
    spiked = spikes(tmp_path / "undisturbed")
    assert spiked, "the rule has found no spike"
    taken = spiked[0]["step"]
    run_dir = tmp_path / "run"
    # In the step of the spike, with a copy that is newer than where the run will go back to; then soon after that.
    assert -signal.SIGKILL in train(run_dir, shards, 1, fault=f"backward:1:{taken}", **settings)
    assert -signal.SIGKILL in train(run_dir, shards, 1, fault="backward:1:5", **settings)
    assert train(run_dir, shards, 1, **settings) == [0, 0]
    assert [line["left_out"] for line in spikes(run_dir)] == [line["left_out"] for line in spiked]
    found, wanted = (
        figures([record for record in read_records(path) if "loss" in record])
        for path in (run_dir, tmp_path / "undisturbed")
    )
    assert found == wanted


@pytest.mark.slow
def test_the_launcher_starts_ranks_again_from_memory_and_leaves_nothing_there(tmp_path: Path, shards: Path) -> None:
    run_dir, memory = tmp_path / "run", tmp_path / "memory"
    more = arguments(run_dir, shards, 1, checkpoint__every=0, checkpoint__memory__dir=memory)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "D2V_FAULT": "backward:1:4"}
    command = own_program("train", "--ranks", "2", "--restarts", "1", *more)
    # Each process of rank 1 dies in its fourth step: of every three, two are kept, and no checkpoint is on disk.
    done = subprocess.run(command, env=env, stdout=sys.stderr, timeout=600, check=False)
    assert done.returncode == 0
    assert [one.first for one in read_account(run_dir)] == [0, 2, 4, 6]
    attempts = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["step"] for attempt in attempts] == [-1, 2, 4]
    assert [step for step, _ in losses(run_dir)] == [*range(1, STEPS + 1)]
    assert not list(memory.glob("*/*"))


@pytest.mark.slow
def test_a_spare_node_gets_the_shard_of_the_lost_one_from_its_neighbours_memory(tmp_path: Path, shards: Path) -> None:
    settings = {"stop_at": 24, "checkpoint__every": 0}
    assert train(tmp_path / "undisturbed", shards, 3, **settings) == [0, 0]
    run_dir, folder = tmp_path / "run", meet(tmp_path / "meet")
    command = own_program("train", *arguments(run_dir, shards, 3, **settings))
    command += ["--ranks", "1", "--meet", str(folder), "--spares", "1", "--node"]
    launchers = []
    for number, node in enumerate(NODES):
        node_memory(run_dir, number).mkdir()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"NODE_MEMORY": str(node_memory(run_dir, number))}
        launchers.append(subprocess.Popen([*command, node], env=env, stdout=sys.stderr))
    try:
        begun = time.monotonic()
        while not any(node_memory(run_dir, 1).glob("*/*/held/step-0000000[6-9]/rank-00000.json")):
            assert time.monotonic() - begun < 200
            assert all(launcher.poll() is None for launcher in launchers)
            time.sleep(0.02)
        launchers[0].kill()
        shutil.rmtree(node_memory(run_dir, 0))
        assert [launcher.wait(300) for launcher in launchers] == [-signal.SIGKILL, 0, 0]
    finally:
        for launcher in launchers:
            launcher.kill()
    first, second = read_account(run_dir)
    assert (first.first, second.code) == (0, 0)
    assert second.first >= 4, "the newest copy is one of the last two"
    assert second.first > first.last - 2 * EVERY
    assert "came from" in (run_dir / "logs" / "rank-00000.log").read_text()
    check_same(run_dir, tmp_path / "undisturbed")
    assert not list(tmp_path.glob("run-memory-*/*/*"))

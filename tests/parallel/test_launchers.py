"""d2v_scale.parallel.launchers: who a process is, under each launcher and in the shells that people have."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale.errors import ConfigError
from d2v_scale.parallel import launchers, rank_environment

ROOT = Path(__file__).resolve().parents[2]
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1234"}


def task(rank: int, **more: str) -> dict[str, str]:
    return STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} | more


def test_srun_plain_gives_a_world_of_two_at_one_address() -> None:
    """`srun -n 2 python train.py` trained twice into one directory."""
    worlds = [task(0), task(1)]
    places = [launchers.adopt(world) for world in worlds]
    assert [(place.rank, place.world_size, place.local_rank) for place in places] == [(0, 2, 0), (1, 2, 1)]
    assert [world["RANK"] for world in worlds] == ["0", "1"]
    assert {world["WORLD_SIZE"] for world in worlds} == {"2"}
    assert len({(world["MASTER_ADDR"], world["MASTER_PORT"]) for world in worlds}) == 1
    assert worlds[0]["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("said", "ranks"),
    [
        (task(1, SLURM_STEP_TASKS_PER_NODE="2", SLURM_NODEID="0"), "2"),
        (task(1, SLURM_STEP_TASKS_PER_NODE="8(x3),4", SLURM_NODEID="2"), "8"),
        (task(1, SLURM_STEP_TASKS_PER_NODE="8(x3),4", SLURM_NODEID="3"), "4"),
        (task(1, SLURM_STEP_TASKS_PER_NODE="8(x3),4", SLURM_NODEID="4", LOCAL_WORLD_SIZE="6"), None),
        (task(1, LOCAL_WORLD_SIZE="6"), None),  # left in the shell by something else
        (OPEN_MPI, "2"),
    ],
)
def test_ranks_of_srun_and_mpirun_share_the_cores_of_their_node(said: dict[str, str], ranks: str | None) -> None:
    """Only `deepspeed` and `torchrun` said how many there are: others took all cores each."""
    world = dict(said)
    launchers.adopt(world)
    assert world.get("LOCAL_WORLD_SIZE") == ranks
    assert rank_environment.threads_of_a_rank(world, 96) == (None if ranks is None else 96 // int(ranks))


def test_another_step_and_another_attempt_meet_at_other_ports() -> None:
    worlds = [task(0), task(0, SLURM_STEP_ID="1"), task(0, SLURM_RESTART_COUNT="1"), task(0, SLURM_JOB_ID="78")]
    for world in worlds:
        launchers.adopt(world)
    assert len({world["MASTER_PORT"] for world in worlds}) == 4
    own = task(0, MASTER_PORT="4321", MASTER_ADDR="here")
    launchers.adopt(own)
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("here", "4321")


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-012,3],m1", "gpu007"),
        ("a-b1,c2", "a-b1"),
        ("r[1-2]n[03,05]", "r1n03"),
        ("n[4,6]-ib,x", "n4-ib"),
        ("", ""),
    ],
)
def test_the_first_node_of_a_list(names: str, first: str) -> None:
    assert launchers.first_host(names) == first


def test_several_nodes_meet_at_the_first_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where `srun` was called: that may be a login node."""
    known = {"n3"}
    monkeypatch.setattr(launchers, "_is_known", lambda host: host in known)
    monkeypatch.setattr(launchers, "_node_address", lambda name: "10.0.0.3")
    spread = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99"}
    for reachable in ("n3", "10.0.0.3", "10.0.0.99"):
        known.clear()
        known.add(reachable)
        world = task(1, **spread)
        launchers.adopt(world)
        assert world["MASTER_ADDR"] == reachable
    known.clear()
    with pytest.raises(ConfigError, match=r"address of n3 cannot be found.*Set MASTER_ADDR"):
        launchers.adopt(task(1, **spread))


@pytest.mark.parametrize("shell", ["batch", "salloc", "interactive step", "one task", "nothing"])
def test_a_process_that_nobody_started_with_others_waits_for_none(
    shell: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = {
        "batch": {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"},
        "salloc": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},
        "interactive step": task(0, SLURM_STEP_ID=str(0xFFFFFFFA)),
        "one task": task(0, SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1"),
        "nothing": {},
    }[shell]
    before = dict(world)
    # A leftover of another program, too.
    world["WORLD_SIZE"] = "8"
    assert launchers.adopt(world).world_size == launchers.world_size(world) == 1
    assert world == before, "neither RANK nor the WORLD_SIZE that was left in the shell"
    assert "WORLD_SIZE=8" in caplog.text


def test_a_shell_of_srun_pty_is_no_task_but_the_steps_it_starts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_has_terminal", lambda: True)
    assert launchers.adopt(task(0, SLURM_PTY_PORT="4000")).world_size == 1
    monkeypatch.setattr(launchers, "_has_terminal", lambda: False)
    assert launchers.adopt(task(0, SLURM_PTY_PORT="4000", SLURM_STEP_ID="1")).world_size == 2


def test_a_task_that_says_nothing_of_its_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_PROCID: is 1.*Start the processes with"):
        launchers.adopt({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"})


def test_mpirun_on_one_node_and_inside_of_slurm() -> None:
    """mpirun starts its helpers with srun, whose variables its processes inherit."""
    for outer in ({}, task(0, SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1")):
        world = outer | OPEN_MPI
        place = launchers.adopt(world)
        assert (place.rank, place.world_size, world["LOCAL_RANK"], world["MASTER_ADDR"]) == (1, 2, "1", "127.0.0.1")


def test_mpirun_on_several_nodes_needs_an_address() -> None:
    spread = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(ConfigError, match="mpirun -x MASTER_ADDR"):
        launchers.adopt(dict(spread))
    assert launchers.adopt(spread | {"MASTER_ADDR": "h"}).rank == 1


def test_pmi_of_hydra_and_of_srun() -> None:
    hydra = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
    assert launchers.adopt(dict(hydra)).local_rank == 3
    by_srun = launchers.adopt(task(1, PMI_RANK="1", PMI_SIZE="2"))
    assert (by_srun.rank, by_srun.world_size, by_srun.local_rank) == (1, 2, 1)
    with pytest.raises(ConfigError, match="LOCAL_RANK: is not set"):
        launchers.adopt({"PMI_RANK": "0", "PMI_SIZE": "2"})


def test_what_torch_launchers_say_counts_before_slurm() -> None:
    world = task(0) | TORCHRUN
    assert launchers.adopt(world).rank == 1
    assert {name: world[name] for name in TORCHRUN} == TORCHRUN


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: is not set.*unset RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT: missing.*unset RANK WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT: missing"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK: is 2, but WORLD_SIZE is 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: is 'x', no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: is '-1'"),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_PROCID: is 3"),
    ],
)
def test_variables_that_contradict_each_other_are_refused_with_the_fix(left: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        launchers.adopt(left)


def test_a_world_of_one_left_in_the_shell_is_one_process() -> None:
    world = {"RANK": "0", "WORLD_SIZE": "1"}
    launchers.adopt(world)
    assert "RANK" not in world
    assert "WORLD_SIZE" not in world


def test_tasks_that_see_one_gpu_each_take_their_first() -> None:
    for visible, expected in (("3", "0"), ("GPU-1a2b", "0"), ("2,3", "1")):
        world = task(1, CUDA_VISIBLE_DEVICES=visible)
        launchers.adopt(world)
        assert world["LOCAL_RANK"] == expected
        assert launchers.number_on_node(world) == 1


def test_a_taken_port_is_one_line_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        world = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, str(ROOT / "d2v_scale/train.py"), "--local-rank=0", f"--run_dir={tmp_path}"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu"} | world
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"Port {port} " in line
    assert "--master_port" in line
    assert "Traceback" not in done.stderr

"""Restarts over several nodes and spare nodes, under the real templates on a real Slurm of three virtual nodes."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, wait_until
from jobs import STAND_IN, Job, Workplace

from d2v_scale import errors

pytestmark = pytest.mark.slurm

# Lost nodes are lost soon, and what is proved is the same.
SOON = {"D2V_SCALE_LOST_NODE_S": "10"}
NO_PREFLIGHT = {"D2V_SCALE_PREFLIGHT": "0"}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def three(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("three"), nodes=3) as larger:
        larger.env = cluster.env | SOON | {"SLURM_CONF": larger.env["SLURM_CONF"], "SBATCH_GPUS_PER_NODE": "1"}
        yield larger


@pytest.fixture
def submit(three: Cluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A job of the stand-in on two nodes and a spare one, from a place of its own."""
    place = Workplace(three, tmp_path / "repository", STAND_IN, REPOSITORY)

    def call(*arguments: str, **options: Any) -> Job:
        given = ("--spares=1", "--step_seconds=0.2", *arguments)
        return place.submit("pretrain_base.sh", *given, options=("--nodes=3", "--no-kill"), **options)

    yield call
    place.close()


def the_loss(steps: int) -> float:
    loss = 0.0
    for step in range(steps):
        loss = 0.9 * loss + (step * 7919) % 101
    return loss


def assert_whole(job: Job, steps: int) -> None:
    """Every step made, the last as in an undisturbed run, and the job not requeued."""
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert (job.status.outcome, job.status.step) == ("done", steps)
    last = job.records()[-1]
    assert (last["step"], last["loss"]) == (steps, pytest.approx(the_loss(steps)))
    assert job.cluster.job(job.id)["Restarts"] == "0"


def test_a_spare_takes_the_place_of_a_node_whose_launcher_is_gone(submit: Callable[..., Job]) -> None:
    """After a crash, from which all nodes recover where they are."""
    job = submit("--optim.max_steps=150", env=NO_PREFLIGHT)
    job.wait_for_step(3)
    os.kill(job.pids("train.py")[1], signal.SIGKILL)
    wait_until(lambda: len(job.attempts) == 1, 60, job.story())
    wait_until(lambda: len(job.pids("train.py")) == 2, 60, job.story())
    os.kill(job.launchers()["n2"], signal.SIGKILL)
    assert_whole(job, 150)
    crash, lost, end = job.attempts
    assert (crash.exit_code, lost.exit_code, end.exit_code) == (errors.EXIT_LOST_PEER, errors.EXIT_LOST_PEER, 0)
    assert lost.reason.startswith("n2: its launcher or the node is gone")
    assert job.status.excluded == {"n2": "its launcher or the node is gone"}
    assert "the launchers have excluded n2" in job.output.read_text()


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_node_that_goes_down(submit: Callable[..., Job], three: Cluster) -> None:
    job = submit("--optim.max_steps=100", env=NO_PREFLIGHT)
    job.wait_for_step(3)
    three.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        assert_whole(job, 100)
        assert [*job.status.excluded] == ["n2"]
    finally:
        three.revive("n2")


@pytest.mark.slow
def test_a_stop_is_passed_on_saved_and_requeued(submit: Callable[..., Job]) -> None:
    job = submit("--optim.max_steps=60", env=NO_PREFLIGHT)
    job.wait_for_step(3)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_state("PENDING")
    assert "SIGUSR1" in job.attempts[0].reason
    assert job.attempts[0].step > 0
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.losses()[60] == pytest.approx(the_loss(60))


@pytest.mark.slow
def test_without_a_spare_left_the_job_is_requeued_without_the_node(submit: Callable[..., Job]) -> None:
    job = submit("--optim.max_steps=400", env=NO_PREFLIGHT)
    job.wait_for_step(3)
    for node in ("n3", "n2"):
        os.kill(job.launchers()[node], signal.SIGKILL)
    job.wait_for_state("PENDING")
    assert job.status.exit_code == errors.EXIT_REQUEUE
    assert job.status.reason == "n2: its launcher or the node is gone; no spare node is left of 1"
    wait_until(lambda: "excluded n2,n3" in job.output.read_text(), 30, job.story())
    assert job.cluster.job(job.id)["ExcNodeList"] == "n2,n3"


@pytest.mark.slow
def test_a_node_that_preflight_refuses_is_replaced_at_once(three: Cluster, tmp_path: Path) -> None:
    place = Workplace(three, tmp_path / "repository", STAND_IN, REPOSITORY)
    preflight = place.dir / "d2v_scale/running/preflight.py"
    sound = "found.problems += device_problems(local_rank)"
    assert sound in preflight.read_text()
    broken = sound + ' + (["cuda:0 does not compute"] if node == "n2" else [])'
    preflight.write_text(preflight.read_text().replace(sound, broken))
    options = ("--nodes=3", "--no-kill")
    job = place.submit("pretrain_base.sh", "--spares=1", "--optim.max_steps=3", options=options)
    assert_whole(job, 3)
    assert job.status.excluded == {"n2": "cuda:0 does not compute"}
    place.close()


def processes(word: str) -> list[int]:
    """Process ids whose command line has a word."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if word in (entry / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_job_whose_script_is_lost_with_the_first_node_is_requeued(submit: Callable[..., Job], three: Cluster) -> None:
    job = submit("--optim.max_steps=60", env=NO_PREFLIGHT)
    job.wait_for_step(3)
    lost = [int((three.dir / "run/slurmd.n1.pid").read_text()), job.launchers()["n1"]]
    for daemon in processes(f"[{job.id}.batch]"):
        children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
        lost += [daemon, *(int(child) for child in children)]
    lost += [pid for pid in processes(str(job.run_dir)) if Path(f"/proc/{pid}/comm").read_text() == "srun\n"]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: three.job(job.id).get("Restarts") == "1", 120, job.story(), every_s=1)
    three.start_node("n1")
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert "the job's script ran on n1" in job.attempts[0].reason
    assert job.records()[-1]["loss"] == pytest.approx(the_loss(60))

"""The templates on a real Slurm, with the stand-in for the training program: what the job does in every kind of end."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from jobs import STAND_IN, Job, Program, Workplace

from d2v_scale import command_line, errors

pytestmark = pytest.mark.slurm

TEMPLATES = sorted(path.name for path in (Path(__file__).parents[2] / "slurm").glob("*.sh") if path.name != "lib.sh")
NO_PREFLIGHT = {"D2V_SCALE_PREFLIGHT": "0"}
Make = Callable[[Program], Workplace]


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_accepts_every_template(cluster: Cluster, template: str) -> None:
    path = Path(__file__).parents[2] / "slurm" / template
    done = subprocess.run(
        ["sbatch", "--test-only", "--nodes=2", str(path)], env=cluster.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_hold_directives_and_little_else(template: str) -> None:
    text = (Path(__file__).parents[2] / "slurm" / template).read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 8, lines
    assert "#SBATCH --signal=B:USR1@" in text or template in ("eval.sh", "make_shards.sh")


def test_what_templates_name_is_there_and_fine_tuning_has_a_task() -> None:
    for template in TEMPLATES:
        text = (Path(__file__).parents[2] / "slurm" / template).read_text()
        for recipe, deepspeed in re.findall(r"^train (\w+) (\w+\.json)", text, re.MULTILINE):
            assert (command_line.RECIPES / f"{recipe}.yaml").is_file()
            assert (Path(__file__).parents[2] / "ds_configs" / deepspeed).is_file()
            tuned = command_line.parse(["--recipe", recipe])[0].task is not None
            assert tuned == (template == "finetune.sh")


@pytest.mark.slow
@pytest.mark.parametrize("preflight", ["0", "1"])
def test_sbatch_export_of_a_list_reaches_the_ranks_whole(workplace: Make, preflight: str) -> None:
    """SLURM_EXPORT_ENV, which sbatch leaves behind, had `srun` give the ranks no PATH: execve(): bash."""
    place = workplace(STAND_IN)
    names = ("SLURM_CONF", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "D2V_SCALE_MIN_FREE_GB")
    listed = {name: place.cluster.env[name] for name in names}
    activate = place.dir / "activate"
    activate.write_text(f"export PATH={place.cluster.env['PATH']}\n")
    listed |= {"D2V_SCALE_ACTIVATE": str(activate), "D2V_SCALE_PREFLIGHT": preflight}
    export = "--export=" + ",".join(f"{name}={value}" for name, value in listed.items())
    job = place.submit("pretrain_base.sh", "--optim.max_steps=2", options=(export,))
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.status.outcome == "done"


@pytest.mark.slow
def test_fine_tuning_starts_from_its_first_argument(workplace: Make) -> None:
    job = workplace(STAND_IN).submit("finetune.sh", "runs/pretrained", "--optim.max_steps=3", env=NO_PREFLIGHT)
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert "--init_from runs/pretrained" in job.story()


@pytest.mark.slow
def test_usr1_saves_requeues_and_continues(workplace: Make) -> None:
    """Also: the requeued job runs the code it started with, and the record has no gaps and no repeats."""
    place = workplace(STAND_IN)
    job = place.submit("pretrain_base.sh", "--optim.max_steps=30", "--step_seconds=0.4")
    job.wait_for_step(2)
    (place.dir / "d2v_scale/train.py").write_text("raise SystemExit('edited since')\n")
    place.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_state("PENDING")
    assert job.status.outcome == "requeue"
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert (job.status.outcome, job.status.step) == ("done", 30)
    losses = job.losses()
    expected = 0.0
    for step in range(30):
        expected = 0.9 * expected + (step * 7919) % 101
    assert losses[30] == pytest.approx(expected)
    assert [attempt.exit_code for attempt in job.attempts] == [errors.EXIT_REQUEUE, errors.EXIT_DONE]
    assert "SIGUSR1" in job.attempts[0].reason


def test_bad_configuration_is_not_requeued(workplace: Make) -> None:
    job = workplace(STAND_IN).submit("pretrain_large.sh", "--fail=2")
    assert job.wait_for_end() == "FAILED"
    assert [attempt.exit_code for attempt in job.attempts] == [errors.EXIT_BAD_INPUT]
    assert "not requeued" in job.output.read_text()


@pytest.mark.slow
def test_a_finished_run_that_somebody_requeues_does_not_train_again(workplace: Make) -> None:
    place = workplace(STAND_IN)
    job = place.submit("pretrain_base.sh", "--optim.max_steps=3", env=NO_PREFLIGHT)
    assert job.wait_for_end() == "COMPLETED", job.story()
    before = job.records()
    place.cluster.run("scontrol", "requeue", job.id)
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert "this run is finished" in job.output.read_text()
    assert job.records() == before
    assert len(job.attempts) == 1


@pytest.mark.slow
def test_equal_failures_end_after_the_limit(workplace: Make) -> None:
    env = NO_PREFLIGHT | {"D2V_SCALE_MAX_FAILURES": "2"}
    job = workplace(STAND_IN).submit("pretrain_huge.sh", f"--fail={errors.EXIT_DATA_STARVED}", env=env)
    assert job.wait_for_end() == "FAILED"
    assert [attempt.exit_code for attempt in job.attempts] == [errors.EXIT_DATA_STARVED] * 2
    assert "2 equal failures" in job.output.read_text()


@pytest.mark.slow
def test_a_cancelled_job_does_not_come_back(workplace: Make) -> None:
    place = workplace(STAND_IN)
    job = place.submit("pretrain_base.sh", "--optim.max_steps=1000", "--step_seconds=0.2")
    job.wait_for_step(2)
    place.cluster.run("scancel", job.id)
    # Nodes may be idle a while before the job that they had is no longer COMPLETING.
    wait_until(lambda: job.state not in ("RUNNING", "COMPLETING"), 60, job.story())
    wait_until(lambda: place.cluster.idle() == set(place.cluster.nodes), 60, job.story())
    time.sleep(3)
    assert job.state == "CANCELLED"


@pytest.mark.slow
def test_preemption_saves_and_continues(workplace: Make) -> None:
    place = workplace(STAND_IN)
    job = place.submit("pretrain_base.sh", "--optim.max_steps=40", "--step_seconds=0.4")
    job.wait_for_step(2)
    urgent = place.submit("pretrain_base.sh", "--optim.max_steps=2", options=("--partition=urgent",), env=NO_PREFLIGHT)
    assert urgent.wait_for_end() == "COMPLETED", urgent.story()
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert len(job.losses()) == 40
    assert [attempt.exit_code for attempt in job.attempts] == [errors.EXIT_REQUEUE, errors.EXIT_DONE], job.story()


@pytest.mark.slow
def test_time_limit_requeues(workplace: Make) -> None:
    """The limit is one minute: Slurm's signal comes at once, or the ranks' own deadline stops them."""
    place = workplace(STAND_IN)
    options = ("--time=1", "--signal=B:USR1@10")
    job = place.submit(
        "pretrain_base.sh",
        "--optim.max_steps=100",
        "--step_seconds=0.6",
        options=options,
        env={"D2V_SCALE_PREFLIGHT": "0"},
    )
    job.wait_for_step(1)
    job.wait_for_state("PENDING", timeout_s=110)
    assert job.status.outcome == "requeue"
    assert job.attempts[0].step > 0


@pytest.mark.slow
def test_requeue_of_one_array_element_leaves_the_others_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The element whose number is the array's own. Also: every element has a directory of its own, and the
    repository's path may hold a space."""
    place = Workplace(cluster, tmp_path / "my repository", STAND_IN, Path(__file__).parents[2])
    (tmp_path / "elsewhere").mkdir()
    try:
        command = ["sbatch", "--parsable", "--nodes=1", "--array=0-1", f"--output={tmp_path}/%A_%a.out"]
        command += [str(place.dir / "slurm/sweep.sh"), "--optim.max_steps=60", "--step_seconds=1"]
        env = NO_PREFLIGHT | {"D2V_SCALE_RUNS": str(place.dir / "runs")}
        array = cluster.run(*command, env=env, cwd=tmp_path / "elsewhere").strip()
        for index in range(2):
            run_dir = place.dir / "runs" / f"d2v-sweep-{array}_{index}"
            place.jobs.append(Job(cluster, f"{array}_{index}", run_dir, tmp_path / f"{array}_{index}.out"))
        for job in place.jobs:
            job.wait_for_step(2)
        stopped, other = sorted(place.jobs, key=lambda job: cluster.job(job.id)["JobId"] != array)
        assert cluster.job(stopped.id)["JobId"] == array
        cluster.run("scancel", "--batch", "--signal=USR1", stopped.id)
        stopped.wait_for_state("PENDING")
        assert other.state == "RUNNING", other.story()
        for job in (stopped, other):
            assert job.wait_for_end() == "COMPLETED", job.story()
            assert len(job.losses()) == 60
        assert [attempt.exit_code for attempt in stopped.attempts] == [errors.EXIT_REQUEUE, errors.EXIT_DONE]
        assert [attempt.exit_code for attempt in other.attempts] == [errors.EXIT_DONE], other.story()
    finally:
        place.close()


@pytest.mark.slow
def test_stopped_rank_is_named_and_the_job_continues(workplace: Make) -> None:
    place = workplace(STAND_IN)
    job = place.submit(
        "pretrain_base.sh",
        "--optim.max_steps=40",
        "--step_seconds=0.3",
        env={"WATCHDOG_S": "8", "D2V_SCALE_PREFLIGHT": "0"},
    )
    job.wait_for_step(3)
    os.kill(job.pids("train.py")[3], signal.SIGSTOP)
    job.wait_for_state("PENDING")
    assert job.attempts[0].exit_code == errors.EXIT_REQUEUE
    assert "is stopped (SIGSTOP)" in job.attempts[0].reason
    assert "rank 3" in job.attempts[0].reason
    assert job.wait_for_end() == "COMPLETED", job.story()


@pytest.mark.slow
def test_bad_node_is_named_and_excluded(cluster: Cluster, tmp_path: Path) -> None:
    """Three nodes, of which the job takes two; n1's device does not compute, so it continues on the others."""
    with Cluster(tmp_path / "cluster", nodes=3) as larger:
        larger.env = cluster.env | {"SLURM_CONF": larger.env["SLURM_CONF"]}
        place = Workplace(larger, tmp_path / "repository", STAND_IN, Path(__file__).parents[2])
        preflight = place.dir / "d2v_scale/running/preflight.py"
        sound = "found.problems += device_problems(local_rank)"
        broken = sound + ' + (["cuda:0 does not compute"] if node == "n1" else [])'
        assert sound in preflight.read_text()
        preflight.write_text(preflight.read_text().replace(sound, broken))
        job = place.submit("pretrain_base.sh", "--optim.max_steps=3")
        assert job.wait_for_end() == "COMPLETED", job.story()
        assert job.attempts[0].exit_code == errors.EXIT_REQUEUE
        assert "n1: cuda:0 does not compute" in job.attempts[0].reason
        assert larger.job(job.id)["ExcNodeList"] == "n1"
        assert larger.job(job.id)["NodeList"] == "n[2-3]"
        place.close()

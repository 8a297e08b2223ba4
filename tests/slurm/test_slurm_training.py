"""The training program under the real templates: every interruption ends with the weights of an uninterrupted run."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from jobs import ENDED, Job, Program, Workplace

from d2v_scale import errors

pytestmark = pytest.mark.slurm

STEPS = 60
EVERY = 20
TRAINING = Program(
    (
        "--recipe=demo_vision",
        f"--stop_at={STEPS}",
        f"--checkpoint.every={EVERY}",
        "--tracking.log_every=1",
        "--tracking.enabled=false",
        "--tracking.plot_every=null",
        "--evaluation.train=null",
        "--evaluation.test=null",
    )
)
NO_PREFLIGHT = {"D2V_SCALE_PREFLIGHT": "0"}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """One place for all jobs here: they share the demo shards, which the first one writes."""
    made = Workplace(cluster, tmp_path_factory.mktemp("training") / "repository", TRAINING, REPOSITORY)
    yield made
    made.close()


@pytest.fixture(scope="module")
def uninterrupted(place: Workplace) -> Job:
    """The run that all others are compared with: 2 nodes x 2 ranks, ZeRO-1."""
    job = place.submit("pretrain_base.sh")
    assert job.wait_for_end() == "COMPLETED", job.story()
    return job


@pytest.fixture
def submit(place: Workplace, uninterrupted: Job) -> Iterator[Callable[..., Job]]:
    """Submits one more run of the same recipe and seed; cancels it if the test leaves it behind."""
    started: list[Job] = []

    def start(*arguments: str, **options) -> Job:
        started.append(place.submit("pretrain_base.sh", *arguments, **options))
        return started[-1]

    yield start
    place.close()


def assert_same_run(job: Job, uninterrupted: Job) -> None:
    """Ended, with no step missing, repeated or different from the run that nothing happened to."""
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert (job.status.outcome, job.status.step) == ("done", STEPS)
    assert job.losses() == uninterrupted.losses()
    assert job.weights() == uninterrupted.weights()


def test_normal_end(uninterrupted: Job) -> None:
    assert (uninterrupted.status.outcome, uninterrupted.status.step) == ("done", STEPS)
    assert len(uninterrupted.losses()) == STEPS
    assert [attempt.exit_code for attempt in uninterrupted.attempts] == [errors.EXIT_DONE]
    (report,) = uninterrupted.run_dir.glob("logs/*/preflight.json")
    assert json.loads(report.read_text())["bad_nodes"] == {}
    weights = uninterrupted.weights()
    assert len(weights) == 4, f"one file a rank: {weights}"


def train_plainly(place: Workplace, run_dir: Path) -> list[str]:
    """`python train.py`, without a launcher, for three steps."""
    steps = ("--stop_at=3", "--checkpoint.every=3", f"--run_dir={run_dir}")
    # Other tests of this process may have formed a world of one, whose variables Slurm hands on.
    without = [f"--unset={name}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    return ["env", *without, "python", str(place.dir / "d2v_scale/train.py"), *TRAINING.arguments, *steps]


def assert_one_run(run_dir: Path, ranks: int) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    assert len([*run_dir.glob("checkpoints/*/rank-*.safetensors")]) == ranks


def test_srun_without_a_launcher_is_one_world(place: Workplace, tmp_path: Path) -> None:
    """`srun -n 2 python train.py` trained twice into one directory."""
    command = ("srun", "-N2", "-n2", *train_plainly(place, tmp_path / "run"))
    place.cluster.run(*command, cwd=place.dir, timeout=300)
    assert_one_run(tmp_path / "run", ranks=2)


@pytest.mark.slow
def test_one_process_of_a_batch_script_with_several_tasks_waits_for_no_other(place: Workplace, tmp_path: Path) -> None:
    script = shlex.join(train_plainly(place, tmp_path / "run"))
    batch = ("sbatch", "--wait", "-n4", f"--output={tmp_path}/out", f"--wrap={script}")
    place.cluster.run(*batch, cwd=place.dir, timeout=300)
    assert_one_run(tmp_path / "run", ranks=1)


def test_usr1_and_a_node_that_goes_down_end_with_the_same_weights(
    submit: Callable[..., Job], uninterrupted: Job
) -> None:
    """One run, asked to stop before its first regular checkpoint and struck after it: every attempt costs a launch."""
    job = submit(env=NO_PREFLIGHT)
    job.wait_for_step(EVERY // 2)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_state("PENDING")
    job.wait_for_state("RUNNING")
    job.wait_for_step(EVERY + 3)
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.wait_for_state("PENDING", "COMPLETING")
    job.cluster.revive("n2")
    assert_same_run(job, uninterrupted)
    first, last = job.attempts[0], job.attempts[-1]
    assert (first.exit_code, last.exit_code) == (errors.EXIT_REQUEUE, errors.EXIT_DONE)
    assert "SIGUSR1" in first.reason
    assert first.step not in (-1, EVERY), "the stop made a checkpoint of its own"


@pytest.mark.slow
def test_preemption_ends_with_the_same_weights(
    submit: Callable[..., Job], place: Workplace, uninterrupted: Job
) -> None:
    job = submit()
    job.wait_for_step(EVERY // 2)
    urgent = place.submit("pretrain_base.sh", options=("--partition=urgent",), env=NO_PREFLIGHT)
    assert urgent.wait_for_end() == "COMPLETED", urgent.story()
    assert_same_run(job, uninterrupted)
    assert [attempt.exit_code for attempt in job.attempts] == [errors.EXIT_REQUEUE, errors.EXIT_DONE]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_killed_rank_ends_with_the_same_weights(submit: Callable[..., Job], uninterrupted: Job, rank: int) -> None:
    job = submit(env=NO_PREFLIGHT)
    job.wait_for_step(EVERY + 3)
    os.kill(job.pids("train.py")[rank], signal.SIGKILL)
    assert_same_run(job, uninterrupted)
    assert job.attempts[0].exit_code == errors.EXIT_LOST_PEER, job.story()


@pytest.mark.slow
def test_stopped_rank_is_named_and_ends_with_the_same_weights(submit: Callable[..., Job], uninterrupted: Job) -> None:
    job = submit("--hang_limit_minutes=0.5", env=NO_PREFLIGHT)
    job.wait_for_step(EVERY + 3)
    os.kill(job.pids("train.py")[2], signal.SIGSTOP)
    job.wait_for_state("PENDING")
    assert "rank 2" in job.attempts[0].reason
    assert "is stopped (SIGSTOP)" in job.attempts[0].reason
    assert_same_run(job, uninterrupted)


@pytest.mark.slow
def test_mistake_in_the_recipe_is_not_requeued(place: Workplace) -> None:
    job = place.submit("pretrain_base.sh", "--optim.learning_rate=1")
    assert job.wait_for_end() == "FAILED"
    assert [attempt.exit_code for attempt in job.attempts] == [errors.EXIT_BAD_INPUT]


@pytest.mark.slow
def test_an_array_trains_every_rate_in_its_own_directory(place: Workplace) -> None:
    output = place.dir / "%A_%a.out"
    command = ["sbatch", "--parsable", "--nodes=1", "--array=0-1", f"--output={output}", "slurm/sweep.sh"]
    array = place.cluster.run(*command, *TRAINING.arguments, env=NO_PREFLIGHT, cwd=place.dir).strip()
    elements = [
        Job(place.cluster, f"{array}_{index}", place.dir / f"runs/d2v-sweep-{array}_{index}", Path(f"{array}_{index}"))
        for index in range(2)
    ]
    wait_until(lambda: all(one.attempts for one in elements), 900, "".join(one.story() for one in elements))
    assert [one.status.outcome for one in elements] == ["done", "done"]
    first, second = (one.losses() for one in elements)
    assert len(first) == len(second) == STEPS
    assert first[1] == second[1]
    assert first[STEPS] != second[STEPS], "the elements have different rates"


@pytest.mark.slow
def test_the_teacher_of_a_running_job_is_measured_by_another_job(submit: Callable[..., Job], place: Workplace) -> None:
    job = submit("--stop_at=20000", "--optim.max_steps=20000", options=("--nodes=1",), env=NO_PREFLIGHT)
    job.wait_for_step(EVERY + 3)
    folder, result = place.dir / "exports/now", place.dir / "result.json"
    export = [sys.executable, str(place.dir / "tools/export.py"), str(job.run_dir), str(folder), "--to", "safetensors"]
    subprocess.run(export, env=place.cluster.env, cwd=place.dir, check=True, timeout=300)
    shards = ("--data", "demo_data/vision/train.index.json", "--test", "demo_data/vision/test.index.json")
    command = ("sbatch", "--parsable", "--nodes=1", f"--output={place.dir}/evaluation.out", "slurm/eval.sh")
    arguments = (str(folder), "--task", "knn", *shards, "--limit", "300", "--out", str(result))
    evaluation = place.cluster.run(*command, *arguments, cwd=place.dir).strip()
    wait_until(lambda: place.cluster.state(evaluation) in ENDED, 600, job.story())
    assert job.state == "RUNNING", job.story()
    assert place.cluster.state(evaluation) == "COMPLETED", (place.dir / "evaluation.out").read_text()
    measured = json.loads(result.read_text())
    assert measured["weights"] == "teacher"
    assert measured["step"] % EVERY == 0
    assert all(0.1 < accuracy <= 1 for accuracy in measured["accuracy"].values()), measured
    events = (job.run_dir / "mlflow_events.jsonl").read_text()
    assert '"event": "evaluation"' in events, "the run's record has the result"


@pytest.fixture
def small_disk(place: Workplace) -> Iterator[Path]:
    """A file system of its own under the next job's run directory, for two checkpoints and a half."""
    run_dir = place.dir / "runs" / f"pretrain_base-{len(place.jobs)}"
    run_dir.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(run_dir)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield run_dir
    place.close()
    subprocess.run(["umount", "--lazy", str(run_dir)], check=True)


@pytest.mark.slow
def test_a_full_shared_directory_costs_a_checkpoint_and_no_step(
    place: Workplace, uninterrupted: Job, small_disk: Path
) -> None:
    """Full from step 23 on, with a checkpoint due at 40; there is room again before the end."""
    job = place.submit("pretrain_base.sh", env=NO_PREFLIGHT)
    assert job.run_dir == small_disk
    job.wait_for_step(EVERY + 3)
    fill(small_disk / "ballast")
    log = small_disk / "logs" / "rank-00000.log"
    wait_until(lambda: not job.pids("train.py") or record_stands_still(job), 120, job.story())
    (small_disk / "ballast").unlink()
    assert_same_run(job, uninterrupted)
    assert [attempt.exit_code for attempt in job.attempts] == [errors.EXIT_DONE], job.story()
    told = log.read_text() + "".join(path.read_text() for path in small_disk.glob("logs/*/node-*.log"))
    assert "takes no lines" in told
    assert job.losses() == uninterrupted.losses()


@pytest.mark.slow
def test_a_shared_directory_that_stays_full_ends_as_a_failure_that_says_so(place: Workplace, small_disk: Path) -> None:
    job = place.submit("pretrain_base.sh", env=NO_PREFLIGHT)
    job.wait_for_step(EVERY + 3)
    fill(small_disk / "ballast")
    assert job.wait_for_end() == "FAILED", job.story()
    assert job.status.exit_code == 1
    assert "the last checkpoint could not be written" in job.status.reason
    told = job.output.read_text()
    assert job.status.reason in told
    assert "not requeued" in told


def fill(path: Path) -> None:
    """Take all the room there is."""
    with path.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(1 << 16))
    with path.open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(1))


def record_stands_still(job: Job) -> bool:
    """The run goes on, but its record gets no more lines."""
    before = len(job.records())
    time.sleep(1)  # many steps, and not all that are left
    return len(job.records()) == before


@pytest.mark.slow
def test_mlflow_server_that_is_away_does_not_matter(submit: Callable[..., Job], uninterrupted: Job) -> None:
    job = submit(env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "D2V_SCALE_PREFLIGHT": "0"})
    assert_same_run(job, uninterrupted)

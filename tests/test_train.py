"""The training loop of the program, run in this process."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import host_syncs
import pytest
from small_shards import image_samples

import d2v_scale.train as train
from d2v_scale import command_line, errors
from d2v_scale.parallel import groups
from d2v_scale.pretraining import program
from d2v_scale.process.signals import Agreement, StopFlag
from d2v_scale.process.status import read_status
from d2v_scale.process.watchdog import Watchdog
from d2v_scale.running import loop, run_directory
from d2v_scale.shards.writing import write_set


@pytest.mark.parametrize("stage", [1, 3])
def test_no_step_between_log_steps_waits_for_the_device(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "zero.json"
    config.write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    keys = ["recipe=demo_vision", f"deepspeed_config={config}", "stop_at=8", "data.workers=0", "tracking.log_every=4"]
    keys += ["evaluation.train=null", "evaluation.test=null", "global_batch_size=8"]
    recipe, options = command_line.parse([f"--{key}" for key in keys])
    topology = groups.single_process()
    run = program.build(recipe, options, train.configure(recipe), topology, tmp_path)
    logged: list[bool] = []
    with host_syncs.recorded(monkeypatch) as syncs, Watchdog(tmp_path, rank=0, world_size=1, limit_s=600) as watchdog:

        def due(step: int, last_step: int) -> bool:
            logged.append(step == 1 or step == last_step or step % 4 == 0)
            # In the first two steps ZeRO-3 compares the order of modules between ranks.
            syncs.ignoring = logged[-1] or step <= 3
            return logged[-1]

        monkeypatch.setattr(run.tracker, "due", due)
        assert loop.train(run, StopFlag(), Agreement(), watchdog) is None
    run.teacher.destroy()
    run.student.destroy()
    assert logged == [True, False, False, True, False, False, False, True]
    assert not syncs.found, syncs


def test_evaluations_pictures_and_checkpoints_are_in_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["recipe=demo_vision", "stop_at=2", "data.workers=0", "tracking.log_every=1", "global_batch_size=8"]
    keys += ["evaluation.every=1", "tracking.plot_every=1", "checkpoint.every=1"]
    recipe, options = command_line.parse([f"--{key}" for key in keys])
    run = program.build(recipe, options, train.configure(recipe), groups.single_process(), tmp_path)
    for name in ("evaluate", "draw_pictures"):
        monkeypatch.setattr(run, name, lambda: time.sleep(1.0))
    monkeypatch.setattr(loop, "save", lambda _: time.sleep(1.0))
    records: list[dict[str, float]] = []
    monkeypatch.setattr(run.tracker, "log", lambda step, samples, values: records.append(values))
    with Watchdog(tmp_path, rank=0, world_size=1, limit_s=600) as watchdog:
        assert loop.train(run, StopFlag(), Agreement(), watchdog) is None
    run.teacher.destroy()
    run.student.destroy()
    # Three seconds lie between the first and the second step.
    assert records[1]["step_seconds"] < 2
    assert records[1]["samples_per_second"] > 4


def test_each_source_of_a_mixture_has_its_figures_at_every_log_point_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is read rarely had figures only where a log point fell on its step."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "often", "train", "image", image_samples(48), per_shard=24)
    write_set(tmp_path / "rare", "train", "image", image_samples(48), per_shard=24)
    sources = [{"shards": str(tmp_path / name / "train.index.json"), "name": name} for name in ("often", "rare")]
    sources[0]["weight"] = 5.0  # type: ignore[assignment]
    keys = ["recipe=demo_vision", "data.workers=0", "tracking.log_every=4", "global_batch_size=8"]
    keys += ["evaluation.train=null", "evaluation.test=null", "tracking.plot_every=null", "checkpoint.every=12"]
    keys += [f"data.sources={json.dumps(sources)}", "objective.health.after=0", "objective.health.min_target_std=100"]
    keys += ["objective.health.patience=99"]
    recipe, options = command_line.parse([f"--{key}" for key in keys])
    topology = groups.single_process()
    states: list[dict[str, dict[str, float]]] = []
    records: list[dict[str, float]] = []
    for stop_at in (12, 16):
        options.stop_at = stop_at
        run = program.build(recipe, options, train.configure(recipe), topology, tmp_path)
        states.append(run.observer.health_state())  # type: ignore[arg-type]
        monkeypatch.setattr(run.tracker, "log", lambda step, samples, values: records.append({"step": step, **values}))
        with Watchdog(tmp_path, rank=0, world_size=1, limit_s=600) as watchdog:
            assert loop.train(run, StopFlag(), Agreement(), watchdog) is None
        states.append(run.observer.health_state())  # type: ignore[arg-type]
        assert run.writer.finish()
        run.teacher.destroy()
        run.student.destroy()
    logged = [record for record in records if "loss" in record]
    assert [record["step"] for record in logged] == [1, 4, 8, 12, 16]
    seen = [{name.partition("/")[2] for name in record if name.startswith("target_std/")} for record in logged]
    first = next(k for k, names in enumerate(seen) if names == {"often", "rare"})
    assert first <= 3
    assert all(names == {"often", "rare"} for names in seen[first:])
    # As it was saved, so it goes on; and it was bad at fewer log points than the other.
    assert states[0]["unhealthy"] == {}
    assert states[2] == states[1]
    unhealthy = states[3]["unhealthy"]
    assert 0 < unhealthy["target_std/rare"] <= unhealthy["target_std/often"]


@pytest.mark.parametrize(
    ("program", "needless"),
    [
        ("import d2v_scale.train", "mlflow transformers matplotlib pandas sklearn scipy torchaudio deepspeed"),
        (
            "from d2v_scale.parallel import groups; groups.single_process(); import deepspeed",
            "mlflow transformers matplotlib pandas sklearn torchaudio",
        ),
    ],
)
def test_starting_imports_nothing_that_it_may_not_need(program: str, needless: str) -> None:
    listing = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{program}; {listing}"], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "d2v_scale" in loaded
    assert not loaded & set(needless.split())


def test_mlflow_can_be_imported_after_deepspeed() -> None:
    program = "from d2v_scale.parallel import groups; groups.single_process(); import mlflow; print(mlflow.__version__)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)


def test_a_mistake_that_only_another_rank_sees_is_shown_and_outlives_rank_0s_lost_peer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").mkdir()
    logger = logging.getLogger("d2v_scale")
    before = list(logger.handlers)
    run_directory.log_to_file(tmp_path, 1)
    try:
        assert train.failed(errors.DataError("x.tar is missing", "Copy it."), tmp_path, 1) == errors.EXIT_BAD_INPUT
    finally:
        for handler in set(logger.handlers) - set(before):
            logger.removeHandler(handler)
            handler.close()
    assert caplog.messages == ["rank 1: error: x.tar is missing. Copy it."]
    assert "x.tar is missing. Copy it." in (tmp_path / "logs" / "rank-00001.log").read_text()
    assert train.failed(errors.LostPeer("rank 1 stopped answering"), tmp_path, 0) == errors.EXIT_LOST_PEER
    found = read_status(tmp_path)
    assert found is not None
    assert (found.exit_code, found.outcome, found.reason) == (2, "failed", "x.tar is missing. Copy it.")


def test_rank_0_explains_a_mistake_before_there_is_a_run_directory(caplog: pytest.LogCaptureFixture) -> None:
    assert train.failed(errors.ConfigError("model", "has no stem"), None, 0) == errors.EXIT_BAD_INPUT
    assert caplog.messages == ["error: model: has no stem."]

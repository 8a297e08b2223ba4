"""d2v_scale.run_files.run_start: a start that failed before its first step refuses nothing, a run that trained does."""

import json
from pathlib import Path

import pytest
from claimed_runs import CONFIG, claim
from claimed_runs import unlocked as unlocked

from d2v_scale.command_line import Options, parse
from d2v_scale.errors import ConfigError
from d2v_scale.run_files import run_start
from d2v_scale.tracking.events import append_event, earlier_starts
from d2v_scale.tracking.mirror_state import EVENTS_FILE, MirrorState


def commit(run_dir: Path, step: int) -> None:
    marker = run_dir / "checkpoints" / f"step-{step:08d}" / "COMMITTED"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")


def lr(run_dir: Path) -> float:
    return parse(["--resume", str(run_dir)])[0].optim.lr


def test_a_start_that_failed_does_not_refuse_the_corrected_command(tmp_path: Path) -> None:
    claim(tmp_path, "--optim.lr", "0.1")
    claim(tmp_path, "--optim.lr", "0.2")
    assert lr(tmp_path) == 0.2
    claim(tmp_path, "--resume", str(tmp_path), "--optim.lr", "0.3")
    assert lr(tmp_path) == 0.3
    # As far as the evaluation before the first step, and the checkpoint that fine-tuning begins with.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn_accuracy": 0.1}\n')
    commit(tmp_path, 0)
    claim(tmp_path, "--optim.lr", "0.4")
    assert lr(tmp_path) == 0.4
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "recipe_changes.jsonl").exists()


@pytest.mark.parametrize("sign", ["checkpoint", "record", "superseded record"])
def test_a_run_that_took_a_step_is_protected(tmp_path: Path, sign: str) -> None:
    claim(tmp_path, "--optim.lr", "0.1")
    if sign == "checkpoint":
        commit(tmp_path, 1)
    else:
        name = "metrics.jsonl" if sign == "record" else "logs/metrics_superseded.jsonl"
        (tmp_path / name).write_text('{"step": 0, "knn_accuracy": 0.1}\n{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        claim(tmp_path, "--optim.lr", "0.2")
    claim(tmp_path, "--optim.lr", "0.1", "--data.workers", "3")
    assert "data.workers" in (tmp_path / "recipe_changes.jsonl").read_text()


def test_a_run_that_is_to_begin_from_other_weights_goes_on_from_no_copy_of_the_first(tmp_path: Path) -> None:
    """It trained, so that copies may be in memory, and has no checkpoint yet."""
    memory = tmp_path / "checkpoints" / run_start.MEMORY_FILE
    memory.parent.mkdir()
    run_start.note_start(tmp_path, Options(init_from="first"))
    memory.touch()
    run_start.note_start(tmp_path, Options(init_from="first"))
    assert memory.exists()
    run_start.note_start(tmp_path, Options(init_from="second"))
    assert not memory.exists()


def test_a_recipe_that_somebody_keeps_in_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mine\noptim:\n  lr: 0.1\n")
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        claim(tmp_path, "--optim.lr", "0.2")
    assert "mine" in (tmp_path / "recipe.yaml").read_text()


def test_the_same_command_again_goes_on_with_what_the_start_made(tmp_path: Path) -> None:
    """A job that is requeued before its first step."""
    source = tmp_path / "encoder"
    source.mkdir()
    run_dir = tmp_path / "run"
    claim(run_dir, "--init_from", str(source))
    append_event(run_dir, "begin")
    commit(run_dir, 0)
    claim(run_dir, "--init_from", str(source))
    assert (earlier_starts(run_dir), len(list((run_dir / "checkpoints").iterdir()))) == (1, 1)
    assert run_start.began_from(run_dir) == (str(source), False)
    # Other weights: nothing of the first remains.
    other = tmp_path / "other"
    other.mkdir()
    claim(run_dir, "--init_from", str(other))
    assert not list((run_dir / "checkpoints").iterdir())
    assert run_start.began_from(run_dir) == (str(other), False)
    # From scratch after all: a resumption may not begin from the weights of the start that failed.
    claim(run_dir)
    assert run_start.began_from(run_dir) == (None, False)
    assert parse(["--resume", str(run_dir)])[1].init_from is None


def test_the_first_checkpoint_of_fine_tuning_stays_once_its_encoder_is_gone(tmp_path: Path) -> None:
    source = tmp_path / "encoder"
    source.mkdir()
    run_dir = tmp_path / "run"
    claim(run_dir, "--init_from", str(source))
    commit(run_dir, 0)
    source.rmdir()
    claim(run_dir, "--init_from", str(source))
    assert run_start.began_from(run_dir) == (None, False)
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        claim(run_dir, "--init_from", str(source), "--optim.lr", "0.2")
    assert list((run_dir / "checkpoints").iterdir())


def test_the_failed_start_and_the_run_after_it_are_two_runs_in_mlflow(tmp_path: Path) -> None:
    claim(tmp_path)
    append_event(tmp_path, "begin")
    MirrorState(tracking_uri="http://there", job_key="a", run_id="1", generation=3, events_offset=9).save(tmp_path)
    claim(tmp_path, "--data.workers", "3", "--optim.lr", "0.2")
    state = MirrorState.load(tmp_path)
    assert (state.tracking_uri, state.run_id, state.events_offset) == ("http://there", "", 0)
    assert state.job_key not in ("", "a")
    assert state.generation == 4  # a mirror of the failed start that still sends notices
    assert not (tmp_path / EVENTS_FILE).exists()
    assert json.loads((tmp_path / "ds_config.json").read_text()) == CONFIG

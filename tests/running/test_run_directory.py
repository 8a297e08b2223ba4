"""Who may use a run directory, and what it remembers until the first checkpoint."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from d2v_scale import command_line, errors
from d2v_scale.command_line import Options
from d2v_scale.errors import ConfigError, UserError
from d2v_scale.recipe import to_dict
from d2v_scale.run_files import run_start
from d2v_scale.run_files.recipe_file import dump
from d2v_scale.running import run_directory


@pytest.mark.parametrize("kind", [UserError, errors.DataError, errors.CheckpointError])
def test_errors_that_rank_0_sends_arrive_as_they_are(kind: type[UserError]) -> None:
    sent = kind("That is wrong", "Do this.")
    arrived = pickle.loads(pickle.dumps(sent))
    assert (type(arrived), str(arrived)) == (kind, "That is wrong. Do this.")


def test_config_errors_arrive_with_their_key() -> None:
    arrived = pickle.loads(pickle.dumps(ConfigError("optim.lr", "is 0", "Give more.")))
    assert isinstance(arrived, ConfigError)
    assert (str(arrived), arrived.key) == ("optim.lr: is 0. Give more.", "optim.lr")


def test_a_run_that_is_resumed_before_its_first_checkpoint_begins_from_the_same_weights(tmp_path: Path) -> None:
    recipe, options = command_line.parse(["--init_from", str(tmp_path / "source"), "--reset_teacher", "true"])
    (tmp_path / run_start.RECIPE_FILE).write_text(dump(recipe))
    run_start.note_start(tmp_path, options)
    _, resumed = command_line.parse(["--resume", str(tmp_path)])
    assert (resumed.init_from, resumed.reset_teacher) == (str(tmp_path / "source"), True)
    committed = tmp_path / "checkpoints" / "step-00000001" / "COMMITTED"
    committed.parent.mkdir(parents=True)
    committed.write_text(json.dumps({}))
    _, later = command_line.parse(["--resume", str(tmp_path)])
    assert (later.init_from, later.reset_teacher) == (None, False)


def test_resetting_the_teacher_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.parse(["--reset_teacher", "true"])
    assert caught.value.key == "reset_teacher"


def test_other_weights_to_start_from_are_refused_once_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, caplog
) -> None:
    began, other = Options(init_from=str(tmp_path / "a")), Options(init_from=str(tmp_path / "b"))
    run_start.note_start(tmp_path, began)
    run_start.check_same_start(tmp_path, other)
    committed = tmp_path / "checkpoints" / "step-00000001" / "COMMITTED"
    committed.parent.mkdir(parents=True)
    committed.write_text(json.dumps({}))
    # A requeued job gives the same again.
    run_start.check_same_start(tmp_path, began)
    run_start.check_same_start(tmp_path, Options())
    with pytest.raises(ConfigError) as caught:
        run_start.check_same_start(tmp_path, other)
    assert caught.value.key == "init_from"
    assert not caplog.text
    # Half a file, of a node that went down, is none; nor does a later start write what the run did not begin from.
    (tmp_path / run_start.START_FILE).write_text("")
    run_start.check_same_start(tmp_path, other)
    assert "--init_from is not read" in caplog.text
    run_start.note_start(tmp_path, other)
    assert (tmp_path / run_start.START_FILE).read_text() == ""


def test_a_requeue_gives_the_same_link_that_leads_elsewhere_by_now(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "a")
    options = Options(init_from=str(tmp_path / "latest"))
    run_start.note_start(tmp_path, options)
    committed = tmp_path / "checkpoints" / "step-00000001" / "COMMITTED"
    committed.parent.mkdir(parents=True)
    committed.write_text(json.dumps({}))
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(tmp_path / "b")
    run_start.check_same_start(tmp_path, options)


def test_one_world_of_several_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun -n 2 bash -c 'train.py --seed $SLURM_PROCID --run_dir runs/$SLURM_PROCID'` means two runs."""
    seeds = [command_line.parse(["--seed", seed, "--run_dir", f"runs/{seed}"]) for seed in ("0", "1")]
    arguments = [{**to_dict(recipe), "run_dir": options.run_dir} for recipe, options in seeds]

    def gather(everyone: list[dict[str, Any]], mine: dict[str, Any]) -> None:
        everyone[:] = [{**mine, **one} for one in arguments]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    world = SimpleNamespace(rank=0, world_size=2)
    with pytest.raises(ConfigError, match=r"run_dir: is 'runs/1' for rank 1 .* RANK=0 WORLD_SIZE=1"):
        run_directory.claim(*seeds[0], {}, world)

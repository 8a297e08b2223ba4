"""A run that goes on at another resolution keeps what it has learned and what its optimizer knows."""

from pathlib import Path

import pytest
import torch
import yaml
from small_shards import image_samples

import d2v_scale.train as train
from d2v_scale import command_line
from d2v_scale.checkpoint import Checkpoint, write_single
from d2v_scale.checkpoint.other_grid import OtherGrid
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.model.position_tables import PositionTable
from d2v_scale.parallel import groups
from d2v_scale.parallel.shards import TensorSlice
from d2v_scale.pretraining import program
from d2v_scale.process.signals import Agreement, StopFlag
from d2v_scale.process.watchdog import Watchdog
from d2v_scale.running import loop, run_directory
from d2v_scale.running.saving import save
from d2v_scale.shards.writing import write_set

TABLE = "stems.vision.bias.table"
OFF = ("--evaluation.train=null", "--evaluation.test=null", "--tracking.plot_every=null", "--tracking.enabled=false")
SMALL = {
    "name": "small",
    "global_batch_size": 4,
    "model": {
        "vision": {"image_size": 16, "patch_size": 4, "relative_std": 0.5},
        "backbone": {"width": 16, "heads": 2, "ffn": 32, "depth": 2},
        "predictor": {"kind": "linear"},
    },
    "objective": {
        "masking": {"kind": "blockwise", "target_count": 6, "min_block": 2},
        "target": {"tap": "ffn", "top_k_layers": 2, "layer_norm": "instance", "final_norm": "layer"},
    },
    "optim": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 1, "max_steps": 9},
    "data": {"workers": 0},
}


def trained(*arguments: str) -> Checkpoint:
    """Train as far as these arguments say; the checkpoint at the end."""
    recipe, options = command_line.parse([*arguments, *OFF])
    topology = groups.single_process()
    config = train.configure(recipe)
    run_directory.claim(recipe, options, config, topology)
    run = program.build(recipe, options, config, topology, Path(options.run_dir or options.resume or ""))
    with Watchdog(run.directory, rank=0, world_size=1, limit_s=600) as watchdog:
        assert loop.train(run, StopFlag(), Agreement(), watchdog) is None
        save(run)
        assert run.writer.finish()
    run.teacher.destroy()
    run.student.destroy()
    return Checkpoint.open(max((run.directory / "checkpoints").glob("step-*")))


def test_a_run_goes_on_at_another_resolution_with_its_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path, "train", "image", image_samples(16), per_shard=16)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    before = trained("--recipe=small.yaml", "--data=train-*.tar", "--run_dir=a", "--stop_at=2")
    larger = "--model.vision.image_size=24"
    with pytest.raises(ConfigError, match=r"model\.vision\.image_size: 16 there, 24 here.*allow_recipe_change"):
        trained("--resume=a", larger)
    grids = PositionTable((4, 4), offsets=True), PositionTable((6, 6), offsets=True)
    laid = OtherGrid(before, {TABLE: grids})
    held = {}

    def build(*arguments: object) -> program.Run:
        run = built(*arguments)  # type: ignore[arg-type]
        shards = {shard.name: shard for shard in run.student.shards()}
        for name in (TABLE, "blocks.0.attention.qkv.weight"):
            held[name] = [shards[name].weight.clone()]
            held[name] += [shards[name].moment(run.student.optimizer, key).clone() for key in ("exp_avg", "exp_avg_sq")]
        held["teacher"] = [one.values.clone() for one in run.teacher.shards() if one.name == TABLE]
        return run

    built = program.build
    monkeypatch.setattr(program, "build", build)
    after = trained("--resume=a", larger, "--allow_recipe_change=true", "--stop_at=4")
    for name in (TABLE, "blocks.0.attention.qkv.weight"):
        for kind, values in zip(("student", "exp_avg", "exp_avg_sq"), held[name], strict=True):
            assert torch.equal(values, laid.tensor(kind, name).flatten()), (kind, name)
    for values in held["teacher"]:
        assert torch.equal(values, laid.tensor("teacher", TABLE).flatten())
    assert before.tensor("exp_avg", TABLE).abs().sum() > 0
    assert after.shape("student", TABLE) == (11 * 11 + 3, 2)
    assert after.step == 4
    assert after.manifest.state["completed_updates"] == 4
    began = trained("--recipe=small.yaml", "--data=train-*.tar", "--run_dir=b", "--init_from=a", "--stop_at=1")
    assert began.shape("student", TABLE) == before.shape("student", TABLE)  # laid over the smaller grid again


def test_a_table_is_read_in_slices_and_ranges_as_it_is_whole(tmp_path: Path) -> None:
    old, new = PositionTable((3, 4), offsets=True), PositionTable((5, 2), offsets=True)
    table = torch.randn(old.places + 3, 4)
    path = write_single(tmp_path, {"t": table, "w": torch.ones(2, 2), "scalar": torch.ones(())})
    found = OtherGrid(Checkpoint.open(path), {"t": (old, new)})
    whole = found.tensor("student", "t")
    assert torch.equal(whole, old.laid_over(table, new))
    assert found.shape("student", "t") == tuple(whole.shape) == (new.places + 3, 4)
    cut = TensorSlice(1, 1, 2)
    assert torch.equal(found.read("student", "t", cut, 3, 7), whole[:, 2:].reshape(-1)[3:10])
    assert torch.equal(found.read("student", "w", None, 1, 2), torch.ones(2))
    found.check_names("student", {"t": tuple(whole.shape), "w": (2, 2), "scalar": ()})
    with pytest.raises(CheckpointError, match="holds another model"):
        found.check_names("student", {"t": tuple(table.shape), "w": (2, 2), "scalar": ()})

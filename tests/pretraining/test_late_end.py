"""A run whose end is decided while it runs: flat until then, and from there as if it had been planned so."""

from pathlib import Path

import pytest

import d2v_scale.train as train
from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.parallel import groups
from d2v_scale.pretraining import program
from d2v_scale.process.signals import Agreement, StopFlag
from d2v_scale.process.watchdog import Watchdog
from d2v_scale.running import loop, run_directory
from d2v_scale.running.saving import save

KEYS = ("--optim.schedule=wsd", "--optim.warmup_steps=1", "--data.workers=0", "--tracking.log_every=1")
KEYS += ("--evaluation.train=null", "--evaluation.test=null", "--global_batch_size=8", "--tracking.plot_every=null")
KEYS += ("--tracking.enabled=false",)


def trained(monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str) -> dict[int, tuple[float, float]]:
    """Loss and learning rate of the steps that an invocation takes, by step."""
    recipe, options = command_line.parse(list(arguments))
    topology = groups.single_process()
    config = train.configure(recipe)
    run_directory.claim(recipe, options, config, topology)
    run = program.build(recipe, options, config, topology, directory)
    taken: dict[int, tuple[float, float]] = {}

    def log(step: int, samples: int, values: dict[str, float]) -> None:
        if "loss" in values:
            taken[step] = (values["loss"], values["lr"])

    monkeypatch.setattr(run.tracker, "log", log)
    with Watchdog(directory, rank=0, world_size=1, limit_s=600) as watchdog:
        assert loop.train(run, StopFlag(), Agreement(), watchdog) is None
        save(run)
        assert run.writer.finish()
    run.teacher.destroy()
    run.student.destroy()
    return taken


def test_a_decay_that_is_decided_late_takes_the_steps_of_one_that_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = ("--recipe=demo_vision", *KEYS)
    planned = trained(monkeypatch, tmp_path / "a", *new, "--run_dir=a", "--optim.max_steps=6", "--decay_from=3")
    flat = trained(monkeypatch, tmp_path / "b", *new, "--run_dir=b", "--optim.max_steps=100", "--stop_at=3")
    decided = flat | trained(monkeypatch, tmp_path / "b", "--resume=b", "--decay_from=3", "--optim.max_steps=6")
    assert decided == planned
    assert [lr for _, lr in planned.values()][3] > planned[5][1] > planned[6][1] > 0
    with pytest.raises(ConfigError, match=r"optim\.decay_from: was 3, and the run is at step 6"):
        trained(monkeypatch, tmp_path / "b", "--resume=b", "--decay_from=7", "--optim.max_steps=9")

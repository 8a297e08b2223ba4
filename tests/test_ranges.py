"""Every numeric key of a recipe against numbers that mean nothing."""

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest

from d2v_scale import command_line, ranges
from d2v_scale.answers import mistakes
from d2v_scale.data.config import SourceConfig
from d2v_scale.data2vec.own import OwnHealth, OwnLoss, OwnMasking, OwnObjective, OwnTarget
from d2v_scale.data2vec.target_config import TargetConfig
from d2v_scale.errors import ConfigError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.model.log_mel_config import LogMel
from d2v_scale.model.stem_config import ArrayAxis, ArrayStem, OwnPredictor, SpeechStem, TextStem
from d2v_scale.recipe import Recipe

WRONG = (math.inf, -math.inf, math.nan, -1, True)


@pytest.fixture(scope="module")
def recipes() -> list[Recipe]:
    """With every optional section: three stems, a list of sources, fine-tuning; optional numbers are given."""
    everything = command_line.parse(["--recipe", "d2v2_vision_base"])[0]
    everything.model.speech = SpeechStem()
    everything.model.text = TextStem()
    everything.model.predictor.kind = "conv1d"
    everything.objective.masking.kind = "random"
    everything.objective.loss.cls_weight = 0.0
    everything.objective.loss.scale = 1.0
    everything.tracking.peak_tflops = 1.0
    everything.tracking.plot_every = 10
    everything.evaluation.layers = [-1]
    everything.data.sources = [
        SourceConfig(shards="a", modality=m, repeat=2.0, batch_size=64)  # type: ignore[arg-type]
        for m in ("vision", "speech", "text")
    ]
    everything.objective.further_targets = [TargetConfig(kind="codes", top_k_layers=2, weight=0.5)]
    everything.objective.vision = OwnObjective(
        masking=OwnMasking(prob=0.5, length=1, clones=2),
        target=OwnTarget(top_k_layers=2),
        loss=OwnLoss(beta=1.0),
        health=OwnHealth(patience=2),
        further_targets=[TargetConfig(kind="whitened", layers=[0, 1])],
    )
    everything.model.text.predictor = OwnPredictor(kernel=5, input_dropout=0.1)
    everything.model.arrays["heart"] = ArrayStem(
        axes={"time": ArrayAxis(patch=2, extent=8, rate=100.0)}, normalise="moments", mean=[0.0], std=[1.0]
    )
    mel = {"band": ArrayAxis(patch=4, extent=8), "time": ArrayAxis(patch=2, extent=8)}
    everything.model.arrays["mel"] = ArrayStem(axes=mel, transform="log_mel", log_mel=LogMel(high_hz=4000.0))
    everything.check(1)
    tuned = copy.deepcopy(everything)
    tuned.objective.vision = None
    tuned.task = TaskConfig(kind="classify", classes=5)
    tuned.model.speech = tuned.model.text = None
    tuned.model.arrays = {}
    tuned.data.sources = tuned.data.sources[:1]
    return [everything, tuned]


def replaced(recipe: Recipe, key: str, value: Any) -> Recipe:
    changed = copy.deepcopy(recipe)
    *path, name = key.split(".")

    def step(owner: Any, part: str) -> Any:
        if isinstance(owner, dict):
            return owner[part]
        return owner[int(part)] if part.isdigit() else getattr(owner, part)

    setattr(functools.reduce(step, path, changed), name, value)
    return changed


def variants(value: Any, wrong: Any) -> list[Any]:
    """The value, or each member of a list of them, replaced."""
    if not isinstance(value, (list, tuple)):
        return [wrong]
    found = []
    for position, item in enumerate(value):
        found += [type(value)([*value[:position], one, *value[position + 1 :]]) for one in variants(item, wrong)]
    return found


def test_inf_nan_a_negative_number_and_true_are_refused_for_every_numeric_key(recipes: list[Recipe]) -> None:
    """`optim.lr: .inf` trained, `data.workers: -1` ended with a traceback of PyTorch."""
    tried = set()
    for recipe in recipes:
        for key, value, is_switch in ranges.numbers(recipe):
            if value is None or isinstance(value, (bool, str)) or is_switch:
                continue
            general = ranges.general(key)
            for wrong in WRONG:
                if wrong == -1 and wrong is not True and general in ranges.SIGNED:
                    continue
                for candidate in variants(value, wrong):
                    with pytest.raises(ConfigError) as error:
                        replaced(recipe, key, candidate).check(1)
                    assert error.value.key == key
                    tried.add(general)
    assert len(tried) > 100
    assert {"optim.lr", "data.workers", "data.sources.*.weight", "model.speech.conv_layers", "task.classes"} <= tried
    assert set(ranges.ABOVE_ZERO) | set(ranges.SHARES) | set(ranges.SIGNED) <= tried


def test_zero_ends_in_a_configuration_error_or_means_something(recipes: list[Recipe]) -> None:
    """No other exception: a patch size of 0 was divided by."""
    for recipe in recipes:
        for key, value, _ in ranges.numbers(recipe):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                try:
                    replaced(recipe, key, 0).check(1)
                    accepted = True
                except ConfigError:
                    accepted = False
                if key in ranges.ABOVE_ZERO:
                    assert not accepted, key


def test_the_keys_that_differ_exist(recipes: list[Recipe]) -> None:
    of_sources = {f"data.sources.*.{field.name}" for field in dataclasses.fields(SourceConfig)}
    of_targets = {f"objective.further_targets.*.{field.name}" for field in dataclasses.fields(TargetConfig)}
    known = {*mistakes.known_keys(), *of_sources, *of_targets}
    assert set(ranges.SIGNED) <= known
    assert set(ranges.ABOVE_ZERO) <= known
    assert set(ranges.SHARES) <= known


@pytest.mark.parametrize("text", ["--optim.lr=.inf", "--data.workers=-1", "--seed=true", "--stop_at=-1"])
def test_from_the_command_line_each_ends_with_code_2(text: str, tmp_path: Path, monkeypatch: Any) -> None:
    import d2v_scale.train as train
    from d2v_scale.process.signals import StopFlag

    codes: list[int] = []

    def left(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(train.os, "_exit", left)
    with pytest.raises(SystemExit):
        train.main([text, "--run_dir", str(tmp_path / "run")], StopFlag())
    assert codes == [2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("modality", "kind", "key"),
    [
        ("speech", "block2d", "objective.masking.kind"),
        ("text", "block2d", "objective.masking.kind"),
        ("vision", "block2d", None),
    ],
)
def test_masks_of_a_grid_for_a_line_of_positions_are_refused_before_the_start(
    modality: str, kind: str, key: str | None, recipes: list[Recipe]
) -> None:
    """A data worker found it out, and the run ended with code 1."""
    recipe = copy.deepcopy(recipes[0])
    recipe.data.sources = [SourceConfig(shards="a", modality=modality)]  # type: ignore[arg-type]
    recipe.objective.masking.kind = kind  # type: ignore[assignment]
    if key is None:
        recipe.check(1)
        return
    with pytest.raises(ConfigError) as error:
        recipe.check(1)
    assert error.value.key == key


def test_a_mask_larger_than_the_grid_and_a_cls_loss_without_images_are_refused(recipes: list[Recipe]) -> None:
    first = command_line.parse(["--recipe", "d2v1_vision_base"])[0]
    first.objective.masking.target_count = 196
    with pytest.raises(ConfigError, match="196 of 196 patches"):
        first.check(1)
    recipe = copy.deepcopy(recipes[0])
    recipe.objective.loss.cls_weight = 0.01
    recipe.check(1)
    recipe.data.sources = recipe.data.sources[1:]
    with pytest.raises(ConfigError, match="extra token before the positions of speech, text"):
        recipe.check(1)


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_factor_by_which_half_of_the_ranks_are_slow_is_refused(recipes: list[Recipe], factor: float) -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.straggler_factor: .* null to compare no ranks"):
        replaced(recipes[0], "tracking.straggler_factor", factor).check(1)
    replaced(recipes[0], "tracking.straggler_factor", 1.1).check(1)

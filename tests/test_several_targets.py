"""Lists of weighted targets: how they are written, what each adds to the loss, and whose head predicts it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from target_engines import engines, saved

from d2v_scale.checkpoint import training
from d2v_scale.command_line import parse
from d2v_scale.data2vec.config import ObjectiveConfig, TargetConfig
from d2v_scale.data2vec.targets import TAKEN, Place, build_all, check_all
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.evaluation.held_out import HeldOutSet
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.predictor import build_predictors
from d2v_scale.networks.stack import Student
from d2v_scale.parallel import groups
from d2v_scale.planning import memory
from d2v_scale.pretraining.breakdown import LossBreakdown
from d2v_scale.pretraining.step import collapse_statistics, train_step
from d2v_scale.recipe import Recipe
from d2v_scale.run_files import recipe_file
from d2v_scale.teacher import target_state

pytestmark = pytest.mark.usefixtures("world_of_one")

PLACE = Place(depth=4, width=6, input_width=9)
FIRST = {"kind": "average_top_k", "top_k_layers": 2}
CODES = TargetConfig(kind="codes", weight=0.5, top_k_layers=1, options={"codes": 3})
PIXELS = TargetConfig(kind="input", weight=0.25)


def of(name: str, further: list[TargetConfig], weight: float = 1.0) -> tuple[Any, Any, Recipe]:
    return engines(name, {**FIRST, "weight": weight}, further=further)


def losses(name: str, further: list[TargetConfig], weight: float) -> dict[str, float]:
    """Figures of a first step."""
    student, teacher, recipe = of(name, further, weight)
    every = teacher.module.targets[tiny_models.modality_of(name)]
    breakdown = LossBreakdown(["here"], torch.device("cpu"), targets=[one.config.called for one in every])
    batch = dataclasses.replace(tiny_models.batch(name, 2, recipe.objective.masking.clones), source="here")
    _, seen = train_step(student, teacher, [batch], recipe.objective, Draw(1, 0), observe=True, breakdown=breakdown)
    figures = {**collapse_statistics(seen, student.topology), **breakdown.figures(student.topology)}
    return {key: float(value) for key, value in figures.items()}


@pytest.mark.parametrize("name", ["v1_vision", "v2_vision"])
def test_the_loss_is_the_weighted_sum_and_each_target_is_recorded_by_its_name(name: str) -> None:
    pixels = dataclasses.replace(PIXELS, name="pixels")
    found = losses(name, [CODES, pixels], 2.0)
    parts = {key: found[f"loss/target_{key}"] for key in ("average_top_k", "codes", "pixels")}
    assert all(part > 0 for part in parts.values())
    total = 2 * parts["average_top_k"] + 0.5 * parts["codes"] + 0.25 * parts["pixels"]
    assert found["loss"] == pytest.approx(total, rel=1e-6)
    # The first one is what it is alone: further ones have heads of their own.
    alone = losses(name, [], 1.0)
    assert alone["loss"] == pytest.approx(parts["average_top_k"], rel=1e-6)
    spreads = ("target_std", "prediction_std", "target_rank")
    assert {key: found[key] for key in spreads} == {key: alone[key] for key in spreads}
    buckets = [value for key, value in found.items() if key.startswith("loss/masked")]
    assert min(buckets) <= found["loss"] * (1 + 1e-6) <= max(buckets) * (1 + 2e-6)


@pytest.mark.parametrize("name", ["v1_vision", "v1_text", "v2_vision", "v2_text"])
def test_a_further_target_has_a_projection_of_its_own_on_the_same_decoder(name: str) -> None:
    stem, model = tiny_models.modality_of(name), tiny_models.model(name)
    alone = dict(Student(model).named_parameters())
    both = dict(Student(model, target_widths={stem: {"first": 32, "codes": 7}}).named_parameters())
    added = {key: tuple(x.shape) for key, x in both.items() if key not in alone}
    assert {key: x.shape for key, x in alone.items()} == {k: x.shape for k, x in both.items() if k not in added}
    own = {
        key.replace(f"predictors.{stem}.", f"predictors.{stem}.codes."): tuple(x.shape)
        for key, x in alone.items()
        if key.startswith((f"predictors.{stem}.proj", f"predictors.{stem}.fc"))
    }
    last = sorted(own)[-2:]
    assert added == own | {last[0]: (7,), last[1]: (7, own[last[1]][1])}


def test_every_head_is_trained_and_only_by_its_own_target() -> None:
    student, teacher, recipe = of("v2_vision", [CODES, PIXELS])
    before = {key: x.detach().clone() for key, x in student.module.named_parameters()}
    for number in range(2):
        batch = tiny_models.batch("v2_vision", 2, seed=number)
        train_step(student, teacher, [batch], recipe.objective, Draw(1, number), observe=False)
    heads = [key for key in before if ".codes." in key or ".input." in key]
    assert len(heads) == 4
    moved = [key for key, x in student.module.named_parameters() if not torch.equal(x, before[key])]
    assert set(heads) <= set(moved)


def test_held_out_evaluation_says_it_of_every_target() -> None:
    student, teacher, recipe = of("v2_vision", [CODES, PIXELS], 2.0)
    batches = [tiny_models.batch("v2_vision", 2, seed=number) for number in range(2)]
    found = HeldOutSet(batches, student, teacher, recipe.objective.loss, recipe.built_targets()["vision"]).figures()
    each = [found[f"held_out_loss/target_{name}"] for name in ("average_top_k", "codes", "input")]
    assert found["held_out_loss"] == pytest.approx(2 * each[0] + 0.5 * each[1] + 0.25 * each[2])
    assert found["held_out_explained"] == found["held_out_explained/target_average_top_k"]
    single, follower, other = of("v2_vision", [])
    alone = HeldOutSet(batches, single, follower, other.objective.loss, other.built_targets()["vision"]).figures()
    assert alone["held_out_loss"] == pytest.approx(each[0])
    assert not any("/target_" in name for name in alone)


def test_state_of_a_further_target_bears_its_name_and_a_head_that_no_target_has_is_refused(tmp_path: Path) -> None:
    student, teacher, recipe = of("v2_vision", [CODES])
    train_step(student, teacher, [tiny_models.batch("v2_vision", 2)], recipe.objective, Draw(1, 0), observe=False)
    names = [f"target.vision.codes.{name}" for name in ("used", "count", "sum")]
    assert list(target_state.named(teacher)) == names
    assert float(target_state.named(teacher)[names[0]].sum()) == 2
    checkpoint = saved(tmp_path, student, teacher)
    alike, follower, _ = of("v2_vision", [CODES])
    training.restore(checkpoint, alike, follower)
    assert all(torch.equal(target_state.named(follower)[n], x) for n, x in target_state.named(teacher).items())
    for further, said in (
        ([], "unexpected: predictors.vision.codes"),
        ([CODES, PIXELS], "missing: predictors.vision.i"),
    ):
        other, follower, _ = of("v2_vision", further)
        with pytest.raises(CheckpointError, match=said):
            training.restore(checkpoint, other, follower)


LIST = """
objective:
  target:
  - {top_k_layers: 2, layer_norm: none}
  - {kind: codes, weight: 0.5, name: "a25921e05", top_k_layers: 3, options: {codes: 8}}
  - {kind: input}
model: {visible_only: true, predictor: {kind: conv2d, width: 16}, vision: {image_size: 32, patch_size: 4}}
"""


def test_a_list_means_the_same_in_a_file_and_on_the_command_line_and_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "several.yaml"
    file.write_text(LIST)
    recipe, _ = parse(["--recipe", str(file)])
    first, *further = recipe.objective.targets
    assert (first.top_k_layers, first.layer_norm, first.weight) == (2, "none", 1.0)
    assert [(one.called, one.weight, one.options) for one in further] == [
        ("a25921e05", 0.5, {"codes": 8.0}),
        ("input", 1.0, None),
    ]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe_file.dump(recipe))
    assert parse(["--recipe", str(resolved)])[0] == recipe
    assert recipe_file.load(file)["objective"] == recipe_file.load(resolved)["objective"]
    said = (
        "[{top_k_layers: 2, layer_norm: none}, {kind: codes, weight: 0.5, name: 'a25921e05', top_k_layers: 3, options: "
    )
    said += "{codes: 8}}, {kind: input}]"
    for arguments in (["--objective.target", said], [f"--objective.target={said}"]):
        given_here, _ = parse(["--recipe", "tiny2_vision", *arguments])
        assert given_here.objective.targets == recipe.objective.targets
    own, _ = parse(["--recipe", "tiny2_vision", f"--objective.vision.target={said}"])
    assert own.objective.of("vision").targets[1:] == further
    # What a stem's own first target does not say is as for all.
    assert own.objective.of("vision").target.final_norm == own.objective.target.final_norm != "none"


@pytest.mark.parametrize(
    ("said", "key", "why"),
    [
        ("[]", "target", "no list of targets"),
        ("[codes]", "target", "no list of targets"),
        ("[{weight: 0}]", "target.weight", "is 0.0"),
        ("[{kind: input}, {kind: input, weight: -1}]", "further_targets.0.weight", "is -1.0"),
        ("[{kind: input}, {kind: input, weight: .nan}]", "further_targets.0.weight", "is nan"),
        ("[{kind: input}, {kind: input}]", "further_targets.0.name", "two targets are called 'input'"),
        ("[{kind: input}, {kind: input, name: proj}]", "further_targets.0.name", "a part of every predictor"),
        ("[{kind: input}, {kind: input, name: a.b}]", "further_targets.0.name", "is no name"),
        ("[{kind: input}, {name: two}]", "further_targets.0.top_k_layers", "8 of 4"),
        ("[{kind: input}, {kind: nope}]", "further_targets.0.kind", "unknown target"),
        ("[{kind: input}, {kind: 'nowhere:To'}]", "further_targets.0.kind", "cannot be imported"),
        ("[{kind: input}, {kind: codes, top_k_layers: 2, options: {codes: 0}}]", "further_targets.0.options", "codes"),
    ],
)
@pytest.mark.parametrize("section", ["objective", "objective.vision"])
def test_a_list_that_cannot_be_meant_is_refused_with_its_key(section: str, said: str, key: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        parse(["--recipe", "tiny2_vision", f"--{section}.target={said}"])[0].check(1)
    assert error.value.key == f"{section}.{key}"


def test_no_part_of_a_predictor_can_be_hidden_by_a_target() -> None:
    """Whatever a predictor has is refused as a name, so that every other name is free."""
    for name in ("v1_vision", "v1_text", "v2_vision", "v2_text"):
        stem, model = tiny_models.modality_of(name), tiny_models.model(name)
        [predictor] = build_predictors({stem: model.of(stem)}, {}).values()
        own = {part for part in (*dir(predictor), *predictor._modules) if not part.startswith("_")}
        assert own - set(dir(torch.nn.Module)) <= TAKEN
    for taken in [*sorted(TAKEN), "forward", "train"]:
        with pytest.raises(ConfigError, match="part of every predictor"):
            check_all([TargetConfig(kind="input"), TargetConfig(kind="input", name=taken)], PLACE)


@settings(max_examples=20, deadline=None)
@given(kinds=st.lists(st.sampled_from(["input", "last_layer", "codes", "whitened"]), min_size=1, max_size=4))
def test_names_are_the_kinds_and_must_differ(kinds: list[str]) -> None:
    configs = [TargetConfig(kind=kind, top_k_layers=1) for kind in kinds]
    if len(set(kinds)) == len(kinds):
        assert [one.config.called for one in check_all(configs, PLACE)] == kinds
    else:
        with pytest.raises(ConfigError, match="two targets are called"):
            check_all(configs, PLACE)
    named = [dataclasses.replace(one, name=f"t{number}") for number, one in enumerate(configs)]
    assert len(check_all(named, PLACE)) == len(build_all(named, PLACE)) == len(kinds)


def test_stems_that_share_a_predictor_share_the_heads_of_a_name() -> None:
    recipe = Recipe(model=tiny_models.joint(shared=True), objective=ObjectiveConfig())
    recipe.objective.target.top_k_layers = 2
    recipe.objective.further_targets = [CODES]
    recipe._check_shared_heads()
    names = [n for n, _ in Student(recipe.model, target_widths=recipe.target_widths()).named_parameters()]
    assert [n for n in names if ".codes." in n] == [f"predictors.shared.codes.proj.{n}" for n in ("weight", "bias")]
    # Pixels of a patch and samples of a frame are not as many.
    recipe.model = dataclasses.replace(recipe.model, text=None)
    recipe.objective.further_targets = [PIXELS]
    with pytest.raises(ConfigError, match="'input' is 48 wide in one stem and 320 in another"):
        recipe._check_shared_heads()


def test_the_plan_counts_the_bytes_of_states_and_of_what_a_step_sums() -> None:
    """Exactly what is allocated: fp32 states, and fp64 sums of their statistics."""
    full = TargetConfig(kind="whitened", name="full", top_k_layers=1, options={"covariance": "full"})
    _, teacher, recipe = of("v2_vision", [CODES, full])
    made = teacher.make(tiny_models.batch("v2_vision", 2), None)
    there = sum(x.nbytes for x in target_state.named(teacher).values())
    every, states = teacher.module.targets["vision"], teacher.module.state["vision"]
    for target, one, state in zip(every, made, states, strict=True):
        if state:
            said = target.statistics(one.raw_btd, one.counted_bt, state)
            there += sum(x.double().nbytes for x in said.values())
    job = SimpleNamespace(recipe=recipe, parallel=recipe.parallel)
    assert memory._target_states(job, 0) == there  # type: ignore[arg-type]
    job.parallel = groups.ParallelConfig(pipeline=2)
    assert [memory._target_states(job, stage) for stage in (0, 1)] == [0, there]  # type: ignore[arg-type]

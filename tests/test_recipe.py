"""Contradictions inside a recipe are refused before any process group is formed."""

import copy
import functools
import math

import pytest

from d2v_scale import command_line
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.errors import ConfigError
from d2v_scale.recipe import Recipe


@pytest.mark.parametrize(
    ("arguments", "world_size", "key"),
    [
        (["--objective.target.top_k_layers", "5"], 1, "objective.target.top_k_layers"),
        (["--objective.masking.clones", "2"], 1, "objective.masking.clones"),
        (["--recipe", "tiny2_text", "--objective.masking.kind", "spans"], 1, "objective.masking.kind"),
        (
            ["--recipe", "tiny2_text", "--objective.masking.kind=bert", "--objective.compat.equalize_masks=true"],
            1,
            "objective.masking.kind",
        ),
        (["--objective.loss.cls_weight", "0.1"], 1, "objective.loss.cls_weight"),
        (["--model.predictor.kind", "conv2d"], 1, "model.predictor.kind"),
        (["--model.vision.patch_size", "5"], 1, "model.vision.patch_size"),
        (["--model.backbone.heads", "5"], 1, "model.backbone.heads"),
        (["--parallel.tensor", "3"], 3, "parallel.tensor"),
        (["--parallel.tensor", "2"], 3, "parallel"),
        (["--global_batch_size", "3"], 4, "global_batch_size"),
        (["--batch_unit", "seconds"], 1, "batch_unit"),
        (["--accumulation", "0"], 1, "accumulation"),
        (["--profile.steps", "9:3"], 1, "profile.steps"),
    ],
)
def test_a_contradiction_names_its_key(arguments, world_size, key):
    recipe, _ = command_line.parse(arguments)
    with pytest.raises(ConfigError) as error:
        recipe.check(world_size)
    assert error.value.key == key


JOINT = [
    "--recipe=tests/distributed/joint.yaml",
    "--data.mixing=together",
    "--accumulation=3",
]


@pytest.mark.parametrize(
    ("arguments", "world_size", "key", "said"),
    [
        (["--accumulation=4"], 1, "accumulation", "is 4, which 3 sources (vision, speech, text) cannot share"),
        (["--accumulation=1"], 2, "accumulation", "Give a multiple of 3, such as 3"),
        (["--global_batch_size=4"], 8, "global_batch_size", "4 samples of vision are fewer than 8 data-parallel ranks"),
        (["--accumulation=6", "--global_batch_size=15"], 8, "global_batch_size", "8 data-parallel ranks x 2 micro"),
        (["--data.temperature=2"], 1, "data.temperature", "every step reads every source"),
        (["--objective.speech.loss.cls_weight=0.5"], 1, "objective.speech.loss.cls_weight", "extra token"),
        (["--data.sources=[{shards: a, modality: sound}]"], 1, "data.sources.0.modality", "no stem for"),
    ],
)
def test_sources_that_cannot_be_read_together_are_refused(arguments, world_size, key, said):
    with pytest.raises(ConfigError) as error:
        command_line.parse([*JOINT, *arguments])[0].check(world_size)
    assert error.value.key == key
    assert said in str(error.value)


@pytest.mark.parametrize("weight", ["0", "-1", ".nan", ".inf"])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    source = f"{{shards: a, modality: text, weight: {weight}}}"
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.weight"):
        command_line.parse([*JOINT, "--accumulation=1", f"--data.sources=[{source}]"])[0].check(1)


def test_how_often_a_source_comes_is_refused_where_every_step_reads_all():
    source = "{shards: a, modality: text, repeat: 2}"
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.repeat"):
        command_line.parse([*JOINT, "--accumulation=1", f"--data.sources=[{source}]"])[0].check(1)


def test_the_batch_that_deepspeed_may_name_is_that_of_all_sources_together():
    recipe, _ = command_line.parse([*JOINT, "--accumulation=6", "--global_batch_size=16"])
    recipe.check(2)
    assert recipe.rounds == 2
    assert recipe.samples_of_step == 48
    recipe.data.sources[1].batch_unit = "seconds"
    assert recipe.samples_of_step is None
    recipe.data.mixing = "alternate"
    assert (recipe.rounds, recipe.samples_of_step) == (6, 16)


OUT_OF_RANGE: list[tuple[str, object]] = [
    ("optim.lr", -1.0),
    ("optim.eps", -1.0),
    ("optim.weight_decay", -1.0),
    ("optim.min_lr", 2.0),
    ("optim.min_lr", -1.0),
    ("optim.betas", (0.9, 1.5)),
    ("optim.betas", (-0.1, 0.9)),
    ("objective.ema.start", 1.5),
    ("objective.ema.end", -1.0),
    ("objective.ema.end", math.nan),
    ("objective.ema.anneal_steps", -3),
    ("objective.masking.prob", 1.5),
    ("objective.masking.prob", -0.5),
    ("objective.masking.length", 0),
    ("objective.masking.clones", 0),
    ("objective.masking.target_count", 0),
    ("objective.masking.min_block", 0),
    ("objective.loss.beta", -1.0),
    ("objective.loss.scale", 0.0),
    ("objective.loss.cls_weight", -1.0),
    ("objective.health.patience", 0),
    ("objective.health.after", -1),
    ("objective.target.kind", "averge_top_k"),
    ("objective.target.layer_norm", "instnace"),
    ("objective.target.final_norm", "instnace"),
    ("checkpoint.every", -5),
    ("checkpoint.keep_last", 0),
    ("checkpoint.keep_every", -1),
    ("checkpoint.peer_timeout", 0.0),
    ("evaluation.every", -1),
    ("evaluation.k", 0),
    ("evaluation.batch_size", 0),
    ("evaluation.max_masked", 0),
    ("tracking.log_every", 0),
    ("tracking.plot_every", -1),
    ("hang_limit_minutes", 0.0),
    ("max_skipped_in_a_row", 0),
    ("global_batch_size", 0),
]


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    return command_line.parse(["--recipe", "tiny2_vision"])[0]


def with_value(recipe: Recipe, key: str, value: object) -> Recipe:
    changed = copy.deepcopy(recipe)
    *path, name = key.split(".")
    owner = functools.reduce(getattr, path, changed)
    assert hasattr(owner, name)
    setattr(owner, name, value)
    return changed


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_its_range_is_refused_before_the_start(key: str, value: object, tiny: Recipe) -> None:
    with pytest.raises(ConfigError) as error:
        with_value(tiny, key, value).check(1)
    assert error.value.key == key
    assert (str(list(value)) if isinstance(value, tuple) else str(value)) in str(error.value)


def test_a_negative_share_of_the_schedule_is_refused(tiny: Recipe) -> None:
    recipe = with_value(tiny, "optim.schedule", "tri_stage")
    with pytest.raises(ConfigError) as error:
        with_value(recipe, "optim.phase_ratio", [-0.1, 1.0, 0.1]).check(1)
    assert error.value.key == "optim.phase_ratio"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.min_lr", 0.0),
        ("objective.ema.start", 1.0),
        ("objective.ema.end", 1.0),
        ("objective.ema.anneal_steps", 0),
        ("objective.masking.prob", 1.0),
        ("checkpoint.every", 0),
    ],
)
def test_a_value_at_the_end_of_its_range_is_accepted(key: str, value: object, tiny: Recipe) -> None:
    with_value(tiny, key, value).check(1)


def test_every_0_saves_no_step_for_its_number() -> None:
    assert not any(CheckpointConfig(every=0).due(step) for step in (1, 2, 1000))
    assert [step for step in range(1, 7) if CheckpointConfig(every=3).due(step)] == [3, 6]


@pytest.mark.parametrize("world_size", range(1, 9))
def test_the_demo_runs_on_one_to_eight_processes(world_size):
    recipe, _ = command_line.parse([])
    recipe.check(world_size)

"""Recipes, overrides and mistakes: every mistake names the key and the remedy before anything starts."""

import copy
from pathlib import Path

import pytest
import yaml

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.recipe import binding_differences, to_dict
from d2v_scale.run_files import recipe_file
from d2v_scale.run_files.recipe_file import dump
from d2v_scale.run_files.run_start import RECIPE_FILE

PACKAGED = sorted(path.stem for path in command_line.RECIPES.glob("*.yaml"))


def test_no_argument_is_the_vision_demo():
    recipe, options = command_line.parse([])
    assert recipe.name == "demo_vision"
    assert options.resume is None


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_recipe_parses_checks_and_survives_a_round_trip(name, tmp_path):
    recipe, _ = command_line.parse(["--recipe", name])
    assert recipe.name == name
    if recipe.model.modalities:  # fine-tuning recipes have the model of --init_from
        recipe.check(world_size=1)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump(recipe))
    again, _ = command_line.parse([f"--recipe={saved}"])
    assert to_dict(again) == to_dict(recipe)


def test_a_switch_needs_no_value():
    """`--reset_teacher` alone was refused, as `--allow_recipe_change`: only `--prepare` was taken."""
    _, options = command_line.parse(["--prepare", "--allow_recipe_change", "--reset_teacher", "--init_from", "here"])
    assert options.prepare
    assert options.allow_recipe_change
    assert options.reset_teacher
    assert options.init_from == "here"


def test_dotted_overrides_win_over_the_recipe_whatever_their_order():
    recipe, options = command_line.parse(
        ["--optim.lr", "1e-4", "--recipe", "demo_vision", "--model.vision.patch_size=2", "--stop_at", "7"]
    )
    assert recipe.optim.lr == 1e-4
    assert recipe.model.vision.patch_size == 2
    assert options.stop_at == 7


def test_data_replaces_the_recipes_sources():
    recipe, _ = command_line.parse(["--data", "/shards/in1k-{000000..001281}.tar"])
    (source,) = recipe.data.sources
    assert source.shards == "/shards/in1k-{000000..001281}.tar"
    assert source.modality == "vision"


@pytest.mark.parametrize(
    ("arguments", "key", "hint"),
    [
        (["--optim.lrr", "3"], "optim.lrr", "optim.lr"),
        (["--model.visin.patch_size", "3"], "model.visin", "model.vision"),
        (["--model.vision.patch_siz", "3"], "model.vision.patch_siz", "model.vision.patch_size"),
        (["--optim.lr", "fast"], "optim.lr", "a number"),
        (["--objective.vision.masking.probb", "1"], "objective.vision.masking.probb", "objective.vision.masking.prob"),
        (["--model.vision.predictor.kerne=3"], "model.vision.predictor.kerne", "model.vision.predictor.kernel"),
        (["--data.sources", "[{shard: a}]"], "data.sources.shard", "data.sources.shards"),
        (["--objective.further_targets.0.weight=3"], "objective.further_targets.0", "A list is given whole"),
        (["--recipe", "demo_visoin"], "recipe", "demo_vision"),
        (["--stop_att", "3"], "stop_att", "stop_at"),
    ],
)
def test_a_mistake_names_the_key_and_the_nearest_valid_one(arguments, key, hint):
    with pytest.raises(ConfigError) as error:
        command_line.parse(arguments)
    assert error.value.key == key
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objective.vision.masking.tubes=height"], "objective.vision.masking.tubes: is height. Give"),
        (["--objective.vision.masking.kind=cubes"], "objective.vision.masking.kind: is cubes. Give one"),
        (["--model.vision.image_size", "[32]"], "model.vision.image_size: is [32]. Give a whole number"),
        (["--model.vision.extra_tokens=1.5"], "model.vision.extra_tokens: is 1.5. Give a whole number"),
        (["--model.vision.image_size=null"], "model.vision.image_size: is null. Give a value"),
        (["--objective.target=codes"], "objective.target: does not take 'codes', as it is a section. Give its keys"),
        (["--objective.vision.target=codes"], "objective.vision.target: does not take 'codes', as it is a section."),
        (["--task.image=3"], "task.image: does not take '3', as it is a section. Give its keys, such as --task.image."),
        (["--objective.target=null"], "objective.target: is null, but it is a section"),
        (["--task.image=null"], "task.image: is null, but it is a section"),
        (["--optim.lr_scale=0.5"], "optim.lr_scale: is 0.5. Give names, each with a number or null."),
    ],
)
def test_a_value_of_a_wrong_type_below_a_stem_is_said_with_its_own_key(arguments: list[str], said: str):
    """It was said of the whole stem, in the parser's words (`NestedArg`, `Union subtypes`)."""
    with pytest.raises(ConfigError) as error:
        command_line.parse(arguments)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("first", [["--objective.vision.masking.prob=0.4"], ["--objective.vision.masking.prob", "0.4"]])
def test_of_a_value_and_null_the_later_counts(first: list[str]):
    null = ["--objective.vision.masking.prob=null"]
    recipe, _ = command_line.parse([*first, *null])
    assert recipe.objective.of("vision").masking.prob == recipe.objective.masking.prob
    recipe, _ = command_line.parse([*null, *first])
    assert recipe.objective.of("vision").masking.prob == 0.4


@pytest.mark.parametrize("given", [["--objective.vision.masking.prob=null"], ["--objective.vision.masking", "null"]])
def test_null_takes_back_what_a_recipe_says_of_a_stem(given: list[str]):
    """The parser took it for the word None, and a section of null ended in a traceback."""
    data = ["--data", "speech=s.tar,vision=v.tar,text=t.tar"]
    recipe, _ = command_line.parse(["--recipe", "d2v2_joint_base", *data, *given])
    assert recipe.objective.of("vision").masking.prob == recipe.objective.masking.prob


def test_sections_of_which_all_lines_are_comments_say_nothing(tmp_path):
    """`masking:` with nothing below it ended in a traceback."""
    file = tmp_path / "mine.yaml"
    file.write_text("objective:\n  masking:\n    # prob: 0.5\n  vision:\n    masking:\n    target: {layers: null}\n")
    recipe, _ = command_line.parse(["--recipe", str(file)])
    plain, _ = command_line.parse(["--recipe", str(file), "--objective.vision", "null"])
    assert recipe.objective.of("vision") == plain.objective
    file.write_text("model:\n  vision:\n    image_size:\n")
    with pytest.raises(ConfigError, match=r"model\.vision\.image_size: is null"):
        command_line.parse(["--recipe", str(file)])


@pytest.mark.parametrize("given", [["--data", ""], ["--data="], ["--data", " "]])
def test_an_empty_data_argument_is_refused_by_name(given: list[str]):
    """`--data "$SHARDS"` where that variable is not set: said with the key, before shards are looked for."""
    with pytest.raises(ConfigError, match="data: is empty"):
        command_line.parse(given)


@pytest.mark.parametrize(
    "given", ["vision=v.tar,smell=x.tar", "smell=x.tar", "smell=/a/x-*.tar", "vision={a,b}.tar,smell=x.tar"]
)
def test_a_stem_that_the_model_lacks_is_named(given: str) -> None:
    """`vision=v.tar,smell=x.tar` became one pattern, of shards that do not exist."""
    with pytest.raises(ConfigError, match=r"data: names shards for 'smell', which is no stem of the model"):
        command_line.parse(["--data", given])


def test_commas_and_equal_signs_in_paths_are_no_stems(tmp_path: Path) -> None:
    (tmp_path / "year=2024").mkdir()
    there = tmp_path / "a,b=c.tar"
    there.touch()
    for shards in (
        f"{tmp_path}/year=2024/*.tar",
        "pipe:curl 'http://x/y?a,b=c'",
        "s3://bucket/a,b=c.tar",
        str(there),
        "{a,b=c}.tar",
        f"{tmp_path}/{{a,b=c}}-*.tar",
    ):
        for given in (shards, f"vision={shards}"):
            recipe, _ = command_line.parse(["--data", given])
            assert [source.shards for source in recipe.data.sources] == [shards]


def test_an_unknown_key_in_yaml_is_named_with_its_path(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nobjective:\n  masking:\n    lenght: 3\n")
    with pytest.raises(ConfigError, match=r"objective\.masking\.lenght.*objective\.masking\.length"):
        command_line.parse(["--recipe", str(file)])


def test_resume_takes_the_recipe_of_the_directory(tmp_path):
    recipe, _ = command_line.parse(["--optim.lr", "0.25"])
    (tmp_path / RECIPE_FILE).write_text(dump(recipe))
    resumed, options = command_line.parse(["--resume", str(tmp_path), "--stop_at", "5"])
    assert resumed.optim.lr == 0.25
    assert options.resume == str(tmp_path)
    with pytest.raises(ConfigError, match="together with --resume"):
        command_line.parse(["--resume", str(tmp_path), "--recipe", "demo_vision"])
    with pytest.raises(ConfigError, match="does not exist"):
        command_line.parse(["--resume", str(tmp_path / "nothing")])


def test_another_recipe_in_the_same_directory_is_refused_and_free_keys_are_not(tmp_path):
    recipe, _ = command_line.parse([])
    (tmp_path / RECIPE_FILE).write_text(dump(recipe))
    moved, _ = command_line.parse(["--data.workers", "7", "--accumulation", "2", "--tracking.log_every", "3"])
    command_line.check_same_recipe(moved, tmp_path, allow_change=False)
    other, _ = command_line.parse(["--optim.lr", "0.5"])
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        command_line.check_same_recipe(other, tmp_path, allow_change=False)
    command_line.check_same_recipe(other, tmp_path, allow_change=True)


def test_a_run_of_a_version_that_lacks_keys_is_continued(tmp_path):
    recipe, _ = command_line.parse([])
    values = yaml.safe_load(dump(recipe))
    whole = copy.deepcopy(values)
    for section, key in (("predictor", "final_norm"), ("backbone", "layer_drop")):
        del values["model"][section][key]
    del values["objective"]["loss"]["weight"]
    del values["objective"]["health"]
    del values["data"]["sources"][0]["weight"]
    (tmp_path / RECIPE_FILE).write_text(yaml.safe_dump(values))
    assert recipe_file.load(tmp_path / RECIPE_FILE) == whole
    command_line.check_same_recipe(recipe, tmp_path, allow_change=False)
    other, _ = command_line.parse(["--model.predictor.final_norm", "true"])
    with pytest.raises(ConfigError, match=r"model\.predictor\.final_norm: False there, True here"):
        command_line.check_same_recipe(other, tmp_path, allow_change=False)


def test_binding_differences_leave_out_where_and_how_a_run_runs():
    recipe, _ = command_line.parse([])
    old = yaml.safe_load(dump(recipe))
    new, _ = command_line.parse(["--parallel.tensor", "2", "--optim.clip", "9"])
    assert list(binding_differences(old, to_dict(new))) == ["optim.clip"]


def test_the_rule_for_spikes_may_change_in_a_run_that_goes_on():
    recipe, _ = command_line.parse([])
    new, _ = command_line.parse(["--optim.spikes.on_spike", "skip", "--optim.spikes.factor", "30"])
    assert binding_differences(to_dict(recipe), to_dict(new)) == {}


def test_a_resumed_run_may_move_its_shards_but_not_change_their_weights():
    old, _ = command_line.parse(["--data", "vision=a.tar,speech=b.tar"])
    new, _ = command_line.parse(["--data", "vision=c.tar,speech=d.tar"])
    new.data.sources[1].index = "d.index.json"
    assert binding_differences(to_dict(old), to_dict(new)) == {}
    new.data.sources[1].weight = 3.0
    assert binding_differences(to_dict(old), to_dict(new)) == {"data.sources.1.weight": (1.0, 3.0)}
    del new.data.sources[1]
    assert list(binding_differences(to_dict(old), to_dict(new))) == ["data.sources.1"]


def test_default_run_directory_is_the_jobs_own_under_slurm(monkeypatch):
    recipe, _ = command_line.parse([])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert command_line.default_run_dir(recipe, "20260101-000000") == Path("runs/demo_vision-20260101-000000")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "vit")
    assert command_line.default_run_dir(recipe, "x") == Path("runs/vit-17")


@pytest.mark.parametrize(
    "added", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]]
)
def test_the_launchers_local_rank_is_accepted(added: list[str]) -> None:
    """`torch.distributed.launch` writes --local-rank, DeepSpeed --local_rank."""
    recipe, _ = command_line.parse([*added, "--recipe", "demo_vision", "--seed", "3"])
    assert recipe.seed == 3
    assert command_line.parse(["--seed", "3", *added])[0].seed == 3


def test_no_argument_at_all_is_the_demo() -> None:
    """A look at the word after each ended in an error where there is none."""
    assert command_line.parse([])[0].name == "demo_vision"

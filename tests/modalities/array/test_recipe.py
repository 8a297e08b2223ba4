"""Stems of arrays in recipes: YAML and command line, round trips, and what is refused with its numbers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from d2v_scale.command_line import parse
from d2v_scale.errors import ConfigError
from d2v_scale.recipe import Recipe, binding_differences, to_dict
from d2v_scale.run_files import recipe_file

AXES = {"lead": {"patch": 1, "extent": 12}, "time": {"patch": 25, "extent": 2500, "rate": 500}}
RECIPE: dict[str, Any] = {
    "name": "hearts",
    "model": {
        "visible_only": True,
        "arrays": {"ecg": {"channels": 2, "axes": AXES}},
        "backbone": {"width": 32, "heads": 4, "ffn": 64, "depth": 2},
        "predictor": {"kind": "conv", "width": 32, "groups": 4, "kernel": 3},
    },
    "objective": {
        "masking": {"kind": "blocks", "size": {"time": "0.2 s", "lead": 1}, "prob": 0.6},
        "target": {"top_k_layers": 2},
    },
    "data": {"sources": [{"shards": "hearts-{000..009}.tar", "modality": "ecg"}]},
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "hearts.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def parsed(path: Path, *arguments: str) -> Recipe:
    recipe, _ = parse(["--recipe", str(path), *arguments])
    recipe.check(1)
    return recipe


def test_a_recipe_names_axes_in_the_members_order(written: Path) -> None:
    recipe = parsed(written)
    stem = recipe.model.arrays["ecg"]
    assert list(stem.axes) == ["lead", "time"]
    assert (stem.grid, stem.patch, stem.extents) == ((12, 100), (1, 25), (12, 2500))
    assert recipe.masking()["ecg"].size == {"lead": 1, "time": 4}
    assert recipe.model.modalities == ["ecg"]
    assert recipe.model.kind("ecg") == "array"


def test_single_values_are_given_on_the_command_line(written: Path) -> None:
    recipe = parsed(
        written,
        "--model.arrays.ecg.axes.time.patch",
        "50",
        "--model.arrays.ecg.axes.time.longer=crop",
        "--model.arrays.ecg.key",
        "1e5",
        "--model.arrays.ecg.predictor.layers=2",
        "--model.arrays.ecg.normalise=moments",
        "--model.arrays.ecg.mean=[0.5, -1]",
        "--model.arrays.ecg.std=[2]",
        "--objective.arrays.ecg.masking.prob=0.7",
        "--objective.arrays.ecg.target=[{kind: average_top_k, top_k_layers: 1}, {kind: input, weight: 0.5}]",
    )
    stem = recipe.model.arrays["ecg"]
    assert stem.grid == (12, 50)
    assert stem.axes["time"].rate == 500
    assert (stem.axes["time"].longer, stem.axes["lead"].longer) == ("crop", "refuse")
    assert (stem.key, stem.mean, stem.std) == ("1e5", [0.5, -1], [2])
    assert recipe.model.of("ecg").predictor.layers == 2
    assert recipe.model.predictor.layers == 4
    objective = recipe.objective.of("ecg")
    assert objective.masking.prob == 0.7
    assert [target.kind for target in objective.targets] == ["average_top_k", "input"]


def test_a_stem_may_be_given_on_the_command_line_alone(written: Path) -> None:
    recipe = parsed(
        written,
        "--model.arrays.eeg.channels=8",
        "--model.arrays.eeg.axes={time: {patch: 10, extent: 100}}",
        "--objective.masking.size=0.2",
    )
    assert recipe.model.modalities == ["ecg", "eeg"]
    assert recipe.model.arrays["eeg"].grid == (10,)


def test_a_resolved_recipe_is_read_back_as_the_same(written: Path, tmp_path: Path) -> None:
    recipe = parsed(written, "--model.arrays.ecg.key=null", "--objective.arrays.ecg.loss.weight=2")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_file.dump(recipe))
    again = parsed(path)
    assert to_dict(again) == to_dict(recipe)
    assert list(again.model.arrays["ecg"].axes) == ["lead", "time"]
    assert recipe_file.load(path) == recipe_file.plain(to_dict(recipe))
    values = yaml.safe_load(path.read_text())
    del values["model"]["arrays"]["ecg"]["missing"], values["model"]["arrays"]["ecg"]["axes"]["time"]["longer"]
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert not binding_differences(recipe_file.load(path), recipe_file.plain(to_dict(recipe)))


def test_axes_in_another_order_are_another_experiment(written: Path) -> None:
    recipe = recipe_file.plain(to_dict(parsed(written)))
    other = recipe_file.plain(to_dict(parsed(written)))
    axes = other["model"]["arrays"]["ecg"]["axes"]
    other["model"]["arrays"]["ecg"]["axes"] = dict(reversed(axes.items()))
    assert list(binding_differences(recipe, other)) == ["model.arrays.ecg.axes"]


@pytest.mark.parametrize(
    ("given", "key", "said"),
    [
        ("axes.time.patch=30", "axes.time.patch", "30 does not divide model.arrays.ecg.axes.time.extent 2500"),
        ("axes.time.patch=0", "axes.time.patch", r"is 0\. Give a number above 0"),
        ("axes.time.pach=5", "axes.time.pach", "Did you mean 'model.arrays.ecg.axes.time.patch'"),
        ("chanels=3", "chanels", "Did you mean 'model.arrays.ecg.channels'"),
        ("channels=0", "channels", "is 0"),
        ("axes={}", "axes", r"has 0 axes \(none\)"),
        ("axes={a: {extent: 2}, b: {}, c: {}, d: {}, e: {}}", "axes", r"has 5 axes \(a, b, c, d, e\). Name 1 to 4"),
        ("axes={'a b': {extent: 2}}", "axes", "names the axis 'a b'"),
        ("axes={time: {extent: 4, patch: 4}}", "axes", "make a single patch of a sample"),
        ("mean=[1, 2]", "mean", "is set, but normalise is 'none'"),
        ("normalise=moments", "mean", "has 0 values. Give one number, or one a channel: 2"),
        ("log_floor=0", "log_floor", "is 0"),
        ("axes.time.rate=-1", "axes.time.rate", "is -1"),
        ("predictor.width=30", "predictor.groups", "4 does not divide"),
        ("axes.time.extent=250000000", "axes", "make 120000000 patches of a sample. Give larger patches"),
        ("channels=1000000", "", "makes 30000000000 values of a sample. Give fewer channels"),
        ("log_floor=1e-60", "log_floor", "is 1e-60, which 32-bit numbers take for 0"),
        ("axes.time.rate=500 Hz", "axes.time.rate", "is '500 Hz'. Give a number or null"),
        ("axes.time.rate=true", "axes.time.rate", "is True. Give a number or null"),
        ("axes.time.patch=2.5", "axes.time.patch", "is 2.5. Give a whole number"),
        ("axes.time.longer=pad", "axes.time.longer", "is 'pad'. Give one of refuse, crop"),
        ("axes.time.unit=null", "axes.time.unit", "is None. Give text"),
        ("transform=mel", "transform", "is 'mel'. Give one of none, log, log_mel"),
        ("transform=log_mel", "channels", "is 2, but log_mel makes one of a recording"),
        ("log_mel.hop_ms=5", "log_mel", "is set, but transform is 'none'. Leave it out, or set transform to log_mel"),
        ("log_mel.hop_ms=0", "log_mel.hop_ms", r"is 0\.0\. Give a number above 0"),
        ("log_mel.hop_ms=10 ms", "log_mel.hop_ms", "is '10 ms'. Give a number"),
        ("log_mel.hop=10", "log_mel.hop", "Did you mean 'model.arrays.ecg.log_mel.hop_ms'"),
        ("log_mel.window=round", "log_mel.window", "is 'round'. Give one of hanning"),
        ("log_mel=5", "log_mel", "is 5, no section"),
        ("mean=0.5", "mean", "is 0.5. Give a list, each a number"),
        ("axes=null", "axes", "is None. Give names, each with keys and values"),
        ("axes={1: {extent: 2}}", "axes", "has the name 1, which is no text"),
        ("predictor=conv", "predictor", "is 'conv', no section"),
        ("axes=[2500]", "axes", r"is \[2500\]. Give names, each with keys and values"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key_and_numbers(given: str, key: str, said: str, written: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parsed(written, f"--model.arrays.ecg.{given}")
    assert error.value.key in (f"model.arrays.ecg.{key}".rstrip("."), "model.predictor.groups")


def test_a_name_with_a_dot_is_no_name_of_a_stem(written: Path) -> None:
    """Of `e.g` the part behind the dot was judged alone: parameters are called by dotted names."""
    written.write_text(written.read_text().replace("ecg", "e.g"))
    with pytest.raises(ConfigError, match=r"model\.arrays\.e\.g: is no name of a stem of arrays"):
        parsed(written)


def test_sections_of_null_below_a_stem_say_nothing_and_words_are_no_sections(written: Path) -> None:
    """The first ended in the parser's words about a mapping, the second named `objective.arrays.target.target`."""
    parsed(written, "--objective.arrays.ecg.masking=null")
    with pytest.raises(ConfigError, match="is 'codes', no section") as error:
        parsed(written, "--objective.arrays.ecg.target=codes")
    assert error.value.key == "objective.arrays.ecg.target"


@pytest.mark.parametrize("std", ["0", "1e-60", "1e60"])
def test_a_deviation_that_makes_values_infinite_is_refused(std: str, written: Path) -> None:
    arguments = [
        "--model.arrays.ecg.normalise=moments",
        "--model.arrays.ecg.mean=[0]",
        f"--model.arrays.ecg.std=[{std}]",
    ]
    with pytest.raises(ConfigError) as error:
        parsed(written, *arguments)
    assert error.value.key == "model.arrays.ecg.std"


def test_an_axis_that_is_named_twice_is_not_lost(written: Path) -> None:
    """YAML takes the last of two equal keys: an axis was gone without a word."""
    text = written.read_text()
    assert text.count("        time:\n") == 1
    written.write_text(text.replace("        time:\n", "        lead: {patch: 1, extent: 2}\n        time:\n"))
    with pytest.raises(ConfigError, match=r"model\.arrays\.ecg\.axes\.lead: stands twice, in lines \d+ and \d+"):
        parsed(written)


def test_blocks_of_a_grid_are_refused_along_other_axes_in_words_that_fit(written: Path) -> None:
    axes = "{a: {extent: 4}, b: {extent: 4}, c: {extent: 4}}"
    masks = ["--objective.masking.kind=block2d", "--objective.masking.size=null"]
    with pytest.raises(
        ConfigError, match="which masks rectangles of a grid of two axes, but the positions lie along 3"
    ):
        parsed(written, f"--model.arrays.ecg.axes={axes}", *masks)


@pytest.mark.parametrize("name", ["vision", "array", "shared", "a-b", "1st"])
def test_a_stem_is_not_called_as_a_kind(name: str, written: Path) -> None:
    values = yaml.safe_load(written.read_text())
    values["model"]["arrays"][name] = values["model"]["arrays"]["ecg"]
    written.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError, match="is no name of a stem of arrays") as error:
        parsed(written)
    assert error.value.key == f"model.arrays.{name}"


def test_a_width_too_small_for_the_sines_of_all_axes_is_refused(written: Path) -> None:
    axes = "{a: {extent: 2}, b: {extent: 2}, c: {extent: 2}, d: {extent: 2}}"
    narrow = ["--model.backbone.width=4", "--model.backbone.heads=4", "--model.predictor.kind=conv1d"]
    with pytest.raises(ConfigError, match=r"is 4, too few for sine and cosine along 4 axes\. Give at least 8"):
        parsed(written, f"--model.arrays.ecg.axes={axes}", "--objective.masking.size=1", *narrow)


def test_shards_are_named_for_a_stem_that_an_encoder_brings() -> None:
    """A fine-tuning recipe has no stem before its encoder is read: `--data ecg=PATTERN` named none of its own."""
    recipe, _ = parse(["--recipe", "finetune_vision_v2_base", "--data", "ecg=hearts-{000..009}.tar"])
    [source] = recipe.data.sources
    assert (source.modality, source.shards) == ("ecg", "hearts-{000..009}.tar")


def test_shards_are_named_for_an_encoders_stem_where_the_recipe_has_another() -> None:
    """`--data ecg=PATTERN` beside a recipe with a model of its own was taken for a path."""
    named = ["--recipe", "finetune_digits", "--data", "ecg=hearts-{000..009}.tar"]
    recipe, _ = parse([*named, "--init_from", "runs/ecg"])
    [source] = recipe.data.sources
    assert (source.modality, source.shards) == ("ecg", "hearts-{000..009}.tar")
    with pytest.raises(ConfigError, match=r"names shards for .ecg., which is no stem of the model\. It has vision"):
        parse(named)
    recipe, _ = parse(["--recipe", "finetune_digits"])
    with pytest.raises(ConfigError, match=r"It has ecg: name shards with --data ecg=PATTERN"):
        recipe.data.check_names(["ecg"])


def test_overrides_of_a_stem_that_is_not_there_are_refused(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model has no stem eeg\. Leave it out; the model has ecg") as error:
        parsed(written, "--objective.arrays.eeg.masking.prob=0.7")
    assert error.value.key == "objective.arrays.eeg"
    with pytest.raises(ConfigError, match="is 5, no section"):
        parsed(written, "--objective.arrays.ecg=5")

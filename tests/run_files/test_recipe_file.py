"""d2v_scale.run_files.recipe_file: whatever a name or a path looks like, it is read back as the same value."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2v_scale.command_line import parse
from d2v_scale.errors import ConfigError
from d2v_scale.recipe import Recipe, differences, to_dict
from d2v_scale.run_files import recipe_file, run_start

LOOKALIKES = (
    "25921e05 1e3 1e 1. .5 -.5 5 -1 +1 007 0777 0o7 0x1F 0b1 1_000 _ -_ 12:30:00 190:20:30 2020-01-01 null Null ~ None "
    "none on off yes no y n true false .nan .inf -.inf nan inf infinity = << @x `x %x %20 ? ! !!int & &a *a | > \\ [a] "
    "{a:b} - -- --x --name=x a=b 'q' \"q\" '' \"\" $HOME ~/x a,b #x a#b ;x : :x x: {000..009} *.tar ü ß"
)
WITH_BLANKS = ["", " ", "null ", " null", "trail ", " lead", "a: b", "x #y", "- x", "\t", "a\nb", "a\n", "\r\n"]
UNUSUAL = ["\ue000", "\ue000null", "\u2028", "\U0001f600", "\ufeff", "\x85", "\x00", "x" * 300]
LITERAL = LOOKALIKES.split(" ") + WITH_BLANKS + UNUSUAL
texts = (
    st.sampled_from(LITERAL)
    | st.text(st.characters(codec="utf-8"), max_size=12)
    | st.text("0123456789eE.+-_:xXob", min_size=1, max_size=9)
)


def filled(draw: Any) -> Recipe:
    """A recipe in which every key that takes any text has one."""
    recipe, _ = parse(["--recipe", "finetune_words"])
    assert recipe.task is not None
    recipe.name, recipe.deepspeed_config = draw(), draw()
    (source,) = recipe.data.sources
    source.shards, source.name, source.index = draw(), draw(), draw()
    recipe.data.text.tokenizer, recipe.data.cache_dir = draw(), draw()
    recipe.tracking.experiment, recipe.tracking.run_name = draw(), draw()
    recipe.evaluation.train, recipe.evaluation.test, recipe.evaluation.held_out = draw(), draw(), draw()
    recipe.profile.steps = draw()
    recipe.task.ctc.letters = draw()
    return recipe


def read_back(recipe: Recipe, path: Path) -> dict[str, tuple[Any, Any]]:
    path.write_text(recipe_file.dump(recipe), encoding="utf-8")
    assert recipe_file.load(path) == json.loads(json.dumps(to_dict(recipe)))
    again, _ = parse([f"--recipe={path}"])
    return differences(to_dict(recipe), to_dict(again))


def test_what_looks_like_another_type_is_read_back_as_text(tmp_path: Path) -> None:
    remaining = list(LITERAL)

    def draw() -> str:
        return remaining.pop() if remaining else LITERAL[0]

    while remaining:
        assert read_back(filled(draw), tmp_path / "recipe.yaml") == {}


def test_what_looks_like_nothing_is_read_back_as_text(tmp_path: Path) -> None:
    """Under every key: those that may be null differ."""
    for text in ("null", "#x", "~"):
        assert read_back(filled(lambda text=text: text), tmp_path / "recipe.yaml") == {}


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_every_text_is_read_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    recipe = filled(lambda: data.draw(texts))
    assert read_back(recipe, tmp_path_factory.mktemp("recipe") / "recipe.yaml") == {}


@settings(max_examples=8, deadline=None)
@given(texts, texts, texts)
@example("25921e05", "#1", "~")
@example("1e3", "&a", "null ")
def test_the_command_line_takes_every_text_as_it_is(name: str, run_name: str, run_dir: str) -> None:
    given = [f"--name={name}", f"--tracking.run_name={run_name}", f"--run_dir={run_dir}"]
    recipe, options = parse(given)
    expected = tuple(None if text == "null" else text for text in (run_name, run_dir))
    assert (recipe.name, recipe.tracking.run_name, options.run_dir) == (name, *expected)
    # Apart, where that is no option.
    if not any(text.startswith("-") for text in (name, run_name, run_dir)):
        apart, options = parse([part for one in given for part in one.split("=", 1)])
        assert (apart.name, apart.tracking.run_name, options.run_dir) == (name, *expected)


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'caf\\xe9|udce9"):
        recipe_file.dump(parse(["--data", "caf\udce9/train"])[0])


def test_null_on_the_command_line_is_nothing_and_quoted_in_a_file_it_is_a_name(tmp_path: Path) -> None:
    assert parse(["--evaluation.test", "null"])[0].evaluation.test is None
    path = tmp_path / "mine.yaml"
    path.write_text('tracking:\n  run_name: "null"\n')
    assert parse([f"--recipe={path}"])[0].tracking.run_name == "null"
    path.write_text("tracking:\n  run_name: null\n")
    assert parse([f"--recipe={path}"])[0].tracking.run_name is None


def test_a_run_directory_that_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    """It left `25921e05` unquoted, which its own reader took for a number."""
    recipe, _ = parse(["--name", "25921e05"])
    recipe.tracking.experiment = "1e3"
    (tmp_path / run_start.RECIPE_FILE).write_text(yaml.safe_dump(recipe_file.plain(to_dict(recipe)), sort_keys=False))
    assert "name: 25921e05\n" in (tmp_path / run_start.RECIPE_FILE).read_text()
    resumed, _ = parse(["--resume", str(tmp_path)])
    assert (resumed.name, resumed.tracking.experiment) == ("25921e05", "1e3")


def test_a_hand_written_recipe_may_name_itself_after_a_commit_and_write_numbers_as_people_do(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: 25921e05\noptim:\n  lr: 1e-3\n  betas: [.9, 98e-2]\n")
    recipe, _ = parse([f"--recipe={path}"])
    assert (recipe.name, recipe.optim.lr, tuple(recipe.optim.betas)) == ("25921e05", 1e-3, (0.9, 0.98))
    path.write_text("name: on\n")
    with pytest.raises(ConfigError, match="name"):
        parse([f"--recipe={path}"])


def test_what_print_config_shows_is_read_back_as_the_same_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("25921e05", "on", "0777", "2020-01-01", "a: b #c"):
        given = [f"--name={text}", f"--tracking.experiment={text}", f"--tracking.run_name={text}", f"--data={text}"]
        with pytest.raises(SystemExit):
            parse([*given, "--print_config"])
        path = tmp_path / "printed.yaml"
        path.write_text(capsys.readouterr().out, encoding="utf-8")
        again, _ = parse([f"--recipe={path}"])
        assert differences(to_dict(parse(given)[0]), to_dict(again)) == {}, text

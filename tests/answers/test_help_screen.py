"""`--help` is a screen, `--list_recipes` a line each."""

import re

import pytest

from d2v_scale import command_line
from d2v_scale.answers import help_screen, mistakes, recipe_list


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        command_line.parse(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_is_a_screen_of_twenty_keys_with_the_values_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(help_screen.KEYS) == 20
    assert {key for key, _ in help_screen.KEYS} <= {*mistakes.known_keys()}
    assert {option.partition(" ")[0] for option, _ in help_screen.OPTIONS} - {"data"} <= {*command_line.OPTIONS}
    for name, rate in (("demo_vision", "0.003"), ("d2v2_speech_1b", "0.00045"), ("finetune_digits", "0.003")):
        lines = shown(["--recipe", name, "--help"], capsys).splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 120
        assert [line.split()[1] for line in lines if line.split()[:1] == ["--optim.lr"]] == [rate]
        assert any(name in line for line in lines)
    assert "--help_all" in lines[-2]
    assert lines == shown(["-h", "--recipe", "finetune_digits", "--seed", "3"], capsys).splitlines()


def test_help_all_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(["--help_all"], capsys)
    below_optional = (
        "task.",
        "model.",
        "objective.",
        "teacher.model.",
        "teacher_parts.",
        "optim.muon.",
        "evaluation.sets.",
    )
    asked = [key for key in mistakes.known_keys() if not key.startswith(below_optional)]
    assert [key for key in asked if key not in said] == []


def test_only_the_first_rank_shows_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, there_is in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for option in ("--help", "--list_recipes", "--print_config"):
            assert bool(shown([option], capsys)) is there_is


def test_help_of_a_recipe_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'demo_vision'"):
        command_line.parse(["--help", "--recipe", "demo_visoin"])


def test_every_recipe_has_a_line_with_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(["--list_recipes"], capsys).splitlines()
    for path in command_line.RECIPES.glob("*.yaml"):
        [line] = [line for line in lines if line.startswith(f"{path.stem} ")]
        assert re.search(r"  (\d[\d.]* [MB]|-)  \S", line), line
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize(
    ("name", "size"),
    [
        # The published numbers of parameters (`tests/model/test_parameter_counts.py`), to within half a percent.
        ("d2v1_speech_base", "93.0 M"),
        ("d2v1_text_base", "124 M"),
        ("d2v1_vision_large", "303 M"),
        ("d2v2_vision_huge14", "630 M"),
        ("d2v2_text_large_a", "354 M"),
        ("d2v2_vision_7b", "6.85 B"),
        ("finetune_vision_v2_base", "-"),
    ],
)
def test_sizes_are_those_of_the_models(name: str, size: str) -> None:
    assert recipe_list.size(command_line.RECIPES / f"{name}.yaml") == size

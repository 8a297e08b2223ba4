"""Sizes of blocks: positions, shares, units, and what is refused."""

from typing import Any

import pytest

from d2v_scale.command_line import parse
from d2v_scale.data2vec.block_sizes import Axis, check, resolved
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError
from d2v_scale.recipe import Recipe
from d2v_scale.run_files import recipe_file

TIME = Axis("time", {"s": 50.0, "ms": 0.05})
PLANE = (Axis("height", {"px": 0.25}), Axis("width", {"px": 0.25}))


def blocks(size: Any = None, tubes: list[str] | None = None) -> MaskingConfig:
    return MaskingConfig(kind="blocks", size=size, tubes=tubes, length=7)


@pytest.mark.parametrize(
    ("config", "axes", "sizes"),
    [
        (blocks(), (TIME,), [7]),
        (blocks(3), PLANE, [3, 3]),
        (blocks(0.25), PLANE, [0.25, 0.25]),
        (blocks("8 px"), PLANE, [2, 2]),
        (blocks({"width": "8px", "height": 1.0}), PLANE, [1.0, 2]),
        (blocks({"time": "0.2 s"}), (TIME,), [10]),
        (blocks("250 ms"), (TIME,), [13]),
        (blocks("1e-1 s"), (TIME,), [5]),
        (blocks({"width": 3}, ["height"]), PLANE, [1, 3]),
        (blocks("0.2 s", ["width"]), (TIME, PLANE[1]), [10, 1]),
    ],
)
def test_sizes_become_numbers_along_every_axis(config: MaskingConfig, axes: tuple[Axis, ...], sizes: list) -> None:
    once = resolved(config, axes)
    assert isinstance(once.size, dict)
    assert list(once.size) == [axis.name for axis in axes]
    assert [(type(size), size) for size in once.size.values()] == [(type(size), size) for size in sizes]
    assert resolved(once, axes) == once
    check(config, axes, [1000] * len(axes))


@pytest.mark.parametrize(
    ("config", "axes", "key", "said"),
    [
        (blocks({"depth": 2}), PLANE, "size", "names the axis 'depth'. There is height or width"),
        (blocks({"height": 2}), PLANE, "size", "says nothing of the axis width"),
        (blocks(1.5), PLANE, "size", "at most 1"),
        (blocks(0.0), PLANE, "size", "above 0"),
        (blocks(float("nan")), PLANE, "size", "above 0"),
        (blocks(0), PLANE, "size", "at least 1"),
        (blocks(True), PLANE, "size", "Give positions"),
        (blocks("wide"), PLANE, "size", "Give positions"),
        (blocks("1.2.3 s"), (TIME,), "size", "Give positions"),
        (blocks("2 s"), PLANE, "size", "a unit that the axis height does not have. It has px"),
        (blocks("2 s"), (Axis("tokens"),), "size", "Give positions, or a share"),
        (blocks("5 ms"), (TIME,), "size", "0.25 positions along time"),
        (blocks(2, ["height", "width"]), PLANE, "tubes", "Leave out an axis"),
        (blocks(2, ["time"]), PLANE, "tubes", "names the axis 'time'"),
        (blocks(), PLANE, "length", "is 7 positions along height, which has 6"),
        (blocks("40 px"), PLANE, "size", "'40 px', 10 positions along height, which has 6"),
        (MaskingConfig(kind="random", size=2), PLANE, "size", "the kind of masks is 'random'"),
        (MaskingConfig(kind="random", tubes=["height"]), PLANE, "tubes", "the kind of masks is 'random'"),
    ],
)
def test_what_the_axes_do_not_have_is_refused(
    config: MaskingConfig, axes: tuple[Axis, ...], key: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check(config, axes, [6] * len(axes))
    assert error.value.key == f"objective.masking.{key}"
    assert said in str(error.value)


def masked(recipe: str, *arguments: str) -> tuple[Recipe, MaskingConfig]:
    found, _ = parse(["--recipe", recipe, "--data", "x.tar", *arguments])
    found.check(1)
    return found, found.masking_of(found.model.modalities[0])


def test_recipes_of_all_modalities_take_blocks_and_are_read_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The three modalities by the same words, for all stems or for one, and recipe.yaml keeps what was given."""
    kind = "--objective.masking.kind=blocks"
    cases = [
        ("tiny2_vision", [kind, "--objective.masking.size={height: 2, width: 1.0}"], {"height": 2, "width": 1.0}),
        ("tiny2_vision", [kind, "--objective.masking.size=8 px"], {"height": 2, "width": 2}),
        ("tiny1_vision", [kind, "--objective.masking.size=0.25"], {"height": 0.25, "width": 0.25}),
        ("tiny2_speech", [kind, "--objective.masking.size={time: 0.2 s}"], {"time": 20}),
        ("tiny1_text", [kind, "--objective.masking.size=4"], {"tokens": 4}),
        (
            "tiny2_text",
            ["--objective.text.masking.kind=blocks", "--objective.text.masking.size={tokens: 0.1}"],
            {"tokens": 0.1},
        ),
    ]
    for recipe, arguments, size in cases:
        first, config = masked(recipe, *arguments)
        assert config.size == size
        (tmp_path / "recipe.yaml").write_text(recipe_file.dump(first))
        again, _ = parse(["--recipe", str(tmp_path / "recipe.yaml")])
        assert again.objective == first.objective
        assert again.masking() == first.masking()


def test_an_own_size_that_does_not_fit_is_named_where_it_stands() -> None:
    arguments = ["--objective.vision.masking.kind=blocks", "--objective.vision.masking.size={height: 99, width: 1}"]
    with pytest.raises(ConfigError, match="99 positions along height, which has 8") as error:
        masked("tiny2_vision", *arguments)
    assert error.value.key == "objective.vision.masking.size"

"""d2v_scale.parallel.step_sizes: whether a step can be divided."""

import pytest

from d2v_scale.command_line import parse
from d2v_scale.errors import ConfigError

KOLEO = "--objective.loss.koleo_weight=0.01"


def check(*arguments: str, world_size: int = 2) -> None:
    recipe, _ = parse(["--recipe=demo_vision", *arguments])
    recipe.check(world_size)


@pytest.mark.parametrize(
    ("arguments", "world_size"),
    [
        ((KOLEO,), 2),
        ((KOLEO, "--objective.loss.koleo_group=32"), 2),
        ((KOLEO, "--accumulation=4", "--objective.loss.koleo_group=16"), 1),
        (("--objective.loss.koleo_group=7",), 2),  # nothing is compared
    ],
)
def test_micro_batches_of_whole_groups_are_compared(arguments: tuple[str, ...], world_size: int) -> None:
    check(*arguments, world_size=world_size)


@pytest.mark.parametrize(
    ("arguments", "world_size", "said"),
    [
        ((KOLEO, "--objective.loss.koleo_group=1"), 2, r"koleo_group: is 1.*Give 2 or more"),
        ((KOLEO, "--objective.loss.koleo_group=24"), 2, r"koleo_group: is 24, but 64 samples in 2 .*divisor of 32"),
        ((KOLEO, "--global_batch_size=66"), 4, r"koleo_group: is 8, but 66 samples in 4 .*multiple of 4 x koleo_group"),
        ((KOLEO, "--objective.vision.loss.koleo_group=5"), 2, r"objective\.vision\.loss\.koleo_group: is 5"),
    ],
)
def test_groups_that_micro_batches_would_cut_are_refused(
    arguments: tuple[str, ...], world_size: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(*arguments, world_size=world_size)


def test_batches_of_any_number_of_samples_are_refused() -> None:
    recipe, _ = parse(["--recipe=demo_speech", "--batch_unit=seconds", "--global_batch_size=60", KOLEO])
    with pytest.raises(
        ConfigError, match=r"koleo_weight: is 0\.01, but micro-batches of speech are counted in seconds"
    ):
        recipe.check(1)

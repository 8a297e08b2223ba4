"""What is refused before a pipeline is built, and what is said of its stages."""

import pytest

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.planning.stages import StageSplit
from d2v_scale.pretraining.engines import describe_idle, describe_split
from d2v_scale.train import configure


def test_more_stages_than_blocks_are_refused_before_any_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    recipe, _ = command_line.parse(["--recipe=demo_vision", "--parallel.pipeline=8"])
    with pytest.raises(ConfigError, match="8 stages cannot share 4 main blocks") as caught:
        configure(recipe)
    assert caught.value.key == "parallel.pipeline"


def test_the_split_is_described_with_its_bubble() -> None:
    split = StageSplit(blocks=(range(3), range(3, 6)), costs=(3.0, 3.0))
    assert describe_split(split, 3) == (
        "Pipeline stages 0: blocks 0-2 (50%), 1: blocks 3-5 (50%); predicted idle share 25%, "
        "25% = (p-1)/(m+p-1) if stages were equal. Few micro-batches: raise `accumulation` to wait less."
    )


def test_the_measured_idle_share_stands_beside_that_of_equal_stages() -> None:
    said = describe_idle([0.48, 0.59], 1)
    assert said == "Pipeline idle share, measured, of stage 0: 48%, 1: 59%; (p-1)/(m+p-1) = 50%"

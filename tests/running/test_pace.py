"""What a run does with the pace of its ranks: where it is measured, and what becomes of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from d2v_scale.running.pace import EVERY, PaceKeeper
from d2v_scale.tracking import SpeedMeter
from d2v_scale.tracking.stragglers import PATIENCE


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 0 of three, whose second needs five seconds of a step where the others need one."""

    def gather(every: list[torch.Tensor], _mine: torch.Tensor, **_: Any) -> Any:
        for rank, row in enumerate(every):
            own = 5.0 if rank == 1 else 1.0
            row.copy_(torch.tensor([0.0, own, 5.0 - own, 0.0]))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "all_gather", gather)
    tracking = SimpleNamespace(straggler_factor=2.0, log_every=1)
    topology = SimpleNamespace(rank=0, world_size=3, pipeline_rank=0)
    recipe = SimpleNamespace(tracking=tracking)
    return SimpleNamespace(step=0, directory=tmp_path, recipe=recipe, topology=topology, meter=SpeedMeter())


def train(run: Any) -> None:
    """Long enough for the second rank to be named."""
    keeper = PaceKeeper(run)
    for _ in range((PATIENCE + 2) * EVERY):
        with keeper.step():
            pass
        run.step += 1


def test_a_slow_rank_is_written_down(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    train(run)
    assert "rank 1 is 5.0 times as slow as its peers" in caplog.text
    assert len((run.directory / "stragglers.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_ends_no_run_that_names_a_straggler(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    (run.directory / "stragglers.jsonl").mkdir()  # takes no line
    train(run)
    assert "rank 1 is 5.0 times as slow as its peers" in caplog.text
    assert "stragglers.jsonl cannot be written" in caplog.text


def test_ranks_are_not_compared_where_nccl_hides_who_waits(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    train(run)
    assert not (run.directory / "stragglers.jsonl").exists()

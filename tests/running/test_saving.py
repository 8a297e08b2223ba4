"""When the state of a run is copied to memory, and what becomes of a run whose nodes have no room for that."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2v_scale import command_line
from d2v_scale.checkpoint.config import CheckpointConfig, MemoryConfig
from d2v_scale.checkpoint.format import Piece
from d2v_scale.checkpoint.snapshot import Contents
from d2v_scale.errors import ConfigError
from d2v_scale.process.signals import Agreement
from d2v_scale.running.saving import digest, prepare, remember
from d2v_scale.spikes import SpikeConfig
from d2v_scale.tracking import SpeedMeter

NUMEL = 1000


class Copies:
    """Copies that only say what they were asked for."""

    def __init__(self, *, lack: str = "", idle: bool = True) -> None:
        self.config, self.lost, self._lack, self._idle = MemoryConfig(every=3), 0, lack, idle
        self.asked: list[Any] = []

    def lack_of_room(self, shard: int) -> str:
        self.asked.append(shard)
        return self._lack

    def describe(self) -> str:
        return "the state"

    def close(self, *, keep: bool) -> None:
        self.asked.append(f"close, keep {keep}")

    def may_begin(self, step: int, least: Any) -> bool:
        assert least([4, 2]) == [4, 2]
        return self._idle

    def save(self, step: int, pieces: list[Piece], state: dict[str, Any], extra: dict[str, Any]) -> None:
        self.asked.append((step, [piece.name for piece in pieces], state, extra))


def make_run(copies: Copies | None, step: int = 0) -> Any:
    piece = Piece("student", "w", (NUMEL,), None, 0, torch.zeros(NUMEL))
    records: list[dict[str, float]] = []
    return SimpleNamespace(
        copies=copies,
        step=step,
        samples=0,
        topology=SimpleNamespace(rank=0, world_size=1),
        meter=SpeedMeter(),
        recipe=SimpleNamespace(
            checkpoint=CheckpointConfig(memory=MemoryConfig(every=3)), optim=SimpleNamespace(spikes=SpikeConfig())
        ),
        contents=lambda: Contents([piece], {"updates": step}, {"data": 7}),
        loader=SimpleNamespace(lately=lambda steps: [[[0, 0, steps]]]),
        records=records,
        tracker=SimpleNamespace(log=lambda step, samples, values: records.append(values)),
    )


def test_a_run_that_begins_is_refused_without_room_and_told_what_to_do() -> None:
    copies = Copies(lack="/dev/shm of n has 1 GB free, and two generations of copies take 2 GB there")
    with pytest.raises(ConfigError, match=r"checkpoint\.memory\.every: is 3, but /dev/shm of n has .* Enlarge it"):
        prepare(make_run(copies))
    assert 4 * NUMEL < copies.asked[0] < 4 * NUMEL + 100_000


def test_a_run_that_goes_on_does_so_without_copies(caplog: pytest.LogCaptureFixture) -> None:
    copies = Copies(lack="/dev/shm is full")
    run = make_run(copies, step=40)
    prepare(run)
    assert run.copies is None
    assert copies.asked[1:] == ["close, keep False"]
    assert "goes on without copies in memory: /dev/shm is full" in caplog.text
    remember(run, Agreement())
    assert run.records == []


def test_a_copy_is_begun_at_its_steps_and_its_stall_is_a_checkpoints() -> None:
    copies = Copies()
    run = make_run(copies)
    prepare(run)
    for run.step in range(1, 8):
        remember(run, Agreement())
    leave_out = SpikeConfig().leave_out
    extra = {"data": 7, "lately": [[[0, 0, leave_out]]]}
    assert copies.asked[1:] == [(step, ["w"], {"updates": 0}, extra) for step in (3, 6)]
    assert [record["memory_copies_lost"] for record in run.records] == [0, 0]
    stalls = sum(record["memory_copy_stall_seconds"] for record in run.records)
    assert 0 < run.meter.spent["checkpoint"] <= stalls
    assert run.meter.spent["checkpoint"] == pytest.approx(stalls, abs=0.1)


def test_while_a_copy_is_under_way_the_state_is_not_even_read() -> None:
    copies = Copies(idle=False)
    run = make_run(copies, step=3)
    remember(run, Agreement())
    assert copies.asked == []


def test_a_shard_fits_only_where_the_recipe_and_the_division_are_the_same() -> None:
    def of(*arguments: str, stage: int = 1, ranks: int = 2) -> str:
        recipe, _ = command_line.parse(["--recipe", "demo_vision", *arguments])
        return digest(recipe, stage, SimpleNamespace(tags=lambda: {"world_size": ranks}))  # type: ignore[arg-type]

    assert of() == of("--checkpoint.every=7", "--tracking.log_every=3", f"--data={Path('elsewhere')}/x.tar")
    different = [of(), of("--optim.lr=1"), of("--seed=9"), of(stage=3), of(ranks=4)]
    assert len({*different}) == len(different)

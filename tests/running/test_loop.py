"""The loop that all training shares: what is called at which step, and what ends it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from d2v_scale.checkpoint.snapshot import Contents
from d2v_scale.process.signals import StopFlag, StopReason
from d2v_scale.running import loop
from d2v_scale.tracking import SpeedMeter


class CountingRun:
    """A run that does nothing but write down what is asked of it."""

    def __init__(self, directory: Path, *, steps: int, every: int, plot_every: int | None, save_every: int) -> None:
        self.asked: list[str] = []
        self.step, self.saved, self.directory = 0, -1, directory
        self.meter = SpeedMeter()
        self.topology = SimpleNamespace(rank=0, model_size=1, world_size=1)
        self.options = SimpleNamespace(stop_at=None)
        self.recipe = SimpleNamespace(
            optim=SimpleNamespace(max_steps=steps),
            profile=SimpleNamespace(bounds=lambda: None),
            evaluation=SimpleNamespace(every=every),
            tracking=SimpleNamespace(plot_every=plot_every, straggler_factor=2.0),
            checkpoint=SimpleNamespace(due=lambda step: step % save_every == 0),
            max_skipped_in_a_row=3,
        )
        self.student = SimpleNamespace(module=nn.Linear(1, 1).eval(), skipped_in_a_row=0, spikes=None)
        self.tracker = SimpleNamespace(
            due=lambda step, end: step in (1, end), spent=self.spend, flush=lambda: None, log=lambda *_: None
        )
        self.writer = SimpleNamespace(poll=list, save=self.save)
        self.copies, self.samples = None, 0
        self.verdict: tuple[int, StopReason, str] | None = None
        self.applied = True
        self.loader = self

    def __next__(self) -> list[Any]:
        return []

    def alarm(self) -> None:
        """No sample is lost."""

    def spend(self, step: int, seconds: dict[str, float]) -> None:
        assert step == self.step
        assert seconds["data"] > 0

    def profiled(self) -> dict[str, nn.Module]:
        return {}

    def begin(self) -> None:
        self.asked.append("begin")

    def take_step(self, micro_batches: list[Any], *, logged: bool) -> Any:
        assert self.student.module.training
        assert micro_batches == []
        self.asked.append(f"step {self.step}{' logged' if logged else ''}")
        self.student.skipped_in_a_row += not self.applied
        return SimpleNamespace(result=SimpleNamespace(applied=self.applied, spike=None))

    def record(self, taken: Any) -> list[tuple[StopReason, str]]:
        assert taken.result.applied == self.applied
        assert self.meter.read()["step_seconds"] > 0
        self.asked.append(f"record {self.step}")
        return [] if self.verdict is None or self.verdict[0] != self.step else [self.verdict[1:]]

    def evaluate(self) -> None:
        self.asked.append(f"evaluate {self.step}")

    def draw_pictures(self) -> None:
        self.asked.append(f"draw {self.step}")

    def contents(self) -> Contents:
        return Contents([], {}, {})

    def save(self, step: int, *_: Any) -> float:
        self.asked.append(f"save {step}")
        return 0.0


def train(run: CountingRun) -> tuple[Any, list[int], StopFlag]:
    """Why it stopped (None: it did not), the steps that the watchdog heard of, and the flag."""
    heard: list[int] = []
    flag = StopFlag()
    agreement = SimpleNamespace(agree=lambda raised: raised, conclude=lambda: None)
    stop = loop.train(run, flag, agreement, SimpleNamespace(beat=heard.append))  # type: ignore[arg-type]
    return stop, heard, flag


def test_everything_is_asked_for_at_its_steps(tmp_path: Path) -> None:
    run = CountingRun(tmp_path, steps=4, every=2, plot_every=3, save_every=3)
    stop, heard, flag = train(run)
    assert (stop, heard, flag.starting) == (None, [1, 2, 3, 4], False)
    assert run.asked == [
        *("evaluate 0", "begin", "step 0 logged", "record 1", "step 1", "evaluate 2"),
        *("step 2", "draw 3", "save 3", "step 3 logged", "record 4", "evaluate 4", "draw 4"),
    ]


@pytest.mark.parametrize(("plot_every", "drawn"), [(None, []), (0, ["draw 2"]), (1, ["draw 1", "draw 2"])])
def test_pictures_are_drawn_at_the_end_unless_none_are_wanted(
    plot_every: int | None, drawn: list[str], tmp_path: Path
) -> None:
    run = CountingRun(tmp_path, steps=2, every=0, plot_every=plot_every, save_every=9)
    train(run)
    assert [one for one in run.asked if one.startswith("draw")] == drawn
    assert [one for one in run.asked if one.startswith("evaluate")] == ["evaluate 0", "evaluate 2"]


def test_a_run_that_goes_on_is_not_evaluated_first_and_one_at_its_end_does_nothing(tmp_path: Path) -> None:
    run = CountingRun(tmp_path, steps=3, every=0, plot_every=None, save_every=9)
    run.step = 2
    assert train(run)[:2] == (None, [3])
    assert run.asked == ["begin", "step 2 logged", "record 3", "evaluate 3"]
    assert train(run)[:2] == (None, [])
    assert run.asked[4:] == []


def test_what_a_record_says_ends_the_run_after_what_is_due_at_its_step(tmp_path: Path) -> None:
    run = CountingRun(tmp_path, steps=9, every=1, plot_every=None, save_every=1)
    run.verdict = (1, StopReason.COLLAPSE, "the targets are all alike")
    stop, heard, flag = train(run)
    assert (stop, heard, flag.detail) == (StopReason.COLLAPSE, [1], "the targets are all alike")
    assert run.asked[-2:] == ["evaluate 1", "save 1"]


def test_a_norm_is_judged_among_those_of_the_sources_that_its_step_reads(tmp_path: Path) -> None:
    class TakingTurns(CountingRun):
        def __next__(self) -> list[Any]:
            own = ("text",) if self.step % 2 else ("vision", "speech", "vision")
            return [SimpleNamespace(source=source) for source in own]

        def take_step(self, micro_batches: list[Any], *, logged: bool) -> Any:
            self.asked.append(self.student.spikes.rule.read)
            return super().take_step([], logged=logged)

    run = TakingTurns(tmp_path, steps=2, every=0, plot_every=None, save_every=9)
    run.student.spikes = SimpleNamespace(rule=SimpleNamespace(read=""))
    train(run)
    assert [one for one in run.asked if one[-6:] in ("vision", "text")] == ["speech, vision", "text"]


def test_a_run_of_skipped_steps_ends(tmp_path: Path) -> None:
    run = CountingRun(tmp_path, steps=9, every=0, plot_every=None, save_every=9)
    run.applied = False
    stop, heard, _ = train(run)
    assert (stop, heard) == (StopReason.NON_FINITE, [1, 2, 3])

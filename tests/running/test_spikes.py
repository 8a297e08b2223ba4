"""What is done about a spike, and how much of it before the run ends."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d2v_scale.data.config import LeaveOut
from d2v_scale.data.leaving_out import LeavingOut
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.process.signals import StopFlag, StopReason
from d2v_scale.running import spikes
from d2v_scale.running.loop import judge
from d2v_scale.running.spikes import SPIKES_FILE, prepare, respond
from d2v_scale.spikes import LOSS, NORM, Spike, SpikeConfig
from d2v_scale.tracking.summary import _incidents

SPIKE = Spike(9.0, 3.0, NORM, 2.0, 1.0, 50)
DAMAGED = 0


@pytest.fixture(autouse=True)
def _checkpoints_are_names_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(directory: Path, *, together: bool) -> tuple[Any, list[Any]]:
        assert together
        steps = sorted(int(path.name) for path in directory.iterdir())
        if steps and steps[0] == DAMAGED:
            raise CheckpointError("it holds no valid checkpoint")
        if not steps:
            return None, []
        data = {"sources": {"s": {"epoch": 0, "window": 0, "offset": 8 * steps[-1]}}}
        return SimpleNamespace(step=steps[-1], extra={"data": data}), []

    monkeypatch.setattr(spikes, "find_newest_valid", newest)


def make_run(directory: Path, *, committed: int | None = 10, step: int = 14, **settings: Any) -> Any:
    """A run whose steps read 8 items each. `committed`: step of its checkpoint; the save after that has failed."""
    (directory / "checkpoints").mkdir(exist_ok=True)
    if committed is not None:
        (directory / "checkpoints" / str(committed)).touch()
    loader = SimpleNamespace(
        sources=[],
        leaving_out=LeavingOut(["s"], []),
        read_lately=lambda steps: [LeaveOut(source="s", begin=[0, 0, 8 * (14 - steps)], end=[0, 0, 8 * 14])],
        take_counts=dict,
        alarm=lambda: None,
    )
    run = SimpleNamespace(
        directory=directory,
        step=step,
        saved=13,
        topology=SimpleNamespace(rank=0, world_size=1),
        recipe=SimpleNamespace(optim=SimpleNamespace(spikes=SpikeConfig(**settings)), max_skipped_in_a_row=3),
        student=SimpleNamespace(skipped_in_a_row=1),
        writer=SimpleNamespace(finish=lambda: False),
        copies=None,
        tracker=SimpleNamespace(
            artifact=lambda path: None, rewinds=lambda step, spent: None, rewound=lambda step: None
        ),
        meter=SimpleNamespace(spent={}, restart=lambda: None),
        loader=loader,
        begin=lambda: None,
    )
    run.reload = lambda: setattr(run, "step", committed)
    return run


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / SPIKES_FILE).read_text().splitlines()]


def test_a_rewind_goes_back_and_names_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, on_spike="rewind", leave_out=2)
    assert respond(run, SPIKE, StopFlag())
    assert run.step == 10
    [line] = lines(tmp_path)
    assert line["left_out"] == [{"source": "s", "begin": [0, 0, 96], "end": [0, 0, 112]}]
    assert (line["step"], line["rewound_to"], line["norm"], line["limit"]) == (14, 10, 9.0, 2.0)
    assert "goes back to step 10, without the samples from [0, 0, 96] to [0, 0, 112] of s" in caplog.text
    [said] = list(_incidents(tmp_path, [], [], None))
    assert (said.step, said.what) == (14, "spike: gradient norm 9, above 2; went back to step 10")
    # Another process of the run leaves them out, too.
    again = make_run(tmp_path, on_spike="rewind")
    prepare(again)
    assert again.loader.leaving_out._ranges == run.loader.leaving_out._ranges != [[]]


def test_the_report_says_that_a_loss_was_the_spike(tmp_path: Path) -> None:
    respond(make_run(tmp_path, on_spike="skip"), replace(SPIKE, of=LOSS), StopFlag())
    assert (lines(tmp_path)[0]["of"], lines(tmp_path)[0]["loss"]) == ("loss", 3.0)
    [said] = list(_incidents(tmp_path, [], [], None))
    assert said.what == "spike: loss 3, above 2; skipped"


def test_what_lies_before_the_checkpoint_is_kept(tmp_path: Path) -> None:
    assert respond(make_run(tmp_path, on_spike="rewind", leave_out=9), SPIKE, StopFlag())
    assert lines(tmp_path)[0]["left_out"] == [{"source": "s", "begin": [0, 0, 80], "end": [0, 0, 112]}]


@pytest.mark.parametrize("committed", [None, DAMAGED])
def test_without_a_checkpoint_a_rewind_skips(
    committed: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not respond(make_run(tmp_path, on_spike="rewind", committed=committed), SPIKE, StopFlag())
    assert lines(tmp_path)[0]["answer"] == "skip"
    assert "no checkpoint" in caplog.text


@pytest.mark.parametrize("on_spike", ["skip", "stop", "rewind"])
def test_a_full_disk_ends_no_run_and_a_rewind_that_nobody_could_repeat_skips(
    on_spike: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path, on_spike=on_spike)
    monkeypatch.setattr(spikes, "append_line", full)
    assert not respond(run, SPIKE, StopFlag())
    assert (run.step, run.loader.leaving_out._ranges) == (14, [[]])
    if on_spike == "rewind":
        assert "it is skipped, as spikes.jsonl takes no lines ([Errno 28] No space left on device)" in caplog.text


@pytest.mark.parametrize("on_spike", ["skip", "stop", "rewind"])
def test_every_answer_says_what_was_read(on_spike: str, tmp_path: Path) -> None:
    respond(make_run(tmp_path, on_spike=on_spike, leave_out=2), SPIKE, StopFlag())
    assert lines(tmp_path)[0]["read"] == [{"source": "s", "begin": [0, 0, 96], "end": [0, 0, 112]}]


def test_a_run_that_is_to_stop_stops(tmp_path: Path) -> None:
    flag = StopFlag()
    assert not respond(make_run(tmp_path, on_spike="stop"), SPIKE, flag)
    assert flag.raised() is StopReason.SPIKE
    assert "step 14 is a spike: its gradient norm is 9, above 2" in flag.detail
    assert StopReason.SPIKE.exit_code == 15


def test_a_rule_that_finds_spikes_everywhere_ends_the_run_and_is_named(tmp_path: Path) -> None:
    flag = StopFlag()
    for step in (14, 15, 15, 16):  # 15 was done again after a fault: the same spike
        respond(make_run(tmp_path, step=step, on_spike="skip", most=3), SPIKE, flag)
    assert flag.raised() is None
    respond(make_run(tmp_path, step=2000, on_spike="skip", most=3), SPIKE, flag)
    assert flag.raised() is None, "those are long past"
    respond(make_run(tmp_path, step=17, on_spike="skip", most=3), SPIKE, flag)
    assert flag.raised() is StopReason.SPIKE
    assert "3 of the last 1000 steps were spikes (optim.spikes.most)" in flag.detail


def test_spikes_in_a_row_end_the_run_as_such(tmp_path: Path) -> None:
    run, flag = make_run(tmp_path, on_spike="skip"), StopFlag()
    run.student.skipped_in_a_row = 3
    judge(run, SimpleNamespace(applied=False, spike=SPIKE), flag)  # type: ignore[arg-type]
    assert (flag.raised(), flag.detail) == (StopReason.SPIKE, "3 steps were skipped in a row")


def test_streams_have_no_ranges_to_leave_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, on_spike="rewind")
    source = StreamedSource.__new__(StreamedSource)
    source.name = "s"
    run.loader.sources = [source]
    with pytest.raises(ConfigError, match="has no index"):
        prepare(run)

"""What surrounds the loops: verdicts with their reasons, and what was lost."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from d2v_scale.process.signals import StopFlag, StopReason
from d2v_scale.running import supervision
from d2v_scale.running.loop import judge
from d2v_scale.running.supervision import completed, report_losses, supervise


def run_with(directory: Path, *, alarm: str | None = None, skipped: int = 0) -> Any:
    sent: list[Path] = []
    return SimpleNamespace(
        directory=directory,
        step=7,
        recipe=SimpleNamespace(max_skipped_in_a_row=3),
        student=SimpleNamespace(skipped_in_a_row=skipped),
        loader=SimpleNamespace(alarm=lambda: alarm),
        tracker=SimpleNamespace(artifact=sent.append, sent=sent),
    )


def test_a_starved_run_says_which_shard_starved_it(tmp_path: Path, caplog) -> None:
    flag = StopFlag()
    judge(run_with(tmp_path, alarm="5 of 9 samples, most in b.tar"), SimpleNamespace(applied=True, spike=None), flag)  # type: ignore[arg-type]
    assert flag.raised() == StopReason.DATA_STARVED
    assert flag.detail == "5 of 9 samples, most in b.tar"
    assert "most in b.tar" in caplog.text


def test_skipped_steps_stop_a_run_when_there_are_too_many_in_a_row(tmp_path: Path) -> None:
    flag = StopFlag()
    judge(run_with(tmp_path, skipped=2), SimpleNamespace(applied=False, spike=None), flag)  # type: ignore[arg-type]
    assert flag.raised() is None
    judge(run_with(tmp_path, skipped=3), SimpleNamespace(applied=False, spike=None), flag)  # type: ignore[arg-type]
    assert (flag.raised(), flag.detail) == (StopReason.NON_FINITE, "3 steps were skipped in a row")


def test_lost_samples_are_written_by_shard(tmp_path: Path, caplog) -> None:
    run = run_with(tmp_path)
    report_losses(run, [{"a.tar": 2, "b.tar": 1}, {"b.tar": 4}])
    assert list(json.loads((tmp_path / "lost_samples.json").read_text()).items()) == [("b.tar", 5), ("a.tar", 2)]
    assert run.tracker.sent == [tmp_path / "lost_samples.json"]
    assert "7 samples were lost, most in b.tar" in caplog.text


def test_a_run_that_is_beyond_its_stop_at_says_that_it_did_nothing() -> None:
    run: Any = SimpleNamespace(
        step=7, options=SimpleNamespace(stop_at=5), recipe=SimpleNamespace(optim=SimpleNamespace(max_steps=9))
    )
    assert completed(run, 4) == "stopped at step 7 of 9 (--stop_at)"
    assert completed(run, 7) == "nothing to do: already at step 7 of 9 (--stop_at 5)"
    run.step = 9
    assert completed(run, 7) == "all 9 steps done"
    assert completed(run, 9) == "all 9 steps were done before"


def finish(
    rank: int, committed: bool, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: Any = None
) -> int:
    """The end of a run whose steps are done; `order` gets what happens."""
    run: Any = MagicMock(
        directory=tmp_path,
        step=9,
        copies=copies,
        options=SimpleNamespace(stop_at=None),
        recipe=SimpleNamespace(
            hang_limit_minutes=1.0,
            checkpoint=SimpleNamespace(peer_timeout=1.0),
            optim=SimpleNamespace(max_steps=9),
        ),
        topology=SimpleNamespace(rank=rank, local_rank=1, world_size=1),
    )
    agreement = SimpleNamespace(gather=lambda mine: [mine], barrier=lambda: order.append("barrier"))

    def close(*_: object) -> list[str]:
        order.append("last words")
        return []

    stand_ins = {
        "spikes": SimpleNamespace(prepare=lambda _: None),
        "saving": SimpleNamespace(prepare=lambda _: None),
        "Agreement": lambda: agreement,
        "train": lambda *_: None,
        "report_losses": lambda *_: None,
        "closing": lambda *_, **__: [],
        "_open_record": lambda _: [],
        "_save_last": lambda *_: committed,
        "_close_record": close,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(supervision, name, stand_in)
    return supervise(run, StopFlag())


@pytest.mark.parametrize(
    ("rank", "committed", "expected"),
    [
        (0, True, ["barrier", "last words"]),
        (0, False, ["barrier", "last words", "barrier"]),
        (1, True, ["barrier"]),
        (1, False, ["barrier", "barrier"]),
    ],
)
def test_without_a_last_checkpoint_nobody_leaves_before_rank_0_has_said_so(
    rank: int, committed: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    assert finish(rank, committed, order, tmp_path, monkeypatch) == (0 if committed else 1)
    assert order == expected


@pytest.mark.parametrize("committed", [True, False])
def test_all_have_sent_their_last_copy_before_anybody_takes_none_or_removes_some(
    committed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    copies = SimpleNamespace(
        wait=lambda: order.append("sent"), close=lambda *, keep: order.append("kept" if keep else "removed")
    )
    finish(1, committed, order, tmp_path, monkeypatch, copies)
    assert order[:3] == ["sent", "barrier", "removed" if committed else "kept"]

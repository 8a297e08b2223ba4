from pathlib import Path

import pytest

from d2v_scale import errors
from d2v_scale.files import append_line
from d2v_scale.process.signals import StopReason
from d2v_scale.process.status import Status, write_status
from d2v_scale.running import attempts
from d2v_scale.running.attempts import Attempt, decide, ended

ASKED = Attempt(errors.EXIT_REQUEUE, "SIGUSR1 received (rank 3)", 40)
HUNG = Attempt(errors.EXIT_REQUEUE, "silent: rank 3 (process 12 on n2) is stopped", 40)
LOST = Attempt(errors.EXIT_LOST_PEER, "no status.json", 40)


def test_finished_run_is_never_requeued() -> None:
    assert not decide([LOST, Attempt(errors.EXIT_DONE, "all steps done", 100)], 3).requeue


@pytest.mark.parametrize("code", [errors.EXIT_BAD_INPUT, errors.EXIT_NON_FINITE, errors.EXIT_COLLAPSE])
def test_what_would_fail_again_is_not_requeued(code: int) -> None:
    assert not decide([Attempt(code, "reason", 40)], 3).requeue


def test_signals_are_no_failures_however_often_they_come() -> None:
    assert all(decide([ASKED] * count, 3).requeue for count in range(1, 10))


@pytest.mark.parametrize("failure", [LOST, HUNG, Attempt(1, "RuntimeError", 40), Attempt(13, "data starvation", 40)])
def test_equal_failures_end_at_the_limit(failure: Attempt) -> None:
    assert [decide([failure] * count, 3).requeue for count in (1, 2, 3, 4)] == [True, True, False, False]


def test_a_preemption_between_equal_failures_does_not_reset_the_count() -> None:
    assert not decide([LOST, ASKED, LOST, ASKED, LOST], 3).requeue


def test_a_new_checkpoint_or_another_failure_starts_the_count_again() -> None:
    further = Attempt(LOST.exit_code, LOST.reason, 50)
    assert decide([LOST, LOST, further], 3).requeue
    assert decide([LOST, LOST, HUNG], 3).requeue


def test_status_counts_for_more_than_sruns_code() -> None:
    assert ended(Status("done", 0, "all steps done", 9), 1, 9).exit_code == errors.EXIT_DONE


def test_without_a_status_a_process_was_lost() -> None:
    assert ended(None, 0, -1).exit_code == errors.EXIT_LOST_PEER
    assert ended(None, 247, -1).exit_code == errors.EXIT_LOST_PEER


def test_a_mistake_found_before_there_was_a_run_directory_is_bad_input() -> None:
    assert ended(None, errors.EXIT_BAD_INPUT, -1).exit_code == errors.EXIT_BAD_INPUT


def test_only_committed_checkpoints_count_as_progress(tmp_path: Path) -> None:
    assert attempts.newest_checkpoint(tmp_path) == -1
    for step, committed in ((20, True), (40, True), (60, False)):
        directory = tmp_path / f"checkpoints/step-{step:08d}"
        directory.mkdir(parents=True)
        if committed:
            (directory / "COMMITTED").touch()
    assert attempts.newest_checkpoint(tmp_path) == 40


def test_a_copy_in_memory_that_an_attempt_went_on_from_counts_as_progress(tmp_path: Path) -> None:
    def begin(resumed: int) -> None:
        append_line(tmp_path / "timeline.jsonl", {"event": "begin", "started": 1.0, "resumed": resumed})
        append_line(tmp_path / "timeline.jsonl", {"event": "at", "step": resumed + 1, "spent": {}})

    begin(0)
    assert attempts.newest_checkpoint(tmp_path) == -1
    begin(60)
    (tmp_path / "timeline.jsonl").open("a").write('{"event": "begin", "resu')
    assert attempts.newest_checkpoint(tmp_path) == 60
    (tmp_path / "checkpoints/step-00000080").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000080/COMMITTED").touch()
    assert attempts.newest_checkpoint(tmp_path) == 80


def test_a_kept_copy_of_a_checkpoint_does_not_keep_a_job_from_its_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("step-00000020", "step-00000040-best"):
        directory = tmp_path / "checkpoints" / name
        directory.mkdir(parents=True)
        (directory / "COMMITTED").touch()
    write_status(tmp_path, errors.EXIT_REQUEUE, ASKED.reason)
    monkeypatch.setattr("sys.argv", ["attempts", str(tmp_path), "0"])
    attempts.main()
    assert capsys.readouterr().out == "requeue\n"
    assert attempts.read_attempts(tmp_path)[-1].step == 20


def test_attempts_are_recorded_and_a_torn_line_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"exit_code": 14, "reason": "a", "step": -1}\n{"exit_co\n')
    monkeypatch.setattr("sys.argv", ["attempts", str(tmp_path), "9"])
    assert attempts.main() == errors.EXIT_LOST_PEER
    assert capsys.readouterr().out == "requeue\n"
    assert [one.exit_code for one in attempts.read_attempts(tmp_path)] == [14, 14]
    attempts.main()
    assert capsys.readouterr().out == "stop\n"


def test_failures_that_cannot_be_counted_are_not_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attempts.jsonl").mkdir()  # takes no line, like a file on a full disk
    monkeypatch.setattr("sys.argv", ["attempts", str(tmp_path), "9"])
    assert attempts.main() == errors.EXIT_LOST_PEER
    told = capsys.readouterr()
    assert told.out == "stop\n"
    assert "attempts cannot be counted" in told.err
    write_status(tmp_path, errors.EXIT_REQUEUE, StopReason.USR1.text)
    assert attempts.main() == errors.EXIT_REQUEUE
    assert capsys.readouterr().out == "requeue\n"

"""What a run says when it ends."""

from pathlib import Path

import pytest

from d2v_scale import errors
from d2v_scale.running.closing import closing, described, happened, next_commands, worth
from d2v_scale.tracking.mirror_state import MirrorState

RUN = Path("runs/x")
LEARNED = [
    {"step": 0, "knn_accuracy": 0.4, "held_out_loss": 0.5},
    {"step": 1, "loss": 0.9},
    {"step": 9, "loss": 0.25},
    {"step": 9, "knn_accuracy": 0.725, "knn_raw": 0.61, "knn_chance": 0.125, "held_out_loss": 0.25},
]


def test_it_ends_with_what_happened_what_it_is_worth_and_the_next_command() -> None:
    said = happened(errors.EXIT_DONE, "all 9 steps done", LEARNED, "Healthy.", is_task=False)
    assert [*said, *closing(RUN, errors.EXIT_DONE, ends=True)] == [
        "Done: all 9 steps done",
        "Result: loss 0.25, held-out loss 0.25 (0.5 at first), "
        "k-NN accuracy 72.5% (40.0% at first, 61.0% with raw features, 12.5% by chance)",
        "Verdict: Healthy.",
        "Next: d2v report runs/x",
        "Next: d2v export runs/x runs/x/encoder --to hf",
    ]
    assert described(said[:1], ["model   x", "run     y"]) == "Done: all 9 steps done\n\n    model   x\n    run     y"


def test_it_says_how_to_open_its_charts(tmp_path: Path) -> None:
    page = "#/experiments/1/runs/ab/model-metrics?workflowType=machine_learning"
    MirrorState(tracking_uri="sqlite:////a/mlflow.db", run_id="ab", experiment_id="1").save(tmp_path)
    look = closing(tmp_path, errors.EXIT_COLLAPSE, ends=False)[0]
    assert look == f"Charts: mlflow ui --backend-store-uri sqlite:////a/mlflow.db then http://127.0.0.1:5000/{page}"
    MirrorState(tracking_uri="https://host/", run_id="ab", experiment_id="1").save(tmp_path)
    assert closing(tmp_path, errors.EXIT_COLLAPSE, ends=False)[0] == f"Charts: https://host/{page}"


def test_fine_tuning_says_its_own_figures() -> None:
    records = [{"step": 5, "loss": 1.5}, {"step": 5, "test/accuracy": 0.5, "test/samples": 40.0, "test/lost": 0.0}]
    assert worth(records, is_task=True) == {"": ["loss 1.5", "held-out accuracy 50.0%"]}
    said = worth([{"step": 5, "loss": 1.5}, {"step": 5, "test/wer": 0.104}], is_task=True)
    assert said[""][1] == "held-out wer 10.4%"


def test_stems_are_said_side_by_side() -> None:
    records: list[dict[str, float]] = [
        {"step": 0, "knn_accuracy/vision": 0.1, "held_out_loss/vision": 0.9, "held_out_loss/speech/target_codes": 2.0},
        {"step": 9, "loss": 0.5, "loss/vision": 0.25, "loss/speech": 0.75, "loss/masked_50_75": 0.6},
        {"step": 9, "knn_accuracy/vision": 0.4, "held_out_loss/vision": 0.3},
    ]
    assert worth(records, is_task=False) == {
        "": ["loss 0.5"],
        "vision": ["loss 0.25", "held-out loss 0.3 (0.9 at first)", "k-NN accuracy 40.0% (10.0% at first)"],
        "speech": ["loss 0.75"],
    }


def test_a_run_that_is_not_at_its_end_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert next_commands(RUN, errors.EXIT_DONE, ends=False) == ["d2v train --resume runs/x"]
    assert next_commands(RUN, errors.EXIT_REQUEUE, ends=False) == ["d2v train --resume runs/x"]
    assert next_commands(RUN, errors.EXIT_COLLAPSE, ends=False) == ["d2v report runs/x"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert next_commands(RUN, errors.EXIT_REQUEUE, ends=False) == []


def test_nothing_that_was_not_measured_is_said() -> None:
    assert happened(errors.EXIT_COLLAPSE, "collapse", [], "", is_task=False) == ["Failed: collapse"]
    assert closing(RUN, errors.EXIT_COLLAPSE, ends=False) == ["Next: d2v report runs/x"]


def test_what_was_measured_before_the_run_was_stopped_says_when() -> None:
    """A run that was stopped at its fourth step gave the k-NN accuracy of random weights as its result."""
    stopped: list[dict[str, float]] = [{"step": 0, "knn_accuracy": 0.4, "knn_raw": 0.8}, {"step": 4, "loss": 0.5}]
    assert (
        worth(stopped, is_task=False)[""][1] == "k-NN accuracy 40.0% (before the first step, 80.0% with raw features)"
    )
    later = [*stopped, {"step": 100, "knn_accuracy": 0.6}, {"step": 130, "loss": 0.25}]
    assert worth(later, is_task=False)[""][1].startswith("k-NN accuracy 60.0% (at step 100, 40.0% at first, ")
    tuned: list[dict[str, float]] = [{"step": 5, "test/accuracy": 0.5}, {"step": 6, "loss": 1.5}]
    assert worth(tuned, is_task=True)[""][1] == "held-out accuracy 50.0% (at step 5)"


def test_a_run_that_ends_early_on_demand_is_not_called_done() -> None:
    """It said `Done: stopped at step 130 of 800`."""
    said = happened(errors.EXIT_DONE, "stopped at step 130 of 800 (--stop_at)", [], "", is_task=False)
    assert said == ["Stopped at step 130 of 800 (--stop_at)"]
    said = happened(errors.EXIT_DONE, "nothing to do: already at step 130 of 800 (--stop_at 9)", [], "", is_task=False)
    assert said == ["Nothing to do: already at step 130 of 800 (--stop_at 9)"]

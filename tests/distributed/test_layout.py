"""Where the student's master weights are is verified before training, on every rank and for every stage."""

import json
from pathlib import Path

import pytest
from launch import run_ranks

WORKER = Path(__file__).with_name("layout_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What the check says of each case, the same on both ranks."""
    out = tmp_path_factory.mktemp("layout") / "found.json"
    run_ranks(2, WORKER, str(out))
    first, second = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2))
    cuts = [found.pop("cut elsewhere") for found in (first, second)]
    assert first == second
    return {**first, "cut elsewhere": cuts[0]}


def test_round_robin_is_right_by_addresses(found: dict[str, str | None]) -> None:
    assert found["round robin, by addresses"] is None
    assert found["names of DeepSpeed, in order"] is None


@pytest.mark.parametrize("case", ["by DeepSpeed's names", "offload", "all zero"])
def test_what_deepspeed_names_wrongly_with_round_robin_is_noticed(found: dict[str, str | None], case: str) -> None:
    """Zeros equal zeros: addresses tell them apart."""
    said = found[f"round robin, {case}"]
    assert said is not None
    assert "the master weights of" in said
    assert "another tensor's" in said
    assert "ds_configs/" in said


def test_values_from_elsewhere_in_a_tensor_are_noticed(found: dict[str, str | None]) -> None:
    assert "rank 1 has other values of mask_embedding than those from 6 on" in (found["cut elsewhere"] or "")


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("lost at stage 2", "the ranks have"),
        ("lost at stage 3", "the ranks have"),
        ("twice", "are in one place"),
        ("other values, offload", "other values than the tensor (rank 1)"),
        ("other values at stage 3, offload", "other values than the tensor (rank 1)"),
    ],
)
def test_a_layout_that_is_not_whole_ends_the_start(found: dict[str, str | None], case: str, problem: str) -> None:
    assert problem in (found[case] or "")

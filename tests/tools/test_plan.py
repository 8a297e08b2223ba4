"""plan.py answers from the recipe alone, and refuses what cannot be."""

import re
from pathlib import Path

import pytest
from launch import run_program

PROGRAM = Path(__file__).resolve().parents[2] / "tools/plan.py"


def plan(*arguments: str) -> str:
    """What is printed."""
    code, printed = run_program(PROGRAM, *arguments)
    assert code == 0, printed
    return printed


def test_the_largest_recipe_on_its_cluster() -> None:
    said = plan("--recipe", "d2v2_vision_7b", "--nodes", "32", "--gpus", "8", "--device", "h100", "--mfu", "0.5")
    assert "6.88 billion parameters) on 256 x h100" in said
    assert "256 positions, 64 kept, 192 masked, 16 masks a sample" in said
    gflops = float(said.split("FLOPs of a sample")[1].split()[0])
    products = float(re.search(r"products ([\d.]+) s", said)[1])
    # Tensor parallelism leaves the decoder whole.
    decoder = float(re.search(r"decoder ([\d.]+)%", said)[1]) / 100
    tensor = int(re.search(r"--parallel.tensor (\d+)", said)[1])
    divided = 1024 * gflops * 1e9 / (256 * 989.4e12 * 0.5)
    assert abs(products - divided * (1 + decoder * (tensor - 1))) < 1e-3
    for shown in ("topologies fit", "GB on each device", "weight gather", "loader rate needed", "estimated run"):
        assert shown in said


def test_a_model_of_arrays_is_planned_without_any() -> None:
    said = plan("--recipe", "d2v2_video_large", "--nodes", "1", "--gpus", "2")
    assert "0.31 billion parameters) on 2 x h100" in said
    assert "video: 1568 positions, 152 kept, 1416 masked, 8 masks a sample" in said
    assert "topologies fit" in said


def test_what_does_not_fit_is_said_with_what_is_missing() -> None:
    said = plan("--recipe", "d2v2_vision_7b", "--gpus", "1", "--device", "a100", "--model.backbone.depth", "120")
    assert re.search(r"zero1\.json .* lacks \d+ GB of device memory", said)


def test_bad_input_is_refused() -> None:
    for arguments, said in (
        (["--recipe", "d2v2_text_base", "--device", "tpu"], "device: 'tpu' is not known"),
        (["--recipe", "no_such_recipe"], "no_such_recipe"),
        (["--recipe", "d2v2_text_base", "--nodes", "0"], "nodes and gpus start at 1"),
        (["--device", "h100"], "give --recipe or --table"),
        (["--recipe", "d2v2_text_base", "--calibration", "none.json"], "calibration: there is no file none.json"),
    ):
        code, output = run_program(PROGRAM, *arguments)
        assert code == 2, arguments
        assert output.startswith("error: ")
        assert said in output


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_the_command_prints() -> None:
    said = plan("--table", "--device", "h100")
    assert said in (PROGRAM.parents[1] / "docs/training.md").read_text()

"""Tensor parallelism changes nothing: outputs, gradients and weights after several steps equal one process's."""

from pathlib import Path

import pytest
import torch
from launch import run_ranks

HERE = Path(__file__).resolve().parent
WORKER = HERE / "tensor_parallel_worker.py"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process computes for every case."""
    import tensor_parallel_worker as worker

    from d2v_scale.parallel import groups

    groups.single_process()
    path = tmp_path_factory.mktemp("tensor_parallel") / "one_process.pt"
    torch.save({f"{name} padded={padded}": worker.run_case(name, padded) for name, padded in worker.CASES}, path)
    return path


def test_two_tensor_parallel_ranks_equal_one_process(recording: Path) -> None:
    for output in run_ranks(2, WORKER, str(recording), "2"):
        assert "all cases agree" in output


@pytest.mark.slow
def test_four_tensor_parallel_ranks_equal_one_process(recording: Path) -> None:
    for output in run_ranks(4, WORKER, str(recording), "4"):
        assert "all cases agree" in output

"""The real models in the ZeRO engines with a sharded teacher: the same losses as a plain loop in one process."""

from pathlib import Path

import pytest
import tiny_models
import torch
from launch import run_ranks

HERE = Path(__file__).resolve().parent
WORKER = HERE / "sharded_model_worker.py"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses of the plain loop."""
    import sharded_model_worker as worker

    from d2v_scale.parallel import groups

    groups.single_process()
    path = tmp_path_factory.mktemp("sharded_model") / "plain.pt"
    torch.save({name: worker.plain_losses(name) for name in tiny_models.NAMES}, path)
    return path


def test_every_model_trains_alike_sharded_and_whole(recording: Path) -> None:
    for output in run_ranks(2, WORKER, str(recording), "1", "1", "3"):
        print(output)
        assert "all cases agree" in output


@pytest.mark.slow
def test_every_model_trains_alike_under_tensor_parallelism_and_zero3(recording: Path) -> None:
    for output in run_ranks(4, WORKER, str(recording), "2", "3"):
        print(output)
        assert "all cases agree" in output

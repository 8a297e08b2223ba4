"""The real models in the ZeRO engines with a sharded teacher: the same losses as a plain loop in one process."""

import sys
from pathlib import Path

import tiny_models
import torch
from launch import run_ranks

HERE = Path(__file__).resolve().parent
WORKER = HERE / "sharded_model_worker.py"


def test_every_model_trains_alike_sharded_and_whole(tmp_path: Path, world_of_one: None) -> None:
    sys.path.insert(0, str(HERE))
    import sharded_model_worker as worker

    recording = tmp_path / "plain.pt"
    torch.save({name: worker.plain_losses(name) for name in tiny_models.NAMES}, recording)
    for output in run_ranks(2, WORKER, str(recording)):
        print(output)
        assert "all cases agree" in output

"""State in the memory of nodes through the real training program: two ranks, each a node of its own with its own
memory file system; a run that lost ranks or a node goes on from there and ends as one that lost none.

Stage 0 stands for two pipeline stages.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT, Rank, start_program, free_port, stop

from d2v_scale.checkpoint import find_newest_valid
from d2v_scale.conversion import demo
from d2v_scale.tracking import read_records

STEPS, EVERY = 9, 2


def start(
    run_dir: Path, shards: Path, stage: int, *, ranks: int = 2, per_node: int = 1, fault: str = "", **more: Any
) -> list[Rank]:
    changes = {
        "recipe": "demo_vision",
        "run_dir": run_dir,
        "data": shards / "train.index.json",
        "deepspeed_config": ROOT / "ds_configs" / f"zero{max(1, stage)}.json",
        "parallel.pipeline": 1 if stage else 2,
        "stop_at": STEPS,
        "global_batch_size": 8,
        "checkpoint.every": 5,
        "checkpoint.memory.every": EVERY,
        "checkpoint.memory.dir": "$NODE_MEMORY",
        "teacher.placement": "cpu",
        "evaluation.train": "null",
        "evaluation.test": "null",
        "tracking.enabled": "false",
        "tracking.plot_every": "null",
        "tracking.log_every": 1,
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    arguments = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    import os

    base = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "D2V_FAULT": fault,
    }
    started = []
    for rank in range(ranks):
        memory = node_memory(run_dir, rank // per_node)
        memory.mkdir(parents=True, exist_ok=True)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node), "NODE_MEMORY": str(memory)}
        started.append(start_program(ROOT / "d2v_scale" / "train.py", *arguments, environment={**base, **own}))
    return started


def node_memory(run_dir: Path, node: int) -> Path:
    return run_dir.parent / f"{run_dir.name}-memory-{node}"

"""The screen that `--help` shows: the keys that people change, with the values of the recipe that is named."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2v_scale.run_files import recipe_file

OPTIONS = (
    ("recipe NAME", "one of --list_recipes, or a YAML file; default: demo_vision"),
    ("data SHARDS", "what is read: 'PATH-{000..099}.tar', 'PATH-*.tar' (quoted), a folder or an index"),
    ("run_dir DIR", "where everything goes; the same recipe there continues; default: runs/NAME-TIME"),
    ("resume DIR", "continue the run in this folder, with the recipe it was started with"),
    ("stop_at N", "end after this step, without changing the schedule"),
    ("init_from PATH", "start from the weights of a run or a checkpoint; fine-tuning also of an export"),
)
KEYS = (
    ("global_batch_size", "a whole step over all processes, in `batch_unit`"),
    ("batch_unit", "samples, seconds (of audio) or tokens"),
    ("accumulation", "micro-batches a step; less memory, the same result"),
    ("optim.lr", "peak learning rate"),
    ("optim.warmup_steps", "steps until the peak"),
    ("optim.max_steps", "the schedule's horizon, where the run ends"),
    ("optim.weight_decay", "decoupled (AdamW)"),
    ("optim.clip", "largest gradient norm; 0: any"),
    ("objective.masking.prob", "share of positions that are hidden"),
    ("objective.masking.clones", "masks of each sample (2.0)"),
    ("objective.target.top_k_layers", "last blocks whose mean the student predicts"),
    ("objective.ema.start", "decay of the teacher in the beginning; `end` and `anneal_steps` beside it"),
    ("model.backbone.width", "channels; `heads` and `ffn` beside it"),
    ("model.backbone.depth", "blocks"),
    ("model.activation_checkpointing", "recompute blocks: less memory, more time"),
    ("teacher.placement", "device or cpu: where the teacher's fp32 values are"),
    ("deepspeed_config", "ZeRO stage and offload: ds_configs/zero3.json and others"),
    ("parallel.tensor", "ranks that share every block; `parallel.pipeline`: stages"),
    ("checkpoint.every", "steps between checkpoints"),
    ("evaluation.every", "steps between evaluations; `evaluation.train` and `test`: labelled shards"),
)
"""The twenty of them."""


def screen(base: Path, more: Iterable[tuple[str, str]] = ()) -> str:
    """The text. `base`: the file of the recipe; `more`: rows as those of `OPTIONS`."""
    values = recipe_file.load(base)
    program = os.path.basename(sys.argv[0])
    options = [(f"--{option}", says) for option, says in (*OPTIONS, *more)]
    width = max(len(option) for option, _ in options)
    keys = [(f"--{key}", _shown(values, key), says) for key, says in KEYS]
    widths = [max(len(row[column]) for row in keys) for column in (0, 1)]
    return "\n".join(
        [
            f"usage: {program} [--recipe NAME] [--data SHARDS] [--KEY VALUE ...]",
            "",
            "Pretrain a data2vec model, or fine-tune one.",
            "",
            *(f"  {option:{width}}  {says}" for option, says in options),
            "",
            f"Keys that are often changed, and what {values.get('name', base.stem)} has:",
            *(f"  {key:{widths[0]}}  {value:{widths[1]}}  {says}" for key, value, says in keys),
            "",
            "--help_all explains every key, --list_recipes lists the recipes with their sizes,",
            "--print_config shows the whole recipe as it is resolved. Each of them ends the program.",
        ]
    )


def _shown(values: dict[str, Any], key: str) -> str:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return "null" if found is None else str(found).lower() if isinstance(found, bool) else str(found)

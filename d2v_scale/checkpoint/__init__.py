"""Checkpoints: sharded, committed by a marker, readable at any world size and topology.

Tools: `open_any(path).tensor("teacher", name)`, `write_single`. Training: `writer.CheckpointWriter`, `restore`. These
names are imported when they are first used: settings, which lie in this room, too, need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2v_scale.checkpoint.find import find_newest_valid, open_any
    from d2v_scale.checkpoint.reader import Checkpoint
    from d2v_scale.checkpoint.single import write_single

__all__ = ["Checkpoint", "find_newest_valid", "open_any", "write_single"]

_FROM = {"Checkpoint": "reader", "find_newest_valid": "find", "open_any": "find", "write_single": "single"}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)

"""Checkpoints: sharded, committed by a marker, readable at any world size and topology.

Tools: `open_any(path).tensor("teacher", name)`, `write_single`. Training: `writer.CheckpointWriter`, `restore`.
"""

from d2v_scale.checkpoint.find import find_newest_valid, open_any
from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.checkpoint.single import write_single

__all__ = ["Checkpoint", "find_newest_valid", "open_any", "write_single"]

"""One rank of two that look for the newest checkpoint; rank 1 does not see the newest one yet."""

import sys
from pathlib import Path

import torch.distributed as dist

from d2v_scale.checkpoint import find_newest_valid
from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.errors import CheckpointError

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, root = dist.get_rank(), Path(sys.argv[1])
    opened = Checkpoint.open

    def open_late(path: Path) -> Checkpoint:
        if rank == 1 and path.name == "step-00000002":
            raise CheckpointError(f"{path} was never completed.")
        return opened(path)

    Checkpoint.open = open_late
    found, skipped = find_newest_valid(root if rank == 0 else root / "not listed here", together=True)
    assert found is not None
    (root / f"found-{rank}").write_text(f"{found.step} {[s.path.name for s in skipped]}")
    dist.destroy_process_group()

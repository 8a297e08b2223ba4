"""Many cases in the same processes: a launch costs more than a case."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from d2v_scale.parallel import groups


def run_cases(run: Callable[[dict[str, Any], groups.Topology], None]) -> None:
    """What a worker does as `worker.py CASES.json`: each case in groups of its sizes `tensor` and `pipeline`."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    topology = groups.initialize(groups.ParallelConfig())
    held = (1, 1)
    for case in cases:
        wanted = (case.get("tensor", 1), case.get("pipeline", 1))
        if wanted != held:
            take_down_groups()
            topology = groups._divide(groups.ParallelConfig(tensor=wanted[0], pipeline=wanted[1]), topology.device)
            held = wanted
        with ending_together(case, topology):
            run(case, topology)
    groups.shutdown()


def take_down_groups() -> None:
    """End the groups of the present division, so that the ranks may be divided anew; collective.

    megatron forgets them, but each keeps three threads, of which one wakes a hundred times a second: those of eight
    divisions took more of the processor than the cases did.
    """
    from megatron.core import parallel_state

    made = [group for group in parallel_state._global_process_group_list if isinstance(group, dist.ProcessGroup)]
    parallel_state.destroy_model_parallel()
    for group in made:
        dist.destroy_process_group(group)


@contextlib.contextmanager
def ending_together(case: dict[str, Any], topology: groups.Topology) -> Iterator[None]:
    """Say which case failed, and end this rank: the others wait in a collective, and the launcher ends them."""
    try:
        yield
    except BaseException:
        print(f"case {case['name']} failed on rank {topology.rank}", flush=True)
        traceback.print_exc()
        sys.stdout.flush()
        sys.exit(1)

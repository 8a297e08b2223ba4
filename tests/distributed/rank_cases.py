"""Many cases in the same processes: a launch costs more than a case."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2v_scale.parallel import groups


def run_cases(run: Callable[[dict[str, Any], groups.Topology], None]) -> None:
    """What a worker does as `worker.py CASES.json`: each case in groups of its sizes `tensor` and `pipeline`."""
    from megatron.core import parallel_state

    cases = json.loads(Path(sys.argv[1]).read_text())
    topology = groups.initialize(groups.ParallelConfig())
    held = (1, 1)
    for case in cases:
        wanted = (case.get("tensor", 1), case.get("pipeline", 1))
        if wanted != held:
            parallel_state.destroy_model_parallel()
            topology = groups._divide(groups.ParallelConfig(tensor=wanted[0], pipeline=wanted[1]), topology.device)
            held = wanted
        with ending_together(case, topology):
            run(case, topology)
    groups.shutdown()


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

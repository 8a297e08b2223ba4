"""Each rank measures the opposite of the other; prints what it computes in, at the start and again."""

import json
import sys
from pathlib import Path

from d2v_scale import command_line
from d2v_scale.model import cpu_ops, cpu_speed
from d2v_scale.parallel import groups
from d2v_scale.running import arithmetic


def main() -> None:
    topology = groups.initialize(groups.ParallelConfig())
    recipe, _ = command_line.parse([])
    for native in (True, topology.rank == 0):
        cpu_speed.gain_of_bf16 = lambda *given, biased: 1.5 if topology.rank == 0 else 0.5
        cpu_speed.faster_by_blas = lambda: [f"small {('both', 'second')[topology.rank]}"]
        cpu_speed.has_native_bf16 = lambda native=native: native
        config = arithmetic.settle(recipe, {"zero_optimization": {"stage": 1}}, Path(sys.argv[1]), topology)
        print("FOUND", json.dumps([config["bf16"]["enabled"], sorted(cpu_ops._by_blas)]), flush=True)
    groups.shutdown()


if __name__ == "__main__":
    main()

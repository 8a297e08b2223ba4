"""Prints the time limit of every group that a run's engines, feed and agreement wait in, for each case."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import topology_worker
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from d2v_scale.parallel import groups
from d2v_scale.process.signals import Agreement


def limits() -> dict[str, float]:
    """Seconds by group, the world's store among them."""
    found = {"store": c10d._get_default_store().timeout.total_seconds()}
    for group in c10d._world.pg_map:
        backend = group._get_backend(torch.device("cpu"))
        found[c10d._world.pg_names[group]] = backend.options._timeout.total_seconds()
    return found


def main() -> None:
    from rank_cases import take_down_groups

    cases = json.loads(Path(sys.argv[1]).read_text())
    topology = groups.initialize(groups.ParallelConfig(), timeout_minutes=float(sys.argv[2]))
    built = topology_worker.build_engines

    def build_and_list(*args):
        engines = built(*args)
        print("LIMITS", json.dumps(limits()), flush=True)
        return engines

    topology_worker.build_engines = build_and_list
    for case in cases:
        take_down_groups()
        topology = groups._divide(groups.ParallelConfig(pipeline=case.get("pipeline", 1)), topology.device)
        topology_worker.run(case, topology)
    Agreement().barrier()
    backend, dist.get_backend = dist.get_backend, lambda group=None: "nccl"
    groups.model_group_on_host(topology)
    dist.get_backend = backend
    print("LIMITS", json.dumps(limits()), flush=True)
    assert timedelta(minutes=float(sys.argv[2])).total_seconds() not in (600.0, 1800.0), "as by default"
    groups.shutdown()


if __name__ == "__main__":
    main()

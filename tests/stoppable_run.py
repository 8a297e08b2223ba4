"""A stand-in for the training program: it keeps its contract (run_dir, resume, status.json, exit codes), in seconds.

The state is one number per rank that depends on every step, so that a lost or repeated step shows in the result.
Run by tests as `python stoppable_run.py RUN_DIR STEPS STEP_SECONDS SAVE_SECONDS`, one process per rank.
"""

import json
import os
import sys
import time
from pathlib import Path

from d2v_scale.signals import Agreement, StopFlag, is_lost_peer

stop_flag = StopFlag.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from d2v_scale import status  # noqa: E402
from d2v_scale.errors import EXIT_LOST_PEER  # noqa: E402
from d2v_scale.watchdog import Watchdog  # noqa: E402


def main() -> int:
    run_dir = Path(sys.argv[1])
    steps, step_s, save_s = int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    limit_s = float(os.environ.get("WATCHDOG_S", "60"))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    if rank == 0:
        status.begin(run_dir)
    agreement = Agreement()
    agreement.barrier()
    checkpoint = run_dir / "checkpoint.json"
    step, value = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0.0)
    (run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    stop = None
    try:
        with Watchdog(run_dir, rank=rank, world_size=world_size, limit_s=limit_s) as watchdog:
            while step < steps and stop is None:
                time.sleep(step_s)
                drawn = torch.tensor([float((step * 7919) % 101)])
                if world_size > 1:
                    dist.all_reduce(drawn)
                value = 0.9 * value + float(drawn) / world_size
                step += 1
                watchdog.beat(step)
                if rank == 0:
                    with (run_dir / "metrics.jsonl").open("a") as file:
                        file.write(json.dumps({"step": step, "loss": value}) + "\n")
                stop = agreement.agree(stop_flag.raised())
            (run_dir / f"saving-{rank}").touch()
            time.sleep(save_s)
            if rank == 0:
                checkpoint.write_text(json.dumps([step, value]))
            (run_dir / f"saved-{rank}").write_text(str(step))
            agreement.barrier()
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        status.write_status(run_dir, EXIT_LOST_PEER, str(error), step)
        return EXIT_LOST_PEER
    code = 0 if stop is None else stop.exit_code
    if rank == 0:
        status.write_status(run_dir, code, "all steps done" if stop is None else str(stop), step)
    return code


if __name__ == "__main__":
    sys.exit(main())

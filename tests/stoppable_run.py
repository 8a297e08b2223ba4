"""A stand-in for the training program: it keeps its contract (run_dir, resume, status.json, exit codes), in seconds.

The state is one number per rank that depends on every step, so that a lost or repeated step shows in the result.
It takes `--run_dir`, `--resume` and `--optim.max_steps` like the training program, `--step_seconds`, `--save_seconds`
and `--fail CODE` for the tests' sake, and ignores everything else. One process per rank.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from d2v_scale.process.signals import Agreement, StopFlag, is_lost_peer

stop_flag = StopFlag.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from d2v_scale.errors import EXIT_LOST_PEER  # noqa: E402
from d2v_scale.process import status  # noqa: E402
from d2v_scale.process.started import tell_run_dir  # noqa: E402
from d2v_scale.process.watchdog import Watchdog  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_dir", "--resume", type=Path, required=True)
    parser.add_argument("--optim.max_steps", type=int, default=20, dest="steps")
    parser.add_argument("--step_seconds", type=float, default=0.1)
    parser.add_argument("--save_seconds", type=float, default=0.0)
    parser.add_argument("--fail", type=int, default=0)
    options, _ = parser.parse_known_args()
    run_dir: Path = options.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    limit_s = float(os.environ.get("WATCHDOG_S", "60"))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    if rank == 0:
        status.begin(run_dir)
        tell_run_dir(run_dir)
    agreement = Agreement()
    agreement.barrier()
    if options.fail:
        status.write_status(run_dir, options.fail, f"failed on purpose with {options.fail}")
        return options.fail
    committed = sorted(run_dir.glob("checkpoints/step-*/COMMITTED"))
    step, value = json.loads(committed[-1].read_text()) if committed else (0, 0.0)
    stop = None
    stop_flag.starting = False
    (run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    try:
        with Watchdog(run_dir, rank=rank, world_size=world_size, limit_s=limit_s) as watchdog:
            while step < options.steps and stop is None:
                time.sleep(options.step_seconds)
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
            time.sleep(options.save_seconds)
            if rank == 0:
                checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
                checkpoint.mkdir(parents=True, exist_ok=True)
                (checkpoint / "COMMITTED").write_text(json.dumps([step, value]))
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
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a process group that lives on have ended interpreters with "terminate called"

"""One time limit for everything in which a rank waits for another.

The launcher's world, megatron-core's groups, those that DeepSpeed forms by itself and gloo groups on the side would
each have their own: 10 minutes with NCCL, 30 with gloo, whatever the run was asked for. A group that gives up before
the watchdog does ends a run without a word on which rank was silent, and one that is only slow ends for nothing.
"""

import logging
from datetime import timedelta

import torch.distributed.distributed_c10d as c10d

log = logging.getLogger(__name__)


def limit_all(timeout: timedelta) -> None:
    """From now on every group of this process is formed with `timeout` unless its maker names another."""
    # What `new_group` takes when it is not told, which DeepSpeed never does. Not the world's: PyTorch forgets that.
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout
    if current() != timeout:
        log.warning("This PyTorch takes the time limit of groups from elsewhere: DeepSpeed's keep %s", current())


def current() -> timedelta:
    """The limit that a new group gets."""
    return c10d._get_default_timeout(c10d.Backend("gloo"))

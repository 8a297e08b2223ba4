"""d2v_scale.shards.forking"""

import gc
import os

from d2v_scale.shards.forking import forking


class Told:
    """Part of a cycle, as engines and process groups are; says which process destroys it."""

    def __init__(self, write_end: int) -> None:
        self.cycle = self
        self.write_end = write_end

    def __del__(self) -> None:
        os.write(self.write_end, b"%d" % os.getpid())


def test_a_fork_does_not_destroy_what_its_parent_has_dropped() -> None:
    read_end, write_end = os.pipe()
    gc.collect()
    gc.disable()
    try:
        Told(write_end)
        with forking():
            child = os.fork()
            if child == 0:
                gc.collect()
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert gc.get_freeze_count() == 0
        gc.collect()
    finally:
        gc.enable()
    os.close(write_end)
    assert os.read(read_end, 100) == b"%d" % os.getpid()

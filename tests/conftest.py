"""Fixtures that any test may ask for. What tests share (`tiny_models`) is found through `pythonpath` in pyproject."""

import signal

import pytest

# Whoever runs the tests under nohup has it ignored, and so would every program that a test starts and hangs up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def world_of_one() -> None:
    """Process groups of a single process, which models need to be built."""
    from d2v_scale.parallel import groups

    groups.single_process()

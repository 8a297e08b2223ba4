"""Fixtures that any test may ask for; helpers of this folder (`tiny_models`) can be imported by every test."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture
def world_of_one() -> None:
    """Process groups of a single process, which models need to be built."""
    from d2v_scale.parallel import groups

    groups.single_process()

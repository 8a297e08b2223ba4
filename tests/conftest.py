"""Fixtures that any test may ask for. What tests share (`tiny_models`) is found through `pythonpath` in pyproject."""

import pytest


@pytest.fixture
def world_of_one() -> None:
    """Process groups of a single process, which models need to be built."""
    from d2v_scale.parallel import groups

    groups.single_process()

"""Forks that leave their parent's garbage alone."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def forking() -> Iterator[None]:
    """Processes that are forked inside never collect what their parent had made.

    A collection in a fork would run destructors of the parent's process groups, engines and libraries, whose threads
    the fork does not have: they crash, or wait for ever.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

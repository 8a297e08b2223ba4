"""Says what a program is at while nothing else is said: a line for what takes long, none for what is quick."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

SILENCE_S = 2.0
"""Seconds after which it is said."""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Log `what` ("reading the index") once where the block takes longer than `SILENCE_S`. Local."""
    notice = threading.Timer(SILENCE_S, log.info, ("... %s", what))
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()

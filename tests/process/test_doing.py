import logging
import time

import pytest

from d2v_scale.process import doing


def test_what_takes_long_is_said_once_and_what_is_quick_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doing, "SILENCE_S", 0.05)
    with caplog.at_level(logging.INFO, logger="d2v_scale"):
        with doing.doing("reading the index"):
            time.sleep(0.3)
        with doing.doing("reading a small file"):
            pass
        time.sleep(0.1)
    assert caplog.messages == ["... reading the index"]

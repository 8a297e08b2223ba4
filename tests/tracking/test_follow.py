import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from d2v_scale.tracking import follow
from d2v_scale.tracking.mirror import Mirror
from d2v_scale.tracking.mirror_state import EVENTS_FILE
from d2v_scale.tracking.record import METRICS_FILE


@pytest.mark.parametrize("torn", ['{"st', '{"st\n'])
def test_a_torn_last_line_is_nothing_to_wait_for(tmp_path: Path, torn: str) -> None:
    """Without a line end it can never be sent; with one it is passed over."""
    (tmp_path / "logs").mkdir()
    line = json.dumps({"step": 1, "time": 1.0, "loss": 1.0}) + "\n"
    (tmp_path / METRICS_FILE).write_text(line + torn)
    (tmp_path / "logs" / "system-n1.jsonl").write_text(line + torn)
    (tmp_path / EVENTS_FILE).write_text(torn)
    mirror = Mirror(tmp_path)
    sent: list[str] = []
    client = SimpleNamespace(log_batch=lambda run, metrics, synchronous: sent.extend(one.key for one in metrics))
    mirror._client, mirror._connected = client, True  # type: ignore[assignment]
    assert mirror.pending()
    mirror.step()
    assert mirror.pending() == 0
    assert sent == ["loss", "1 quality/loss", "system/n1/loss"]


def test_the_end_of_a_run_is_waited_for_without_spinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Path] = []
    never_done = SimpleNamespace(step=lambda: turns.append(tmp_path), pending=lambda: 1, refused=0)
    monkeypatch.setattr(follow, "Mirror", lambda run_dir: never_done)
    monkeypatch.setattr(follow, "_told_to_finish", lambda seconds, parent: True)
    assert not follow.follow(tmp_path, finish_timeout=0.5)
    assert 2 <= len(turns) <= 10

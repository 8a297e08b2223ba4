import errno
import json
from pathlib import Path

import pytest

from d2v_scale import errors
from d2v_scale.process import status


def test_a_status_is_read_back(tmp_path: Path) -> None:
    status.begin(tmp_path)
    assert status.read_status(tmp_path) is None
    written = status.write_status(tmp_path, errors.EXIT_DONE, "all steps done", 40)
    assert status.read_status(tmp_path) == written
    raw = json.loads((tmp_path / "status.json").read_text())
    assert (raw["outcome"], raw["exit_code"], raw["reason"], raw["step"]) == ("done", 0, "all steps done", 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["status.json"]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, "done"),
        (10, "requeue"),
        (14, "requeue"),
        (1, "failed"),
        (2, "failed"),
        (11, "failed"),
        (12, "failed"),
        (13, "failed"),
    ],
)
def test_outcome_of_every_exit_code(code: int, outcome: str) -> None:
    assert status.outcome_of(code) == outcome


def test_a_cause_is_not_replaced_by_its_consequence(tmp_path: Path) -> None:
    status.begin(tmp_path)
    status.write_status(tmp_path, errors.EXIT_LOST_PEER, "rank 2 stopped answering")
    status.write_status(tmp_path, errors.EXIT_BAD_INPUT, "shard x.tar is missing")
    kept = status.write_status(tmp_path, errors.EXIT_LOST_PEER, "rank 0 stopped answering")
    assert kept.reason == "shard x.tar is missing"
    assert status.read_status(tmp_path) == kept


def test_a_new_attempt_forgets_the_last_one(tmp_path: Path) -> None:
    status.write_status(tmp_path, errors.EXIT_REQUEUE, "SIGUSR1 received", 3)
    status.begin(tmp_path)
    assert status.read_status(tmp_path) is None


def test_a_full_disk_is_still_reported_from_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status.begin(tmp_path)
    reserve = tmp_path / ".status_reserve"
    assert reserve.stat().st_size == 64 * 1024
    real = status.write_whole

    def full_while_reserved(path: Path, text: str) -> None:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    monkeypatch.setattr(status, "write_whole", full_while_reserved)
    status.write_status(tmp_path, errors.EXIT_REQUEUE, "no space for a checkpoint", 5)
    found = status.read_status(tmp_path)
    assert found is not None
    assert found.reason == "no space for a checkpoint"


def test_unreadable_status_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    assert status.read_status(tmp_path) is None

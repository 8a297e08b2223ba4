"""Launchers whose meeting place stays full, or stands still for some of them: with pretended ranks and clocks."""

from pathlib import Path

import pytest
from simulated_launchers import Job

from d2v_scale.agents.agent import EXIT_NO_PLAN, REFUSED_S
from d2v_scale.agents.plan import Plan


def three(folder: Path) -> Job:
    """Two nodes that train, and a spare one."""
    return Job(folder / "run", ["n1", "n2", "n3"], 1)


@pytest.mark.parametrize("at", ["the first plan", "a crash"])
def test_a_meeting_place_that_stays_full_ends_all_launchers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    job = three(tmp_path)
    if at == "a crash":
        job.passes(3)
        job.ranks["n2"].ends_with = 1

    def full(_: Plan) -> Plan:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.meeting, "propose", full)
    job.passes(REFUSED_S - 5)
    assert not job.codes
    job.passes(10)
    assert job.codes == dict.fromkeys(job.nodes, EXIT_NO_PLAN)
    assert not job.training()
    why = "has taken no plan for 600 s ([Errno 28] No space left on device)"
    assert f"{why}: make room there, and start again with --resume" in caplog.text


def test_a_node_whose_files_stand_still_for_half_a_minute_is_not_lost(tmp_path: Path) -> None:
    """Of a network file system that is no fault yet; it was one after 10 s."""
    job = three(tmp_path)
    job.passes(3)
    for node in ("n1", "n2", "n3"):
        job.away.add(node)
        job.passes(30)
        job.away.clear()
        job.passes(3)
        assert job.training() == {"n1": 1, "n2": 1}
        assert not job.plan.excluded

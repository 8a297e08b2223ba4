"""Whom the leading launcher blames for the end of a round, and what it writes down where it is looked for."""

import signal
import time
from pathlib import Path

from simulated_launchers import Job

from d2v_scale.agents.leading import Leader
from d2v_scale.agents.meeting import Word
from d2v_scale.agents.plan import Plan
from d2v_scale.errors import EXIT_REQUEUE
from d2v_scale.process.status import read_status
from d2v_scale.running.attempts import ended
from d2v_scale.running.restarts import Restarts

KILLED = 128 + signal.SIGKILL
ABORTED = 128 + signal.SIGABRT


def test_a_death_is_blamed_before_what_its_peers_ended_with_in_the_same_look(tmp_path: Path) -> None:
    (tmp_path / "run_dir").write_text(str(tmp_path))
    leader = Leader(["n1", "n2", "n3"], 2, Restarts(3, tmp_path, []), {})
    struck: list[dict[str, int]] = []
    for number, consequence in ((1, 1), (2, ABORTED)):
        codes = {"n1": consequence, "n2": KILLED}
        words = {node: Word(round=number, code=code, ended=True) for node, code in codes.items()}
        found = leader.follow(Plan(number, ("n1", "n2")), words, [], time.monotonic())
        assert found is not None
        struck.append({**found.struck})
    assert struck == [{"n2": 1}] * 2


def test_a_job_that_ends_before_its_ranks_begin_says_why_in_the_directory_that_it_was_given(tmp_path: Path) -> None:
    """The job's script would call it a lost process else, and count it as a failure."""
    job = Job(tmp_path / "run", ("n1", "n2"), 0)
    (job.run_dir / "meet/run_dir").unlink()
    job.ranks["n2"].is_asked_to_stop = True
    job.passes(3)
    assert {*job.codes.values()} == {EXIT_REQUEUE}
    attempt = ended(read_status(job.run_dir), EXIT_REQUEUE, -1)
    assert attempt.reason == "asked to stop before the start"
    assert attempt.was_asked_to_stop


def test_too_few_nodes_at_the_start_are_said_with_what_is_wrong_with_each(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", ("n1", "n2", "n3"), 1, unfit={"n1": "a", "n3": "b"})
    (job.run_dir / "meet/run_dir").unlink()
    job.passes(3)
    assert job.codes == {"n1": EXIT_REQUEUE, "n2": EXIT_REQUEUE, "n3": EXIT_REQUEUE}
    status = read_status(job.run_dir)
    assert status is not None
    assert status.reason == job.plan.why == "n1: a; n3: b; 1 of 3 nodes are left, 2 are needed"

"""Launchers of several nodes agree on every round, whatever happens to them: with pretended ranks and clocks."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from simulated_launchers import Job

from d2v_scale.agents.agent import LOST_S, START_S
from d2v_scale.agents.leading import LOST, STUCK_S
from d2v_scale.agents.plan import Plan
from d2v_scale.errors import EXIT_LOST_PEER, EXIT_REQUEUE
from d2v_scale.process.status import read_status
from d2v_scale.running.attempts import read_attempts

KILLED = 128 + signal.SIGKILL
Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A job that trains; n1 and n2 do, n3 and those after it are spares, unless something else is asked for."""

    def call(nodes: int = 3, world: int = 2, begin: bool = True, **options: Any) -> Job:
        names = [f"n{number}" for number in range(1, nodes + 1)]
        job = Job(tmp_path / "run", names, nodes - world, **options)
        if begin:
            job.passes(3)
            assert len(job.training()) == world
        return job

    return call


def fail(job: Job, node: str, code: int = KILLED) -> None:
    job.ranks[node].ends_with = code


def ends(job: Job) -> int:
    """Every launcher that lives has left with the same code."""
    codes = {job.codes.get(node) for node in job.nodes if node not in job.plan.excluded}
    assert len(codes) == 1, job.codes
    assert not job.training()
    (code,) = codes
    assert code is not None
    return code


def test_a_world_meets_at_its_first_node_and_spares_wait(make: Make) -> None:
    job = make()
    assert job.training() == {"n1": 1, "n2": 1}
    assert [job.ranks[node].rounds for node in job.nodes] == [
        [(1, 0, "10.0.0.1", 1000)],
        [(1, 1, "10.0.0.1", 1000)],
        [],
    ]


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_crash_restarts_all_nodes_and_no_spare_takes_part(make: Make, node: str) -> None:
    """Also: more launchers live than places are wanted (NVRx#348)."""
    job = make()
    for number in (2, 3):
        fail(job, node, 1)
        job.passes(5)
        assert job.training() == {"n1": number, "n2": number}
        job.saves(number)
    ports = [port for _, _, _, port in job.ranks["n2"].rounds]
    assert ports == [port for _, _, _, port in job.ranks["n1"].rounds]
    assert len({*ports}) == 3
    assert job.ranks["n3"].rounds == []
    assert [one.exit_code for one in read_attempts(job.run_dir)] == [EXIT_LOST_PEER] * 2


def test_each_kind_of_fault_is_bounded_and_said(make: Make) -> None:
    job = make(restarts=1)
    for kind, code in (("crash", 1), ("hang", 10)):
        job.says(code, f"a {kind}")
        fail(job, "n2", code)
        job.passes(5)
        assert job.training(), "the first of its kind"
    job.says(1, "a crash")
    fail(job, "n2", 1)
    job.passes(5)
    assert ends(job) == 1
    assert job.plan.why == "crash number 2 without a new checkpoint, and --restarts is 1: a crash"
    assert [one.exit_code for one in read_attempts(job.run_dir)] == [1, 10], "the job's script records the last"


@pytest.mark.parametrize("code", [2, 11, 12, 15])
def test_what_would_end_the_same_way_ends_all_launchers(make: Make, code: int) -> None:
    job = make()
    job.says(code, "why")
    fail(job, "n1", code)
    job.passes(5)
    assert (ends(job), job.plan.why) == (code, "why")


def test_a_finished_run_ends_all_launchers(make: Make) -> None:
    job = make()
    fail(job, "n1", 0)
    job.passes(5)
    assert job.training() == {"n2": 1}, "rank 0 may be the first to end"
    fail(job, "n2", 0)
    job.passes(5)
    assert ends(job) == 0


@pytest.mark.parametrize("lost", [["n1"], ["n2"], ["n1", "n2"], ["n1", "n3"], ["n2", "n3"]])
def test_spares_take_the_places_of_lost_nodes(make: Make, lost: Sequence[str]) -> None:
    """The node of rank 0 and of the leader, two at once, and a spare that is lost with them."""
    job = make(nodes=4)
    job.saves(4)
    job.lose(*lost)
    job.passes(4 * LOST_S)
    left = [node for node in job.nodes if node not in lost]
    assert job.training() == dict.fromkeys(left[:2], job.plan.number)
    assert len({*job.plan.active}) == 2
    assert job.plan.excluded == dict.fromkeys(lost, LOST)
    assert all(old == new for old, new in zip(("n1", "n2"), job.plan.active, strict=True) if old in left)
    address = f"10.0.0.{job.plan.active[0][1:]}"
    assert {job.ranks[node].rounds[-1][2] for node in job.plan.active} == {address}
    attempt = read_attempts(job.run_dir)[0]
    assert attempt.exit_code == EXIT_LOST_PEER
    assert attempt.reason.startswith(f"{lost[0]}: {LOST}")


def test_a_spare_that_takes_a_place_and_is_lost_gives_it_to_the_next(make: Make) -> None:
    job = make(nodes=4)
    for node in ("n2", "n3"):
        job.lose(node)
        job.passes(2 * LOST_S)
    assert job.plan.active == ("n1", "n4")
    assert job.training() == {"n1": 3, "n4": 3}


def test_a_spare_whose_devices_fail_is_named_and_the_next_one_taken(make: Make) -> None:
    job = make(nodes=4)
    job.problems["n3"] = "cuda:0 does not compute"
    job.lose("n2")
    job.passes(2 * LOST_S)
    assert job.plan.active == ("n1", "n4")
    assert job.plan.excluded == {"n2": LOST, "n3": "cuda:0 does not compute"}
    assert job.codes == {"n3": EXIT_LOST_PEER}


def test_without_a_spare_left_the_job_is_requeued_and_says_why(make: Make) -> None:
    job = make()
    job.says(EXIT_LOST_PEER, "connection closed by peer")
    job.lose("n3")
    job.passes(2 * LOST_S)
    assert job.training() == {"n1": 1, "n2": 1}, "a lost spare disturbs nobody"
    job.lose("n2")
    job.passes(2 * LOST_S)
    assert ends(job) == EXIT_REQUEUE
    status = read_status(job.run_dir)
    assert status is not None
    assert (status.exit_code, status.outcome) == (EXIT_REQUEUE, "requeue")
    assert status.reason == f"n2: {LOST}; no spare node is left of 1"
    assert job.plan.excluded == {"n2": LOST, "n3": LOST}


def test_a_job_whose_script_is_lost_with_its_node_ends_to_be_requeued(make: Make) -> None:
    job = make(script="n1")
    fail(job, "n1")
    job.passes(5)
    assert job.training() == {"n1": 2, "n2": 2}, "only the node's loss takes the script along"
    job.lose("n1")
    job.ranks["n2"].is_asked_to_stop = True  # Slurm may end what it calls failed
    job.passes(2 * LOST_S)
    assert (ends(job), job.plan.why) == (EXIT_REQUEUE, f"n1: {LOST}; the job's script ran on n1")
    assert [one.reason.partition(";")[0] for one in read_attempts(job.run_dir)][1:] == [f"n1: {LOST}"]


def test_a_job_without_spares_restarts_and_ends_with_a_lost_node(make: Make) -> None:
    job = make(nodes=2)
    fail(job, "n1")
    job.passes(5)
    assert job.training() == {"n1": 2, "n2": 2}
    job.saves(4)
    job.lose("n1")
    job.passes(2 * LOST_S)
    assert (ends(job), job.plan.why) == (EXIT_REQUEUE, f"n1: {LOST}; there are no spare nodes (--spares)")


def test_a_launcher_that_was_stopped_finds_itself_excluded(make: Make) -> None:
    """Its ranks of the round before it slept take no part in the next."""
    job = make()
    job.away.add("n1")
    job.passes(3 * LOST_S)
    assert job.plan.active == ("n3", "n2")
    assert job.training() == {"n1": 1, "n2": 2, "n3": 2}
    job.away.clear()
    job.passes(3)
    assert job.training() == {"n2": 2, "n3": 2}
    assert job.codes == {"n1": EXIT_LOST_PEER}
    job.lose("n2")
    job.passes(2 * LOST_S)
    assert ends(job) == EXIT_REQUEUE, "who was excluded takes no place again"


def test_nobody_begins_a_round_before_the_ranks_of_the_last_are_gone(make: Make) -> None:
    job = make()
    job.ranks["n2"].is_deaf = True
    fail(job, "n1")
    job.passes(30)
    assert job.training() == {"n2": 1}
    job.ranks["n2"].is_deaf = False
    job.passes(5)
    assert job.training() == {"n1": 2, "n2": 2}


def test_a_node_whose_ranks_cannot_be_ended_is_excluded(make: Make) -> None:
    job = make()
    job.ranks["n2"].is_deaf = True
    fail(job, "n1")
    job.passes(STUCK_S + 10)
    assert job.plan.active == ("n1", "n3")
    assert job.plan.excluded == {"n2": "its ranks cannot be ended"}
    assert job.training()["n1"] == job.training()["n3"] == 2


def test_time_in_which_all_stood_still_excludes_nobody(make: Make) -> None:
    job = make()
    for _ in range(3):
        job.now += 10 * LOST_S  # a file system that took no word and gave none
        job.passes(3)
    assert job.plan == Plan(1, ("n1", "n2"), time=job.plan.time)


def test_a_leader_that_dies_after_it_planned_is_followed_in_its_plan(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(nodes=4)
    propose, publish = job.meeting.propose, job.meeting.publish

    def last_deed(plan: Plan) -> Plan:
        job.lose("n1")
        monkeypatch.setattr(job.meeting, "publish", lambda node, word: node == "n1" or publish(node, word))
        monkeypatch.setattr(job.meeting, "propose", propose)
        return propose(plan)

    monkeypatch.setattr(job.meeting, "propose", last_deed)
    fail(job, "n2")
    job.passes(2)
    assert (job.away, job.plan.active) == ({"n1"}, ("n1", "n2"))
    job.lose("n1")  # which was in the middle of a look
    job.passes(4 * LOST_S)
    assert job.plan.active == ("n3", "n2")
    assert job.training() == {"n2": 3, "n3": 3}


@pytest.mark.parametrize("second", ["n1", "n2", "n3"])
def test_a_node_that_is_lost_during_a_restart_is_replaced_too(make: Make, second: str) -> None:
    job = make(nodes=5, world=3)
    fail(job, "n2")
    begun = job.now
    while len(job.meeting.plans) < 2:
        job.passes(0.5)
        assert job.now < begun + 30
    job.lose(second)  # before its ranks have a port, or after
    job.passes(4 * LOST_S)
    assert len(job.training()) == 3
    assert {*job.training().values()} == {3}
    assert job.plan.excluded == {second: LOST}


@pytest.mark.parametrize("code", [EXIT_REQUEUE, KILLED])
def test_a_job_that_was_asked_to_stop_is_not_started_again(make: Make, code: int) -> None:
    job = make()
    job.ranks["n3"].is_asked_to_stop = True  # Slurm asks all of them, some sooner
    if code == EXIT_REQUEUE:
        job.says(code, "SIGUSR1 received (rank 0), at step 4 of 9")
    fail(job, "n1", code)
    job.passes(5)
    assert ends(job) == (EXIT_REQUEUE if code == EXIT_REQUEUE else EXIT_LOST_PEER)
    assert len(job.ranks["n1"].rounds) == 1


def test_a_rank_that_was_asked_to_stop_by_itself_is_heard_too(make: Make) -> None:
    job = make()
    job.says(EXIT_REQUEUE, "SIGTERM received (rank 2), at step 4 of 9")
    fail(job, "n1", EXIT_REQUEUE)
    job.passes(5)
    assert ends(job) == EXIT_REQUEUE


def test_a_job_that_is_asked_to_stop_before_it_begins_trains_nothing(make: Make) -> None:
    job = make(begin=False)
    job.ranks["n2"].is_asked_to_stop = True
    job.away.add("n1")
    job.passes(START_S)
    job.away.clear()
    job.passes(5)
    assert ends(job) == EXIT_REQUEUE
    assert not any(one.rounds for one in job.ranks.values())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (KILLED, ""),
        (1, "CUDA error: uncorrectable ECC error encountered (rank 3)"),
        (10, "silent: rank 3 (process 7 on n2) is stopped (SIGSTOP): no progress for 120 s"),
    ],
)
def test_a_node_whose_hardware_may_fail_gives_its_place_to_a_spare(make: Make, code: int, reason: str) -> None:
    job = make()
    for number in (1, 2):
        assert job.training() == {"n1": number, "n2": number}
        if reason:
            job.says(code, reason)
        fail(job, "n1" if code == 10 else "n2", code)
        job.passes(5)
        job.saves(number)
    assert job.training() == {"n1": 3, "n3": 3}
    assert job.plan.excluded["n2"].startswith("its ranks were the first to fail 2 times: ")


@pytest.mark.parametrize("code", [1, EXIT_LOST_PEER, 128 + signal.SIGABRT])
def test_other_faults_are_no_nodes_fault(make: Make, code: int) -> None:
    job = make(restarts=9)
    for _ in range(4):
        fail(job, "n2", code)
        job.passes(5)
    assert job.training() == {"n1": 5, "n2": 5}


def test_a_node_that_never_comes_is_replaced_at_the_start(make: Make) -> None:
    job = make(begin=False)
    job.away.add("n1")
    job.passes(START_S - 5)
    assert not job.training()
    job.passes(20)
    assert job.training() == {"n2": 1, "n3": 1}
    assert job.plan.excluded == {"n1": "it did not come"}


def test_a_spare_that_comes_late_holds_nobody_up(make: Make) -> None:
    job = make(begin=False)
    job.away.add("n3")
    job.passes(3)
    assert job.training() == {"n1": 1, "n2": 1}
    job.away.clear()
    job.lose("n2")
    job.passes(2 * LOST_S)
    assert job.training() == {"n1": 2, "n3": 2}


def test_nodes_that_preflight_refused_do_not_train(make: Make) -> None:
    job = make(unfit={"n1": "only 0.1 GB free"})
    assert job.training() == {"n2": 1, "n3": 1}
    assert job.codes == {"n1": EXIT_LOST_PEER}


def test_a_meeting_place_that_takes_no_plan_is_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make()

    def full(_: Plan) -> Plan:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(job.meeting, "propose", full)
        fail(job, "n2")
        job.passes(5)
        assert not job.training()
    job.passes(5)
    assert job.training() == {"n1": 2, "n2": 2}


def test_attempts_are_bounded_also_where_they_cannot_be_recorded(make: Make) -> None:
    job = make(restarts=2)
    (job.run_dir / "attempts.jsonl").mkdir()
    for _ in range(3):
        assert job.training()
        fail(job, "n2", 1)
        job.passes(5)
    assert ends(job) == EXIT_LOST_PEER


def test_ranks_that_fail_before_they_have_a_directory_are_not_started_again(make: Make) -> None:
    job = make()
    (job.run_dir / "meet/run_dir").unlink()
    fail(job, "n2", 2)
    job.passes(5)
    assert ends(job) == 2


def test_a_node_that_is_lost_before_there_is_a_directory_is_replaced(make: Make) -> None:
    job = make()
    (job.run_dir / "meet/run_dir").unlink()
    job.lose("n2")
    job.passes(2 * LOST_S)
    assert job.training() == {"n1": 2, "n3": 2}
    assert json.dumps(job.plan.further) == "[]"

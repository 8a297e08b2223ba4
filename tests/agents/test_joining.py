"""Who takes part, as it is given."""

import sys
from pathlib import Path

import pytest

from d2v_scale.agents.agent import LOST_S
from d2v_scale.agents.joining import join, lost_after, own_name, read_nodes, requeue
from d2v_scale.errors import UserError


def nodes(folder: Path, text: str) -> Path:
    (folder / "nodes").write_text(text)
    return folder


def test_nodes_have_an_order_addresses_and_what_preflight_said(tmp_path: Path) -> None:
    found = read_nodes(nodes(tmp_path, "n2 10.0.0.2\nn1 10.0.0.1 only 0.1 GB free, 20 wanted\n\nn3 n3\n"))
    assert [*found.addresses.items()] == [("n2", "10.0.0.2"), ("n1", "10.0.0.1"), ("n3", "n3")]
    assert found.unfit == {"n1": "only 0.1 GB free, 20 wanted"}


@pytest.mark.parametrize("text", ["", "n1\n", "n1 a\nn1 b\n"])
def test_a_list_of_nodes_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="one line `NAME ADDRESS`"):
        read_nodes(nodes(tmp_path, text))


def test_a_meeting_without_a_list_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a line `NAME ADDRESS` for each"):
        read_nodes(tmp_path)


@pytest.mark.parametrize(
    ("node", "spares", "says"), [("n3", 0, "--node n3 is none of"), ("n1", 2, "--spares is 2, and there are 2 nodes")]
)
def test_a_launcher_that_does_not_fit_is_refused(tmp_path: Path, node: str, spares: int, says: str) -> None:
    nodes(tmp_path, "n1 a\nn2 b\n")
    with pytest.raises(UserError, match=says):
        join(tmp_path, node, spares, 1, ["true"], [], 1, {})


def test_when_a_node_is_lost_is_said_in_seconds_or_refused(tmp_path: Path) -> None:
    nodes(tmp_path, "n1 127.0.0.1\n")
    assert lost_after({}) == LOST_S
    assert lost_after({"D2V_SCALE_LOST_NODE_S": "60"}) == 60
    for said in ("soon", "4", "91", "nan"):
        with pytest.raises(UserError, match=rf"D2V_SCALE_LOST_NODE_S is '{said}'\. Give seconds, 5 to 90\."):
            join(tmp_path, "n1", 0, 0, ["true"], [], 1, {"D2V_SCALE_LOST_NODE_S": said})


def test_a_second_start_in_one_meeting_place_is_refused(tmp_path: Path) -> None:
    """Plans of the first would hold for it: the end of a run that was finished, for one that fails."""
    nodes(tmp_path, "n1 127.0.0.1\n")
    command, arguments = [sys.executable, "-c", ""], [f"--run_dir={tmp_path}"]
    assert join(tmp_path, "n1", 0, 0, command, arguments, 1, {}) == 0
    with pytest.raises(UserError, match=r"n1 has been there before\. Give each start a directory of its own"):
        join(tmp_path, "n1", 0, 0, command, arguments, 1, {})


def test_a_meeting_place_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    nodes(tmp_path, "n1/x 127.0.0.1\n")
    with pytest.raises(UserError, match="it takes no file"):
        join(tmp_path, "n1/x", 0, 0, ["true"], [], 1, {})


def test_of_an_array_only_the_element_whose_script_is_lost_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one has the array's number as its SLURM_JOB_ID."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    requeue({"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"})
    requeue({"SLURM_JOB_ID": "71"})
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 70_3", "requeue 71"]


def test_a_node_has_the_name_that_slurm_gives_it() -> None:
    assert own_name({"SLURMD_NODENAME": "n7"}) == "n7"
    assert own_name({})

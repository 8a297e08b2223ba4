"""Plans that are written once, and words that are written again and again."""

import os
from pathlib import Path

import pytest

from d2v_scale.agents.meeting import Directory, Word
from d2v_scale.agents.plan import Plan

PLAN = Plan(2, ("n1", "n3"), {"n2": "gone"}, ("--a",), None, "why", 1.5, ({"exit_code": 14, "step": 4},), {"n1": 1})


def test_a_plan_is_read_as_it_was_proposed(tmp_path: Path) -> None:
    assert Directory(tmp_path).propose(PLAN) == PLAN == Directory(tmp_path).plan(2)
    assert [path.name for path in tmp_path.iterdir()] == ["plan-00002.json"]
    assert Directory(tmp_path).plan(1) is None


def test_the_first_plan_of_its_number_stays(tmp_path: Path) -> None:
    Directory(tmp_path).propose(PLAN)
    assert Directory(tmp_path).propose(Plan(2, ("n9",))) == PLAN
    assert len([*tmp_path.iterdir()]) == 1


def test_a_place_that_takes_no_plan_says_so_and_keeps_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Directory(tmp_path).propose(PLAN)
    assert not [*tmp_path.iterdir()]


def test_a_word_is_replaced_in_its_file_by_longer_and_shorter_ones(tmp_path: Path) -> None:
    """A file that is another one each time may be missed for long through NFS."""
    meeting, files = Directory(tmp_path), set()
    for word in (Word(1), Word(2, problem="a long story" * 9, gone=(3, 4)), Word(3, plan=2, ended=True)):
        meeting.publish("n1", word)
        assert Directory(tmp_path).read("n1") == word
        files.add((tmp_path / "word-n1").stat().st_ino)
    assert len(files) == 1


def test_what_cannot_be_read_or_written_is_no_word(tmp_path: Path) -> None:
    meeting = Directory(tmp_path)
    assert meeting.read("n1") is None
    (tmp_path / "word-n1").write_text('{"count": 3, "pl')
    assert meeting.read("n1") is None
    (tmp_path / "plan-00001.json").write_text('{"number": 1, "act')
    assert meeting.plan(1) is None
    Directory(tmp_path / "absent").publish("n1", Word(1))

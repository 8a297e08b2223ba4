"""Where a verb may write."""

import argparse
from pathlib import Path

import pytest

from d2v_scale.answers.outputs import out_page


def test_a_page_named_without_an_ending_is_shown_as_one(tmp_path: Path) -> None:
    assert out_page(str(tmp_path / "july")) == tmp_path / "july.html"
    assert out_page(str(tmp_path / "july.htm")) == tmp_path / "july.htm"


def test_a_page_is_no_folder_with_an_ending_or_without(tmp_path: Path) -> None:
    (tmp_path / "july").mkdir()
    (tmp_path / "june.html").mkdir()
    for name in ("july", "june"):
        with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
            out_page(str(tmp_path / name))

"""The rows of the table of whole steps: ranked, named, chosen."""

from pathlib import Path

import pytest

from d2v_scale.benchmarks import device_rows
from d2v_scale.benchmarks.device_rows import ROWS, first_rows, select, specs
from d2v_scale.errors import UserError


def test_the_first_eight_minutes_begin_with_what_every_other_number_rests_on() -> None:
    first = first_rows()
    assert first == [row.name for row in ROWS[: len(first)]]
    assert first[0] == "gradients"
    assert sum(row.seconds for row in ROWS[: len(first)]) <= 480
    assert {"ours-vision2", "ours-speech2", "varying-speech2", "padded-speech1", "hf-vision2", "hf-speech2"} <= {*first}
    assert any(name.startswith("compile") for name in first)
    assert any(name.startswith("streams") for name in first)


def test_every_row_has_a_name_a_reason_and_a_published_recipe(tmp_path: Path) -> None:
    found = specs(tmp_path, dry_run=False)
    assert len({row.name for row in ROWS}) == len(ROWS) == len(found)
    assert all(row.decides and row.variant in device_rows.VARIANTS for row in ROWS)
    assert {spec.recipe for spec in found} == {"", *(f"d2v{v}_{m}_large" for v in (1, 2) for m in ("vision", "speech"))}
    assert all(spec.peer is (spec.variant == "hf") for spec in found)
    assert {spec.kind for spec in found} == {"steps", "gradients", "streams"}
    assert {spec.lengths for spec in found} == {"equal", "varying", "padded"}


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("gradients", ["gradients"]),
        # In their rank, each once.
        ("hf-vision2, ours-vision2,ours-vision2", ["ours-vision2", "hf-vision2"]),
        ("streams-*", ["streams-speech2", "streams-vision2"]),
        ("first", first_rows()),
    ],
)
def test_only_names_rows_patterns_and_the_first(only: str, names: list[str], tmp_path: Path) -> None:
    assert [row.name for row in select(only)] == names
    assert len(specs(tmp_path, dry_run=True, only=only)) == len(names)


@pytest.mark.parametrize("only", ["nosuch", "ours-vision2,ours-visoin1", "", " , "])
def test_what_names_no_row_is_refused_with_the_rows(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--only"):
        select(only)
    assert device_rows.main(["--only", only]) == 2
    assert "--only" in capsys.readouterr().err


def test_the_list_marks_the_first_eight_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert device_rows.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == len(ROWS)
    assert sum("| yes |" in line for line in lines) == len(first_rows())


def test_a_rehearsal_has_every_kind_of_row_once_and_the_main_ones_of_all_models(tmp_path: Path) -> None:
    found = specs(tmp_path, dry_run=True)
    assert {spec.variant for spec in found} == set(device_rows.VARIANTS)
    assert [spec.variant for spec in found].count("compile") == 1
    assert [spec.variant for spec in found].count("ours") == 4

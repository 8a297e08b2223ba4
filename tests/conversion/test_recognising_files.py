"""What a folder or file of raw data is, where nobody says it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2v_scale.commands import make_shards
from d2v_scale.conversion.recognising_files import is_raw, recognise
from d2v_scale.errors import DataError


def write(root: Path, *names: str, text: str = "x") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def words(source: Path) -> list[str]:
    """The commands, as they are typed, with SRC for the source."""
    return [one.typed("OUT").replace(str(source), "SRC") for one in recognise(source)]


def images(root: Path) -> None:
    write(root, "cat/0.jpg", "cat/1.JPG", "dog/0.png", "README.md", "classes.txt", ".hidden/0.wav")


def image_splits(root: Path) -> None:
    write(root, "val/cat/0.jpg", "train/cat/0.jpg", "train/dog/0.jpg")


def librispeech(root: Path) -> None:
    write(root, "dev-clean/84/121123/84-121123-0000.flac", "train-clean-100/19/198/19-198-0000.flac", "README.TXT")
    write(root, "dev-clean/84/121123/84-121123.trans.txt", "train-clean-100/19/198/19-198.trans.txt")


def tables(root: Path) -> None:
    write(root, "train.csv", "test.csv", text="id,sentence1,sentence2,label\n0,a b,c d,1\n")


def records(root: Path) -> None:
    write(root, "README.md")
    write(root, "news.jsonl", text='{"content": "a b", "category": "c"}\n')


def numbers(root: Path) -> None:
    write(root, "a/0.csv", "b/1.csv", text="x,y\n1.5,2\n3,4\n")


def pairs(root: Path) -> None:
    write(root, "wavs/0.wav", "p/0.png")
    write(root, "list.csv", text="picture,audio,caption\np/0.png,wavs/0.wav,a word\n")


def metadata(root: Path) -> None:
    write(root, "train/0.png")
    write(root, "metadata.csv", text="file_name,text\ntrain/0.png,a word\n")


def parquet(root: Path) -> None:
    write(
        root,
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    )
    write(root, "README.md", "dataset_infos.json")


def saved(root: Path) -> None:
    write(root, "dataset_info.json", "state.json", "data-00000-of-00001.arrow")


@pytest.mark.parametrize(
    ("made", "commands"),
    [
        (images, ["d2v shards images SRC OUT"]),
        (image_splits, ["images SRC/train OUT --prefix train", "images SRC/val OUT --prefix val"]),
        (
            librispeech,
            [
                "audio SRC/train-clean-100 OUT --transcripts SRC/train-clean-100 --label none --prefix train-clean-100",
                "audio SRC/dev-clean OUT --transcripts SRC/dev-clean --label none --prefix dev-clean",
            ],
        ),
        (tables, ["text SRC OUT --columns sentence1,sentence2,label --match"] * 2),
        (records, [r"text SRC OUT --columns content,category --match '\.(jsonl)(\.\w+)?$'"]),
        (numbers, ["arrays SRC OUT"]),
        (pairs, ["pairs SRC/list.csv OUT --image picture --text caption"]),
        (metadata, ["pairs SRC/metadata.csv OUT --image file_name"]),
        (parquet, ["dataset SRC OUT --match '(^|/)train", "dataset SRC OUT --match '(^|/)test"]),
        (saved, ["dataset SRC OUT"]),
    ],
)
def test_what_people_have_is_recognised(tmp_path: Path, made: Callable[[Path], None], commands: list[str]) -> None:
    made(tmp_path)
    found = words(tmp_path)
    assert len(found) == len(commands)
    for command, begins in zip(found, commands, strict=True):
        assert command.startswith(begins if begins.startswith("d2v") else f"d2v shards {begins}"), found


@pytest.mark.parametrize(("made", "option"), [(image_splits, "--prefix"), (tables, "--prefix"), (tables, "--match")])
def test_one_name_for_several_sets_does_not_overwrite_the_first(
    tmp_path: Path, made: Callable[[Path], None], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "src")
    assert make_shards.main([str(tmp_path / "src"), str(tmp_path / "out"), option, "all"]) == 2
    assert "is several sets" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_without_a_header_is_read_by_number(tmp_path: Path) -> None:
    lines = [f'{k % 4 + 1},"title {k}","a longer text, number {k}"' for k in range(20)]
    path = write(tmp_path, "news.csv", text="\n".join(lines)) / "news.csv"
    [one] = recognise(path)
    assert one.options == ("--columns", "3,1")
    assert one.says == "1 table, text in '3', label in '1'"


def test_a_class_that_is_called_train_is_no_split(tmp_path: Path) -> None:
    write(tmp_path, "train/0.jpg", "car/0.jpg", "bus/0.jpg")
    assert words(tmp_path) == ["d2v shards images SRC OUT"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a.jpg", "b.wav"], r"1 images \(.*a.jpg, ...\) and 1 recordings .* Say which: d2v shards images .* or d2v"),
        (["a.txt", "b.jsonl"], r"files of JSON .* and 1 texts .*--match"),
        (["train/a/0.jpg", "test/a/0.jpg", "0.jpg"], "1 files are in none of them.*0.jpg"),
        ([], "holds no file"),
        (["a.docx"], r"nothing that can be recognised \(.docx\)"),
        (["a.tar"], "d2v index"),
        (["a.zip"], "Unpack"),
        (["a.csv"], "No column of the table .*a.csv is called as texts usually are; it has: x. .*--columns TEXT,LABEL"),
    ],
)
def test_what_nobody_could_tell_is_named_with_the_remedy(tmp_path: Path, files: list[str], said: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(DataError, match=f"(?s){said}"):
        recognise(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2v_scale.conversion import folders

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(folders.os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        recognise(tmp_path)


def test_shards_are_not_raw(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert is_raw(str(tmp_path))
    write(tmp_path, "train-000000.tar", "train.index.json")
    assert not is_raw(str(tmp_path))
    assert not is_raw(str(tmp_path / "train.index.json"))
    assert not is_raw(str(tmp_path / "absent"))

"""`d2v shards dataset`, and the bare `d2v shards`: Parquet, Arrow, trees of recordings, parts of the work."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image
from small_shards import documents, images_folder

from d2v_scale.commands import make_shards
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.source import open_store
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards

BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(k: int) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray(np.full((9, 8, 3), k, dtype=np.uint8)).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def wav(k: int) -> dict[str, Any]:
    content = io.BytesIO()
    soundfile.write(content, np.sin(np.arange(800 + k)), 8000, format="WAV")
    return {"bytes": content.getvalue(), "path": f"{k}.wav"}


def with_features(table: pa.Table, **features: dict[str, Any]) -> pa.Table:
    """As Hugging Face `datasets` describes its columns."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def shards(*arguments: object, status: int = 0) -> None:
    assert make_shards.main([*map(str, arguments)]) == status


def members(folder: Path, prefix: str = "train") -> list[dict[str, bytes]]:
    found = find_shards(SourceConfig(shards=str(folder / f"{prefix}.index.json")))
    store = open_store(found, DataConfig())
    return [
        {name: bytes(value) for name, value in store.read(k, n).members().items()}
        for k in range(len(found.paths))
        for n in range(found.entries[k].samples)
    ]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The layout of the hub: two files of training rows, one of test rows, class names in the schema."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, rows in (("train-00000-of-00002", 5), ("train-00001-of-00002", 4), ("test-00000-of-00001", 3)):
        columns = {"img": pa.array([png(k) for k in range(rows)], BYTES), "label": [k % 2 for k in range(rows)]}
        table = with_features(
            pa.table(columns), img={"_type": "Image"}, label={"_type": "ClassLabel", "names": ["no", "yes"]}
        )
        pq.write_table(table, tmp_path / "hub" / "data" / f"{name}.parquet", row_group_size=2)
    return tmp_path / "hub"


def test_parquet_of_the_hub_becomes_a_set_of_each_split(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards(pictures, tmp_path / "out", "--per_shard", 4, "--processes", 1)
    said = capsys.readouterr().err
    assert "is recognised as train: 2 files of rows (.parquet): d2v shards dataset" in said
    assert "9 rows: image in 'img', label in 'label'" in said
    index = SetIndex.load(tmp_path / "out" / "train.index.json")
    assert (index.content, index.classes, [shard.samples for shard in index.shards]) == (
        "image",
        ["no", "yes"],
        [4, 4, 1],
    )
    held = members(tmp_path / "out")
    assert [one["png"] for one in held] == [png(k)["bytes"] for k in (0, 1, 2, 3, 4, 0, 1, 2, 3)]
    assert [one["cls"] for one in held[:3]] == [b"0", b"1", b"0"]
    assert len(members(tmp_path / "out", "test")) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "train-000001.tar").unlink()
    shards(pictures, tmp_path / "out", "--per_shard", 4, "--processes", 1)
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["train-000001.tar"]


def test_bad_rows_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = [png(0), {"bytes": b"\x89PNG no image", "path": None}, None, png(3), {"bytes": None, "path": "absent.png"}]
    pq.write_table(pa.table({"image": pa.array(held, BYTES)}), tmp_path / "a.parquet")
    shards(tmp_path / "a.parquet", tmp_path / "out", "--processes", 1, "--max_bad", 0.7)
    said = capsys.readouterr().err
    assert "a.parquet, row 2: has no image" in said
    assert "a.parquet, row 4: its image: " in said
    assert len(SetIndex.load(tmp_path / "out" / "train.index.json").skipped) == 3
    shards(tmp_path / "a.parquet", tmp_path / "other", "--processes", 1, status=2)
    assert not (tmp_path / "other" / "train.index.json").exists()


def test_rows_without_a_part_are_kept_as_of_a_table_of_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were left out here, and kept by `d2v shards pairs`."""
    tokenizer_training.train(documents(40), tmp_path / "t.model", vocab_size=290)
    empty = {"bytes": None, "path": None}
    images = pa.array([png(0), None, png(2), png(3), empty, {"bytes": b"none", "path": None}], BYTES)
    captions = ["zero", "one", None, "three", " ", "five"]
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet")
    common = ["--tokenizer", tmp_path / "t.model", "--processes", 1, "--per_shard", 2, "--max_bad", 0.9]
    shards(tmp_path / "a.parquet", tmp_path / "out", *common)
    told = capsys.readouterr()
    assert "of 4 rows 1 have no image, 1 have no text: they become samples of what they have" in told.out
    assert "row 4: has no image and no text" in told.err
    assert "row 5: its image: " in told.err
    names = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            names.append(tar.getnames())
    assert names == [
        ["000000000.png", "000000000.txt", "000000001.txt"],
        ["000000002.png", "000000003.png", "000000003.txt"],
        [],
    ]
    index = SetIndex.load(tmp_path / "out" / "train.index.json")
    assert [(shard.lost, shard.lost_beside) for shard in index.shards] == [(1, [0]), (0, [1]), (0, [0])]
    shards(tmp_path / "a.parquet", tmp_path / "out", *common, "--complete")
    assert [one["txt"] for one in members(tmp_path / "out")] == [b"zero", b"three"]
    assert "row 2: has no text" in capsys.readouterr().err


def test_a_part_that_no_row_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_training.train(documents(40), tmp_path / "t.model", vocab_size=290)
    columns = {"image": pa.array([png(0), png(1)], BYTES), "caption": pa.array([None, ""], pa.string())}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    given = ["--tokenizer", tmp_path / "t.model", "--processes", 1]
    shards(tmp_path / "a.parquet", tmp_path / "out", *given, status=2)
    assert "has text" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.index.json").exists()


def save_to_disk(folder: Path, table: pa.Table) -> Path:
    """As `Dataset.save_to_disk` lays it out, with a file that its cache left behind."""
    folder.mkdir(parents=True)
    for name in ("data-00000-of-00001.arrow", "cache-1234.arrow"):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_recordings_of_a_saved_dataset_have_their_transcripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"audio": pa.array([wav(k) for k in range(5)], BYTES), "text": [f"WORD {k}" for k in range(5)]}
    saved = save_to_disk(tmp_path / "saved", pa.table(columns | {"id": list(range(5))}))
    shards(saved, tmp_path / "out", "--processes", 1)
    assert "not read: id" in capsys.readouterr().err
    held = members(tmp_path / "out")
    assert [one["txt"] for one in held] == [f"WORD {k}".encode() for k in range(5)]
    index = SetIndex.load(tmp_path / "out" / "train.index.json")
    assert (index.contents, index.samples, index.shards[0].length) == (["recording"], 5, 2 * (5 * 800 + 10))
    (saved / "data-00000-of-00001.arrow").unlink()
    shards(saved, tmp_path / "out", "--processes", 1, status=2)
    assert "which is not there" in capsys.readouterr().err


def test_texts_arrays_and_pictures_with_captions_are_told_by_type(tmp_path: Path) -> None:
    texts = documents(40)
    tokenizer_training.train(texts, tmp_path / "t.model", vocab_size=290)
    given = ["--tokenizer", tmp_path / "t.model", "--processes", 1]
    pq.write_table(pa.table({"sentence1": texts, "sentence2": texts, "label": [0.5] * 40}), tmp_path / "glue.parquet")
    shards(tmp_path / "glue.parquet", tmp_path / "glue", *given)
    assert members(tmp_path / "glue")[1] == {"txt": texts[1].encode(), "txt2": texts[1].encode(), "score": b"0.5"}
    pq.write_table(
        pa.table({"image": pa.array([png(k) for k in range(3)], BYTES), "caption": ["a", "b", "c"]}),
        tmp_path / "p.parquet",
    )
    shards(tmp_path / "p.parquet", tmp_path / "pairs", *given)
    assert SetIndex.load(tmp_path / "pairs" / "train.index.json").contents == ["image", "text"]
    rows = [np.full((2, 5 + k), k, dtype=np.float32).tolist() for k in range(3)]
    table = pa.table({"x": pa.array(rows, pa.list_(pa.list_(pa.float32()))), "target": ["b", "a", "b"]})
    pq.write_table(table, tmp_path / "x.parquet")
    shards(tmp_path / "x.parquet", tmp_path / "arrays", "--processes", 1)
    held = members(tmp_path / "arrays")
    assert [one["cls"] for one in held] == [b"1", b"0", b"1"]
    array = np.load(io.BytesIO(held[2]["npy"]))
    assert (array.shape, array.dtype) == ((2, 7), np.float32)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a": ["x"], "b": ["y"]}, "No column of .* is called as texts usually are; it has: a (string), b (string)"),
        ({"text": ["x"], "class": [1], "category": [2]}, None),
        ({"text": ["x"], "coarse": [1], "fine": [2]}, "Several columns of .* may be the label: coarse, fine"),
    ],
)
def test_columns_that_nobody_could_tell_are_asked_for(
    tmp_path: Path, columns: dict, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {name: {"_type": "ClassLabel", "names": ["a", "b", "c"]} for name in ("coarse", "fine") if name in columns}
    pq.write_table(with_features(pa.table(columns), **named), tmp_path / "a.parquet")
    if said is None:
        from d2v_scale.conversion.row_columns import find_columns

        assert find_columns(tmp_path / "a.parquet", {}).label == "class"
        return
    shards(tmp_path / "a.parquet", tmp_path / "out", status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    import re

    assert re.search(said.replace("(", r"\(").replace(")", r"\)"), error), error
    assert not list((tmp_path / "out").glob("*.tar")) if (tmp_path / "out").exists() else True


def test_a_tree_like_librispeech_is_recognised_with_its_transcripts(tmp_path: Path) -> None:
    for speaker in (19, 84):
        folder = tmp_path / "src" / str(speaker) / "198"
        folder.mkdir(parents=True)
        for k in range(2):
            soundfile.write(folder / f"{speaker}-198-000{k}.flac", np.sin(np.arange(1600)), 16000)
        lines = [f"{speaker}-198-000{k} SAID {speaker} {k}" for k in range(2)]
        (folder / f"{speaker}-198.trans.txt").write_text("\n".join(lines) + "\n")
    shards(tmp_path / "src", tmp_path / "out", "--processes", 1)
    assert sorted(one["txt"] for one in members(tmp_path / "out")) == [
        b"SAID 19 0",
        b"SAID 19 1",
        b"SAID 84 0",
        b"SAID 84 1",
    ]
    assert SetIndex.load(tmp_path / "out" / "train.index.json").classes == []


def test_parts_of_the_work_end_in_one_index_whoever_is_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = images_folder(tmp_path / "images"), tmp_path / "out"
    common = [source, out, "--per_shard", 5, "--processes", 1]
    shards(*common, "--part", "1/2")
    assert "2 of 3 shards are for other parts to write" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.tar")] == ["train-000001.tar"]
    assert not (out / "train.index.json").exists()
    shards(*common, "--part", "0/2")
    assert SetIndex.load(out / "train.index.json").samples == 12
    shards(source, tmp_path / "whole", "--per_shard", 5, "--processes", 1)
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    with pytest.raises(SystemExit):
        shards(*common, "--part", "2/2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["imgaes", "src", "out"], "does not exist, and is no command. Did you mean 'images'?"),
        (["absent", "out"], "absent does not exist"),
        (["."], "Write d2v shards SRC OUT"),
    ],
)
def test_a_bare_call_that_cannot_be_meant_is_told(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shards(*arguments, status=2)
    assert said in capsys.readouterr().err
    assert not Path("out").exists()

"""`d2v shards pairs`: rows of a table to samples of several parts, whole or not at all."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_scale.commands import inspect_shards, make_shards
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.source import open_store
from d2v_scale.shards.one_content import reading_together
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards

NAMES = ["a dog", "a cat, asleep", "the house", "a tree in the wind", "the sea", "a bird above a roof"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, recordings and arrays."""
    (tmp_path / "files").mkdir()
    rng = np.random.default_rng(1)
    for k in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(tmp_path / "files" / f"p{k}.png")
        soundfile.write(tmp_path / "files" / f"r{k}.wav", rng.normal(0, 0.1, 4000 + k), 8000)
        np.save(tmp_path / "files" / f"x{k}.npy", rng.normal(0, 1, (3, 20 + k)).astype(np.float32))
    return tmp_path


def table(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def pairs(*arguments: object) -> int:
    options = ["--processes", "1", "--vocab_size", "300", "--fewer_pieces"]
    return make_shards.main(["pairs", *map(str, arguments), *options])


def rows(separator: str = ",") -> list[str]:
    found = []
    for k, name in enumerate(NAMES):
        quoted = f'"{name}"' if separator in name else name
        found.append(separator.join([f"files/p{k}.png", f"files/r{k}.wav", quoted, f"kind{k % 2}"]))
    return found


def members(folder: Path, prefix: str = "train", together: bool = False) -> dict[str, dict[str, bytes]]:
    """By key; `together`: as who reads all parts, of whom a sample is lost where it has none."""
    shards = find_shards(SourceConfig(shards=str(folder / f"{prefix}.index.json")))
    if together:
        assert shards.index is not None
        shards = reading_together(shards, shards.index.contents)
    store = open_store(shards, DataConfig())
    found = {}
    for shard in range(len(shards.paths)):
        for number in range(len(shards.members(shard))):
            found[shards.members(shard).key(number)] = store.read(shard, number).members()
    return found


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_a_row_is_a_sample_of_all_its_parts(folder: Path, ending: str, separator: str) -> None:
    source = table(folder / f"t.{ending}", separator.join(["image", "audio", "text", "label"]), rows(separator))
    assert pairs(source, folder / "out", "--per_shard", 4) == 0
    index = SetIndex.load(folder / "out" / "train.index.json")
    assert index.contents == ["image", "recording", "text"]
    assert index.classes == ["kind0", "kind1"]
    assert (index.samples, len(index.shards), index.tokenizer) == (6, 2, "tokenizer.model")
    assert [(entry.lost, entry.lost_beside) for entry in index.shards] == [(0, [0, 0])] * 2
    found = members(folder / "out")
    for key, sample in found.items():
        k = int(key[-1])
        assert sample.keys() == {"png", "flac", "txt", "cls"}
        assert sample["png"] == (folder / "files" / f"p{k}.png").read_bytes()
        assert (sample["txt"].decode(), int(sample["cls"])) == (NAMES[k], k % 2)
    assert inspect_shards.main([str(folder / "out"), "--check"]) == 0


def test_a_row_goes_on_as_what_it_has(folder: Path, capsys: pytest.CaptureFixture) -> None:
    made = rows()
    made[1] = made[1].replace("files/p1.png", "")
    made[2] = made[2].replace('"the house"', " ").replace("the house", "")
    made[3] = ',,"a tree in the wind",kind1'
    made[4] = ",, ,kind0"
    source = table(folder / "t.csv", "image,audio,text,label", made)
    assert pairs(source, folder / "out", "--max_bad", "0.2") == 0
    told = capsys.readouterr()
    assert "of 5 rows 2 have no image, 1 have no audio, 1 have no text" in told.out
    assert "t.csv:6: has no image and no audio and no text" in told.err
    stored = members(folder / "out", together=True).values()
    found = {sample.get("txt", b"").decode(): set(sample) for sample in stored}
    assert len(found) == 5
    assert found["a cat, asleep"] == {"flac", "txt", "cls"}
    assert found[""] == {"png", "flac", "cls"}
    assert found["a tree in the wind"] == {"txt", "cls"}
    index = SetIndex.load(folder / "out" / "train.index.json")
    assert [(entry.lost, entry.lost_beside) for entry in index.shards] == [(2, [1, 1])]
    assert pairs(source, folder / "whole", "--complete") == 2
    assert "4 of 6 rows could not be read" in capsys.readouterr().err
    assert pairs(source, folder / "whole", "--complete", "--max_bad", "0.7") == 0
    assert len(members(folder / "whole")) == 2
    empty = table(folder / "e.csv", "image,audio,text", [",files/r0.wav,one", ",files/r1.wav,two"])
    assert pairs(empty, folder / "none") == 2
    assert "No row of" in (told := capsys.readouterr().err)
    assert "--image COLUMN" in told


def test_what_a_sample_is_of_is_kept_beside_it(folder: Path) -> None:
    """For `d2v align`. Two captions of one thing were two concepts, unless the thing was named by its label."""
    made = [f"files/p{k}.png,{NAMES[0]} {k},thing {k // 2},{'animal' if k < 4 else ' '}" for k in range(6)]
    source = table(folder / "t.csv", "image,text,concept,category", made)
    assert pairs(source, folder / "out") == 0
    facts = {key[-1]: json.loads(sample["json"]) for key, sample in members(folder / "out").items()}
    assert facts["3"] == {"concept": "thing 1", "category": "animal"}
    assert facts["5"] == {"concept": "thing 2"}


def test_half_a_sample_is_named_and_never_stored(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "files" / "p1.png").write_bytes(b"no picture")
    (folder / "files" / "r2.wav").unlink()
    made = rows()
    made[3] = made[3].replace("a tree in the wind", " ")
    made.append("files/p0.png,files/r0.wav,one,kind0,more,and more")
    made.append("files/p0.txt,files/r0.wav,wrong,kind0")
    source = table(folder / "t.csv", "image,audio,text,label", made)
    assert pairs(source, folder / "out", "--complete") == 2
    told = capsys.readouterr().err
    assert "5 of 8 rows could not be read" in told
    assert "--match" not in told  # which this command does not have
    assert "no index was written" in told
    assert not (folder / "out" / "train.index.json").exists()
    assert pairs(source, folder / "out", "--complete", "--max_bad", "0.7") == 0
    told = capsys.readouterr().err
    for line, why in [(3, "its image"), (4, "its audio"), (5, "has no text"), (8, "has 6 columns"), (9, "its image")]:
        assert f"t.csv:{line}: {why}" in told
    assert {int(key[-1]) for key in members(folder / "out")} == {0, 4, 5}
    assert len(SetIndex.load(folder / "out" / "train.index.json").skipped) == 5


def test_columns_have_other_names_or_numbers(folder: Path, capsys: pytest.CaptureFixture) -> None:
    source = table(folder / "t.csv", "picture,sound,caption,label", rows())
    assert pairs(source, folder / "a", "--image", "picture", "--text", "caption") == 0
    assert SetIndex.load(folder / "a" / "train.index.json").contents == ["image", "text"]
    bare = table(folder / "bare.csv", rows()[0], rows()[1:])
    assert pairs(bare, folder / "b", "--image", "1", "--audio", "2") == 0
    index = SetIndex.load(folder / "b" / "train.index.json")
    assert (index.contents, index.samples, index.classes) == (["image", "recording"], 6, [])
    assert pairs(source, folder / "c") == 2
    assert "needs two of image, audio, array and text" in capsys.readouterr().err
    assert pairs(source, folder / "c", "--image", "picture", "--text", "words") == 2
    assert "has no column 'words'" in capsys.readouterr().err
    assert pairs(source, folder / "c", "--image", "picture", "--text", "picture") == 2
    assert "named twice" in capsys.readouterr().err
    assert pairs(folder / "files", folder / "c") == 2
    assert "is no table" in capsys.readouterr().err
    assert pairs(folder / "none.csv", folder / "c") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_arrays_have_captions(folder: Path) -> None:
    np.save(folder / "files" / "x5.npy", np.ones((2, 7), dtype=np.float32))  # of another layout than the rest
    source = table(folder / "t.tsv", "array\ttext", [f"files/x{k}.npy\t{name}" for k, name in enumerate(NAMES)])
    assert pairs(source, folder / "out", "--max_bad", "0.2") == 0
    index = SetIndex.load(folder / "out" / "train.index.json")
    assert index.contents == ["array", "text"]
    assert index.samples == 5
    assert "3 channels" in next(iter(index.skipped.values()))
    assert inspect_shards.main([str(folder / "out"), "--check"]) == 0


def test_an_interrupted_run_goes_on_and_a_changed_file_is_read_again(folder: Path) -> None:
    source = table(folder / "t.csv", "image,audio,text,label", rows())
    assert pairs(source, folder / "out", "--per_shard", 2) == 0
    tars = sorted((folder / "out").glob("*.tar"))
    times = [tar.stat().st_mtime_ns for tar in tars]
    digests = [hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars]
    tars[1].unlink()
    assert pairs(source, folder / "out", "--per_shard", 2) == 0
    assert [tar.stat().st_mtime_ns for tar in tars[::2]] == times[::2]
    assert [hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars] == digests
    Image.new("RGB", (9, 9)).save(folder / "files" / "p0.png")
    assert pairs(source, folder / "out", "--per_shard", 2) == 0
    changed = [tar.stat().st_mtime_ns for tar in tars]
    assert sum(a != b for a, b in zip(changed[::2], times[::2], strict=True)) <= 1
    stored = next(one for key, one in members(folder / "out").items() if key.endswith("p0"))
    assert stored["png"] == (folder / "files" / "p0.png").read_bytes()


def test_captions_on_both_sides_of_a_split_are_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    train = table(folder / "train.csv", "image,audio,text,label", rows()[:4])
    test = table(folder / "test.csv", "image,audio,text,label", [*rows()[4:], "files/p0.png,files/r0.wav,A  Dog,kind0"])
    assert pairs(train, folder / "out") == 0
    capsys.readouterr()
    assert pairs(test, folder / "out", "--prefix", "test") == 2
    told = capsys.readouterr().err
    assert "1 captions are also in the set 'train'" in told
    assert "'A  Dog' of" in told
    assert "test.csv:4" in told
    assert not list((folder / "out").glob("test*"))
    assert pairs(test, folder / "out", "--prefix", "test", "--shared_captions") == 0
    assert pairs(train, folder / "out") == 2  # written again, it is compared with the other
    assert pairs(train, folder / "elsewhere") == 0


def test_labels_of_one_split_are_those_of_the_other(folder: Path, capsys: pytest.CaptureFixture) -> None:
    train = table(folder / "train.csv", "image,audio,text,label", rows()[:4])
    test = table(folder / "test.csv", "image,audio,text,label", [rows()[4].replace("kind0", "kind9")])
    assert pairs(train, folder / "out") == 0
    assert pairs(test, folder / "out", "--prefix", "test") == 2
    assert "kind9" in capsys.readouterr().err

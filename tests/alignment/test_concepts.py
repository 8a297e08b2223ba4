"""Sets as users have them: several samples a concept, members missing, no categories, no .json, damage."""

import json
from pathlib import Path

import pytest
from concept_shards import name, picture, recording, samples, write_concepts

from d2v_scale.alignment.concepts import ConceptSet, Part, open_split, read_set
from d2v_scale.errors import DataError
from d2v_scale.shards.content import Content
from d2v_scale.shards.writing import Sample, write_shard

CONTENTS: tuple[Content, ...] = ("image", "recording", "text")


def written(folder: Path, made: list[Sample]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "part-000000.tar", made)
    return str(folder)


def read(folder: Path, made: list[Sample], **options: str) -> ConceptSet:
    return read_set(written(folder, made), CONTENTS, options.get("concept"), options.get("category"))


def test_the_concept_is_what_json_says_else_the_label_else_the_sample(tmp_path: Path) -> None:
    made = samples(0, 4, each=2)
    found = read(tmp_path / "json", made)
    assert found.concepts == ["c0", "c1", "c2", "c3"]
    assert [place.category for place in found.places[:4]] == ["k0", "k0", "k1", "k1"]
    labelled = [{key: value for key, value in one.items() if key != "json"} for one in made]
    found = read(tmp_path / "label", labelled)
    assert (found.concepts, found.places[0].category) == (["0", "1", "2", "3"], None)
    found = read(tmp_path / "label", labelled, concept="key")
    assert (len(found.concepts), found.places[0].category) == (8, "0")
    assert read(tmp_path / "label", labelled, concept="text").concepts[0] == name(0)
    bare = [{key: value for key, value in one.items() if key not in ("json", "cls")} for one in made]
    assert len(read(tmp_path / "bare", bare, concept="key").concepts) == 8
    assert read(tmp_path / "bare", bare).concepts == [f"{k:05d}-0" for k in range(4)]  # two samples share a name


def test_samples_that_share_a_member_are_of_one_concept(tmp_path: Path) -> None:
    """A picture with five captions, and captions in two voices: as such sets come, without any name of a concept. Every
    caption was a concept of its own, and all that were held out lay on the training side, by their pictures."""
    made: list[Sample] = []
    for number in range(8):
        for caption in range(5):
            one: Sample = {"__key__": f"{number}-{caption}", "png": picture(number), "txt": f"{name(number)} {caption}"}
            made += [
                one,
                {"__key__": f"{number}-{caption}-said", "flac": recording(number, caption), "txt": one["txt"]},
            ]
    found = read(tmp_path / "set", made)
    assert found.concepts == [f"{number}-0" for number in range(8)]
    assert found.named_by == "shared"
    split = open_split(str(tmp_path / "set"), None, 0.25, CONTENTS, None, None)
    assert (len(split.train.concepts), len(split.test.concepts), split.on_both_sides) == (6, 2, {})


def test_equal_keys_of_two_sets_say_nothing(tmp_path: Path) -> None:
    """Samples are numbered from 0 on both sides: all held-out concepts were taken for training ones."""
    train, test = ([{"__key__": f"{k}", "png": picture(first + k)} for k in range(9)] for first in (0, 9))
    paths = written(tmp_path / "train", train), written(tmp_path / "test", test)
    for concept in (None, "key"):
        split = open_split(*paths, 0.25, CONTENTS, concept, None)
        assert (len(split.test.concepts), split.on_both_sides) == (9, {})


def test_a_category_that_no_sample_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No sample .* has a colour"):
        read(tmp_path / "set", samples(0, 4), category="colour")


def test_samples_without_a_concept_or_damaged_are_left_out_and_named(tmp_path: Path) -> None:
    made = samples(0, 5)
    made[1]["json"] = b"{"
    made[2]["json"] = json.dumps({"concept": "", "category": "k"}).encode()
    made[3]["json"] = b"[1]"
    found = read(tmp_path / "set", made)
    assert found.concepts == ["c0", "c4"]
    assert found.left_out["has no concept"] == ["00002-0"]
    assert [line.split(" ")[0] for line in found.left_out["cannot be read"]] == ["00001-0", "00003-0"]
    with pytest.raises(DataError, match=r"is of a concept, the first: .*--concept"):
        read_set(str(tmp_path / "set"), CONTENTS, "colour", None)


def test_a_stem_is_given_its_own_members_alone(tmp_path: Path) -> None:
    """Beside a caption `.npy` is an array: a text stem took it for ids, since it came first in the tar."""
    array = b"\x93NUMPY"
    made: list[Sample] = [{"__key__": "a", "npy": array, "txt": "a word", "png": picture(0)}]
    made += [{"__key__": "b", "npy": array}]
    found = read(tmp_path / "set", made)
    first, second = (found.shards.read(0, number) for number in (0, 1))
    assert Part(first, "text").member(("npy", "txt"))[0] == "txt"
    assert Part(first, "array").member(("npy", "npz"))[0] == "npy"
    assert not Part(first, "recording").there
    assert Part(second, "text").member(("npy", "txt"))[0] == "npy"
    assert list(Part(first, "image").members()) == ["png"]


def test_concepts_on_both_sides_are_not_held_out(tmp_path: Path) -> None:
    train, test = samples(0, 10), samples(10, 10)
    test[0]["json"] = json.dumps({"concept": "c3"}).encode()
    test[1]["txt"] = name(4).upper() + "  "
    test[2]["png"] = picture(5)
    paths = written(tmp_path / "train", train), written(tmp_path / "test", test)
    split = open_split(paths[0], paths[1], 0.25, CONTENTS, None, None)
    assert len(split.test.concepts) == 7
    assert split.on_both_sides == {"the concept": ["c3"], "a caption": ["c11"], "one of its images": ["c12"]}


def test_sides_are_found_in_a_folder_or_split_by_concept(tmp_path: Path) -> None:
    both = write_concepts(tmp_path / "both", 6, 4, each=2)
    split = open_split(str(both), None, 0.25, CONTENTS, None, None)
    assert (len(split.train.concepts), len(split.test.concepts), split.same_shards) == (6, 4, False)
    (flat := tmp_path / "flat").mkdir()
    write_shard(flat / "train-000000.tar", samples(0, 6))
    with pytest.raises(DataError, match=r"holds .*train-\*.tar alone"):
        open_split(str(flat), None, 0.25, CONTENTS, None, None)
    write_shard(flat / "test-000000.tar", samples(6, 4))
    split = open_split(str(flat), None, 0.25, CONTENTS, None, None)
    assert (len(split.train.concepts), len(split.test.concepts)) == (6, 4)
    one = open_split(str(both / "train"), None, 0.5, CONTENTS, None, None)
    assert (len(one.train.concepts), len(one.test.concepts), one.same_shards) == (3, 3, True)
    assert not set(one.train.concepts) & set(one.test.concepts)
    assert one.test.concepts == open_split(str(both / "train"), None, 0.5, CONTENTS, None, None).test.concepts


def test_a_cut_tar_loses_what_is_cut_off(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "set", samples(0, 6))) / "part-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    found = read_set(str(path), CONTENTS, None, None)
    assert 2 <= len(found.concepts) < 6
    assert found.left_out.get("cannot be read") or found.shards.damage


def test_equal_members_have_equal_digests(tmp_path: Path) -> None:
    made: list[Sample] = [
        {"__key__": f"{k}", "png": picture(k), "flac": recording(0), "txt": "one", "cls": 0} for k in range(3)
    ]
    found = read(tmp_path / "set", made)
    assert len({place.digests["recording"] for place in found.places}) == 1
    assert len({place.digests["image"] for place in found.places}) == 3

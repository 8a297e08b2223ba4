"""d2v_scale.conversion.demo"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale.conversion import demo
from d2v_scale.errors import DataError
from d2v_scale.shards.shard_index import SetIndex


def test_several_processes_may_ask_for_the_same_set_at_once(tmp_path: Path) -> None:
    root = tmp_path / "demo_data"
    program = "import sys, pathlib, d2v_scale.conversion.demo as demo; demo.write('vision', pathlib.Path(sys.argv[1]))"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(root)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    train, test = (SetIndex.load(root / "vision" / f"{split}.index.json") for split in ("train", "test"))
    assert train.samples + test.samples == 1797
    written = (root / "vision" / "train-000000.tar").stat().st_mtime_ns
    demo.ensure([str(root / "vision" / "train-*.tar"), None, "/elsewhere/train-*.tar"])
    assert (root / "vision" / "train-000000.tar").stat().st_mtime_ns == written
    assert sorted(path.name for path in root.iterdir()) == [".vision.lock", "vision"]


def test_an_incomplete_set_is_written_again(tmp_path: Path) -> None:
    root = tmp_path / "demo_data"
    (root / "vision").mkdir(parents=True)
    (root / "vision" / "train.index.json").write_text("{}")
    demo.ensure([f"{root}/vision/train-*.tar"])
    assert SetIndex.load(root / "vision" / "train.index.json").samples == 1438


@pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="needs the demo extra")
def test_a_joint_set_of_before_pictures_were_split_is_written_again(tmp_path: Path) -> None:
    """Its version had stayed: who had the set kept pictures that are on both sides."""
    for name in ("vision", "joint"):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in {"VERSION": "3", "train.index.json": "{}", "test.index.json": "{}"}.items():
            (folder / file).write_text(content)
    assert demo.is_complete(tmp_path / "vision")
    assert not demo.is_complete(tmp_path / "joint")


def test_held_out_voices_are_not_in_training() -> None:
    from d2v_scale.conversion.demo import spoken_words

    assert len(set(spoken_words.TRAINING_VOICES)) >= 12
    assert not set(spoken_words.TRAINING_VOICES) & set(spoken_words.HELD_OUT_VOICES)
    synthesizer = spoken_words.Synthesizer()
    waves = [synthesizer.speak("seven", voice, 150, 50) for voice in ("en+m1", "en-us+f5")]
    assert all(0.25 < len(wave) / 16000 < 1.3 for wave in waves)
    assert len(waves[0]) != len(waves[1]) or (waves[0] != waves[1]).any()


def test_without_the_wheel_speech_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from d2v_scale.conversion.demo import spoken_words

    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match=r"d2v_scale\[demo\]"):
        spoken_words.Synthesizer()

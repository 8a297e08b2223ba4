"""Keys that are called otherwise elsewhere, words that belong to no key, and what is imported by then."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale import command_line
from d2v_scale.answers import mistakes, other_names
from d2v_scale.errors import ConfigError

HEAVY = ("torch", "deepspeed", "mlflow", "transformers")


def said_of(*arguments: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        command_line.parse([*arguments])
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("--lr", "optim.lr"),
        ("--width", "model.backbone.width"),
        ("--patch_size", "model.vision.patch_size"),
        ("--prob", "objective.masking.prob"),
        ("--optimization.lr", "optim.lr"),
        ("--batch_size", "global_batch_size"),
        ("--batch-size", "global_batch_size"),
        ("--epochs", "optim.max_steps"),
        ("--mask_ratio", "objective.masking.prob"),
        ("--config", "recipe"),
        ("--learning-rate", "optim.lr"),
        ("--per_device_train_batch_size", "global_batch_size"),
        ("--gradient_accumulation_steps", "accumulation"),
        ("--optimization.update_freq", "accumulation"),
        ("--output_dir", "run_dir"),
        ("--checkpoint.save_dir", "run_dir"),
        ("--warmup_steps", "optim.warmup_steps"),
        ("--weight_decay", "optim.weight_decay"),
        ("--num_workers", "data.workers"),
        ("--mask_prob", "objective.masking.prob"),
        ("--ema_decay", "objective.ema.start"),
        ("--resume_from_checkpoint", "resume"),
        ("--objective.mask_length", "objective.masking.length"),
    ],
)
def test_a_key_of_another_program_is_answered_with_ours(given: str, key: str) -> None:
    for words in ([given, "3"], [f"{given}=3"]):
        assert f"Did you mean {key!r}" in str(said_of(*words))


def test_every_answer_is_a_key_and_no_key_is_called_otherwise() -> None:
    ours = {*mistakes.known_keys(), *command_line.OPTIONS, "data"}
    assert {*other_names.KEY_OF.values()} <= ours
    assert {*other_names.HOW} <= {*other_names.KEY_OF.values()}
    assert not {*other_names.KEY_OF} & ours
    assert not other_names.OF_THE_LAUNCHER & {*other_names.KEY_OF}
    every = [name for names in other_names._NAMES.values() for name in names.split()]
    assert sorted(every) == sorted({*every})


def test_what_means_something_else_says_how_to_get_ours() -> None:
    assert "epochs x samples / global_batch_size" in str(said_of("--num_train_epochs", "3"))
    assert "over all processes" in str(said_of("--batch_size", "3"))
    assert "'evaluation.batch_size', too" in str(said_of("--batch_size", "3"))
    assert "--ranks N" in str(said_of("--num_gpus", "3"))


@pytest.mark.parametrize("key", ["data", "evaluation.train", "data.text.tokenizer"])
def test_a_pattern_that_the_shell_has_resolved_is_to_be_quoted(key: str, tmp_path: Path) -> None:
    files = [str(tmp_path / f"train-{number:03}.tar") for number in range(12)]
    for before in ([f"--{key}", files[0]], [f"--{key}={files[0]}"]):
        error = said_of("--seed", "1", *before, *files[1:], "--optim.lr", "1")
        assert error.key == key
        assert f"Quote the pattern, which your shell has resolved: --{key} '{tmp_path}/train-0*.tar'." in str(error)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=3"], "Write --optim.lr=3."),
        (["--seed", "3", "optimization.lr=[0.1]"], "Write --optimization.lr=[0.1]."),
        (["--optim.betas", "0.9", "0.98"], "optim.betas: is a list, of which '0.98' is a word. Write --optim.betas"),
        (["--optim.betas", "[0.9,", "0.98]"], "Write --optim.betas '[0.9, 0.98]'."),
        (["train"], "'train' belongs to no key. Write --KEY VALUE"),
        (["--seed", "3", "4"], "'4' belongs to no key"),
        (["-j", "4"], "'-j' belongs to no key"),
    ],
)
def test_a_word_that_belongs_to_no_key_is_named(words: list[str], said: str) -> None:
    assert said in str(said_of(*words))


@pytest.mark.parametrize("value", ["-1", "a b", "--data=x.tar y.tar"])
def test_values_may_look_like_anything(value: str) -> None:
    given = ["--name", value] if not value.startswith("--") else [value]
    command_line.parse(given)


MISTAKES = [
    ["--help"],
    ["--help_all"],
    ["--list_recipes"],
    ["--print_config"],
    ["--recipe", "d2v2_joint_base", "--help"],
    ["--lr", "1e-3"],
    ["--optim.lrr", "3"],
    ["--optim.lr", "fast"],
    ["--optim.lr", "-1"],
    ["--model.vision.patch_size", "null"],
    ["--recipe", "demo_visoin"],
    ["--resume", "nowhere"],
    ["--data", "a.tar", "b.tar"],
    ["--data", ""],
    ["--data", "nowhere.tar"],
    ["--data", "nowhere-*.tar"],
    ["--data", "nowhere.index.json"],
    ["--data", "speech=x.tar"],
    ["--data", "vision=x.tar,smell=y.tar"],
    ["--data", "*.index.json"],
    ["--recipe", "d2v2_joint_base", "--data", "x.tar"],
    ["--recipe", "d2v2_vision_base"],
    ["--recipe", "finetune_vision_v2_base", "--data", "x.tar"],
    ["--recipe", "finetune_vision_v2_base", "--data", "x.tar", "--init_from", "nowhere"],
    ["--global_batch_size", "1", "--accumulation", "7"],
    ["--batch_unit", "tokens"],
    ["--parallel.tensor", "3"],
    ["--parallel.pipeline", "2"],
    ["--model.backbone.depth", "1"],
    ["--objective.target.top_k_layers", "9"],
    ["--objective.target.kind", "codes", "--objective.target.options", "{codes: 0}"],
    ["--objective.target.kind", "input", "--objective.target.layers", "[1]"],
    ["--objective.target.kind", "whitened", "--objective.target.options", "{momentum: 2}"],
    ["--objective.masking.prob", "2"],
    ["--objective.masking.clones", "4"],
    ["--optim.warmup_steps", "900"],
    ["--profile.steps", "4:2"],
    ["--deepspeed_config", "nowhere.json"],
    ["--deepspeed_config", "wrong.json"],
    ["--deepspeed_config", "stage0.json"],
    ["--reset_teacher", "true"],
    ["--evaluation.layers", "x"],
]
IN_ONE_PROCESS = """
import contextlib, io, json, logging, os, sys
import d2v_scale.train
from d2v_scale.process import doing
from d2v_scale.process.signals import StopFlag

doing.SILENCE_S = 1e6  # on a busy machine it is said what takes long

class Ended(BaseException):
    pass

def end(code):
    raise Ended(code)

os._exit = end
said = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    logging.getLogger().handlers.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = d2v_scale.train.main(arguments, StopFlag())
        except SystemExit as ended:
            code = ended.code
        except Ended as ended:
            code = ended.args[0]
    heavy = [module for module in sys.argv[2:] if module in sys.modules]
    said.append([code, heavy, out.getvalue()])
print(json.dumps(said))
"""


def test_help_and_refusals_of_training_import_nothing_that_is_slow(tmp_path: Path) -> None:
    """Each took the seconds in which torch is imported, on every rank."""
    (tmp_path / "wrong.json").write_text('{"zero_optimization": {"stage": 1}, "zero_optimisation": {}}')
    (tmp_path / "stage0.json").write_text('{"zero_optimization": {"stage": 0}}')
    (tmp_path / "a.index.json").write_text("{}")
    command = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(MISTAKES), *HEAVY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    for arguments, (code, heavy, text) in zip(MISTAKES, said, strict=True):
        asked = {"--help", "--help_all", "--list_recipes", "--print_config"} & {*arguments}
        assert heavy == [], (arguments, heavy, text)
        assert code == (0 if asked else 2), (arguments, text)
        assert asked or text.startswith("error: "), (arguments, text)
        assert "Traceback" not in text, (arguments, text)
        assert asked or text.count("\n") == 1, (arguments, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.index.json", "stage0.json", "wrong.json"]

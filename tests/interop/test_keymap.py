import pytest
import tiny_models
import torch

from d2v_scale.errors import CheckpointError
from d2v_scale.interop.keymap import KeyMap, export_tensors, import_tensors
from d2v_scale.interop.reference_config import from_fairseq
from d2v_scale.interop.reference_names import reference_keys, teacher_prefix
from d2v_scale.interop.reference_options import parse_conv_layers
from d2v_scale.networks.stack import Student


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_import_of_an_export_in_reference_names_is_the_identity(name: str) -> None:
    student = Student(tiny_models.model(name))
    ours = {n: torch.randn(p.shape) for n, p in student.named_parameters()}
    keymap = reference_keys(student.config, tiny_models.modality_of(name))
    theirs = dict(export_tensors(keymap, ours))
    back, report = import_tensors(keymap, theirs, {n: tuple(t.shape) for n, t in ours.items()})
    report.require_complete(name)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[n], ours[n]) for n in ours)


def test_query_key_and_value_rows_are_grouped_by_head() -> None:
    keymap = KeyMap()
    keymap.separate_qkv("qkv", ("q", "k", "v"), heads=2)
    q, k, v = torch.arange(4.0), torch.arange(10.0, 14.0), torch.arange(20.0, 24.0)
    ours, _ = import_tensors(keymap, {"q": q, "k": k, "v": v})
    assert ours["qkv"].tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_missing_unexpected_and_misshapen_keys_are_listed() -> None:
    keymap = KeyMap()
    keymap.add("a", "A")
    keymap.add("b", "B")
    ours, report = import_tensors(keymap, {"B": torch.zeros(2), "C": torch.zeros(1)}, {"a": (1,), "b": (3,)})
    assert ours == {}
    with pytest.raises(CheckpointError) as caught:
        report.require_complete("file")
    for text in ("missing: A", "unexpected: C", "B (2,)", "matched 0, missing 1, unexpected 1"):
        assert text in str(caught.value)


def test_derived_tensors_must_be_what_the_architecture_computes() -> None:
    keymap = KeyMap()
    keymap.derived["positions"] = lambda: torch.ones(2)
    assert import_tensors(keymap, {"positions": torch.ones(2)})[1].matched == ["positions"]
    assert import_tensors(keymap, {"positions": torch.zeros(2)})[1].wrong
    assert not import_tensors(keymap, {})[1].missing


def test_exporting_a_part_writes_only_that_part() -> None:
    student = Student(tiny_models.model("v1_speech"))
    keymap = reference_keys(student.config, "speech")
    ours = {n: torch.zeros(p.shape) for n, p in student.named_parameters() if n.startswith("blocks.1.")}
    assert all(key.startswith("encoder.layers.1.") for key, _ in export_tensors(keymap, ours))


@pytest.mark.parametrize(
    ("name", "teacher_key", "prefix"),
    [
        ("v1_speech", "layers.0.fc1.weight", "encoder."),
        ("v1_text", "layers.0.fc1.weight", "encoder.sentence_encoder."),
        ("v1_vision", "blocks.0.attn.proj.bias", ""),
        ("v2_speech", "blocks.0.attn.proj.bias", ""),
        ("v2_text", "0.attn.proj.bias", "blocks."),
    ],
)
def test_teacher_keys_lack_the_prefix_of_the_averaged_part(name: str, teacher_key: str, prefix: str) -> None:
    keymap = reference_keys(tiny_models.model(name), tiny_models.modality_of(name))
    assert teacher_prefix(keymap, [teacher_key, "stranger"]) == prefix


def test_conv_layers_are_read_without_evaluating_code() -> None:
    assert parse_conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 2") == [(512, 10, 5), (512, 3, 2), (512, 3, 2)]
    with pytest.raises(CheckpointError):
        parse_conv_layers("__import__('os').system('true')")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"layer_norm_first": True}, "layer_norm_first"), ({"extractor_mode": "default"}, "extractor_mode")],
)
def test_an_option_without_a_counterpart_is_refused_by_name(changes: dict, said: str) -> None:
    shapes = {"feature_extractor.conv_layers.0.0.weight": (32, 1, 10)}
    with pytest.raises(CheckpointError, match=said):
        from_fairseq(changes, shapes)


def test_time_major_norms_of_fairseq_1_speech_become_norms_over_the_batch() -> None:
    shapes = {"feature_extractor.conv_layers.0.0.weight": (32, 1, 10)}
    group = from_fairseq({"group_norm_target_layer": True, "instance_norm_targets": True}, shapes)
    assert group.objective.target.layer_norm == "across_batch_and_channels"
    assert group.objective.target.final_norm == "across_batch"
    both = from_fairseq({"instance_norm_target_layer": True, "instance_norm_targets": True}, shapes)
    assert (both.objective.target.layer_norm, both.objective.target.final_norm) == ("instance", "instance")

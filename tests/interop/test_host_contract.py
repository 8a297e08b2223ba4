"""2.0 exports in transformers: options, outputs and methods of its own data2vec classes, or a clear error."""

import copy
import inspect
import json
import sys
import warnings
from typing import Any

import pytest
import torch
from host_models import MODELS, REMOTE, SAMPLES, Folders, inputs, load, pair

warnings.filterwarnings("ignore")

CALLS: list[dict[str, Any]] = [
    {},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"return_dict": False},
    {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
]


def shapes(value: Any) -> Any:
    """The structure of an output; a tuple of layers as the layers it has beyond its model's."""
    if isinstance(value, torch.Tensor):
        return value.shape
    return tuple(shapes(item) for item in value)


@pytest.mark.parametrize("which", MODELS)
def test_outputs_have_the_members_that_transformers_own_classes_give(which: str, folders: Folders) -> None:
    theirs, ours, kind = pair(which, folders, attn_implementation="eager")
    # Ours has one block more in its prenet, of images.
    extra = ours.config.num_hidden_layers - theirs.config.num_hidden_layers
    assert extra == (1 if kind == "vision" else 0)
    for call in CALLS:
        with torch.no_grad():
            expected, given = theirs(**inputs(kind), **call), ours(**inputs(kind), **call)
        assert isinstance(given, tuple) is isinstance(expected, tuple)
        if isinstance(expected, tuple):
            assert len(given) == len(expected)
            continue
        assert list(given.keys()) == list(expected.keys()), call
        for key in expected.keys():  # noqa: SIM118  (its iterator gives values)
            other = shapes(given[key])
            if key in ("hidden_states", "attentions"):
                assert other[:1] * extra + shapes(expected[key]) == other
            else:
                assert other == shapes(expected[key]), (call, key)


@pytest.mark.parametrize("which", MODELS)
def test_wishes_in_the_configuration_are_heeded_as_those_of_a_call(which: str, folders: Folders) -> None:
    auto, folder, more = MODELS[which]
    kind = "vision" if "vision" in which else "speech"
    model = load(auto, folders[f"v2_{folder}"], output_hidden_states=True, **more)
    with torch.no_grad():
        assert len(model(**inputs(kind)).hidden_states) == model.config.num_hidden_layers + 1
        assert model(**inputs(kind), output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(**inputs(kind)), tuple)


@pytest.mark.parametrize("which", MODELS)
def test_methods_and_arguments_of_transformers_own_classes_are_there(which: str, folders: Folders) -> None:
    from transformers import PreTrainedModel

    theirs, ours, _ = pair(which, folders)
    own = [cls for cls in type(theirs).__mro__ if issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel]
    names = {name for cls in own for name, value in vars(cls).items() if inspect.isfunction(value)}
    names -= {"__init__", "_init_weights", "_mask_hidden_states"}
    assert names <= {name for name in dir(ours) if callable(getattr(ours, name))}
    wanted, given = ([*inspect.signature(type(model).forward).parameters] for model in (theirs, ours))
    assert set(wanted) - {"kwargs"} <= set(given)
    # transformers 5.0 has labels last in two of its classes, and where ours are in the others and later.
    order = [name for name in wanted if name not in ("kwargs", "labels")]
    assert [name for name in given if name != "labels"][: len(order)] == order
    for member in ("main_input_name", "input_modalities"):
        assert getattr(ours, member) == getattr(theirs, member)
    assert theirs.supports_gradient_checkpointing is ours.supports_gradient_checkpointing is True


# Options of transformers' classes for which ours have no use: parts that data2vec 2.0 does not have.
NO_USE = {
    *("adapter_kernel_size", "adapter_stride", "num_adapter_layers", "output_hidden_size"),
    *("tdnn_dim", "tdnn_dilation", "tdnn_kernel", "xvector_output_dim"),
    *("layer_scale_init_value", "out_indices", "pool_scales", "use_auxiliary_head", "auxiliary_loss_weight"),
    *("auxiliary_channels", "auxiliary_num_convs", "auxiliary_concat_input", "semantic_loss_ignore_index"),
}


@pytest.mark.parametrize("kind", ["speech", "vision"])
def test_every_option_of_transformers_configurations_is_known_or_refused(kind: str, folders: Folders) -> None:
    from transformers import AutoConfig

    theirs, ours = (AutoConfig.from_pretrained(folders[f"{version}_{kind}"], **REMOTE) for version in ("v1", "v2"))
    fixed = sys.modules[type(ours).__module__].FIXED  # type: ignore[attr-defined]
    missing = {name for name in theirs.to_dict() if not hasattr(ours, name)} - set(fixed) - NO_USE
    assert not missing
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    if kind == "speech":
        sizes += ("inputs_to_logits_ratio", "conv_dim", "conv_kernel", "conv_stride", "num_conv_pos_embeddings")
        sizes += ("conv_pos_kernel_size", "num_conv_pos_embedding_groups", "num_feat_extract_layers", "pad_token_id")
        assert ours.inputs_to_logits_ratio == 320
    for name in sizes if kind == "speech" else sizes[:3]:
        assert getattr(ours, name) == getattr(theirs, name), name
    for name, value in fixed.items():
        config = copy.deepcopy(ours)
        setattr(config, name, not value if isinstance(value, bool) else "relu")
        import transformers

        with pytest.raises(ValueError, match=name):
            transformers.AutoModel.from_config(config, **REMOTE)
    changed = type(ours)(hidden_size=64, num_hidden_layers=2)
    assert (changed.width, changed.depth) == (64, 2)
    again = type(ours).from_dict(json.loads(ours.to_json_string(use_diff=False)))
    assert (again.width, again.heads, again.depth) == (ours.width, ours.heads, ours.depth)


@pytest.mark.parametrize("which", ["speech", "vision"])
def test_attention_implementations_agree_and_what_cannot_be_is_refused(which: str, folders: Folders) -> None:
    folder, given = folders[f"v2_{which}"], inputs(which)
    if which == "speech":
        given["attention_mask"] = (torch.arange(SAMPLES)[None] < torch.tensor([SAMPLES, 4000])[:, None]).long()
    plain, eager = load("AutoModel", folder), load("AutoModel", folder, attn_implementation="eager")
    assert (plain.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    with torch.no_grad():
        expected = plain(**given).last_hidden_state
        assert torch.allclose(eager(**given).last_hidden_state, expected, atol=1e-5)
        asked = plain(**given, output_attentions=True)
        eager.set_attn_implementation("sdpa")
        assert torch.equal(eager(**given).last_hidden_state, expected)
    assert torch.allclose(asked.last_hidden_state, expected, atol=1e-5)
    for weights in asked.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        if which == "speech":
            assert (weights[1, :, :, 12:] == 0).all()
    for other in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError)):
            load("AutoModel", folder, attn_implementation=other)


@pytest.mark.parametrize("which", MODELS)
def test_compiled_traced_copied_and_half_precision_models_give_the_same(which: str, folders: Folders) -> None:
    auto, folder, more = MODELS[which]
    kind = "vision" if "vision" in which else "speech"
    model = load(auto, folders[f"v2_{folder}"], **more)
    with torch.no_grad():
        expected = model(**inputs(kind))[0]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(**inputs(kind))[0], expected)
        traced: Any = torch.jit.trace(model, tuple(torch.randn_like(x) for x in inputs(kind).values()), strict=False)
        value = traced(*inputs(kind).values())
        assert torch.allclose(next(iter(value.values())), expected, atol=1e-5)
        assert torch.equal(copy.deepcopy(model)(*inputs(kind).values())[0], expected)
        for dtype in (torch.float16, torch.bfloat16):
            half = copy.deepcopy(model).to(dtype)
            output = half(**{name: value.to(dtype) for name, value in inputs(kind).items()})[0]
            assert output.dtype is dtype
            assert ((output.float() - expected).norm() / expected.norm()) < 0.03
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs(kind))[0].float()
        assert ((output - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("which", ["speech classes", "vision classes"])
def test_gradient_checkpointing_gives_the_same_gradients(which: str, reentrant: bool, folders: Folders) -> None:
    auto, folder, _ = MODELS[which]
    kind = which.split()[0]
    grads = []
    for checkpointing in (False, True):
        model = load(auto, folders[f"v2_{folder}"], hidden_dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        model(**inputs(kind), labels=torch.tensor([0, 2])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(value is not None for value in grads[1].values())
    assert all(torch.allclose(grads[0][name], value, atol=1e-6) for name, value in grads[1].items())


def test_freezing_leaves_the_rest_to_train(folders: Folders) -> None:
    for which in ("speech", "ctc", "speech classes", "speech frames"):
        theirs, ours, _ = pair(which, folders)
        for model in (theirs, ours):
            model.freeze_feature_encoder()
        frozen = [sum(p.numel() for p in m.parameters() if not p.requires_grad) for m in (theirs, ours)]
        assert frozen[0] == frozen[1] > 0
    model = load("AutoModelForAudioClassification", folders["v2_speech_classes"])
    model.freeze_base_model()
    left = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert left == {"projector", "classifier"}

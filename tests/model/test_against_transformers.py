"""The encoders equal the Hugging Face classes of the same architecture, weight by weight."""

import pytest
import tiny_models
import torch
from torch import Tensor

from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.stack import Teacher

pytestmark = pytest.mark.usefixtures("world_of_one")
HEADS = tiny_models.POST["heads"]


def whole_encoder(config: ModelConfig, name: str) -> tuple[Teacher, dict[str, Tensor]]:
    """A teacher that owns everything, with weights away from their initial zeros and ones."""
    encoder = Teacher(config, tiny_models.target_of(name), TeacherParts())
    initialize(encoder, 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder, {key: value.detach() for key, value in encoder.named_parameters()}


def split_qkv(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = tensor.view(HEADS, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(3, -1, *tensor.shape[1:])
    return parts[0], parts[1], parts[2]


def text_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "stems.text.features.tokens": "embeddings.word_embeddings",
        "stems.text.features.positions": "embeddings.position_embeddings",
        "stems.text.features.norm": "embeddings.LayerNorm",
    }
    block = {
        "attention.out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "ffn.fc1": "intermediate.dense",
        "ffn.fc2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    return renamed(weights, names, block, "encoder.layer", "attention.self.{}", ("query", "key", "value"))


def speech_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "stems.speech.features.norm": "feature_projection.layer_norm",
        "stems.speech.features.proj": "feature_projection.projection",
        "stems.speech.context.norm": "encoder.layer_norm",
    }
    for i in range(7):
        names[f"stems.speech.features.convs.{i}"] = f"feature_extractor.conv_layers.{i}.conv"
        names[f"stems.speech.features.conv_norms.{i}"] = f"feature_extractor.conv_layers.{i}.layer_norm"
    for i in range(5):
        names[f"stems.speech.context.pos_convs.{i}"] = f"encoder.pos_conv_embed.layers.{i}.conv"
    block = {
        "attention.out": "attention.out_proj",
        "norm1": "layer_norm",
        "ffn.fc1": "feed_forward.intermediate_dense",
        "ffn.fc2": "feed_forward.output_dense",
        "norm2": "final_layer_norm",
    }
    return renamed(weights, names, block, "encoder.layers", "attention.{}", ("q_proj", "k_proj", "v_proj"))


def vision_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "stems.vision.features.patch": "embeddings.patch_embeddings.projection",
        "stems.vision.context.cls": "embeddings.cls_token",
        "stems.vision.context.mask_token": "embeddings.mask_token",
        "stems.vision.bias.table": "encoder.relative_position_bias.relative_position_bias_table",
    }
    block = {
        "attention.out": "attention.output.dense",
        "attention.q_bias": "attention.attention.query.bias",
        "attention.v_bias": "attention.attention.value.bias",
        "scale1": "lambda_1",
        "scale2": "lambda_2",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "ffn.fc1": "intermediate.dense",
        "ffn.fc2": "output.dense",
    }
    return renamed(weights, names, block, "encoder.layer", "attention.attention.{}", ("query", "key", "value"))


def renamed(
    weights: dict[str, Tensor],
    names: dict[str, str],
    block: dict[str, str],
    layers: str,
    attention: str,
    qkv: tuple[str, str, str],
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key in names:
            out[names[key]] = value
            continue
        owner, _, leaf = key.rpartition(".")
        if owner in names:
            out[f"{names[owner]}.{leaf}"] = value
        elif key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            part = rest.rpartition(".")[0]
            if part == "attention.qkv":
                for name, piece in zip(qkv, split_qkv(value), strict=True):
                    out[f"{layers}.{index}.{attention.format(name)}.{leaf}"] = piece
            else:
                out[f"{layers}.{index}.{block[rest] if rest in block else f'{block[part]}.{leaf}'}"] = value
    return out


def load(model: torch.nn.Module, weights: dict[str, Tensor], allowed_missing: set[str]) -> torch.nn.Module:
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= allowed_missing
    return model.eval()


@pytest.mark.parametrize("name", ["v1_text", "v2_text"])
@torch.no_grad()
def test_text_equals_data2vec_text(name: str) -> None:
    from transformers import Data2VecTextConfig, Data2VecTextModel

    encoder, weights = whole_encoder(tiny_models.model(name), name)
    sizes = {"vocab_size": 40, "max_position_embeddings": 26, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    config = Data2VecTextConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64, pad_token_id=1, **sizes
    )
    types = "embeddings.token_type_embeddings.weight"
    model = load(Data2VecTextModel(config, add_pooling_layer=False), text_names(weights), {types})
    model.embeddings.token_type_embeddings.weight.zero_()
    batch = tiny_models.batch(name, padded=True)
    assert batch.valid is not None
    theirs = model(batch.inputs, attention_mask=batch.valid.long(), output_hidden_states=True).hidden_states
    for layer, ours in enumerate(encoder.features(batch, None, [0, 1, 2])):
        assert torch.allclose(ours[batch.valid], theirs[layer + 1][batch.valid], atol=1e-5)


@pytest.mark.parametrize("name", ["v1_speech", "v2_speech"])
@torch.no_grad()
def test_speech_equals_data2vec_audio_where_alibi_is_off(name: str) -> None:
    from transformers import Data2VecAudioConfig, Data2VecAudioModel

    encoder, weights = whole_encoder(tiny_models.model(name), name)
    if name == "v2_speech":
        # Data2VecAudio has no ALiBi: with a negative, hence clamped, scale there is none here either.
        weights["stems.speech.bias.scale"].fill_(-1.0)
    config = Data2VecAudioConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        intermediate_size=64,
        conv_dim=[layer[0] for layer in tiny_models.CONVS],
        conv_kernel=[layer[1] for layer in tiny_models.CONVS],
        conv_stride=[layer[2] for layer in tiny_models.CONVS],
        num_conv_pos_embeddings=5,
        conv_pos_kernel_size=19,
        num_conv_pos_embedding_groups=4,
    )
    model = load(Data2VecAudioModel(config), speech_names(weights), {"masked_spec_embed"})
    batch = tiny_models.batch(name)
    theirs = model(batch.inputs, output_hidden_states=True).hidden_states
    for layer, ours in enumerate(encoder.features(batch, None, [0, 1, 2])):
        assert torch.allclose(ours, theirs[layer + 1], atol=1e-5)


@torch.no_grad()
def test_vision_equals_data2vec_vision() -> None:
    from transformers import Data2VecVisionConfig, Data2VecVisionModel

    encoder, weights = whole_encoder(tiny_models.model("v1_vision"), "v1_vision")
    config = Data2VecVisionConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        layer_norm_eps=1e-6,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        use_mean_pooling=True,
        layer_scale_init_value=0.1,
    )
    model = load(Data2VecVisionModel(config, add_pooling_layer=False), vision_names(weights), set())
    batch = tiny_models.batch("v1_vision")
    theirs = model(batch.inputs, output_hidden_states=True).hidden_states
    for layer, ours in enumerate(encoder.features(batch, None, [0, 1, 2])):
        assert torch.allclose(ours, theirs[layer + 1][:, 1:], atol=1e-5)

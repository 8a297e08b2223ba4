"""data2vec written the obvious way on Hugging Face's Data2Vec encoders.

Student and a deep copy of it as the teacher, a full forward pass of both, hooks for the taps, boolean indexing, torch's
AdamW as it comes, one EMA operation a tensor. For 2.0 the teacher runs once for all clones, and the decoder on all
rows. 2.0 vision has no class of its own there: its blocks are `Data2VecTextLayer`s, which compute the same.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.benchmarks.cases import Case
from d2v_scale.benchmarks.products import multiply_through
from d2v_scale.benchmarks.sides import Side, default_adamw, finish_plainly
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.data2vec.targets import tapped_layers
from d2v_scale.interop.huggingface import huggingface_keys, huggingface_settings
from d2v_scale.interop.huggingface_text import add_text_blocks
from d2v_scale.interop.keymap import KeyMap, export_tensors
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.position_bias import sincos_positions, slope_exponents
from d2v_scale.networks.stack import Student
from d2v_scale.process.profiling import part


class HuggingFacePeer(Side):
    """`fused`: with torch's fused AdamW. `onednn`: linears multiply through oneDNN."""

    def __init__(self, case: Case, device: torch.device, *, fused: bool = False, onednn: bool = False) -> None:
        self.recipe = recipe = case.recipe
        ours = Student(recipe.model)
        initialize(ours, recipe.seed)
        self.student = _student(recipe.model, case.modality, ours).to(device)
        multiply_through(self.student, onednn=onednn)
        self.teacher = copy.deepcopy(self.student.encoder).requires_grad_(False).eval()
        options = {"fused": True} if fused else {}
        self.optimizer = default_adamw(self.student.parameters(), recipe.optim, **options)

    def _loss(self, batch: Batch, noise_rtd: Tensor | None) -> Tensor:
        masked_rt = batch.masked_rt
        with part("student"):
            predictions_nd, cls_rd = self.student(batch, masked_rt, noise_rtd)
        with part("teacher"), torch.no_grad():
            targets_btd = self._targets(batch)
        config = self.recipe.objective.loss
        targets_nd = targets_btd.repeat_interleave(batch.clones, 0)[masked_rt]
        width = targets_btd.shape[-1]
        scale = (
            config.scale if config.scale is not None else (1 if config.reduction == "mean_channels" else width**-0.5)
        )
        if config.reduction == "mean_channels":
            scale /= width
        total = _error(predictions_nd, targets_nd, config.beta).sum() * scale / targets_nd.shape[0]
        if config.cls_weight > 0:
            mean_rd = targets_btd.mean(1).repeat_interleave(batch.clones, 0)
            total = total + _error(cls_rd, mean_rd, config.beta).sum() * scale * config.cls_weight / len(mean_rd)
        return total

    def _targets(self, batch: Batch) -> Tensor:
        objective = self.recipe.objective
        with self.teacher.taps(objective.target.tap) as taps:
            self.teacher(batch.inputs)
        tapped = tapped_layers(objective.target, len(taps))
        layers = [taps[layer][:, self.teacher.extra :] for layer in tapped]
        return _average(layers, objective)

    def loss(self, batch: Batch, noise_rtd: Tensor) -> float:
        self.student.eval()
        with torch.no_grad():
            total = float(self._loss(batch, noise_rtd))
        self.student.train()
        return total

    def step(self, batch: Batch, number: int) -> None:
        del number
        total = self._loss(batch, None)
        finish_plainly(total, self.optimizer, self.recipe.optim.clip, self.student, self.student.encoder, self.teacher)


def _error(x: Tensor, y: Tensor, beta: float) -> Tensor:
    return F.smooth_l1_loss(x, y, reduction="none", beta=beta) if beta else F.mse_loss(x, y, reduction="none")


def _average(layers: list[Tensor], objective: ObjectiveConfig) -> Tensor:
    def normalise(x_btd: Tensor, norms: str) -> Tensor:
        for norm in norms.split("+"):
            if norm == "instance":
                x_btd = F.instance_norm(x_btd.transpose(1, 2)).transpose(1, 2)
            elif norm == "layer":
                x_btd = F.layer_norm(x_btd, x_btd.shape[-1:])
        return x_btd

    layers = [normalise(layer, objective.target.layer_norm) for layer in layers]
    return normalise(sum(layers[1:], layers[0]) / len(layers), objective.target.final_norm)


class _Taps:
    """Collects outputs of modules while it is entered."""

    def __init__(self, modules: list[nn.Module], pick: Callable[[Any], Tensor]) -> None:
        self._modules, self._pick = modules, pick
        self._outputs: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self._handles = [
            module.register_forward_hook(lambda _m, _i, output: self._outputs.append(self._pick(output)))
            for module in self._modules
        ]
        return self._outputs

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class _Encoder(nn.Module):
    """What the teacher copies."""

    extra = 0
    blocks: Any

    def taps(self, kind: str) -> _Taps:
        """The second FFN linear's output, or the block's, of every layer."""
        if kind == "block":
            return _Taps(list(self.blocks), lambda output: output[0])
        return _Taps([self.second_linear(block) for block in self.blocks], lambda output: output)

    def second_linear(self, block: Any) -> nn.Module:
        return block.output.dense


class _Speech(_Encoder):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformers import Data2VecAudioConfig, Data2VecAudioModel

        self.model = Data2VecAudioModel(Data2VecAudioConfig(**_settings(model, "speech")))
        self.blocks = self.model.encoder.layers
        self.heads = model.backbone.heads
        self.alibi = modalities.of(model, "speech").has_bias
        if self.alibi:
            self.scale = nn.Parameter(torch.empty(self.heads))

    def second_linear(self, block: Any) -> nn.Module:
        return block.feed_forward

    def forward(self, wave: Tensor, masked: Tensor | None = None, clones: int = 1) -> Tensor:
        if not self.alibi:
            return self.model(wave, mask_time_indices=masked).last_hidden_state
        encoder = self.model.encoder
        features = self.model.feature_extractor(wave).transpose(1, 2)
        x, _ = self.model.feature_projection(features)
        x = x.repeat_interleave(clones, 0)
        blanked = x if masked is None else x.masked_fill(masked[..., None], 0)
        x = x + encoder.pos_conv_embed(blanked)
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        slopes = torch.exp2(-torch.tensor(slope_exponents(self.heads), device=x.device))
        bias = -(places[:, :, None] - places[:, None, :]).abs()[:, None] * slopes[:, None, None]
        bias = bias * self.scale.clamp(min=0)[:, None, None]
        if masked is not None:
            rows = x.shape[0]
            x = x[~masked].view(rows, -1, x.shape[-1])
            both = (~masked[:, :, None] & ~masked[:, None, :])[:, None].expand(-1, self.heads, -1, -1)
            bias = bias[both].view(rows, self.heads, x.shape[1], x.shape[1])
        x = encoder.dropout(encoder.layer_norm(x))
        for block in self.blocks:
            x = block(x, attention_mask=bias)
        return x


class _Text(_Encoder):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformers import Data2VecTextConfig, Data2VecTextModel

        settings = _settings(model, "text")
        self.model = Data2VecTextModel(Data2VecTextConfig(**settings), add_pooling_layer=False)
        self.blocks = self.model.encoder.layer

    def forward(self, tokens: Tensor, masked: Tensor | None = None, clones: int = 1) -> Tensor:
        if masked is None:
            return self.model(tokens).last_hidden_state
        x = self.model.embeddings(tokens).repeat_interleave(clones, 0)
        x = x[~masked].view(x.shape[0], -1, x.shape[-1])
        return self.model.encoder(x).last_hidden_state


class _Vision1(_Encoder):
    extra = 1

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformers import Data2VecVisionConfig, Data2VecVisionModel

        self.model = Data2VecVisionModel(Data2VecVisionConfig(**_settings(model, "vision")), add_pooling_layer=False)
        self.blocks = self.model.encoder.layer

    def forward(self, images: Tensor, masked: Tensor | None = None, clones: int = 1) -> Tensor:
        del clones
        return self.model(images, bool_masked_pos=masked).last_hidden_state


class _Vision2(_Encoder):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformers import Data2VecTextConfig
        from transformers.models.data2vec.modeling_data2vec_text import Data2VecTextLayer

        assert model.vision is not None
        vision, backbone = model.vision, model.backbone
        config = Data2VecTextConfig(
            hidden_size=backbone.width,
            num_attention_heads=backbone.heads,
            intermediate_size=backbone.ffn,
            hidden_dropout_prob=backbone.dropout,
            attention_probs_dropout_prob=backbone.attention_dropout,
            layer_norm_eps=backbone.norm_eps,
        )
        config._attn_implementation = "sdpa"
        self.patch = nn.Conv2d(vision.channels, backbone.width, vision.patch_size, vision.patch_size)
        self.extra = vision.extra_token_count
        self.cls = nn.Parameter(torch.empty(1, self.extra, backbone.width))
        self.norm = nn.LayerNorm(backbone.width, backbone.norm_eps)
        positions = sincos_positions(backbone.width, vision.grid)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks: Any = nn.ModuleList(
            Data2VecTextLayer(config) for _ in range(backbone.prenet_depth + backbone.depth)
        )

    def forward(self, images: Tensor, masked: Tensor | None = None, clones: int = 1) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.positions
        x = x.repeat_interleave(clones, 0)
        if masked is not None:
            x = x[~masked].view(x.shape[0], -1, x.shape[-1])
        x = self.norm(torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1))
        for block in self.blocks:
            x = block(x)
        return x


class _Decoder(nn.Module):
    """The 2.0 decoder, on every position of every row."""

    def __init__(self, ours: Any, grid: tuple[int, int] | None) -> None:
        """`grid`: rows and columns of planar positions; None: they are a line."""
        super().__init__()
        self.convs = copy.deepcopy(ours.convs) if grid else nn.ModuleList(_plain(conv) for conv in ours.convs)
        layers = [ours.proj] if len(ours.projection_names) == 1 else [ours.proj1, nn.GELU(), ours.proj2]
        self.projection = copy.deepcopy(nn.Sequential(*layers))
        self.grid, self.residual, self.dropout = grid, ours.residual, nn.Dropout(ours.dropout)

    def forward(self, visible_rsd: Tensor, masked_rt: Tensor, noise_rtd: Tensor) -> Tensor:
        rows, length = masked_rt.shape
        x = noise_rtd.clone()
        x[~masked_rt] = self.dropout(visible_rsd).flatten(0, 1).to(x.dtype)
        x = x.transpose(1, 2)
        x = x.reshape(rows, -1, *self.grid) if self.grid else x
        for conv in self.convs:
            out = conv(x)
            out = out[..., : self.grid[0], : self.grid[1]] if self.grid else out[..., :length]
            out = F.gelu(F.layer_norm(out.movedim(1, -1), out.shape[1:2]).movedim(-1, 1))
            x = out + x if self.residual and out.shape == x.shape else out
        return self.projection(x.flatten(2).transpose(1, 2))[masked_rt]


def _plain(conv: nn.Conv1d) -> nn.Conv1d:
    """Of (R, C, T), with the same values."""
    padding = int(conv.padding[0])
    plain = nn.Conv1d(conv.in_channels, conv.out_channels, conv.kernel_size[0], padding=padding, groups=conv.groups)
    plain.load_state_dict(conv.state_dict())
    return plain


class _Student1(nn.Module):
    def __init__(self, encoder: _Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batch: Batch, masked: Tensor, noise_rtd: Tensor | None) -> tuple[Tensor, None]:
        del noise_rtd
        if batch.student_inputs is not None:
            x = self.encoder(batch.student_inputs)
        else:
            x = self.encoder(batch.inputs, masked)
        return self.head(x[:, self.encoder.extra :][masked]), None


class _Student2(nn.Module):
    def __init__(self, encoder: _Encoder, decoder: _Decoder, noise_std: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.noise_std = encoder, decoder, noise_std

    def forward(self, batch: Batch, masked: Tensor, noise_rtd: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.encoder(batch.inputs, masked, batch.clones)
        if noise_rtd is None:
            noise_rtd = torch.randn(*masked.shape, x.shape[-1], device=x.device, dtype=x.dtype) * self.noise_std
        return self.decoder(x[:, self.encoder.extra :], masked, noise_rtd), x[:, self.encoder.extra - 1]


def _settings(model: ModelConfig, modality: Any) -> dict[str, Any]:
    settings = huggingface_settings(model, modality)
    return {key: value for key, value in settings.items() if key not in ("model_type", "architectures", "dtype")}


# What there is to compare with: transformers' classes, a row a modality.
_ENCODERS: dict[str, Callable[[ModelConfig], _Encoder]] = {
    "vision": lambda model: _Vision2(model) if model.visible_only else _Vision1(model),
    "speech": _Speech,
    "text": _Text,
}


@torch.no_grad()
def _student(model: ModelConfig, modality: Any, ours: Student) -> Any:
    """The peer's student with the values of ours."""
    encoder = _ENCODERS[modality](model)
    keys = huggingface_keys(model, modality)
    if isinstance(encoder, _Vision2):
        keys = _vision2_keys(model)
    values = dict(export_tensors(keys, dict(ours.named_parameters())))
    target: Any = encoder if isinstance(encoder, _Vision2) else encoder.model
    absent = {name for name, _ in target.named_parameters()} - values.keys()
    assert absent <= {"masked_spec_embed", "embeddings.mask_token"}, f"not filled: {sorted(absent)}"
    target.load_state_dict({name: value for name, value in values.items() if name in target.state_dict()}, strict=False)
    if isinstance(encoder, _Speech) and encoder.alibi:
        encoder.scale.copy_(dict(ours.named_parameters())["stems.speech.bias.scale"])
    predictor: Any = ours.predictors[modality]
    if model.visible_only:
        grid: Any = modalities.of(model, modality).fixed_grid if predictor.dimensions == 2 else None
        return _Student2(encoder, _Decoder(predictor, grid), model.predictor.noise_std)
    layers = [predictor.fc1, nn.GELU(), predictor.fc2] if model.predictor.kind == "mlp" else [predictor.proj]
    return _Student1(encoder, copy.deepcopy(nn.Sequential(*layers)))


def _vision2_keys(model: ModelConfig) -> KeyMap:
    keys = KeyMap()
    add_text_blocks(keys, model, "vision", "blocks")
    keys.layer("stems.vision.features.patch", "patch")
    keys.add("stems.vision.context.cls", "cls")
    keys.layer("stems.vision.context.norm", "norm")
    return keys

"""What a row of the table of the reference's models (`reference_table.TABLE`) says of one kind of stem."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import Reference, Settings, Shapes
from d2v_scale.modalities import Kind
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts

Tensors = Mapping[str, Tensor]


class ReferenceRow(ABC):
    """One kind of stem. `model` is always a model with this stem alone (`ModelConfig.of`), `name` the stem's name.

    1.0 has a program for each; 2.0 is one program, in which modalities are sections.
    """

    kind: ClassVar[Kind]
    first_mark: ClassVar[str]
    """What some keys of a 1.0 model begin with, and no other's."""
    word: ClassVar[str]
    """2.0: name of its section of the configuration, and in capitals of its part of the keys."""

    @property
    def second_prefix(self) -> str:
        """What keys of its part of a 2.0 model begin with."""
        return f"modality_encoders.{self.word.upper()}"

    # 1.0

    first_is_fairseq: ClassVar[bool] = True
    """Whether the program is fairseq, or data2vec_vision."""
    first_file: ClassVar[str] = "checkpoint.pt"
    first_prefix: ClassVar[str]
    """What a teacher's keys lack, as the encoder alone is averaged."""
    first_nested: ClassVar[str] = "_ema"
    """Where the teacher is in the state dict."""

    @abstractmethod
    def first_keys(self, model: ModelConfig, name: str) -> KeyMap:
        """The names of the 1.0 model."""

    def first_content(
        self, student: Tensors, teacher: Tensors, model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts
    ) -> dict[str, Any]:
        """A checkpoint of the 1.0 program, `teacher` by the student's names; empty: without. Raises CheckpointError
        where the program has no such model."""
        prefix = "" if parts.with_predictor else self.first_prefix
        settings = self.first_settings(model, objective, parts)
        return self.fairseq_content(student, teacher, prefix, self.first_nested, settings, model)

    @abstractmethod
    def first_settings(self, model: ModelConfig, objective: ObjectiveConfig, parts: TeacherParts) -> dict[str, Any]:
        """`cfg.model` of the 1.0 program: what decides sizes and computation, without the optimizer's side."""

    @abstractmethod
    def read_first(self, settings: Settings, shapes: Shapes, tokens: Settings | None) -> Reference:
        """From `cfg.model` of fairseq's 1.0 program. Raises CheckpointError for options that are not supported."""

    # 2.0

    block_masks: ClassVar[Literal["block1d", "block2d"] | None]
    """Kind of masks of a length above 1; None: they are single positions whatever the length."""
    decoder_kind: ClassVar[Literal["conv1d", "conv2d"]] = "conv1d"
    dropout_key: ClassVar[str] = "prenet_dropout"
    """Of its section: the dropout on the input of the first block."""
    averages_features: ClassVar[bool] = False
    """What `ema_local_encoder` is where a configuration does not say."""
    may_average_blocks_only: ClassVar[bool] = False
    """Whether published models had `ema_encoder_only`."""

    @abstractmethod
    def add_stem_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        """The names of the stem in a 2.0 model, without its prenet."""

    @abstractmethod
    def stem_settings(self, model: ModelConfig) -> dict[str, Any]:
        """What its section of a 2.0 configuration has beside what all have. Raises CheckpointError where it has no
        such stem."""

    @abstractmethod
    def read_stem(self, model: ModelConfig, stem: Settings, shapes: Shapes, tokens: Settings | None) -> None:
        """Enter the stem of a 2.0 configuration's section. Raises CheckpointError for options that are not
        supported."""

    # Both

    def special_words(self, model: ModelConfig) -> dict[str, int] | None:
        """Ids that a checkpoint names beside the weights."""
        del model
        return None

    def recorded_inputs(self, io: Tensors) -> tuple[Tensor | None, Tensor | None]:
        """Of a recorded run: the inputs, and those of the student where they differ."""
        return io.get("in.source"), None

    def fairseq_content(
        self,
        student: Tensors,
        teacher: Tensors,
        prefix: str,
        nested: str,
        settings: dict[str, Any],
        model: ModelConfig,
    ) -> dict[str, Any]:
        """A checkpoint of fairseq."""
        content: dict[str, Any] = {"model": dict(student)}
        if teacher:
            content["model"][nested] = {key.removeprefix(prefix): tensor for key, tensor in teacher.items()}
        content["cfg"] = {"model": settings}
        words = self.special_words(model)
        return content if words is None else content | {"special_words": words}


def first_layers(keys: KeyMap, config: ModelConfig, prefix: str) -> None:
    """Blocks of fairseq's 1.0 models."""
    for i in range(config.backbone.depth):
        ours, theirs = f"blocks.{i}", f"{prefix}.{i}"
        for part in ("weight", "bias"):
            names = tuple(f"{theirs}.self_attn.{which}_proj.{part}" for which in "qkv")
            keys.separate_qkv(f"{ours}.attention.qkv.{part}", names, config.backbone.heads)  # type: ignore[arg-type]
        keys.layer(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        keys.layer(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
        keys.layer(f"{ours}.ffn.fc1", f"{theirs}.fc1")
        keys.layer(f"{ours}.ffn.fc2", f"{theirs}.fc2")
        keys.layer(f"{ours}.norm2", f"{theirs}.final_layer_norm")


def timm_block(keys: KeyMap, config: ModelConfig, ours: str, theirs: str) -> None:
    """A block of 2.0, and of data2vec_vision."""
    backbone = config.backbone
    keys.layer(f"{ours}.norm1", f"{theirs}.norm1")
    keys.fused_qkv(f"{ours}.attention.qkv.weight", f"{theirs}.attn.qkv.weight", backbone.heads)
    if backbone.key_bias:
        keys.fused_qkv(f"{ours}.attention.qkv.bias", f"{theirs}.attn.qkv.bias", backbone.heads)
    else:
        keys.add(f"{ours}.attention.q_bias", f"{theirs}.attn.q_bias")
        keys.add(f"{ours}.attention.v_bias", f"{theirs}.attn.v_bias")
    keys.layer(f"{ours}.attention.out", f"{theirs}.attn.proj")
    keys.layer(f"{ours}.norm2", f"{theirs}.norm2")
    keys.layer(f"{ours}.ffn.fc1", f"{theirs}.mlp.fc1")
    keys.layer(f"{ours}.ffn.fc2", f"{theirs}.mlp.fc2")
    if backbone.layer_scale > 0:
        keys.add(f"{ours}.scale1", f"{theirs}.gamma_1")
        keys.add(f"{ours}.scale2", f"{theirs}.gamma_2")
